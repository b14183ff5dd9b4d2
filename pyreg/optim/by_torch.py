"""A step that cannot be one sweep: torch's own, and the penalty's sweep beside it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..attachment import add_gradients, ascends, metric_of_rows
from ..distributed import is_dtensor, place_gradient, shards_of
from ..metric import metric_of
from ..sweeps import Value, accumulate, prox_in_metric
from .parts import Part, Stepped, Uncounted
from .precision import MASTER, Wide, stand_ins

if TYPE_CHECKING:
    from .fused import Fused


def step_by_torch(optimizer: Fused, part: Part, tensors: list[Tensor], wide: list[Wide]) -> Stepped:
    """torch's own step, and the penalty beside it as `Regularizer.attach` has it."""
    reg, scale = optimizer.regularizer, getattr(optimizer, "grad_scale", None)
    optimizer._check_before_torch(tensors)
    sharded = any(map(is_dtensor, tensors))
    whole = part.rows is None and not sharded  # (ranks add up part by part)
    for t in tensors if sharded else ():
        place_gradient(t)
    # They are unscaled now, and this step is not skipped.
    kept, value = vars(optimizer), None
    scaler = {k: kept.pop(k) for k in ("grad_scale", "found_inf") if k in kept}
    groups = part.param_groups(optimizer.param_groups, tensors)
    try:
        with _holding(optimizer, groups), stand_ins(optimizer, wide) as standing:
            if scale is not None and tensors:
                grads = [standing.get(id(t), t).grad for t in tensors]
                torch._foreach_div_(grads, float(scale))
            if reg is not None and optimizer.mode == "grad":
                value = _add_gradients(optimizer, whole, tensors, standing)
            inspect.unwrap(optimizer._torch.step)(optimizer)
            if reg is not None and optimizer.mode == "prox":
                value = _prox(optimizer, whole, standing)
    finally:
        kept.update(scaler)
    if reg is None:
        return Stepped()
    of = {id(row.param): optimizer.state[row.param][MASTER] for row in wide if row.mastered}
    own = set(map(id, tensors))
    zeros = Uncounted([of.get(id(t), t) for _, t in reg.trainable() if id(t) in own])
    if sharded and zeros.tensors:  # now, with all ranks: later one alone may ask
        counted = torch.tensor(float(int(zeros)), dtype=torch.float64)
        return Stepped(value, shards_of(tensors[0]).add_up(counted))
    return Stepped(value, zeros, whole)


@contextmanager
def _holding(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Iterator[None]:
    """torch's step sees these parameters only."""
    kept = [group["params"] for group in optimizer.param_groups]
    try:
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = own["params"]
        yield
    finally:
        for group, params in zip(optimizer.param_groups, kept, strict=True):
            group["params"] = params


def _add_gradients(
    optimizer: Fused, whole: bool, tensors: list[Tensor], standing: Mapping[int, Tensor]
) -> Value | None:
    """The penalty's, to those of the stand-ins too. `whole`: of all that it is on."""
    reg = optimizer.regularizer
    if whole and not standing:
        add_gradients(reg, optimizer, reg._active())
        return reg._last
    own, group = set(map(id, tensors)), reg._active()
    rows = [i for i, t in enumerate(group.tensors) if whole or id(t) in own]
    if not rows:
        return None
    instead = [standing.get(id(group.tensors[i]), group.tensors[i]) for i in rows]
    packs, sign = group.packs.part(rows), -1.0 if ascends(optimizer) else 1.0
    return accumulate(packs, instead, reg._penalties, sign, lambda i: group.label(rows[i]))[0]


def _prox(optimizer: Fused, whole: bool, standing: Mapping[int, Tensor]) -> Value | None:
    """The penalty's, of the stand-ins too. (The metric is None of what this step leaves.)"""
    reg, metric = optimizer.regularizer, metric_of_rows(optimizer, metric_of(optimizer))
    if whole and not standing:
        reg._prox(metric)
        return reg._last
    group = reg._active()
    instead = [standing.get(id(t), t) for t in group.tensors]
    metrics = list(map(metric, instead))
    rows = [i for i, m in enumerate(metrics) if m is not None]
    if not rows:
        return None
    return prox_in_metric(
        group.packs.part(rows),
        [instead[i] for i in rows],
        [metrics[i] for i in rows],
        reg._penalties,
        lambda i: group.label(rows[i]),
    )
