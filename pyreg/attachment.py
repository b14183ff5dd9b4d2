"""A regularizer in an optimizer's step: once per step, whatever came before it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from .metric import Metric, gain, identity, metric_of

if TYPE_CHECKING:
    from .regularizer import Regularizer

Mode = Literal["grad", "prox"]
Coupling = Literal["lr", "schedule", "none"]


def untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, which a compiled `optimizer.step()` calls and does not trace.

    `torch.compiler.disable` imports the compiler, a second or more: only where it is there already.
    """
    disabled = None

    def call(*args: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return hook(*args)
        if disabled is None:
            disabled = torch.compiler.disable(hook)
        return disabled(*args)

    return call


class Attachment:
    """What `Regularizer.attach` leaves in the optimizer; `detach()` takes it out again."""

    def __init__(
        self, reg: Regularizer, optimizer: Optimizer, mode: Mode, metric: str, coupling: Coupling
    ) -> None:
        if isinstance(optimizer, type) or not hasattr(optimizer, "register_step_pre_hook"):
            got = optimizer if isinstance(optimizer, type) else type(optimizer)
            what = "the class itself" if got is optimizer else got.__name__
            raise TypeError(
                "optimizer: expected a torch.optim.Optimizer or one with the same step hooks, got "
                f"{what}"
            )
        if mode not in ("grad", "prox"):
            raise ValueError(f"mode: expected 'grad' or 'prox', got {mode!r}")
        if metric not in ("optimizer", "identity"):
            raise ValueError(f"metric: expected 'optimizer' or 'identity', got {metric!r}")
        if coupling not in ("lr", "schedule", "none"):
            raise ValueError(f"coupling: expected 'lr', 'schedule' or 'none', got {coupling!r}")
        if coupling != "lr" and mode == "grad":
            raise ValueError(
                "mode='grad' is coupled to the learning rate, by which the optimizer multiplies "
                f"every gradient; coupling={coupling!r} is for mode='prox'"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS evaluates its objective several times a step, with a line search on its "
                "value: add reg() to the loss in the closure instead"
            )
        self.reg, self.optimizer, self.mode = reg, optimizer, mode
        check_held(reg, optimizer)
        self._coupling = coupling
        self._metric = identity if metric == "identity" or mode == "grad" else metric_of(optimizer)
        self._check_groups()
        if mode == "grad":
            reg.check_differentiable()
            self._handles = [optimizer.register_step_pre_hook(untraced(self._before))]
        else:
            # A schedule must not fail when the weights have moved already.
            self._handles = [
                optimizer.register_step_pre_hook(untraced(self._check)),
                optimizer.register_step_post_hook(untraced(self._after)),
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.reg.release(self)

    def _check(self, *_: Any) -> None:
        self.reg.check_ready()
        self._check_groups()

    def _check_groups(self) -> None:
        for group in self.optimizer.param_groups:
            if self._coupling == "schedule":
                _rate(self._coupling, group)
            if self._metric is not identity:
                gain(group)

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add()
            return None

        def penalised() -> Any:
            loss = closure()
            self._add()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": penalised}
        return (args[0], penalised, *args[2:]), kwargs

    def _add(self) -> None:
        add_gradients(self.reg, self.optimizer)
        self._count()

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        self.reg._prox(metric_of_rows(self.optimizer, self._metric, self._coupling))
        self._count()

    def _count(self) -> None:
        """Unless the optimizer skips the step itself, which on a GPU nobody waits to know."""
        skipped = getattr(self.optimizer, "found_inf", None)
        if skipped is None or skipped.device.type != "cpu" or not skipped.item():
            self.reg.advance()


def check_held(reg: Regularizer, optimizer: Optimizer) -> None:
    """Raise ValueError, naming it, if a penalised parameter is not the optimizer's."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, t in reg.trainable():
        if id(t) not in held:
            raise ValueError(
                f"the optimizer does not hold {name!r}, which a rule penalises; exclude it, or "
                "attach a regularizer of its own to each optimizer"
            )


def add_gradients(reg: Regularizer, optimizer: Optimizer) -> None:
    """Add the penalty's gradients to those that the optimizer is about to use."""
    # An optimizer that unscales gradients itself is given the loss scale for the step.
    scale = getattr(optimizer, "grad_scale", None)
    scale = 1.0 if scale is None else scale
    reg._accumulate(-scale if ascends(optimizer) else scale)


def ascends(optimizer: Optimizer) -> bool:
    """Whether it maximizes; raise ValueError where only some param groups do."""
    found = {bool(group.get("maximize")) for group in optimizer.param_groups}
    if len(found) > 1:
        raise ValueError("param groups with and without maximize=True: use one optimizer each")
    return found == {True}


def metric_of_rows(
    optimizer: Optimizer,
    read: Callable[[dict[str, Any], dict[str, Any]], Metric],
    coupling: Coupling = "lr",
) -> Callable[[Tensor], Metric | None]:
    """Each parameter's metric; None for one that the step before did not move."""
    skipped = getattr(optimizer, "found_inf", None)
    groups = {}
    for group in optimizer.param_groups:
        with_rate = {**group, "lr": _rate(coupling, group)}
        groups |= {id(p): with_rate for p in group["params"]}

    def metric(p: Tensor) -> Metric | None:
        group, state = groups.get(id(p)), optimizer.state.get(p)
        if group is None or p.grad is None:
            return None
        if skipped is None:
            return read(group, state)
        if skipped.device.type == "cpu":
            return None if skipped.item() else read(group, state)
        # Without waiting for the device: a step of 0 changes nothing.
        found = read(group, state)
        moved = (skipped.to(p.device) == 0).double()
        return found._replace(numerator=found.numerator * moved)

    return metric


def _rate(coupling: Coupling, group: dict[str, Any]) -> float | Tensor:
    """What takes the place of a param group's learning rate in the proximal step."""
    lr = group["lr"]
    if coupling == "lr":
        return lr
    if coupling == "none":
        return 1.0
    # Where torch's own schedulers keep it: so it is saved and loaded with the optimizer.
    first = group.get("initial_lr", lr)
    if not (isinstance(first, Tensor) and first.device.type != "cpu") and first == 0:
        raise ValueError("coupling='schedule': a param group's initial_lr is 0")
    first = group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
    return lr / first
