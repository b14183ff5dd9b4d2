"""The native sweeps on the CPU against the oracle: every sweep x penalty x dtype x case."""

from __future__ import annotations

import itertools
import math
import mmap
import sys
import threading
import time

import oracle
import pytest
import torch
from cases import (
    CASES,
    CHUNK,
    DTYPES,
    IRREGULAR,
    REGULAR,
    SEGMENTS,
    Case,
    differentiable,
    fill,
    penalties,
)
from torch import Tensor

import pyreg
from pyreg import pack
from pyreg.dispatch import backend as backend_by_name
from pyreg.penalties import Penalty

pytestmark = pytest.mark.usefixtures("native")

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CASE = pytest.mark.parametrize("case", REGULAR, ids=repr)
THREADS = (1, 2, 3, 8)
LONG = Case("long", lambda new: [new(3), new((SEGMENTS + 3) * CHUNK + 5), new(9)])


class Sweeps:
    """The sweeps of one backend over some tensors, each row with its own rule."""

    def __init__(
        self, tensors: list[Tensor], rules: list[Penalty], rule_of: list[int] | None = None
    ) -> None:
        self.tensors, self.rules = tensors, rules
        self.rule_of = rule_of or [0] * len(tensors)
        names = tuple(rule.name for rule in rules)
        (self.pack,) = pack.build(tensors, pack.label, self.rule_of, names)
        self.backend = backend_by_name("native")
        assert self.backend.refuses(self.pack) is None

    def value(self) -> float:
        return self.backend.value(self.pack, self.tensors, self.rules)[0].item()

    def gradient(self, scale: float = 1.0) -> list[Tensor]:
        """Written into memory full of NaN."""
        grads = self.pack.flat_gradient()
        for g in grads:
            g.fill_(math.nan)
        self.backend.gradient(self.pack, self.tensors, grads, self.rules, scale)
        return grads

    def accumulate(self, grads: list[Tensor | None], scale: float = 1.0) -> float:
        for t, g in zip(self.tensors, grads, strict=True):
            t.grad = g
        value, present = self.backend.accumulate(self.pack, self.tensors, self.rules, scale)
        assert present == sum(g is not None for g in grads)
        return value.item()

    def prox(self, step: float) -> None:
        self.backend.prox(self.pack, self.tensors, self.rules, step)

    def stats(self) -> Tensor:
        return self.backend.stats(self.pack, self.tensors)

    def everything(self) -> list[Tensor]:
        """The results of all sweeps; the last one, prox, changes the tensors."""
        grads = [torch.ones_like(t) for t in self.tensors]
        results = [
            torch.tensor(self.value()).double(),
            *self.gradient(0.7),
            torch.tensor(self.accumulate(grads, 0.7)).double(),
            *grads,
            self.stats(),
        ]
        self.prox(0.3)
        return [*results, *self.tensors]


def old_gradients(tensors: list[Tensor]) -> list[Tensor]:
    """Numbers like the tensors' own, with their strides."""
    return [torch.empty_like(t).copy_(t.flip(list(range(t.ndim))) * 3) for t in tensors]


