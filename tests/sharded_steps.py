"""Scenarios of optimizers over DTensors: attached regularizers, and steps in one sweep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from sharded import (
    RANKS,
    RULES,
    by_layer,
    close,
    distribute,
    flat,
    give_gradients,
    hybrid,
    net,
    pairs,
    same,
    scenario,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import pyreg
from pyreg import optim
from pyreg.optim import fused

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
