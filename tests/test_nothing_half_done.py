"""One bad parameter or gradient, or memory that is gone or shared by now: nothing is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyreg


def spoil(kind: str, net: nn.Module) -> tuple[str, str]:
    """Make one parameter or gradient of a two-layer net bad: what the message must hold."""
    w = net[1].weight
    if kind == "sparse gradient":
        w.grad = torch.ones(3, 4).to_sparse()
        return "its gradient has layout torch.sparse_coo", "accumulate_"
    if kind == "gradient of another dtype":
        grad = torch.ones(3, 4)
        w.data = w.data.double()
        assert w.grad.dtype == grad.dtype
        return "float64 [3, 4] on cpu has a gradient float32 [3, 4] on cpu", "accumulate_"
    if kind == "gradient of another shape":
        w.data = torch.ones(5)
        return "float32 [5] on cpu has a gradient float32 [3, 4] on cpu", "accumulate_"
    if kind == "expanded gradient":
        w.grad = torch.ones(3, 1).expand(3, 4)
        return "its gradient is expanded", "accumulate_"
    if kind == "expanded parameter":
        w.data = torch.ones(3, 1).expand(3, 4)
        return "is expanded, shape [3, 4], strides [1, 0]", "prox_"
    if kind == "freed parameter":
        w.untyped_storage().resize_(0)
        return "has no memory", "all"
    if kind == "freed view":  # its pointer is nothing plus an offset
        memory = torch.ones(20)
        w.data = memory[3:15].view(3, 4)
        memory.untyped_storage().resize_(0)
        return "has no memory", "all"
    if kind == "freed gradient":
        w.grad.untyped_storage().resize_(0)
        return "its gradient", "accumulate_"
    if kind == "freed view as gradient":
        memory = torch.ones(20)
        w.grad = memory[3:15].view(3, 4)
        memory.untyped_storage().resize_(0)
        return "its gradient", "accumulate_"
    if kind == "integer parameter":
        w.requires_grad_(False)
        w.data = torch.ones(3, 4, dtype=torch.int32)
        return "expected a floating tensor, got int32 [3, 4]", "all frozen"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "sparse gradient",
        "gradient of another dtype",
        "gradient of another shape",
        "expanded gradient",
        "expanded parameter",
        "freed parameter",
        "freed view",
        "freed gradient",
        "freed view as gradient",
        "integer parameter",
    ],
)
@pytest.mark.parametrize("strided_too", [False, True])
@pytest.mark.parametrize("warm", [True, False])
def test_nothing_is_written_when_one_parameter_is_bad(kind, strided_too, warm):
    """The parameters before and after a bad one keep their values and gradients, whether a cached
    layout finds it or a new one, with one pack or two."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    if strided_too:
        net[0].weight.data = torch.randn(4, 4)[:, ::2]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    reg = pyreg.Regularizer(net, pyreg.ElasticNet(0.5, 0.5), include_frozen=True)
    if warm:
        reg.accumulate_()
        reg.prox_(0.01)
        reg.stats()
    others = [p for p in net.parameters() if p is not net[1].weight]
    before = [(p.detach().clone(), p.grad.clone()) for p in others]
    message, where = spoil(kind, net)
    calls = [
        call
        for name, call in [("accumulate_", reg.accumulate_), ("prox_", lambda: reg.prox_(0.1))]
        if where.startswith("all") or name == where
    ]
    assert calls
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert "params[2] ('1.weight')" in str(error.value)
        assert message in str(error.value)
        for p, (data, grad) in zip(others, before, strict=True):
            assert torch.equal(p, data)
            assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("strided", [True, False])
def test_freed_after_a_call(strided):
    """Each backend looks at the storage again at every call."""
    for name in ("auto", "torch"):
        w = nn.Parameter(torch.ones(8)[::2] if strided else torch.ones(4))
        w.grad = torch.zeros(4)
        reg = pyreg.Regularizer([("fc.weight", w)], pyreg.L1(1.0))
        calls = [reg, reg.accumulate_, reg.stats, lambda reg=reg: reg.prox_(0.1)]
        calls.append(lambda w=w: pyreg.l1({"fc.weight": w}, 1.0))
        with pyreg.use_backend(name):
            for call in calls:
                call()
            w.untyped_storage().resize_(0)
            for call in calls:
                with pytest.raises(ValueError, match=r"params\[0\] \('fc.weight'\): .*no memory"):
                    call()


