"""What `pyreg.profile` is given: what cannot be is refused by name, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import members
from ..memory import has_own_dispatch
from ..penalties import Penalty
from ..tensors import check as check_tensor
from ..tensors import check_memory, label
from .parameters import Parameters
from .ways import LIMITS, UPDATE, WAYS
from .workloads import Workload

# Of a strength: squares of the gradients, which AdamW keeps, and MCP's lam^2 are float32 numbers.
_LEAST, _MOST = 1e-12, 1e12
Model = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | Workload


def check_penalty(penalty: object) -> None:
    if not isinstance(penalty, Penalty):
        raise TypeError(f"penalty: expected a pyreg penalty, got {penalty!r}")
    if penalty.is_anchored:
        raise TypeError(f"penalty: {penalty!r} has an anchor or weights, which copies do not have")
    for name, s in zip(penalty.parameters, penalty.strengths, strict=True):
        if not isinstance(s, float):
            raise TypeError(f"penalty: {name} is to be a number here, got {s!r}")
        if name not in penalty.above and s and not _LEAST <= s <= _MOST:
            raise ValueError(
                f"penalty: {name}: expected 0 or a number from {_LEAST:g} to {_MOST:g}, which "
                f"training in float32 can hold, got {s:g}"
            )


def check_ways(ways: Sequence[str]) -> list[str]:
    known = [name for name in WAYS if name not in LIMITS]
    if isinstance(ways, str) or not ways:
        raise ValueError(f"ways: expected a list of names, got {ways!r}")
    for name in ways:
        if name not in known:
            raise ValueError(f"ways: {name!r} is none of {', '.join(map(repr, known))}")
    # What an optimizer with a penalty inside is compared with.
    inside = any(WAYS[name].job.startswith("update") for name in ways)
    return list(dict.fromkeys([*ways, *([UPDATE] if inside else [])]))


def pairs_of(model: Any) -> list[tuple[str, Tensor]]:
    """(name, tensor); each once, however it is tied."""
    is_module = isinstance(model, nn.Module)
    pairs = list(model.named_parameters()) if is_module else members.pairs_of(model)
    return list({id(t): (name, t) for name, t in reversed(pairs)}.values())[::-1]


def trained(pairs: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Those that require a gradient: what is penalised."""
    found = [(n, t) for n, t in pairs if not isinstance(t, Tensor) or t.requires_grad]
    if not found:
        said = f"none of its {len(pairs)} parameters requires a gradient"
        raise ValueError(f"model: {said if pairs else 'it has no parameters'}")
    for i, (name, t) in enumerate(found):
        check_tensor(t, label(i, name))
        if has_own_dispatch(t):
            kind = type(t).__name__
            raise TypeError(f"{label(i, name)}: a {kind} cannot be copied; profile what it holds")
        if t.device.type == "meta":
            raise ValueError(
                f"{label(i, name)}: is on meta and has no memory; make the model on cpu, or call "
                "its to_empty(device='cpu') and initialise it"
            )
        check_memory(t, label(i, name))
    if not any(t.numel() for _, t in found):
        raise ValueError("model: its parameters have no elements")
    return found


def name_of(model: Any) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else "tensors"


def device_of(
    named: list[tuple[str, Tensor]], asked: torch.device | str | None, step: object
) -> torch.device:
    own = list(dict.fromkeys(t.device for _, t in named))
    if asked is None:
        if len(own) > 1:
            found = ", ".join(map(str, own))
            raise ValueError(f"model: it is on {found}; say where to profile it: device=...")
        return own[0]
    where = named_device(asked)
    if step is not None and [d.type for d in own] != [where.type]:
        found = ", ".join(map(str, own))
        raise ValueError(f"step: it runs on {found}, and the ways are to be measured on {where}")
    return where


def named_device(name: torch.device | str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected cpu or cuda, got {name}") from None


def check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no GPU here (torch.cuda.is_available() is False)")


def check_finite(parameters: Parameters) -> None:
    """A value that is not finite compares with nothing."""
    for name, t in parameters.named:
        if not torch.isfinite(t).all():
            raise ValueError(f"model: {name!r} has elements that are not finite")
