"""Looks at many objects, taken at every call: compiled where the compiled module is there."""

from __future__ import annotations

from operator import attrgetter, is_

from torch import Tensor

from .backend.native import load

# A dict, some of its keys in its order, and what they held.
Slots = tuple[dict[str, object], tuple[str, ...], tuple[object, ...]]

_requires_grad = attrgetter("requires_grad")


def require_grad(tensors: list[Tensor]) -> bytes:
    """Of each tensor, whether it requires a gradient: 1 or 0."""
    native = load()
    if isinstance(native, str):
        return bytes(map(_requires_grad, tensors))
    return native.require_grad(tensors)


def unchanged(slots: list[Slots]) -> bool:
    """Whether every key still holds what it held."""
    native = load()
    if isinstance(native, str):
        return all(all(map(is_, map(place.get, keys), held)) for place, keys, held in slots)
    return native.unchanged(slots)
