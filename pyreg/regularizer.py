"""A regularizer: which penalty applies to which parameters of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import autograd, ops, sweeps
from .attachment import Attachment, Coupling, Mode, check_held
from .coverage import Coverage, Covered, report_rules, resolve
from .dispatch import choose, requested
from .look import make_ready, require_grad, unchanged
from .members import pairs_of, slots_of
from .metric import Metric
from .pack import Packs
from .penalties import (
    Penalty,
    check_differentiable,
    check_strengths,
)
from .stats import Stats
from .strengths import check_scale, check_strength, check_weight
from .tensors import Pair, check, check_gradients, check_memory, check_pair, label


class _Group:
    """Some of the covered parameters, with the packs of their sweeps."""

    def __init__(
        self,
        covered: Sequence[Covered],
        rules: Mapping[str, Penalty],
        pairs: Mapping[str, Pair] | None,
    ) -> None:
        self.covered = covered
        self.part: _Group = self
        self.part_flags = b""
        self.names = [row.name for row in covered]
        self.tensors = [row.tensor for row in covered]
        patterns, kinds = list(rules), tuple(rule.name for rule in rules.values())
        anchors = None if pairs is None else [pairs[row.name] for row in covered]
        self.packs = Packs(kinds, [patterns.index(row.rule) for row in covered], anchors)

    def label(self, i: int) -> str:
        return label(i, self.names[i])


class Regularizer:
    """sum over rules of Omega_rule(the parameters that it matches)

    A parameter belongs to the first rule whose pattern matches it; `exclude` comes before all
    rules. A parameter with several names (tied weights) counts once: it is excluded if any of its
    names is, and else belongs to the first rule that matches any of them. Frozen parameters
    (`requires_grad=False` at the time of a call) are left alone unless `include_frozen`.

    Parameters may be moved, cast or replaced between calls (`module.to(...)`, `p.data = ...`, a new
    `nn.Parameter`, `nn.utils.parametrize`); the next call sees it. A parameter that is *added* to
    the module is seen only by a new Regularizer.

    Parameters may be DTensors (FSDP2, tensor parallelism): sweeps visit what the rank holds, and a
    value is summed over the ranks that hold other parts, all of which must make the call.

    Args:
        model: a module, a mapping, or an iterable of (name, tensor) pairs.
        rules: {pattern: penalty}, tried in order, or one penalty for everything. Patterns are
            shell globs on the full name, case sensitive: `*` also crosses dots.
        exclude: patterns of parameters to leave out.
        include_frozen: penalise frozen parameters too.
        strict: raise if a pattern matches nothing; False only reports it.

    Raises:
        ValueError: a pattern matches nothing, nothing is left to penalise, or (naming it) a
            parameter's memory is gone.
        TypeError: (naming it) a covered parameter cannot be penalised.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        rules: Mapping[str, Penalty] | Penalty,
        *,
        exclude: Sequence[str] = (),
        include_frozen: bool = False,
        strict: bool = True,
    ) -> None:
        if not isinstance(rules, Penalty | Mapping):
            raise TypeError(f"rules: expected {{pattern: penalty}} or a penalty, got {rules!r}")
        self.rules = {"*": rules} if isinstance(rules, Penalty) else dict(rules)
        for pattern, penalty in self.rules.items():
            _check_pattern(pattern, "rules")
            if not isinstance(penalty, Penalty):
                raise TypeError(f"rules[{pattern!r}]: expected a penalty, got {penalty!r}")
        # Mappings as they are now, whatever becomes of their entries.
        self.rules = {pattern: rule.settled() for pattern, rule in self.rules.items()}
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude or ())
        for pattern in self.exclude:
            _check_pattern(pattern, "exclude")
        self.include_frozen = include_frozen
        self.strict = strict
        self.step = 0
        self._model = model if isinstance(model, nn.Module) else None
        self._pairs = [] if self._model is not None else pairs_of(model)
        self._attachment: Attachment | None = None
        self._last: sweeps.Value | None = None
        make_ready()
        self._resolve()

    def __call__(self) -> Tensor:
        """sum over rules of Omega, differentiable in the parameters and in tensor strengths.

        Returns:
            0-dim, on the first penalised parameter's device, float32 (float64 when any of them is);
            0 when all of them are frozen.
        """
        if torch.compiler.is_compiling():
            return self._traced()
        group = self._active()
        if not group.tensors:
            return self._zero()
        return autograd.value(group.packs, group.tensors, self._penalties, group.label)

    def accumulate_(self, scale: float | Tensor = 1.0, *, create_grads: bool = False) -> Tensor:
        """p.grad += scale * gradient of the penalty, in one launch; returns the value.

        Reads 2 N, writes N, and allocates next to nothing. It takes the place of a penalty in the
        loss: call it after the last `backward()` of a step and before `optimizer.step()`, once per
        step whatever the number of micro-batches. A parameter without a gradient keeps none, and
        still counts in the value.

        Args:
            scale: a finite factor on the gradient, not on the value (a loss scale, say).
            create_grads: first give a zero gradient to each parameter without one.

        Returns:
            The value, as from calling the regularizer, detached.

        Raises:
            RuntimeError: no parameter at all has a gradient, so that nothing was added; or the
                penalty of one has none (L0).
            TypeError, ValueError: a scale that is not a finite number; a gradient that cannot be
                its parameter's, or is another's too, by name. Nothing was written then.
        """
        value, present = self._accumulate(self._active(), scale, create_grads)
        if present == 0:
            raise RuntimeError(
                "accumulate_: no penalised parameter has a gradient; call it after backward(), or "
                "pass create_grads=True"
            )
        return value

    def prox_(self, step: float | Tensor) -> None:
        """w = argmin_u Omega(u) + (u - w)^2 / (2 step), in place, in one launch.

        Reads N, writes N. After `optimizer.step()` of plain SGD on the loss alone, with step = the
        learning rate, this is proximal gradient descent. For L1 it makes exact zeros.

        Args:
            step: a finite number >= 0, or a 0-dim tensor of that.

        Raises:
            ValueError: the step is negative or not finite, or (naming it) a parameter is expanded
                and cannot be changed in place; nothing was written then.
        """
        check_strength("step", step)
        group = self._active()
        if group.tensors:
            sweeps.prox(group.packs, group.tensors, self._penalties, step, group.label)

    def attach(
        self,
        optimizer: Optimizer,
        mode: Mode = "grad",
        metric: str = "optimizer",
        *,
        coupling: Coupling = "lr",
    ) -> Attachment:
        """From now on, penalise in every `optimizer.step()`: once per step, whatever led to it.

        mode="grad" adds the penalty's gradient to each `.grad` before the step: after gradients
        were accumulated over micro-batches, unscaled and clipped, so that the penalty is counted
        once and never clipped. Where the optimizer unscales gradients itself (`grad_scale`, set by
        a GradScaler), the penalty's is scaled like them. mode="prox" takes the proximal step after
        the step, which makes exact zeros where the penalty has a kink:

            w = argmin_u Omega(u) + 1 / (2 lr) * sum_i D_i (u_i - w_i)^2

        metric="optimizer": D is the optimizer's own, from its live state (see `pyreg.metric`), so
        that the fixed point solves the stated problem. metric="identity": D = 1, the decoupled
        form; under an adaptive optimizer weight i is then penalised with strength lam * D_i.

        coupling says what stands for lr in that step. "lr": the group's learning rate now, which
        solves the stated problem. "schedule": lr / initial_lr, as in decoupled weight decay: the
        penalty follows the learning rate's schedule, and is independent of where that began.
        "none": 1, whatever the learning rate: for L1 and D = 1, every step takes lam off.

        Each param group's own lr counts; a step that a GradScaler skips changes nothing, and a
        parameter without a gradient is left alone. (Where a fused optimizer skips it on a GPU, a
        schedule counts it: nobody waits to know.) A copy of the regularizer is not attached.
        `last_value` then holds the latest values. Not
        to be combined with reg() in the loss, which would count twice.

        Args:
            optimizer: one of torch.optim, or with the same step hooks. It must hold every penalised
                parameter that is not frozen.
            coupling: for mode="prox"; the gradient of mode="grad" is always multiplied by lr.

        Returns:
            The attachment, whose `detach()` ends it, as `Regularizer.detach()` does.

        Raises:
            ValueError: already attached; a penalised parameter (named) is not the optimizer's; an
                unknown mode, metric or coupling; a strength that requires a gradient; a proximal
                step on parameters with master weights; LBFGS. In a step: a parameter (named) that
                is penalised by now and not the optimizer's; a state (named) without what the metric
                takes.
            TypeError: no optimizer, or one without step hooks.
            RuntimeError: a penalty that has no gradient (L0), with mode="grad".

        Source: Yun, Lozano, Yang (2021), "Adaptive proximal gradient methods for structured neural
        networks"; Duchi & Singer (2009), "Efficient online and batch learning using forward
        backward splitting", for D = 1; Loshchilov & Hutter (2019), "Decoupled weight decay
        regularization", for "schedule".
        """
        self._check_free()
        self._attachment = Attachment(self, optimizer, mode, metric, coupling)
        return self._attachment

    def join(self, inside: Any) -> None:
        """Belong to the pyreg optimizer `inside.optimizer`, until `inside.detach()`."""
        self._check_free()
        check_held(self, inside.optimizer)
        self._attachment = inside

    def _check_free(self) -> None:
        """Raise ValueError if it cannot be in an optimizer's step, or is in another's."""
        if self._attachment is not None:
            raise ValueError(
                f"already attached to {type(self._attachment.optimizer).__name__}; detach() first"
            )
        for pattern, rule in self.rules.items():
            for name in rule.parameters:
                s = getattr(rule, name)
                if isinstance(s, Tensor) and s.requires_grad:
                    raise ValueError(
                        f"rules[{pattern!r}]: {name} requires a gradient, which it gets from reg() "
                        "in the loss only; detach it for a penalty in the optimizer's step"
                    )

    def detach(self) -> None:
        """End what `attach` began; without it, nothing happens."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def release(self, attachment: Attachment) -> None:
        """Forget an attachment that ended."""
        if self._attachment is attachment:
            self._attachment = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: they are not attached, as optimizers' hooks are not copied."""
        attached = isinstance(self._attachment, Attachment)
        return {**self.__dict__, "_attachment": None if attached else self._attachment}

    @property
    def last_value(self) -> dict[str, Tensor] | None:
        """{pattern: value} of each rule in the last `accumulate_` or attached step, for logging.

        0-dim tensors like the value, on its device: nothing waits for it. A prox's are those of
        the new weights that the step moved. None before the first.
        """
        if self._last is None:
            return None
        return dict(zip(self.rules, self._last.of_rules(), strict=True))

    def advance(self) -> None:
        """Count an optimizer step, for strengths that are schedules; an attached one does it."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step, and the numbers of strengths that are tensors.

        Strengths that are numbers and schedules belong to the program, as rules do.
        """
        tensors = {
            pattern: {
                name: s.detach().clone()
                for name in rule.parameters
                if isinstance(s := getattr(rule, name), Tensor)
            }
            for pattern, rule in self.rules.items()
        }
        return {"step": self.step, "strengths": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()`: the step, and strengths that are tensors, in place.

        Raises:
            ValueError, TypeError: it is of other rules, or holds what cannot be a step or a
                strength; nothing was changed then.
        """
        if not isinstance(state, Mapping) or not {"step", "strengths"} <= set(state):
            raise ValueError("state_dict: expected one with a 'step' and 'strengths'")
        own, saved, step = self.state_dict()["strengths"], state["strengths"], state["step"]
        if not isinstance(saved, Mapping) or not all(
            isinstance(names, Mapping) for names in saved.values()
        ):
            raise TypeError(
                f"state_dict: strengths: expected {{pattern: {{name: number}}}}, got {saved!r}"
            )
        if {p: set(own[p]) for p in own} != {p: set(saved[p]) for p in saved}:
            raise ValueError(
                f"state_dict of other rules: expected tensors {_names(own)}, got {_names(saved)}"
            )
        if isinstance(step, bool) or not isinstance(step, Integral) or step < 0:
            raise ValueError(f"state_dict: expected a step >= 0, got {step!r}")
        loaded = []
        for pattern, names in saved.items():
            for name, number in names.items():
                rule, tensor = self.rules[pattern], getattr(self.rules[pattern], name)
                if callable(number) and not isinstance(number, Tensor):
                    raise TypeError(f"state_dict: {pattern!r}, {name}: a schedule, got {number!r}")
                number = rule._check(name, number)
                number = torch.as_tensor(number, dtype=tensor.dtype, device=tensor.device)
                loaded.append((tensor, rule._check(name, number)))  # it may have overflowed
        with torch.no_grad():
            for tensor, number in loaded:
                tensor.copy_(number)
        self.step = int(step)

    @property
    def _penalties(self) -> tuple[Penalty, ...]:
        """The rules' penalties with their strengths now."""
        return tuple([rule.at(self.step) for rule in self.rules.values()])

    def trainable(self) -> list[tuple[str, Tensor]]:
        """(name, parameter) of what is penalised now: covered, and not frozen."""
        group = self._active()
        return list(zip(group.names, group.tensors, strict=True))

    def check_differentiable(self) -> None:
        """Raise RuntimeError if a parameter is penalised now by what has no gradient (L0)."""
        group, rules = self._active(), tuple(self.rules.values())
        check_differentiable(rules, group.packs.rule_of, group.tensors, True)

    def check_strengths(self) -> None:
        """Raise ValueError or TypeError if a strength is bad by now: a schedule's, or a tensor."""
        check_strengths(self._penalties)

    def check_ready(self) -> _Group:
        """What is penalised now.

        Raises, naming the parameter, if a sweep would: a bad strength, an anchor or weight that
        cannot be its parameter's by now, a backend that was asked for and cannot serve.
        """
        self.check_strengths()
        group = self._active()
        for i, pair in enumerate(group.packs.anchors or ()):
            check_pair(pair, group.tensors[i], group.label(i))
        if requested() != "auto":
            for pack in group.packs.current(group.tensors, group.label):
                choose(pack)
        return group

    def _accumulate(
        self, group: _Group, scale: float | Tensor, create_grads: bool = False
    ) -> tuple[Tensor, int]:
        """The group's value, and how many gradients were added to."""
        check_scale(scale)
        if not group.tensors:
            self._last = sweeps.Value(self._zero(), [[0.0] * len(self.rules)])
            return self._last.total, 1
        rules = self._penalties
        check_differentiable(rules, group.packs.rule_of, group.tensors, True, create_grads)
        if create_grads:
            check_gradients([t.grad for t in group.tensors], group.tensors, group.label)
            for t in group.tensors:
                if t.grad is None:
                    t.grad = torch.zeros_like(t)
        self._last, present = sweeps.accumulate(
            group.packs, group.tensors, rules, scale, group.label
        )
        return self._last.total, present

    def _prox(self, metric: Callable[[Tensor], Metric | None]) -> None:
        """The proximal step in each parameter's metric; one without a metric is left alone."""
        group = self._active()
        metrics = self.metrics(group, metric)
        group = self._part(group, bytes(m is not None for m in metrics))
        if group.tensors:
            found = [m for m in metrics if m is not None]
            self._last = sweeps.prox_in_metric(
                group.packs, group.tensors, found, self._penalties, group.label
            )

    def metrics(
        self, group: _Group, metric: Callable[[Tensor], Metric | None]
    ) -> list[Metric | None]:
        """Of each parameter of the group.

        Raises ValueError, naming it, if the optimizer's state of one lacks what its metric takes.
        """
        found: list[Metric | None] = []
        try:
            for t in group.tensors:
                found.append(metric(t))
        except KeyError as error:
            raise ValueError(
                f"{group.label(len(found))}: its state in the optimizer lacks {error}, which the "
                "optimizer's metric is made of; metric='identity' takes nothing from there"
            ) from None
        return found

    def stats(self) -> Stats:
        """sum |w|, sum w^2, max |w|, zeros and non-finite elements of every covered parameter.

        One launch; reads N. Frozen parameters are included.
        """
        self._refresh()
        group = self._covered
        table = sweeps.stats(group.packs, group.tensors, group.label)
        return Stats(list(group.names), [t.numel() for t in group.tensors], table)

    def report(self, *, gradients: bool = False, clip: float | None = None) -> Coverage:
        """Every parameter and rule, as data: who is covered, aliases, strengths now, sweeps.

        A schedule that fails at this step is its rule's `problem`, and raises nothing here.

        Args:
            gradients: also measure the norm of each rule's gradient (lam * sqrt(elements) for L1),
                and list the parameters whose `.grad` is of a dtype too coarse to hold what the rule
                adds. Takes some passes over the parameters.
            clip: the norm that gradients are clipped to, to be shown beside it.
        """
        self._refresh()
        group = self._covered
        lines = []
        for pack in group.packs.current(group.tensors, group.label):
            backend, reason = choose(pack)
            because = f" ({reason})" if reason else ""
            held = "" if pack.shards is None else f", {pack.shards}"
            where = f"{len(pack.rows)} tensors on {pack.device}{held}"
            lines.append(f"{where}: {backend.name}{because}")
        found = self._coverage
        rules = report_rules(found, self.rules, self.step, gradients, self.include_frozen)
        return Coverage(found.rows, found.unmatched, rules, lines, clip)

    def __repr__(self) -> str:
        return str(self.report())

    def _resolve(self) -> None:
        """Apply the rules to the parameters that the model has now."""
        named = self._pairs
        if self._model is not None:
            named = list(self._model.named_parameters(remove_duplicate=False))
        self._coverage = resolve(named, self.rules, self.exclude, self.strict)
        covered = self._coverage.penalised
        for i, row in enumerate(covered):
            check(row.tensor, label(i, row.name))
            check_memory(row.tensor, label(i, row.name))
        self._anchors = None
        if any(rule.is_anchored for rule in self.rules.values()):
            self._anchors = {
                row.name: _pair(self.rules[row.rule], row, label(i, row.name))
                for i, row in enumerate(covered)
            }
        self._covered = self._group(covered)
        names = [name for row in covered for name in (row.name, *row.aliases)]
        self._slots = [] if self._model is None else slots_of(self._model, names)

    def _group(self, covered: Sequence[Covered]) -> _Group:
        return _Group(covered, self.rules, self._anchors)

    def _refresh(self) -> None:
        """Resolve again if the module holds other parameters by now."""
        if not unchanged(self._slots):
            self._resolve()

    def _active(self) -> _Group:
        """The covered parameters that are not frozen now."""
        self._refresh()
        if self.include_frozen:
            return self._covered
        return self._part(self._covered, require_grad(self._covered.tensors))

    def _part(self, group: _Group, flags: bytes) -> _Group:
        """The flagged members of a group; the last answer for each group is kept."""
        if group.part_flags != flags:
            chosen = [row for row, flag in zip(group.covered, flags, strict=True) if flag]
            group.part = group if all(flags) else self._group(chosen)
            group.part_flags = flags
        return group.part

    def _traced(self) -> Tensor:
        """The value while torch.compile traces: no caches; it guards the module's parameters."""
        group = self._covered
        tensors = group.tensors
        if self._model is not None:
            now = dict(self._model.named_parameters())
            tensors = [now[name] for name in group.names]
        active = [i for i, t in enumerate(tensors) if self.include_frozen or t.requires_grad]
        if not active:
            return self._zero()
        tensors = [tensors[i] for i in active]
        rule_of = [group.packs.rule_of[i] for i in active]
        if (anchors := group.packs.anchors) is not None:
            pairs = [anchors[i] for i in active]
            return autograd.traced_value(tensors, self._penalties, rule_of, pairs)
        return ops.value(tensors, self._penalties, rule_of)

    def _zero(self) -> Tensor:
        t = self._covered.tensors[0]
        return torch.zeros((), dtype=torch.float32, device=t.device)


def _pair(rule: Penalty, row: Covered, label: str) -> Pair:
    """The anchor and weights of one parameter."""
    try:
        beside = rule.beside(row.name, *row.aliases)
    except KeyError as error:
        kind = error.args[0]
        raise ValueError(
            f"{label}: rule {row.rule!r} has no {kind} for it; give it one, or a rule of its own"
        ) from None
    check_pair(beside, row.tensor, label)
    if (weight := beside[1]) is not None:
        check_weight(weight, row.tensor.dtype, f"{label}: its weight")
    return beside


def _names(strengths: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[str]]:
    return {pattern: list(names) for pattern, names in strengths.items()}


def _check_pattern(pattern: object, where: str) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{where}: expected a pattern, got {pattern!r}")
