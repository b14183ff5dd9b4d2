"""Which parameters the rules of a regularizer cover, and why the others are left out."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from .distributed import gathered
from .penalties import Penalty
from .reference import FORMULAS, compute_dtype
from .text import table


@dataclass(frozen=True)
class Covered:
    """One parameter and what the rules make of it."""

    name: str
    tensor: Tensor
    aliases: tuple[str, ...]  # its other names (tied weights)
    rule: str | None  # the pattern that it belongs to
    penalty: Penalty | None  # that rule's; None if it is not penalised
    excluded_by: str | None  # the pattern of `exclude` that matched

    @property
    def reason(self) -> str:
        """The rule in words: what is done with the parameter and by which pattern."""
        if self.excluded_by is not None:
            why = f"excluded by {self.excluded_by!r}"
        elif self.penalty is None:
            why = "no rule matches"
        else:
            why = f"{self.rule!r}: {self.penalty!r}"
            why += ", anchored" if self.penalty.anchor is not None else ""
            why += ", weighted" if self.penalty.weight is not None else ""
        if not self.tensor.requires_grad:
            why += ", frozen"
        if self.aliases:
            why += f" (also {', '.join(self.aliases)})"
        return why


@dataclass(frozen=True)
class RuleReport:
    """One rule and what it covers now."""

    pattern: str
    penalty: Penalty  # with the strengths of this step; where there is a problem, its schedules
    parameters: int
    frozen: int  # of these, left alone unless include_frozen
    elements: int
    share: float  # of the elements of all parameters
    gradient_norm: float | None = None  # of the penalty alone; lam * sqrt(elements) for L1
    lost: tuple[str, ...] = ()  # parameters whose gradients are too coarse for the penalty's
    problem: str | None = None  # what its schedules raise at this step, or return that they may not


@dataclass(frozen=True)
class Coverage:
    """All parameters of a model and what the rules make of them. `str()` gives tables."""

    rows: list[Covered]
    unmatched: list[str]  # patterns that match no parameter (only without `strict`)
    rules: list[RuleReport] = field(default_factory=list)
    sweeps: list[str] = field(default_factory=list)  # "12 tensors on cpu: native"; why not a faster
    clip: float | None = None  # the norm that gradients are clipped to, if it was given

    @property
    def penalised(self) -> list[Covered]:
        return [row for row in self.rows if row.penalty is not None]

    def __str__(self) -> str:
        whole = sum(row.tensor.numel() for row in self.rows)
        part = sum(row.tensor.numel() for row in self.penalised)
        share = 100 * part / whole if whole else 0.0
        head = (
            f"Regularizer: {len(self.penalised)} of {len(self.rows)} parameters, "
            f"{part:,} of {whole:,} elements ({share:.1f} %)"
        )
        body = table(
            ["parameter", "dtype", "shape", "elements", "rule"],
            [
                [
                    row.name,
                    str(row.tensor.dtype).removeprefix("torch."),
                    "x".join(map(str, row.tensor.shape)) or "scalar",
                    f"{row.tensor.numel():,}",
                    row.reason,
                ]
                for row in self.rows
            ],
            right={3},
        )
        rules = table(
            ["rule", "penalty now", "parameters", "elements", "share", "|gradient|"],
            [
                [
                    repr(rule.pattern),
                    repr(rule.penalty),
                    str(rule.parameters) + (f" ({rule.frozen} frozen)" if rule.frozen else ""),
                    f"{rule.elements:,}",
                    f"{100 * rule.share:.1f} %",
                    "-" if rule.gradient_norm is None else f"{rule.gradient_norm:.3g}",
                ]
                for rule in self.rules
            ],
            right={2, 3, 4, 5},
        )
        tail = [f"pattern {pattern!r} matches no parameter" for pattern in self.unmatched]
        if any(
            r.gradient_norm is None and r.problem is None and FORMULAS[r.penalty.name].grad
            for r in self.rules
        ):
            tail.append("|gradient|, and where it is lost: report(gradients=True)")
        tail += [f"sweep: {line}" for line in self.sweeps]
        norms = [r.gradient_norm for r in self.rules if r.gradient_norm is not None]
        if self.clip is not None and norms:
            norm = math.hypot(*norms)
            tail.append(
                f"|gradient| of the penalty: {norm:.3g}; gradients are clipped to {self.clip:g}"
            )
        for rule in self.rules:
            if rule.problem is not None:
                tail.append(f"warning: rule {rule.pattern!r} cannot be applied now: {rule.problem}")
            if rule.lost:
                more = f" and {len(rule.lost) - 1} more" if len(rule.lost) > 1 else ""
                tail.append(
                    f"warning: rule {rule.pattern!r} adds less to the gradient of {rule.lost[0]}"
                    f"{more} than its dtype resolves"
                )
        parts = [head, body, *([rules] if self.rules else []), *(["\n".join(tail)] if tail else [])]
        return "\n\n".join(parts)


def report_rules(
    coverage: Coverage,
    rules: Mapping[str, Penalty],
    step: int,
    gradients: bool,
    include_frozen: bool,
) -> list[RuleReport]:
    """Each rule's share and, with `gradients`, the norm of its gradient, tensor by tensor.

    Raises:
        ValueError: with `gradients`, a parameter (named) has no numbers.
    """
    whole = max(sum(row.tensor.numel() for row in coverage.rows), 1)
    found = []
    for pattern, penalty in rules.items():
        rows = [row for row in coverage.penalised if row.rule == pattern]
        elements = sum(row.tensor.numel() for row in rows)
        norm, lost, problem = None, [], None
        try:
            penalty = penalty.at(step)
        except Exception as error:  # whatever a schedule raises
            ours = isinstance(error, TypeError | ValueError)
            problem = str(error) if ours else f"{type(error).__name__}: {error}"
        if gradients and problem is None and FORMULAS[penalty.name].grad is not None:
            squares = 0.0
            for row in rows:
                if not (row.tensor.requires_grad or include_frozen):
                    continue
                w = row.tensor.detach()
                if w.device.type == "meta":
                    raise ValueError(f"{row.name!r} is on the meta device: no gradient, no norm")
                g = penalty.of(row.name, *row.aliases).grad(w.to(compute_dtype(w.dtype)))
                squares += gathered(g.double().square().sum()).item()
                if _rounds_away(row.tensor.grad, g):
                    lost.append(row.name)
            norm = math.sqrt(squares)
        frozen = sum(not row.tensor.requires_grad for row in rows)
        found.append(
            RuleReport(
                pattern,
                penalty,
                len(rows),
                frozen,
                elements,
                elements / whole,
                norm,
                tuple(lost),
                problem,
            )
        )
    return found


def _rounds_away(grad: Tensor | None, addend: Tensor) -> bool:
    """Whether most of grad + addend is grad again: the addend is under half of grad's last bit."""
    if grad is None or grad.is_sparse:
        return False
    added = (grad.to(addend.dtype) + addend).to(grad.dtype)
    matters = addend != 0
    same = (added == grad) & matters
    return bool(gathered(same.sum()) * 2 > gathered(matters.sum()))


