"""The optimizers' step in Triton, under its interpreter, against the native one.

BITS: the two do the same operations in the same order, each rounded, and the interpreter fuses
none: without a penalty, and with the prox of L1, L2 or elastic net, they agree to the last bit.
CLOSE: elsewhere they order a few operations otherwise: 16 roundings on either side of terms that
are at most 4, in the compute dtype, and one more of 16 bits, which may go up for the one and down
for the other.

The interpreter runs programs one after the other on CPU tensors: this says nothing about races.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
from cases import STRENGTHS
from torch import Tensor

import pyreg
from pyreg import pack
from pyreg.metric import Metric
from pyreg.penalties import PENALTIES, Penalty

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test sets it)", allow_module_level=True)
triton = pytest.importorskip("triton")
native = pytest.importorskip("pyreg._native")

import triton.language as tl  # noqa: E402
from device import launches  # noqa: E402
from pyreg.triton_kernels import UPDATES, launch, steps  # noqa: E402

from pyreg.backend.native import NativeBackend  # noqa: E402
from pyreg.backend.triton import TritonBackend  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at inf - inf

NET = pyreg.ElasticNet(0.3, 0.07)
# Of each update: numbers as its optimizer has them, with coupled and decoupled decay.
NUMBERS = {
    "adam": (1.0, 0.999, 0.01, 0.1, 0.98, 0.02, 0.05, 1.3, 1e-3),
    "adam amsgrad": (-1.0, 0.999, 0.0, 0.1, 0.98, 0.02, 0.05, 1.3, 1e-3),
    "sgd": (1.0, 1.0, 0.01, 0.1),
    "sgd momentum": (1.0, 1.0, 0.01, 0.1, 0.9, 0.5),
    "sgd nesterov": (-1.0, 1.0, 0.0, 0.1, 0.9, 1.0),
    "adagrad": (1.0, 1.0, 0.01, 0.1, 1e-3),
    "rmsprop": (1.0, 1.0, 0.01, 0.05, 0.9, 0.1, 1e-2),
    "rmsprop momentum": (1.0, 1.0, 0.01, 0.05, 0.9, 0.1, 1e-2, 0.5),
    "rmsprop centered": (-1.0, 1.0, 0.0, 0.05, 0.9, 0.1, 1e-2),
    "rmsprop centered momentum": (1.0, 1.0, 0.01, 0.05, 0.9, 0.1, 1e-2, 0.5),
}
STEP = 0.1  # a metric's numerator
KINDS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]
EXACT = [(torch.float32, torch.float32), (torch.float64, torch.float64)]


class Size(NamedTuple):
    chunks: int
    more: int = 0
    offset: int = 0  # elements between a 16-byte boundary and the first


AROUND_A_CHUNK = [Size(0), Size(0, 1), Size(1, -1), Size(1, 1), Size(0, 1100, 1)]
SEVERAL = [Size(0, 700), Size(1), Size(0, 600, 1)]


def metric(name: str) -> Metric:
    """That of the update, as its optimizer's state has it; its moment the sweep knows."""
    n = NUMBERS[name]
    if name.startswith("adam"):
        return Metric(None, STEP, n[7], n[8])
    if name.startswith("sgd"):
        return Metric(None, STEP)
    return Metric(None, STEP, 1.0, n[4] if name == "adagrad" else n[6])


