"""The parameters of a step, device by device: what each device steps, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..distributed import local, shards_of
from ..pack import Packs
from ..penalties import L1
from ..sweeps import Value


class Part(NamedTuple):
    """The parameters of a step that are on one device, and where the penalty is on them."""

    rows: list[int] | None  # which of them; None: all
    packs: Packs
    penalised: bytes  # [rows] 1 or 0

    def take(self, items: list[Any]) -> list[Any]:
        return items if self.rows is None else [items[i] for i in self.rows]

    def ids(self, tensors: Iterable[Tensor]) -> set[int] | None:
        """Of the part's `tensors`; None where they are all."""
        return None if self.rows is None else set(map(id, tensors))

    def param_groups(
        self, groups: list[dict[str, Any]], tensors: Iterable[Tensor]
    ) -> list[dict[str, Any]]:
        """The param groups, with no others' parameters than the part's `tensors`."""
        own = self.ids(tensors)
        if own is None:
            return groups
        return [
            {**group, "params": [p for p in group["params"] if id(p) in own]} for group in groups
        ]


class Plan(NamedTuple):
    parts: list[Part]
    left: list[Tensor]  # penalised, and without a gradient
    packs_left: Packs


class Stepped(NamedTuple):
    """What is known after a part's step."""

    value: Value | None = None
    zeros: Any = 0  # a number, or the `Uncounted`
    all_counted: bool = False  # whether the value has those without a gradient


class Uncounted(NamedTuple):
    """Weights of which the zeros, on this rank, are counted when somebody asks."""

    tensors: list[Tensor]

    def __int__(self) -> int:
        return sum(int((local(t) == 0).sum()) for t in self.tensors)


def plan_of(penalised: Any, tensors: list[Tensor]) -> Plan:
    """Of a step of these; `penalised` is what `Regularizer._active()` is, or None."""
    row_of = {} if penalised is None else {id(t): i for i, t in enumerate(penalised.tensors)}
    rows = [row_of.pop(id(t), None) for t in tensors]
    left = list(row_of.values())
    names = (L1.name,) if penalised is None else penalised.packs.penalties

    def packs(rows: Sequence[int | None]) -> Packs:
        rule_of = [0 if i is None else penalised.packs.rule_of[i] for i in rows]
        pairs = None if penalised is None else penalised.packs.anchors
        if pairs is not None:
            pairs = [(None, None) if i is None else pairs[i] for i in rows]
        return Packs(names, rule_of, pairs)

    parts, places = [], list(map(place_of, tensors))
    for place in dict.fromkeys(places) or [None]:
        own = [i for i, other in enumerate(places) if other == place]
        swept = [rows[i] for i in own]
        whole = len(own) == len(places)
        which = bytes(i is not None for i in swept)
        parts.append(Part(None if whole else own, packs(swept), which))
    return Plan(parts, [penalised.tensors[i] for i in left], packs(left))


def place_of(t: Tensor) -> Any:
    """Parameters in one place are stepped in one sweep."""
    return t.device, shards_of(t)
