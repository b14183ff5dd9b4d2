"""The sweeps over all packs of a list of tensors. All is checked before anything is written.

`rules` are penalties in the order of `packs.penalties`; a value is 0-dim, on the first pack's
device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend.torch import taken
from .dispatch import choose
from .distributed import Shards, check_beside, local
from .metric import Metric, check_moment
from .pack import GradientMismatch, Pack, Packs, stand_in
from .penalties import Penalty, check_strengths
from .tensors import Label, check_gradients, check_writable

_FLOAT32_MAX = torch.finfo(torch.float32).max


def _prepare(
    packs: list[Pack], tensors: Sequence[Tensor], check_gradients: Callable[[], None] | None = None
) -> list[tuple[Pack, Any, list[Tensor]]]:
    """[(pack, its backend, its tensors)], checked.

    A lone pack of a native backend checks itself, in the sweep and before it writes; several must
    all be checked before the first one writes.
    """
    each = local if check_gradients is None else stand_in
    chosen = [(pack, choose(pack).backend, pack.local(tensors, each)) for pack in packs]
    if len(chosen) > 1 or (chosen and chosen[0][1].name == "torch"):
        for pack, backend, rows in chosen:
            backend.check(pack, rows)
        if check_gradients is not None:
            check_gradients()
    return chosen


def add_values(values: Sequence[Tensor | float], dtype: torch.dtype) -> Tensor:
    """The sum on the first value's device; a number lies on the CPU."""
    total = values[0]
    if isinstance(total, float):  # (`torch.tensor` and `.to` cost three times as much)
        # (What is beyond float32 is refused by `scalar_tensor`, and made infinite by `.to`.)
        as_it_is = len(values) == 1 and abs(total) <= _FLOAT32_MAX
        of = dtype if as_it_is else torch.float64
        total = torch.scalar_tensor(total, dtype=of, device="cpu")
    for value in values[1:]:
        total = total.double() + (value.to(total.device) if isinstance(value, Tensor) else value)
    return total if total.dtype == dtype else total.to(dtype)


def by_shards(packs: Sequence[Pack]) -> list[tuple[Shards | None, list[int]]]:
    """[(who holds parts of them, which of the packs)]: on every rank in the same order, even where
    what a rank holds is laid out in other packs."""
    found: dict[Shards | None, list[int]] = {}
    for i in sorted(range(len(packs)), key=lambda i: packs[i].rows[0]):
        found.setdefault(packs[i].shards, []).append(i)
    return list(found.items())


def add_up(packs: Sequence[Pack], *found: Sequence[Any]) -> tuple[list[Any], ...]:
    """What each pack's sweep found (lists of [packs] numbers, or of several), over all ranks."""
    totals: list[tuple[Any, ...]] = []
    for shards, at in by_shards(packs):
        if shards is None:
            totals += [tuple(of[i] for of in found) for i in at]
            continue
        device = packs[at[0]].device
        own = [torch.stack([taken(of[i], device) for i in at]).sum(dim=0) for of in found]
        sums = shards.add_up(torch.cat([x.flatten() for x in own]))
        parts = sums.split([x.numel() for x in own])
        totals.append(tuple(part.view_as(x) for part, x in zip(parts, own, strict=True)))
    return tuple(map(list, zip(*totals, strict=True)))


def changed(pack: Pack, tensors: Sequence[Tensor]) -> None:
    """Tell autograd of DTensors that what they hold was changed in place."""
    if pack.shards is not None:
        torch.autograd.graph.increment_version(pack.take(tensors))


class Value(NamedTuple):
    """What a sweep found Omega to be."""

    total: Tensor
    parts: list[Any]  # of each pack: [rules] each rule's, numbers or a tensor or what gives it

    def of_rules(self) -> list[Tensor]:
        """Each rule's, like the total."""
        first, *others = map(taken, self.parts)
        for part in others:
            first = first + part.to(first.device)
        return list(first.to(self.total.device, self.total.dtype))


def value(packs: Packs, tensors: list[Tensor], rules: Sequence[Penalty], label: Label) -> Tensor:
    """Omega, without a graph. Reads N."""
    check_strengths(rules)

    def sweep(current: list[Pack]) -> Tensor:
        chosen = _prepare(current, tensors)
        own = [backend.value(pack, rows, rules)[0] for pack, backend, rows in chosen]
        if packs.is_sharded:
            [own] = add_up(current, own)
        return add_values(own, packs.value_dtype)

    return packs.run(sweep, tensors, label)


