"""A step of pyreg.optim where parameters lie on several devices: one sweep of each.

Without a GPU two places on the CPU stand for them: the code asks `place_of` alone.
"""

from __future__ import annotations

import pytest
import torch
from trained import NET, ONE_EACH, make, minimizing, net, same

import pyreg
from pyreg import optim
from pyreg.optim import fused, parts, precision

PRECISIONS = {
    "float64": (torch.float64, {}),
    "masters": (torch.bfloat16, {"master_weights": True}),
    "rounding": (torch.bfloat16, {"stochastic_rounding": True, "seed": 3}),
}


@pytest.fixture
def two_devices(monkeypatch):
    """Weights on one, biases on the other."""
    monkeypatch.setattr(parts, "place_of", lambda t: t.dim())


def step(opt, model, k: int, without: str = "") -> None:
    generator = torch.Generator().manual_seed(k)
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if name == without:
            p.grad = None
    opt.step()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_one_sweep_of_each(swept, monkeypatch, name, options, mode, precision):
    """The bits of a step in one place; the value is a sum of two in another order."""
    dtype, how = PRECISIONS[precision]
    pair = []
    for places in (1, 2):
        if places == 2:
            monkeypatch.setattr(parts, "place_of", lambda t: t.dim())
        model = net(dtype)
        reg = pyreg.Regularizer(model, {"0.*": pyreg.L1(0.02), "2.weight": NET})
        opt = make(optim, name, model, minimizing(options), regularizer=reg, mode=mode, **how)
        values = []
        for k in range(4):
            step(opt, model, k, without="0.bias" if k == 1 else "")
            values.append((dict(reg.last_value), opt.last_zeros))
        pair.append((opt, values))
    assert len(pair[1][0]._plan[1].parts) == 2
    same(pair[0][0], pair[1][0])
    for (one, zeros), (two, zeros_of_two) in zip(pair[0][1], pair[1][1], strict=True):
        assert zeros == zeros_of_two
        assert one.keys() == two.keys()
        for pattern in one:
            torch.testing.assert_close(one[pattern], two[pattern], rtol=1e-6, atol=0)
    assert pair[0][1][-1][1] > 0 or mode == "grad" or precision == "rounding"


@pytest.mark.parametrize("precision", ["float64", "masters"])
@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_a_device_that_falls_back(native, two_devices, monkeypatch, name, options, mode, precision):
    """An anchor on the weights sends them to torch's step, and the biases are swept."""
    dtype, how = PRECISIONS[precision]
    options, fell, fall = minimizing(options), [], fused.step_by_torch

    def by_torch(optimizer, part, tensors, wide):
        fell.append([t.dim() for t in tensors])
        return fall(optimizer, part, tensors, wide)

    monkeypatch.setattr(fused, "step_by_torch", by_torch)
    pair = []
    for places in (2, 1):
        model = net(dtype)
        anchor = {"0.weight": torch.ones_like(model[0].weight)}
        rules = {"0.weight": pyreg.L1(0.02, anchor=anchor), "*": NET}
        reg = pyreg.Regularizer(model, rules)
        if places == 2:
            opt = make(optim, name, model, options, regularizer=reg, mode=mode, **how)
        else:
            monkeypatch.setattr(parts, "place_of", lambda t: 0)
            opt = make(optim, name, model, options, regularizer=reg, mode=mode, **how)
        for k in range(4):
            step(opt, model, k, without="2.bias" if k == 1 else "")
        pair.append((opt, reg))
    assert fell[:4] == [[2, 2]] * 4  # of the first; the second falls back as a whole
    assert [len(of_step) for of_step in fell[4:]] == [4, 3, 4, 4]
    # 4 steps of some 16 roundings of terms of at most 4; of rounded weights, one more of theirs.
    tolerance = 1e-11 if precision == "float64" else 4 * 64 * 2**-8
    same(pair[0][0], pair[1][0], tolerance, tolerance)
    loose = 1e-6 if precision == "float64" else 1e-2
    for pattern, value in pair[0][1].last_value.items():
        torch.testing.assert_close(value, pair[1][1].last_value[pattern], rtol=loose, atol=0)
    assert precision != "float64" or pair[0][0].last_zeros == pair[1][0].last_zeros


@pytest.mark.parametrize("missing", [True, False])
def test_nothing_is_stepped_if_one_device_cannot_be(native, two_devices, missing):
    model = net()
    opt = make(optim, "AdamW", model, {"lr": 0.02}, regularizer=pyreg.Regularizer(model, NET))
    step(opt, model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    opt.state[model[2].bias]["exp_avg"] = torch.zeros(7, dtype=torch.float64)
    if missing:
        del opt.state[model[2].bias]["exp_avg"]
    with pytest.raises(ValueError, match=r"2\.bias"):
        step(opt, model, 1)
    for p, was in zip(model.parameters(), before, strict=True):
        assert p.equal(was)


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_an_expanded_parameter_is_named_before_anything_changes(native, mode):
    good, bad = (torch.nn.Parameter(torch.ones(n).expand(4)) for n in (4, 1))
    opt = optim.AdamW([good, bad], lr=0.1, regularizer=pyreg.L1(0.1), mode=mode)
    for p in (good, bad):
        p.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"params\[1\] is expanded"):
        opt.step()
    for t in (good, good.grad, bad.grad):
        assert torch.equal(t, torch.ones(4))
    assert not opt.state


def test_a_scaler_is_asked_once_for_all(native, two_devices):
    """A step that is skipped is skipped everywhere; a scaled one is unscaled everywhere."""
    results = []
    for scale, skipped in ((None, 0.0), (8.0, 0.0), (8.0, 1.0)):
        model = net()
        opt = make(optim, "SGD", model, {"lr": 0.5}, regularizer=pyreg.L1(0.01), mode="prox")
        if scale is not None:
            opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(skipped)
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).double() * (scale or 1.0)
        opt.step()
        results.append([p.detach().clone() for p in model.parameters()])
    plain, scaled, skipped = results
    for a, b, c, start in zip(plain, scaled, skipped, net().parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        assert not a.equal(start)
        assert c.equal(start)


def test_a_captured_step_does_not_round_at_random(native, monkeypatch):
    """It would round the same way at every replay."""
    model = net(torch.bfloat16)
    opt = make(optim, "SGD", model, {"lr": 0.1}, stochastic_rounding=True)
    monkeypatch.setattr(precision, "captured", lambda p: True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="would replay the same random numbers"):
        step(opt, model, 0)
    for p, was in zip(model.parameters(), before, strict=True):
        assert p.equal(was)
    assert not opt.state


@pytest.mark.skipif(
    not hasattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check"),
    reason="torch asks another way before 2.11",
)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_a_captured_step_counts_on_the_gpu(native, monkeypatch, name):
    """A counter on the CPU would be replayed as it is now: torch's error, before anything moves."""

    class Stream:
        def is_capturing(self) -> bool:
            return True

    model = net()
    opt = make(optim, name, model, {"lr": 0.1}, regularizer=pyreg.L1(0.01))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="capturable is False"):
        step(opt, model, 0)
    for p, was in zip(model.parameters(), before, strict=True):
        assert p.equal(was)
