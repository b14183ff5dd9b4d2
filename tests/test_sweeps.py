"""Every sweep x penalty x dtype x case against the oracle, on each backend that can run here.

On the CPU that is native, or in a process with TRITON_INTERPRET=1 Triton's interpreter, which runs
programs one after the other and so says nothing about races. With a GPU (marker `gpu`) also every
backend that sweeps its tensors.
"""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from cases import CHUNK, DTYPES, REGULAR, differentiable, fill, penalties
from swept import flat, mixed, old_gradients

import pyreg
from pyreg.backend.triton import interpreted
from pyreg.metric import Metric
from pyreg.penalties import Penalty
from pyreg.reference import FORMULAS

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# A sweep takes the interpreter some 20 ms per tensor or chunk: these would take a quarter of an
# hour, as would several strengths of a penalty. test_triton_kernels.py has hundreds of tensors in
# one launch.
TOO_SLOW = ("threaded", "hundreds", "thousands") if interpreted() else ()
CASES = [case for case in REGULAR if case.name not in TOO_SLOW]
STEPS = (0.01, 2.0) if interpreted() else (0.0, 0.01, 2.0, 1e5)
CASE = pytest.mark.parametrize("case", CASES, ids=repr)


def examples(these: list[Penalty]) -> list[Penalty]:
    """All of them; for the interpreter one of each kind."""
    one = {penalty.name: penalty for penalty in reversed(these)}
    return list(one.values()) if interpreted() else these


PENALTIES, DIFFERENTIABLE = examples(penalties()), examples(differentiable())


@CASE
@DTYPE
def test_value(place, dtype, case):
    """Value and sums within the tolerance of oracle.value_tolerance; 0 for no elements."""
    tensors = case.build(dtype, place.device)
    w = flat(tensors)
    for penalty in filter(place.serves, PENALTIES):
        tolerance = oracle.value_tolerance(tensors, penalty)
        sweeps = place.sweeps(tensors, [penalty])
        assert oracle.close(sweeps.value(), oracle.value(penalty, [w]), tolerance), penalty
        expected = FORMULAS[penalty.name].strength_grad(w.double(), *penalty.strengths).tolist()
        for got, want in zip(sweeps.sums()[0], expected, strict=False):
            assert oracle.close(got, want, tolerance), penalty


@CASE
@DTYPE
def test_gradient(place, dtype, case):
    """The exact gradient rounded once, times the scale, as oracle.agrees says; every element is
    written."""
    tensors = case.build(dtype, place.device)
    w, twice = flat(tensors), place.rounds_twice(dtype)
    for penalty, scale in itertools.product(filter(place.serves, DIFFERENTIABLE), (1.0, 0.3)):
        got = flat(place.sweeps(tensors, [penalty]).gradient(scale))
        expected = oracle.gradient(penalty, w, scale)
        assert oracle.agrees(got, expected, penalty, scale, twice=twice), penalty


@CASE
@DTYPE
def test_accumulate(place, dtype, case):
    """old + scale * gradient, added in the compute dtype and rounded once; and the value.

    A GPU's compiler may fuse scale * gradient and the sum.
    """
    tensors = case.build(dtype, place.device)
    before, w = old_gradients(tensors), flat(tensors)
    old, twice, fused = flat(before), place.rounds_twice(dtype), place.device == "cuda"
    for penalty in filter(place.serves, DIFFERENTIABLE):
        grads = [torch.empty_like(g).copy_(g) for g in before]
        value = place.sweeps(tensors, [penalty]).accumulate(grads, 0.3)
        tolerance = oracle.value_tolerance(tensors, penalty)
        assert oracle.close(value, oracle.value(penalty, [w]), tolerance), penalty
        expected = oracle.gradient(penalty, w, 0.3, old)
        assert oracle.agrees(flat(grads), expected, penalty, 0.3, old, twice, fused), penalty


@CASE
@DTYPE
def test_prox(place, dtype, case):
    """Within oracle.prox's tolerance of the float64 prox, at small and large steps."""
    tensors = case.build(dtype, place.device)
    w, before = flat(tensors), [t.clone() for t in tensors]
    for penalty, step in itertools.product(filter(place.serves, PENALTIES), STEPS):
        torch._foreach_copy_(tensors, before)
        exact, tolerance = oracle.prox(penalty, w, step)
        place.sweeps(tensors, [penalty]).prox(step)
        got = flat(tensors)
        assert ((got.double() - exact).abs() <= tolerance).all(), (penalty, step)
        assert oracle.is_minimal(penalty, w, step, got), (penalty, step)
        assert step > 0 or torch.equal(got, w)


@CASE
@DTYPE
def test_stats(place, dtype, case):
    """Sums within the value's tolerance; maximum and counts exactly."""
    tensors = case.build(dtype, place.device)
    table = place.sweeps(tensors, [pyreg.L1(1)]).stats().cpu()
    assert table.shape == (len(tensors), 5)
    for row, t in zip(table, tensors, strict=True):
        expected = pyreg.reference.stats(t).cpu()
        assert torch.equal(row[2:], expected[2:])
        for got, want in zip(row[:2].tolist(), expected[:2].tolist(), strict=True):
            assert oracle.close(got, want, oracle.value_tolerance([t]))


