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
from swept import Sweeps, flat, mixed, moments, old_gradients

import pyreg
from pyreg.backend.torch import apply_prox_in_metric
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


METRICS = {
    "moments": lambda m: Metric(m, 0.05, 1.5, 1e-3),
    "float32 moments": lambda m: Metric(m.float(), 0.3, 0.7, 0.1),
    "without a root": lambda m: Metric(m, 0.3, 1.0, 0.5, root=False),
    "without moments": lambda m: Metric(None, 0.3),
}


@CASE
@DTYPE
def test_prox_in_metric(place, dtype, case):
    """Every element's own step, within oracle.prox's tolerance; the value of the new weights."""
    tensors = case.build(dtype, place.device)
    w, before, beside = flat(tensors), [t.clone() for t in tensors], moments(tensors)
    served = list(filter(place.serves, PENALTIES))
    combinations = itertools.product(served, METRICS)
    if interpreted():  # one each
        combinations = zip(served, itertools.cycle(METRICS), strict=False)
    every = {kind: [make(m) for m in beside] for kind, make in METRICS.items()}
    steps = {
        kind: metrics[0].numerator
        if metrics[0].moment is None
        else oracle.metric_step(metrics[0]._replace(moment=flat([m.moment for m in metrics])))
        for kind, metrics in every.items()
    }
    for penalty, kind in combinations:
        torch._foreach_copy_(tensors, before)
        metrics, step = every[kind], steps[kind]
        exact, tolerance = oracle.prox(penalty, w, step)
        value = place.sweeps(tensors, [penalty]).prox_in_metric(metrics)
        got = flat(tensors)
        assert ((got.double() - exact).abs() <= tolerance).all(), (penalty, kind)
        assert oracle.is_minimal(penalty, w, step, got), (penalty, kind)
        expected = oracle.value(penalty, [got])
        assert oracle.close(value, expected, oracle.value_tolerance(tensors, penalty))


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
    parts = []
    for g, h, one in zip(grads, own, alone, strict=True):
        parts.append(one.accumulate([h]))
        assert oracle.same(g, h)
    _check_of_rules(together, rule_of, parts, tolerance)
    kinds = itertools.cycle(METRICS.values())
    metrics = [kind(m) for kind, m in zip(kinds, moments(tensors), strict=False)]
    value = together.prox_in_metric(metrics)
    parts = [one.prox_in_metric([metric]) for one, metric in zip(alone, metrics, strict=True)]
    assert oracle.close(value, math.fsum(parts), 2 * tolerance)
    _check_of_rules(together, rule_of, parts, tolerance)
    together.prox(0.3)
    for t, one in zip(tensors, alone, strict=True):
        one.prox(0.3)
        assert oracle.same(t, one.tensors[0])


def _check_of_rules(
    sweeps: Sweeps, rule_of: list[int], parts: list[float], tolerance: float
) -> None:
    """Each rule's value is the sum of what its rows gave alone, and those give all of theirs."""
    for r, value in enumerate(sweeps.of_rules):
        own = math.fsum(part for part, rule in zip(parts, rule_of, strict=True) if rule == r)
        assert oracle.close(value, own, 2 * tolerance)
    assert len(sweeps.of_rules) == len(sweeps.rules)


def test_numbers_of_a_metric_may_be_tensors(place):
    """As an optimizer keeps them that a CUDA graph captures: the same bits."""
    tensors = [fill((40 + i,), torch.float32, place.device, f"numbers{i}") for i in range(4)]
    beside, results = moments(tensors), []
    for of in (float, lambda x: torch.tensor(x, dtype=torch.float64, device=place.device)):
        metrics = [Metric(m, of(0.3), of(1.5) if i else 0.7, 0.1) for i, m in enumerate(beside)]
        metrics[2] = Metric(None, of(0.2))
        sweeps = place.sweeps([t.clone() for t in tensors], [pyreg.L1(0.5)])
        results.append((sweeps.prox_in_metric(metrics), flat(sweeps.tensors)))
    assert results[0][0] == results[1][0]
    assert oracle.same(results[0][1], results[1][1])