@dataclass
class Step:
    """All that a step is told, and the same again for another backend."""

    updates: list[str]
    tensors: list[Tensor]
    states: list[list[Tensor | None]]
    rules: list[Penalty] = field(default_factory=lambda: [NET])
    rule_of: list[int] | None = None
    penalised: bytes | None = None
    prox: bool = False
    scale: float = 1.0
    more: dict = field(default_factory=dict)

    def copy(self) -> Step:
        """With tensors of its own, that lie at the same distance from a boundary."""
        tensors = [beside(t, t) for t in self.tensors]
        for t, own in zip(self.tensors, tensors, strict=True):
            own.grad = beside(t.grad, t)
        states = [[None if s is None else beside(s, s) for s in kind] for kind in self.states]
        return replace(self, tensors=tensors, states=states, more=dict(self.more))

    def take(self, backend=None, numbers=None):
        """(value, each rule's, zeros) as tensors, or None."""
        backend = backend or TritonBackend()
        sets = list(dict.fromkeys(self.updates))
        rule_of = self.rule_of or [0] * len(self.tensors)
        names = tuple(rule.name for rule in self.rules)
        (built,) = pack.build(self.tensors, pack.label, rule_of, names)
        done = backend.step(
            built,
            self.tensors,
            self.states,
            self.updates,
            [sets.index(name) for name in self.updates],
            numbers if numbers is not None else [(NUMBERS[n], metric(n)) for n in sets],
            bytes([1] * len(self.tensors)) if self.penalised is None else self.penalised,
            self.prox,
            self.rules,
            self.scale,
            **self.more,
        )
        return None if done is None else [torch.as_tensor(x, dtype=torch.float64) for x in done]

    def all(self) -> list[Tensor]:
        """Weights and states."""
        return [*self.tensors, *[s for kind in self.states for s in kind if s is not None]]


def beside(t: Tensor, like: Tensor) -> Tensor:
    """A copy in memory of its own, as far from a 16-byte boundary as `like` is."""
    offset = like.data_ptr() % 16 // like.element_size()
    memory = torch.empty(t.numel() + offset, dtype=t.dtype)
    return memory[offset:].copy_(t) if t.numel() else memory[:0]


def make(
    update: str, kinds=KINDS, sizes=AROUND_A_CHUNK, seed: int = 0, zeros: bool = True, **more
) -> Step:
    """Rows of these sizes in each of the kinds: (dtype, states' dtype)."""
    generator = torch.Generator().manual_seed(seed)
    tensors, states = [], [[] for _ in range(UPDATES[update].states)]
    for dtype, own in kinds:
        for size in sizes:
            n = size.chunks * launch.CHUNK // dtype.itemsize + size.more

            def new(dtype: torch.dtype, positive: bool = False, n=n, at=size.offset) -> Tensor:
                x = torch.randn(n, generator=generator).clamp(-3, 3)
                memory = torch.empty(n + at, dtype=dtype)
                return memory[at:].copy_(x.square() + 1 if positive else x)

            w = new(dtype)
            if zeros:
                w[3::7] = 0.0
            w.grad = new(dtype)
            tensors.append(w)
            for k, kind in enumerate(states):
                # a second moment is positive, and more than the square of a mean
                square = k == 0 if "rmsprop" in update or update == "adagrad" else k > 0
                s = new(own, positive=square)
                kind.append(s if square else s.mul_(0.3))
    return Step([update] * len(tensors), tensors, states, **more)


def compare(ours: Step, theirs: Step, bits: bool = False) -> None:
    for a, b in zip(ours.all(), theirs.all(), strict=True):
        if bits:
            assert oracle.same(a, b)
            continue
        u = 2**-53 if a.dtype == torch.float64 else 2**-24
        eps = torch.finfo(a.dtype).eps if a.element_size() == 2 else 0.0
        torch.testing.assert_close(a, b, rtol=eps, atol=128 * u, equal_nan=True)


def same_totals(ours, theirs, rtol: float = 2**-19) -> None:
    """2^-19: value and rules' are within 1.02e-6 each, of weights that are CLOSE."""
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=0, equal_nan=True)
    assert ours[2] == theirs[2]


def test_updates_are_those_of_csrc():
    assert tuple(UPDATES) == native.updates


@pytest.mark.parametrize("mode", [None, "grad", "prox"])
@pytest.mark.parametrize("update", UPDATES)
def test_every_update(update, mode):
    """Every dtype, of weights and states, in one launch; sizes around a chunk, and unaligned."""
    ours = make(update, prox=mode == "prox")
    if mode is None:
        ours.penalised = bytes(len(ours.tensors))
    theirs = ours.copy()
    before = ours.copy()
    done = []
    assert launches(torch.device("cpu"), lambda: done.append(ours.take())) == ["step"]
    compare_to = theirs.take(NativeBackend())
    compare(ours, theirs, bits=mode != "grad")
    same_totals(done[0], compare_to)
    assert not oracle.same(ours.tensors[2], before.tensors[2])
    assert (done[0][2] > 100) == (mode == "prox")
    assert (done[0][0] > 0) == (mode is not None)


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("update", ["adam", "sgd momentum"])
@pytest.mark.parametrize(
    "penalty", [cls(*STRENGTHS[n][0]) for n, cls in PENALTIES.items()], ids=str
)
def test_every_penalty(penalty, update, mode):
    """In float32 and float64: native rounds 16-bit weights between the update and these proxes."""
    if mode == "grad" and penalty.name == "l0":
        return  # it has none
    ours = make(
        update, EXACT, SEVERAL, zeros=False, rules=[penalty], prox=mode == "prox", scale=0.5
    )
    theirs = ours.copy()
    done, expected = ours.take(), theirs.take(NativeBackend())
    compare(ours, theirs)
    same_totals(done, expected)


