"""Bad input raises and names the parameter: tensors, strengths, shapes, steps, scales, backends."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import pyreg


def freed() -> torch.Tensor:
    w = torch.ones(6)
    w.untyped_storage().resize_(0)
    return w


def freed_view() -> torch.Tensor:
    """Its pointer is not null: nothing plus an offset."""
    base = torch.ones(20)
    w = base[3:]
    base.untyped_storage().resize_(0)
    return w


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


BAD = [
    (lambda: torch.ones(9, 6, dtype=torch.int64), "expected a floating tensor, got int64 [9, 6]"),
    (lambda: torch.ones(2, dtype=torch.bool), "expected a floating tensor, got bool [2]"),
    (lambda: torch.ones(2, dtype=torch.complex64), "expected a floating tensor, got complex64 [2]"),
    (lambda: torch.ones(2, 2).to_sparse(), "expected a dense tensor, got layout torch.sparse_coo"),
    (lambda: torch.eye(2).to_sparse_csr(), "expected a dense tensor, got layout torch.sparse_csr"),
    (quantised, "expected a floating tensor, got qint8 [3]"),
    (
        lambda: torch.ones(3).to(torch.float8_e4m3fn),
        "expected one of float32, float64, bfloat16, float16, got float8_e4m3fn [3]",
    ),
    (freed, "float32 [6] has no memory"),
    (freed_view, "float32 [17] has no memory"),
    (lambda: nn.LazyLinear(3).weight, "is not initialized yet"),
]


BAD_IDS = [
    "int",
    "bool",
    "complex",
    "sparse",
    "csr",
    "quantised",
    "float8",
    "freed",
    "freed_view",
    "lazy",
]


NOT_TENSORS = [
    (None, "NoneType"),
    (3.0, "float"),
    ([1.0], "list"),
    ("w", "str"),
    (nn.ReLU(), "ReLU"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=BAD_IDS)
def test_a_tensor_that_cannot_be_penalised(make, message):
    """By position in a list, by position and name in pairs, first or last; and in a Regularizer."""
    good = torch.ones(3, requires_grad=True)
    for items in ([good, make()], [make(), good]):
        i = 1 if items[0] is good else 0
        with pytest.raises((TypeError, ValueError)) as e:
            pyreg.l1(items, 1.0)
        assert str(e.value).startswith(f"params[{i}]: ")
        assert message in str(e.value)
        pairs = list(zip(("conv.bias", "fc.weight"), items, strict=True))
        with pytest.raises((TypeError, ValueError)) as e:
            pyreg.l1(pairs, 1.0)
        assert str(e.value).startswith(f"params[{i}] ({pairs[i][0]!r}): ")
        assert message in str(e.value)
        with pytest.raises((TypeError, ValueError)) as e:
            pyreg.Regularizer(pairs, pyreg.L1(1.0))
        assert f"({pairs[i][0]!r})" in str(e.value)
        assert message in str(e.value)


@pytest.mark.parametrize(("thing", "name"), NOT_TENSORS, ids=lambda x: str(x)[:8])
def test_not_a_tensor(thing, name):
    """A list with something else among the tensors."""
    message = f"expected a floating tensor, got {name}"
    with pytest.raises(TypeError, match=re.escape(f"params[1]: {message}")):
        pyreg.l1([torch.ones(2), thing], 1.0)
    with pytest.raises(TypeError, match=re.escape(f"params[0] ('fc.weight'): {message}")):
        pyreg.l1({"fc.weight": thing}, 1.0)


def test_params_that_are_no_list_of_tensors():
    for bad, message in [
        ("weight", "expected a module or an iterable of tensors, got 'weight'"),
        (b"weight", "expected a module or an iterable of tensors"),
        (3, "expected a module or an iterable of tensors, got int"),
        (None, "expected a module or an iterable of tensors, got NoneType"),
    ]:
        with pytest.raises(TypeError, match=re.escape(f"params: {message}")):
            pyreg.l1(bad, 1.0)
    with pytest.raises(TypeError, match=r"params\[1\]: .*\(name, tensor\) pair, got Tensor"):
        pyreg.l1([("a", torch.ones(2)), torch.ones(2)], 1.0)
    with pytest.raises(TypeError, match=r"params\[1\]: expected a floating tensor, got tuple"):
        pyreg.l1([torch.ones(2), ("a", torch.ones(2))], 1.0)
    with pytest.raises(TypeError, match=r"params\[0\]: .*\(name, tensor\) pair, got tuple"):
        pyreg.l1([(torch.ones(2), "a")], 1.0)


def test_meta_tensors():
    """No memory, so no value to give: an error or a meta result, never a crash."""
    value = pyreg.l1([torch.ones(3, device="meta")], 1.0)
    assert value.device.type == "meta"


def test_a_meta_tensor_among_others():
    """Refused before the others are changed, also where it is a later one's turn to be that."""
    ps = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for p in ps:
        p.grad = torch.zeros(3)
    reg = pyreg.Regularizer(list(zip("ab", ps, strict=True)), pyreg.L1(1.0))
    reg.accumulate_()
    bare = nn.Parameter(torch.ones(3, device="meta"))
    bare.grad = torch.zeros(3, device="meta")
    torch.utils.swap_tensors(ps[1], bare)
    for call in (reg, reg.accumulate_, lambda: reg.prox_(0.1), reg.stats):
        with pytest.raises(ValueError, match=r"params\[1\] \('b'\): is on the meta device"):
            call()
    assert ps[0].grad.tolist() == ps[0].tolist() == [1.0, 1.0, 1.0]


