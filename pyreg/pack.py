"""Tensors -> packs: what is laid out for one sweep.

A pack holds no pointers and no parameters, only what they were. Each sweep shows the tensors
anew, the backend compares them with the pack, and `StaleLayout` makes the packs be built again
before anything is written. So `p.data = ...`, `module.to(...)` or a freed tensor can never leave a
stale pointer behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import Shards, local, place_gradient, shards_of
from .memory import is_freed, is_wrapper, share_memory, sharing
from .penalties import Penalty
from .tensors import (
    SWEPT_DTYPES,
    Label,
    Pair,
    check,
    check_memory,
    check_pair,
    irregular,
    irregular_pair,
    label,
)

Params = nn.Module | Tensor | Mapping[str, Tensor] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


class StaleLayout(RuntimeError):
    """A tensor is no longer what its pack recorded. Raised by backends, answered by a rebuild."""


class GradientMismatch(RuntimeError):
    """A tensor's .grad cannot be its gradient; `tensors.check_gradients` says which and why."""


def collect(params: Params) -> tuple[list[Tensor], Label]:
    """The tensors of `params`, and what to call the i-th one in an error.

    Args:
        params: a module, a tensor, a mapping or an iterable of (name, tensor) pairs, or an iterable
            of tensors.
    """
    if isinstance(params, nn.Module):
        module = params
        return list(module.parameters()), lambda i: label(i, list(module.named_parameters())[i][0])
    if isinstance(params, Tensor):
        return [params], label
    if isinstance(params, str | bytes):
        raise TypeError(f"params: expected a module or an iterable of tensors, got {params!r}")
    try:
        items = list(params.items() if isinstance(params, Mapping) else params)
    except TypeError:
        got = type(params).__name__
        raise TypeError(f"params: expected a module or an iterable of tensors, got {got}") from None
    if items and isinstance(items[0], tuple):
        for i, item in enumerate(items):
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
                got = type(item).__name__
                raise TypeError(f"params[{i}]: expected a (name, tensor) pair, got {got}")
        return [t for _, t in items], lambda i: label(i, items[i][0])
    return items, label


def stand_in(t: Tensor) -> Tensor:
    """What this rank holds of a DTensor, with its gradient as `.grad`.

    Raises GradientMismatch if the gradient cannot be placed as the DTensor is.
    """
    if not place_gradient(t):
        raise GradientMismatch
    own, grad = local(t).detach(), t.grad
    if grad is not None:
        own.grad = local(grad)
    return own


def constants(pair: Pair) -> Pair:
    """The pair without a graph."""
    return tuple(None if t is None else t.detach() for t in pair)


def geometry(t: Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    """What a pack records of a row."""
    return t.dtype, t.shape, t.stride()


def dtypes(pair: Pair) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in pair)