@pytest.mark.parametrize("update", ["rmsprop centered", "rmsprop centered momentum"])
def test_a_metric_of_several_states(update):
    """Native sweeps leave it out, so: the update without a penalty, then the oracle's prox."""
    penalty = pyreg.MCP(0.3, 1.5)
    ours = make(
        update, [(torch.float64, torch.float64)], [Size(0, 500)], rules=[penalty], prox=True
    )
    theirs = replace(ours.copy(), penalised=bytes(1))
    assert replace(ours.copy()).take(NativeBackend()) is None
    value = ours.take()
    theirs.take(NativeBackend())
    v, mean = theirs.states[0][0], theirs.states[1][0]
    w = penalty.prox(theirs.tensors[0], STEP / ((v - mean**2).sqrt() + NUMBERS[update][6]))
    torch.testing.assert_close(ours.tensors[0], w, rtol=0, atol=128 * 2**-53)
    torch.testing.assert_close(value[0], penalty.value(w), rtol=2**-40, atol=0)
    assert value[2] == (w == 0).sum() > 0


@pytest.mark.parametrize("prox", [False, True])
def test_rules_updates_and_sets_in_one_launch(prox):
    """Rules and updates of each row's own, rows without a penalty among them, and a rule without a
    row."""
    rules = [pyreg.L1(0.3), pyreg.L2(0.1), pyreg.MCP(0.3, 1.5), NET, pyreg.L1(1.0)]
    updates = ["adam", "sgd momentum", "rmsprop", "adam", "sgd", "adagrad", "adam amsgrad"]
    made = [
        make(u, [(torch.float32, torch.float32)], [Size(0, 5), Size(0, 600)], i)
        for i, u in enumerate(updates)
    ]
    states = [
        [s for m in made for s in (m.states[k] if k < len(m.states) else [None] * 2)]
        for k in range(3)
    ]
    ours = Step(
        [u for u in updates for _ in range(2)],
        [t for m in made for t in m.tensors],
        states,
        rules,
        [i % 4 for i in range(14)],
        bytes(i % 5 != 2 for i in range(14)),
        prox,
    )
    theirs = ours.copy()
    done, expected = ours.take(), theirs.take(NativeBackend())
    compare(ours, theirs)
    same_totals(done, expected)
    assert done[1][4] == 0
    assert (done[1][:4] > 0).all()


@pytest.mark.parametrize("partials", [16, launch.PARTIALS])
@pytest.mark.parametrize("prox", [False, True])
def test_bits_do_not_depend_on_the_grid(monkeypatch, prox, partials):
    """Also where slots are many chunks and span rows."""
    monkeypatch.setattr(launch, "PARTIALS", partials)
    sizes = [Size(1), Size(0, 3), *SEVERAL, Size(0)]
    first = make("adam", KINDS[:3], sizes, prox=prox, rules=[NET, pyreg.L1(0.2)])
    first.rule_of = [i % 2 for i in range(len(first.tensors))]
    first.more["keys"] = list(range(len(first.tensors)))
    results = []
    for programs in (1, 7, 64):
        monkeypatch.setattr(launch, "programs", lambda device, sweep, n=programs: n)
        ours = first.copy()
        results.append([*ours.take(), *ours.all()])
    for other in results[1:]:
        assert all(map(oracle.same, results[0], other))