STRENGTHS = [
    (-1.0, ValueError),
    (-1e-300, ValueError),
    (math.nan, ValueError),
    (math.inf, ValueError),
    (True, TypeError),
    ("1", TypeError),
    (None, TypeError),
    (1j, TypeError),
    (torch.tensor([1.0]), TypeError),
    (torch.tensor(1), TypeError),
    (torch.tensor(-1.0), ValueError),
    (torch.tensor(math.nan), ValueError),
    (torch.tensor(math.inf), ValueError),
]


@pytest.mark.parametrize(("bad", "error"), STRENGTHS, ids=lambda x: str(x)[:14])
def test_a_bad_strength(bad, error):
    """Refused where it is given, naming the penalty's field."""
    w = [torch.ones(2)]
    for call, field in [
        (lambda: pyreg.l1(w, bad), "L1.lam"),
        (lambda: pyreg.l2(w, bad), "L2.lam"),
        (lambda: pyreg.elastic_net(w, l1=bad, l2=1.0), "ElasticNet.l1"),
        (lambda: pyreg.elastic_net(w, l1=1.0, l2=bad), "ElasticNet.l2"),
        (lambda: pyreg.L1(bad), "L1.lam"),
    ]:
        with pytest.raises(error, match=re.escape(f"{field}: expected a")):
            call()


@pytest.mark.parametrize(
    ("make", "field", "bound"),
    [
        (lambda x: pyreg.MCP(1.0, x), "MCP.gamma", 1.0),
        (lambda x: pyreg.SCAD(1.0, x), "SCAD.a", 2.0),
        (lambda x: pyreg.Huber(1.0, x), "Huber.delta", 0.0),
        (lambda x: pyreg.LogSum(1.0, x), "LogSum.eps", 0.0),
    ],
)
def test_a_bad_shape(make, field, bound):
    """At its bound, below it, NaN, infinite, too large or small for sweeps in float32, or a tensor
    that wants a gradient."""
    too_large = (math.inf, 1e39, 1e30, 1.1e18, torch.tensor(1e30))
    for bad in (bound, bound - 1, math.nan, 1e-39, torch.tensor(bound), *too_large):
        with pytest.raises(ValueError, match=f"{field}: expected a number > {bound:g}"):
            make(bad)
    with pytest.raises(ValueError, match=f"{field}: has no gradient"):
        make(torch.tensor(bound + 1, requires_grad=True))
    with pytest.raises(TypeError, match=f"{field}: expected a number"):
        make("3")
    x = torch.tensor(bound + 1)
    reg = pyreg.Regularizer([("w", torch.ones(3, requires_grad=True))], make(x))
    assert reg().item() == pytest.approx(make(bound + 1).value(torch.ones(3)).item())
    x.fill_(bound)
    for call in (reg, reg.accumulate_, lambda: reg.prox_(0.1)):
        with pytest.raises(ValueError, match=f"{field}: expected a number > {bound:g}"):
            call()


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (pyreg.MCP(1.0, 1e18), 4e9),
        (pyreg.SCAD(1.0, 1e18), 4e9),
        (pyreg.LogSum(1e18, 1e18), 4e9),
        (pyreg.Huber(1.0, 1e18), 5e9),
    ],
    ids=repr,
)
def test_the_largest_shapes(backend, penalty, expected):
    """At a step of 1e9: of 5e9, L1 leaves 4e9, and Huber's slope w / delta all but nothing. (At
    most 8 roundings.)"""
    w = torch.tensor([5e9])
    pyreg.Regularizer({"w": w}, penalty, include_frozen=True).prox_(1e9)
    assert w.item() == pytest.approx(expected, rel=8 * 2**-24)


