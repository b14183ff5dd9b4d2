"""Looks at many objects, taken at every call: compiled where the compiled module is there."""

from __future__ import annotations

from operator import attrgetter, is_

import torch
from torch import Tensor

from .backend.native import load

# A dict, some of its keys in its order, and what they held.
Slots = tuple[dict[str, object], tuple[str, ...], tuple[object, ...]]

_requires_grad = attrgetter("requires_grad")


def make_ready() -> None:
    """Find out now how tensors are read, which an active transform of torch.func's would hide."""
    load()


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


def numbers(given: list[object]) -> list[float | None]:
    """Each one's number, where the host has it: of a float, an int, a 0-dim float32 or float64
    tensor on the CPU. None for others."""
    native = load()
    if not isinstance(native, str):
        return native.read_numbers(given)
    found: list[float | None] = []
    for x in given:
        known = isinstance(x, float | int) or (
            isinstance(x, Tensor)
            and x.dim() == 0
            and x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)
            and x.untyped_storage().nbytes() > 0
        )
        found.append(float(x.detach() if isinstance(x, Tensor) else x) if known else None)
    return found


def count(counters: list[Tensor]) -> list[float] | Tensor | None:
    """Each of an optimizer's step counters, after adding 1 to it: numbers, or float64 where the
    counters are on a device, for which nobody waits. None if one is no such; none is changed then.
    """
    if not counters:
        return []
    if not all(isinstance(c, Tensor) for c in counters):
        return None
    devices = {c.device for c in counters}
    on_cpu = devices == {torch.device("cpu")}
    if on_cpu and not isinstance(native := load(), str):
        return native.count(counters)
    if len(devices) > 1 or any(
        c.dim() or c.dtype not in (torch.float32, torch.float64) for c in counters
    ):
        return None
    torch._foreach_add_(counters, 1)
    return [c.item() for c in counters] if on_cpu else torch.stack(counters).double()
