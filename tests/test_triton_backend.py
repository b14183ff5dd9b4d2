"""The Triton backend behind pyreg's functions, on CPU tensors under Triton's interpreter.

The interpreter runs programs one after the other: this says nothing about races or speed.
"""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from functools import partial

import pytest
import torch
from device import as_if_captured, launches
from swept import Sweeps
from torch import nn

import pyreg
from pyreg.backend import addresses

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test sets it)", allow_module_level=True)
pytest.importorskip("triton")

PENALTIES = [pyreg.L1(0.3), pyreg.L2(0.07), pyreg.ElasticNet(0.3, 0.07)]


def net() -> nn.Module:
    """Several shapes and dtypes, an empty parameter, and one that is not contiguous."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(70, 60), nn.LayerNorm(9))
    module[0].weight.data = module[0].weight.data.to(memory_format=torch.channels_last)
    module[1].bias.data = module[1].bias.data.bfloat16()
    module.register_parameter("empty", nn.Parameter(torch.empty(0)))
    return module


@pytest.fixture(autouse=True, params=["compiled look", "look in Python"])
def use_triton(request, monkeypatch):
    if request.param == "look in Python":
        monkeypatch.setattr(addresses, "load", lambda: "no compiled module")
    elif isinstance(addresses.load(), str):
        pytest.skip(addresses.load())
    with pyreg.use_backend("triton"):
        yield


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_value_and_gradient(penalty):
    """As torch's: the value to 2 * (16 + 1) * 2^-24, a gradient to two roundings (in bfloat16, one
    of 2^-9 more)."""
    module, other = net(), net()
    value = pyreg.penalty(module, penalty)
    value.backward()
    with pyreg.use_backend("torch"):
        expected = pyreg.penalty(other, penalty)
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=34 * 2**-24, atol=0)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        unit = 2**-8 if p.dtype == torch.bfloat16 else 2**-23
        torch.testing.assert_close(p.grad, q.grad, rtol=unit, atol=0)
        assert p.grad.stride() == p.stride()


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_accumulate_prox_and_stats(penalty):
    """As the torch backend's, with a parameter without gradient and a gradient of other strides."""
    results = []
    for backend in ("triton", "torch"):
        module = net()
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        module[2].bias.grad = None
        module[0].weight.grad = torch.ones(5, 3, 3, 3)
        reg = pyreg.Regularizer(module, {"0.*": pyreg.L1(0.2), "*": penalty})
        with pyreg.use_backend(backend):
            value = reg.accumulate_(0.5)
            reg.prox_(0.1)
            stats = reg.stats().table
        assert module[2].bias.grad is None
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        results.append((value, grads, list(module.parameters()), stats))
    (value, grads, weights, stats), (v, g, w, s) = results
    torch.testing.assert_close(value, v, rtol=34 * 2**-24, atol=0)
    torch.testing.assert_close(stats, s, rtol=1e-2, atol=0)  # bfloat16 weights may round apart
    for a, b in zip([*grads, *weights], [*g, *w], strict=True):
        unit = 2**-7 if a.dtype == torch.bfloat16 else 2**-22
        torch.testing.assert_close(a, b, rtol=unit, atol=unit)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adamax])
def test_a_prox_in_an_optimizers_metric(optimizer):
    """Several steps, as the torch backend's; one parameter takes no part."""
    results = []
    for backend in ("triton", "torch"):
        module = net()
        given = optimizer(module.parameters(), lr=0.02)
        reg = pyreg.Regularizer(module, {"0.*": pyreg.L1(0.2), "*": pyreg.ElasticNet(0.3, 0.07)})
        reg.attach(given, "prox")
        with pyreg.use_backend(backend):
            for k in range(3):
                for p in module.parameters():
                    p.grad = torch.full_like(p, 0.1 + k)
                module[2].bias.grad = None
                given.step()
        results.append((reg.last_value, list(module.parameters())))
    (value, weights), (v, w) = results
    torch.testing.assert_close(value, v, rtol=1e-3, atol=0)  # bfloat16 weights may round apart
    for a, b in zip(weights, w, strict=True):
        unit = 2**-7 if a.dtype == torch.bfloat16 else 2**-20
        torch.testing.assert_close(a, b, rtol=unit, atol=unit)


