"""pyreg.optim over Triton's kernels, in its interpreter: the same steps as over the native ones."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from trained import NET, ONE_EACH, make, minimizing

import pyreg
from pyreg import optim
from pyreg.optim import arguments

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set"
)


def net(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 2)).to(dtype)


def compare(name, options, dtype, mode, tolerance, **more) -> list[optim.AdamW]:
    """Three steps of each; `more` goes to both."""
    optimizers = []
    for backend in ("native", "triton"):
        model = net(dtype)
        rules = {"0.*": NET, "2.weight": pyreg.L1(pyreg.schedules.Linear(0.0, 0.1, 3))}
        reg = pyreg.Regularizer(model, rules)
        opt = make(optim, name, model, options, regularizer=reg, mode=mode, **more)
        with pyreg.use_backend(backend):
            for k in range(3):
                for i, p in enumerate(model.parameters()):
                    generator = torch.Generator().manual_seed(10 * k + i)
                    p.grad = torch.randn(p.shape, generator=generator).to(dtype)
                opt.step()
        optimizers.append(opt)
    a, b = optimizers
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=tolerance)
        for kind, s in a.state[p].items():
            if isinstance(s, torch.Tensor):
                torch.testing.assert_close(b.state[q][kind], s, rtol=0, atol=tolerance)
    for rule, value in a.regularizer.last_value.items():
        torch.testing.assert_close(b.regularizer.last_value[rule], value, rtol=1e-6, atol=0)
    assert isinstance(b.last_zeros, int)
    assert b.last_zeros == a.last_zeros
    return optimizers


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_each_optimizer(swept, name, options, mode):
    """1e-6: two roundings of 2^-24 of numbers under 4, and what three steps make of them."""
    options = minimizing(options)
    compare(name, options, torch.float32, mode, 1e-6)


@pytest.mark.parametrize("how", ["state_dtype", "master_weights", "stochastic_rounding"])
def test_bfloat16(swept, how):
    """The same bits: nothing is rounded but by formulas that are the same."""
    more = {how: torch.float32 if how == "state_dtype" else True}
    compare("AdamW", {"lr": 0.02}, torch.bfloat16, "prox", 0.0, **more)


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_numbers_computed_on_the_device(swept, monkeypatch, name, options):
    """As for counters and learning rates that lie on a GPU: the numbers that the host computes."""
    seen = []

    def kept(self, *args, numbers=None, **kwargs):
        seen.append(args)
        return original(self, *args, **kwargs)

    triton = pyreg.dispatch.backend("triton")
    original = type(triton).step
    monkeypatch.setattr(type(triton), "step", kept)
    options = minimizing(options)
    models = []
    for on_device in (False, True):
        if on_device:
            monkeypatch.setattr(arguments, "_gpu_of", lambda numbers: torch.device("cpu"))
        model = net(torch.float32)
        opt = make(optim, name, model, options, regularizer=NET, mode="prox")
        with pyreg.use_backend("triton"):
            for _ in range(2):
                for p in model.parameters():
                    p.grad = torch.full_like(p, 0.5)
                opt.step()
        models.append(model)
    assert [isinstance(args[5], torch.Tensor) for args in seen] == [False, False, True, True]
    for args, other in zip(seen[:2], seen[2:], strict=True):
        for i, (numbers, metric) in enumerate(args[5][s] for s in args[4]):
            row = [*numbers, *[0.0] * (9 - len(numbers)), *metric[1:4]]
            torch.testing.assert_close(
                other[5][i], torch.tensor(row, dtype=torch.float64), rtol=1e-14, atol=0
            )
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
