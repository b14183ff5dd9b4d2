"""What an optimizer's metric is read from, at the edges of what it can be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyreg
from pyreg import attachment, metric
from pyreg.attachment import metric_of_rows
from pyreg.metric import METRICS


def test_a_gain():
    """(1 - dampening) / (1 - momentum): 0 for a dampening of 1, and none where that is negative."""
    for momentum, dampening, expected in (
        (0.0, 7.0, 1),
        (0.5, 0.0, 2),
        (0.5, 0.5, 1),
        (0.5, 1.0, 0),
    ):
        assert metric.gain({"momentum": momentum, "dampening": dampening}) == expected
    for momentum, dampening in ((0.5, 1.5), (0.5, math.nan), (1.0, 0.0), (math.nan, 0.0)):
        group = {"momentum": momentum, "dampening": dampening}
        said = f"momentum={momentum:g}, dampening={dampening:g}: no steady step"
        with pytest.raises(ValueError, match=said):
            metric.gain(group)
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.5, dampening=1.5)
    with pytest.raises(ValueError, match=r"dampening=1\.5: no steady step"):
        pyreg.Regularizer({"w": w}, pyreg.L1(0.1)).attach(optimizer, "prox")


def test_radam_rectifies_beyond_a_length_of_5():
    """As torch's does: not at 5, which this beta2 gives exactly at step 6. Its step without a
    rectifier is lr * m / (1 - beta1^k), where the variance has no part."""
    beta2, k = 0.8397685748659791, 6
    longest = 2 / (1 - beta2) - 1
    assert longest - 2 * k * beta2**k / (1 - beta2**k) == 5
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.RAdam([w], lr=0.5, betas=(0.0, beta2))
    for _ in range(k):
        before = w.item()
        w.grad = torch.full_like(w, 3.0)
        optimizer.step()
    assert before - w.item() == pytest.approx(0.5 * 3.0, rel=1e-12)
    assert metric.radam(optimizer.param_groups[0], optimizer.state[w]) == metric.Metric(None, 0.5)
    optimizer.step()
    assert metric.radam(optimizer.param_groups[0], optimizer.state[w]).moment is not None


def test_a_moment_that_cannot_be():
    w = torch.ones(2, 3)
    for moment, error, said in (
        (torch.ones(2, 3, dtype=torch.long), TypeError, "moment is torch.int64, expected floating"),
        (torch.ones(3, 2), ValueError, r"\[2, 3\] on cpu, but .* moment is \[3, 2\] on cpu"),
        (w.to("meta"), ValueError, r"\[2, 3\] on cpu, but .* moment is \[2, 3\] on meta"),
    ):
        with pytest.raises(error, match=rf"^fc\.weight: .*{said}"):
            metric.check_moment(metric.Metric(moment, 1.0), w, "fc.weight")
    metric.check_moment(metric.Metric(w.half(), 1.0), w, "fc.weight")
    metric.check_moment(metric.Metric(None, 1.0), w, "fc.weight")


def on_a_gpu(monkeypatch):
    """As if optimizers kept their numbers there."""
    for module in (attachment, metric):
        monkeypatch.setattr(module, "waits", lambda x: True)
    monkeypatch.setattr(attachment, "numbers", lambda given: [None] * len(given))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("Adam", {"lr": torch.tensor([1e-3]), "fused": True}),
        ("RAdam", {"betas": (0.9, 0.6)}),
        ("RMSprop", {"centered": True}),
    ],
)
def test_counts_on_a_gpu_beside_odd_numbers(cls, options, monkeypatch):
    """A rate in a tensor of one element, a rectifier without a bound, a moment made anew."""
    params = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    optimizer = getattr(torch.optim, cls)(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    on_a_gpu(monkeypatch)
    of = metric_of_rows(optimizer, METRICS[type(optimizer)])
    for m in map(of, params):
        steps = m.numerator / (m.factor * m.moment.sqrt() + m.offset)
        assert steps.shape == (3,)
        assert (steps > 0).all()


@pytest.mark.parametrize("cls", METRICS, ids=lambda cls: cls.__name__)
def test_as_many_readings_as_counts(cls, monkeypatch):
    """Of parameters of a group that took as many steps the numbers are made once; each has its own
    moment, and the very numbers that it would have alone."""
    params = [nn.Parameter(torch.randn(3 + i)) for i in range(9)]
    groups = [{"params": params[:6]}, {"params": params[6:], "lr": 0.03}]
    optimizer = cls(groups, lr=0.1)
    for k in range(8):
        for i, p in enumerate(params):  # (the first ones take fewer steps)
            p.grad = torch.randn_like(p) if k >= 8 - min(i, 4) else None
        optimizer.step()
    read, readings = METRICS[cls], []

    def counted(group, state):
        readings.append(group["lr"])
        return read(group, state)

    monkeypatch.setattr(attachment, "BY_COUNT", {counted})
    of = metric_of_rows(optimizer, counted)
    found = {id(p): of(p) for p in params}
    assert found[id(params[0])] is None
    assert len(readings) <= 6  # counts of 0 to 4, and 4 with another rate
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p is not params[0]:
                alone, own = read(group, optimizer.state[p]), found[id(p)]
                assert own.moment is alone.moment
                assert own[1:] == alone[1:]


def test_a_count_that_is_no_single_number():
    """It is read by itself, and so is one in a subclass's state that has no moment yet."""
    params = [nn.Parameter(torch.randn(3)) for _ in range(4)]
    optimizer = torch.optim.Adam(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[params[0]]["step"] = torch.full((3,), 2.0)
    optimizer.state[params[1]]["step"] = 2
    del optimizer.state[params[2]]["exp_avg_sq"]
    of = metric_of_rows(optimizer, METRICS[torch.optim.Adam])
    assert of(params[0]).factor.tolist() == pytest.approx([(1 - 0.999**2) ** -0.5] * 3, rel=1e-4)
    assert of(params[1]).factor == pytest.approx((1 - 0.999**2) ** -0.5)
    assert of(params[3]).factor == pytest.approx((1 - 0.999) ** -0.5)
    with pytest.raises(KeyError, match="exp_avg_sq"):
        of(params[2])


@pytest.mark.parametrize("cls", ["Adam", "AdamW", "NAdam", "RAdam", "Adagrad"])
def test_counts_on_a_gpu_are_read_together(cls, monkeypatch):
    """As many operations for many parameters as for two, and each its own numbers."""
    cls = getattr(torch.optim, cls)
    params = [nn.Parameter(torch.randn(3 + i)) for i in range(9)]
    optimizer = cls(params, lr=0.1)
    for k in range(8):
        for i, p in enumerate(params):  # (the first ones take fewer steps)
            p.grad = torch.randn_like(p) if k >= 8 - i else None
        optimizer.step()
    params[0].grad, moved = None, params[1:]
    expected = [metric_of_rows(optimizer, METRICS[cls])(p) for p in params]

    class Counted(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += not any(
                view in str(function) for view in ("unbind", "detach", "view")
            )
            return function(*args, **(kwargs or {}))

    counts = []
    on_a_gpu(monkeypatch)
    for some in (moved[:2], moved):
        only = cls(some, lr=0.1)
        only.state.update({p: optimizer.state[p] for p in some})
        with Counted() as counted:
            of = metric_of_rows(only, METRICS[cls])
            found = [of(p) for p in some]
        counts.append(counted.operations)
    assert counts[0] == counts[1] > 0
    assert expected[0] is None
    for a, b in zip(expected[1:], found, strict=True):
        assert b.root == a.root
        moment = torch.zeros(()) if a.moment is None else a.moment
        root = b.moment.sqrt() if b.root else b.moment
        steps = b.numerator / (b.factor * root + b.offset)
        own = a.numerator / (a.factor * (moment.sqrt() if a.root else moment) + a.offset)
        own = torch.as_tensor(a.numerator if a.moment is None else own)
        torch.testing.assert_close(steps, own.expand_as(root).to(steps.dtype), rtol=1e-5, atol=0)
