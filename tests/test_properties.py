"""Any shape, strides, dtype and values: the native sweeps against the oracle (hypothesis)."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import DTYPES, penalties
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyreg
from pyreg.dispatch import backend as backend_by_name
from pyreg.penalties import PENALTIES, Penalty
from pyreg.reference import FORMULAS

if (missing := backend_by_name("native").missing()) is not None:
    pytest.skip(missing, allow_module_level=True)

MANY = settings(max_examples=120)

# Up to 2^60: no square, and no sum of the 16 in a lane, leaves float32.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 65504.0, 1e-30, 6e-8, 1e-40, 1e-45, -1e-45]
SPECIAL += [math.inf, -math.inf, math.nan]
NUMBERS = st.one_of(
    st.sampled_from(SPECIAL),
    st.floats(-10, 10, width=32),
    st.floats(-(2.0**60), 2.0**60, width=32),
)
STRENGTHS = st.one_of(st.sampled_from([0.0, 1e-5, 0.1, 1.0]), st.floats(0, 100))
SHAPES = st.floats(0.01, 100)  # above their bound


@st.composite
def penalty_objects(draw, gradient: bool = False) -> Penalty:
    some = [cls for cls in PENALTIES.values() if not gradient or FORMULAS[cls.name].grad]
    cls = draw(st.sampled_from(some))
    low = [cls.above.get(name) for name in cls.parameters]
    return cls(*(draw(STRENGTHS if x is None else SHAPES.map(x.__add__)) for x in low))


@st.composite
def tensors(draw, dense: bool = False) -> Tensor:
    """A few drawn numbers, repeated over a random shape; permuted, sliced, expanded or offset."""
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, 16, 255, 256, 257, 4095, 4096, 4097, 40_000]))]
    dtype = draw(st.sampled_from(DTYPES))
    numbers = draw(st.lists(NUMBERS, min_size=1, max_size=24))
    offset = draw(st.integers(0, 3))
    n = math.prod(shape)
    memory = torch.tensor(numbers, dtype=torch.float64).repeat(1 + (n + offset) // len(numbers))
    t = memory.to(dtype)[offset : offset + n].view(shape)
    t = t.permute(draw(st.permutations(range(t.ndim))))
    if not dense and t.ndim:
        kind = draw(st.sampled_from(["dense", "dense", "slice", "expand", "narrow"]))
        if kind == "slice":
            t = t[..., ::2]
        elif kind == "expand":
            t = t.unsqueeze(0).expand(3, *t.shape)
        elif kind == "narrow":
            t = t.narrow(0, 0, t.shape[0] // 2)
    return t


def agree(got: Tensor, exact: Tensor, tolerance: Tensor | float) -> None:
    """Within the tolerance; infinities and NaN in the same places. A result that rounds to infinity
    in its dtype may be the largest finite number if it is within the tolerance of it."""
    got, rounded = got.double(), exact.to(got.dtype).double()
    bad = ~rounded.isfinite()
    assert torch.equal(got.isnan(), rounded.isnan())
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    near = (got - rounded).abs() <= tolerance
    assert (same | (near & ~bad)).all()


@MANY
@given(st.lists(tensors(), min_size=1, max_size=4), penalty_objects())
def test_value(ts, penalty):
    """Within the derived bound (squares below float32's least number vanish: one per element)."""
    value = pyreg.penalty(ts, penalty)
    expected = oracle.value(penalty, ts)
    if math.isfinite(expected):
        lost = sum(t.numel() for t in ts) * 2**-149 * max(penalty.strengths)
        limit = torch.finfo(value.dtype).max
        if abs(expected) < limit:
            tolerance = oracle.value_tolerance(ts, penalty)
            assert oracle.close(value.item(), expected, tolerance, lost + 2**-149)
    else:
        assert str(value.item()) == str(expected)


@MANY
@given(st.lists(tensors(), min_size=1, max_size=4), penalty_objects(gradient=True))
def test_gradient(ts, penalty):
    """The autograd path against the formula's own rounding: one unit in the last place (regular
    tensors: the bits, but for double rounding in the oracle)."""
    leaves = [t.detach().requires_grad_() for t in ts]
    grads = torch.autograd.grad(pyreg.penalty(leaves, penalty), leaves)
    for t, g in zip(ts, grads, strict=True):
        assert (g.dtype, g.shape) == (t.dtype, t.shape)
        if pyreg.tensors.irregular(t) is None:
            agree(g, oracle.gradient(penalty, t), gradient_bound(penalty, t))


def gradient_bound(penalty: Penalty, t: Tensor, terms: Tensor | float = 0.0) -> Tensor:
    """Two roundings in the compute dtype of each term (six of any other penalty's, whose size its
    strengths and the result bound), one of the result in the dtype."""
    u = oracle.unit_roundoff(pyreg.reference.compute_dtype(t.dtype))
    x = t.double().nan_to_num(0, 0, 0).abs()
    size = max(penalty.strengths) * (1 + 2 * x) + terms
    result = oracle.gradient(penalty, t).double().nan_to_num(0, 0, 0).abs() + terms
    own = oracle.unit_roundoff(t.dtype)
    return 4 * u * size + (2 * own + 8 * u) * result + oracle.smallest(t.dtype)


@MANY
@given(
    tensors(dense=True), penalty_objects(gradient=True), st.sampled_from([1.0, 0.3, -2.0, 1024.0])
)
def test_accumulate(t, penalty, scale):
    """old + scale * gradient: the bits of the contract's roundings in float32 and narrower for one
    term; otherwise the oracle's own double rounding."""
    t = t.clone().requires_grad_()
    old = torch.empty_like(t).copy_(t.detach().nan_to_num(1.0, 2.0, -2.0).clamp(-100, 100))
    t.grad = old.clone()
    value = pyreg.Regularizer([("t", t)], penalty).accumulate_(scale)
    expected = oracle.gradient(penalty, t, scale, old)
    if t.dtype != torch.float64 and penalty.name in ("l1", "l2"):
        assert oracle.same(t.grad, expected)
    else:
        bound = abs(scale) * gradient_bound(penalty, t.detach(), old.double().abs())
        agree(t.grad, expected, bound + gradient_bound(penalty, t.detach(), old.double().abs()))
    with torch.no_grad():
        assert oracle.same(value, pyreg.penalty([t], penalty))


@MANY
@given(
    tensors(dense=True),
    penalty_objects(),
    st.one_of(st.sampled_from([0.0, 1e-3, 1.0, 1e5]), st.floats(0, 1e6)),
)
def test_prox(t, penalty, step):
    """In place, within oracle.prox's bound; what is not penalised away keeps NaN and infinity."""
    w = t.clone()
    exact, tolerance = oracle.prox(penalty, w, step)
    pyreg.Regularizer([("w", w)], penalty, include_frozen=True).prox_(step)
    assert w.stride() == t.clone().stride()
    finite = exact.isfinite()
    assert torch.equal(w.isnan(), exact.isnan())
    assert (w[~finite & ~exact.isnan()] == exact[~finite & ~exact.isnan()].to(w.dtype)).all()
    assert ((w.double() - exact).abs()[finite] <= tolerance[finite]).all()
    if not finite.logical_not().any():
        assert oracle.is_minimal(penalty, t.flatten(), step, w.flatten())


@MANY
@given(st.lists(tensors(), min_size=1, max_size=4))
def test_stats(ts):
    """Maximum and counts exactly, sums within the value's bound, NaN where the oracle has it."""
    named = [(f"t{i}", t) for i, t in enumerate(ts)]
    table = pyreg.Regularizer(named, pyreg.L1(1.0), include_frozen=True).stats().table
    for row, t in zip(table, ts, strict=True):
        expected = pyreg.reference.stats(t)
        assert oracle.same(row[2:], expected[2:])
        lost = t.numel() * 2**-149
        for got, want in zip(row[:2].tolist(), expected[:2].tolist(), strict=True):
            assert oracle.close(got, want, oracle.value_tolerance([t]), lost)


@settings(max_examples=40)
@given(tensors(dense=True), st.sampled_from(penalties()), st.integers(1, 8))
def test_threads_and_slices_do_not_matter(t, penalty, threads):
    """The same bits for any number of threads, and by element for any slice of the tensor."""
    before = torch.get_num_threads()
    flat = t.clone(memory_format=torch.contiguous_format).view(-1)
    whole = flat.clone()
    try:
        value = pyreg.penalty([flat], penalty)
        pyreg.Regularizer([("w", whole)], penalty, include_frozen=True).prox_(0.1)
        torch.set_num_threads(threads)
        assert oracle.same(value, pyreg.penalty([flat], penalty))
        middle = len(flat) // 3
        parts = [flat[:middle].clone(), flat[middle:].clone()]
        named = [(f"{i}", part) for i, part in enumerate(parts)]
        pyreg.Regularizer(named, penalty, include_frozen=True).prox_(0.1)
        assert oracle.same(torch.cat(parts), whole)
    finally:
        torch.set_num_threads(before)
