"""What the optimizers share: a step in one sweep, or torch's own step and the penalty's sweep."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..attachment import add_gradients, ascends, metric_of_rows, untraced
from ..dispatch import stepper
from ..metric import Metric, Number, check_moment, gain, metric_of
from ..pack import SWEPT_DTYPES, GradientMismatch, Packs, check_gradient
from ..penalties import L1, Penalty
from ..regularizer import Regularizer
from ..sweeps import Value, accumulate, add_values, prox_in_metric
from .arguments import Rows, arguments
from .precision import MASTER, LowPrecision, Wide, stand_ins, widen_states

Mode = Literal["grad", "prox"]


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


class Fused(LowPrecision):
    """The penalty inside an optimizer's step; a mixin before one of torch's optimizers.

    Args:
        regularizer: a Regularizer, or one penalty for every parameter (of param groups that are
            there from the start).
        mode: "grad" adds the penalty's gradient to the loss's; "prox" takes the proximal step after
            the update, in the optimizer's own metric, which makes exact zeros for L1. As in
            `Regularizer.attach`; `regularizer.last_value` holds each rule's value.

        state_dtype: torch.float32 keeps the states of bfloat16 and float16 parameters in float32;
            None in the parameters' own dtype, as torch does.
        master_weights: keep such parameters in float32 too (`state[p]["master_param"]`); p is their
            rounded copy, and the penalty, its value and its zeros are the master weights'. Change p
            itself between steps (under no_grad) and the next step raises; what is written into
            `p.data` nobody can see, and the next step undoes it.
        stochastic_rounding: instead, round new bfloat16 weights up or down at random, the nearer
            the likelier, so that what is too small for one step is not lost on average. The value
            and the zeros are of the weights before they are rounded.
        seed: of that; a run with the same seed has the same bits, resumed or not.

    These four may differ between param groups. Master weights and stochastic rounding have float32
    states; a step's arithmetic is float32 throughout. (float16 states, torch's default for float16
    parameters, hold no square below 6e-8: the metric of a prox wants float32 ones.)

    The other arguments, the state and `state_dict()` are torch's; a regularizer has a state_dict of
    its own. A step is one sweep where all parameters are dense, without anchors, and on one device:
    the CPU, or a GPU that native CUDA or Triton serves. It then leaves `.grad` as it is, and
    `foreach` and `fused` have no meaning; `capturable` keeps the counters on the GPU, as CUDA
    graphs need. Elsewhere it is torch's own step, and the penalty's sweep beside it.

    Raises:
        ValueError: an unknown mode; a regularizer that is attached already, or over a parameter
            (named) that the optimizer does not hold; `differentiable=True`; master weights and
            stochastic rounding at once, or the latter for float16; master weights of parameters
            that share memory; mode="prox" and a momentum of 1 or more. In a step: master weights
            that disagree with their parameter (named), which was changed or loaded without them.
        TypeError: a regularizer that is none; a seed that is no integer.
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
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
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
        self._zeros: int | Tensor | list[Tensor] | None = None  # or of which to count them
        precision = {
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, *args, **options, **{k: x for k, x in precision.items() if x})
        if isinstance(regularizer, Penalty):
            regularizer = Regularizer(self._named(), regularizer)
        if regularizer is not None:
            if mode == "grad":
                regularizer.check_differentiable()
            else:
                self._check_gain()
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
        elif isinstance(self._zeros, Tensor):
            self._zeros = int(self._zeros)
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

    def _numbers(self, group: dict[str, Any], step: Number, new: bool) -> tuple[Number, ...]:
        """Those of csrc/updates.h, but for the gradient's factor."""
        raise NotImplementedError

    # And what they share:

    def _take_step(self) -> None:
        if self._skipped("cpu"):
            return
        reg = self.regularizer
        if reg is not None:
            reg.check_strengths()
            if self.mode == "grad":
                reg.check_differentiable()
                ascends(self)
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        wide = self._wide()
        if any(t.grad.layout != torch.strided for t in tensors):
            self._check(tensors)
        if not self._step_in_one_sweep(tensors, wide):
            if self._skipped("cuda"):
                return
            self._step_by_torch(tensors, wide)
        self._agree(wide)
        for group in self.param_groups:
            if group.get("stochastic_rounding"):
                group["steps_rounded"] = group.get("steps_rounded", 0) + 1
        if reg is not None:
            reg.advance()

    def _skipped(self, device_type: str) -> bool:
        """Whether a GradScaler says so; asked of a GPU, this waits for it."""
        overflow = getattr(self, "found_inf", None)
        return overflow is not None and overflow.device.type == device_type and bool(overflow)

    def _rows_of(self, group: dict[str, Any], wide: Mapping[int, Wide]) -> Rows:
        """The group's rows; what lies beside those stepped in float32 is made that."""
        rows = self._rows(group)
        of_group = [wide[id(p)] for p in rows.params if id(p) in wide] if wide else []
        changed = [widen_states(self.state[row.param]) for row in of_group]
        for row in of_group:
            if row.mastered:
                self.state[row.param].setdefault(MASTER, row.param.detach().float())
        return self._rows(group)._replace(new=rows.new) if any(changed) else rows

    def _step_in_one_sweep(self, tensors: list[Tensor], wide: list[Wide]) -> bool:
        """Take the step, unless it cannot be one sweep."""
        if not tensors or any(
            t.device.type not in ("cpu", "cuda") or t.dtype not in SWEPT_DTYPES for t in tensors
        ):
            return False
        reg, of_param = self.regularizer, {id(row.param): row for row in wide}
        rules = (L1(0.0),) if reg is None else reg._penalties
        swept = self._swept_of(tensors, rules)

        def sweep(current: list[Any]) -> Any:
            backend = None if len(current) > 1 or current[0].anchors else stepper(current[0])
            if backend is None:
                return None
            found, done = [self._rows_of(group, of_param) for group in self.param_groups], None
            counters, counted = [counter for rows in found for counter in rows.counters], []
            try:
                scaler = self._scaler(current[0].device, counters)
                if scaler is None or (steps := backend.count(counters)) is None:
                    return None
                counted, scale = counters, scaler.pop("scale")
                done = backend.step(
                    current[0],
                    tensors,
                    *arguments(self, found, steps, scale),
                    swept.penalised,
                    self.mode == "prox",
                    rules,
                    self._sign * scale,
                    **self._in_float32(tensors, of_param),
                    **scaler,
                )
            except (GradientMismatch, ValueError):
                self._check(tensors)
                raise
            finally:
                if done is None:
                    self._forget(found, counted)
            if counted and "found_inf" in scaler:
                torch._foreach_sub_(counted, [scaler["found_inf"]] * len(counted))
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

    def _scaler(self, device: torch.device, counters: list[Tensor]) -> dict[str, Any] | None:
        """The loss's scale, and what a sweep on a GPU is told so that nobody waits; None: skip it.

        With counters on the CPU one waits: they must not count a step that is skipped.
        """
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        told: dict[str, Any] = {"scale": 1.0}
        if scale is not None and scale.device.type == "cpu":
            told["scale"] = float(scale)
        elif scale is not None:
            told["grad_scale"] = scale.to(device)
        if overflow is None or overflow.device.type == "cpu":
            return told
        if any(c.device.type == "cpu" for c in counters):
            return None if bool(overflow) else told
        return {**told, "found_inf": overflow.to(device)}

    def _in_float32(self, tensors: list[Tensor], wide: Mapping[int, Wide]) -> dict[str, list[Any]]:
        """What a sweep is told of those that are stepped in float32."""
        rows, told = [wide.get(id(t)) for t in tensors] if wide else [], {}
        if any(row and row.mastered for row in rows):
            told["masters"] = [
                self.state[row.param][MASTER] if row and row.mastered else None for row in rows
            ]
        if any(row and row.key is not None for row in rows):
            told["keys"] = [None if row is None else row.key for row in rows]
        return told

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

    def _check(self, tensors: list[Tensor]) -> None:
        """Raise, naming it, if a parameter has a gradient or a state that cannot be its own."""
        named = self._label(tensors)
        for i, t in enumerate(tensors):
            check_gradient(t.grad, t, named(i))
        self._check_states(tensors)

    def _check_states(self, tensors: list[Tensor]) -> None:
        named = self._label(tensors)
        for i, t in enumerate(tensors):
            for kind, state in self.state.get(t, {}).items():
                if isinstance(state, Tensor) and kind != "step" and t.is_floating_point():
                    fits = (state.shape, state.device) == (t.shape, t.device)
                    fits = fits and state.is_floating_point()
                    check_moment(Metric(state, 0.0), t, "" if fits else named(i))

    def _forget(self, found: list[Rows], counted: list[Tensor]) -> None:
        """Undo what was done for a sweep that did not happen."""
        if counted:
            torch._foreach_sub_(counted, 1)
        for rows in found:
            for p, new in zip(rows.params, rows.new, strict=False):
                if new:
                    self.state.pop(p)

    def _step_by_torch(self, tensors: list[Tensor], wide: list[Wide]) -> None:
        """torch's own step, and the penalty beside it as `Regularizer.attach` has it."""
        reg, scale = self.regularizer, getattr(self, "grad_scale", None)
        if reg is None:
            self._check_states(tensors)
        else:  # what would stop the penalty must not stop it after the step
            self._check(tensors)
            reg.check_ready()
            self._check_gain()
        # They are unscaled now, and this step is not skipped.
        scaler = {k: self.__dict__.pop(k) for k in ("grad_scale", "found_inf") if hasattr(self, k)}
        try:
            with stand_ins(self, wide) as standing:
                if scale is not None and tensors:
                    grads = [standing.get(id(t), t).grad for t in tensors]
                    torch._foreach_div_(grads, float(scale))
                if reg is not None and self.mode == "grad":
                    self._add_gradients(standing)
                inspect.unwrap(self._torch.step)(self)
                if reg is not None and self.mode == "prox":
                    self._prox(standing)
        finally:
            self.__dict__.update(scaler)
        if reg is not None:
            of = {id(row.param): self.state[row.param][MASTER] for row in wide if row.mastered}
            self._zeros = [of.get(id(t), t) for _, t in reg.trainable() if t.grad is not None]

    def _check_gain(self) -> None:
        if self.mode == "prox":
            for group in self.param_groups:
                gain(group)

    def _add_gradients(self, standing: Mapping[int, Tensor]) -> None:
        """The penalty's, to those of the stand-ins too."""
        reg, sign = self.regularizer, self._sign
        if not standing:
            add_gradients(reg, self)
            return
        group = reg._active()
        packs = Packs(group.packs.penalties, group.packs.rule_of, group.packs.anchors)
        instead = [standing.get(id(t), t) for t in group.tensors]
        reg._last, _ = accumulate(packs, instead, reg._penalties, sign, group.label)

    def _prox(self, standing: Mapping[int, Tensor]) -> None:
        """The penalty's, of the stand-ins too."""
        reg, metric = self.regularizer, metric_of_rows(self, metric_of(self))
        if not standing:
            reg._prox(metric)
            return
        group = reg._active()
        instead = [standing.get(id(t), t) for t in group.tensors]
        metrics = list(map(metric, instead))
        moved = [i for i, m in enumerate(metrics) if m is not None]
        if not moved:
            return
        rule_of, anchors = group.packs.rule_of, group.packs.anchors
        packs = Packs(
            group.packs.penalties,
            [rule_of[i] for i in moved],
            None if anchors is None else [anchors[i] for i in moved],
        )
        reg._last = prox_in_metric(
            packs,
            [instead[i] for i in moved],
            [metrics[i] for i in moved],
            reg._penalties,
            lambda i: group.label(moved[i]),
        )


@untraced
@torch.no_grad()
def _take_step(optimizer: Fused) -> None:
    optimizer._take_step()