THRESHOLDS = [  # a step, and |w| where two points are minimal
    (pyreg.L0(0.07), 2.0, math.sqrt(0.28)),
    (pyreg.LHalf(0.05), 2.0, 1.5 * 0.1 ** (2 / 3)),
    (pyreg.LogSum(0.5, 0.1), 2.0, 2.5215981208875458),
    (pyreg.MCP(0.3, 1.5), 1.5, 0.45),
    (pyreg.MCP(0.3, 1.5), 1e4, 0.3 * math.sqrt(1.5e4)),
    (pyreg.SCAD(0.4, 2.5), 1.5, 1.0),
    (pyreg.SCAD(0.4, 2.5), 2.0, 1.1),
    (pyreg.SCAD(0.4, 2.5), 50.0, 0.4 * math.sqrt(175)),
]


@pytest.mark.parametrize(("penalty", "step", "at"), THRESHOLDS, ids=str)
@DTYPE
def test_prox_at_a_threshold(place, penalty, step, at, dtype):
    """The numbers around a threshold: each goes to one of two minimisers, within 1e-3 of which are
    the thresholds above; far from it there is one."""
    if not place.serves(penalty):
        pytest.skip("no kernel for it there")
    near = torch.tensor(at, dtype=dtype)
    w = torch.cat([near + near * torch.arange(-99, 100) * torch.finfo(dtype).eps, near[None] * 2])
    w = torch.cat([w, -w, near[None] / 2]).to(place.device, dtype)
    got = w.clone()
    place.sweeps([got], [penalty]).prox(step)
    assert oracle.is_minimal(penalty, w, step, got)
    exact, tolerance = oracle.prox(penalty, w, step)
    assert ((got.double() - exact).abs() <= tolerance).all()
    jump = penalty.prox(torch.tensor([at * 0.999, at * 1.001], dtype=torch.float64), step)
    assert jump.diff().abs() > 0.1 * at


def test_mixed_dtypes_and_penalties_in_one_call(place):
    """The value is the sum of what each row gives alone, and so are gradients, prox and stats."""
    elements = CHUNK // 8 if interpreted() else 3 * CHUNK
    tensors, rules, rule_of = mixed(place=place, elements=elements)
    together, rows = place.sweeps(tensors, rules, rule_of), list(zip(tensors, rule_of, strict=True))
    parts = [oracle.value(rules[r], [t]) for t, r in rows]
    tolerance = max(oracle.value_tolerance([t], rules[r]) for t, r in rows)
    assert oracle.close(together.value(), math.fsum(parts), tolerance)
    alone = [place.sweeps([t.clone()], [rules[r]]) for t, r in zip(tensors, rule_of, strict=True)]
    for g, one in zip(together.gradient(), alone, strict=True):
        assert oracle.same(g, one.gradient()[0])
    assert torch.equal(together.stats(), torch.cat([one.stats() for one in alone]))
    grads, own = old_gradients(tensors), old_gradients(tensors)
    together.accumulate(grads)
    for g, h, one in zip(grads, own, alone, strict=True):
        one.accumulate([h])
        assert oracle.same(g, h)
    together.prox(0.3)
    for t, one in zip(tensors, alone, strict=True):
        one.prox(0.3)
        assert oracle.same(t, one.tensors[0])


def test_sums_are_per_rule(place):
    """value() also returns each rule's sums: the derivatives by its strengths."""
    tensors = [fill((500,), torch.float32, place.device, f"sums{i}") for i in range(3)]
    sums = place.sweeps(tensors, [pyreg.ElasticNet(1, 1), pyreg.L1(1)], [0, 1, 0]).sums()
    l1 = [t.double().abs().sum().item() for t in tensors]
    l2 = [t.double().square().sum().item() for t in tensors]
    assert sums[0] == pytest.approx([l1[0] + l1[2], l2[0] + l2[2]], rel=1e-6)
    assert sums[1][0] == pytest.approx(l1[1], rel=1e-6)


def test_rows_without_a_gradient_are_left_out(place):
    """gradient() skips a None; accumulate() counts it in the value and makes no gradient."""
    tensors = [fill((300,), torch.float32, place.device, f"none{i}") for i in range(3)]
    sweeps = place.sweeps(tensors, [pyreg.L1(0.5)])
    out = [torch.full_like(t, 7.0) for t in tensors]
    sweeps.gradient_into([out[0], None, out[2]])
    for i in (0, 2):
        assert oracle.same(out[i], oracle.gradient(sweeps.rules[0], tensors[i]))
    assert (out[1] == 7).all()
    value = sweeps.accumulate([None, torch.zeros_like(tensors[1]), None])
    assert value == sweeps.value()
    assert tensors[0].grad is None
    assert oracle.same(tensors[1].grad, oracle.gradient(sweeps.rules[0], tensors[1]))


