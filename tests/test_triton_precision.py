"""16-bit rows in Triton's step: masters, scaled gradients, stochastic rounding.

BITS and CLOSE are those of test_triton_steps.py.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

import pyreg
from pyreg.metric import Metric

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test sets it)", allow_module_level=True)
triton = pytest.importorskip("triton")
pytest.importorskip("pyreg._native")

import triton.language as tl  # noqa: E402
from pyreg.triton_kernels import steps  # noqa: E402
from stepped import (  # noqa: E402
    AROUND_A_CHUNK,
    EXACT,
    KINDS,
    NET,
    NUMBERS,
    SEVERAL,
    Size,
    Step,
    compare,
    make,
    metric,
    same_totals,
)

from pyreg.backend.native import NativeBackend  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at inf - inf


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
