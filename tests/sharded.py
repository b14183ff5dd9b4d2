"""What test_distributed.py runs on every rank of a process group: each of `SCENARIOS` compares
DTensors with the plain tensors that they are shards of."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pyreg
from pyreg import optim, sweeps
from pyreg.metric import Metric
from pyreg.optim import fused
from pyreg.pack import Packs, label

RANKS = 4
SCENARIOS: dict[str, Callable[[], None]] = {}
RULES = {"0.weight": pyreg.ElasticNet(0.02, 0.03), "2.*": pyreg.MCP(0.02, 3.0), "*": pyreg.L1(0.01)}


def scenario(of: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[of.__name__.removeprefix("on_")] = of
    return of


def run(rank: int, folder: Path) -> None:
    """Write each scenario's traceback, or nothing, to `folder`/name.rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    for name, of in SCENARIOS.items():
        try:
            of()
            said = ""
        except BaseException:
            said = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(said)
        dist.barrier()
    dist.destroy_process_group()


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


@scenario
def on_gradients_are_distributed_as_they_should_be() -> None:
    for plain, sharded in pairs():
        same(plain, sharded)
        same(plain, sharded, gradients=True)
        for s in sharded.parameters():
            assert s.grad.placements == s.placements


@scenario
def on_value() -> None:
    for plain, sharded in pairs():
        whole = pyreg.Regularizer(plain, RULES)()
        close(pyreg.Regularizer(sharded, RULES)(), whole)
        close(pyreg.l1(sharded, 0.1), pyreg.l1(plain, 0.1))
        with pyreg.use_backend("torch"):
            close(pyreg.Regularizer(sharded, RULES)(), whole)
        with torch.no_grad():
            close(pyreg.Regularizer(sharded, RULES)(), whole)


@scenario
def on_gradient_of_the_value() -> None:
    for backend in ("auto", "torch"):
        for plain, sharded in pairs():
            with pyreg.use_backend(backend):
                for model in (plain, sharded):
                    model[0].bias.requires_grad_(False)
                    (3 * pyreg.Regularizer(model, RULES)()).backward()
            for p, s in zip(plain.parameters(), sharded.parameters(), strict=True):
                assert s.grad.placements == s.placements
                close(s.grad.full_tensor(), p.grad)


@scenario
def on_learnable_strengths() -> None:
    for backend in ("auto", "torch"):
        for plain, sharded in pairs():
            found = []
            for model in (plain, sharded):
                lam, l2 = (torch.tensor(x, requires_grad=True) for x in (0.02, 0.03))
                rules = {"0.*": pyreg.ElasticNet(lam, l2), "*": pyreg.L1(lam)}
                with pyreg.use_backend(backend):
                    (2 * pyreg.Regularizer(model, rules)()).backward()
                found.append((lam.grad, l2.grad))
            for own, other in zip(*found, strict=True):
                close(own, other)


@scenario
def on_sweeps_in_place() -> None:
    for plain, sharded in pairs():
        both = [pyreg.Regularizer(model, RULES) for model in (plain, sharded)]
        close(*(reg.accumulate_(2.0) for reg in both))
        same(plain, sharded, gradients=True)
        for a, b in zip(*(reg.last_value.values() for reg in both), strict=True):
            close(a, b)
        before = [s._version for s in sharded.parameters()]
        for reg in both:
            reg.prox_(0.5)
        same(plain, sharded)
        assert all(s._version > v for s, v in zip(sharded.parameters(), before, strict=True))
        assert both[1].stats().total()["zeros"] > 0


@scenario
def on_created_gradients() -> None:
    for plain, sharded in pairs():
        for model in (plain, sharded):
            model.zero_grad()
            pyreg.Regularizer(model, RULES).accumulate_(create_grads=True)
        same(plain, sharded, gradients=True)


