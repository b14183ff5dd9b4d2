"""DTensors beside the plain tensors that they are shards of: models, placements, comparisons.

A scenario of `sharded_sweeps.py` or `sharded_steps.py` runs on every rank (`ranks.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pyreg

RANKS = 4
SCENARIOS: dict[str, Callable[[], None]] = {}
RULES = {"0.weight": pyreg.ElasticNet(0.02, 0.03), "2.*": pyreg.MCP(0.02, 3.0), "*": pyreg.L1(0.01)}


def scenario(of: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[of.__name__.removeprefix("on_")] = of
    return of


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Of sizes that 4 does not divide: a rank's part may be smaller, or empty."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)


def flat(model: nn.Module) -> nn.Module:
    """FSDP2: every parameter sharded over all ranks."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def hybrid(model: nn.Module) -> nn.Module:
    """HSDP: sharded over two ranks, replicated over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(model, mesh=mesh)


def two_ways(model: nn.Module) -> nn.Module:
    """Tensor parallelism and FSDP2: several kinds of placement, and a bias that is not sharded
    by the former."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def in_parallel(model: nn.Module) -> nn.Module:
    """Tensor parallelism alone."""
    mesh = init_device_mesh("cpu", (RANKS,))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def by_layer(model: nn.Module) -> nn.Module:
    """As one does: layers are sharded again after their forward, the rest is not."""
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


KINDS = {"tp": in_parallel, "fsdp": flat, "hsdp": hybrid, "tp and fsdp": two_ways}


def pairs(dtype: torch.dtype = torch.float32) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(plain, sharded) of each kind, with the same gradients."""
    for kind in KINDS.values():
        plain, sharded = net(dtype), kind(net(dtype))
        give_gradients(plain, sharded, 0)
        yield plain, sharded


def give_gradients(plain: nn.Module, sharded: nn.Module, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for p, s in zip(plain.parameters(), sharded.parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        s.grad = distribute(p.grad, s)


def distribute(t: Tensor, like: Tensor) -> Tensor:
    """t, placed as `like` is."""
    out = torch.zeros_like(like.detach())
    mine = places(like)
    out.to_local().copy_(t.reshape(-1)[mine.reshape(-1)].view(mine.shape))
    return out


def places(like: DTensor) -> Tensor:
    """Which elements of the whole this rank holds."""
    own = torch.arange(like.numel()).view(like.shape)
    mesh, rank = like.device_mesh, like.device_mesh.get_coordinate()
    # (Where FSDP shards what tensor parallelism has sharded, the latter comes first.)
    for d in reversed(range(mesh.ndim)):
        if not isinstance(like.placements[d], Replicate):
            parts = own.chunk(mesh.size(d), like.placements[d].dim)
            own = (
                parts[rank[d]] if rank[d] < len(parts) else own.narrow(like.placements[d].dim, 0, 0)
            )
    return own


def same(plain: nn.Module, sharded: nn.Module, *, gradients: bool = False) -> None:
    """Bit for bit."""
    for p, s in zip(plain.parameters(), sharded.parameters(), strict=True):
        own, other = (p.grad, s.grad) if gradients else (p.detach(), s.detach())
        assert torch.equal(own, other.full_tensor())


def close(a: Tensor | None, b: Tensor | None, tolerance: float = 1e-6) -> None:
    assert {type(a), type(b)} == {Tensor}  # on every rank the number, not a part of it
    torch.testing.assert_close(a, b, rtol=tolerance, atol=0)