@pytest.mark.parametrize("mode", [None, "grad", "prox"])
@pytest.mark.parametrize("update", ["adam", "adam amsgrad", "sgd momentum", "adagrad", "rmsprop"])
def test_what_is_not_finite_stays_so(update, mode):
    """Every pair of these weights and gradients: NaN and infinity where native has them."""
    inf, nan = math.inf, math.nan
    w = torch.tensor([1.0, -2.0, 0.0, -0.0, inf, -inf, nan, 1e-30])
    g = torch.tensor([0.0, 1.0, -1.0, inf, -inf, nan, 1e-30])
    ours = make(update, KINDS[:3], [Size(0, len(w) * len(g))], prox=mode == "prox")
    for t in ours.tensors:
        t.copy_(w.repeat_interleave(len(g)))
        t.grad.copy_(g.repeat(len(w)))
    if mode is None:
        ours.penalised = bytes(len(ours.tensors))
    theirs = ours.copy()
    done, expected = ours.take(), theirs.take(NativeBackend())
    compare(ours, theirs)
    same_totals(done, expected)


@pytest.mark.parametrize("update", ["adam", "adagrad", "rmsprop momentum"])
def test_a_metric_of_zero(update):
    """Neither state nor offset: the largest step, so that weights go to 0, and nothing is NaN."""
    ours = make(update, EXACT, [Size(0, 600)], prox=True)
    numbers = [*NUMBERS[update], *[0.0] * (9 - len(NUMBERS[update]))]
    numbers[{"adam": 8, "adagrad": 4, "rmsprop momentum": 6}[update]] = 0.0
    numbers[2] = 0.0
    for t in (*[t.grad for t in ours.tensors], *[s for kind in ours.states for s in kind]):
        t[::2] = 0.0
    theirs = ours.copy()
    of_set = [(numbers, Metric(None, STEP, numbers[7], 0.0))]
    done, expected = ours.take(numbers=of_set), theirs.take(NativeBackend(), numbers=of_set)
    compare(ours, theirs)
    same_totals(done, expected)
    even = torch.cat([t[::2] for t in ours.tensors])
    assert even.isnan().all() if update == "rmsprop momentum" else even.eq(0).all()


def with_masters(update: str, sizes=AROUND_A_CHUNK, **more) -> tuple[Step, Step]:
    """16-bit rows with float32 masters, and the masters alone, as rows of their own."""
    kinds = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
    ours = make(update, kinds, sizes, zeros=False, **more)
    masters = [t.float() + 2**-12 for t in ours.tensors]
    ours.more["masters"] = masters
    alone = [m.clone() for m in masters]
    for m, t in zip(alone, ours.tensors, strict=True):
        m.grad = t.grad.float()
    states = [[s.clone() for s in kind] for kind in ours.states]
    return ours, replace(ours, tensors=alone, states=states, more={})


@pytest.mark.parametrize("mode", [None, "grad", "prox"])
@pytest.mark.parametrize("update", ["adam", "sgd", "rmsprop momentum"])
def test_masters(update, mode):
    """As float32 weights of which the tensors are copies, rounded; their value and zeros."""
    ours, alone = with_masters(update, prox=mode == "prox")
    if mode is None:
        ours.penalised = alone.penalised = bytes(len(ours.tensors))
    done, expected = ours.take(), alone.take(NativeBackend())
    same_totals(done, expected)
    masters = ours.more["masters"]
    compare(replace(ours, tensors=masters), alone, bits=mode != "grad")
    for t, m in zip(ours.tensors, masters, strict=True):
        assert oracle.same(t, m.to(t.dtype))


def test_masters_and_a_scale_against_torch():
    """Three steps of AdamW on masters, from scaled gradients, against torch's in float64: CLOSE,
    and three times."""
    torch.manual_seed(0)
    master = torch.randn(700)
    exact = torch.nn.Parameter(master.double())
    theirs = torch.optim.AdamW([exact], lr=0.05, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1)
    w, states = master.bfloat16(), [[torch.zeros(700)], [torch.zeros(700)]]
    for k in range(1, 4):
        exact.grad = torch.randn(700).bfloat16().double()
        w.grad = (exact.grad * 1024).bfloat16()
        numbers = (1.0, 1 - 0.05 * 0.1, 0.0, 0.1, 0.98, 0.02, 0.05 / (1 - 0.9**k))
        numbers += ((1 - 0.98**k) ** -0.5, 1e-3)
        more = {"masters": [master], "grad_scale": torch.tensor(1024.0)}
        ours = Step(["adam"], [w], states, penalised=bytes(1), more=more)
        ours.take(numbers=[(numbers, Metric(None, 0.05))])
        theirs.step()
    torch.testing.assert_close(master.double(), exact.detach(), rtol=0, atol=3 * 64 * 2**-24)
    assert oracle.same(w, master.bfloat16())