@scenario
def on_stats() -> None:
    for plain, sharded in pairs():
        with torch.no_grad():
            for model in (plain, sharded):
                w = model[0].weight
                if model is plain:
                    w[0, 0], w[5, 6], w[3] = torch.nan, torch.inf, 0.0
                else:
                    w.copy_(distribute(plain[0].weight.detach(), w))
        own, other = (pyreg.Regularizer(m, RULES).stats() for m in (plain, sharded))
        torch.testing.assert_close(own.table, other.table, rtol=1e-6, atol=0, equal_nan=True)
        assert own.elements == other.elements
        assert str(own.zeros) == str(other.zeros)
        assert other.total()["elements"] == sum(p.numel() for p in plain.parameters())


@scenario
def on_report() -> None:
    for plain, sharded in pairs():
        own, other = (pyreg.Regularizer(m, RULES).report(gradients=True) for m in (plain, sharded))
        for a, b in zip(own.rules, other.rules, strict=True):
            assert (a.parameters, a.elements) == (b.parameters, b.elements)
            assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-6)
        assert "sharded over" in str(other)
        assert "native" in str(other)


OPTIMIZERS = {"AdamW": {"lr": 0.02}, "SGD": {"lr": 0.1, "momentum": 0.9}, "RMSprop": {"lr": 0.01}}


@scenario
def on_attached() -> None:
    for name, options in OPTIMIZERS.items():
        for mode in ("grad", "prox"):
            for plain, sharded in pairs():
                both = []
                for model in (plain, sharded):
                    opt = getattr(torch.optim, name)(model.parameters(), **options, foreach=False)
                    reg = pyreg.Regularizer(model, RULES)
                    reg.attach(opt, mode=mode)
                    both.append((opt, reg))
                for k in range(3):
                    give_gradients(plain, sharded, k)
                    for opt, _ in both:
                        opt.step()
                    for a, b in zip(*(reg.last_value.values() for _, reg in both), strict=True):
                        close(a, b)
                same(plain, sharded)


@contextmanager
def one_sweep() -> Iterator[None]:
    """Steps in here that are not one sweep fail."""

    def by_torch(*args: object) -> None:
        raise AssertionError("this step was not one sweep")

    kept, fused.step_by_torch = fused.step_by_torch, by_torch
    try:
        yield
    finally:
        fused.step_by_torch = kept


@scenario
def on_a_step_in_one_sweep() -> None:
    with one_sweep():
        for name, options in OPTIMIZERS.items():
            for mode in ("grad", "prox"):
                for plain, sharded in pairs():
                    _same_steps(name, options, mode, plain, sharded)
        for mode in ("grad", "prox"):
            for plain, sharded in pairs(torch.bfloat16):
                _same_steps("AdamW", {"lr": 0.02, "master_weights": True}, mode, plain, sharded)


def _same_steps(name: str, options: dict, mode: str, plain: nn.Module, sharded: nn.Module) -> None:
    both = []
    for model in (plain, sharded):
        reg = pyreg.Regularizer(model, RULES)
        opt = getattr(optim, name)(model.parameters(), **options, regularizer=reg, mode=mode)
        both.append((opt, reg))
    for k in range(3):
        give_gradients(plain, sharded, k)
        for opt, _ in both:
            opt.step()
        for a, b in zip(*(reg.last_value.values() for _, reg in both), strict=True):
            close(a, b)
        assert both[0][0].last_zeros == both[1][0].last_zeros
    same(plain, sharded)
    for p, s in zip(plain.parameters(), sharded.parameters(), strict=True):
        for kind, state in both[0][0].state[p].items():
            other = both[1][0].state[s][kind]
            assert torch.equal(state, other.full_tensor() if kind != "step" else other)


@scenario
def on_a_step_without_a_penalty_asks_nobody() -> None:
    for plain, sharded in pairs():
        opts = [optim.AdamW(m.parameters(), lr=0.1) for m in (plain, sharded)]
        kept, dist.all_reduce = dist.all_reduce, None
        try:
            for opt in opts:
                opt.step()
        finally:
            dist.all_reduce = kept
        same(plain, sharded)