def test_rows_that_a_prox_in_a_metric_leaves_to_the_formulas(place):
    """Moments of other strides and of another dtype, rows that share memory: as each row alone.

    Within a few roundings of numbers below 2.
    """
    memory = fill((60,), torch.float32, place.device, "shared")
    w = [fill((4, 6), torch.float32, place.device, f"left{i}") for i in range(3)]
    w += [memory[:40], memory[30:]]
    beside = moments(w)
    beside[0] = beside[0].t().contiguous().t()
    beside[1] = beside[1].half()
    metrics = [Metric(m, 0.3, 1.0, 0.5) for m in beside]
    expected = [t.clone() for t in (*w[:3], memory)]
    for t, m in zip((*expected[:3], expected[3][:40], expected[3][30:]), metrics, strict=True):
        apply_prox_in_metric(pyreg.L1(0.5), t, m)
    value = place.sweeps(w, [pyreg.L1(0.5)]).prox_in_metric(metrics)
    torch.testing.assert_close(flat([*w[:3], memory]), flat(expected), rtol=2**-22, atol=2**-24)
    if place.backend == "triton":
        assert oracle.close(value, oracle.value(pyreg.L1(0.5), w), 1e-6)


def test_values_of_rows_that_a_prox_in_a_metric_leaves_to_the_formulas(place):
    """They count in their rules' values, and in the whole."""
    w = [fill((4, 6), torch.float32, place.device, f"left{i}") for i in range(4)]
    beside = moments(w)
    beside[1] = beside[1].t().contiguous().t()
    beside[3] = beside[3].half()
    rules, rule_of = [pyreg.L1(0.5), pyreg.L2(0.25)], [0, 0, 1, 1]
    sweeps = place.sweeps(w, rules, rule_of)
    value = sweeps.prox_in_metric([Metric(m, 0.3, 1.0, 0.5) for m in beside])
    parts = [rules[r].value(t.double()).item() for r, t in zip(rule_of, w, strict=True)]
    expected = [parts[0] + parts[1], parts[2] + parts[3]]
    assert sweeps.of_rules == pytest.approx(expected, rel=1e-6)
    assert value == pytest.approx(sum(expected), rel=1e-6)


def examples_for(place):
    """Every penalty; on a GPU three, as its compiler takes a second or two for a kind of row."""
    return PENALTIES if place.device == "cpu" else PENALTIES[::6]


