"""A regularizer attached to an optimizer, against training loops that are written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import pyreg
from pyreg import metric, reference
from pyreg.attachment import metric_of_rows
from pyreg.metric import METRICS

L1, L2 = 0.05, 0.02
NET = pyreg.ElasticNet(L1, L2)

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "sgd momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.5}),
    "sgd nesterov": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.02}),
    "adam amsgrad": (torch.optim.Adam, {"lr": 0.02, "amsgrad": True}),
    "adam foreach": (torch.optim.Adam, {"lr": 0.02, "foreach": True}),
    "adam fused": (torch.optim.Adam, {"lr": 0.02, "fused": True}),
    "adam lr tensor": (torch.optim.Adam, {"lr": torch.tensor(0.02)}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.02}),
    "radam": (torch.optim.RAdam, {"lr": 0.02, "betas": (0.9, 0.9)}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.02}),
    "rmsprop centered": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "adamax": (torch.optim.Adamax, {"lr": 0.02}),
}
OPTIMIZER = pytest.mark.parametrize("kind", OPTIMIZERS)


def step_of(kind: str, group: dict, state: dict, p: torch.Tensor) -> torch.Tensor:
    """lr / D of each element, from the optimizers' own papers and torch's documentation."""
    lr, k = float(group["lr"]), float(state.get("step", 0))
    one = torch.ones_like(p)
    family = kind.split()[0]
    if family == "sgd":
        gain = {"sgd": 1, "sgd momentum": 0.5 / (1 - 0.9), "sgd nesterov": 1 / (1 - 0.9)}[kind]
        return lr * gain * one
    if family in ("adam", "adamw", "nadam"):
        v = state["max_exp_avg_sq"] if kind == "adam amsgrad" else state["exp_avg_sq"]
        return lr / ((v / (1 - group["betas"][1] ** k)).sqrt() + group["eps"])
    if family == "radam":
        b = group["betas"][1]
        top = 2 / (1 - b) - 1
        rho = top - 2 * k * b**k / (1 - b**k)
        if rho <= 5:
            return lr * one
        r = math.sqrt((rho - 4) * (rho - 2) * top / ((top - 4) * (top - 2) * rho))
        return lr * r * math.sqrt(1 - b**k) / (state["exp_avg_sq"].sqrt() + group["eps"])
    if family == "adagrad":
        return lr / (1 + (k - 1) * 0.01) / (state["sum"].sqrt() + group["eps"])
    if kind == "rmsprop centered":
        v = state["square_avg"] - state["grad_avg"].square()
        return lr / (1 - 0.5) / (v.sqrt() + group["eps"])
    if family == "rmsprop":
        return lr / (state["square_avg"].sqrt() + group["eps"])
    assert family == "adamax"
    return lr / state["exp_inf"]


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def data(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(8, 5, generator=generator, dtype=torch.float64),
            torch.randn(8, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(steps)
    ]


def make(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    """Two param groups of different learning rates; a copy of the options, which may be tensors."""
    cls, options = OPTIMIZERS[kind]
    options = copy.deepcopy(options)
    first, last = list(model[0].parameters()), list(model[2].parameters())
    return cls([{"params": first}, {"params": last, "lr": options["lr"] * 0.5}], **options)


def penalised(model: nn.Module) -> list[nn.Parameter]:
    return [model[0].weight, model[2].weight]


def add_by_hand(model: nn.Module, factor: float = 1.0) -> None:
    for p in penalised(model):
        if p.grad is not None:
            p.grad += factor * (L1 * p.detach().sign() + 2 * L2 * p.detach())


@torch.no_grad()
def prox_by_hand(kind: str, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """The elastic net's prox, written out."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not any(p is q for q in penalised(model)) or p.grad is None:
                continue
            t = step_of(kind, group, optimizer.state[p], p)
            p.copy_(p.sign() * (p.abs() - t * L1).clamp(min=0) / (1 + 2 * t * L2))


