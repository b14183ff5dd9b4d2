"""Where tensors lie, their gradients, moments and anchors: a look at each at every call, for sweeps
in Triton.

Compiled (csrc/look.h) where the compiled module is there, else in Python; both compare every tensor
with what the pack recorded, and ask for the storage of one that moved. Addresses are int64 numbers
in `bytes`: one comparison with the last call's, one copy to a device. 0 stands for no gradient, and
for a row that the caller must see to, which is then in `others`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..memory import is_freed, overlapping
from ..pack import GradientMismatch, Pack, StaleLayout
from ..tensors import check_gradients
from .native import load

try:  # one call for all tensors; private, so only ever used to agree faster
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

_grad = attrgetter("grad")


class Shown(NamedTuple):
    """The tensors and gradients of one call, which lives as long as their addresses are used."""

    tensors: bytes
    gradients: bytes
    present: int  # gradients that exist
    others: list[int]  # rows whose gradient has other strides
    alive: list[Tensor | None]


class Beside(NamedTuple):
    """The tensors of one call and what lies beside each: an optimizer's moment, or nothing."""

    tensors: bytes
    moments: bytes
    float32: bytes  # of each moment, whether (1) it is float32 and not its tensor's dtype
    others: list[int]  # rows that share memory, or whose moment has other strides or another dtype


class States(NamedTuple):
    """Where an optimizer's states lie beside the tensors, and its masters of them."""

    states: list[bytes]  # of each kind of state, 0 for none
    float32: bytes  # of each row, whether (1) its states are float32 and it is not
    masters: bytes  # 0 for none


class CompiledLook:
    def __init__(self, pack: Pack, tensors: list[Tensor]) -> None:
        self._native = load()
        self._look = self._native.Look(tensors, pack.anchors or [])

    def tensors(self, tensors: list[Tensor]) -> bytes:
        return self._ask("tensors", tensors)

    def separate_tensors(self, tensors: list[Tensor]) -> tuple[bytes, list[int]]:
        """`others`: rows that share memory with another row."""
        return self._ask("separate_tensors", tensors)

    def anchors(self) -> bytes:
        """[rows, 2]: of origins and weights; nothing if there are none. To be asked after the
        tensors."""
        return self._ask("anchors")

    def with_moments(self, tensors: list[Tensor], moments: list[Tensor | None]) -> Beside:
        return Beside(*self._ask("with_moments", tensors, moments))

    def states(
        self, states: Sequence[list[Tensor | None]], masters: list[Tensor | None]
    ) -> States | None:
        """`masters`: one for each tensor, or nothing. None where no sweep can walk them: some share
        memory, have other strides than their tensor, or dtypes that are neither float32 nor its
        own, or not alike.

        Raises:
            ValueError: one that cannot be its tensor's.
        """
        found = self._ask("states", states, masters)
        return None if found is None else States(*found)

    def with_gradients(self, tensors: list[Tensor], grads: list[Tensor | None]) -> Any:
        return self._ask("with_gradients", tensors, grads)

    def with_own_gradients(self, tensors: list[Tensor]) -> Any:
        return self._ask("with_own_gradients", tensors)

    def _ask(self, verb: str, *args: Any) -> Any:
        try:
            return getattr(self._look, verb)(*args)
        except self._native.StaleLayout as error:
            raise StaleLayout(str(error)) from None
        except self._native.GradientMismatch:
            raise GradientMismatch from None


