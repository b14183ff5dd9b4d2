"""What only the native backend on the CPU has: threads, instruction sets, how tensors are read.

Its sweeps against the oracle: test_sweeps.py.
"""

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
from swept import Sweeps, flat, mixed
from torch import Tensor

import pyreg
from pyreg.metric import Metric
from pyreg.tensors import irregular

pytestmark = pytest.mark.usefixtures("native")

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
THREADS = (1, 2, 3, 8)
LONG = Case("long", lambda new: [new(3), new((SEGMENTS + 3) * CHUNK + 5), new(9)])


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


@DTYPE
@pytest.mark.parametrize("instruction_set", ["x86-64-v4", "x86-64-v3", "baseline"])
@pytest.mark.parametrize(
    "penalty", [pyreg.LogSum(0.5, 0.9), pyreg.MCP(0.5, 3.0), pyreg.SCAD(0.5, 3.7)], ids=repr
)
def test_a_block_of_short_steps_gives_the_bits_of_any_other(
    native, instruction_set, penalty, dtype
):
    """One element whose step is long, at a block's end, takes away the shortcut for the others."""
    use_or_skip(native, instruction_set)
    n = 256
    generator = torch.Generator().manual_seed(3)
    w = torch.empty(n, dtype=torch.float64).uniform_(-3, 3, generator=generator).to(dtype)
    w[-1] = 1.25
    w[:7] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 0.5, -1.5], dtype=dtype)
    moment = torch.empty(n, dtype=torch.float64).uniform_(0.3, 9, generator=generator).to(dtype)
    moment[7:9] = torch.tensor([math.inf, math.nan], dtype=dtype)
    steps = 0.8 / moment.double().sqrt()
    at_0 = penalty.grad(torch.tensor(1e-30, dtype=torch.float64))
    w[9:129] = (steps[9:129] * at_0 * torch.linspace(1, 1 + 1e-6, 120)).to(dtype)  # thresholds
    assert steps[steps.isfinite()].max() < 1.6  # short: below eps^2 / lam = 1.62, gamma, and a - 1
    results = []
    for last in (moment[-1].item(), 1e-3):
        moment[-1] = last
        x = w.clone()
        Sweeps([x], [penalty]).prox_in_metric([Metric(moment, 0.8, 1.0, 0.0)])
        results.append(x)
    short, beside_a_long_one = (x[:-1] for x in results)
    torch.testing.assert_close(short, beside_a_long_one, rtol=0, atol=0, equal_nan=True)
    steps[-1] = 0.8 / math.sqrt(1e-3)
    expected = penalty.prox(w.double()[9:], steps[9:])
    torch.testing.assert_close(results[1][9:].double(), expected, rtol=1e-2, atol=1e-2)
    assert (short[9:] != w[9:-1]).double().mean() > 0.2


def test_sets_of_numbers_that_are_not_there(native):
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    layout = native.Layout([w], [0], ["l1"])
    update, numbers = native.updates.index("sgd"), [0.0] * (native.numbers + 3)
    for sets in ([-1], [1], [-(2**31)]):
        with pytest.raises(ValueError, match="no such set of numbers"):
            layout.step([w], [], [update], sets, numbers, bytes(1), False, [0.0, 0.0], 1.0, 1)
    assert layout.step([w], [], [update], [0], numbers, bytes(1), False, [0.0, 0.0], 1.0, 1)


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


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch before 2.9 has no records to read")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_attribute_path_gives_the_same(native, dtype):
    """Where torch's records are not to be read, attributes are: same bits, same errors."""
    assert native.reads_records()
    chosen = [case for case in REGULAR if case.name not in ("thousands", "hundreds")]
    for case in chosen:
        runs = []
        for yes in (True, False):
            native.use_records(yes)
            assert native.reads_records() == yes
            runs.append(Sweeps(case.build(dtype), [pyreg.ElasticNet(1e-3, 0.2)]).everything())
        assert all(oracle.same(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("records", [True, False])
def test_a_layout_notices_every_change(native, records):
    """StaleLayout for another dtype, shape, stride or count, and for freed memory; nothing runs."""
    native.use_records(records)
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


@pytest.mark.parametrize("records", [True, False])
def test_a_layout_refuses_a_gradient_of_another_kind(native, records):
    """GradientMismatch before anything is written; a gradient with other strides is handed back."""
    native.use_records(records)
    w = [torch.ones(6, 4), torch.ones(3)]
    layout = native.Layout(w, [0, 0], ["l1"])
    strengths = [1.0] + [0.0] * (native.max_strengths - 1)
    good = torch.zeros(6, 4)
    for bad in (torch.zeros(4), torch.zeros(3).double(), torch.zeros(3).to_sparse()):
        with pytest.raises(native.GradientMismatch):
            layout.gradient(w, [good, bad], strengths, 1.0, 1)
        assert not good.any()
    w[0].grad = torch.zeros(4, 6).t()
    value, of_rules, present, others = layout.accumulate(w, strengths, 1.0, 1)
    assert (value, of_rules, present, others) == (27.0, [27.0], 1, [0])
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
        reasons = [irregular(t) for t in case.build(torch.float32)]
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