def train(model, optimizer, *, way: str, before=None, after=None, steps: int = 12) -> None:
    """`before` and `after` stand around optimizer.step() where attach() would."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for k, (x, y) in enumerate(data(steps)):
        optimizer.zero_grad()
        parts = 4 if way == "micro-batches" else 1
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = nn.functional.mse_loss(model(xs), ys) / parts
            if way == "scaler":
                loss = scaler.scale(loss)
            loss.backward()
        if way == "clipping":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if way == "scaler":
            if k == 5:  # a step that is skipped
                model[0].weight.grad[0, 0] = math.inf
            if before is not None and k != 5:  # by hand: on unscaled gradients
                scaler.unscale_(optimizer)
                before()
            scaler.step(optimizer)
            scaler.update()
            if k != 5 and after is not None:
                after()
            continue
        if before is not None:
            before()
        optimizer.step()
        if after is not None:
            after()


WAY = pytest.mark.parametrize("way", ["plain", "micro-batches", "scaler", "clipping"])


@WAY
@pytest.mark.parametrize("mode", ["grad", "prox"])
@OPTIMIZER
def test_training(backend, kind, mode, way):
    """Against the same optimizer and a penalty that is written out, in float64.

    1e-10: 12 steps, each of a few hundred roundings of 1.1e-16, of weights near 1 that the
    optimizers' divisions by small moments amplify at most a thousandfold.
    """
    ours, theirs = net(), net()
    a, b = make(kind, ours), make(kind, theirs)
    reg = pyreg.Regularizer(ours, {"*.weight": NET}, exclude=["*.bias"])
    reg.attach(a, mode)
    train(ours, a, way=way)
    if mode == "grad":
        train(theirs, b, way=way, before=lambda: add_by_hand(theirs))
    else:
        train(theirs, b, way=way, after=lambda: prox_by_hand(kind, b, theirs))
    start = net()
    for p, q, w in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(p, w, rtol=1e-3)
    if mode == "prox":
        zeros = [(p == 0).sum().item() for p in penalised(ours)]
        assert zeros == [(p == 0).sum().item() for p in penalised(theirs)]
        value = sum(NET.value(p.detach()) for p in penalised(ours))
        assert list(reg.last_value) == ["*.weight"]
        torch.testing.assert_close(reg.last_value["*.weight"], value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adam lr tensor", "radam", "adagrad", "adamax"])
@pytest.mark.parametrize("coupling", ["lr", "schedule", "none"])
def test_a_coupling_stands_for_the_learning_rate(backend, monkeypatch, kind, coupling):
    """Under a schedule of the learning rates, each group's its own."""
    module = net()
    optimizer = make(kind, module)
    first = [float(group["lr"]) for group in optimizer.param_groups]
    penalty, moved = pyreg.L1(0.01), []
    reg = pyreg.Regularizer(module, penalty, exclude=["*.bias"])
    prox = reg._prox

    def watched(metric):
        moved[:] = [w.detach().clone() for w in penalised(module)]
        prox(metric)

    monkeypatch.setattr(reg, "_prox", watched)
    reg.attach(optimizer, "prox", coupling=coupling)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for k in range(4):
        for p in module.parameters():
            p.grad = torch.full_like(p, 0.1 + k)
        optimizer.step()
        for i, (w, x) in enumerate(zip(penalised(module), moved, strict=True)):
            rate = {"lr": first[i] * 0.5**k, "schedule": 0.5**k, "none": 1.0}[coupling]
            group = {**optimizer.param_groups[i], "lr": rate}
            step = step_of(kind, group, optimizer.state[w], x)
            torch.testing.assert_close(w.detach(), penalty.prox(x, step), rtol=1e-10, atol=1e-14)
        scheduler.step()


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_the_last_value_of_each_rule(native, mode):
    """Over several packs, from the strengths of that step: of the weights before it, or after."""
    module = net()
    w = module[0].weight  # not dense: a pack of its own
    w.data = torch.zeros(w.shape[0], 2 * w.shape[1], dtype=w.dtype)[:, ::2].copy_(w.data)
    lam = torch.tensor(0.2, dtype=torch.float64)
    rules = {
        "0.weight": pyreg.L1(lam),
        "2.weight": pyreg.L2(0.5, anchor=torch.ones_like(module[2].weight)),
        "*.bias": pyreg.MCP(0.3, 2.0),
        "*": pyreg.L1(1.0),
    }
    reg = pyreg.Regularizer(module, rules)
    assert reg.last_value is None
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    reg.attach(optimizer, mode)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(module)
    optimizer.step()
    of = dict((before if mode == "grad" else module).named_parameters())
    expected = {
        "0.weight": 0.2 * of["0.weight"].abs().sum(),
        "2.weight": 0.5 * (of["2.weight"] - 1).square().sum(),
        "*.bias": sum(pyreg.MCP(0.3, 2.0).value(p) for n, p in of.items() if n.endswith("bias")),
        "*": torch.zeros((), dtype=torch.float64),
    }
    lam.fill_(7.0)
    assert list(reg.last_value) == list(rules)
    for pattern, value in reg.last_value.items():
        torch.testing.assert_close(value, expected[pattern].detach(), rtol=1e-13, atol=0)