def test_a_strength_that_changes_and_one_that_learns():
    module = net()
    lam = torch.tensor(0.5, requires_grad=True)
    reg = pyreg.Regularizer(module, pyreg.L1(lam))
    value = reg()
    (by_lam,) = torch.autograd.grad(value, lam)
    torch.testing.assert_close(by_lam, (value / lam).detach())
    with torch.no_grad():
        lam.mul_(2)
        torch.testing.assert_close(reg(), 2 * value)


def test_replaced_data_is_noticed():
    module = net()
    reg = pyreg.Regularizer(module, pyreg.L1(1.0))
    reg()
    module[1].weight.data = torch.full((3,), 2.0, dtype=torch.float64)
    expected = sum(p.detach().double().abs().sum() for p in module.parameters())
    torch.testing.assert_close(reg().detach(), expected, rtol=1e-6, atol=0)
    assert reg().dtype == torch.float64


def test_rows_that_share_memory_are_taken_in_turn():
    """In prox; gradients are refused. Two programs would write the same place at once."""
    memory, weights = torch.zeros(6), torch.full((6,), 3.0)
    a, b, c = (nn.Parameter(t) for t in (weights[:4], weights[2:], torch.ones(4)))
    a.grad, b.grad, c.grad = memory[:4], memory[2:], torch.zeros(4)
    reg = pyreg.Regularizer({"a": a, "b": b, "c": c}, pyreg.L1(1.0))
    with pytest.raises(ValueError, match=r"\('a'\) and params\[1\] \('b'\): .*share memory"):
        reg.accumulate_()
    assert not memory.any()
    assert not c.grad.any()
    reg.prox_(0.5)
    assert weights.tolist() == [2.5, 2.5, 2.0, 2.0, 2.5, 2.5]
    assert c.tolist() == [0.5] * 4


def test_memory_that_was_freed_is_noticed():
    module = net()
    reg = pyreg.Regularizer(module, pyreg.L1(1.0))
    reg.prox_(0.1)
    module[1].weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"'1.weight'.*no memory"):
        reg.prox_(0.1)


def test_a_gradient_that_cannot_be_one_is_named():
    module = net()
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    module[1].weight.data = module[1].weight.data.double()
    with pytest.raises(ValueError, match=r"'1.weight'.* has a gradient float32"):
        pyreg.Regularizer(module, pyreg.L1(1.0)).accumulate_()
    assert not any(p.grad.any() for p in module.parameters())


def anchors(module: nn.Module, seed: int, dtypes: list[torch.dtype]) -> dict[str, torch.Tensor]:
    """Numbers >= 0 like the parameters, in other dtypes."""
    torch.manual_seed(seed)
    named = zip(module.named_parameters(), itertools.cycle(dtypes), strict=False)
    return {name: torch.rand_like(p, dtype=dtype) for (name, p), dtype in named}


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
def test_anchored_penalties(optimizer):
    """Rows with an anchor, with weights too, with neither: as the torch backend's."""
    start = anchors(net(), 1, [torch.float16, torch.float32, torch.float64])
    fisher = anchors(net(), 2, [torch.float32, torch.bfloat16])
    rules = {
        "0.*": pyreg.L2(0.3, anchor=start),
        "1.weight": pyreg.ElasticNet(0.3, 0.07),
        "*": pyreg.L1(0.2, anchor=start, weight=fisher),
    }
    results = []
    for backend in ("triton", "torch"):
        module = net()
        reg = pyreg.Regularizer(module, rules)
        with pyreg.use_backend(backend):
            (2 * reg()).backward()
            module[0].weight.grad = torch.ones(5, 3, 3, 3)  # of other strides
            if optimizer is None:
                value = reg.accumulate_(0.5)
                reg.prox_(0.1)
            else:
                given = optimizer(module.parameters(), lr=0.02)
                reg.attach(given, "prox")
                given.step()
                value = reg.last_value
        results.append((value, [t for p in module.parameters() for t in (p.grad, p)]))
    (value, tensors), (v, expected) = results
    torch.testing.assert_close(value, v, rtol=1e-3, atol=0)  # bfloat16 weights may round apart
    for a, b in zip(tensors, expected, strict=True):
        unit = 2**-7 if a.dtype == torch.bfloat16 else 2**-20
        torch.testing.assert_close(a, b, rtol=unit, atol=unit)


