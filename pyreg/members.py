"""What a model holds by name, and where it keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .look import Slots


def pairs_of(
    model: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
) -> list[tuple[str, Tensor]]:
    """Those of a mapping, or of an iterable of (name, tensor).

    Raises:
        TypeError: it is something else.
    """
    if isinstance(model, Tensor | str) or not isinstance(model, Iterable):
        raise TypeError(f"model: expected a module or (name, tensor) pairs, got {model!r}")
    pairs = list(model.items() if isinstance(model, Mapping) else model)
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            got = type(pair).__name__
            raise TypeError(f"model: item {i}: expected a (name, tensor) pair, got {got}")
    return pairs


def slots_of(model: nn.Module, names: Iterable[str]) -> list[Slots]:
    """Where the module keeps these parameters, and each module on the way."""
    places: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for name in names:
        module = model
        *path, last = name.split(".")
        for key in path:
            places.setdefault(id(module._modules), (module._modules, set()))[1].add(key)
            module = module._modules[key]
        places.setdefault(id(module._parameters), (module._parameters, set()))[1].add(last)
    found = []
    for place, wanted in places.values():
        keys = tuple(key for key in place if key in wanted)
        found.append((place, keys, tuple(place[key] for key in keys)))
    return found