def resolve(
    named: Sequence[tuple[str, Tensor]],
    rules: Mapping[str, Penalty],
    exclude: Sequence[str],
    strict: bool,
) -> Coverage:
    """Apply the rules to all names. A tensor that stands under several names is one row.

    Raises:
        ValueError: with `strict`, a pattern matches nothing; or nothing is left to penalise.
    """
    names_of: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in named:
        tensors[id(tensor)] = tensor
        names_of.setdefault(id(tensor), []).append(name)
    all_names = [name for name, _ in named]
    unmatched = [p for p in (*exclude, *rules) if not _matches(p, all_names)]
    if unmatched and strict:
        raise ValueError(_unmatched_message(unmatched[0], all_names))
    rows = []
    for key, names in names_of.items():
        excluded_by = next((p for p in exclude if _matches(p, names)), None)
        rule = None
        if excluded_by is None:
            rule = next((p for p in rules if _matches(p, names)), None)
        penalty = None if rule is None else rules[rule]
        rows.append(Covered(names[0], tensors[key], tuple(names[1:]), rule, penalty, excluded_by))
    coverage = Coverage(rows, unmatched)
    if not coverage.penalised:
        raise ValueError(
            f"nothing to penalise: {len(rows)} parameters, none left by rules {list(rules)} and "
            f"exclude {list(exclude)}"
        )
    return coverage


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _unmatched_message(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
    hint = f"names look like {', '.join(map(repr, near))}" if near else "there are no parameters"
    return f"pattern {pattern!r} matches no parameter; {hint} (strict=False allows it)"
