"""What the optimizers share: a step in one sweep, or torch's own step and the penalty's sweep."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..attachment import add_gradients, ascends, metric_of_rows, untraced
from ..dispatch import choose
from ..metric import Metric, check_moment, metric_of
from ..pack import SWEPT_DTYPES, GradientMismatch, Label, Packs, check_gradient, label
from ..penalties import L1, Penalty
from ..regularizer import Regularizer
from ..sweeps import Value, accumulate, add_values

Mode = Literal["grad", "prox"]


class Rows(NamedTuple):
    """The parameters of a param group that have a gradient, and what lies beside each."""

    params: list[Tensor]
    states: list[list[Tensor]]  # of each kind of state, in the order of csrc/updates.h
    counters: list[Tensor]  # how many steps each has seen; empty if nobody counts
    new: Sequence[bool]  # whether its state is only made for this step


class Swept(NamedTuple):
    """The parameters of a step, and where the penalty is on them."""

    packs: Packs
    penalised: bytes  # [parameters] 1 or 0
    left: list[Tensor]  # penalised, and without a gradient
    packs_left: Packs


class _Inside(NamedTuple):
    """Where a regularizer is that must not be attached anywhere else."""

    optimizer: Fused

    def detach(self) -> None:
        self.optimizer.regularizer = None


class Fused(Optimizer):
    """The penalty inside an optimizer's step; a mixin before one of torch's optimizers.

    Args:
        regularizer: a Regularizer, or one penalty for every parameter (of param groups that are
            there from the start).
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
        self._swept: tuple[Any, Swept] | None = None
        self._zeros: int | list[Tensor] | None = None  # or of which to count them
        super().__init__(params, *args, **options)
        if isinstance(regularizer, Penalty):
            regularizer = Regularizer(self._named(), regularizer)
        if regularizer is not None:
            if mode == "grad":
                regularizer.check_differentiable()
            regularizer.join(_Inside(self))
            self.regularizer = regularizer

    def detach(self) -> None:
        """Leave the penalty out from now on."""
        if self.regularizer is not None:
            self.regularizer.detach()

    def __getstate__(self) -> dict[str, Any]:
        own = {"regularizer": self.regularizer, "mode": self.mode, "_swept": None, "_zeros": None}
        return {**super().__getstate__(), **own}

    @property
    def last_zeros(self) -> int | None:
        """How many penalised weights the last step left at exactly 0; None before the first."""
        if isinstance(self._zeros, list):
            self._zeros = sum(int((t == 0).sum()) for t in self._zeros)
        return self._zeros

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

    def _numbers(self, group: dict[str, Any], step: float, new: bool) -> tuple[float, ...]:
        """Those of csrc/updates.h, but for the gradient's factor."""
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
        if overflow is not None and bool(overflow):
            return
        reg = self.regularizer
        if reg is not None:
            reg.check_strengths()
            if self.mode == "grad":
                reg.check_differentiable()
                ascends(self)
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(t.grad.layout != torch.strided for t in tensors):
            self._check(tensors)
        if not self._step_in_one_sweep(tensors, 1.0 if scale is None else float(scale)):
            self._step_by_torch(tensors, scale)
        if reg is not None:
            reg.advance()

    def _step_in_one_sweep(self, tensors: list[Tensor], scale: float) -> bool:
        """Take the step, unless it cannot be one sweep."""
        if not tensors or any(
            t.device.type != "cpu" or t.dtype not in SWEPT_DTYPES for t in tensors
        ):
            return False
        reg = self.regularizer
        rules = (L1(0.0),) if reg is None else reg._penalties
        swept = self._swept_of(tensors, rules)

        def sweep(current: list[Any]) -> Any:
            backend = choose(current[0]).backend
            if len(current) > 1 or current[0].anchors or not hasattr(backend, "step"):
                return None
            found, done = [self._rows(group) for group in self.param_groups], None
            steps = backend.count([counter for rows in found for counter in rows.counters])
            try:
                if steps is not None:
                    args = self._arguments(found, steps, scale)
                    prox = self.mode == "prox"
                    done = backend.step(
                        current[0], tensors, *args, swept.penalised, prox, rules, self._sign * scale
                    )
            except (GradientMismatch, ValueError):
                self._check(tensors)
                raise
            finally:
                if done is None:
                    self._forget(found, steps is not None)
            return done

        done = swept.packs.run(sweep, tensors, self._label(tensors))
        if done is None:
            return False
        if reg is not None:
            value, of_rules, self._zeros = done
            reg._last = Value.of([(value, of_rules)], swept.packs.value_dtype)
            if swept.left and self.mode == "grad":
                reg._last = self._with_left(reg._last, swept, rules)
        return True

    def _with_left(self, value: Value, swept: Swept, rules: Sequence[Penalty]) -> Value:
        """Those without a gradient count in the value, as `Regularizer.accumulate_` has it."""
        left, _ = accumulate(swept.packs_left, swept.left, rules, 1.0, self._label(swept.left))
        dtype = torch.promote_types(value.total.dtype, left.total.dtype)
        return Value(add_values([value.total, left.total], dtype), value.parts + left.parts)

    def _swept_of(self, tensors: list[Tensor], rules: Sequence[Penalty]) -> Swept:
        """What was found out about these parameters; kept until they change."""
        group = None if self.regularizer is None else self.regularizer._active()
        key = (group, list(map(id, tensors)))
        if self._swept is None or self._swept[0] != key:
            row_of = {} if group is None else {id(t): i for i, t in enumerate(group.tensors)}
            rows = [row_of.pop(id(t), None) for t in tensors]
            left = list(row_of.values())

            def packs(rows: Sequence[int | None]) -> Packs:
                rule_of = [0 if i is None else group.packs.rule_of[i] for i in rows]
                pairs = None if group is None else group.packs.anchors
                if pairs is not None:
                    pairs = [(None, None) if i is None else pairs[i] for i in rows]
                return Packs(tuple(rule.name for rule in rules), rule_of, pairs)

            self._swept = (
                key,
                Swept(
                    packs(rows),
                    bytes(i is not None for i in rows),
                    [group.tensors[i] for i in left],
                    packs(left),
                ),
            )
        return self._swept[1]

    @property
    def _sign(self) -> float:
        """What the penalty's gradient is multiplied by, where every group ascends or none."""
        return -1.0 if self.param_groups[0].get("maximize") else 1.0

    def _arguments(self, found: list[Rows], steps: list[float], scale: float) -> tuple[list, ...]:
        """The states, updates, sets and numbers of a native step."""
        updates, sets, numbers, counts = [], [], [], iter(steps)
        states: list[list[Tensor | None]] = [[] for _ in range(max(len(r.states) for r in found))]
        for group, rows in zip(self.param_groups, found, strict=True):
            of: dict[tuple[float, bool], int] = {}
            sign, number = -1.0 if group.get("maximize") else 1.0, len(rows.params)
            own = list(islice(counts, len(rows.counters))) or [0.0] * number
            for step, new in zip(own, rows.new or [False] * number, strict=True):
                if (step, new) not in of:
                    of[step, new] = len(numbers)
                    row = (sign / scale, *self._numbers(group, step, new))
                    numbers.append((row, self._metric(group, step)))
                sets.append(of[step, new])
            updates += [self._update(group)] * number
            for k, state in enumerate(states):
                state += rows.states[k] if k < len(rows.states) else [None] * number
        return states, updates, sets, numbers

    def _metric(self, group: dict[str, Any], step: float) -> Metric:
        """Without its moment, which the sweep knows."""
        if self.regularizer is None or self.mode == "grad":
            return Metric(None, 0.0)
        of_no_state = defaultdict(lambda: None, step=step)
        return metric_of(self)({**group, "centered": False}, of_no_state)

    def _check(self, tensors: list[Tensor]) -> None:
        """Raise, naming it, if a parameter has a gradient or a state that cannot be its own."""
        named = self._label(tensors)
        for i, t in enumerate(tensors):
            check_gradient(t.grad, t, named(i))
            for kind, state in self.state.get(t, {}).items():
                if isinstance(state, Tensor) and kind != "step":
                    check_moment(Metric(state, 0.0), t, named(i))

    def _label(self, tensors: list[Tensor]) -> Label:
        def named(i: int) -> str:
            everyone = self._named()
            k = next(k for k, (_, p) in enumerate(everyone) if p is tensors[i])
            name = everyone[k][0]
            return label(k) if name == label(k) else label(k, name)

        return named

    def _forget(self, found: list[Rows], counted: bool) -> None:
        """Undo what was done for a sweep that did not happen."""
        for rows in found:
            if rows.counters and counted:
                torch._foreach_sub_(rows.counters, 1)
            for p, new in zip(rows.params, rows.new, strict=False):
                if new:
                    self.state.pop(p)

    def _step_by_torch(self, tensors: list[Tensor], scale: Tensor | float | None) -> None:
        """torch's own step, and the penalty beside it as `Regularizer.attach` has it."""
        reg = self.regularizer
        if scale is not None and tensors:
            torch._foreach_div_([t.grad for t in tensors], float(scale))
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
            self._zeros = [t for _, t in reg.trainable() if t.grad is not None]


@untraced
@torch.no_grad()
def _take_step(optimizer: Fused) -> None:
    optimizer._take_step()