@pytest.mark.parametrize("prox", [False, True])
@pytest.mark.parametrize("scale", [8.0, 3.0])
def test_a_scale_of_the_gradients(scale, prox):
    """As gradients that were divided by it, which 8 does to the last bit; by 3 is a multiplication
    by its reciprocal, 2 roundings more. The penalty's own is not."""
    ours = make("adam", EXACT, SEVERAL, prox=prox, scale=0.5)
    theirs = ours.copy()
    for t, own in zip(ours.tensors, theirs.tensors, strict=True):
        own.grad = t.grad / scale
    plain = theirs.copy()
    ours.more["grad_scale"] = torch.tensor(scale)
    same_totals(ours.take(), theirs.take(NativeBackend()))
    compare(ours, theirs)
    plain.take()
    compare(ours, plain, bits=scale == 8.0)


@pytest.mark.parametrize("prox", [False, True])
def test_nothing_is_stored_where_an_infinity_was_found(prox):
    """Whatever the gradients are; the value and the zeros are those of the weights as they are."""
    ours, _ = with_masters("adam", SEVERAL, prox=prox)
    plain = make("adam amsgrad", KINDS[:3], SEVERAL, prox=prox)
    for step, keys in ((ours, None), (plain, list(range(len(plain.tensors))))):
        for t in step.tensors:
            t.grad[::5] = math.inf
        masters = step.more.get("masters", [])
        step.more |= {"keys": keys, "found_inf": torch.tensor(1.0)}
        before = [t.clone() for t in (*step.all(), *masters)]
        value, _, zeros = step.take()
        assert all(map(oracle.same, before, (*step.all(), *masters)))
        counted = masters or step.tensors
        tolerance = oracle.value_tolerance(counted, NET)
        assert oracle.close(value.item(), oracle.value(NET, counted), tolerance)
        assert zeros == sum((t == 0).sum() for t in counted)
        assert (zeros > 0) == (step is plain)
        for t in step.tensors:
            t.grad.clamp_(-1, 1)
        other, steps_of = step.copy(), []
        other.more = step.more | {"found_inf": None}
        if masters:
            other.more["masters"] = [m.clone() for m in masters]
        step.more["found_inf"] = torch.tensor(0.0)
        for each in (step, other):
            steps_of.append([*each.take(), *each.all(), *each.more.get("masters", [])])
        assert all(map(oracle.same, *steps_of))
        assert not oracle.same(step.tensors[0], before[0])


def hashed(index: np.ndarray, key: int) -> np.ndarray:
    """lowbias32 of the low half of the index, the key, and the high half times the golden ratio."""
    mask = 0xFFFFFFFF
    x = (index & mask) ^ key ^ ((index >> 32) * 0x9E3779B9 & mask)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> shift)) * factor & mask
    return x


def rounded(x: Tensor, key: int, begin: int = 0) -> Tensor:
    """float32 x as bfloat16: bits + (hash & 0xffff), cut off; not finite: to nearest."""
    index = np.arange(begin, begin + x.numel(), dtype=object)  # integers of any length
    noise = np.array([int(h) & 0xFFFF for h in hashed(index, key)], dtype=np.uint64)
    bits = (x.numpy().view(np.uint32).astype(np.uint64) + noise) & 0xFFFF0000
    cut = torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy()).bfloat16()
    return torch.where(x.isfinite(), cut, x.bfloat16())


