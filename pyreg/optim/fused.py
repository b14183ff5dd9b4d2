"""What the optimizers share: a step in one sweep, or torch's own step and the penalty's sweep."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..attachment import add_gradients, metric_of_rows, untraced
from ..dispatch import choose
from ..metric import Metric, metric_of
from ..pack import GradientMismatch, Packs, check_gradient, label
from ..penalties import L1, Penalty
from ..regularizer import Regularizer
from ..sweeps import Value

Mode = Literal["grad", "prox"]


class Rows(NamedTuple):
    """The parameters of a param group that have a gradient, and what lies beside each."""

    params: list[Tensor]
    states: list[list[Tensor]]  # of each kind of state, in the order of csrc/updates.h
    counters: list[Tensor]  # how many steps each has seen; empty if nobody counts
    new: Sequence[bool]  # whether its state is only made for this step


class Numbers(NamedTuple):
    """What a step does to a row, as csrc/updates.h tells, but for the gradient's factor."""

    kept: float  # the weight is multiplied by it first
    joins: float  # times the weight, joins the gradient
    own: tuple[float, ...]
    metric: Metric  # without a moment


class _Inside(NamedTuple):
    """Where a regularizer is that must not be attached anywhere else."""

    optimizer: Fused

    def detach(self) -> None:
        self.optimizer.regularizer = None