def anchored(place):
    """Every dtype under every penalty, beside each dtype every one of an anchor and of weights, or
    none; a chunk and some elements, or a few; anchors that are aligned, and not."""
    rules, tensors, rule_of, pairs = examples_for(place), [], [], []
    for r in range(len(rules)):
        for i, dtype in enumerate(DTYPES):
            n = (8192 // dtype.itemsize if r % 2 else 30) + 3 + r
            beside = [
                of and fill((n + r % 3,), of, place.device, f"{kind}{r}{i}")[r % 3 :]
                for kind, k in (("anchor", r + i), ("weight", 2 * r + i + 4))
                for of in [(None, *DTYPES)[k % 5]]
            ]
            pairs.append((beside[0], beside[1] if beside[1] is None else beside[1].abs()))
            tensors.append(fill((n,), dtype, place.device, f"anchored{r}{i}"))
            rule_of.append(r)
    return tensors, rules, rule_of, pairs


def measured(w, pair):
    """w - anchor, and what they are, in the compute dtype."""
    c = oracle.compute_dtype(w.dtype)
    x, (anchor, weight) = w.to(c), pair
    anchor = torch.zeros_like(x) if anchor is None else anchor.to(c)
    return x - anchor, anchor, torch.ones_like(x) if weight is None else weight.to(c)


def test_anchored_sums_and_gradients(place):
    """The plain ones of w - anchor times the weight, which is one rounding more."""
    tensors, rules, rule_of, pairs = anchored(place)
    sweeps = place.sweeps(tensors, rules, rule_of, pairs)
    before, exact = old_gradients(tensors), 0.0
    grads = [g.clone() for g in before]
    values, written = (sweeps.value(), sweeps.accumulate(grads, 0.3)), sweeps.gradient(0.3)
    rows = zip(tensors, rule_of, pairs, before, grads, written, strict=True)
    for w, r, pair, old, added, alone in rows:
        rule = rules[r]
        x, _, weight = measured(w, pair)
        formula, strengths = (
            FORMULAS[rule.name],
            [oracle.rounded(s, w.dtype) for s in rule.strengths],
        )
        exact += formula.value(x.double(), *rule.strengths, weight=weight.double()).item()
        if formula.grad is None:
            continue
        u = oracle.unit_roundoff(x.dtype)
        grad = oracle.rounded(0.3, w.dtype) * weight.double() * formula.grad(x.double(), *strengths)
        for got, start in ((added, old.double()), (alone, torch.zeros_like(grad))):
            expected = start + grad
            # As in oracle.agrees.
            bound = 9 * u * (expected.abs() + 2 * start.abs() + 0.3 * weight * max(strengths))
            bound += oracle.smallest(w.dtype)
            if w.itemsize == 2:
                bound += 2 * oracle.unit_roundoff(w.dtype) * expected.abs()
            assert ((got.double() - expected).abs() <= bound).all(), (rule, w.dtype)
    tolerance = oracle.value_tolerance(tensors, rules[-1]) + 3 * 2**-24
    assert all(oracle.close(value, exact, tolerance) for value in values)


def test_anchored_proxes(place):
    """anchor + the plain one of w - anchor, at steps times the weight; and the value of the new w.

    To oracle.prox's tolerance come the roundings of w - anchor and of the sum.
    """
    tensors, rules, rule_of, pairs = anchored(place)
    before, beside = [t.clone() for t in tensors], moments(tensors)
    kinds = itertools.cycle(METRICS.values())
    metrics = [kind(m) for kind, m in zip(kinds, beside, strict=False)]
    sweeps = place.sweeps(tensors, rules, rule_of, pairs)
    for in_metric in (False, True):
        torch._foreach_copy_(tensors, before)
        value, exact = sweeps.prox_in_metric(metrics) if in_metric else sweeps.prox(0.4), 0.0
        rows = zip(tensors, before, rule_of, pairs, metrics, strict=True)
        for got, w, r, pair, metric in rows:
            x, anchor, weight = measured(w, pair)
            step = torch.tensor(oracle.rounded(0.4, w.dtype), dtype=torch.float64)
            if in_metric and metric.moment is None:
                step.fill_(oracle.rounded(metric.numerator, w.dtype))
            elif in_metric:
                step = oracle.metric_step(metric)
            moved, tolerance = oracle.prox(rules[r], x, (step * weight).to(x.device))
            expected = anchor.double() + moved
            size = anchor.abs() + moved.abs() + x.abs() + w.abs()
            tolerance = tolerance + 2 * oracle.unit_roundoff(x.dtype) * size
            if w.itemsize == 2:
                tolerance = tolerance + 1.01 * oracle.unit_roundoff(w.dtype) * expected.abs()
            near = (got.double() - expected).abs() <= tolerance + oracle.smallest(w.dtype)
            assert near.all(), (rules[r], w.dtype, in_metric)
            x, _, weight = measured(got, pair)
            formula = FORMULAS[rules[r].name]
            exact += formula.value(x.double(), *rules[r].strengths, weight=weight.double()).item()
        if in_metric:
            tolerance = oracle.value_tolerance(tensors, rules[-1]) + 3 * 2**-24
            assert oracle.close(value, exact, tolerance)


def test_anchored_specials(place):
    """Infinities, NaN, a weight of 0 and an anchor far off: as the formulas say."""
    numbers = [0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, math.nan]
    w, anchor, weight = torch.tensor(
        list(itertools.product(numbers, [0.0, 0.75, 1e8, math.inf, math.nan], [0.0, 1.0, 2.5])),
        device=place.device,
    ).T.contiguous()
    for penalty in examples_for(place):
        rule = type(penalty)(*penalty.strengths, anchor=anchor, weight=weight)
        got = w.clone()
        sweeps = place.sweeps([got], [penalty], None, [(anchor, weight)])
        if FORMULAS[penalty.name].grad is not None:
            expected = rule.grad(w)
            torch.testing.assert_close(
                sweeps.gradient()[0], expected, equal_nan=True, msg=repr(penalty)
            )
        assert math.isnan(sweeps.value())
        sweeps.prox(0.3)
        torch.testing.assert_close(got, rule.prox(w, 0.3), equal_nan=True, msg=repr(penalty))
        stays = weight == 0
        assert oracle.same(got[stays & anchor.isfinite()] + 0.0, w[stays & anchor.isfinite()] + 0.0)


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
    """Sentinels on both sides of each row survive gradient, accumulate and both proxes."""
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
        moment = torch.ones(n + 1, dtype=dtype, device=place.device)[1:]
        sweeps.prox_in_metric([Metric(moment, 1.0, 1.0, 1.0)])
        assert (memory[0][:101] == 5).all()
        assert (memory[0][101 + n :] == 5).all()
