"""How an attachment begins and ends, and what is refused, before anything is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from trained import NET

import pyreg


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def test_bad_couplings():
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    reg = pyreg.Regularizer(module, pyreg.L1(0.1))
    for mode, coupling, message in (
        ("prox", "rate", "expected 'lr', 'schedule' or 'none', got 'rate'"),
        ("grad", "none", "mode='grad' is coupled to the learning rate"),
        ("prox", "schedule", "initial_lr is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            reg.attach(optimizer, mode, coupling=coupling)
    reg.attach(optimizer)  # nothing was left behind


def test_detach(backend):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = pyreg.Regularizer(model, NET)
    attachment = reg.attach(optimizer)
    with pytest.raises(ValueError, match="already attached to SGD"):
        reg.attach(optimizer, "prox")
    before = copy.deepcopy(model.state_dict())
    reg.detach()
    attachment.detach()  # harmless
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    reg.attach(optimizer, "prox")
    optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"])
    reg.detach()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_attachment_that_ends_by_itself():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = pyreg.Regularizer(model, NET)
    reg.attach(optimizer).detach()
    reg.attach(optimizer)


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_copy_is_not_attached(mode):
    """As torch does not copy an optimizer's hooks; it can be attached anew."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = pyreg.Regularizer(model, NET)
    reg.attach(optimizer, mode)
    model, optimizer, reg = copy.deepcopy((model, optimizer, reg))
    reg.attach(optimizer, mode)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert reg.step == 1
    assert all(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_rate_that_cannot_be_is_refused_before_the_step():
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    reg = pyreg.Regularizer(model, {"0.*": pyreg.L1(0.1)})
    reg.attach(optimizer, "prox", coupling="schedule")
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.0})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="initial_lr is 0"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_optimizer_without_a_learning_rate():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            pass

    model = net()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = Own(model.parameters())
    pyreg.Regularizer(model, NET).attach(optimizer)
    optimizer.step()
    assert all(p.grad.any() for p in model.parameters())


def test_what_cannot_be_attached():
    model = net()
    reg = pyreg.Regularizer(model, NET)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the optimizer does not hold '2.weight'"):
        reg.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="LBFGS evaluates"):
        reg.attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match=r"metric of Adadelta is not known \(known: SGD, Adam"):
        reg.attach(torch.optim.Adadelta(model.parameters()), "prox")
    with pytest.raises(ValueError, match="mode: expected 'grad' or 'prox', got 'proximal'"):
        reg.attach(sgd, "proximal")
    with pytest.raises(ValueError, match="metric: expected"):
        reg.attach(sgd, "prox", metric="adam")
    with pytest.raises(TypeError, match="step hooks, got Linear"):
        reg.attach(model[0])
    with pytest.raises(TypeError, match="step hooks, got the class itself"):
        reg.attach(torch.optim.SGD)
    assert not sgd._optimizer_step_pre_hooks
    assert not sgd._optimizer_step_post_hooks
    reg.attach(torch.optim.Adadelta(model.parameters()), "prox", metric="identity")


def refused_step(model, optimizer, match: str) -> None:
    """A step that raises, and changes no weight."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_momentum_without_a_steady_step(kind):
    model = net()
    reg = pyreg.Regularizer(model, NET)
    with pytest.raises(ValueError, match=r"momentum=1, dampening=0: no steady step"):
        reg.attach(kind(model.parameters(), lr=0.1, momentum=1.0), "prox")
    reg.attach(kind(model.parameters(), lr=0.1, momentum=1.0), "prox", "identity").detach()
    reg.attach(kind(model.parameters(), lr=0.1, momentum=1.0), "grad").detach()
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.5)
    reg.attach(optimizer, "prox")
    optimizer.param_groups[0]["momentum"] = 1.5
    refused_step(model, optimizer, "momentum=1.5")


def test_an_anchor_that_became_another(backend):
    """Of another shape, after it was attached."""
    model = net()
    anchor = {k: torch.zeros_like(v) for k, v in model.named_parameters()}
    reg = pyreg.Regularizer(model, pyreg.L1(0.1, anchor=anchor))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.attach(optimizer, "prox")
    anchor["2.bias"].data = torch.zeros(7, dtype=torch.float64)
    refused_step(model, optimizer, r"'2.bias'.*but its anchor is float64 \[7\]")


def test_a_refusal_leaves_nothing_behind():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match="initial_lr is 0"):
        pyreg.Regularizer(model, NET).attach(optimizer, "prox", coupling="schedule")
    assert "initial_lr" not in optimizer.param_groups[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