def test_numbers_that_are_good_strengths():
    """0, integers, and what numpy calls a number."""
    np = pytest.importorskip("numpy")
    for good in (0, 2, 0.0, -0.0, np.float32(0.5), np.float64(0.5), np.int64(2)):
        assert pyreg.l1([torch.ones(2)], good).item() == 2 * float(good)


def test_a_strength_that_turns_bad():
    """A tensor strength is looked at again when it is used: a schedule may have gone wrong."""
    w, lam = torch.ones(3, requires_grad=True), torch.tensor(1.0)
    reg = pyreg.Regularizer([("w", w)], pyreg.L1(lam))
    w.grad = torch.zeros(3)
    for bad in (-1.0, math.nan, math.inf):
        lam.fill_(bad)
        for call in (reg, reg.accumulate_, lambda: reg.prox_(0.1)):
            with pytest.raises(ValueError, match="finite number >= 0"):
                call()
    assert w.tolist() == [1, 1, 1]
    assert w.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, "1", True, torch.tensor([0.1]), None])
def test_a_bad_step(bad):
    w = torch.ones(3, requires_grad=True)
    reg = pyreg.Regularizer([("w", w)], pyreg.L1(1.0))
    with pytest.raises((TypeError, ValueError), match="step: expected a"):
        reg.prox_(bad)
    assert w.tolist() == [1, 1, 1]
    if not isinstance(bad, torch.Tensor):  # the penalty's own prox takes a step per element
        with pytest.raises((TypeError, ValueError), match="step: expected a"):
            pyreg.L1(1.0).prox(w, bad)


@pytest.mark.parametrize(
    "penalty",
    [pyreg.L1(1e30), pyreg.L0(1e30), pyreg.LHalf(1e30), pyreg.LogSum(1e30, 1.0)]
    + [kind(lam, 3.0) for kind in (pyreg.MCP, pyreg.SCAD) for lam in (1e30, 1e300)],
    ids=repr,
)
def test_a_step_times_a_strength_beyond_float32(backend, penalty):
    """The shrinkage is infinite then: every weight becomes 0."""
    w = torch.tensor([1.0, -2.0, 1e10])
    pyreg.Regularizer({"w": w}, penalty, include_frozen=True).prox_(1e10)
    assert w.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", [pyreg.MCP, pyreg.SCAD])
def test_a_step_beyond_float32(backend, kind):
    w = torch.tensor([1.0, -2.0])
    pyreg.Regularizer({"w": w}, kind(1.0, 3.0), include_frozen=True).prox_(1e40)
    assert w.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("penalty", "gradient"),
    [
        (pyreg.L1(1e30), 1e30),
        (pyreg.L1(1e300), math.inf),
        (pyreg.LHalf(1e36), 5e30),
        (pyreg.MCP(1e30, 1e10), 1e30),
        (pyreg.SCAD(1e30, 1e10), 1e30),
    ],
    ids=repr,
)
def test_a_value_beyond_float32(backend, penalty, gradient):
    """It is infinite, the gradient what it is."""
    w = nn.Parameter(torch.tensor([1e10, -1e10]))
    w.grad = torch.zeros(2)
    reg = pyreg.Regularizer({"w": w}, penalty)
    assert reg.accumulate_().item() == reg().item() == math.inf
    torch.testing.assert_close(w.grad, torch.tensor([gradient, -gradient]), rtol=1e-6, atol=0)
    assert reg.last_value["*"] == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_scale(bad):
    """It would make every gradient NaN."""
    w = torch.ones(3, requires_grad=True)
    w.grad = torch.zeros(3)
    with pytest.raises(ValueError, match="scale"):
        pyreg.Regularizer([("w", w)], pyreg.L1(1.0)).accumulate_(bad)
    assert w.grad.tolist() == [0, 0, 0]


def test_not_a_penalty():
    for bad in (None, 1e-5, pyreg.L1, "l1"):
        with pytest.raises(TypeError, match="expected a"):
            pyreg.penalty([torch.ones(2)], bad)
        with pytest.raises(TypeError, match=r"rules\['\*'\]: expected a penalty"):
            pyreg.Regularizer([("w", torch.ones(2))], {"*": bad})