@pytest.mark.parametrize("records", [True, False])
def test_freed_far_into_a_storage(run_python, records):
    """What FSDP does: parameters and gradients are views of one flat storage that comes and goes. A
    freed one's pointer is null plus an offset of any size: an error, not a crash (hence the process
    of its own), also when the layout knew the parameter at another offset; and it may come back."""
    pytest.importorskip("pyreg._native")
    printed = run_python(
        "import torch, pyreg\n"
        "from pyreg import _native\n"
        f"_native.use_records({records})\n"
        "n = 3_000_000\n"
        "w = torch.nn.Parameter(torch.ones(100))\n"
        "w.grad = torch.zeros(100)\n"
        "reg = pyreg.Regularizer([('fc.weight', w)], pyreg.L1(1.0))\n"
        "calls = [reg, reg.accumulate_, lambda: reg.prox_(0.1), reg.stats]\n"
        "def refused(calls):\n"
        "    for call in calls:\n"
        "        try:\n"
        "            call()\n"
        "        except ValueError as error:\n"
        "            assert \"params[0] ('fc.weight')\" in str(error), error\n"
        "            assert 'memory' in str(error), error\n"
        "        else:\n"
        "            raise AssertionError('not refused')\n"
        "flat = torch.ones(n)\n"
        "for begin in (n - 100, 5, n // 2):\n"
        "    w.data = torch.ones(100)\n"
        "    [call() for call in calls]\n"
        "    w.data = flat[begin : begin + 100]\n"
        "    flat.untyped_storage().resize_(0)\n"
        "    refused(calls)\n"
        "    flat.untyped_storage().resize_(4 * n)\n"
        "    flat.fill_(1.0)\n"
        "    assert reg().item() == 100\n"
        "    [call() for call in calls]\n"
        "    flat.untyped_storage().resize_(0)\n"
        "    refused(calls)\n"
        "    flat.untyped_storage().resize_(4 * n)\n"
        "    w.data = torch.ones(100)\n"
        "    grads = torch.zeros(n)\n"
        "    w.grad = grads[begin : begin + 100]\n"
        "    reg.accumulate_()\n"
        "    grads.untyped_storage().resize_(0)\n"
        "    refused([reg.accumulate_])\n"
        "    w.grad = torch.zeros(100)\n"
        "print('alive')"
    )
    assert printed.strip() == "alive"


def test_errors_do_not_spoil_the_next_call():
    """After an error the same list, mended, works."""
    w = nn.Parameter(torch.ones(3))
    data = w.data
    assert pyreg.l1([w], 1.0).item() == 3
    w.data = torch.empty(0)
    w.data = data.as_strided((3,), (1,))
    assert pyreg.l1([w], 1.0).item() == 3
    with pytest.raises(TypeError):
        pyreg.l1([w, None], 1.0)
    assert pyreg.l1([w], 1.0).item() == 3


def test_a_reused_identity_is_checked_again():
    """Lists are recognised by id(); a new object at an old address must not inherit a layout."""
    for _ in range(200):
        w = torch.ones(8)
        assert pyreg.l1([w], 1.0).item() == 8
        del w
        w = torch.ones(8, dtype=torch.int32)
        with pytest.raises(TypeError, match="got int32"):
            pyreg.l1([w], 1.0)
        del w
        w = torch.ones(16)[::2]
        assert pyreg.l1([w], 1.0).item() == 8
        del w
        w = torch.ones(8)
        w.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="has no memory"):
            pyreg.l1([w], 1.0)
        del w
        w = torch._neg_view(torch.ones(8)).requires_grad_()
        (g,) = torch.autograd.grad(pyreg.l1([w], 1.0), w)
        assert (g == -1).all()
        del w, g


def test_a_storage_that_is_too_small():
    w = torch.ones(1000)
    w.untyped_storage().resize_(32)
    with pytest.raises(ValueError, match=r"params\[0\] \('fc.weight'\): .*no memory"):
        pyreg.l1({"fc.weight": w}, 1.0)