@pytest.mark.parametrize("mode", [None, "grad", "prox"])
@pytest.mark.parametrize("master", [False, True])
def test_stochastic_rounding(mode, master):
    """The bits of the float32 step, rounded by the hash of the index in the row and of its key."""
    ours = make("adam", [(torch.bfloat16, torch.float32)], prox=mode == "prox")
    if mode is None:
        ours.penalised = bytes(len(ours.tensors))
    keys = [0, 1, 0xFFFFFFFF, 0x12345678, 0x80000000]
    ours.tensors[2][:3] = torch.tensor([math.inf, math.nan, -math.inf])
    wide = [t.float() for t in ours.tensors]
    for own, t in zip(wide, ours.tensors, strict=True):
        own.grad = t.grad.float()
    exact = replace(ours, tensors=wide, states=[[s.clone() for s in k] for k in ours.states])
    exact.take()
    if master:
        ours.more["masters"] = [t.float() for t in ours.tensors]
    ours.more["keys"] = keys
    totals = ours.take()
    for t, w, key in zip(ours.tensors, wide, keys, strict=True):
        assert oracle.same(t, rounded(w, key))
    compare(replace(ours, tensors=wide), exact, bits=True)
    assert totals[2] == (0 if mode is None else sum((w == 0).sum() for w in wide))


def test_values_count_before_stochastic_rounding():
    """Half of 1 - 2^-9 becomes 1, and half 1 - 2^-8; what counts is what was rounded."""
    n = 4000
    w = torch.ones(n).bfloat16()
    w.grad = torch.full_like(w, 2**-9)
    numbers = [((1.0, 1.0, 0.0, 1.0), Metric(None, 0.0))]
    ours = Step(["sgd"], [w], [], [pyreg.L1(1.0)], prox=True, more={"keys": [7]})
    value = ours.take(numbers=numbers)[0]
    assert value == n * (1 - 2**-9)
    assert {*w.tolist()} == {1.0, 1 - 2**-8}


@pytest.mark.parametrize("key", [0, 1, 2**31, 0xDEADBEEF])
@pytest.mark.parametrize("part", [0.03, 0.5, 0.9])
def test_stochastic_rounding_is_unbiased(part, key):
    """1 + part * 2^-7 goes up with probability `part`: of n, within 5 standard deviations, which
    chance leaves once in 1.7 million."""
    n = 20_000
    w = torch.ones(n).bfloat16()
    w.grad = torch.full_like(w, -part)
    numbers = [((1.0, 1.0, 0.0, 2**-7), Metric(None, 0.0))]
    part = w.grad[0].neg().item()  # as bfloat16 has it
    Step(["sgd"], [w], [], penalised=bytes(1), more={"keys": [key]}).take(numbers=numbers)
    up = (w == 1 + 2**-7).sum().item()
    assert up + (w == 1).sum().item() == n
    assert abs(up - part * n) < 5 * math.sqrt(n * part * (1 - part))


def test_a_row_of_more_than_2_32_elements_is_hashed_by_both_halves():
    """No such tensor is made: the rounding alone, of a block that begins there."""

    @triton.jit
    def round_block(x, into, element, key, N: tl.constexpr):
        tile = tl.arange(0, N)
        key = tl.load(key).to(tl.uint32)
        tl.store(into + tile, steps._rounded(tl.load(x + tile), tl.load(element), tile, key))

    x, key = torch.randn(512), torch.tensor(0xDEADBEEF)
    for begin in (0, 2**32 - 512, 2**32, 3 * 2**32 + 1024):
        into = torch.zeros(512, dtype=torch.bfloat16)
        round_block[(1,)](x, into, torch.tensor(begin), key, N=512)
        assert oracle.same(into, rounded(x, key.item(), begin))


def test_numbers_and_keys_on_the_device():
    """The same bits as from lists; and read anew at every call."""
    first = make("adam", KINDS[:3], [Size(0, 700)], prox=True)
    first.more["keys"] = [3, 2**32 - 1, 5]
    ours, again = first.copy(), first.copy()
    expected = first.take()
    own = metric("adam")
    row = [*NUMBERS["adam"], own.numerator, own.factor, own.offset]
    numbers = torch.tensor([row], dtype=torch.float64)
    ours.more = {"keys": torch.tensor(first.more["keys"])}
    done = ours.take(numbers=numbers)
    assert all(map(oracle.same, (*done, *ours.all()), (*expected, *first.all())))
    numbers[0, 6] = 0.0
    again.penalised = bytes(3)
    again.more = {}
    before = again.copy()
    again.take(numbers=numbers)
    w = (before.tensors[0] * 0.999).float()
    assert oracle.same(again.tensors[0], w)