def accumulate(
    packs: Packs,
    tensors: list[Tensor],
    rules: Sequence[Penalty],
    scale: float | Tensor,
    label: Label,
) -> tuple[Value, int]:
    """.grad += scale * gradient where there is a .grad. Reads 2 N, writes N.

    Returns the value, and how many gradients there were.
    """
    check_strengths(rules)

    def check() -> None:
        check_gradients([t.grad for t in tensors], tensors, label)

    def sweep(current: list[Pack]) -> tuple[Value, int]:
        values, parts, present = [], [], 0
        for pack, backend, rows in _prepare(current, tensors, check):
            value, of_rules, there = backend.accumulate(pack, rows, rules, scale)
            values.append(value)
            parts.append(of_rules)
            present += there
        if packs.is_sharded:
            values, parts = add_up(current, values, parts)
        return Value(add_values(values, packs.value_dtype), parts), present

    try:
        return packs.run(sweep, tensors, label)
    except GradientMismatch:
        check()
        raise


def prox(
    packs: Packs,
    tensors: list[Tensor],
    rules: Sequence[Penalty],
    step: float | Tensor,
    label: Label,
) -> None:
    """w = prox(w, step), in place. Reads N, writes N."""
    check_strengths(rules)

    def sweep(current: list[Pack]) -> None:
        chosen = _prepare(current, tensors)
        for pack, _, rows in chosen:
            if pack.irregular is not None:
                for i, t in zip(pack.rows, rows, strict=True):
                    check_writable(t, label(i))
        for pack, backend, rows in chosen:
            backend.prox(pack, rows, rules, step)
            changed(pack, tensors)

    packs.run(sweep, tensors, label)


def prox_in_metric(
    packs: Packs,
    tensors: list[Tensor],
    metrics: Sequence[Metric],
    rules: Sequence[Penalty],
    label: Label,
) -> Value:
    """w = prox(w, each element's step in its row's metric), in place. Reads 2 N, writes N.

    Returns the value of the new weights.
    """
    check_strengths(rules)

    def check() -> None:
        for i, t in enumerate(tensors):
            check_moment(metrics[i], t, label(i))

    def sweep(current: list[Pack]) -> Value:
        chosen = _prepare(current, tensors)
        # (As in `_prepare`: a lone pack of a native backend checks what lies beside its rows.)
        alone = len(chosen) == 1 and chosen[0][1].name != "torch"
        if not alone:
            check()
        if packs.is_sharded:
            for i, t in enumerate(tensors):
                check_beside(metrics[i].moment, t, label(i), "moment")
        for pack, _, rows in chosen:
            if pack.irregular is not None:
                for i, t in zip(pack.rows, rows, strict=True):
                    check_writable(t, label(i))
        done = []
        for pack, backend, rows in chosen:
            try:
                done.append(backend.prox_in_metric(pack, rows, _own(pack, metrics), rules))
            except ValueError:
                check()  # it knows names
                raise
            changed(pack, tensors)
        values, parts = map(list, zip(*done, strict=True))
        if packs.is_sharded:
            values, parts = add_up(current, values, parts)
        return Value(add_values(values, packs.value_dtype), parts)

    return packs.run(sweep, tensors, label)


def _own(pack: Pack, metrics: Sequence[Metric]) -> list[Metric]:
    """The pack's, of the rows that are local."""
    rows = pack.take(metrics)
    if pack.shards is None:
        return rows
    return [m if m.moment is None else m._replace(moment=local(m.moment)) for m in rows]


def stats(packs: Packs, tensors: list[Tensor], label: Label) -> Tensor:
    """[tensors, 5] float64, the columns of `reference.stats`. Reads N."""

    def sweep(current: list[Pack]) -> Tensor:
        out = torch.empty(len(tensors), 5, dtype=torch.float64, device="cpu")
        for pack, backend, rows in _prepare(current, tensors):
            out[pack.rows] = backend.stats(pack, rows).cpu()
        for shards, at in by_shards(current) if packs.is_sharded else ():
            if shards is not None:
                rows = sorted(row for i in at for row in current[i].rows)
                out[rows] = shards.add_up_stats(out[rows])
        return out

    return packs.run(sweep, tensors, label)
