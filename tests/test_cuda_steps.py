"""An optimizer's step in the CUDA kernels' code, run on the host: the bits of the CPU's sweep."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from cases import penalties
from test_cuda_backend import assert_same_bits, pack_of
from trained import NET, ONE_EACH, make, minimizing, net, tensors_of

import pyreg
from pyreg import dispatch, optim
from pyreg.backend import cuda, native
from pyreg.backend.torch import taken
from pyreg.metric import Metric

# As an optimizer has them after a step or two: csrc/updates.h tells what each is.
NUMBERS = {
    "adam": (1.0, 0.999, 0.0, 0.1, 0.999, 0.001, 0.01, 1.5, 1e-3),
    "sgd": (1.0, 1.0, 0.1, 0.05, 0.9, 0.5),
    "adagrad": (-1.0, 1.0, 0.1, 0.02, 1e-3),
    "rmsprop": (1.0, 1.0, 0.0, 0.01, 0.9, 0.1, 1e-2, 0.5),
}
METRIC = {
    "adam": Metric(None, 0.01, 1.5, 1e-3),
    "sgd": Metric(None, 0.05),
    "adagrad": Metric(None, 0.02, 1.0, 1e-3),
    "rmsprop": Metric(None, 0.01, 1.0, 1e-2),
}
STATES = {
    "adam": 2,
    "adam amsgrad": 3,
    "sgd": 0,
    "sgd momentum": 1,
    "sgd nesterov": 1,
    "adagrad": 1,
    "rmsprop": 1,
    "rmsprop momentum": 2,
    "rmsprop centered": 2,
    "rmsprop centered momentum": 3,
}
UPDATES = pytest.mark.parametrize("update", STATES)
MODE = pytest.mark.parametrize("mode", ["grad", "prox"])
HOW = [
    pytest.param(torch.float32, "own", id="float32"),
    pytest.param(torch.float64, "own", id="float64"),
    pytest.param(torch.float64, "float32 states", id="float64, float32 states"),
    pytest.param(torch.float16, "own", id="float16"),
    *(
        pytest.param(torch.bfloat16, how, id=f"bfloat16, {how}")
        for how in ("own", "float32 states", "masters", "at random")
    ),
]
# Around a warp's elements, a vector's and a chunk's; the last ones lie at no multiple of 16 bytes.
SIZES = [(0,), (1,), (33,), (4095,), (4096,), (64, 65), (3, 4096), (4097,), (8200,), (5, 7)]


class Step:
    """The arguments of one, the same at every making."""

    def __init__(self, update, dtype, how, rules):
        generator = torch.Generator().manual_seed(1)

        def random(size, dtype, positive=False, shift=0):
            n = torch.Size(size).numel() + shift
            x = torch.randn(n, generator=generator, dtype=torch.float64).mul(0.1)
            x = (x.abs() if positive else x).to(dtype)
            return x[shift:].view(size)

        shifts = [0] * (len(SIZES) - 2) + [1, 1]
        self.tensors = [random(size, dtype, shift=s) for size, s in zip(SIZES, shifts, strict=True)]
        self.tensors[5] = self.tensors[5].t()
        for t, shift in zip(self.tensors, shifts, strict=True):
            t.grad = torch.empty_like(t).copy_(random(t.shape, dtype, shift=shift))
        self.tensors[8].grad = torch.empty(8201, dtype=dtype)[1:].copy_(self.tensors[8].grad)
        wide = dtype if how == "own" else torch.float32
        self.states = [
            [
                torch.empty_like(t, dtype=wide).copy_(random(t.shape, wide, positive=k != 0))
                for t in self.tensors
            ]
            for k in range(STATES[update])
        ]
        if STATES[update] and not update.startswith("adam"):  # of these the first is of squares
            self.states[0] = [s.abs() + 1 for s in self.states[0]]
        kind = update.split()[0]
        other = tuple(x * 1.25 if k != 1 else x for k, x in enumerate(NUMBERS[kind]))
        self.numbers = [(NUMBERS[kind], METRIC[kind]), (other, METRIC[kind])]
        self.sets = [i % 2 if kind == "sgd" else 0 for i in range(len(SIZES))]
        self.updates, self.rules = [update] * len(SIZES), rules
        self.penalised = bytes(i != 3 for i in range(len(SIZES)))
        self.more = {}
        if how == "masters":
            self.more["masters"] = [
                None if i == 1 else t.float() + 2**-12 for i, t in enumerate(self.tensors)
            ]
        if how == "at random":
            keys = [k * 0x9E3779B9 % 2**32 for k in range(len(SIZES))]
            self.more["keys"] = [None if i == 4 else key for i, key in enumerate(keys)]

    def take(self, backend, mode, **more):
        pack = pack_of(self.tensors, self.rules)
        numbers, more = more.pop("numbers", self.numbers), {**self.more, **more}
        given = (self.states, self.updates, self.sets, numbers, self.penalised)
        versions = [t._version for t in self.tensors]
        done = backend.step(
            pack, self.tensors, *given, mode == "prox", self.rules, more.pop("scale", -0.5), **more
        )
        if done is None:
            return None
        assert all(t._version > v for t, v in zip(self.tensors, versions, strict=True))
        value, of_rules, zeros = done
        return [
            torch.as_tensor(value).float(),
            taken(of_rules),
            torch.as_tensor(zeros),
            *self.everything(),
        ]

    def everything(self):
        beside = [*self.states, self.more.get("masters", [])]
        return [*self.tensors, *(s for kind in beside for s in kind if s is not None)]


@MODE
@pytest.mark.parametrize(("dtype", "how"), HOW)
@UPDATES
def test_the_bits_of_the_cpu(kernels, update, dtype, how, mode):
    """With L1, L2 and elastic net, tensor by tensor in turn; the fourth is not penalised."""
    rules = [pyreg.L1(0.3), pyreg.L2(0.2), pyreg.ElasticNet(0.1, 0.4)]
    found = [
        Step(update, dtype, how, rules).take(b, mode) for b in (native.NativeBackend(), kernels)
    ]
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)
    assert found[0][2] > 0 or mode == "grad"


def test_other_penalties_are_left_to_another_backend(kernels):
    """They have no kernels of a step, which would take minutes to compile."""
    for rule in penalties():
        step = Step("adam", torch.float32, "own", [rule, pyreg.L1(0.1)])
        pack = pack_of(step.tensors, step.rules)
        known = rule.name in ("l1", "l2", "elastic_net")
        assert (dispatch.stepper(pack) is not None) == kernels.steps(pack) == known
        if not known:
            with pytest.raises(ValueError, match="expected L1, L2 and elastic net"):
                step.take(kernels, "prox")


@UPDATES
def test_what_a_loss_scaler_says(kernels, update):
    """Its scale divides the gradients; after an overflow nothing is written."""
    rules = [pyreg.ElasticNet(0.1, 0.4)]
    for mode in ("grad", "prox"):
        plain, scaled = (Step(update, torch.float32, "own", rules) for _ in range(2))
        for t in scaled.tensors:
            t.grad *= 8
        scale, found = torch.tensor(8.0), torch.tensor(1.0)
        before = [t.clone() for t in scaled.everything()]
        scaled.take(kernels, mode, grad_scale=scale, found_inf=found)
        assert all(map(torch.equal, scaled.everything(), before))
        expected = plain.take(kernels, mode)
        got = scaled.take(kernels, mode, grad_scale=scale, found_inf=torch.tensor(0.0))
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)


def test_numbers_and_scales_on_the_device(kernels):
    """Read where they lie, as a graph's replay does."""
    rules = [pyreg.ElasticNet(0.1, torch.tensor(0.4))]
    for mode in ("grad", "prox"):
        a, b = (Step("sgd momentum", torch.float32, "own", rules) for _ in range(2))
        flat = [[*own, *[0.0] * (9 - len(own)), *metric[1:4]] for own, metric in a.numbers]
        numbers = torch.tensor(flat, dtype=torch.float64)
        found = (
            a.take(kernels, mode, scale=0.25),
            b.take(kernels, mode, numbers=numbers, scale=torch.tensor(0.25)),
        )
        for x, y in zip(*found, strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("how", ["own", "at random"])
def test_more_tensors_than_fit_into_a_launch(kernels, on_host, monkeypatch, how):
    """A table, copied when something changed; the numbers lie elsewhere."""
    dtype = torch.float32 if how == "own" else torch.bfloat16
    tables, original = [], cuda._Table.on
    monkeypatch.setattr(
        cuda._Table, "on", lambda self, *a: tables.append(a[1]) or original(self, *a)
    )
    rows = next(n for n in range(100, 2000) if not on_host.step_fits(n, 0))
    found = []
    for backend in (native.NativeBackend(), kernels):
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(7, generator=generator).to(dtype) for _ in range(rows)]
        states = [[torch.ones(7) for _ in range(rows)] for _ in range(2)]
        for t in tensors:
            t.grad = torch.ones_like(t)
        rules = [pyreg.L1(0.1), pyreg.L2(0.2)]
        pack = pack_of(tensors, rules)
        more = {"keys": list(range(rows))} if how == "at random" else {}
        for k in range(3):
            own = (*NUMBERS["adam"][:6], 0.01 + k, *NUMBERS["adam"][7:])
            numbers = [(own, METRIC["adam"])]
            given = (states, ["adam"] * rows, [0] * rows, numbers, bytes([1]) * rows)
            done = backend.step(pack, tensors, *given, True, rules, 1.0, **more)
        of_rules, zeros = taken(done[1]), torch.as_tensor(done[2])
        found.append([of_rules, zeros, *tensors, *states[0], *states[1]])
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)
    assert [isinstance(given, bytes) for given in tables] == [True, False, False]