def flat(tensors: list[Tensor]) -> Tensor:
    """All elements in one copy: the formulas go by element, so thousands of rows are one check."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@CASE
@DTYPE
def test_value(dtype, case):
    """Within the tolerance of oracle.value_tolerance; 0 for no elements."""
    tensors = case.build(dtype)
    w = [flat(tensors)]
    for penalty in penalties():
        tolerance = oracle.value_tolerance(tensors, penalty)
        got = Sweeps(tensors, [penalty]).value()
        assert oracle.close(got, oracle.value(penalty, w), tolerance), penalty


@CASE
@DTYPE
def test_gradient(dtype, case):
    """The bits of the exact gradient rounded once, times the scale; every element is written."""
    tensors = case.build(dtype)
    w = flat(tensors)
    for penalty, scale in itertools.product(differentiable(), (1.0, 0.3)):
        got = flat(Sweeps(tensors, [penalty]).gradient(scale))
        assert oracle.agrees(got, oracle.gradient(penalty, w, scale), penalty, scale), penalty


@CASE
@DTYPE
def test_accumulate(dtype, case):
    """old + scale * gradient, added in the compute dtype and rounded once; and the value."""
    tensors = case.build(dtype)
    before, w = old_gradients(tensors), flat(tensors)
    old = flat(before)
    for penalty in differentiable():
        tolerance = oracle.value_tolerance(tensors, penalty)
        grads = [torch.empty_like(g).copy_(g) for g in before]
        value = Sweeps(tensors, [penalty]).accumulate(grads, 0.3)
        assert oracle.close(value, oracle.value(penalty, [w]), tolerance), penalty
        got, expected = flat(grads), oracle.gradient(penalty, w, 0.3, old)
        assert oracle.agrees(got, expected, penalty, 0.3, old), penalty


@CASE
@DTYPE
def test_prox(dtype, case):
    """Within oracle.prox's tolerance of the float64 prox, at small and large steps."""
    tensors = case.build(dtype)
    w, before = flat(tensors), [t.clone() for t in tensors]
    for penalty, step in itertools.product(penalties(), (0.0, 0.01, 2.0, 1e5)):
        torch._foreach_copy_(tensors, before)
        exact, tolerance = oracle.prox(penalty, w, step)
        Sweeps(tensors, [penalty]).prox(step)
        got = flat(tensors)
        assert ((got.double() - exact).abs() <= tolerance).all(), (penalty, step)
        assert oracle.is_minimal(penalty, w, step, got), (penalty, step)
        assert step > 0 or torch.equal(got, w)


@CASE
@DTYPE
def test_stats(dtype, case):
    """Sums within the value's tolerance; maximum and counts exactly."""
    tensors = case.build(dtype)
    table = Sweeps(tensors, [pyreg.L1(1)]).stats()
    assert table.shape == (len(tensors), 5)
    for row, t in zip(table, tensors, strict=True):
        expected = pyreg.reference.stats(t)
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
def test_prox_at_a_threshold(penalty, step, at, dtype):
    """The numbers around a threshold: each goes to one of two minimisers, within 1e-3 of which are
    the thresholds above; far from it there is one."""
    near = torch.tensor(at, dtype=dtype)
    w = torch.cat([near + near * torch.arange(-99, 100) * torch.finfo(dtype).eps, near[None] * 2])
    w = torch.cat([w, -w, near[None] / 2]).to(dtype)
    got = w.clone()
    Sweeps([got], [penalty]).prox(step)
    assert oracle.is_minimal(penalty, w, step, got)
    exact, tolerance = oracle.prox(penalty, w, step)
    assert ((got.double() - exact).abs() <= tolerance).all()
    jump = penalty.prox(torch.tensor([at * 0.999, at * 1.001], dtype=torch.float64), step)
    assert jump.diff().abs() > 0.1 * at


def test_segments_of_several_chunks():
    """Past SEGMENTS chunks a segment holds more than one. The reference here is the same sweep over
    slices, each in a call of its own and with segments of one chunk: the same bits by element."""
    penalty = pyreg.ElasticNet(1e-3, 0.2)
    tensors = LONG.build(torch.bfloat16)
    sweeps = Sweeps(tensors, [penalty])
    slices = [part.clone() for t in tensors for part in t.split(1000 * CHUNK)]
    parts = [Sweeps([part], [penalty]) for part in slices]
    tolerance = oracle.value_tolerance(tensors)
    assert oracle.close(sweeps.value(), math.fsum(p.value() for p in parts), 2 * tolerance)
    grads = sweeps.gradient()
    assert oracle.same(flat(grads), flat([p.gradient()[0] for p in parts]))
    assert sweeps.accumulate(grads) == sweeps.value()
    zeros = [torch.zeros_like(t) for t in tensors]
    sweeps.accumulate(zeros)
    assert oracle.same(flat(zeros), flat([p.gradient()[0] for p in parts]))
    counts = torch.stack([pyreg.reference.stats(t)[2:] for t in tensors])
    assert torch.equal(sweeps.stats()[:, 2:], counts)
    sweeps.prox(0.9)
    for p in parts:
        p.prox(0.9)
    assert oracle.same(flat(tensors), flat(slices))