@scenario
def on_gradients_placed_otherwise() -> None:
    """As tensor parallelism leaves them: sums over ranks of a parameter that all have."""
    mesh = init_device_mesh("cpu", (RANKS,))
    x = torch.arange(32.0).view(8, 4)
    for mode in ("grad", "prox"):
        ends = []
        for placed in (lambda t, p: t, lambda t, p: distribute_tensor(t, mesh, [p])):
            w = nn.Parameter(placed(torch.linspace(-1, 1, 4), Replicate()))
            v = nn.Parameter(placed(torch.linspace(-1, 1, 32).view(8, 4), Shard(0)))
            (placed(x, Shard(0)) * w).sum().backward()
            v.grad = placed(x.clone(), Replicate())
            opt = optim.SGD([w, v], lr=0.01, regularizer=pyreg.L1(0.1), mode=mode)
            opt.step()
            reg = pyreg.Regularizer({"w": w, "v": v}, pyreg.L1(0.1))
            reg.accumulate_()
            found = [w.detach(), v.detach(), w.grad, v.grad]
            ends.append([t.full_tensor() if isinstance(t, DTensor) else t for t in found])
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@scenario
def on_other_layouts_of_one_rank() -> None:
    """What one rank holds has other strides, or gaps: the ranks still ask each other the same."""
    mesh, first = init_device_mesh("cpu", (RANKS,)), dist.get_rank() == 0
    whole = torch.linspace(-1, 1, 48).view(8, 6)
    for gaps in (False, True):
        for mode in ("grad", "prox"):
            own = whole.chunk(RANKS)[dist.get_rank()].clone()
            if gaps and first:
                own = own.repeat_interleave(2, 1)[:, ::2]
            p = nn.Parameter(_of(own, mesh, whole))
            p.grad = _of(own.t().contiguous().t() if first else own.clone(), mesh, whole)
            q = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
            q.grad = q.detach().clone()
            plain = nn.Parameter(whole.clone()), nn.Parameter(whole.clone())
            ends = []
            for params in ((p, q), plain):
                for t in plain:
                    t.grad = whole.clone()
                opt = optim.AdamW(params, lr=0.1, regularizer=pyreg.L1(0.3), mode=mode)
                with nullcontext() if gaps else one_sweep():
                    opt.step()
                value = opt.regularizer.last_value["*"]
                lam, c = (torch.tensor(x, requires_grad=True) for x in (0.3, 0.2))
                named = dict(zip("pq", params, strict=True))
                pyreg.Regularizer(named, {"p": pyreg.L1(lam), "q": pyreg.L2(c)})().backward()
                ends.append((value, torch.tensor(opt.last_zeros), lam.grad, c.grad))
            for a, b in zip(*ends, strict=True):
                close(a, b, 1e-5)
            torch.testing.assert_close(p.detach().full_tensor(), plain[0].detach())


def _of(own: Tensor, mesh: DeviceMesh, whole: Tensor) -> DTensor:
    stride = whole.stride()
    return DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=stride
    )


@scenario
def on_second_derivatives() -> None:
    for plain, sharded in pairs():
        found = []
        for model in (plain, sharded):
            lam = torch.tensor(0.3, requires_grad=True)
            value = pyreg.Regularizer(model, pyreg.L2(lam))()
            (slope,) = torch.autograd.grad(value, lam, create_graph=True)
            (slope**2 + lam**3).backward()
            found.append((slope.detach(), lam.grad, model[0].weight.grad))
        close(found[0][0], found[1][0])
        close(found[0][1], found[1][1])


@scenario
def on_a_change_before_backward() -> None:
    for _, sharded in pairs():
        w = sharded[0].weight
        anchor = {n: torch.zeros_like(p.detach()) for n, p in sharded.named_parameters()}
        for penalty, changed in (
            (pyreg.L2(0.1), w),
            (pyreg.L2(0.1, anchor=anchor), anchor["0.weight"]),
        ):
            value = pyreg.Regularizer(sharded, penalty)()
            with torch.no_grad():
                changed.add_(1.0)
            with pytest.raises(RuntimeError, match=r"0\.weight.*modified by an inplace operation"):
                value.backward()