class Fused(Optimizer):
    """The penalty inside an optimizer's step; a mixin before one of torch's optimizers.

    Args:
        regularizer: a Regularizer, or one penalty for every parameter.
        mode: "grad" adds the penalty's gradient to the loss's; "prox" takes the proximal step after
            the update, in the optimizer's own metric, which makes exact zeros for L1. As in
            `Regularizer.attach`; `regularizer.last_value` holds each rule's value.

    The other arguments, the state and `state_dict()` are torch's; a regularizer has a state_dict of
    its own. A step is one sweep where all parameters are dense CPU tensors without anchors; it then
    leaves `.grad` as it is, and `foreach`, `fused` and `capturable` have no meaning.

    Raises:
        ValueError: an unknown mode; a regularizer that is attached already, or over a parameter
            (named) that the optimizer does not hold; `differentiable=True`.
        TypeError: a regularizer that is none.
        RuntimeError: mode="grad" and a penalty that has no gradient (L0).
    """

    _step_supports_amp_scaling = True
    _torch: ClassVar[type[Optimizer]]  # what this class adds to

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        regularizer: Regularizer | Penalty | None = None,
        mode: Mode = "grad",
        **options: Any,
    ) -> None:
        if mode not in ("grad", "prox"):
            raise ValueError(f"mode: expected 'grad' or 'prox', got {mode!r}")
        if not (regularizer is None or isinstance(regularizer, Regularizer | Penalty)):
            got = type(regularizer).__name__
            raise TypeError(f"regularizer: expected a Regularizer or a penalty, got {got}")
        if options.get("differentiable"):
            raise ValueError("differentiable=True: a step in place has no graph")
        self.regularizer: Regularizer | None = None
        self.mode = mode
        self._packs: tuple[Any, Packs, bytes] | None = None
        self._zeros: int | Tensor | None = None
        super().__init__(params, *args, **options)
        if isinstance(regularizer, Penalty):
            regularizer = Regularizer(self._named(), regularizer)
        if regularizer is not None:
            regularizer.join(_Inside(self))
            self.regularizer = regularizer
            if mode == "grad":
                regularizer.check_differentiable()

    def detach(self) -> None:
        """Leave the penalty out from now on."""
        if self.regularizer is not None:
            self.regularizer.detach()

    def __getstate__(self) -> dict[str, Any]:
        own = {"regularizer": self.regularizer, "mode": self.mode, "_packs": None, "_zeros": None}
        return {**super().__getstate__(), **own}

    @property
    def last_zeros(self) -> int | None:
        """How many penalised weights the last step left at exactly 0; None before the first."""
        return None if self._zeros is None else int(self._zeros)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a closure is called first, and what it returns is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _take_step(self)
        return loss

    # What each class has of its own:

    def _rows(self, group: dict[str, Any]) -> Rows:
        raise NotImplementedError

    def _update(self, group: dict[str, Any]) -> str:
        """The name of its update."""
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any], step: float, new: bool) -> Numbers:
        raise NotImplementedError

    # And what they share:

    def _named(self) -> list[tuple[str, Tensor]]:
        named = []
        for group in self.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            named += zip(names, group["params"], strict=True)
        return [(name or f"params[{i}]", p) for i, (name, p) in enumerate(named)]

    def _take_step(self) -> None:
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if overflow is not None and overflow.item():
            return
        reg = self.regularizer
        if reg is not None:
            reg.check_strengths()
        for i, (name, p) in enumerate(self._named()):
            if p.grad is not None and p.grad.layout != torch.strided:
                check_gradient(p.grad, p, label(i, name))
        if not self._step_in_one_sweep(1.0 if scale is None else float(scale)):
            self._step_by_torch(scale)
        if reg is not None:
            reg.advance()

    def _step_in_one_sweep(self, scale: float) -> bool:
        """Take the step, unless it cannot be one sweep."""
        tensors = [p for _, p in self._named() if p.grad is not None]
        if not tensors or any(p.device.type != "cpu" for p in tensors):
            return not tensors
        reg = self.regularizer
        rules = (L1(0.0),) if reg is None else reg._penalties
        packs, penalised = self._packs_of(tensors, rules)
        names = {id(p): name for name, p in self._named()}

        def sweep(current: list[Any]) -> Any:
            backend = choose(current[0]).backend
            if len(current) > 1 or current[0].anchors or not hasattr(backend, "step"):
                return None
            found, done = [self._rows(group) for group in self.param_groups], None
            try:
                done = self._sweep(backend, current[0], tensors, found, penalised, rules, scale)
            except GradientMismatch:
                for i, t in enumerate(tensors):
                    check_gradient(t.grad, t, named(i))
                raise
            finally:
                if done is None:
                    self._forget(found)
            return done

        def named(i: int) -> str:
            return label(i, names[id(tensors[i])])

        done = packs.run(sweep, tensors, named)
        if done is None:
            return False
        value, of_rules, self._zeros = done
        if reg is not None:
            reg._last = Value.of([(value, of_rules)], packs.value_dtype)
        return True

    def _packs_of(self, tensors: list[Tensor], rules: Sequence[Penalty]) -> tuple[Packs, bytes]:
        """The packs of these parameters, and whether each is penalised; kept until they change."""
        group = None if self.regularizer is None else self.regularizer._active()
        key = (group, list(map(id, tensors)))
        if self._packs is None or self._packs[0] != key:
            rule_of, penalised, pairs = [0] * len(tensors), bytes(len(tensors)), None
            if group is not None:
                row_of = {id(t): i for i, t in enumerate(group.tensors)}
                rows = [row_of.get(id(t)) for t in tensors]
                penalised = bytes(i is not None for i in rows)
                rule_of = [0 if i is None else group.packs.rule_of[i] for i in rows]
                if (anchors := group.packs.anchors) is not None:
                    pairs = [(None, None) if i is None else anchors[i] for i in rows]
            self._packs = key, Packs(tuple(r.name for r in rules), rule_of, pairs), penalised
        return self._packs[1:]

    def _sweep(
        self,
        backend: Any,
        pack: Any,
        tensors: list[Tensor],
        found: list[Rows],
        penalised: bytes,
        rules: Sequence[Penalty],
        scale: float,
    ) -> tuple[float, list[float], int] | None:
        updates, sets, numbers = [], [], []
        states: list[list[Tensor | None]] = [[] for _ in range(max(len(r.states) for r in found))]
        signs = [-1.0 if group.get("maximize") else 1.0 for group in self.param_groups]
        if len(set(signs)) > 1 and self.regularizer is not None and self.mode == "grad":
            raise ValueError("param groups with and without maximize=True: use one optimizer each")
        for group, rows, sign in zip(self.param_groups, found, signs, strict=True):
            update, of = self._update(group), {}
            steps = backend.count(rows.counters) or [0.0] * len(rows.params)
            for key in zip(steps, rows.new or [False] * len(steps), strict=True):
                if key not in of:
                    of[key] = len(numbers)
                    kept, joins, own, metric = self._numbers(group, *key)
                    numbers.append(((sign / scale, kept, joins, *own), metric))
                sets.append(of[key])
            updates += [update] * len(rows.params)
            for k, state in enumerate(states):
                state += rows.states[k] if k < len(rows.states) else [None] * len(rows.params)
        prox = self.mode == "prox"
        return backend.step(
            pack, tensors, states, updates, sets, numbers, penalised, prox, rules, signs[0] * scale
        )

    def _forget(self, found: list[Rows]) -> None:
        """Undo what was done for a sweep that did not happen."""
        for rows in found:
            if rows.counters:
                torch._foreach_sub_(rows.counters, 1)
            for p, new in zip(rows.params, rows.new, strict=False):
                if new:
                    self.state.pop(p)

    def _step_by_torch(self, scale: Tensor | float | None) -> None:
        """torch's own step, and the penalty beside it as `Regularizer.attach` has it."""
        reg = self.regularizer
        if scale is not None:
            grads = [p.grad for _, p in self._named() if p.grad is not None]
            torch._foreach_div_(grads, float(scale))
        # They are unscaled now, and this step is not skipped.
        scaler = {k: self.__dict__.pop(k) for k in ("grad_scale", "found_inf") if hasattr(self, k)}
        try:
            if reg is not None and self.mode == "grad":
                add_gradients(reg, self)
            inspect.unwrap(self._torch.step)(self)
        finally:
            self.__dict__.update(scaler)
        if reg is not None and self.mode == "prox":
            reg._prox(metric_of_rows(self, metric_of(self)))
        if reg is not None:
            penalised = [t for _, t in reg.trainable() if t.grad is not None]
            self._zeros = sum((t == 0).sum().to("cpu") for t in penalised)


@untraced
@torch.no_grad()
def _take_step(optimizer: Fused) -> None:
    optimizer._take_step()
