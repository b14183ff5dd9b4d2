"""pyreg.profile: what it measures and says."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
import torch
from profiled import FEW, L1, WITHOUT_COMPILE, model, trained
from torch import nn

import pyreg
from pyreg.penalties import PENALTIES
from pyreg.profiling import (
    LIMITS,
    WAYS,
    WORKLOADS,
    Interrupted,
    Profile,
    Row,
    environment,
    memory,
)
from pyreg.profiling.measure import _fastest_limits
from pyreg.profiling.memory import memory_needed
from pyreg.profiling.parameters import copy_of
from pyreg.profiling.result import added_up
from pyreg.profiling.timing import Timing
from pyreg.profiling.unchanged import Kept
from pyreg.profiling.workloads import Workload


def test_every_way_is_measured_beside_the_step():
    net = model()
    result = pyreg.profile(net, L1, trained(net)[0], ways=WITHOUT_COMPILE, **FEW)
    rows = {row.way: row for row in result.rows}
    assert set(rows) == {"no penalty", *WITHOUT_COMPILE, *LIMITS} - {
        name for name in LIMITS if name.endswith("as float32")
    }
    assert all(row.seconds > 0 and row.samples >= 1 and not row.note for row in rows.values())
    assert all(row.p10 <= row.seconds <= row.p90 for row in rows.values())
    step, loop = rows["no penalty"], rows["loop"]
    assert loop.adds == loop.seconds
    assert loop.share == loop.adds / (step.seconds + loop.adds)
    inside = rows["pyreg AdamW, grad"]
    assert inside.adds == inside.seconds - rows["AdamW, no penalty"].seconds
    assert rows["pyreg value"].adds is None, "it regularizes nothing"
    assert rows["pyreg accumulate_"].value_error <= 1e-6


def test_bandwidths_and_shares_of_the_limits():
    """A limit's time is the fastest of the operations that bound a job, by what each moves."""
    result = pyreg.profile(WORKLOADS["tiny"], L1, ways=WITHOUT_COMPILE, **FEW)
    rows = {row.way: row for row in result.rows}
    for row in rows.values():
        if row.job != "limit":  # (those move the padding between the tensors too)
            moved = row.traffic * result.parameter_bytes
            assert row.gb_per_s == pytest.approx(moved / row.seconds / 1e9)
    for way, least, bounds in (
        ("pyreg value", 1, {"flat.sum()": 1}),
        ("pyreg in the loss", 3, {"dst.add_(src)": 3}),
        ("pyreg prox_", 2, {"flat.mul_(1)": 2, "dst.copy_(src)": 2}),
        ("pyreg AdamW, prox", 7, {"dst.add_(src)": 3}),
    ):
        fastest = min(rows[bound].seconds / moved for bound, moved in bounds.items())
        assert rows[way].of_limit == pytest.approx(least * fastest / rows[way].seconds)


def test_the_fastest_operation_is_the_limit():
    slow, fast = (Timing(seconds, seconds, seconds, 1) for seconds in (6.0, 4.0))
    for timings in (
        {"flat.mul_(1)": slow, "dst.copy_(src)": fast},
        {"flat.mul_(1)": fast, "dst.copy_(src)": slow},
    ):
        assert _fastest_limits(timings) == {"prox": 2.0}


@pytest.mark.parametrize("way", ["pyreg accumulate_", "pyreg prox_", "pyreg AdamW, grad"])
@pytest.mark.parametrize("error", [2e-6, float("nan")])
@pytest.mark.parametrize("penalty", [L1, pyreg.MCP(1e-3, 3.0)], ids=["l1", "mcp"])
def test_one_wrong_element_is_seen(way, error, penalty, monkeypatch):
    """16 units of roundoff off, or no number at all; one of 4,200, where a prox jumps too."""
    right = WAYS[way]

    def prepare(parameters, penalty):
        run = right.prepare(parameters, penalty)

        @torch.no_grad()
        def wrong():
            value = run()
            (flat,) = parameters.flats
            elements = flat.gradients if way == "pyreg accumulate_" else flat.weights
            elements[elements.abs().argmax()] *= 1 + error
            return value

        return wrong

    monkeypatch.setitem(WAYS, way, replace(right, prepare=prepare))
    (row,) = (
        r for r in pyreg.profile(WORKLOADS["tiny"], penalty, ways=[way], **FEW).rows if r.way == way
    )
    assert row.wrong
    assert re.match(r"not timed: its [\w +]+ is off by (2.\de-06|nan)", row.note), row.note