@scenario
def on_reading_on_one_rank() -> None:
    for anchored in (False, True):
        for _, sharded in pairs():
            anchor = {n: torch.zeros_like(p.detach()) for n, p in sharded.named_parameters()}
            rule = pyreg.L1(0.1, anchor=anchor if anchored else None)
            reg = pyreg.Regularizer(sharded, rule)
            opt = optim.SGD(sharded.parameters(), lr=0.1, regularizer=reg, mode="prox")
            opt.step()
            if dist.get_rank() == 0:
                assert opt.last_zeros >= 0
                assert reg.last_value["*"] > 0
                assert "sharded over" in str(reg)
            dist.barrier()


@scenario
def on_unsharded_parameters_of_a_module() -> None:
    """As FSDP leaves them between a forward and its backward: not the optimizer's."""
    sharded = flat(net())
    reg = pyreg.Regularizer(sharded, RULES)
    opt = optim.SGD(sharded.parameters(), lr=0.1, regularizer=reg)
    for p in sharded.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        sharded(torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"does not hold '0\.weight'"):
        opt.step()
    sharded.reshard()
    opt.step()


@scenario
def on_versions() -> None:
    """Autograd hears of what is changed in place."""
    for _, sharded in pairs():
        opt = optim.AdamW(sharded.parameters(), lr=0.1, regularizer=pyreg.L1(0.1), mode="prox")
        before = [s._version for s in sharded.parameters()]
        opt.step()
        between = [s._version for s in sharded.parameters()]
        assert all(a < b for a, b in zip(before, between, strict=True))
        params = list(sharded.parameters())
        packs = Packs(("l1",), [0] * len(params))
        metrics = [Metric(torch.ones_like(p.detach()), 0.1) for p in params]
        sweeps.prox_in_metric(packs, params, metrics, (pyreg.L1(0.1),), label)
        assert all(s._version > v for s, v in zip(params, between, strict=True))
        metrics[0] = Metric(torch.ones(params[0].shape), 0.1)
        with pytest.raises(ValueError, match=r"params\[0\].*its moment is a tensor of one rank"):
            sweeps.prox_in_metric(packs, params, metrics, (pyreg.L1(0.1),), label)


@scenario
def on_memory_of_what_a_rank_holds() -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    block = torch.ones(6)
    a, b = (DTensor.from_local(block[i : i + 4], mesh, [Shard(0)]) for i in (0, 2))
    p, q = (nn.Parameter(distribute_tensor(torch.ones(16), mesh, [Shard(0)])) for _ in "pq")
    p.grad, q.grad = a, b
    with pytest.raises(ValueError, match="their gradients share memory"):
        pyreg.Regularizer({"p": p, "q": q}, pyreg.L1(0.1)).accumulate_()
    part = DTensor.from_local(p.detach().to_local(), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="shares memory with it"):
        pyreg.Regularizer({"p": p}, pyreg.L1(0.1, anchor={"p": part}))
    rules = {"p": pyreg.L1(0.1, anchor={"p": q}), "q": pyreg.L2(1)}
    pyreg.Regularizer({"p": p, "q": q}, rules).prox_(0.5)
    assert q.detach().full_tensor().tolist() == [0.5] * 16
    expected = torch.full((16,), 0.95)  # from q as it is by now, as of plain tensors
    assert torch.equal(p.detach().full_tensor(), expected)
    p.detach().to_local().untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory"):
        pyreg.Regularizer({"p": p}, pyreg.L1(0.1))


@scenario
def on_master_weights_changed_by_hand() -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    p = nn.Parameter(distribute_tensor(torch.ones(16, dtype=torch.bfloat16), mesh, [Shard(0)]))
    opt = optim.SGD([p], lr=0.1, master_weights=True)
    p.grad = torch.ones_like(p)
    opt.step()
    with torch.no_grad():
        p.to_local().mul_(2)
    with pytest.raises(ValueError, match="its master weights are not what it is"):
        opt.step()


