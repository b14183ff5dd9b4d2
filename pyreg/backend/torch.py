"""The torch backend: the oracle's formulas, tensor by tensor. Serves every device and layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..metric import Metric
from ..pack import Pack, StaleLayout, is_freed
from ..penalties import Penalty


class TorchBackend:
    name = "torch"

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def refuses(self, pack: Pack, by_name: bool = False) -> str | None:
        return None

    def check(self, pack: Pack, tensors: Sequence[Tensor]) -> None:
        _check(pack, tensors)

    def differentiable_value(
        self, pack: Pack, tensors: Sequence[Tensor], rules: Sequence[Penalty]
    ) -> Tensor:
        """The value as a graph of torch operations: 0-dim float64."""
        terms = [pack.penalty(i, rules).value(t) for i, t in enumerate(tensors)]
        return torch.stack([term.double() for term in terms]).sum()

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
    ) -> tuple[Tensor, int]:
        value, _ = self.value(pack, tensors, rules)
        present = 0
        for i, t in enumerate(tensors):
            if t.grad is not None:
                add_gradient(pack.penalty(i, rules), t, scale)
                present += 1
        return value, present

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
    ) -> Tensor:
        _check(pack, tensors)
        for i, (t, metric) in enumerate(zip(tensors, metrics, strict=True)):
            apply_prox_in_metric(pack.penalty(i, rules), t, metric)
        return self.value(pack, tensors, rules)[0]

    def stats(self, pack: Pack, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([reference.stats(t) for t in tensors])


def _check(pack: Pack, tensors: Sequence[Tensor]) -> None:
    pack.check_rows(tensors)
    if any(map(is_freed, tensors)):
        raise StaleLayout


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