class TestAnchorsThatChange:
    """A plain and an anchored rule: two packs. Neither is written if the other cannot be."""

    @pytest.fixture(autouse=True)
    def make(self):
        self.a, self.b = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
        for p in (self.a, self.b):
            p.grad = torch.zeros(5)
        self.anchor = torch.zeros(5)
        rules = {"a": pyreg.L2(1.0), "b": pyreg.L2(1.0, anchor={"b": self.anchor})}
        self.reg = pyreg.Regularizer({"a": self.a, "b": self.b}, rules)
        self.reg.prox_(0.0)

    def test_moved_and_of_another_dtype(self):
        for anchor in (torch.full((5,), 3.0), torch.full((5,), 3.0).half()):
            self.anchor.data = anchor
            assert self.reg.accumulate_().item() == 5 + 20
        assert (self.a.grad.tolist(), self.b.grad.tolist()) == ([4.0] * 5, [-8.0] * 5)

    def test_freed(self):
        self.anchor.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"'b'\): its anchor.*has no memory"):
            self.reg.prox_(1.0)
        assert self.a.tolist() == [1.0] * 5

    def test_the_parameter_itself(self):
        self.b.data = self.anchor
        with pytest.raises(ValueError, match=r"'b'.*is the parameter itself"):
            self.reg.accumulate_()
        assert self.a.grad.tolist() == [0.0] * 5

    def test_a_negated_parameter(self):
        self.b.data = torch._neg_view(torch.ones(5))
        with pytest.raises(pyreg.BackendError, match="is a lazily negated view"):
            self.reg.accumulate_()
        assert self.a.grad.tolist() == [0.0] * 5


def test_anchors_that_it_cannot_walk_are_refused_with_the_reason():
    w = {"w": torch.ones(4, 6)}
    reg = pyreg.Regularizer(w, pyreg.L2(1.0, anchor={"w": torch.ones(6, 4).t()}), include_frozen=1)
    with pytest.raises(pyreg.BackendError, match="has its anchor in a tensor of other strides"):
        reg()


def test_one_launch_for_all_anchored_rows():
    module = net()
    start = anchors(module, 1, [torch.float16, torch.float32])
    reg = pyreg.Regularizer(
        module, {"1.*": pyreg.L2(0.3, weight=start), "*": pyreg.L1(0.1, anchor=start)}
    )
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    assert launches(torch.device("cpu"), reg.accumulate_) == ["accumulate"]
    assert launches(torch.device("cpu"), lambda: reg.prox_(0.1)) == ["prox"]


def test_what_it_cannot_serve_is_refused_with_the_reason():
    with pytest.raises(pyreg.BackendError, match=r"params\[0\] is not dense"):
        pyreg.l1([torch.ones(8)[::2]], 1.0)


def test_auto_prefers_native_for_cpu_tensors():
    """Interpreted kernels are slow, and run only when asked for by name."""
    with pyreg.use_backend("auto"):
        assert "native" in str(pyreg.Regularizer(net(), pyreg.L1(1.0))) or (
            not pyreg.backends()[0].available
        )


def test_a_graph_outlives_its_pack(monkeypatch):
    """Its tables and scratch stay, whatever becomes of the pack that it was captured with."""
    from pyreg.triton_kernels import launch

    monkeypatch.setattr(launch, "_kept_for_graphs", {})
    sweeps = Sweeps([torch.ones(5), torch.ones(7)], PENALTIES[:1], backend="triton")
    gradients = [torch.zeros_like(t) for t in sweeps.tensors]
    sweeps.accumulate(gradients)
    as_if_captured(partial(sweeps.accumulate, gradients))()
    layout = sweeps.pack.layouts["triton"].layout
    plan, addresses_of = layout._by_rule, layout._addresses
    used = [*plan._scratch[-1], *(table._data for table in plan._tables)]
    used += [addresses_of[of]._table._data for of in ("w", "g")]
    kept, gone = [weakref.ref(t) for t in used], [weakref.ref(t) for t in plan._scratch[0]]
    del sweeps, layout, plan, addresses_of, used
    gc.collect()
    assert all(t() is not None for t in kept)
    assert all(t() is None for t in gone)