def test_the_last_value_where_all_are_frozen(backend):
    module = net().requires_grad_(False)
    reg = pyreg.Regularizer(module, {"0.*": pyreg.L1(1.0), "*": pyreg.L2(1.0)})
    reg.accumulate_()
    assert {pattern: value.item() for pattern, value in reg.last_value.items()} == {
        "0.*": 0.0,
        "*": 0.0,
    }


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_compiled_step(native, mode):
    """The hooks run, and are neither traced nor compiled anew.

    2e-6: torch's own compiled Adam departs from its eager one by up to 1e-6 in 6 steps (measured
    without pyreg), as it takes its step size in float32.
    """
    ours, theirs = net(), net()
    a, b = make("adam", ours), make("adam", theirs)
    pyreg.Regularizer(ours, {"*.weight": NET}).attach(a, mode)
    pyreg.Regularizer(theirs, {"*.weight": NET}).attach(b, mode)
    step = torch.compile(lambda: a.step())
    torch._dynamo.reset()
    for k, (x, y) in enumerate(data(6)):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
        with torch._dynamo.config.patch(error_on_recompile=k > 2):
            step()
        b.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["grad", "prox"])
@OPTIMIZER
def test_a_traced_step(native, kind, mode):
    """Of every optimizer, against a penalty that is written out; traced, but run as it stands.

    2e-6: as above.
    """
    ours, theirs = net(), net()
    a, b = make(kind, ours), make(kind, theirs)
    pyreg.Regularizer(ours, {"*.weight": NET}).attach(a, mode)
    torch._dynamo.reset()
    step = torch.compile(lambda: a.step(), backend="eager")
    for x, y in data(6):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
        step()
        if mode == "grad":
            add_by_hand(theirs)
        b.step()
        if mode == "prox":
            prox_by_hand(kind, b, theirs)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["adam", "rmsprop", "adamax", "sgd"])
def test_identity_metric(backend, kind):
    """Every element's step is the learning rate of its group."""
    ours, theirs = net(), net()
    a, b = make(kind, ours), make(kind, theirs)
    pyreg.Regularizer(ours, {"*.weight": NET}).attach(a, "prox", metric="identity")

    @torch.no_grad()
    def by_hand() -> None:
        for group in b.param_groups:
            for p in group["params"]:
                if any(p is q for q in penalised(theirs)):
                    p.copy_(NET.prox(p, float(group["lr"])))

    train(ours, a, way="plain")
    train(theirs, b, way="plain", after=by_hand)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [k for k in OPTIMIZERS if k not in ("rmsprop centered", "adamw")])
def test_the_optimizers_metric_solves_the_stated_problem(kind):
    """MATH: H = [4, 1, .25, 10], w* = [1, -.5, .3, -.05], L1(.2) -> [.95, -.3, 0, -.03].

    (AdamW adds its own decay. Centered RMSprop divides by the gradient's variance, which vanishes
    here.) Adagrad's steps fall as 1 / sqrt(k), hence the larger one. 2e-3: these are float32
    iterates of optimizers that keep moving by a small part of their learning rate.
    """
    h, best = torch.tensor([4.0, 1, 0.25, 10]), torch.tensor([1.0, -0.5, 0.3, -0.05])
    w = nn.Parameter(torch.tensor([0.3, 0.2, -0.1, 0.1]))
    cls, options = OPTIMIZERS[kind]
    optimizer = cls([w], **{**copy.deepcopy(options), "lr": 1.0 if kind == "adagrad" else 0.01})
    pyreg.Regularizer({"w": w}, pyreg.L1(0.2)).attach(optimizer, "prox")
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * h * (w - best) ** 2).sum().backward()
        optimizer.step()
    torch.testing.assert_close(w.data, torch.tensor([0.95, -0.3, 0, -0.03]), rtol=0, atol=2e-3)
    assert w[2].item() == 0, "an exact zero"


def test_l2_with_sgd_is_weight_decay(backend):
    """L2(lam) = weight_decay 2 lam, step by step: the same operations but for the fused product.

    4 ulp of float32: one rounding of 2 lam w more or less, in each of 10 steps, shrunk by lr.
    """
    ours, theirs = net().float(), net().float()
    a = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.02)
    pyreg.Regularizer(ours, pyreg.L2(0.01)).attach(a)
    for x, y in data(10):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x.float()), y.float()).backward()
            optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=4 * 2**-23, atol=4 * 2**-24)


