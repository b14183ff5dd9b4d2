"""Scenarios of sweeps over DTensors, and of input that cannot be swept."""

from __future__ import annotations

import pytest
import torch
from sharded import (
    RANKS,
    RULES,
    close,
    distribute,
    flat,
    net,
    pairs,
    same,
    scenario,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import pyreg
from pyreg import optim, sweeps
from pyreg.metric import Metric
from pyreg.pack import Packs
from pyreg.tensors import label


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