def mixed(seed: str = "mixed") -> tuple[list[Tensor], list[Penalty], list[int]]:
    """Every dtype under every penalty in one call, with an empty tensor before each."""
    rules, tensors, rule_of = penalties(), [], []
    for r in range(len(rules)):
        for i, dtype in enumerate(DTYPES):
            sizes = (0, 3 * CHUNK + 7 * r + i)
            tensors += [fill((n,), dtype, "cpu", f"{seed}{r}{i}") for n in sizes]
            rule_of += [r, r]
    return tensors, rules, rule_of


def test_mixed_dtypes_and_penalties_in_one_call():
    """The value is the sum of what each row gives alone, and so are gradients, prox and stats."""
    tensors, rules, rule_of = mixed()
    together = Sweeps(tensors, rules, rule_of)
    parts = [oracle.value(rules[r], [t]) for t, r in zip(tensors, rule_of, strict=True)]
    tolerance = max(oracle.value_tolerance(tensors, rule) for rule in rules)
    assert oracle.close(together.value(), math.fsum(parts), tolerance)
    alone = [Sweeps([t.clone()], [rules[r]]) for t, r in zip(tensors, rule_of, strict=True)]
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


def test_sums_are_per_rule():
    """value() also returns each rule's sums: the derivatives by its strengths."""
    tensors = [fill((500,), torch.float32, "cpu", f"sums{i}") for i in range(3)]
    rules = [pyreg.ElasticNet(1, 1), pyreg.L1(1)]
    sweeps = Sweeps(tensors, rules, [0, 1, 0])
    _, sums = sweeps.backend.value(sweeps.pack, tensors, rules)
    l1 = [t.double().abs().sum().item() for t in tensors]
    l2 = [t.double().square().sum().item() for t in tensors]
    assert sums[0] == pytest.approx([l1[0] + l1[2], l2[0] + l2[2]], rel=1e-6)
    assert sums[1][0] == pytest.approx(l1[1], rel=1e-6)


def test_rows_without_a_gradient_are_left_out():
    """gradient() skips a None; accumulate() counts it in the value and makes no gradient."""
    tensors = [fill((300,), torch.float32, "cpu", f"none{i}") for i in range(3)]
    sweeps = Sweeps(tensors, [pyreg.L1(0.5)])
    out = [torch.full_like(t, 7.0) for t in tensors]
    sweeps.backend.gradient(sweeps.pack, tensors, [out[0], None, out[2]], sweeps.rules, 1.0)
    assert oracle.same(out[0], oracle.gradient(sweeps.rules[0], tensors[0]))
    assert (out[1] == 7).all()
    value = sweeps.accumulate([None, torch.zeros(300), None])
    assert value == sweeps.value()
    assert tensors[0].grad is None
    assert oracle.same(tensors[1].grad, oracle.gradient(sweeps.rules[0], tensors[1]))


@DTYPE
def test_nothing_is_written_next_to_a_row(dtype):
    """Sentinels on both sides of each row survive gradient, accumulate and prox."""
    for n in (1, 17, 255, 257, CHUNK + 1):
        memory = [torch.full((n + 200,), 5.0, dtype=dtype) for _ in range(2)]
        w, g = (m[101 : 101 + n] for m in memory)
        sweeps = Sweeps([w], [pyreg.ElasticNet(0.25, 0.25)])
        sweeps.backend.gradient(sweeps.pack, [w], [g], sweeps.rules, 1.0)
        sweeps.accumulate([g])
        sweeps.prox(1.0)
        for m in memory:
            assert (m[:101] == 5).all()
            assert (m[101 + n :] == 5).all()
        assert (g == 2 * (0.25 + 0.5 * 5)).all()
        assert (w == (5 - 0.25) / 1.5).all() or dtype != torch.float64


@pytest.mark.parametrize("instruction_set", ["x86-64-v4", "x86-64-v3", "baseline"])
def test_same_bits_for_any_number_of_threads_and_every_run(native, instruction_set):
    """Values, gradients, prox, stats: 1, 2, 3 and 8 threads, twice each, in every dtype at once."""
    use_or_skip(native, instruction_set)
    first = None
    for threads in (*THREADS, *THREADS):
        torch.set_num_threads(threads)
        tensors, rules, rule_of = mixed("threads")
        big = fill((300_000,), torch.float32, "cpu", "threads")
        results = Sweeps([*tensors, big], rules, [*rule_of, 0]).everything()
        first = first or results
        assert all(oracle.same(a, b) for a, b in zip(first, results, strict=True))