def test_unknown_backend(monkeypatch):
    """By use_backend and by the environment; the message lists the known ones."""
    message = "unknown backend 'cuda9'; expected one of auto, native, triton, torch"
    with pytest.raises(pyreg.BackendError, match=message), pyreg.use_backend("cuda9"):
        pass
    monkeypatch.setenv("PYREG_BACKEND", "cuda9")
    for params in ([torch.ones(2)], []):
        with pytest.raises(pyreg.BackendError, match=f"PYREG_BACKEND: {message}"):
            pyreg.l1(params, 1.0)
    with pyreg.use_backend("torch"):
        assert pyreg.l1([torch.ones(2)], 1.0).item() == 2
    for name in ("auto", "", "torch"):
        monkeypatch.setenv("PYREG_BACKEND", name)
        assert pyreg.l1([torch.ones(2)], 1.0).item() == 2


def test_an_explicit_backend_that_cannot_serve(native, monkeypatch):
    """It says why and which parameter; nothing was written. Auto falls back, and says so."""
    strided, plain = torch.ones(6, requires_grad=True), torch.ones(2, requires_grad=True)
    view = strided.detach()[::2].requires_grad_()
    named = [("plain", plain), ("conv.weight", view)]
    reg = pyreg.Regularizer(named, pyreg.L1(1.0))
    plain.grad, view.grad = torch.zeros(2), torch.zeros(3)
    why = "params[1] ('conv.weight') is not dense: shape [3], strides [2]"
    why = f"backend 'native' cannot serve: {why}"
    with pyreg.use_backend("native"):
        sweeps = [reg, reg.accumulate_, lambda: reg.prox_(0.1), reg.stats]
        for call in (lambda: pyreg.l1(named, 1.0), *sweeps):
            with pytest.raises(pyreg.BackendError, match=re.escape(why)):
                call()
    monkeypatch.setenv("PYREG_BACKEND", "native")
    with pytest.raises(pyreg.BackendError, match=re.escape(why)):
        reg.accumulate_()
    monkeypatch.delenv("PYREG_BACKEND")
    assert not plain.grad.any()
    assert not view.grad.any()
    assert plain.tolist() == [1, 1]
    assert "native: params[1] ('conv.weight') is not dense" in str(reg)
    with (
        pyreg.use_backend("native"),
        pytest.raises(pyreg.BackendError, match=re.escape("inside torch.func")),
    ):
        torch.func.grad(lambda t: pyreg.l1([t], 1.0))(torch.ones(2))


def test_use_backend_nests_and_ends():
    def name() -> str:
        return pyreg.dispatch.requested()

    with pyreg.use_backend("torch"):
        with pyreg.use_backend("auto"):
            assert name() == "auto"
        assert name() == "torch"
        with pytest.raises(ZeroDivisionError), pyreg.use_backend("auto"):
            raise ZeroDivisionError
        assert name() == "torch"
    assert name() == "auto"


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_a_bad_tensor(scale):
    """Nothing is written."""
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.zeros(3)
    with pytest.raises(ValueError, match="scale"):
        pyreg.Regularizer({"w": w}, pyreg.L1(1.0)).accumulate_(torch.tensor(scale))
    assert (w.grad == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear(1, 1), None), "rules"),
        ((None, pyreg.L1(1.0)), "model"),
        ((nn.Linear(1, 1), {3: pyreg.L1(1.0)}), "rules"),
    ],
)
def test_regularizer_arguments_of_the_wrong_kind(arguments, message):
    with pytest.raises(TypeError, match=f"^{message}: expected"):
        pyreg.Regularizer(*arguments)
    with pytest.raises(TypeError, match=r"^exclude: expected a pattern, got 3"):
        pyreg.Regularizer(nn.Linear(1, 1), pyreg.L1(1.0), exclude=[3])


def test_a_strength_beyond_float64():
    with pytest.raises(ValueError, match=r"L1\.lam: .*beyond float64"):
        pyreg.L1(10**400)


def test_attaching_what_has_no_gradient():
    """Refused where it is attached, and nothing is left behind; its proximal step is fine."""
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], lr=0.1)
    reg = pyreg.Regularizer({"w": w}, pyreg.L0(0.5))
    with pytest.raises(RuntimeError, match=r"L0\(lam=0.5\) has no gradient: use prox"):
        reg.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    reg.attach(optimizer, "prox")
