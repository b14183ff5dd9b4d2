"""Under torch.compile: one graph, no recompilation for a changed strength, and correct ops."""

from __future__ import annotations

import pytest
import torch
from cases import differentiable
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pyreg

NET = pyreg.ElasticNet(1e-3, 0.2)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def gradients(net: nn.Module) -> list[torch.Tensor]:
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    return found


@pytest.mark.parametrize("penalty", differentiable(), ids=repr)
def test_fullgraph(penalty):
    """penalty() traces without a break; value and gradients are those of eager mode."""
    net = model()
    compiled = torch.compile(
        lambda: pyreg.penalty(net, penalty) * 2, fullgraph=True, backend="aot_eager"
    )
    value = compiled()
    value.backward()
    got = gradients(net)
    eager = pyreg.penalty(net, penalty) * 2
    eager.backward()
    assert torch.equal(value, eager)
    for a, b in zip(got, gradients(net), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "call",
    [
        lambda params: pyreg.l1(params, 0.3),
        lambda params: pyreg.l2(params, 0.3),
        lambda params: pyreg.elastic_net(params, l1=0.3, l2=0.2),
    ],
    ids=["l1", "l2", "elastic_net"],
)
def test_fullgraph_of_each_function(call):
    """Lists of tensors, also of several dtypes and without elements, with a gradient each."""
    tensors = [torch.randn(3), torch.randn(4).double(), torch.randn(5).bfloat16(), torch.empty(0)]
    tensors = [t.requires_grad_() for t in tensors]
    value = torch.compile(call, fullgraph=True, backend="aot_eager")(tensors)
    expected = call(tensors)
    torch.testing.assert_close(value, expected)
    assert value.dtype == torch.float64
    got, want = torch.autograd.grad(value, tensors), torch.autograd.grad(expected, tensors)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_inductor_in_a_training_step():
    """The default backend, with the penalty among other operations of a loss."""
    net, x = model(), torch.randn(4, 5)
    reg = pyreg.Regularizer(net, {"*.weight": pyreg.L1(0.25)}, exclude="*.bias")

    def loss() -> torch.Tensor:
        return net(x).square().mean() + reg() + pyreg.l2(net, 0.125)

    torch.compile(loss, fullgraph=True)().backward()
    got = gradients(net)
    loss().backward()
    for a, b in zip(got, gradients(net), strict=True):
        torch.testing.assert_close(a, b)


def test_regularizer():
    """reg() traces: rules, frozen parameters, and nothing to penalise."""
    net = model()
    net[0].bias.requires_grad_(False)
    rules = {"0.*": pyreg.L1(0.25), "*.weight": NET}
    reg = pyreg.Regularizer(net, rules, exclude="1.bias")
    compiled = torch.compile(lambda: reg(), fullgraph=True, backend="aot_eager")
    value = compiled()
    value.backward()
    got = gradients(net)
    assert torch.equal(value, reg())
    reg().backward()
    for a, b in zip(got, gradients(net), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    for p in net.parameters():
        p.requires_grad_(False)
    assert reg().item() == 0
    assert compiled().item() == 0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_changed_tensor_strength_does_not_recompile(requires_grad):
    """One compilation, the right value each time; a learnable strength receives its gradient."""
    net = model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda lam: pyreg.elastic_net(net, lam, 0.25), fullgraph=True, backend=counter
    )
    for x in (0.5, 1.0, 0.25, 0.125):
        lam = torch.tensor(x, requires_grad=requires_grad)
        value = compiled(lam)
        torch.testing.assert_close(value, pyreg.elastic_net(net, x, 0.25))
        if requires_grad:
            value.backward()
            torch.testing.assert_close(lam.grad, pyreg.l1(net, 1.0).detach())
    assert counter.frame_count == 1


def test_a_changed_float_strength_recompiles_at_most_once():
    """torch makes a float dynamic when it first changes; after that nothing recompiles."""
    net = model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda lam: pyreg.l1(net, lam), fullgraph=True, backend=counter)
    for x in (0.5, 1.0, 0.25, 0.125, 3.0):
        torch.testing.assert_close(compiled(x), pyreg.l1(net, x))
    assert counter.frame_count <= 2


def test_a_changed_strength_of_a_regularizer_does_not_recompile():
    """A schedule that fills a tensor in place."""
    net, lam = model(), torch.tensor(0.5)
    reg = pyreg.Regularizer(net, pyreg.L1(lam))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda: reg(), fullgraph=True, backend=counter)
    for x in (0.5, 1.0, 0.25):
        lam.fill_(x)
        torch.testing.assert_close(compiled(), pyreg.l1(net, x))
    assert counter.frame_count == 1


