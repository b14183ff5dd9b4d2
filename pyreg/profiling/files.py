"""The names, shapes and dtypes in a file of weights. Nothing in it is executed, nor kept."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tensors import SWEPT_DTYPES
from .workloads import Workload

_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MOST = 100_000_000  # bytes of a header, as the format's own readers have it
_DIMENSIONS = 64  # of a tensor, as torch's operations have it
_WHERE = ("state_dict", "model_state_dict", "model", "module")  # checkpoints keep weights there
_NONE = "it holds no weights of float32, float64, bfloat16 or float16"
_BUFFERS = ("running_mean", "running_var")  # of norms: in the file, but not parameters
Entry = tuple[str, tuple[int, ...], torch.dtype | None]  # None: of no dtype that is swept


def read(path: Path) -> Workload:
    """The weights that a penalty could have, of a .safetensors file or one of torch.save.

    Raises:
        ValueError: (naming the file) it is neither, or holds no weights.
        OSError: it cannot be read.
    """
    entries = _safetensors(path) if path.suffix == ".safetensors" else _saved(path)
    kept = [
        (name, shape, dtype)
        for name, shape, dtype in entries
        if dtype is not None and math.prod(shape) and name.rpartition(".")[2] not in _BUFFERS
    ]
    if not kept:
        raise ValueError(f"{path}: {_NONE}")
    dtypes = [dtype for *_, dtype in kept]
    common = max(SWEPT_DTYPES, key=dtypes.count)
    return Workload(
        path.stem,
        path.name,
        tuple((name, shape) for name, shape, _ in kept),
        common,
        {name: dtype for name, _, dtype in kept if dtype != common},
    )


def _safetensors(path: Path) -> list[Entry]:
    """The header: its length in 8 bytes, then JSON of {name: {dtype, shape, data_offsets}}.

    All that it tells of must lie in the file, whose size so bounds what is allocated later.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MOST, size - 8):
            raise ValueError(f"{path}: not a safetensors file (its header has no possible length)")
        text = file.read(length)
    try:
        header = json.loads(text)
        tensors = {name: about for name, about in header.items() if name != "__metadata__"}
        entries = [_entry(name, about) for name, about in tensors.items()]
        ends = {name: about["data_offsets"][1] for name, about in tensors.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file (its header is not one)") from error
    there = size - 8 - length
    for name, end in ends.items():
        if end > there:
            raise ValueError(
                f"{path}: it is cut short, or its header is wrong: {name!r} ends at byte {end:,} "
                f"of {there:,}"
            )
    return entries


def _entry(name: str, about: Mapping[str, Any]) -> Entry:
    shape, dtype = tuple(about["shape"]), _SAFETENSORS.get(about["dtype"])
    begin, end = about["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end - begin)):
        raise ValueError(name)
    if len(shape) > _DIMENSIONS or (dtype and math.prod(shape) * dtype.itemsize != end - begin):
        raise ValueError(name)
    return name, shape, dtype


def _saved(path: Path) -> list[Entry]:
    """What torch.save wrote, by its reader that runs no pickled code, without the numbers."""
    with path.open("rb"):  # (else an unreadable file is said to be no archive)
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle's protocols
            found = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: it holds more than weights, or is no file of torch.save; save the "
            "state_dict() alone"
        ) from error
    except Exception as error:  # a broken archive fails in many ways
        raise ValueError(f"{path}: not a file of torch.save ({type(error).__name__})") from error
    for key in _WHERE:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: expected a state_dict, got {type(found).__name__}")
    if not _holds_weights(found):
        inner = {key: value for key, value in found.items() if _holds_weights(value)}
        if len(inner) > 1:
            said = f"weights under {_keys(inner)}; save the ones to profile alone"
            raise ValueError(f"{path}: {said}")
        if inner:
            (found,) = inner.values()
        elif not any(isinstance(value, Tensor) for value in found.values()):
            raise ValueError(f"{path}: {_NONE}; its keys: {_keys(found) or 'none'}")
    return list(_tensors(found.items()))


def _holds_weights(found: object) -> bool:
    """(A checkpoint may hold random numbers and figures too.)"""
    return isinstance(found, Mapping) and any(
        isinstance(t, Tensor) and t.ndim and t.dtype in SWEPT_DTYPES for t in found.values()
    )


def _keys(found: Mapping[Any, Any]) -> str:
    """The first ones."""
    return ", ".join([repr(key) for key in found][:8]) + (", ..." if len(found) > 8 else "")


def _tensors(items: Iterable[tuple[Any, Any]]) -> Iterable[Entry]:
    seen = set()  # tied weights are there twice, with one storage
    for name, t in items:
        if isinstance(t, Tensor) and t.layout == torch.strided:
            place = (t.untyped_storage()._cdata, t.storage_offset(), t.shape)
            if t.numel() and place in seen:
                continue
            seen.add(place)
            yield str(name), tuple(t.shape), t.dtype if t.dtype in SWEPT_DTYPES else None
