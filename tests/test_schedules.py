"""Strengths that change from step to step, and runs that are resumed."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import pyreg
from pyreg.schedules import Constant, Cosine, Linear, WarmUp


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(0.5), {0: 0.5, 9: 0.5}),
        (Linear(1.0, 3.0, steps=4), {0: 1, 1: 1.5, 2: 2, 4: 3, 100: 3}),
        (Linear(0.1, 0.3, steps=7), {0: 0.1, 7: 0.3}),
        (Cosine(2.0, 0.0, steps=6), {0: 2, 2: 1.5, 3: 1, 4: 0.5, 6: 0, 9: 0}),
        (WarmUp(4, 2.0), {0: 0, 1: 0.5, 4: 2, 9: 2}),
        (WarmUp(2, Linear(4.0, 0.0, steps=4)), {0: 0, 1: 2, 2: 4, 3: 3, 6: 0}),
    ],
    ids=repr,
)
def test_ready_made_schedules(schedule, expected):
    """(The ends exactly, the rest to the rounding of float64.)"""
    assert {k: schedule(k) for k in expected} == pytest.approx(expected, rel=1e-15, abs=1e-15)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    if isinstance(schedule, Linear | Cosine):
        assert (schedule(0), schedule(schedule.steps)) == (schedule.start, schedule.end)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
@pytest.mark.parametrize("make", [lambda n: Linear(0, 1, n), lambda n: WarmUp(n, 1.0)])
def test_a_number_of_steps_that_is_none(make, steps):
    with pytest.raises(ValueError, match="steps: expected an integer >= 1"):
        make(steps)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1, "a", None, True])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Constant, "value"),
        (lambda x: Linear(x, 1.0, 2), "start"),
        (lambda x: Cosine(1.0, x, 2), "end"),
        (lambda x: WarmUp(2, x), "then"),
    ],
)
def test_a_number_that_no_strength_can_be(make, name, bad):
    """Refused when the schedule is made. A tensor's number may change, and is looked at in use."""
    with pytest.raises((ValueError, TypeError), match=f"{name}: expected a finite number >= 0"):
        make(bad)
    number = torch.tensor(0.5)
    assert make(number)(2) == (1.0 if name == "start" else 0.5)


def test_a_penalty_at_a_step():
    penalty = pyreg.MCP(lam=lambda k: 0.5 * k, gamma=3.0)
    assert penalty.at(4) == pyreg.MCP(2.0, 3.0)
    assert pyreg.L1(0.5).at(7) == pyreg.L1(0.5)
    for use in (
        lambda: penalty.strengths,
        lambda: penalty.value(torch.ones(2)),
        lambda: pyreg.penalty([torch.ones(2)], penalty),
    ):
        with pytest.raises(TypeError, match=r"MCP.lam is a schedule: .*\.at\(step\)"):
            use()


