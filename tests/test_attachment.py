"""How an attachment begins and ends, and what is refused, before anything is changed."""

from __future__ import annotations

import copy
from contextlib import nullcontext

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
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.0})
    with pytest.raises(ValueError, match="initial_lr is 0"):
        pyreg.Regularizer(model, NET).attach(optimizer, "prox", coupling="schedule")
    assert all(
        set(group) == set(optimizer.defaults) | {"params"} for group in optimizer.param_groups
    )
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_schedule_that_is_made_after_a_coupling_begins_where_the_rate_is():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    reg = pyreg.Regularizer(model, NET)
    reg.attach(optimizer, "prox", coupling="schedule")
    optimizer.param_groups[0]["lr"] = 0.25
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert optimizer.param_groups[0]["lr"] == 0.25
    reg.detach()
    assert set(optimizer.param_groups[0]) == {*optimizer.defaults, "params", "initial_lr"}


MODES = pytest.mark.parametrize("mode", ["grad", "prox"])


def ones(kind: type[torch.optim.Optimizer], **options):
    """A weight of 10 with the gradient 0, its optimizer at rate 1, and L1(1): a step leaves 9."""
    w = nn.Parameter(torch.tensor([10.0]))
    w.grad = torch.zeros(1)
    return w, kind([w], lr=1.0, **options), pyreg.Regularizer({"w": w}, pyreg.L1(1.0))


@MODES
def test_a_subclass_that_calls_its_parents_step(mode):
    """torch runs hooks in both, once it has met both classes; also after a step that raised."""

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            if self.fails:
                raise OSError("failed")
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.ones(1))])
    w, optimizer, reg = ones(Own)
    reg.attach(optimizer, mode)
    for optimizer.fails in (True, False):
        w.grad = torch.zeros(1)
        with pytest.raises(OSError, match="failed") if optimizer.fails else nullcontext():
            optimizer.step()
    assert w.item() == 9
    assert reg.step == 1


@MODES
def test_a_step_that_frees_gradients(mode):
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p -= self.param_groups[0]["lr"] * p.grad
            self.zero_grad()

    w, optimizer, reg = ones(Own)
    reg.attach(optimizer, mode)
    optimizer.step()
    assert w.item() == 9
    assert w.grad is None


@MODES
def test_a_parameter_that_the_optimizer_does_not_hold_by_now(mode):
    model = net()
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    reg = pyreg.Regularizer(model, NET)
    reg.attach(optimizer, mode)
    model[2].weight.requires_grad_()
    refused_step(model, optimizer, "the optimizer does not hold '2.weight'")
    model[2].weight.requires_grad_(False)
    optimizer.step()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    refused_step(model, optimizer, "the optimizer does not hold '0.weight'")
    assert not model[0].weight.grad.sub(1).any()


@MODES
def test_a_strength_that_requires_a_gradient_is_refused(mode):
    model = net()
    strength = nn.Parameter(torch.tensor(0.1))
    reg = pyreg.Regularizer(model, {"0.*": pyreg.L1(strength)})
    message = (
        r"rules\['0.\*'\]: lam requires a gradient, which it gets from reg\(\) in the loss only"
    )
    with pytest.raises(ValueError, match=message):
        reg.attach(torch.optim.SGD(model.parameters(), lr=0.1), mode)
    with pytest.raises(ValueError, match=message):
        pyreg.optim.SGD(model.parameters(), lr=0.1, regularizer=reg, mode=mode)
    strength.requires_grad_(False)
    reg.attach(torch.optim.SGD(model.parameters(), lr=0.1), mode)


def test_a_state_without_what_the_metric_takes():
    """Named after the step that made it, and before every later one."""

    class Own(torch.optim.Adam):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["own"] = p.grad.square()
                p.sub_(p.grad)

    w, optimizer, reg = ones(Own)
    reg.attach(optimizer, "prox")
    w.grad = torch.ones(1)
    message = r"params\[0\] \('w'\): its state in the optimizer lacks 'exp_avg_sq'.*'identity'"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert w.item() == 9
    reg.detach()
    reg.attach(optimizer, "prox", metric="identity")
    optimizer.step()
    assert w.item() == 7


def test_a_proximal_step_that_master_weights_would_undo_is_refused():
    w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = pyreg.optim.AdamW([w], master_weights=True)
    reg = pyreg.Regularizer({"w": w}, pyreg.L1(0.1))
    with pytest.raises(ValueError, match="pass regularizer= to the optimizer"):
        reg.attach(optimizer, "prox")
    reg.attach(optimizer, "grad")


class Twice(torch.optim.SGD):
    """Evaluates its closure so often, and then steps."""

    times = 2

    def step(self, closure):
        for _ in range(self.times):
            closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= self.param_groups[0]["lr"] * p.grad


@MODES
def test_a_closure_that_is_evaluated_twice_is_one_step(mode):
    w, optimizer, _ = ones(Twice)
    reg = pyreg.Regularizer({"w": w}, pyreg.L1(lambda step: step + 1.0))
    reg.attach(optimizer, mode)

    def closure():
        w.grad = torch.zeros(1)

    for left in (9, 7):
        optimizer.step(closure)
        assert w.item() == left
    assert reg.step == 2


def test_a_closure_that_is_not_called_is_said():
    class Never(Twice):
        times = 0

    _, optimizer, reg = ones(Never)
    reg.attach(optimizer)
    with pytest.raises(RuntimeError, match="Never did not call its closure"):
        optimizer.step(lambda: None)
    assert reg.step == 0


@MODES
def test_an_argument_that_is_no_closure(mode):
    class Scaled(torch.optim.SGD):
        def step(self, factor):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p -= factor * p.grad

    w, optimizer, reg = ones(Scaled)
    reg.attach(optimizer, mode)
    optimizer.step(1.0)
    assert w.item() == 9


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_float16_gradients_beside_a_large_scale_do_not_overflow(kind):
    """The scaler has looked for overflow before the penalty was added to them."""
    w = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float16))
    optimizer = kind([w], lr=0.125, fused=True)
    pyreg.Regularizer({"w": w}, pyreg.L1(2.0)).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale((w.float() * 0).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(w, torch.tensor([0.375, -0.375], dtype=torch.float16))