@scenario
def on_random_rounding() -> None:
    """Each part by its own numbers, replicas by the same; in one sweep, and in torch's own step."""
    mesh = init_device_mesh("cpu", (2, 2))
    for placements, parts in (
        ((Replicate(), Shard(0)), (0, 1, 0, 1)),
        ((Replicate(), Replicate()), (0, 0, 0, 0)),
        ((Shard(0), Replicate()), (0, 0, 1, 1)),
        ((Shard(0), Shard(1)), (0, 1, 2, 3)),
    ):
        for anchored in (False, True):
            w = distribute_tensor(torch.ones(64, 8, dtype=torch.bfloat16), mesh, placements)
            p = nn.Parameter(w)
            anchor = {"p": torch.zeros_like(w)} if anchored else None
            reg = pyreg.Regularizer({"p": p}, pyreg.L1(0.0, anchor=anchor))
            opt = optim.SGD([p], lr=2**-9, regularizer=reg, stochastic_rounding=True, seed=5)
            for _ in range(3):
                p.grad = torch.ones_like(p)
                opt.step()
            own = [torch.empty_like(p.to_local()) for _ in range(RANKS)]
            dist.all_gather(own, p.detach().to_local().contiguous())
            assert len(own[0].unique()) > 1
            for i in range(RANKS):
                for j in range(RANKS):
                    assert torch.equal(own[i], own[j]) == (parts[i] == parts[j])


def by_layer(model: nn.Module) -> nn.Module:
    """As one does: layers are sharded again after their forward, the rest is not."""
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


