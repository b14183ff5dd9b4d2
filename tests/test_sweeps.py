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
from cases import CHUNK, DTYPES, REGULAR, fill, penalties
from swept import flat, mixed, old_gradients
from torch import Tensor

import pyreg
from pyreg.backend.triton import interpreted
from pyreg.reference import compute_dtype

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# A sweep takes the interpreter some 20 ms per tensor or chunk: these would take a quarter of an
# hour, as would several strengths of a penalty. test_triton_kernels.py has hundreds of tensors in
# one launch.
TOO_SLOW = ("threaded", "hundreds", "thousands") if interpreted() else ()
CASES = [case for case in REGULAR if case.name not in TOO_SLOW]
PENALTIES = penalties()
if interpreted():
    PENALTIES = list({penalty.name: penalty for penalty in reversed(PENALTIES)}.values())
CASE = pytest.mark.parametrize("case", CASES, ids=repr)


def narrowed(bound: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """A bound after both numbers were rounded to 16 bits, perhaps from either side of a border."""
    if dtype.itemsize > 2:
        return bound
    return bound + 2 * oracle.unit_roundoff(dtype) * expected.abs() + oracle.smallest(dtype)


@CASE
@DTYPE
def test_value(place, dtype, case):
    """Within the tolerance of oracle.value_tolerance; 0 for no elements."""
    tensors = case.build(dtype, place.device)
    w, tolerance = [flat(tensors)], oracle.value_tolerance(tensors)
    for penalty in PENALTIES:
        got = place.sweeps(tensors, [penalty]).value()
        assert oracle.close(got, oracle.value(penalty, w), tolerance), penalty


@CASE
@DTYPE
def test_gradient(place, dtype, case):
    """The bits of the exact gradient rounded once, times the scale; every element is written.

    Where l1 + 2 l2 w is rounded twice, the product (<= |g| + l1) and the sum may each be off by u,
    before and after a scale <= 1.
    """
    tensors = case.build(dtype, place.device)
    w, u = flat(tensors), oracle.unit_roundoff(compute_dtype(dtype))
    for penalty, scale in itertools.product(PENALTIES, (1.0, 0.3)):
        got = flat(place.sweeps(tensors, [penalty]).gradient(scale))
        expected = oracle.gradient(penalty, w, scale)
        if place.rounds_twice(penalty, dtype):
            got, expected = got.double(), expected.double()
            bound = u * (4 * expected.abs() + 2 * max(penalty.strengths))
            assert ((got - expected).abs() <= narrowed(bound, expected, dtype)).all(), penalty
        else:
            assert oracle.same(got, expected), penalty


@CASE
@DTYPE
def test_accumulate(place, dtype, case):
    """old + scale * gradient, added in the compute dtype and rounded once; and the value.

    A GPU's compiler may fuse scale * gradient and the sum: then the product, which is at most
    |result| + |old|, is not rounded (u of it), and the two sums are (2 u of the result).
    """
    tensors = case.build(dtype, place.device)
    before, w, tolerance = old_gradients(tensors), flat(tensors), oracle.value_tolerance(tensors)
    old, u = flat(before), oracle.unit_roundoff(compute_dtype(dtype))
    for penalty in PENALTIES:
        grads = [torch.empty_like(g).copy_(g) for g in before]
        value = place.sweeps(tensors, [penalty]).accumulate(grads, 0.3)
        assert oracle.close(value, oracle.value(penalty, [w]), tolerance), penalty
        got, expected = flat(grads), oracle.gradient(penalty, w, 0.3, old)
        twice, fused = place.rounds_twice(penalty, dtype), place.device == "cuda"
        if not twice and not fused:
            assert oracle.same(got, expected), penalty
            continue
        got, expected = got.double(), expected.double()
        bound = (
            twice * u * (6 * expected.abs() + 4 * old.double().abs() + 2 * max(penalty.strengths))
        )
        bound += fused * u * (3 * expected.abs() + old.double().abs())
        assert ((got - expected).abs() <= narrowed(bound, expected, dtype)).all(), penalty


@CASE
@DTYPE
def test_prox(place, dtype, case):
    """Within oracle.prox's tolerance of the float64 prox, at small and large steps."""
    tensors = case.build(dtype, place.device)
    w, before = flat(tensors), [t.clone() for t in tensors]
    for penalty, step in itertools.product(PENALTIES, (0.01, 1e5)):
        torch._foreach_copy_(tensors, before)
        exact, tolerance = oracle.prox(penalty, w, step)
        place.sweeps(tensors, [penalty]).prox(step)
        assert ((flat(tensors).double() - exact).abs() <= tolerance).all(), (penalty, step)


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


def test_mixed_dtypes_and_penalties_in_one_call(place):
    """The value is the sum of what each row gives alone, and so are gradients, prox and stats."""
    tensors, rules, rule_of = mixed(device=place.device)
    together = place.sweeps(tensors, rules, rule_of)
    parts = [oracle.value(rules[r], [t]) for t, r in zip(tensors, rule_of, strict=True)]
    tolerance = max(oracle.value_tolerance([t]) for t in tensors)
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