class PythonLook:
    """The same, some ten times slower."""

    def __init__(self, pack: Pack, tensors: list[Tensor]) -> None:
        self._pack = pack
        self._bytes = [shape.numel() * dtype.itemsize for dtype, shape, _ in pack.geometry]
        self._pairs = [t for pair in pack.anchors or () for t in pair]
        self._weights = self._gradients = self._anchors = self._states = _Seen([], [])
        self._found: States | None = None

    def tensors(self, tensors: list[Tensor]) -> bytes:
        return self._look(tensors).addresses

    def separate_tensors(self, tensors: list[Tensor]) -> tuple[bytes, list[int]]:
        seen = self._look(tensors)
        return seen.without(seen.overlapping), seen.overlapping

    def anchors(self) -> bytes:
        return self._anchors.addresses

    def with_moments(self, tensors: list[Tensor], moments: list[Tensor | None]) -> Beside:
        seen = self._look(tensors)
        others, flags = {*seen.overlapping}, bytearray(len(tensors))
        for i, (t, m) in enumerate(zip(tensors, moments, strict=True)):
            if m is None:
                continue
            fits = m.shape == t.shape and m.device == t.device and m.is_floating_point()
            if not fits or m.is_neg() or is_freed(m):
                raise ValueError(f"row {i}: a state unlike its tensor")
            if m.stride() != t.stride() or m.dtype not in (t.dtype, torch.float32):
                others.add(i)
            flags[i] = m.dtype != t.dtype
        for i in others:
            flags[i] = 0
        beside = [None if i in others else m for i, m in enumerate(moments)]
        return Beside(seen.without(others), _addresses(beside), bytes(flags), sorted(others))

    def with_gradients(self, tensors: list[Tensor], grads: list[Tensor | None]) -> Shown:
        w = self._look(tensors).addresses
        if not self._gradients.is_of(grads):
            try:
                check_gradients(grads, tensors, str)
            except (TypeError, ValueError):
                raise GradientMismatch from None
            seen = self._gradients = _Seen(grads, [0] * len(grads))
            pairs = enumerate(zip(tensors, grads, strict=True))
            seen.others = [i for i, (t, g) in pairs if g is not None and g.stride() != t.stride()]
        seen = self._gradients
        return Shown(w, seen.without(seen.others), seen.present, seen.others, grads)

    def with_own_gradients(self, tensors: list[Tensor]) -> Shown:
        return self.with_gradients(tensors, list(map(_grad, tensors)))

    def states(
        self, states: Sequence[list[Tensor | None]], masters: list[Tensor | None]
    ) -> States | None:
        masters = masters or [None] * len(self._bytes)
        given = [t for kind in (*states, masters) for t in kind]
        if not self._states.is_of(given):
            beside = [list(kinds) for kinds in zip(*states, masters, strict=True)]
            fine = [self._fit(i, kinds) for i, kinds in enumerate(beside)]
            sizes = [0 if t is None else t.numel() * t.element_size() for t in given]
            self._states, self._found = _Seen(given, sizes), None
            if all(fine) and not self._states.overlapping:
                *addresses, last = map(_addresses, (*states, masters))
                wide = (
                    any(t is not None and t.dtype != dtype for t in own)
                    for (*own, _), (dtype, *_) in zip(beside, self._pack.geometry, strict=True)
                )
                self._found = States(addresses, bytes(wide), last)
        return self._found

    def _fit(self, i: int, beside: list[Tensor | None]) -> bool:
        """Whether what lies beside row i, its states and its master, can be swept with it."""
        dtype, shape, strides = self._pack.geometry[i]
        states, master = [t for t in beside[:-1] if t is not None], beside[-1]
        there = states if master is None else [*states, master]
        for t in there:
            if t.shape != shape or t.device != self._pack.device or t.is_neg() or is_freed(t):
                raise ValueError(f"row {i}: a state unlike its tensor")
        dtypes = {t.dtype for t in states}
        return (
            all(t.stride() == strides for t in there)
            and (dtypes <= {dtype} or dtypes == {torch.float32})
            and (master is None or (master.dtype == torch.float32 and dtype != torch.float32))
        )

    def _look(self, tensors: list[Tensor]) -> _Seen:
        if not (self._weights.is_of(tensors) and self._anchors.is_of(self._pairs)):
            self._pack.check_rows(tensors)
            self._weights = _Seen(tensors, self._bytes)
            self._anchors = _Seen(self._pairs, [0] * len(self._pairs))
        return self._weights


def look_at(pack: Pack, tensors: list[Tensor]) -> CompiledLook | PythonLook:
    return (PythonLook if isinstance(load(), str) else CompiledLook)(pack, tensors)


class _Seen:
    """What a list of tensors was at a look."""

    def __init__(self, tensors: Sequence[Tensor | None], sizes: list[int]) -> None:
        there = [t for t in tensors if t is not None]
        self.addresses = _addresses(tensors)
        self.present = len(there)
        self.others: list[int] = []
        self.overlapping = overlapping(array("q", self.addresses), sizes)
        self._alike = _alike(there)

    def is_of(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are like those, and lie where they lay."""
        there = tensors
        if self.present < len(tensors):
            there = [t for t in tensors if t is not None]
        return self._alike(there) and _addresses(tensors) == self.addresses

    def without(self, rows: Collection[int]) -> bytes:
        if not rows:
            return self.addresses
        addresses = array("q", self.addresses)
        for i in rows:
            addresses[i] = 0
        return addresses.tobytes()


def _addresses(tensors: Sequence[Tensor | None]) -> bytes:
    try:
        return array("q", map(Tensor.data_ptr, tensors)).tobytes()
    except TypeError:  # some are None
        return array("q", [0 if t is None else t.data_ptr() for t in tensors]).tobytes()


def _alike(tensors: list[Tensor]) -> Callable[[list[Tensor]], bool]:
    """Whether others are as these are now: dtypes, shapes, strides, devices."""
    if TensorGuards is not None and tensors:
        guards = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],
            dynamic_dims_strides=[list(t.stride()) for t in tensors],
        )
        number = len(tensors)
        return lambda given: len(given) == number and guards.check(*given)
    facts = list(map(_facts, tensors))
    return lambda given: list(map(_facts, given)) == facts


def _facts(t: Tensor | None) -> tuple | None:
    if t is None:
        return None
    return t.dtype, t.shape, t.device, t.layout == torch.strided and t.stride()
