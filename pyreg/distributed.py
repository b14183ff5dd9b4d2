"""Parameters that are DTensors (FSDP2, tensor parallelism): what is local, what ranks add up.

Omega is a sum over elements. So a rank's sweep visits what the rank holds, gradients and proximal
steps need nobody else, and a value is summed over the mesh dimensions that shard its tensors: where
they are replicated every rank has the same, which counts once. What is summed are the powers of
elements, before any root. Every rank of a mesh must make the call, as with any collective.

DTensors are looked for only where `torch.distributed.tensor` was imported: nobody has one before.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_MAX = 2  # the column of `reference.stats` that is no sum


class Shards(NamedTuple):
    """The ranks that hold parts of a tensor."""

    mesh: DeviceMesh
    dims: tuple[int, ...]  # those of the mesh over which it is sharded; over others, replicated

    def __str__(self) -> str:
        names = self.mesh.mesh_dim_names or [f"dim {d}" for d in range(self.mesh.ndim)]
        over = [f"{names[d]} ({self.mesh.size(d)})" for d in self.dims]
        return f"sharded over {', '.join(over)}" if over else "replicated"

    @property
    def part(self) -> int:
        """Which part this rank holds; replicas hold the same."""
        at, part = self.mesh.get_coordinate() or [0] * self.mesh.ndim, 0
        for d in self.dims:
            part = part * self.mesh.size(d) + at[d]
        return part

    def add_up(self, numbers: Tensor, op: str = "SUM") -> Tensor:
        """The sum (or "MAX") of every rank's, where the numbers are; each replica counts once."""
        if not self.dims or self.mesh.get_coordinate() is None:
            return numbers
        sums = numbers.detach().to(self.mesh.device_type, copy=True)
        for d in self.dims:
            torch.distributed.all_reduce(
                sums, getattr(torch.distributed.ReduceOp, op), self.mesh.get_group(d)
            )
        return sums.to(numbers.device)

    def add_up_stats(self, table: Tensor) -> Tensor:
        """Of `reference.stats`, [tensors, 5]."""
        sums = self.add_up(table)
        # (What a maximum makes of NaN is anybody's choice; the sum of |w| keeps it.)
        highest = self.add_up(table[:, _MAX].nan_to_num(0.0, torch.inf), "MAX")
        sums[:, _MAX] = torch.where(sums[:, 0].isnan(), torch.nan, highest)
        return sums

    def add_up_value(self, value: Tensor) -> Tensor:
        """Differentiable: every rank's part of the value gets the value's gradient."""
        return _AddedUp.apply(value, self) if self.dims else value

    def shared(self, number: Tensor) -> Tensor:
        """A number that every rank uses on its own part: its gradient is the sum of theirs."""
        return _Shared.apply(number, self) if self.dims and number.requires_grad else number


# Each is the other's backward.
class _AddedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return shards.add_up(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.shared(grad), None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return number.view_as(number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.add_up_value(grad), None


def is_dtensor(t: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def shards_of(t: Tensor) -> Shards | None:
    """Who holds parts of a DTensor; None for any other tensor."""
    if not is_dtensor(t):
        return None
    dims = [d for d, placement in enumerate(t.placements) if not placement.is_replicate()]
    return Shards(t.device_mesh, tuple(dims))


def local(t: Tensor) -> Tensor:
    """What this rank holds of a DTensor, without a graph; any other tensor itself."""
    if not is_dtensor(t):
        return t
    own = t._local_tensor  # (`to_local` takes much longer)
    return own if type(own) is Tensor or not hasattr(own, "wait") else own.wait()


def gathered(t: Tensor) -> Tensor:
    """All elements of a DTensor, on every rank; any other tensor itself."""
    return t.full_tensor() if is_dtensor(t) else t


def place_gradient(t: Tensor) -> bool:
    """Place the gradient of `t` as `t` is, as an optimizer's arithmetic would; False if it cannot
    be: autograd leaves sums over ranks, say, where a replicated parameter met a sharded batch."""
    grad = t.grad
    if grad is None or placed_alike(grad, t):
        return True
    if not on_one_mesh(grad, t):
        return False
    with torch.no_grad():
        t.grad = grad.redistribute(placements=t.placements)
    return True


def on_one_mesh(a: Tensor, b: Tensor) -> bool:
    if not is_dtensor(b):
        return not is_dtensor(a)
    return is_dtensor(a) and a.device_mesh == b.device_mesh


def differentiable(t: Tensor) -> Tensor:
    """`local(t)` with a graph, if t has one or is to have a gradient."""
    if not (torch.is_grad_enabled() and t.requires_grad):
        return local(t)
    return t.to_local(grad_placements=t.placements)


def check_placed(t: Tensor, name: str) -> None:
    """Raise TypeError if no rank holds elements of `t`, but terms of them."""
    if is_dtensor(t) and any(placement.is_partial() for placement in t.placements):
        raise TypeError(
            f"{name}: a DTensor placed {tuple(t.placements)}: its elements are sums over ranks; "
            "redistribute it first"
        )


def check_beside(beside: Tensor | None, t: Tensor, name: str, what: str) -> None:
    """Raise ValueError unless every rank holds the same elements of `beside`, if any, as of `t`."""
    if beside is not None and not placed_alike(beside, t):
        raise ValueError(
            f"{name}: a {_described(t)}, but its {what} is a {_described(beside)}; see "
            "torch.distributed.tensor.distribute_tensor"
        )


def placed_alike(a: Tensor, b: Tensor) -> bool:
    """Whether every rank holds the same elements of both."""
    if not is_dtensor(b):
        return not is_dtensor(a)
    return is_dtensor(a) and (
        a._spec is b._spec or (a.device_mesh, a.placements) == (b.device_mesh, b.placements)
    )


def _described(t: Tensor) -> str:
    return f"DTensor placed {tuple(t.placements)}" if is_dtensor(t) else "tensor of one rank"