@DTYPE
def test_nothing_is_written_next_to_a_row(place, dtype):
    """Sentinels on both sides of each row survive gradient, accumulate and prox."""
    for n in (1, 17, 255, 257, CHUNK + 1):
        memory = [torch.full((n + 200,), 5.0, dtype=dtype, device=place.device) for _ in range(2)]
        w, g = (m[101 : 101 + n] for m in memory)
        sweeps = place.sweeps([w], [pyreg.ElasticNet(0.25, 0.25)])
        sweeps.gradient_into([g])
        sweeps.accumulate([g])
        sweeps.prox(1.0)
        for m in memory:
            assert (m[:101] == 5).all()
            assert (m[101 + n :] == 5).all()
        assert (g == 2 * (0.25 + 0.5 * 5)).all()
        assert (w == (5 - 0.25) / 1.5).all() or dtype != torch.float64


def moments(w: torch.Tensor) -> torch.Tensor:
    """Numbers from 1e-12 to 1 like w, and zeros among them: steps up to numerator / offset."""
    generator = torch.Generator().manual_seed(len(w))
    v = 10 ** (-12 * torch.rand(w.shape, generator=generator))
    v[2::9] = 0
    return v.to(w.dtype)


def metric_sweeps(place, w: torch.Tensor, penalty: Penalty):
    if place.backend != "native" or place.device != "cpu":
        pytest.skip("the torch backend serves")
    return place.sweeps([w], [penalty])


METRICS = [  # numerator, factor, offset, root
    (1e-3, 1.5, 1e-8, True),
    (0.7, 1.0, 1.0, True),
    (2.0, 0.3, 1e-3, False),
    (0.5, 1.0, 0.0, True),
]


@pytest.mark.parametrize("numbers", METRICS, ids=str)
@DTYPE
def test_prox_in_metric(place, dtype, numbers):
    """Within oracle.prox_in_metric's tolerance of the float64 prox at a step per element, whether
    the moment is of w's dtype or float32; the value is that of what was written."""
    before = fill((3 * CHUNK + 77,), dtype, place.device, "metric")
    for penalty, narrow in itertools.product(PENALTIES, (True, False)):
        w, v = before.clone(), moments(before)
        metric = Metric(v if narrow else v.float(), *numbers)
        exact, tolerance, steps = oracle.prox_in_metric(penalty, before, metric)
        value = metric_sweeps(place, w, penalty).prox_in_metric([metric])
        off = (w.double() - exact).abs() > tolerance
        assert not off.any(), (penalty, before[off][:3], steps[off][:3], w[off][:3], exact[off][:3])
        assert oracle.is_minimal(penalty, before, steps, w, oracle.IN_METRIC), penalty
        within = oracle.value_tolerance([w], penalty)
        assert oracle.close(value, oracle.value(penalty, [w]), within), penalty


@DTYPE
def test_no_step_in_a_metric_changes_nothing(place, dtype):
    """A numerator of 0, and an infinite moment: the same numbers, whatever the moment."""
    before = fill((CHUNK + 3,), dtype, place.device, "no step")
    before[:4] = torch.tensor([math.inf, -math.inf, math.nan, torch.finfo(dtype).tiny])
    v = moments(before)
    v[::5] = math.inf
    for penalty in PENALTIES:
        for metric in (
            Metric(v, 0.0, 1.5, 1e-8),
            Metric(v, 0.0, 1.0, 0.0),
            Metric(torch.full_like(v, math.inf), 1e-3, 1.0, 1e-8),
        ):
            w = before.clone()
            metric_sweeps(place, w, penalty).prox_in_metric([metric])
            assert ((w == before) | (w.isnan() & before.isnan())).all(), (penalty, metric)


@DTYPE
def test_zeros_and_non_finite_numbers_in_a_metric(place, dtype):
    """0 stays 0, NaN stays NaN, and an infinite weight infinite at a usual step."""
    before = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf] * 50, dtype=dtype)
    v = torch.full_like(before, 0.25)
    for penalty in PENALTIES:
        w = before.clone()
        metric_sweeps(place, w, penalty).prox_in_metric([Metric(v, 0.1, 1.0, 1e-3)])
        assert ((w == before) | (w.isnan() & before.isnan())).all(), penalty


@DTYPE
def test_a_metric_gives_the_same_bits_on_every_instruction_set(place, native, dtype):
    before = fill((CHUNK + 77,), dtype, "cpu", "metric bits")
    for penalty, numbers in itertools.product(PENALTIES, METRICS):
        results = []
        for name in native.instruction_sets():
            try:
                native.use_instruction_set(name)
            except ValueError:  # not on this machine
                continue
            w = before.clone()
            metric_sweeps(place, w, penalty).prox_in_metric([Metric(moments(before), *numbers)])
            results.append(w)
        assert all(oracle.same(results[0], w) for w in results), penalty