def test_what_a_step_refuses(kernels):
    def step(change):
        made = Step("adam", torch.float32, "own", [pyreg.L1(0.1)])
        change(made)
        before = [t.clone() for t in made.everything()]
        try:
            assert made.take(kernels, "prox") is None
        finally:
            assert all(map(torch.equal, made.everything(), before))

    def strides(made):
        made.states[0][5] = made.states[0][5].contiguous()

    def shared(made):
        made.tensors[4] = made.tensors[6][1].view(4096)
        made.tensors[4].grad = torch.zeros(4096)

    step(strides)
    step(shared)
    for message, change in (
        ("row 2: a state is missing", lambda made: made.states[1].__setitem__(2, None)),
        ("row 2: a state unlike", lambda made: made.states[1].__setitem__(2, torch.ones(3))),
        ("no such set", lambda made: made.sets.__setitem__(2, 2)),
        ("one set of numbers per tensor", lambda made: made.sets.pop()),
        ("a gradient is missing", lambda made: setattr(made.tensors[2], "grad", None)),
        ("one update, flag", lambda made: setattr(made, "penalised", b"")),
    ):
        with pytest.raises(ValueError, match=message):
            step(change)
    made = Step("adam", torch.float32, "own", [pyreg.L1(0.1)])
    for numbers, message in (
        (torch.ones(11, dtype=torch.float64), "sets of 12"),
        (torch.ones(12), "contiguous float64 tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            made.take(kernels, "prox", numbers=numbers)


@contextmanager
def on_the_cpu(monkeypatch):
    """The native backend is the CPU's again."""
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_NATIVE_ON", {})
        dispatch.backend.cache_clear()
        yield
    dispatch.backend.cache_clear()


@MODE
@pytest.mark.parametrize("how", [None, "master_weights", "stochastic_rounding"])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_the_optimizers(kernels, swept, monkeypatch, name, options, mode, how):
    """Three steps of each, with schedules; the bits of those over the CPU's sweeps."""
    trained, more = [], {how: True} if how else {}
    for on_cpu in (True, False):
        model = net(torch.bfloat16 if more else torch.float32)
        rules = {"0.*": NET, "2.weight": pyreg.L1(pyreg.schedules.Linear(0.0, 0.1, 3))}
        reg = pyreg.Regularizer(model, rules)
        opt = make(optim, name, model, minimizing(options), regularizer=reg, mode=mode, **more)
        for k in range(3):
            for i, p in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(10 * k + i)
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if on_cpu:
                with on_the_cpu(monkeypatch):
                    opt.step()
            else:
                opt.step()
        trained.append(opt)
    a, b = trained
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        assert_same_bits(x, y)
    for rule, value in a.regularizer.last_value.items():
        torch.testing.assert_close(b.regularizer.last_value[rule], value, rtol=2**-23, atol=0)
    assert b.last_zeros == a.last_zeros
