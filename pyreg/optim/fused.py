"""What the optimizers share: a step in one sweep of each device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from operator import attrgetter, itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..attachment import Mode, ascends, check_held, untraced
from ..dispatch import stepper
from ..look import count
from ..metric import Metric, Number, check_moment, gain
from ..pack import GradientMismatch, stand_in
from ..penalties import L1, Penalty
from ..regularizer import Regularizer
from ..sweeps import Value, accumulate, add_up, add_values, changed
from ..tensors import SWEPT_DTYPES, check_apart, check_gradient, check_writable
from .arguments import Rows, arguments, lay_gradients, on_this_rank
from .by_torch import step_by_torch
from .parts import Part, Plan, Stepped, plan_of
from .precision import MASTER, LowPrecision, Wide, widen_states


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
    its own. A step is one sweep of each device, the CPU or a GPU that native CUDA or Triton serves,
    where all its parameters are dense and without anchors. It then leaves `.grad` as it is, and
    `foreach` and `fused` have no meaning; `capturable` keeps the counters on the GPU, as CUDA
    graphs need. Elsewhere it is torch's own step, and the penalty's sweep beside it.

    Raises:
        ValueError: an unknown mode; a regularizer that is attached already, or over a parameter
            (named) that the optimizer does not hold; `differentiable=True`; master weights and
            stochastic rounding at once, or the latter for float16; master weights of parameters
            that share memory; mode="prox" and a momentum of 1 or more. In a step: master weights
            that disagree with their parameter (named), which was changed or loaded without them; a
            parameter (named) that is penalised by now and not the optimizer's; a state (named) of
            which a part is missing; mode="grad" and two gradients (named) in one
            memory.
        TypeError: a regularizer that is none; a seed that is no integer.
        RuntimeError: mode="grad" and a penalty that has no gradient (L0). In a step that a CUDA
            graph captures: stochastic rounding, or counters on the CPU (capturable=False).
    """

    _step_supports_amp_scaling = True
    _torch: ClassVar[type[Optimizer]]  # what this class adds to
    _lists: ClassVar[int]  # that its _init_group fills

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
        self._plan: tuple[Any, Plan] | None = None
        self._zeros: list[Any] | None = None  # each part's
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
        own = {"regularizer": self.regularizer, "mode": self.mode, "_plan": None, "_zeros": None}
        return {**super().__getstate__(), **own}

    @property
    def last_zeros(self) -> int | None:
        """How many penalised weights the last step left at exactly 0; None before the first."""
        if self._zeros is not None:
            self._zeros = [sum(map(int, self._zeros))]
            return self._zeros[0]
        return None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a closure is called first, and what it returns is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _take_step(self)
        return loss

    # What each class has of its own:

    def _states(self, group: dict[str, Any]) -> list[str]:
        """The names of what lies beside a parameter, in the order of csrc/updates.h."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any]) -> str:
        """The name of its update."""
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any], step: Number, new: bool) -> tuple[Number, ...]:
        """Those of csrc/updates.h, but for the gradient's factor."""
        raise NotImplementedError

    # And what they share:

    def _rows(self, group: dict[str, Any]) -> Rows:
        """Those with a gradient. Where a state is missing torch makes it, or it raises."""
        params, names = with_gradient(group), [*self._states(group), "step"]

        def beside() -> list[list[Any]]:
            states = list(map(self.state.get, params, repeat({})))
            return [list(map(itemgetter(name), states)) for name in names]

        try:
            *states, counters = beside()
        except KeyError:
            self._listed(group)
            *states, counters = beside()
        return Rows(params, states, counters, ())

    def _listed(self, group: dict[str, Any]) -> list[list[Any]]:
        """The lists that torch makes of the group: those with a gradient, and what lies beside.

        Raises ValueError, naming the parameter, if a part of its state is missing.
        """
        lists: list[list[Any]] = [[] for _ in range(self._lists)]
        try:
            self._init_group(group, *lists)
        except KeyError as error:
            if error.args[0] in self.defaults:  # an option of the group
                raise
            raise ValueError(
                f"{self._label(lists[0][-1:])(0)}: its state in the optimizer lacks {error}; "
                "delete optimizer.state[p] to begin anew"
            ) from None
        return lists

    def _take_step(self) -> None:
        if "capturable" in self.param_groups[0]:  # as torch's step does
            _CHECK_CAPTURE(self)
        if self._skipped("cpu"):
            return
        reg = self.regularizer
        if reg is not None:
            reg.check_strengths()
            if self.mode == "grad":
                reg.check_differentiable()
                ascends(self)
        tensors = [p for group in self.param_groups for p in with_gradient(group)]
        wide = self._wide()
        if not {*map(_layout, map(_grad, tensors))} <= {torch.strided}:
            self._check(tensors)
        plan = self._plan_of(tensors)
        if len(plan.parts) > 1:  # what would stop one must not stop it after another
            self._check_before_torch(tensors)
        done = [self._step_part(part, part.take(tensors), wide) for part in plan.parts]
        if any(stepped is None for stepped in done):
            return  # skipped
        if reg is not None and done:
            self._remember(done, plan)
        self._agree(wide)
        for group in self.param_groups:
            if group.get("stochastic_rounding"):
                group["steps_rounded"] = group.get("steps_rounded", 0) + 1
        if reg is not None:
            reg.advance()

    def _step_part(self, part: Part, tensors: list[Tensor], wide: list[Wide]) -> Stepped | None:
        """None where a GradScaler says that the step is to be skipped."""
        own = part.ids(tensors)
        if own is not None:
            wide = [row for row in wide if id(row.param) in own]
        done = self._step_in_one_sweep(part, tensors, wide)
        if done is None and not self._skipped("cuda"):
            done = step_by_torch(self, part, tensors, wide)
        return done

    def _remember(self, done: list[Stepped], plan: Plan) -> None:
        """The step's value and zeros."""
        self._zeros = [stepped.zeros for stepped in done]
        values = [stepped.value for stepped in done if stepped.value is not None]
        if plan.left and self.mode == "grad" and not any(stepped.all_counted for stepped in done):
            # Those without a gradient count, as `Regularizer.accumulate_` has it.
            left, rules = plan.left, self.regularizer._penalties
            values.append(accumulate(plan.packs_left, left, rules, 1.0, self._label(left))[0])
        if values:
            wide = any(value.total.dtype == torch.float64 for value in values)
            self.regularizer._last = Value(
                add_values(
                    [value.total for value in values], torch.float64 if wide else torch.float32
                ),
                [part for value in values for part in value.parts],
            )

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

    def _step_in_one_sweep(
        self, part: Part, tensors: list[Tensor], wide: list[Wide]
    ) -> Stepped | None:
        """Take the part's step; None where it cannot be one sweep, and nothing was done."""
        if not tensors or not {*map(_dtype, tensors)} <= {*SWEPT_DTYPES}:
            return None
        if not {device.type for device in {*map(_device, tensors)}} <= {"cpu", "cuda"}:
            return None
        reg, of_param = self.regularizer, {id(row.param): row for row in wide}
        rules = (L1(0.0),) if reg is None else reg._penalties
        groups, named = part.param_groups(self.param_groups, tensors), self._label(tensors)

        def sweep(current: list[Any]) -> Any:
            if len(current) > 1:  # one was moved to another device since
                self._plan = None
                return None
            pack, *_ = current
            backend = None if pack.anchors else stepper(pack)
            if backend is None:
                return None
            found, done = [self._rows_of(group, of_param) for group in groups], None
            counters, counted = [counter for rows in found for counter in rows.counters], []
            try:
                rows = pack.local(tensors, stand_in)
                if pack.shards is not None:
                    lay_gradients(rows)
                scaler = self._scaler(pack.device, counters)
                if scaler is None or (steps := count(counters)) is None:
                    return None
                counted, scale = counters, scaler.pop("scale")
                told = arguments(self, groups, found, steps, scale)
                in_float32 = self._in_float32(tensors, of_param)
                if pack.shards is not None:
                    told, in_float32 = on_this_rank(told, in_float32, tensors, named)
                done = backend.step(
                    pack,
                    rows,
                    *told,
                    part.penalised,
                    self.mode == "prox",
                    rules,
                    self._sign * scale,
                    **in_float32,
                    **scaler,
                )
                if done is not None:
                    changed(pack, tensors)
            except GradientMismatch:  # or gradients that only share memory
                self._check(tensors)
                return None
            except ValueError:
                self._check(tensors)
                raise
            finally:
                if done is None:
                    self._forget(found, counted)
            if counted and "found_inf" in scaler:
                torch._foreach_sub_(counted, [scaler["found_inf"]] * len(counted))
            if done is None or reg is None:
                return None if done is None else Stepped()
            value, of_rules, zeros = done
            if pack.shards is not None and any(part.penalised):
                # (Asked in the order of `step_by_torch`, which may be another rank's way.)
                [value], [of_rules] = add_up(current, [value], [of_rules])
                [zeros] = add_up(current, [zeros])[0]
            value = add_values([value], part.packs.value_dtype)
            return Stepped(Value(value, [of_rules]), zeros)

        return part.packs.run(sweep, tensors, named)

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

    def _plan_of(self, tensors: list[Tensor]) -> Plan:
        """Kept until there are other parameters."""
        penalised = None if self.regularizer is None else self.regularizer._active()
        key = (penalised, list(map(id, tensors)))
        if self._plan is None or self._plan[0] != key:
            if penalised is not None:
                check_held(self.regularizer, self)
            self._plan = (key, plan_of(penalised, tensors))
        return self._plan[1]

    @property
    def _sign(self) -> float:
        """What the penalty's gradient is multiplied by, where every group ascends or none."""
        return -1.0 if self.param_groups[0].get("maximize") else 1.0

    def _check(self, tensors: list[Tensor]) -> None:
        """Raise, naming it, if a parameter has a gradient or a state that cannot be its own."""
        named = self._label(tensors)
        for i, t in enumerate(tensors):
            check_writable(t, named(i))
            check_gradient(t.grad, t, named(i))
        if self.regularizer is not None and self.mode == "grad":
            check_apart([t.grad for t in tensors], named)
        self._check_states(tensors)

    def _check_states(self, tensors: list[Tensor]) -> None:
        for group in self.param_groups:
            self._listed({**group, "params": [p for p in group["params"] if self.state.get(p)]})
        named = self._label(tensors)
        for i, t in enumerate(tensors):
            for kind, state in self.state.get(t, {}).items():
                if isinstance(state, Tensor) and kind != "step" and t.is_floating_point():
                    fits = (state.shape, state.device) == (t.shape, t.device)
                    fits = fits and state.is_floating_point()
                    check_moment(Metric(state, 0.0), t, "" if fits else named(i))

    def _check_before_torch(self, tensors: list[Tensor]) -> None:
        """Raise what would stop the penalty, which must not stop it after the step."""
        if self.regularizer is None:
            self._check_states(tensors)
        else:
            self._check(tensors)
            self.regularizer.check_ready()
            self._check_gain()

    def _check_gain(self) -> None:
        if self.mode == "prox":
            for group in self.param_groups:
                gain(group)

    def _forget(self, found: list[Rows], counted: list[Tensor]) -> None:
        """Undo what was done for a sweep that did not happen."""
        if counted:
            torch._foreach_sub_(counted, 1)
        for rows in found:
            for p, new in zip(rows.params, rows.new, strict=False):
                if new:
                    self.state.pop(p)


# Raises if a step is captured in a CUDA graph that would replay a counter of now. (Until torch 2.10
# it had another name.)
_CHECK_CAPTURE = getattr(
    Optimizer,
    "_accelerator_graph_capture_health_check",
    getattr(Optimizer, "_cuda_graph_capture_health_check", lambda optimizer: None),
)


_grad, _layout, _dtype, _device = map(attrgetter, ("grad", "layout", "dtype", "device"))


def with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None]


@untraced
@torch.no_grad()
def _take_step(optimizer: Fused) -> None:
    optimizer._take_step()
