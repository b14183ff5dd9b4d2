"""What a step changes while it is profiled is afterwards as it was, and the same objects."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

import pyreg
from pyreg.profiling.unchanged import Kept

FEW = {"ways": ["loop"], "seconds": 0.0, "rounds": 1}


class Net(nn.Module):
    """With all kinds of buffers, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("counts", torch.arange(4.0))
        self.register_buffer("places", torch.arange(3.0).expand(5, 3))
        self.register_buffer("later", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.frozen)


def profiled(model: object, step: Callable[[], object]) -> None:
    pyreg.profile(model, pyreg.L1(1e-3), step, **FEW)


@torch.no_grad()
def steep(net: Net) -> None:
    net.frozen.mul_(2)


def with_graph(net: Net) -> None:
    """A running mean without no_grad: from then on the buffer requires a gradient."""
    net.counts = net.counts.detach()
    net.counts.mul_(net.layer.weight.sum())


def resized(net: Net) -> None:
    net.counts.resize_(9).fill_(7)


def shrunk(net: Net) -> None:
    net.counts.data = net.counts.data[1:2] * 3


def resized_gradient(net: Net) -> None:
    net.layer.bias.data = torch.zeros(7)
    net.layer.bias.grad = torch.zeros(7)


CHANGES = {
    "nothing": lambda net: None,
    "a buffer reassigned": lambda net: setattr(net, "counts", torch.zeros(9)),
    "a buffer that was none": lambda net: setattr(net, "later", torch.zeros(2)),
    "a buffer made": lambda net: net.register_buffer("made", torch.zeros(2)),
    "a buffer deleted": lambda net: net._buffers.pop("counts", None),
    "a buffer expanded": lambda net: setattr(net, "counts", net.counts[:1].expand(8)),
    "a buffer resized": resized,
    "a buffer's memory replaced": shrunk,
    "a buffer in the graph": with_graph,
    "an expanded buffer": lambda net: net.places[:, :].data.as_strided((3,), (1,)).zero_(),
    "a frozen parameter": steep,
    "a parameter replaced": lambda net: setattr(net.layer, "bias", nn.Parameter(torch.zeros(2))),
    "a parameter's size": resized_gradient,
    "a layer replaced": lambda net: setattr(net, "layer", nn.Linear(3, 2)),
    "evaluation": lambda net: net.eval(),
    "evaluation of a layer": lambda net: net.layer.eval(),
    "a layer frozen": lambda net: net.layer.requires_grad_(False),
    "a parameter thawed": lambda net: net.frozen.requires_grad_(True),
    "gradients": lambda net: net(torch.ones(2, 3)).sum().backward(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_module_is_as_it_was(name):
    net = Net()
    net.layer.bias.grad = torch.ones(2)
    held = dict((*net.named_parameters(), *net.named_buffers()))
    values = {n: t.detach().clone() for n, t in held.items()}
    flags = {n: (t.requires_grad, t.is_leaf) for n, t in held.items()}
    profiled(net, lambda: CHANGES[name](net))
    found = dict((*net.named_parameters(), *net.named_buffers()))
    assert found.keys() == held.keys()
    assert all(found[n] is t for n, t in held.items())
    assert all(torch.equal(t, values[n]) for n, t in found.items())
    assert {n: (t.requires_grad, t.is_leaf) for n, t in found.items()} == flags
    assert found["places"].stride() == (0, 1)
    assert all(module.training for module in net.modules())
    assert net.later is None
    assert net.layer.weight.grad is None
    assert torch.equal(net.layer.bias.grad, torch.ones(2))


@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda net: torch.compile(net, backend="eager")]
)
def test_modules_of_other_kinds(make):
    net = make(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout()))
    before = {name: t.clone() for name, t in net.state_dict().items()}

    def step() -> None:
        net.eval()
        net.train()
        net(torch.ones(2, 3)).sum().backward()

    profiled(net, step)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net.training


def test_a_buffer_of_inference_mode():
    net = Net()
    with torch.inference_mode():
        net.later = torch.ones(2)
    profiled(net, torch.inference_mode()(lambda: net.later.zero_()))
    assert torch.equal(net.later, torch.ones(2))