@scenario
def on_real_training() -> None:
    """Forward and backward of FSDP2, with the penalty in the loss, and as an attached prox."""
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    for kind in (flat, hybrid, by_layer):
        plain, sharded = net(), kind(net())
        for model in (plain, sharded):
            reg = pyreg.Regularizer(model, {"2.*": pyreg.L2(0.02), "*": pyreg.L1(0.01)})
            opt = torch.optim.AdamW(model.parameters(), lr=0.02)
            other = pyreg.Regularizer(model, pyreg.L1(0.01))
            other.attach(opt, mode="prox")
            for _ in range(4):
                opt.zero_grad()
                (model(x).square().mean() + reg()).backward()
                opt.step()
        for p, s in zip(plain.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(s.detach().full_tensor(), p.detach(), rtol=1e-4, atol=1e-6)


@scenario
def on_sharded_later() -> None:
    """After the regularizer was made, and swept."""
    model = net()
    reg = pyreg.Regularizer(model, RULES)
    before = reg().detach()
    flat(model)
    close(reg().detach(), before)
    close(reg.accumulate_(create_grads=True), before)


@scenario
def on_packs_of_other_tensors() -> None:
    """As where a new tensor has the identity of one that is gone."""
    for plain, sharded in pairs():
        own, other = (list(model.parameters()) for model in (plain, sharded))
        for tensors in ((own, other), (other, own)):
            packs, rule = Packs(("l1",), [0] * len(own)), pyreg.L1(0.5)
            both = [sweeps.accumulate(packs, t, (rule,), 1.0, label)[0].total for t in tensors]
            close(*both)
            same(plain, sharded, gradients=True)
            everywhere = [
                t.detach().redistribute(placements=[Replicate()] * t.device_mesh.ndim)
                for t in other
            ]
            close(sweeps.value(packs, everywhere, (rule,), label), both[0])
    # What the rank holds may look the same, where the ranks hold other parts of something else.
    mesh, packs = init_device_mesh("cpu", (RANKS,)), Packs(("l1",), [0])
    for rows, kind in ((8, Shard(0)), (2, Replicate()), (8, Shard(0))):
        t = distribute_tensor(torch.ones(rows, 3), mesh, [kind])
        assert sweeps.value(packs, [t], (pyreg.L1(1.0),), label).item() == 3 * rows


@scenario
def on_plain_tensors_beside() -> None:
    for plain, sharded in pairs():
        extra = torch.linspace(-1, 1, 11).requires_grad_()
        own = {**dict(plain.named_parameters()), "x": extra}
        other = {"x": extra, **dict(sharded.named_parameters())}
        close(pyreg.Regularizer(own, RULES)(), pyreg.Regularizer(other, RULES)())
        close(pyreg.l1(own, 0.1), pyreg.l1(other, 0.1))


@scenario
def on_anchors() -> None:
    for plain, sharded in pairs():
        own = {name: torch.full_like(p, 0.1) for name, p in plain.named_parameters()}
        other = {n: distribute(own[n], s) for n, s in sharded.named_parameters()}
        both = [
            pyreg.Regularizer(model, pyreg.L2(0.1, anchor=anchor))
            for model, anchor in ((plain, own), (sharded, other))
        ]
        close(*(reg().detach() for reg in both))
        close(*(reg.accumulate_() for reg in both))
        same(plain, sharded, gradients=True)
        for reg in both:
            reg.prox_(0.5)
        same(plain, sharded)
        with pytest.raises(ValueError, match=r"0\.weight.*its anchor is a tensor of one rank"):
            pyreg.Regularizer(sharded, pyreg.L2(0.1, anchor=own))


@scenario
def on_anchors_in_a_step() -> None:
    """Which is torch's own, and the penalty's sweep beside it."""
    for plain, sharded in pairs():
        found = []
        for model, placed in ((plain, lambda t, _: t), (sharded, distribute)):
            anchor = {n: placed(torch.full(p.shape, 0.1), p) for n, p in model.named_parameters()}
            reg = pyreg.Regularizer(model, pyreg.L1(0.5, anchor=anchor))
            opt = optim.SGD(model.parameters(), lr=0.5, regularizer=reg, mode="prox")
            opt.step()
            found.append((reg.last_value["*"], torch.tensor(opt.last_zeros)))
        same(plain, sharded)
        close(found[0][0], found[1][0])
        assert found[0][1] == found[1][1]


@scenario
def on_closed_form() -> None:
    for plain, sharded in pairs():
        own, other = (list(m.parameters()) for m in (plain, sharded))
        curvatures = [w.detach().abs() + 1 for w in own]
        placed = [distribute(h, w) for h, w in zip(curvatures, other, strict=True)]
        for by_own, by_other in ((2.0, 2.0), (curvatures, placed)):
            found = pyreg.closed_form(own, by_own, pyreg.L1(0.1))
            again = pyreg.closed_form(other, by_other, pyreg.L1(0.1))
            for a, b in zip(found, again, strict=True):
                assert torch.equal(a, b.full_tensor())
        with pytest.raises(ValueError, match=r"w_star\[0\].*its hessian_diag\[0\] is a tensor"):
            pyreg.closed_form(other, curvatures, pyreg.L1(0.1))


@scenario
def on_bad_input() -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    terms = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with pytest.raises(TypeError, match=r"'w'.*sums over ranks"):
        pyreg.Regularizer({"w": terms}, pyreg.L1(0.1))
    for p in (distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)]),):
        p.requires_grad_()
        reg = pyreg.Regularizer({"w": p}, pyreg.L1(0.1))
        other = init_device_mesh("cpu", (2, 2))
        p.grad = distribute_tensor(torch.ones(8, 3), other, [Shard(0), Shard(0)])
        with pytest.raises(ValueError, match=r"'w'.*its gradient is a DTensor placed"):
            reg.accumulate_()
        assert torch.equal(p.grad.full_tensor(), torch.ones(8, 3))
        opt = optim.SGD([p], lr=0.1, regularizer=pyreg.L1(0.1))
        with pytest.raises(ValueError, match=r"params\[0\].*its gradient is a DTensor placed"):
            opt.step()
        p.grad = distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)])
        opt = optim.AdamW([p], lr=0.1, regularizer=pyreg.L1(0.1), mode="prox")
        opt.step()
        before = p.detach().full_tensor()
        opt.state[p]["exp_avg"] = torch.zeros(8, 3)
        with pytest.raises(ValueError, match=r"params\[0\].*its state .* is a tensor"):
            opt.step()
        assert torch.equal(p.detach().full_tensor(), before)


@scenario
def on_compiled() -> None:
    mesh: DeviceMesh = init_device_mesh("cpu", (RANKS,))
    p = distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)]).requires_grad_()
    reg = pyreg.Regularizer({"w": p}, pyreg.L1(0.1))
    with pytest.raises(Exception, match="DTensor"):
        torch.compile(lambda: reg(), fullgraph=True, backend="eager")()
