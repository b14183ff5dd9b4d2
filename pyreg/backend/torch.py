"""The torch backend: the oracle's formulas, tensor by tensor. Serves every device and layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..metric import Metric
from ..pack import Pack
from ..penalties import Penalty


class Left(NamedTuple):
    """Numbers among those that a sweep left on a device, taken out when they are asked for."""

    numbers: Tensor
    dtype: torch.dtype  # that the numbers are read as
    at: slice
    columns: int | None = None

    def __call__(self) -> Tensor:
        """[at], or [at / columns, columns]."""
        found = self.numbers.view(self.dtype)[self.at]
        return found if self.columns is None else found.view(-1, self.columns)


def taken(numbers: Any, device: torch.device | None = None) -> Tensor:
    """What a backend gives for several numbers (lists, a tensor, what is `Left`) as float64."""
    if callable(numbers):
        numbers = numbers()
    return torch.as_tensor(numbers, dtype=torch.float64, device=device)


class TorchBackend:
    name = "torch"

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def refuses(self, pack: Pack, by_name: bool = False) -> str | None:
        return None

    def steps(self, pack: Pack) -> bool:
        """Whether `step` knows its penalties."""
        return False

    def check(self, pack: Pack, tensors: Sequence[Tensor]) -> None:
        pack.check_rows(tensors)

    def differentiable_value(
        self, pack: Pack, tensors: Sequence[Tensor], rules: Sequence[Penalty]
    ) -> Tensor:
        """The value as a graph of torch operations: 0-dim float64."""
        return torch.stack(_terms(pack, tensors, rules)).sum()

    def value(
        self, pack: Pack, tensors: Sequence[Tensor], rules: Sequence[Penalty]
    ) -> tuple[Tensor, None]:
        with torch.no_grad():
            return self.differentiable_value(pack, tensors, rules), None

    def gradient(
        self,
        pack: Pack,
        tensors: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        rules: Sequence[Penalty],
        scale: float | Tensor,
    ) -> None:
        with torch.no_grad():
            for i, (t, g) in enumerate(zip(tensors, grads, strict=True)):
                if g is not None:
                    g.copy_(_scaled_gradient(pack.penalty(i, rules), t, scale))

    def accumulate(
        self,
        pack: Pack,
        tensors: Sequence[Tensor],
        rules: Sequence[Penalty],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, int]:
        value, of_rules = _values(pack, tensors, rules)
        present = 0
        for i, t in enumerate(tensors):
            if t.grad is not None:
                add_gradient(pack.penalty(i, rules), t, scale)
                present += 1
        return value, of_rules, present

    def prox(
        self, pack: Pack, tensors: Sequence[Tensor], rules: Sequence[Penalty], step: float | Tensor
    ) -> None:
        for i, t in enumerate(tensors):
            apply_prox(pack.penalty(i, rules), t, step)

    def prox_in_metric(
        self,
        pack: Pack,
        tensors: Sequence[Tensor],
        metrics: Sequence[Metric],
        rules: Sequence[Penalty],
    ) -> tuple[Tensor, Tensor]:
        pack.check_rows(tensors)
        for i, (t, metric) in enumerate(zip(tensors, metrics, strict=True)):
            apply_prox_in_metric(pack.penalty(i, rules), t, metric)
        return _values(pack, tensors, rules)

    def stats(self, pack: Pack, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([reference.stats(t) for t in tensors])


def _terms(pack: Pack, tensors: Sequence[Tensor], rules: Sequence[Penalty]) -> list[Tensor]:
    """Each tensor's part of the value."""
    return [pack.penalty(i, rules).value(t).double() for i, t in enumerate(tensors)]


def _values(
    pack: Pack, tensors: Sequence[Tensor], rules: Sequence[Penalty]
) -> tuple[Tensor, Tensor]:
    """The value and [rules] each rule's."""
    with torch.no_grad():
        terms = _terms(pack, tensors, rules)
        zero = torch.zeros((), dtype=torch.float64, device=pack.device)
        of_rules: list[list[Tensor]] = [[zero] for _ in rules]
        for rule, term in zip(pack.rule_of, terms, strict=True):
            of_rules[rule].append(term)
        return torch.stack(terms).sum(), torch.stack([torch.stack(t).sum() for t in of_rules])


def _scaled_gradient(penalty: Penalty, w: Tensor, scale: float | Tensor) -> Tensor:
    """scale * grad in the compute dtype: rounded to w's dtype once, by the caller."""
    return penalty.grad(w.to(reference.compute_dtype(w.dtype))) * scale


def add_gradient(penalty: Penalty, w: Tensor, scale: float | Tensor) -> None:
    """w.grad += scale * grad(w), rounded once."""
    with torch.no_grad():
        w.grad.copy_(
            w.grad.to(reference.compute_dtype(w.dtype)) + _scaled_gradient(penalty, w, scale)
        )


def apply_prox(penalty: Penalty, w: Tensor, step: float | Tensor) -> None:
    """w = prox(w, step)"""
    with torch.no_grad():
        w.copy_(penalty.prox(w, step))


def apply_prox_in_metric(penalty: Penalty, w: Tensor, metric: Metric) -> None:
    """w = prox(w, step of each element)"""
    apply_prox(penalty, w, reference.metric_step(*metric, dtype=w.dtype))


def flat_sets(numbers: Sequence[tuple[Sequence[float], Metric]]) -> list[float]:
    """The sets of numbers of a step one after the other, 12 each: the 9 of an update, and the
    metric's numerator, factor and offset."""
    flat = []
    for own, metric in numbers:
        flat += [*own, *[0.0] * (9 - len(own))]
        flat += [metric.numerator, metric.factor, metric.offset]
    return flat