def test_tensors_that_are_not_penalised():
    """Of pairs those without a gradient; and what else the optimizer steps."""
    net = Net()
    optimizer = torch.optim.SGD(net.layer.parameters(), lr=0.1)
    bias = net.layer.bias.detach().clone()

    def step() -> None:
        optimizer.zero_grad()
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        steep(net)

    profiled({"weight": net.layer.weight, "frozen": net.frozen}, step)
    assert torch.equal(net.layer.bias, bias)
    assert net.layer.bias.grad is None
    assert torch.equal(net.frozen, torch.ones(3))


def optimized(net: Net, kind: type = torch.optim.AdamW, **options: object):
    """(an optimizer that has taken a step, that step)"""
    optimizer = kind(net.layer.parameters(), lr=0.1, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    def step() -> None:
        optimizer.step(closure)

    step()
    return optimizer, step


def contents(value: object) -> object:
    """To be compared with =="""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: contents(v) for k, v in value.items()}
    return [contents(v) for v in value] if isinstance(value, list) else value


def test_the_lists_of_lbfgs():
    net = Net()
    optimizer, step = optimized(net, torch.optim.LBFGS, max_iter=3, history_size=2)
    before = contents(dict(optimizer.state))
    (state,) = optimizer.state.values()
    directions = state["old_dirs"]
    assert len(directions) > 0
    profiled(net, step)
    assert contents(dict(optimizer.state)) == before
    assert state["old_dirs"] is directions


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_step_does_to_its_optimizer(when):
    net = Net()
    optimizer, step = optimized(net)
    state, groups = optimizer.state, optimizer.param_groups
    before = contents(optimizer.state_dict())

    def changing() -> None:
        if when == "after":
            step()
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.state.clear()
        optimizer.add_param_group({"params": [net.counts]})
        optimizer.load_state_dict(optimizer.state_dict())
        if when == "before":
            step()
        del optimizer.param_groups[1:]

    profiled(net, changing)
    assert contents(optimizer.state_dict()) == before
    assert optimizer.state is state
    assert optimizer.param_groups is groups


def test_an_optimizer_that_the_step_makes():
    net, made = Net(), []

    def step() -> None:
        if not made:
            made.append(torch.optim.AdamW(net.layer.parameters()))
        net(torch.ones(2, 3)).sum().backward()
        made[0].step()

    profiled(net, step)
    assert not made[0].state


@pytest.mark.parametrize("kind", ["attached", "inside", "by hand"])
def test_what_a_regularizer_counts(kind):
    """And a strength that the step changes, and the last value."""
    net, lam = Net(), torch.tensor(0.5)
    reg = pyreg.Regularizer(net.layer, pyreg.L1(lam))
    if kind == "inside":
        _, step = optimized(net, pyreg.optim.AdamW, regularizer=reg)
    else:
        optimizer, step = optimized(net)
    if kind == "attached":
        reg.attach(optimizer)
        step()
    if kind == "by hand":
        reg.accumulate_()
        reg.advance()
    value = reg.last_value["*"].item()
    assert reg.step == 1

    def changing() -> None:
        step()
        if kind == "by hand":
            reg.accumulate_()
            reg.advance()
        lam.mul_(0.5)

    profiled(net, changing)
    assert reg.step == 1
    assert reg.last_value["*"].item() == value
    assert lam == 0.5


def test_random_numbers():
    numpy = pytest.importorskip("numpy")
    net = Net()

    def draw() -> tuple[float, ...]:
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    profiled(net, draw)
    found = draw()
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert draw() == found


def test_what_it_keeps_is_counted():
    """Copies, the states of the optimizer too, and gradients to come."""
    net = Net()
    own = sum(t.nbytes for t in net.parameters()) + net.counts.nbytes + 3 * 4
    trained = sum(t.nbytes for t in net.layer.parameters())
    assert Kept(net).bytes == own + trained
    optimizer, _ = optimized(net)
    steps = len(optimizer.state) * 4
    assert Kept(net).bytes == own + trained + 2 * trained + steps
    assert Kept().bytes == 0