def test_the_regularizer_takes_the_strength_of_its_step(backend):
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    reg = pyreg.Regularizer({"w": w}, pyreg.L1(Linear(1.0, 3.0, steps=2)))
    values = []
    for _ in range(4):
        w.grad = torch.zeros(2)
        values.append(reg().item())
        assert reg.accumulate_().item() == values[-1]
        assert w.grad.tolist() == [values[-1] / 3, -values[-1] / 3]
        reg.advance()
    assert values == [3, 6, 9, 9]


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_an_attached_schedule_counts_steps(backend, mode):
    w = nn.Parameter(torch.tensor([10.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    reg = pyreg.Regularizer({"w": w}, pyreg.L1(Linear(0.0, 2.0, steps=2)))
    reg.attach(optimizer, mode)
    seen = []
    for _ in range(4):
        w.grad = torch.zeros(1)
        optimizer.step()
        seen.append(w.item())
    assert seen == [10, 9, 7, 5]
    assert reg.step == 4


@pytest.mark.parametrize("bad", [math.nan, -1.0, "x"])
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_schedule_that_returns_no_strength(backend, mode, bad):
    """The error names the strength and the step, and comes before any weight changes."""
    w = nn.Parameter(torch.tensor([10.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    reg = pyreg.Regularizer({"w": w}, pyreg.L1(lambda k: 1.0 if k < 1 else bad))
    reg.attach(optimizer, mode)
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == 9
    with pytest.raises((ValueError, TypeError), match=r"L1\.lam at step 1: expected"):
        optimizer.step()
    assert w.item() == 9


def run(model, optimizer, reg, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 6, generator=generator)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_resumed_run_continues_bit_for_bit(backend, mode):
    def start():
        torch.manual_seed(1)
        model = nn.Linear(6, 3)
        lam = torch.tensor(0.25)
        rules = {"weight": pyreg.L1(Cosine(0.0, 0.3, steps=8)), "bias": pyreg.L2(lam)}
        reg = pyreg.Regularizer(model, rules)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        reg.attach(optimizer, mode)
        return model, optimizer, reg, lam

    model, optimizer, reg, lam = start()
    run(model, optimizer, reg, 3, seed=2)
    lam.fill_(0.125)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), reg.state_dict()))
    run(model, optimizer, reg, 3, seed=3)
    again, optimizer2, reg2, lam2 = start()
    again.load_state_dict(kept[0])
    optimizer2.load_state_dict(kept[1])
    reg2.load_state_dict(pickle.loads(pickle.dumps(kept[2])))
    assert (reg2.step, lam2.item()) == (3, 0.125)
    run(again, optimizer2, reg2, 3, seed=3)
    assert reg2.step == 6
    assert torch.equal(again.weight, model.weight)
    assert torch.equal(again.bias, model.bias)


def test_a_state_stays_what_it_was():
    lam = torch.tensor(1.0)
    state = pyreg.Regularizer({"w": torch.ones(2)}, pyreg.L1(lam)).state_dict()
    lam.fill_(2.0)
    assert state == {"step": 0, "strengths": {"*": {"lam": 1.0}}}


def test_a_state_of_other_rules():
    """Nothing is changed."""
    lam = torch.tensor(1.0)
    reg = pyreg.Regularizer({"w": torch.ones(2)}, {"w": pyreg.L1(lam)})
    other = pyreg.Regularizer({"w": torch.ones(2)}, {"*": pyreg.L1(torch.tensor(2.0))})
    other.advance()
    with pytest.raises(ValueError, match=r"other rules: expected tensors \{'w': \['lam'\]\}"):
        reg.load_state_dict(other.state_dict())
    assert (reg.step, lam.item()) == (0, 1.0)


@pytest.mark.parametrize(
    ("step", "number"),
    [(-1, 0.5), (1.5, 0.5), (2, -0.5), (2, torch.ones(2)), (2, 1e300), (2, lambda step: 0.5)],
)
def test_a_state_that_cannot_be(step, number):
    """Nothing is changed, not even the strength that comes first."""
    first, last = torch.tensor(1.0), torch.tensor(2.0)
    reg = pyreg.Regularizer({"w": torch.ones(2)}, {"w": pyreg.ElasticNet(first, last)})
    state = {"step": step, "strengths": {"w": {"l1": torch.tensor(0.25), "l2": number}}}
    with pytest.raises((ValueError, TypeError), match=r"ElasticNet\.l2|a step >= 0|a schedule"):
        reg.load_state_dict(state)
    for lacking in ({}, {"step": 3}, None):
        with pytest.raises(ValueError, match="expected one with a 'step' and 'strengths'"):
            reg.load_state_dict(lacking)
    for strengths in (None, 0.5, {"w": None}, {"w": "l1"}, [("w", {"l1": 0.25, "l2": 0.5})]):
        with pytest.raises(TypeError, match=r"strengths: expected \{pattern: \{name"):
            reg.load_state_dict({"step": 3, "strengths": strengths})
    assert (reg.step, first.item(), last.item()) == (0, 1.0, 2.0)


def test_a_step_of_numpy():
    """An integer is one."""
    np = pytest.importorskip("numpy")
    reg = pyreg.Regularizer({"w": torch.ones(2)}, pyreg.L1(1.0))
    reg.load_state_dict({"step": np.int64(3), "strengths": {"*": {}}})
    assert reg.step == 3
    assert type(reg.step) is int
    for bad in (np.float64(3), np.bool_(True), np.int64(-1), True, "3", None):
        with pytest.raises(ValueError, match="state_dict: expected a step >= 0, got"):
            reg.load_state_dict({"step": bad, "strengths": {"*": {}}})