def test_data_that_becomes_a_lazily_negated_view():
    """Of the same geometry as before."""
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.zeros(3)
    reg = pyreg.Regularizer({"w": w}, pyreg.L1(1.0))
    reg.accumulate_()
    w.data = torch._neg_view(torch.full((3,), 2.0))
    reg.accumulate_()
    assert w.grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("what", ["parameter", "gradient"])
def test_a_storage_that_shrinks_between_calls(what):
    """Also a view's base. Nothing is written, and nothing behind the end is read."""
    base = torch.ones(1 << 20)
    memory = {"parameter": base, "gradient": torch.zeros(1 << 20)}
    w = nn.Parameter(base[8:])
    good = nn.Parameter(torch.ones(3))
    w.grad, good.grad = memory["gradient"][8:], torch.zeros(3)
    reg = pyreg.Regularizer({"good": good, "fc.weight": w}, pyreg.L1(1.0))
    reg.accumulate_()
    assert (w.grad == 1).all()
    memory[what].untyped_storage().resize_(4096)
    with pytest.raises(ValueError, match=r"'fc.weight'.*no memory"):
        reg.accumulate_()
    assert good.grad.tolist() == [1.0] * 3
    memory[what].untyped_storage().resize_(4 << 20)
    reg.accumulate_()
    assert good.grad.tolist() == [2.0] * 3


def test_no_gradient_is_created_when_another_is_bad():
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    bad.grad = torch.ones(3).to_sparse()
    reg = pyreg.Regularizer({"good": good, "bad": bad}, pyreg.L1(1.0))
    with pytest.raises(TypeError, match="'bad'"):
        reg.accumulate_(create_grads=True)
    assert good.grad is None


SHARED = {  # views of [3, 8] zeros
    "one tensor": lambda zeros: (zeros[:, :4].contiguous(),) * 2,
    "one memory": lambda zeros: (zeros.view(-1)[:12].view(3, 4), zeros.view(-1)[:12].view(3, 4)),
    "a part": lambda zeros: (zeros.view(-1)[:12].view(3, 4), zeros.view(-1)[11:23].view(3, 4)),
    "strided": lambda zeros: (zeros[:, :4], zeros[:, :4]),
    "strided, and not": lambda zeros: (zeros[:, :4], zeros.view(-1)[:12].view(3, 4)),
}


@pytest.mark.parametrize("strided_too", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("how", SHARED)
def test_two_gradients_in_one_memory(how, backend, strided_too):
    """Both would be added to both. Nothing is written, nor the zeros of `create_grads`."""
    model = nn.ParameterDict({k: nn.Parameter(torch.ones(3, 4)) for k in ("a", "b", "c", "d")})
    if strided_too:  # a pack of its own
        model["c"].data = torch.ones(3, 8)[:, ::2]
    model["b"].grad, model["c"].grad = SHARED[how](torch.zeros(3, 8))
    model["a"].grad = torch.zeros(3, 4)
    reg = pyreg.Regularizer(model, pyreg.L1(1.0))
    attached = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.attach(attached)
    message = r"params\[1\] \('b'\) and params\[2\] \('c'\): their gradients share memory"
    with pyreg.use_backend(backend):
        for call in (
            reg.accumulate_,
            reg.accumulate_,
            lambda: reg.accumulate_(create_grads=True),
            attached.step,
        ):
            with pytest.raises(ValueError, match=message):
                call()
        assert not model["b"].grad.any()
        assert not model["a"].grad.any()
        assert all((p == 1).all() for p in model.values())
        assert model["d"].grad is None
        model["c"].grad = None
        reg.accumulate_()
    assert model["b"].grad.all()


def test_two_gradients_side_by_side():
    """Columns of one matrix, and parts of one buffer, share nothing."""
    columns, rows = torch.zeros(3, 8), torch.zeros(24)
    model = {k: nn.Parameter(torch.ones(3, 4)) for k in ("a", "b", "c", "d")}
    model["a"].grad, model["b"].grad = columns[:, :4], columns[:, 4:]
    model["c"].grad, model["d"].grad = rows[:12].view(3, 4), rows[12:].view(3, 4)
    for backend in ("auto", "torch"):
        with pyreg.use_backend(backend):
            pyreg.Regularizer(model, pyreg.L1(1.0)).accumulate_()
    assert (columns == 2).all()
    assert (rows == 2).all()