def test_version_counters_tell_autograd():
    ours = make("sgd", EXACT, [Size(0, 5)])
    versions = [t._version for t in ours.tensors]
    ours.take()
    assert all(t._version > v for t, v in zip(ours.tensors, versions, strict=True))


class TestWhatCannotBeOneSweep:
    """None, or an error that says why; nothing is done."""

    @pytest.fixture(autouse=True)
    def unchanged(self):
        self.step = make("adam", EXACT[:1], [Size(0, 12), Size(0, 20)], penalised=bytes(2))
        kept = self.step.all()
        before = [t.clone() for t in kept]
        yield
        assert all(map(oracle.same, before, kept))

    def refused(self) -> bool:
        return self.step.take() is None

    def test_tensors_that_share_memory(self):
        self.step.tensors[0] = self.step.tensors[1][:12].detach()
        self.step.tensors[0].grad = torch.ones(12)
        assert self.refused()

    def test_states_that_share_memory(self):
        self.step.states[0][0] = self.step.states[1][0]
        assert self.refused()

    def test_other_strides(self):
        tensor = self.step.tensors[0] = self.step.tensors[0].detach().view(3, 4)
        tensor.grad = torch.ones(3, 4)
        for kind in self.step.states:
            kind[0] = torch.ones(4, 3).t()
        assert self.refused()
        for kind in self.step.states:
            kind[0] = torch.ones(3, 4)
        tensor.grad = torch.ones(4, 3).t()
        assert self.refused()

    def test_dtypes_unlike_each_other(self):
        self.step.states[0][0] = torch.ones(12, dtype=torch.float64)
        assert self.refused()

    def test_a_master_of_16_bits(self):
        self.step.more["masters"] = [torch.ones(12).half(), None]
        assert self.refused()

    def test_missing_or_misshapen(self):
        self.step.states[0][0] = None
        with pytest.raises(ValueError, match="row 0: a state is missing"):
            self.step.take()
        self.step.states[0][0] = torch.ones(13)
        with pytest.raises(ValueError, match="row 0: a state unlike its tensor"):
            self.step.take()
        self.step.tensors[1].grad = None
        with pytest.raises(ValueError, match="a gradient is missing"):
            self.step.take()

    def test_what_the_layout_does_not_know(self):
        self.step.updates[0] = "adan"
        with pytest.raises(ValueError, match="adan"):
            self.step.take(numbers=[(NUMBERS["adam"], metric("adam"))] * 2)
        self.step.updates[0] = "adam"
        with pytest.raises(ValueError, match=r"expected torch.float64 \[-1, 12\]"):
            self.step.take(numbers=torch.zeros(1, 11, dtype=torch.float64))
        with pytest.raises(ValueError, match="expected sets of 0, got 0 to 0"):
            self.step.take(numbers=torch.zeros(0, 12, dtype=torch.float64))
        self.step.more["found_inf"] = torch.zeros(2)
        with pytest.raises(
            ValueError, match=r"found_inf, one floating number.*got torch.float32 \[2\]"
        ):
            self.step.take()
        self.step.more = {"keys": [1]}
        with pytest.raises(ValueError, match=r"expected torch.int64 \[2\], got 8 bytes"):
            self.step.take()


def test_a_step_of_nothing():
    """Empty tensors only."""
    ours = make("adam", EXACT, [Size(0)], prox=True)
    assert [t.tolist() for t in ours.take()] == [0.0, [0.0], 0.0]


def test_counters():
    counters = [torch.tensor(1.0), torch.tensor(41.0, dtype=torch.float64)]
    assert TritonBackend().count(counters) == [2.0, 42.0]
    assert [c.item() for c in counters] == [2.0, 42.0]
    assert TritonBackend().count([]) == []
    for other in (torch.tensor(1), torch.ones(1), torch.ones((), device="meta")):
        assert TritonBackend().count([counters[0], other]) is None
    assert counters[0] == 2.0
    found = TritonBackend().count([torch.zeros((), device="meta")] * 2)  # as on a GPU
    assert (found.dtype, found.device.type, found.shape) == (torch.float64, "meta", (2,))