@pytest.mark.parametrize(("error", "wrong"), [(1e-7, False), (3e-6, True), (float("nan"), True)])
def test_a_wrong_value_is_seen(error, wrong, monkeypatch):
    right = WAYS["pyreg value"]

    def prepare(parameters, penalty):
        run = right.prepare(parameters, penalty)
        return lambda: run().double() * (1 + error)

    monkeypatch.setitem(WAYS, right.name, replace(right, prepare=prepare))
    rows = pyreg.profile(WORKLOADS["tiny"], L1, ways=[right.name], **FEW).rows
    assert [row.wrong for row in rows if row.way == right.name] == [wrong]


def test_what_a_step_may_change_is_counted_in_the_memory(monkeypatch):
    net = model()
    step, _ = trained(net)
    step()
    alone = pyreg.profile(net, L1, ways=["loop"], **FEW).memory_bytes
    beside = pyreg.profile(net, L1, step, ways=["loop"], **FEW).memory_bytes
    assert beside == alone + Kept(net).bytes
    monkeypatch.setattr(memory, "free_bytes", lambda device: beside - 1)
    with pytest.raises(MemoryError):
        pyreg.profile(net, L1, step, ways=["loop"], **FEW)


def measured(**ms: tuple[float, float, float]) -> Profile:
    """A profile of these ways: median, 10 and 90 % in milliseconds."""
    rows = [
        Row("net", "float32", 2, 1000, "l1", way, WAYS[way].job, None, *(t / 1e3 for t in times))
        for way, times in ms.items()
    ]
    return Profile(environment(), added_up(rows), "L1(lam=0.1)", 4000, 0)


STEADY = {
    "loop": (50.0, 48.0, 55.0),
    "foreach": (40.0, 38.0, 41.0),
    "pyreg accumulate_": (5.0, 4.9, 5.2),
    "pyreg prox_": (3.0, 2.9, 3.1),
    "AdamW, no penalty": (20.0, 19.9, 20.1),
    "pyreg AdamW, grad": (18.0, 17.9, 18.1),
    "pyreg AdamW, prox": (21.0, 20.8, 21.5),
    "dst.add_(src)": (5.0, 4.9, 5.1),
}


def test_the_best_way_is_named_for_any_optimizer_and_for_adamw():
    result = measured(**STEADY)
    assert result.best().way == "pyreg accumulate_"
    assert result.best(adamw=True).way == "pyreg AdamW, grad"
    assert result.best(exact_zeros=True).way == "pyreg prox_"
    assert result.best(exact_zeros=True, adamw=True).way == "pyreg AdamW, prox"
    assert result.advice() == (
        "For net (2 tensors, 4 kB) with L1(lam=0.1), for any optimizer the least cost is "
        "reg.attach(optimizer) or reg.accumulate_(), which adds 5.00 ms; if you train with AdamW, "
        "pyreg.optim.AdamW(..., regularizer=reg), which saves 2.00 ms of torch's fused AdamW "
        "without a penalty; for exact zeros reg.attach(optimizer, mode='prox') or reg.prox_(step), "
        "which adds 3.00 ms; for exact zeros with AdamW "
        "pyreg.optim.AdamW(..., regularizer=reg, mode='prox'), which adds 1.00 ms; "
        "the loop adds 50.0 ms."
    )
    assert result.advice() in result.table()


def test_what_cannot_be_told_apart_is_said():
    said = measured(**STEADY | {"foreach": (6.0, 5.1, 7.0)}).advice()
    alike = "adds 5.00 ms, no measurable difference from torch's foreach operations; if you"
    assert alike in said
    said = measured(**STEADY | {"AdamW, no penalty": (20.0, 18.0, 20.1)}).advice()
    assert "makes no measurable difference from torch's fused AdamW without a penalty;" in said
    said = measured(**STEADY | {"pyreg AdamW, grad": (30.0, 29.0, 31.0)}).advice()
    assert "adds 5.00 ms; if you train with AdamW, the same; for exact zeros" in said
    few = {way: STEADY[way] for way in ("loop", "AdamW, no penalty", "pyreg accumulate_")}
    assert "AdamW" not in measured(**few).advice()
    assert (
        measured(loop=STEADY["loop"])
        .advice()
        .endswith("the least cost is the loop, which adds 50.0 ms.")
    )


