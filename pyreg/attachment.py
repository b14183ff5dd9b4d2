"""A regularizer in an optimizer's step: once per step, whatever came before it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from .look import numbers
from .metric import BY_COUNT, Metric, gain, identity, metric_of, waits

if TYPE_CHECKING:
    from .regularizer import Regularizer

Mode = Literal["grad", "prox"]
Coupling = Literal["lr", "schedule", "none"]
FIRST_LR = "penalty_initial_lr"  # a param group's, for coupling="schedule"


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
        if mode == "prox" and any(g.get("master_weights") for g in optimizer.param_groups):
            raise ValueError(
                "the optimizer's master weights would undo the proximal step: pass regularizer= to "
                "the optimizer instead"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS evaluates its objective several times a step, with a line search on its "
                "value: add reg() to the loss in the closure instead"
            )
        self.reg, self.optimizer, self.mode = reg, optimizer, mode
        self._held: tuple[Any, ...] = ()
        self._check_held(reg._active())
        self._coupling = coupling
        self._metric = identity if metric == "identity" or mode == "grad" else metric_of(optimizer)
        self._check_groups()
        self._has_gradient: set[int] | None = None  # ids, before a step; None: it has a closure
        self._added = True  # whether a step's closure was called
        self._read = False  # whether the metric was found in the optimizer's state
        before = self._before_adding if mode == "grad" else self._before_prox
        after = self._after_adding if mode == "grad" else self._after_prox
        if mode == "grad":
            reg.check_differentiable()
        self._handles = [
            optimizer.register_step_pre_hook(untraced(_once_a_step(before))),
            optimizer.register_step_post_hook(untraced(_once_a_step(after))),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for group in self.optimizer.param_groups:
            group.pop(FIRST_LR, None)
        self.reg.release(self)

    def _check_held(self, penalised: Any) -> None:
        """When parameters or param groups are others than at the last call."""
        groups = [len(group["params"]) for group in self.optimizer.param_groups]
        now = (penalised, *groups)
        if now != self._held:
            check_held(self.reg, self.optimizer)
            self._held = now

    def _check_groups(self) -> None:
        groups, scheduled = self.optimizer.param_groups, self._coupling == "schedule"
        for group in groups:
            if scheduled:
                _first_rate(group)
            if self._metric is not identity:
                gain(group)
        if scheduled:
            # To be saved and loaded with the optimizer; not where torch's schedulers keep theirs,
            # as one that is made later would begin there.
            for group in groups:
                group[FIRST_LR] = _first_rate(group)

    def _before_adding(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        closure = _closure(args, kwargs)
        self._added = closure is None
        if closure is None:
            self._add()
            return None

        def penalised() -> Any:
            loss = closure()
            self._add()
            self._added = True
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": penalised}
        return (args[0], penalised, *args[2:]), kwargs

    def _add(self) -> None:
        penalised = self.reg._active()
        self._check_held(penalised)
        add_gradients(self.reg, self.optimizer, penalised)

    def _after_adding(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._added:
            raise RuntimeError(
                f"{type(optimizer).__name__} did not call its closure, after which the penalty's "
                "gradient is added: call backward() before step()"
            )
        self._count()

    # What can be wrong must be said before the weights have moved.
    def _before_prox(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        penalised = self.reg.check_ready()
        self._check_held(penalised)
        self._check_groups()
        if not self._read:
            self._check_states(penalised)
        self._has_gradient = None
        if _closure(args, kwargs) is None:
            self._has_gradient = {id(t) for t in penalised.tensors if t.grad is not None}

    def _check_states(self, penalised: Any) -> None:
        """Raise ValueError if one that is there already lacks what the metric takes."""
        known = {id(t) for t in penalised.tensors if self.optimizer.state.get(t)}
        metric = metric_of_rows(self.optimizer, self._metric, self._coupling, known)
        with suppress(ArithmeticError):  # a count of 0, which the step raises
            self.reg.metrics(penalised, metric)

    def _after_prox(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        moved = self._has_gradient
        self.reg._prox(metric_of_rows(self.optimizer, self._metric, self._coupling, moved))
        self._read = True
        self._count()

    def _count(self) -> None:
        """Unless the optimizer skips the step itself, which on a GPU nobody waits to know."""
        skipped = getattr(self.optimizer, "found_inf", None)
        if skipped is None or skipped.device.type != "cpu" or not skipped.item():
            self.reg.advance()


def _closure(args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return closure if callable(closure) else None


def _once_a_step(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, but for a step that another of the same optimizer calls, as a subclass's calls its
    parent's: torch runs the hooks of both where it has met both classes."""

    def call(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        return None if _is_inner(optimizer) else hook(optimizer, args, kwargs)

    return call


def _is_inner(optimizer: Optimizer) -> bool:
    steps = [vars(cls).get("step") for cls in type(optimizer).__mro__]
    hooked = [step for step in steps if getattr(step, "hooked", False)]
    if len(hooked) < 2:
        return False
    code, running, frame = hooked[0].__code__, 0, sys._getframe()
    while frame is not None:
        running += frame.f_code is code and frame.f_locals["args"][0] is optimizer
        frame = frame.f_back
    return running > 1


def check_held(reg: Regularizer, optimizer: Optimizer) -> None:
    """Raise ValueError, naming it, if a penalised parameter is not the optimizer's."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, t in reg.trainable():
        if id(t) not in held:
            raise ValueError(
                f"the optimizer does not hold {name!r}, which a rule penalises; exclude it, or "
                "attach a regularizer of its own to each optimizer"
            )


def add_gradients(reg: Regularizer, optimizer: Optimizer, penalised: Any) -> None:
    """Add the penalty's gradients, of what `reg._active()` is, to those that the optimizer is about
    to use."""
    # An optimizer that unscales gradients itself is given the loss scale for the step.
    given = getattr(optimizer, "grad_scale", None)
    scale = 1.0 if given is None else given
    reg._accumulate(penalised, -scale if ascends(optimizer) else scale)
    if given is None:
        return
    # The scaler has looked for overflow already, and would let one of the sum pass.
    grads = [t.grad for t in penalised.tensors if t.grad is not None]
    half = [g for g in grads if g.dtype == torch.float16]
    if half:
        largest = torch.finfo(torch.float16).max
        torch._foreach_clamp_max_(half, largest)
        torch._foreach_clamp_min_(half, -largest)


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
    moved: set[int] | None = None,
) -> Callable[[Tensor], Metric | None]:
    """Each parameter's metric; None for one that the step before did not move: not among the ids
    `moved`, or if those are not known, without a gradient."""
    skipped = getattr(optimizer, "found_inf", None)
    if skipped is not None and skipped.device.type == "cpu":
        moved, skipped = (set() if skipped.item() else moved), None
    groups, together, taken = {}, {}, {}
    for group in optimizer.param_groups:
        with_rate = {**group, "lr": _rate(coupling, group)}
        groups |= {id(p): with_rate for p in group["params"]}

    def metric(p: Tensor) -> Metric | None:
        group = groups.get(id(p))
        if group is None or (p.grad is None if moved is None else id(p) not in moved):
            return None
        if id(group) not in together:
            together[id(group)] = _read_together(read, group, optimizer.state)
        found = together[id(group)].get(id(p)) or read(group, optimizer.state.get(p))
        if skipped is None:
            return found
        # Without waiting for the device: a step of 0 changes nothing.
        if p.device not in taken:
            taken[p.device] = (skipped.to(p.device) == 0).double()
        return found._replace(numerator=found.numerator * taken[p.device])

    return metric


def _read_together(
    read: Callable[[dict[str, Any], dict[str, Any]], Metric],
    group: dict[str, Any],
    state: Mapping[Tensor, dict[str, Any]],
) -> dict[int, Metric]:
    """{id: metric} of those parameters of a param group whose counts of steps are the same number,
    or on one GPU: all of them at once, where one by one takes some microseconds each, and on a GPU
    some launches."""
    own = [(p, state.get(p) or {}) for p in group["params"]]
    steps = [found.get("step") for _, found in own]
    counts = numbers(steps) if read in BY_COUNT else [None] * len(steps)
    alike: dict[Any, list[int]] = {}
    for i, (step, count) in enumerate(zip(steps, counts, strict=True)):
        if count is not None or (step is None and read in BY_COUNT):
            alike.setdefault(count, []).append(i)
        elif isinstance(step, Tensor) and waits(step):
            alike.setdefault(step.device, []).append(i)
    metrics: dict[int, Metric] = {}
    for which, rows in alike.items():
        params, states = zip(*[own[i] for i in rows], strict=True)
        first = given = states[0]
        if isinstance(which, torch.device):
            stacked = torch.stack([s["step"].detach().reshape(()) for s in states]).double()
            given = {**first, "step": stacked}
        elif which is not None:
            given = {**first, "step": which}
        try:
            metric = read(group, given)
            moments = repeat(None)
            if metric.moment is not None:
                key = next((k for k, x in first.items() if x is metric.moment), None)
                moments = [s[key] for s in states]
        except (KeyError, ArithmeticError):
            continue  # whoever asks for one hears of it; or the moment is made anew for each
        columns = [
            x.expand(len(rows)).unbind() if isinstance(x, Tensor) and x.ndim == 1 else repeat(x)
            for x in (metric.numerator, metric.factor, metric.offset)
        ]
        found = zip(params, moments, *columns, strict=False)
        metrics |= {id(p): Metric(*row, metric.root) for p, *row in found}
    return metrics


def _rate(coupling: Coupling, group: dict[str, Any]) -> float | Tensor:
    """What takes the place of a param group's learning rate in the proximal step."""
    if coupling == "schedule":
        return group["lr"] / _first_rate(group)
    return group["lr"] if coupling == "lr" else 1.0


def _first_rate(group: dict[str, Any]) -> float | Tensor:
    """A param group's learning rate when the attachment, or before it a schedule, began.

    Raises ValueError if it is 0.
    """
    lr = group["lr"]
    first = group.get(FIRST_LR, group.get("initial_lr", lr))
    if not (isinstance(first, Tensor) and first.device.type != "cpu") and first == 0:
        raise ValueError("coupling='schedule': a param group's initial_lr is 0")
    return first.clone() if isinstance(lr, Tensor) and first is lr else first
