"""What pyreg.profile refuses, in a sentence and before anything runs."""

from __future__ import annotations

import pytest
import torch
from profiled import L1, model
from torch import nn

import pyreg
from pyreg.profiling import WORKLOADS
from pyreg.profiling.workloads import Workload


def nan() -> nn.Module:
    net = model()
    nn.init.constant_(net[3].bias, float("nan"))
    return net


REFUSED = {
    "no model": (lambda: 3, {}, TypeError, "model: expected a module or .* got 3"),
    "no parameters": (nn.ReLU, {}, ValueError, "model: it has no parameters"),
    "all frozen": (
        lambda: model().requires_grad_(False),
        {},
        ValueError,
        "none of its 6 parameters requires a gradient",
    ),
    "no pair": (lambda: [torch.ones(2)], {}, TypeError, r"model: item 0: .* got Tensor"),
    "no elements": (
        lambda: {"w": nn.Parameter(torch.ones(0))},
        {},
        ValueError,
        "its parameters have no elements",
    ),
    "meta": (
        lambda: nn.Linear(2, 2, device="meta"),
        {},
        ValueError,
        r"params\[0\] \('weight'\): is on meta and has no memory; make the model on cpu, or call",
    ),
    "complex": (
        lambda: {"w": nn.Parameter(torch.ones(2, dtype=torch.complex64))},
        {},
        TypeError,
        r"\('w'\): expected a floating tensor",
    ),
    "not finite": (nan, {}, ValueError, "model: '3.bias' has elements that are not finite"),
    "a device": (model, {"device": "mps"}, ValueError, "device: expected cpu or cuda, got mps"),
    "a way": (model, {"ways": ["lop"]}, ValueError, "ways: 'lop' is none of 'loop', "),
    "a name of ways": (model, {"ways": "loop"}, ValueError, "ways: expected a list of names"),
    "a limit": (model, {"ways": ["flat.sum()"]}, ValueError, r"'flat.sum\(\)' is none of"),
    "no rounds": (model, {"rounds": 0}, ValueError, "rounds: expected 1 or more, got 0"),
    "half a round": (model, {"rounds": 1.5}, TypeError, "rounds: expected a whole number, got 1.5"),
    **{
        f"{seconds} seconds": (
            model,
            {"seconds": seconds},
            ValueError,
            f"seconds: expected a finite number, 0 or above, got {seconds}",
        )
        for seconds in (float("inf"), float("nan"), -1.0)
    },
    "a trace": (model, {"trace": "nowhere/a"}, ValueError, "trace: there is no folder .*nowhere"),
    "a step": (model, {"step": 3}, TypeError, "step: expected a callable .* got 3"),
    "a step of shapes": (
        lambda: WORKLOADS["tiny"],
        {"step": lambda: None},
        ValueError,
        "step: a workload of shapes alone takes no training step",
    ),
    "a penalty": (model, {"penalty": 1e-5}, TypeError, "penalty: expected a pyreg penalty"),
    "anchored": (
        model,
        {"penalty": pyreg.L2(1.0, anchor={"0.weight": torch.zeros(30, 20)})},
        TypeError,
        "has an anchor or weights",
    ),
    "a tensor's strength": (
        model,
        {"penalty": pyreg.L1(torch.tensor(1.0))},
        TypeError,
        "penalty: lam is to be a number here",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_named_before_anything_runs(name, monkeypatch):
    make, options, error, message = REFUSED[name]
    ran = []
    monkeypatch.setattr("pyreg.profiling.model.measure", lambda *a, **k: ran.append(1))
    options = {"penalty": L1, **options}
    with pytest.raises(error, match=message):
        pyreg.profile(make(), options.pop("penalty"), **options)
    assert not ran


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu():
    with pytest.raises(ValueError, match="device: no GPU here"):
        pyreg.profile(model(), L1, device="cuda")


def test_more_than_there_is():
    """Said before a byte is allocated: 8e18 of them could not be."""
    huge = Workload("huge", "huge", (("w", (10**9, 10**9)),))
    with pytest.raises(MemoryError, match=r"huge: .* needs about .* GB on cpu, and .* GB are free"):
        pyreg.profile(huge, L1)