def test_a_closure_is_penalised_after_its_backward(backend):
    """torch's optimizers call it inside step(): what was in .grad before is erased there."""
    ours, theirs = net(), net()
    a, b = make("adam", ours), make("adam", theirs)
    reg = pyreg.Regularizer(ours, {"*.weight": NET})
    reg.attach(a)
    for k, (x, y) in enumerate(data(4)):

        def closure(x=x, y=y):
            a.zero_grad()
            loss = nn.functional.mse_loss(ours(x), y)
            loss.backward()
            return loss

        returned = a.step(closure) if k % 2 else a.step(closure=closure)
        b.zero_grad()
        loss = nn.functional.mse_loss(theirs(x), y)
        loss.backward()
        add_by_hand(theirs)
        b.step()
        torch.testing.assert_close(returned, loss, rtol=1e-12, atol=0)  # the loss alone
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_maximize(backend):
    """The objective is raised and the penalty lowered: both point at smaller weights here."""
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([w], lr=0.5, maximize=True)
    pyreg.Regularizer({"w": w}, pyreg.L1(0.5)).attach(optimizer)
    (-w.abs().sum()).backward()
    optimizer.step()
    assert w.tolist() == [1.0 - 0.5 - 0.25, -2.0 + 0.5 + 0.25]


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_what_the_step_does_not_move_is_left_alone(backend, mode):
    """Frozen parameters, and those without a gradient; later steps see the change."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = pyreg.Regularizer(model, NET)
    reg.attach(optimizer, mode)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()  # no gradient at all
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = torch.zeros(6, dtype=torch.float64)
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.bias"}
    model[0].weight.requires_grad_(True).grad = torch.zeros(6, 5, dtype=torch.float64)
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.bias", "0.weight"}


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_an_average_of_the_weights(backend, mode):
    """It follows the penalised weights, and is never penalised itself, made before or after."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    before = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    reg = pyreg.Regularizer(model, NET)
    reg.attach(optimizer, mode)
    after = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    expected = None
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        before.update_parameters(model)
        after.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        expected = (
            now if expected is None else [(e + p) / 2 for e, p in zip(expected, now, strict=True)]
        )
    for copies in (before, after):
        for p, e in zip(copies.module.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=1e-14, atol=1e-14)
            assert p.grad is None
    assert len(reg.trainable()) == len(expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_skipped_step_is_not_counted(mode, fused):
    model = net().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    reg = pyreg.Regularizer(model, pyreg.L1(pyreg.schedules.Linear(0.0, 1.0, 4)))
    reg.attach(optimizer, mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        (scaler.scale(model(torch.ones(2, 5)).sum()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert reg.step == 2


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_step_that_a_gpu_skips_has_a_length_of_0(backend, found):
    """What the scaler found there is not asked for: it is a factor of the step."""

    class OnGPU:
        device = torch.device("cuda")

        def to(self, device: torch.device) -> torch.Tensor:
            return torch.tensor(found)

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: setattr(optimizer, "found_inf", OnGPU()))
    pyreg.Regularizer(model, NET).attach(optimizer, "prox")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, w in zip(model.parameters(), net().parameters(), strict=True):
        torch.testing.assert_close(p, w if found else NET.prox(w, 0.1), rtol=1e-14, atol=0)


@OPTIMIZER
def test_a_metric_waits_for_nothing(monkeypatch, kind):
    """lr and step as tensors that cannot be read, as capturable optimizers keep them on a GPU."""
    model = net()
    optimizer = make(kind, model)
    read = METRICS[type(optimizer)]
    for x, y in data(8):  # RAdam's first steps have another metric
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()
        for group in optimizer.param_groups:
            p = group["params"][0]
            state = optimizer.state[p]
            expected = reference.metric_step(*read(group, state), dtype=p.dtype)
            with monkeypatch.context() as patch:
                patch.setattr(metric, "number", lambda n: torch.as_tensor(n, dtype=torch.float64))
                for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
                    patch.setattr(torch.Tensor, name, unreadable)
                found = reference.metric_step(*read(group, state), dtype=p.dtype)
            one = torch.ones_like(p.detach())
            torch.testing.assert_close(found * one, expected * one, rtol=1e-12, atol=0)


def unreadable(*args):
    raise AssertionError("this would wait for the device")


def test_a_subclass_has_its_parents_metric():
    class Mine(torch.optim.Adam):
        pass

    assert pyreg.metric.metric_of(Mine(net().parameters())) is METRICS[torch.optim.Adam]


def test_a_moment_of_another_shape_names_the_parameter(backend):
    """Before anything is written."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    reg = pyreg.Regularizer(model, NET)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    reg.attach(optimizer, "prox")
    optimizer.state[model[2].weight]["exp_avg_sq"] = torch.ones(3, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'2.weight'.*moment is \[3\]"):
        reg._prox(metric_of_rows(optimizer, METRICS[torch.optim.Adam]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