def use_or_skip(native, name: str) -> None:
    if name not in native.instruction_sets():
        pytest.skip(f"{name} is not compiled in")
    try:
        native.use_instruction_set(name)
    except ValueError as error:
        pytest.skip(str(error))
    assert native.instruction_set() == name


def results_by_instruction_set(native, name: str) -> list[list[Tensor]]:
    use_or_skip(native, name)
    built = [case.build(dtype) for case in REGULAR for dtype in DTYPES]
    results = [Sweeps(tensors, [pyreg.ElasticNet(1e-3, 0.2)]).everything() for tensors in built]
    return [*results, Sweeps(*mixed("sets")).everything()]


def test_avx2_and_avx512_give_the_same_bits(native):
    """The vector width is no part of the result."""
    wide = results_by_instruction_set(native, "x86-64-v4")
    narrow = results_by_instruction_set(native, "x86-64-v3")
    for a, b in zip(wide, narrow, strict=True):
        assert all(oracle.same(x, y) for x, y in zip(a, b, strict=True))


def test_baseline_differs_only_by_the_fused_product(native):
    """Without a fused multiply-add: prox, maxima and counts are the same bits; each sum is within
    the bound that holds for both; a gradient within two roundings of its terms (here <= 4)."""
    widest = native.instruction_sets()[0]
    for case in REGULAR:
        for dtype in DTYPES:
            penalty = pyreg.ElasticNet(1e-3, 0.2)
            runs = []
            for name in (widest, "baseline"):
                use_or_skip(native, name)
                tensors = case.build(dtype)
                sweeps = Sweeps(tensors, [penalty])
                value, grads, stats = sweeps.value(), sweeps.gradient(), sweeps.stats()
                sweeps.prox(0.3)
                runs.append((value, grads, stats, tensors))
            (value, grads, stats, proxed), (value2, grads2, stats2, proxed2) = runs
            tolerance = 2 * oracle.value_tolerance(tensors)
            assert oracle.close(value, value2, tolerance)
            assert torch.equal(stats[:, 2:], stats2[:, 2:])
            torch.testing.assert_close(stats, stats2, rtol=tolerance, atol=0)
            assert all(oracle.same(a, b) for a, b in zip(proxed, proxed2, strict=True))
            u = oracle.unit_roundoff(dtype)
            for a, b in zip(grads, grads2, strict=True):
                bound = 2 * u * b.double().abs() + 2 * 4 * 2**-53 + oracle.smallest(dtype)
                assert ((a.double() - b.double()).abs() <= bound).all()


def test_penalties_without_a_fused_product_give_the_same_bits_everywhere(native):
    """All but L2 and elastic net: value, gradient and prox, roots and logarithms among them."""
    others = [p for p in penalties() if p.name not in ("l2", "elastic_net")]
    for dtype, penalty in itertools.product(DTYPES, others):
        first = None
        for name in ("baseline", "x86-64-v3", "x86-64-v4"):
            if name not in native.instruction_sets():
                continue
            try:
                native.use_instruction_set(name)
            except ValueError:
                continue
            sweeps = Sweeps([fill((3 * CHUNK + 7,), dtype, "cpu", "bits") * 3], [penalty])
            results = [torch.tensor(sweeps.value(), dtype=torch.float64)]
            if penalty.name != "l0":
                results += sweeps.gradient(0.7)
            sweeps.prox(0.3)
            results += sweeps.tensors
            first = first or results
            assert all(oracle.same(a, b) for a, b in zip(first, results, strict=True)), penalty


def test_unknown_instruction_set(native):
    with pytest.raises(ValueError, match="unknown instruction set sse9"):
        native.use_instruction_set("sse9")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("constant", [0.1, 1.0, 1 / 3, 0.7])