@dataclass(eq=False)
class Pack:
    """The tensors of one device and one kind (regular or not), laid out for a sweep."""

    device: torch.device
    rows: list[int]  # positions in the caller's list
    rule_of: list[int]  # [rows] index of each row's rule
    penalties: tuple[str, ...]  # [rules] each rule's penalty, by name
    geometry: list[tuple[torch.dtype, torch.Size, tuple[int, ...]]]  # [rows] dtype, shape, strides
    irregular: str | None  # why only the torch backend can serve; None if the rows are regular
    anchors: list[Pair] | None = None  # [rows] held; None if no row has any
    anchor_dtypes: list[tuple[torch.dtype | None, ...]] = field(default_factory=list)
    shards: Shards | None = None  # of DTensors: the rows are what this rank holds of them
    given: list[Pair] = field(default_factory=list)  # [rows] the anchors, not only what it holds
    layouts: dict[str, Any] = field(default_factory=dict)  # what each backend keeps for the pack

    @cached_property
    def device_type(self) -> str:
        """(Torch takes half a microsecond to tell it.)"""
        return self.device.type

    @cached_property
    def is_wide(self) -> bool:
        """Whether any row is float64."""
        return any(dtype == torch.float64 for dtype, *_ in self.geometry)

    def take(self, items: Sequence[Any]) -> list[Any]:
        """This pack's part of a list that runs beside the tensors."""
        if isinstance(items, list) and len(items) == len(self.rows):
            return items
        return [items[i] for i in self.rows]

    def local(
        self, tensors: Sequence[Tensor], each: Callable[[Tensor], Tensor] = local
    ) -> list[Tensor]:
        """The rows: this pack's part of the tensors, `each` of a DTensor.

        Raises StaleLayout if a DTensor is placed otherwise than it was.
        """
        rows = self.take(tensors)
        if self.shards is None:
            return rows
        if any(shards_of(t) != self.shards for t in rows):
            raise StaleLayout
        return list(map(each, rows))

    def penalty(self, i: int, rules: Sequence[Penalty]) -> Penalty:
        """The penalty of the i-th row."""
        rule = rules[self.rule_of[i]]
        if self.anchors is None:
            return rule
        anchor, weight = constants(self.anchors[i])
        return replace(rule, anchor=anchor, weight=weight)

    def check_rows(self, tensors: Sequence[Tensor]) -> None:
        """Raise StaleLayout unless the rows are what they were."""
        if list(map(geometry, tensors)) != self.geometry or any(
            t.device != self.device or is_freed(t) for t in tensors
        ):
            raise StaleLayout
        if self.irregular is None and any(t.is_neg() or is_wrapper(t) for t in tensors):
            raise StaleLayout
        if list(map(dtypes, self.anchors or ())) != self.anchor_dtypes:
            raise StaleLayout
        for pair, t in zip(self.anchors or (), tensors, strict=self.anchors is not None):
            beside = [b for b in pair if b is not None]
            if any(b.shape != t.shape or is_freed(b) or share_memory(b, t) for b in beside) or (
                self.irregular is None and irregular_pair(pair, t) is not None
            ):
                raise StaleLayout

    @cached_property
    def _places(self) -> tuple[int, list[tuple[torch.dtype, torch.Size, tuple[int, ...], int]]]:
        """(bytes in all, [(dtype, shape, strides, offset in elements)]) of a flat buffer."""
        places, size = [], 0
        for dtype, shape, strides in self.geometry:
            places.append((dtype, shape, strides, size // dtype.itemsize))
            size += -(-shape.numel() * dtype.itemsize // 64) * 64
        return size, places

    def flat_gradient(self) -> list[Tensor]:
        """A tensor per row, uninitialized, with the row's shape and strides: views of one buffer.

        Each begins at a multiple of 64 bytes.
        """
        size, places = self._places
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        view = {dtype: buffer.view(dtype).as_strided for dtype in {place[0] for place in places}}
        return [view[dtype](shape, strides, at) for dtype, shape, strides, at in places]


def build(
    tensors: Sequence[Tensor],
    label: Label,
    rule_of: Sequence[int],
    penalties: tuple[str, ...],
    anchors: Sequence[Pair] | None = None,
) -> list[Pack]:
    """Check every tensor and group them: by device in order of appearance, regular ones first.

    Those with an anchor are in packs of their own, after the others, and so are DTensors that are
    sharded alike.

    Raises:
        TypeError, ValueError: a tensor that cannot be penalised, by name.
    """
    packs: dict[tuple[torch.device, bool, bool, Shards | None], Pack] = {}
    written = None if anchors is None else sharing(list(map(local, tensors)))
    for i, t in enumerate(tensors):
        if type(t) not in (Tensor, nn.Parameter) or not _plainly_fine(t):
            check(t, label(i))
            check_memory(t, label(i))
        pair = (None, None) if anchors is None else anchors[i]
        anchored = pair[0] is not None or pair[1] is not None
        if anchored:
            check_pair(pair, t, label(i))
        given = pair
        if (shards := shards_of(t)) is not None:
            t, pair = local(t), tuple(None if beside is None else local(beside) for beside in pair)
        reason = irregular(t)
        if anchored:
            reason = reason or irregular_pair(pair, t)
            if any(map(written, pair)):
                reason = reason or "is measured from another parameter, which a prox would change"
        key = (t.device, reason is not None, anchored, shards)
        pack = packs.get(key)
        if pack is None:
            why = None if reason is None else f"{label(i)} {reason}"
            kept = [] if anchored else None
            pack = Pack(t.device, [], [], penalties, [], why, kept, shards=shards)
            packs[key] = pack
        if anchored:
            pack.anchors.append(pair)
            pack.given.append(given)
            pack.anchor_dtypes.append(dtypes(pair))
        pack.rows.append(i)
        pack.rule_of.append(rule_of[i])
        pack.geometry.append(geometry(t))
    devices = list(dict.fromkeys(device for device, *_ in packs))
    return sorted(
        packs.values(),
        key=lambda p: (devices.index(p.device), p.irregular is not None, p.anchors is not None),
    )


def _plainly_fine(t: Tensor) -> bool:
    """The common case of `check`, quickly."""
    return (
        t.dtype in SWEPT_DTYPES
        and t.layout == torch.strided
        and t.device.type in ("cpu", "cuda")
        and t.is_contiguous()
        and t.storage_offset() == 0
        and t.untyped_storage().nbytes() >= t.nbytes
    )


class Packs:
    """The packs of one list of tensors: built at the first sweep, again when a tensor changed."""

    def __init__(
        self,
        penalties: tuple[str, ...],
        rule_of: Sequence[int],
        anchors: Sequence[Pair] | None = None,
    ) -> None:
        self.penalties = penalties
        self.rule_of = rule_of
        self.anchors = anchors  # [tensors], or None for no anchors
        self._packs: list[Pack] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: built packs hold native objects, and are built again instead."""
        return {**self.__dict__, "_packs": None}

    def current(self, tensors: Sequence[Tensor], label: Label) -> list[Pack]:
        """The packs of `tensors`, as they were at the last look."""
        if self._packs is None:
            self._packs = build(tensors, label, self.rule_of, self.penalties, self.anchors)
            self.is_sharded = any(p.shards is not None for p in self._packs)
            bare = [p.rows[0] for p in self._packs if p.device_type == "meta"]
            self._bare = min(bare) if 0 < len(bare) < len(self._packs) else None
            wide = any(p.is_wide for p in self._packs)
            self.value_dtype = torch.float64 if wide else torch.float32
        return self._packs

    def part(self, rows: Sequence[int]) -> Packs:
        """Of those tensors alone."""
        anchors = self.anchors if self.anchors is None else [self.anchors[i] for i in rows]
        return Packs(self.penalties, [self.rule_of[i] for i in rows], anchors)

    def run(
        self, sweep: Callable[[list[Pack]], Any], tensors: Sequence[Tensor], label: Label
    ) -> Any:
        """sweep(packs), and once more with fresh packs if it raises StaleLayout.

        Raises:
            ValueError: a tensor is on the meta device, and not all are.
        """
        try:
            return sweep(self._swept(tensors, label))
        except StaleLayout:
            self._packs = None
            return sweep(self._swept(tensors, label))

    def _swept(self, tensors: Sequence[Tensor], label: Label) -> list[Pack]:
        packs = self._packs or self.current(tensors, label)
        if self._bare is not None:
            raise ValueError(
                f"{label(self._bare)}: is on the meta device, among others that are not: give it "
                "memory first (module.to_empty, or load_state_dict with assign=True)"
            )
        return packs


_RECENT = 64  # lists of tensors whose packs are kept


def packs_for(
    tensors: Sequence[Tensor], penalties: tuple[str, ...], rule_of: Sequence[int]
) -> Packs:
    """The packs that the last call with these very tensors built, or new ones.

    Found by identity. An identity that a new tensor took over does no harm, since every sweep
    compares the tensors with the packs; so nothing is kept alive here but sizes.
    """
    key = (tuple(map(id, tensors)), penalties, tuple(rule_of))
    packs = _recent.pop(key, None) or Packs(penalties, rule_of)
    _recent[key] = packs  # newest last
    while len(_recent) > _RECENT:
        _recent.pop(next(iter(_recent)), None)
    return packs


_recent: dict[tuple, Packs] = {}
