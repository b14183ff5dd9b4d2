"""Models whose parameters change between a regularizer's calls."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from cases import REGULAR
from penalised import NET, model, with_gradients
from torch import nn
from torch.nn.utils import parametrize

import pyreg


def agrees(reg: pyreg.Regularizer, tensors: list[torch.Tensor], penalty=NET) -> None:
    """Value, gradient, stats and prox_ of the regularizer are those of these tensors."""
    w = [t.detach().clone() for t in tensors]
    expected = sum(penalty.value(t).double() for t in w).item()
    assert reg().item() == pytest.approx(expected, rel=1e-6)
    assert reg.stats().l1.sum().item() == pytest.approx(sum(t.double().abs().sum() for t in w))
    for t in tensors:
        t.grad = None
    assert reg.accumulate_(create_grads=True).item() == pytest.approx(expected, rel=1e-6)
    for t, before in zip(tensors, w, strict=True):
        torch.testing.assert_close(t.grad, penalty.grad(before))
    reg().backward()
    for t, before in zip(tensors, w, strict=True):
        torch.testing.assert_close(t.grad, 2 * penalty.grad(before))
    reg.prox_(0.125)
    for t, before in zip(tensors, w, strict=True):
        torch.testing.assert_close(t.detach(), penalty.prox(before, 0.125))


CHANGES = {
    "data": lambda net: setattr(net[3].weight, "data", torch.randn(7, 16)),
    "data of another dtype": lambda net: setattr(
        net[3].weight, "data", torch.randn(7, 16, dtype=torch.float64)
    ),
    "data of another shape": lambda net: setattr(net[3].weight, "data", torch.randn(5)),
    "data transposed": lambda net: setattr(net[3].weight, "data", net[3].weight.data.t()),
    "data with the same shape, transposed": lambda net: setattr(
        net[3].weight, "data", torch.randn(16, 7).t()
    ),
    "data strided": lambda net: setattr(net[3].weight, "data", torch.randn(7, 32)[:, ::2]),
    "double": lambda net: net.double(),
    "half": lambda net: net.half(),
    "bfloat16": lambda net: net.to(torch.bfloat16),
    "channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "new parameter": lambda net: setattr(net[3], "weight", nn.Parameter(torch.randn(7, 16))),
    "new smaller parameter": lambda net: setattr(net[3], "weight", nn.Parameter(torch.randn(2))),
    "new module": lambda net: net.__setitem__(3, nn.Linear(16, 7)),
    "loaded with assign": lambda net: net.load_state_dict(
        {k: v.clone() + 1 for k, v in net.state_dict().items()}, assign=True
    ),
    "parametrization": lambda net: parametrize.register_parametrization(
        net[3], "weight", nn.Tanh()
    ),
    "freed and back": lambda net: (
        net[3].weight.untyped_storage().resize_(0),
        net[3].weight.untyped_storage().resize_(4 * 7 * 16),
        net[3].weight.data.fill_(1.5),
    ),
    "unpenalised parameter": lambda net: setattr(net[3], "bias", None),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("warm", [True, False])
def test_parameters_replaced_between_calls(name, warm):
    """The next call sees it, whether layouts were built before or not."""
    net = model()
    reg = pyreg.Regularizer(net, {"*weight*": NET}, exclude="*.bias", strict=False)
    if warm:
        reg(), reg.accumulate_(create_grads=True), reg.stats(), reg.prox_(0.01)
    CHANGES[name](net)
    net.zero_grad()
    covered = [p for n, p in net.named_parameters() if "weight" in n]
    assert len(covered) == 3
    agrees(reg, covered)


def test_replaced_back_and_forth():
    """Many replacements in a row, with freed memory reused in between."""
    net = model()
    reg = pyreg.Regularizer(net, NET)
    for i in range(30):
        net[3].weight = nn.Parameter(torch.full((7 + i % 3, 16), float(i)))
        expected = sum(NET.value(p.detach()).item() for p in net.parameters())
        assert reg().item() == pytest.approx(expected, rel=1e-6)


def test_tied_after_construction():
    """Two parameters that become one count once from then on."""
    net = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    reg = pyreg.Regularizer(net, pyreg.L1(1.0))
    reg()
    net["b"].weight = net["a"].weight
    assert reg().item() == pytest.approx(net["a"].weight.abs().sum().item())
    net["b"].weight = nn.Parameter(torch.ones(3, 3))
    assert reg().item() == pytest.approx(net["a"].weight.abs().sum().item() + 9)


def test_gradients_with_other_strides(backend):
    """A gradient need not share its parameter's strides: same result, one by one."""
    for case in itertools.islice(REGULAR, 0, None, 3):
        for w in case.build(torch.float32):
            if w.ndim < 2:
                continue
            memory = torch.zeros(tuple(2 * n for n in w.shape))
            strided = memory[tuple(slice(None, None, 2) for _ in w.shape)]
            reversed_ = torch.zeros(w.shape[::-1]).permute(*range(w.ndim - 1, -1, -1))
            for grad in (strided, reversed_):
                p = w.detach().clone(memory_format=torch.preserve_format).requires_grad_()
                p.grad = grad
                other = torch.ones(5, requires_grad=True)
                other.grad = torch.zeros(5)
                pyreg.Regularizer([("p", p), ("q", other)], NET).accumulate_()
                assert oracle.same(p.grad, oracle.gradient(NET, w))
                assert (other.grad == 0.5).all()
    assert (memory != 0).sum() <= strided.numel()


def test_a_gradient_of_its_own_dtype_after_a_cast():
    """module.double() casts the gradients along: nothing to complain about."""
    net = with_gradients(model())
    reg = pyreg.Regularizer(net, NET)
    reg.accumulate_()
    net.double()
    reg.accumulate_()
    assert all(p.grad.dtype == torch.float64 for p in net.parameters())


def test_a_schedule_in_a_tensor_strength(backend):
    """The regularizer reads a tensor strength at every call."""
    net, lam = model(), torch.tensor(0.0)
    reg = pyreg.Regularizer(net, pyreg.L1(lam))
    for x in (0.5, 0.25, 0.0, 2.0):
        lam.fill_(x)
        assert reg().item() == pytest.approx(pyreg.l1(net, x).item())
        net.zero_grad()
        reg.accumulate_(create_grads=True)
        assert torch.equal(net[3].bias.grad, x * net[3].bias.detach().sign())