def test_accuracy_on_constants(dtype, constant):
    """1e7 equal numbers, where every rounding of a sum may go the same way: the contract's 1e-6."""
    w = torch.full((10_000_000,), constant, dtype=dtype)
    x = w[0].double().item()
    for penalty, each in [
        (pyreg.L1(1e-3), 1e-3 * abs(x)),
        (pyreg.L2(1e-3), 1e-3 * x * x),
        (pyreg.ElasticNet(1e-3, 1e-2), 1e-3 * abs(x) + 1e-2 * x * x),
    ]:
        value = pyreg.penalty([w], penalty).item()
        assert abs(value / (each * w.numel()) - 1) <= 1e-6


def test_more_than_2_to_31_elements():
    """Elements past any 32-bit index are counted, also those of segments that begin there.

    Private anonymous memory reads as zeros without being there: only the touched pages exist.
    """
    n = 2**31 + 2_000_000  # a segment has some 530,000
    memory = mmap.mmap(-1, 2 * n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    w = torch.frombuffer(memory, dtype=torch.bfloat16)
    w[-4000:] = -2.0
    w[0] = 1.0
    w[2**31 - 1] = 1.0
    sweeps = Sweeps([w], [pyreg.ElasticNet(1.0, 1.0)])
    assert sweeps.value() == (4000 * 2 + 2) + (4000 * 4 + 2)
    assert sweeps.stats().tolist() == [[8002.0, 16002.0, 2.0, n - 4002, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_attribute_path_gives_the_same(native, dtype):
    """Without the exchange API a tensor's facts are read as attributes: same bits, same errors."""
    if not native.has_exchange_api():
        pytest.skip("this torch has no exchange API")
    chosen = [case for case in REGULAR if case.name not in ("thousands", "hundreds")]
    for case in chosen:
        runs = []
        for yes in (True, False):
            native.use_exchange_api(yes)
            assert native.has_exchange_api() == yes
            runs.append(Sweeps(case.build(dtype), [pyreg.ElasticNet(1e-3, 0.2)]).everything())
        assert all(oracle.same(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("exchange_api", [True, False])
def test_a_layout_notices_every_change(native, exchange_api):
    """StaleLayout for another dtype, shape, stride or count, and for freed memory; nothing runs."""
    native.use_exchange_api(exchange_api)
    layout = native.Layout([torch.ones(6, 4)], [0], ["l1"])
    strengths = [1.0] + [0.0] * (native.max_strengths - 1)
    assert layout.value([torch.ones(6, 4)], strengths, 1)[0] == 24
    freed = torch.ones(6, 4)
    freed.untyped_storage().resize_(0)
    for other in (
        [torch.ones(6, 4).double()],
        [torch.ones(4, 6)],
        [torch.ones(4, 6).t()],
        [torch.ones(24)],
        [torch.ones(6, 4)] * 2,
        [],
        [freed],
    ):
        with pytest.raises(native.StaleLayout):
            layout.value(other, strengths, 1)
        with pytest.raises(native.StaleLayout):
            layout.prox(other, strengths, 0.1, 1)
        with pytest.raises(native.StaleLayout):
            layout.stats(other, 1)


@pytest.mark.parametrize("exchange_api", [True, False])
def test_a_layout_refuses_a_gradient_of_another_kind(native, exchange_api):
    """GradientMismatch before anything is written; a gradient with other strides is handed back."""
    native.use_exchange_api(exchange_api)
    w = [torch.ones(6, 4), torch.ones(3)]
    layout = native.Layout(w, [0, 0], ["l1"])
    strengths = [1.0] + [0.0] * (native.max_strengths - 1)
    good = torch.zeros(6, 4)
    for bad in (torch.zeros(4), torch.zeros(3).double(), torch.zeros(3).to_sparse()):
        with pytest.raises(native.GradientMismatch):
            layout.gradient(w, [good, bad], strengths, 1.0, 1)
        assert not good.any()
    w[0].grad = torch.zeros(4, 6).t()
    value, present, others = layout.accumulate(w, strengths, 1.0, 1)
    assert (value, present, others) == (27.0, 1, [0])
    assert not w[0].grad.any()
    with pytest.raises(ValueError, match="strengths"):
        layout.value(w, [1.0], 1)
    with pytest.raises(ValueError, match="no native kernel for penalty 'l7'"):
        native.Layout(w, [0, 0], ["l7"])
    with pytest.raises(ValueError, match="row 0"):
        native.Layout([torch.ones(3, dtype=torch.int32)], [0], ["l1"])


@pytest.mark.parametrize("case", IRREGULAR, ids=repr)
@DTYPE
def test_irregular_tensors_go_through_torch(case, dtype):
    """What native cannot walk, torch sweeps: right values and gradients, among regular ones."""
    tensors = [t.requires_grad_() for t in case.build(dtype)]
    for penalty in differentiable():
        value = pyreg.penalty(tensors, penalty)
        expected = oracle.value(penalty, tensors)
        assert oracle.close(value.item(), expected, oracle.value_tolerance(tensors, penalty))
        for t, g in zip(tensors, torch.autograd.grad(value, tensors), strict=True):
            # torch rounds 2 * l2 first (u), the products (u) and their sum (u); others up to 6 u.
            bound = 4 * oracle.unit_roundoff(dtype) + 8 * 2**-24
            want = oracle.gradient(penalty, t).double()
            scale = want.abs() + max(penalty.strengths)
            assert ((g.double() - want).abs() <= bound * scale + oracle.smallest(dtype)).all()


def test_every_case_is_as_regular_as_it_says():
    for case in CASES:
        reasons = [pack.irregular(t) for t in case.build(torch.float32)]
        assert all(r is None for r in reasons) == case.regular, case


def test_half_conversions_are_exact_for_every_pattern(native):
    """All 65,536 patterns through widen and narrow: prox with step 0 is the identity (NaN stays
    NaN)."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for name in native.instruction_sets():
        try:
            native.use_instruction_set(name)
        except ValueError:
            continue
        for dtype in (torch.bfloat16, torch.float16):
            w, before = patterns.clone().view(dtype), patterns.clone().view(dtype)
            Sweeps([w], [pyreg.L2(0.0)]).prox(0.0)
            assert oracle.same(w, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrowing_rounds_to_nearest_even(native, dtype):
    """Halfway cases, overflow and subnormals: torch's own cast decides. w + c falls between two
    neighbours of the dtype exactly where c is half of their distance."""
    patterns = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    old = patterns[patterns.isfinite()]
    for name in native.instruction_sets():
        try:
            native.use_instruction_set(name)
        except ValueError:
            continue
        for share in (0.5, 0.25, 0.75, 1.0):
            gap = torch.cat([(old[1:].double() - old[:-1].double()), torch.zeros(1)]) * share
            for rows in gap.unique().tolist():
                if rows == 0 or rows < 2**-126:
                    continue
                w, g = torch.ones_like(old), old.clone()
                expected = (old.float() + rows).to(dtype)
                sweeps = Sweeps([w], [pyreg.L1(rows)])
                sweeps.accumulate([g])
                assert oracle.same(g, expected)


def test_one_libgomp(run_python):
    """torch and the native module share one OpenMP runtime, so one pool of threads."""
    maps = run_python(
        "import torch, pyreg\n"
        "w = torch.randn(200_000)\n"
        "pyreg.l1([w], 1e-3)\n"
        "assert pyreg.backends()[0].available\n"
        "w.exp().sum()\n"
        "try:\n"
        "    print(open('/proc/self/maps').read())\n"
        "except OSError:\n"
        "    pass"
    )
    paths = {line.split()[-1] for line in maps.splitlines() if "gomp" in line or "libomp" in line}
    if not paths:
        pytest.skip("no /proc/self/maps here, or no OpenMP")
    assert len(paths) == 1, paths


def test_the_gil_is_released_during_a_sweep(native):
    """Another Python thread runs while a sweep does.

    With a switch interval of minutes the other thread gets the GIL only when someone gives it up,
    and between the two looks at its counter this thread does so nowhere but inside the sweep. One
    sweep may be over before the system schedules the other thread, so there are many.
    """
    w = torch.ones(4_000_000)
    layout = native.Layout([w], [0], ["l1"])
    strengths = [1.0] + [0.0] * (native.max_strengths - 1)
    counter, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            counter[0] += 1
            time.sleep(0)  # gives the GIL up

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    sys.setswitchinterval(600)
    try:
        thread.start()
        progressed = False
        for _ in range(2000):
            before = counter[0]
            layout.value([w], strengths, 1)
            if counter[0] != before:
                progressed = True
                break
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert progressed
