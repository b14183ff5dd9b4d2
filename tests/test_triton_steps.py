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
from dataclasses import replace

import oracle
import pytest
import torch
from cases import STRENGTHS

import pyreg
from pyreg.metric import Metric
from pyreg.penalties import PENALTIES

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test sets it)", allow_module_level=True)
triton = pytest.importorskip("triton")
native = pytest.importorskip("pyreg._native")

from device import launches  # noqa: E402
from pyreg.triton_kernels import UPDATES, launch  # noqa: E402
from stepped import (  # noqa: E402
    EXACT,
    KINDS,
    NET,
    NUMBERS,
    SEVERAL,
    STEP,
    Size,
    Step,
    compare,
    make,
    metric,
    same_totals,
)

from pyreg.backend.native import NativeBackend  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at inf - inf


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
        monkeypatch.setattr(launch, "share_of", lambda *of, n=programs: -(-of[-1].slots // n))
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