@pytest.mark.parametrize("way", ["dst.add_(src)", "pyreg accumulate_", "pyreg AdamW, grad"])
def test_a_busy_machine_is_said(way):
    """By a limit, or by the way that is named; a slow peer is slow in its own way."""
    assert "busy" not in measured(**STEADY | {"loop": (50.0, 1.0, 500.0)}).advice()
    median, low, _ = STEADY[way]
    assert "busy" not in measured(**STEADY | {way: (median, low, 1.99 * low)}).advice()
    result = measured(**STEADY | {way: (median, 1.0, 60.0)})
    said = f"The machine was busy: {way} took 1.00 to 60.0 ms (10-90 %), so that these figures say"
    assert said in result.advice()
    assert said in result.table()


def test_a_step_leaves_no_trace():
    net = model()
    step, optimizer = trained(net)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = [t.clone() for t in net.state_dict().values()]
    random = torch.get_rng_state()
    grad = net[0].weight.grad
    pyreg.profile(net, L1, step, ways=["loop"], **FEW)
    assert all(map(torch.equal, net.state_dict().values(), before))
    assert net[0].weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert net[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert not optimizer.state, "it had taken no step"
    step()
    state = {k: v.clone() for k, v in optimizer.state[net[0].weight].items()}
    moment = optimizer.state[net[0].weight]["exp_avg"]
    pyreg.profile(net, L1, step, ways=["loop"], **FEW)
    assert optimizer.state[net[0].weight]["exp_avg"] is moment
    assert all(torch.equal(optimizer.state[net[0].weight][k], v) for k, v in state.items())


def test_a_step_that_raises_is_named_and_leaves_no_trace():
    net = model()
    step, _ = trained(net)
    before = [t.clone() for t in net.state_dict().values()]

    def bad() -> None:
        step()
        raise KeyError("batch")

    with pytest.raises(RuntimeError, match="step: it raised KeyError: 'batch'"):
        pyreg.profile(net, L1, bad, ways=["loop"], **FEW)
    assert all(map(torch.equal, net.state_dict().values(), before))


@pytest.mark.parametrize("strength", [1e-12, 1e-3, 1e12])
@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_has_ways_that_agree_with_its_formulas(name, strength):
    """At the bounds of what is taken, too."""
    cls = PENALTIES[name]
    strengths = {"gamma": 3.0, "a": 3.7, "delta": 0.01, "eps": 0.01}
    penalty = cls(*(strengths.get(field, strength) for field in cls.parameters))
    result = pyreg.profile(model(), penalty, ways=WITHOUT_COMPILE, **FEW)
    measured = {row.way for row in result.rows if row.seconds is not None}
    assert {"pyreg prox_", "pyreg value", "pyreg AdamW, prox"} <= measured
    assert ("pyreg accumulate_" in measured) == (name != "l0")
    notes = {row.way: row.note for row in result.rows if row.seconds is None}
    assert all("pyreg" not in way or name == "l0" or "stats" in way for way in notes)


@pytest.mark.parametrize(
    "penalty", [pyreg.L1(0.0), pyreg.L2(0.0), pyreg.ElasticNet(0.0, 0.0), pyreg.ElasticNet(0.0, 1)]
)
def test_strengths_of_zero(penalty):
    """Where a schedule may begin."""
    result = pyreg.profile(model(), penalty, ways=WITHOUT_COMPILE, **FEW)
    assert all(row.seconds is not None and not row.note for row in result.rows)


def test_a_way_that_fails_leaves_the_gradients_in_place(monkeypatch):
    """To those after it."""
    from pyreg.profiling.ways import _no_grad_yet

    def prepare(parameters, penalty):
        return lambda: 1 / 0

    way = replace(WAYS["loop, no .grad"], prepare=_no_grad_yet(prepare))
    monkeypatch.setitem(WAYS, way.name, way)
    result = pyreg.profile(model(), L1, ways=[way.name, "pyreg AdamW, grad"], **FEW)
    rows = {row.way: row for row in result.rows}
    assert rows[way.name].note == "failed: ZeroDivisionError: division by zero"
    assert not rows["pyreg AdamW, grad"].wrong


def test_a_wrong_step_of_an_optimizer_is_not_timed(monkeypatch):
    """The check sees a penalty of another strength, and one that is left out."""
    from pyreg.profiling import optimizers

    right = optimizers._inside
    for wrong in (pyreg.L1(2e-3), pyreg.L1(0.0)):
        monkeypatch.setattr(
            optimizers, "_inside", lambda p, penalty, mode, wrong=wrong: right(p, wrong, mode)
        )
        ways = ["loop", "pyreg AdamW, grad", "pyreg AdamW, prox"]
        result = pyreg.profile(model(), L1, ways=ways, **FEW)
        rows = {row.way: row for row in result.rows}
        for way in ways[1:]:
            assert rows[way].seconds is None
            assert rows[way].wrong
            assert re.match(r"not timed: its (value|update \+ \w+) is off by", rows[way].note)
            assert rows[way].note in result.table()
        assert result.best().way == "loop"
        assert rows["AdamW, no penalty"].seconds > 0
        assert not any(row.wrong for way, row in rows.items() if way not in ways[1:])


def test_mixed_dtypes_and_strides_are_copied():
    net = nn.Sequential(nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), nn.Linear(5, 3))
    net[1].bfloat16()
    named = list(net.named_parameters())
    copied = copy_of("net", named, "cpu")
    for (_, t), p in zip(named, copied.tensors, strict=True):
        assert p.stride() == t.stride() == p.grad.stride()
        assert torch.equal(p, t)
        assert p.data_ptr() != t.data_ptr()
    assert copied.workload.bytes == sum(t.nbytes for _, t in named)
    rows = pyreg.profile(net, L1, ways=["loop", "pyreg accumulate_", "pyreg AdamW, grad"], **FEW)
    assert rows.rows[0].dtype == "float32 + bfloat16"
    assert all(row.seconds is not None for row in rows.rows)


