"""Which backend sweeps a pack, and why.

Asked for by name (`use_backend`, or the environment variable PYREG_BACKEND), a backend serves or
raises. Otherwise ("auto") the first one that can serve does, down to torch, which always can.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

from .pack import Pack

# Fastest first.
_CLASSES = {"native": "NativeBackend", "triton": "TritonBackend", "torch": "TorchBackend"}
requested_backend: ContextVar[str | None] = ContextVar("pyreg_backend", default=None)
_NATIVE_ON = {"cuda": ("cuda", "CudaBackend")}  # devices for which native is another module


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot serve; the message says why."""


class BackendStatus(NamedTuple):
    """What `pyreg.backends()` says of one backend."""

    name: str
    available: bool
    detail: str  # its version, or why it is not available


@cache
def backend(name: str, device_type: str = "cpu") -> Any:
    """The backend of that name for such a device (its module is imported now)."""
    module, cls = name, _CLASSES[name]
    if name == "native":
        module, cls = _NATIVE_ON.get(device_type, (module, cls))
    return getattr(importlib.import_module(f"{__package__}.backend.{module}"), cls)()


def backends() -> list[BackendStatus]:
    """Every backend, fastest first: whether it is available, its version or what it lacks."""
    found = []
    for name in _CLASSES:
        b = backend(name)
        why = b.missing()
        found.append(BackendStatus(name, why is None, b.version() if why is None else why))
    return found


def _known(name: str, source: str) -> str:
    if name != "auto" and name not in _CLASSES:
        known = ", ".join(["auto", *_CLASSES])
        raise BackendError(f"{source}: unknown backend {name!r}; expected one of {known}")
    return name


def requested() -> str:
    """The backend asked for: by `use_backend`, else by PYREG_BACKEND, else "auto"."""
    name = requested_backend.get()
    if name is not None:
        return name
    name = os.environ.get("PYREG_BACKEND")
    return _known(name, "PYREG_BACKEND") if name else "auto"


def require_formulas(where: str) -> None:
    """Raise BackendError if a backend was asked for by name, other than the formulas' own."""
    if (name := requested()) not in ("auto", "torch"):
        raise BackendError(f"backend {name!r} cannot serve {where}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, sweep with this backend and no other ("auto" lifts that again).

    Args:
        name: "native", "triton", "torch" or "auto".

    Raises:
        BackendError: the name is unknown, or the backend is not available. A sweep inside the
            block raises it too, if the backend cannot serve the tensors.
    """
    _known(name, "use_backend")
    if name != "auto" and (why := backend(name).missing()) is not None:
        raise BackendError(f"backend {name!r} is not available: {why}")
    token = requested_backend.set(name)
    try:
        yield
    finally:
        requested_backend.reset(token)


class Choice(NamedTuple):
    backend: Any
    reason: str  # why the faster ones were passed over; empty if none was


def choose(pack: Pack) -> Choice:
    """The backend for a pack.

    Raises:
        BackendError: one was asked for by name and cannot serve.
    """
    name = requested()
    if name != "auto":
        b = backend(name, pack.device_type)
        if (why := b.missing() or b.refuses(pack, by_name=True)) is not None:
            raise BackendError(f"backend {name!r} cannot serve: {why}")
        return Choice(b, "asked for by name")
    passed = []
    for name in _CLASSES:
        b = backend(name, pack.device_type)
        if (why := b.missing() or b.refuses(pack)) is None:
            return Choice(b, "; ".join(passed))
        passed.append(f"{name}: {why}")
    raise AssertionError("the torch backend refuses nothing")


def stepper(pack: Pack) -> Any:
    """The backend that takes an optimizer's step on a pack in one sweep, or None.

    Native CUDA steps with some penalties only: Triton does with all, where nobody asked for one.
    """
    if (chosen := choose(pack).backend).steps(pack):
        return chosen
    if requested() != "auto" or pack.irregular is not None:
        return None
    b = backend("triton", pack.device_type)
    return b if (b.missing() or b.refuses(pack)) is None else None
