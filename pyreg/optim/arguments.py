"""What the sweep of a step is told: each parameter's states, update and numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import check_beside, local, placed_alike
from ..metric import Metric, Number, metric_of
from ..tensors import Label
from .precision import key_on_this_rank

if TYPE_CHECKING:
    from .fused import Fused

NUMBERS = 9  # of csrc/updates.h


class Rows(NamedTuple):
    """The parameters of a param group that have a gradient, and what lies beside each."""

    params: list[Tensor]
    states: list[list[Tensor]]  # of each kind of state, in the order of csrc/updates.h
    counters: list[Tensor]  # how many steps each has seen; empty if nobody counts
    new: Sequence[bool]  # whether its state is only made for this step


class Arguments(NamedTuple):
    states: list[list[Tensor | None]]  # for each kind of state, [parameters]
    updates: list[str]  # [parameters]
    sets: list[int]  # [parameters] which of the numbers are its own
    numbers: list[tuple[Sequence[float], Metric]] | Tensor  # or float64 [sets, NUMBERS + 3]


def arguments(
    optimizer: Fused,
    param_groups: list[dict[str, Any]],
    found: list[Rows],
    steps: list[float] | Tensor,
    scale: float,
) -> Arguments:
    """Of one step of these. `steps`: the counters' numbers, one after the other; a tensor on a GPU.

    Parameters of a group that have seen as many steps share a set of numbers. Where a counter or a
    learning rate lies on a GPU nobody waits for it: there the numbers are computed.
    """
    groups = list(zip(param_groups, found, strict=True))
    updates = [u for group, rows in groups for u in [optimizer._update(group)] * len(rows.params)]
    states: list[list[Tensor | None]] = [[] for _ in range(max(len(r.states) for r in found))]
    for rows in found:
        for k, state in enumerate(states):
            state += rows.states[k] if k < len(rows.states) else [None] * len(rows.params)
    device = _gpu_of([steps, *(x for group, _ in groups for x in group.values())])
    if device is not None:
        numbers = _on_gpu(optimizer, groups, steps, scale, device)
        return Arguments(states, updates, list(range(len(updates))), numbers)
    sets, numbers, counts = [], [], iter(steps)
    for group, rows in groups:
        own = list(islice(counts, len(rows.counters))) or [0.0] * len(rows.params)
        alike = list(zip(own, rows.new or [False] * len(rows.params), strict=True))
        of = {kind: len(numbers) + k for k, kind in enumerate(dict.fromkeys(alike))}
        numbers += [_set(optimizer, group, step, new, scale) for step, new in of]
        sets += map(of.__getitem__, alike)
    return Arguments(states, updates, sets, numbers)


def lay_gradients(rows: list[Tensor]) -> None:
    """Give gradients that have other strides copies in their row's: what one rank holds of a
    DTensor must not make its step another than the other ranks'."""
    for row in rows:
        if row.grad.stride() != row.stride():
            row.grad = torch.empty_like(row).copy_(row.grad)


def on_this_rank(
    told: Arguments, in_float32: dict[str, list[Any]], params: list[Tensor], label: Label
) -> tuple[Arguments, dict[str, list[Any]]]:
    """What the rank holds of what lies beside parameters that are DTensors, and how it rounds.

    Raises ValueError, naming the parameter, if it is not what the rank holds of the parameter.
    """

    def own(beside: list[Tensor | None], kind: str) -> list[Tensor | None]:
        for i, (b, p) in enumerate(zip(beside, params, strict=True)):
            if b is not None and not placed_alike(b, p):
                check_beside(b, p, label(i), kind)
        return [None if b is None else local(b) for b in beside]

    states = [own(kind, "state in the optimizer") for kind in told.states]
    if "masters" in in_float32:
        masters = own(in_float32["masters"], "master weights")
        in_float32 = {**in_float32, "masters": masters}
    if "keys" in in_float32:
        keys = zip(in_float32["keys"], params, strict=True)
        own_keys = [None if k is None else key_on_this_rank(k, p) for k, p in keys]
        in_float32 = {**in_float32, "keys": own_keys}
    return told._replace(states=states), in_float32


def _set(
    optimizer: Fused, group: dict[str, Any], step: Number, new: bool, scale: float
) -> tuple[tuple[Number, ...], Metric]:
    factor = (-1.0 if group.get("maximize") else 1.0) / scale
    metric = Metric(None, 0.0)  # its moment the sweep knows
    if optimizer.regularizer is not None and optimizer.mode == "prox":
        of_no_state = defaultdict(lambda: None, step=step)
        metric = metric_of(optimizer)({**group, "centered": False}, of_no_state)
    return (factor, *optimizer._numbers(group, step, new)), metric


def _gpu_of(numbers: list[Any]) -> torch.device | None:
    tensors = [x for x in numbers if isinstance(x, Tensor)]
    return next((t.device for t in tensors if t.device.type != "cpu"), None)


def _on_gpu(
    optimizer: Fused,
    groups: list[tuple[dict[str, Any], Rows]],
    steps: list[float] | Tensor,
    scale: float,
    device: torch.device,
) -> Tensor:
    """[parameters, NUMBERS + 3], column by column: a CUDA graph can replay it."""
    parts, at = [], 0
    for group, rows in groups:
        n, counted = len(rows.params), len(rows.counters)
        if n == 0:
            continue
        step: Number = 0.0
        if counted:
            step = torch.as_tensor(steps[at : at + counted], dtype=torch.float64, device=device)
            at += counted
        kinds = rows.new or [False] * n
        of_kind = {}
        for new in set(kinds):
            own, metric = _set(optimizer, group, step, new, scale)
            row = [*own, *[0.0] * (NUMBERS - len(own)), *metric[1:4]]
            of_kind[new] = torch.stack([_column(x, n, device) for x in row], dim=1)
        if len(of_kind) == 1:
            parts += of_kind.values()
        else:
            parts.append(torch.stack([of_kind[new][i] for i, new in enumerate(kinds)]))
    return torch.cat(parts)


def _column(x: Number, n: int, device: torch.device) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach().to(device, torch.float64).expand(n)
    return torch.full((n,), x, dtype=torch.float64, device=device)