def operands(*, strengths_grad: bool) -> tuple:
    tensors = [torch.randn(3, 4), torch.randn(5).double(), torch.randn(2, 6).t()]
    tensors = [t.requires_grad_() for t in tensors]
    strengths = torch.tensor(
        [[0.5, 0.0], [0.25, 0.125]], dtype=torch.float64, requires_grad=strengths_grad
    )
    return tensors, strengths, ["l1", "elastic_net"], [0, 1, 1]


def test_a_learnable_strength_beside_a_shape():
    """MCP's lam gets its gradient; its gamma is a tensor too inside the op, and gets none."""
    w, lam = torch.tensor([0.5, -3.0]), torch.tensor(1.0, requires_grad=True)
    compiled = torch.compile(
        lambda: pyreg.penalty([w], pyreg.MCP(lam, 2.0)), fullgraph=True, backend="aot_eager"
    )
    compiled().backward()
    assert lam.grad == 0.5 + 2.0
    strengths = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.pyreg.value, ([w], strengths, ["mcp"], [0]))


@pytest.mark.parametrize("strengths_grad", [False, True])
def test_opcheck_value(strengths_grad):
    """Schema, fake tensors, autograd registration and AOT dispatch."""
    torch.library.opcheck(torch.ops.pyreg.value, operands(strengths_grad=strengths_grad))


def test_opcheck_gradient_and_strength_gradient():
    """The two ops of the backward; they have no derivative of their own."""
    tensors, strengths, names, rule_of = operands(strengths_grad=False)
    given = (torch.tensor(2.0, dtype=torch.float64), [t.detach() for t in tensors], strengths)
    torch.library.opcheck(torch.ops.pyreg.gradient, (*given, names, rule_of))
    torch.library.opcheck(torch.ops.pyreg.strength_gradient, (*given, names, rule_of))


def test_the_ops_compute_what_eager_computes():
    """value, its gradients, and those of the strengths, against the formulas."""
    tensors, strengths, names, rule_of = operands(strengths_grad=True)
    value = torch.ops.pyreg.value(tensors, strengths, names, rule_of)
    l1, net = pyreg.L1(0.5), pyreg.ElasticNet(0.25, 0.125)
    parts = [l1.value(tensors[0]), net.value(tensors[1]), net.value(tensors[2])]
    torch.testing.assert_close(value, sum(p.double() for p in parts))
    grads = torch.autograd.grad(value, [strengths, *tensors])
    expected = [l1.grad(tensors[0]), net.grad(tensors[1]), net.grad(tensors[2])]
    for g, want in zip(grads[1:], expected, strict=True):
        torch.testing.assert_close(g, want.detach())
    sums = [[t.double().abs().sum().item(), t.double().square().sum().item()] for t in tensors]
    torch.testing.assert_close(
        grads[0],
        torch.tensor(
            [[sums[0][0], 0.0], [sums[1][0] + sums[2][0], sums[1][1] + sums[2][1]]],
            dtype=torch.float64,
        ),
    )


def test_a_compiled_regularizer_sees_a_replaced_parameter():
    net = torch.nn.Linear(4, 3)
    reg = pyreg.Regularizer(net, pyreg.L1(1.0))
    compiled = torch.compile(lambda: reg(), fullgraph=True, backend="aot_eager")
    compiled()
    net.weight = torch.nn.Parameter(torch.full((3, 4), 5.0))
    value = compiled()
    value.backward()
    torch.testing.assert_close(value, 60 + net.bias.abs().sum())
    assert (net.weight.grad == 1).all()


@pytest.mark.parametrize("schedule", [pyreg.schedules.Linear, pyreg.schedules.Cosine])
def test_a_schedule(schedule):
    """Each step's own number, without a compilation for each: the step becomes a symbol."""
    net = model()
    lam = schedule(0.0, 1.0, steps=5)
    reg = pyreg.Regularizer(net, pyreg.L1(lam))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda: reg() * 2, fullgraph=True, backend=counter)
    for step in range(8):
        expected = 2 * sum(lam(step) * p.detach().double().abs().sum() for p in net.parameters())
        assert compiled().item() == pytest.approx(expected.item(), rel=1e-6)
        reg.advance()
    assert counter.frame_count <= 3