def test_weights_of_zeros():
    net = nn.Linear(3, 3)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    result = pyreg.profile(net, L1, ways=WITHOUT_COMPILE, **FEW)
    assert all(row.seconds is not None for row in result.rows)


@pytest.mark.parametrize(
    "stop_at", ["checking pyreg value", "timing pyreg value", "memory of loop"]
)
def test_ctrl_c_leaves_what_was_measured(stop_at):
    told = []

    def tell(what: str, share: float) -> None:
        told.append(what)
        if what == stop_at and told.count(what) == 2 - what.startswith(("checking", "memory")):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        pyreg.profile(model(), L1, ways=["loop", "pyreg value"], tell=tell, seconds=60.0, rounds=5)
    found = stopped.value.measured
    assert not found.complete
    rows = {row.way: row for row in found.rows}
    assert (rows["loop"].seconds is not None) == (not stop_at.startswith("checking"))
    if stop_at.startswith("timing"):
        assert 1 <= rows["loop"].samples < 5
        assert "stopped before all was measured" in found.advice()
    found.table()
    found.to_json()


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is not measured")
def test_it_needs_no_more_than_it_said():
    """64 MB of parameters: what is kept and the largest peak of a way, against the prediction."""
    workload = Workload("one", "one", tuple((f"{i}", (1 << 20,)) for i in range(16)))
    ways = ["loop", "foreach", "pyreg in the loss", "pyreg AdamW, grad"]
    result = pyreg.profile(workload, pyreg.ElasticNet(1e-5, 1e-4), ways=ways, **FEW)
    kept = 2 + 2 + 2  # N: parameters and gradients, their check, the optimizer's states
    peak = max(row.extra_bytes for row in result.rows)
    assert peak >= workload.bytes, "all gradients of foreach at once"
    assert kept * workload.bytes + peak <= memory_needed(workload, ways) == result.memory_bytes


def test_scaled_workloads():
    for name, workload in WORKLOADS.items():
        for scale in (0.5, 0.1, 0.01):
            small = workload.scaled(scale)
            assert [n for n, _ in small.shapes] == [n for n, _ in workload.shapes]
            assert min(min(shape) for _, shape in small.shapes) >= 1
            share = small.elements / workload.elements
            if name != "many-tiny":  # (vectors of 64 have sizes in steps)
                assert 0.95 * scale < share <= scale, (name, scale)
    small = dict(WORKLOADS["gpt2"].scaled(0.1).shapes)
    (width,) = small["h.0.ln_1.weight"]
    assert small["h.0.attn.c_proj.weight"] == (width, width)
    assert small["wte.weight"][1] == width
    assert small["h.0.attn.c_attn.bias"] == small["h.0.attn.c_attn.weight"][1:]
    least = WORKLOADS["many"].scaled(1e-9)
    assert least.elements == len(least.shapes), "one element each"
    odd = Workload("odd", "odd", (("scalar", ()), ("none", (0, 8)), ("one", (1, 10)), ("w", (9,))))
    assert [shape for _, shape in odd.scaled(0.5).shapes] == [(), (0, 4), (1, 5), (4,)]
    assert WORKLOADS["gpt2"].scaled(1) is WORKLOADS["gpt2"]
    assert WORKLOADS["gpt2"].scaled(0.1).name == "gpt2, scale 0.1"
    for scale in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="scale: expected a number above 0 and at most 1"):
            WORKLOADS["gpt2"].scaled(scale)
