"""The native CUDA backend without a GPU: its bindings over the kernels' code on the host.

A test module is compiled from cuda/bindings.cpp and a launch that runs the kernels in loops, on CPU
tensors. Results must be the CPU sweeps' to the bit. Streams, real captures and speed need a GPU.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from cases import DTYPES, REGULAR, fill, penalties
from swept import flat, moments
from torch import nn

import pyreg
from pyreg import dispatch, doctor
from pyreg.backend import cuda, native
from pyreg.backend.torch import apply_prox_in_metric, taken
from pyreg.metric import Metric
from pyreg.pack import Packs
from pyreg.reference import value_dtype
from pyreg.tensors import label

CAPTURING = cuda._Queue(torch.device("cpu"), 0, True, cuda._CAPTURED)


def pack_of(tensors, rules, rule_of=None):
    names = tuple(rule.name for rule in rules)
    packs = Packs(names, rule_of or [i % len(rules) for i in range(len(tensors))])
    (pack,) = packs.current(tensors, label)
    return pack


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REGULAR, ids=repr)
def test_every_sweep_gives_the_bits_of_the_cpu(kernels, case, dtype):
    """All penalties at once, one for each tensor by turns."""
    rules = penalties()
    assert {rule.name for rule in rules} == set(cuda.load().penalties)
    on_cpu = native.NativeBackend()
    results = []
    for backend in (kernels, on_cpu):
        tensors = [t.detach() for t in case.build(dtype)]
        tensors = [t if i % 3 else t.requires_grad_() for i, t in enumerate(tensors)]
        pack = pack_of(tensors, rules)
        for i, t in enumerate(tensors):
            if i % 5 != 4:
                t.grad = torch.full_like(t, 0.25)
        value, sums = backend.value(pack, tensors, rules)
        again, of_rules, present = backend.accumulate(pack, tensors, rules, -0.3)
        grads = [torch.full_like(t, float("nan")) if i % 4 else None for i, t in enumerate(tensors)]
        backend.gradient(pack, tensors, grads, rules, 0.7)
        stats = backend.stats(pack, tensors)
        versions = [t._version for t in tensors]
        backend.prox(pack, tensors, rules, 0.1)
        assert all(t._version > v for t, v in zip(tensors, versions, strict=True))
        metrics = [metric(i, m) for i, m in enumerate(moments([t.detach() for t in tensors]))]
        versions = [t._version for t in tensors]
        after, after_of_rules = backend.prox_in_metric(pack, tensors, metrics, rules)
        assert all(t._version > v for t, v in zip(tensors, versions, strict=True))
        results.append(
            [
                value.float(),
                torch.as_tensor(again).float(),
                taken(of_rules),
            ]
            + [
                torch.as_tensor(after).float(),
                taken(after_of_rules),
                stats,
            ]
            + [taken(sums), torch.tensor(present)]
            + [t.detach() for t in tensors]
            + [t.grad for t in tensors if t.grad is not None]
            + [g for g in grads if g is not None]
        )
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def metric(i, moment):
    """Of the i-th tensor: with a moment of its own dtype or in float32, a root or none, neither."""
    kinds = (
        Metric(moment, 0.05, 1.5, 1e-3),
        Metric(moment.float(), 0.3, 0.7, 0.1),
        Metric(moment, 0.3, 1.0, 0.0, root=False),
        Metric(None, 0.3),
    )
    return kinds[i % len(kinds)]


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(70, 60)).to(dtype)


def test_the_differentiable_value(kernels):
    module, other = net(), net()
    loss = pyreg.elastic_net(module, 0.3, 0.1)
    loss.backward()
    with pyreg.use_backend("torch"):
        expected = pyreg.elastic_net(other, 0.3, 0.1)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=34 * 2**-24, atol=0)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_strengths_and_scale_are_read_where_they_lie(kernels, dtype):
    """As tensors of any dtype, changed between calls."""
    lam, scale = torch.tensor(0.5, dtype=dtype), torch.tensor(2.0, dtype=dtype)
    module = net()
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    reg = pyreg.Regularizer(module, pyreg.L1(lam))
    first = reg.accumulate_(scale)
    lam.mul_(2)
    scale.mul_(2)
    second = reg.accumulate_(scale)
    assert second == 2 * first
    for p in module.parameters():
        torch.testing.assert_close(p.grad, 5 * torch.sign(p.detach()), rtol=0, atol=0)


def test_a_strength_elsewhere_is_an_error_of_the_bindings(kernels):
    tensors = [torch.ones(3)]
    pack = pack_of(tensors, [pyreg.L1(1.0)])
    kernels.value(pack, tensors, [pyreg.L1(1.0)])
    state = pack.layouts["native"]
    with pytest.raises(ValueError, match="tensor of one element"):
        state.layout.value(tensors, [torch.ones(2), 0.0], 0, state.target("value"))


def test_a_gradient_of_other_strides_is_added_by_torch(kernels):
    w = torch.randn(5, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    w.grad = torch.ones(5, 3, 4, 4)
    value = pyreg.Regularizer({"w": w}, pyreg.L1(0.5)).accumulate_()
    torch.testing.assert_close(value, 0.5 * w.detach().abs().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(w.grad, 1 + 0.5 * torch.sign(w.detach()), rtol=0, atol=0)
    assert w.grad.is_contiguous()


def test_a_penalty_without_a_kernel_is_refused(kernels, on_host, monkeypatch):
    """Triton's kernels serve it then, or torch."""
    monkeypatch.setattr(on_host, "penalties", ("l1", "l2"))
    w = torch.ones(4)
    why = "no native kernel for penalty 'mcp'"
    assert kernels.refuses(pack_of([w], [pyreg.MCP(0.1, 3.0)])) == why
    with pytest.raises(pyreg.BackendError, match=why):
        pyreg.penalty([w], pyreg.MCP(0.1, 3.0))


def test_rows_that_share_memory_are_taken_in_turn(kernels):
    """In prox; gradients are refused. Two blocks would write the same place at once."""
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


def test_rows_that_a_prox_in_a_metric_leaves_to_the_formulas(kernels):
    """Moments of other strides and of another dtype, rows that share memory: as each row alone."""
    memory, rule = fill((60,), torch.float32, "cpu", "shared"), pyreg.MCP(0.5, 3.0)
    w = [fill((4, 6), torch.float32, "cpu", f"left{i}") for i in range(3)]
    w += [memory[:40], memory[30:]]
    beside = moments(w)
    beside[0] = beside[0].t().contiguous().t()
    beside[1] = beside[1].half()
    metrics = [Metric(m, 0.3, 1.0, 0.5) for m in beside]
    expected = [t.clone() for t in (*w[:3], memory)]
    rows = (*expected[:3], expected[3][:40], expected[3][30:])
    for t, m in zip(rows, metrics, strict=True):
        apply_prox_in_metric(rule, t, m)
    value, of_rules = kernels.prox_in_metric(pack_of(w, [rule]), w, metrics, [rule])
    torch.testing.assert_close(flat([*w[:3], memory]), flat(expected), rtol=2**-20, atol=2**-22)
    torch.testing.assert_close(value, rule.value(flat(w)), rtol=1e-5, atol=0)
    torch.testing.assert_close(taken(of_rules).float(), value[None], rtol=1e-6, atol=0)


def test_a_storage_that_shrinks_is_noticed(kernels):
    memory = torch.ones(1 << 16)
    w = nn.Parameter(memory[8:])
    reg = pyreg.Regularizer({"w": w}, pyreg.L1(1.0))
    assert reg().item() == (1 << 16) - 8
    memory.untyped_storage().resize_(4096)
    with pytest.raises(ValueError, match=r"'w'.*no memory"):
        reg()


def test_what_changed_is_noticed(kernels):
    module = net()
    reg = pyreg.Regularizer(module, pyreg.L1(1.0))
    reg()
    module[1].weight.data = torch.full((3,), 2.0, dtype=torch.float64)
    expected = sum(p.detach().double().abs().sum() for p in module.parameters())
    torch.testing.assert_close(reg().detach(), expected, rtol=1e-6, atol=0)


def test_a_gradient_that_cannot_be_one_is_refused_before_anything_is_written(kernels):
    module = net()
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        module[1].bias.data = module[1].bias.data.double()
    with pytest.raises(ValueError, match="has a gradient float32"):
        pyreg.Regularizer(module, pyreg.L1(1.0)).accumulate_()
    assert not any(p.grad.any() for p in module.parameters())


def test_a_table_is_copied_when_something_changed(kernels, on_host, monkeypatch):
    """More tensors than fit into a launch, and more rules."""
    copies = []
    on = cuda._Table.on

    def counted(self, queue, given):
        copies.append(isinstance(given, bytes))
        return on(self, queue, given)

    monkeypatch.setattr(cuda._Table, "on", counted)
    tensors = [torch.ones(2, requires_grad=True) for _ in range(on_host.max_by_value + 1)]
    for t in tensors:
        t.grad = torch.zeros(2)
    reg = pyreg.Regularizer({str(i): t for i, t in enumerate(tensors)}, pyreg.L1(1.0))
    assert [reg.accumulate_().item() for _ in range(3)] == [2.0 * len(tensors)] * 3
    assert copies == [True, False, False]
    tensors[5].grad = torch.ones(2)
    reg.accumulate_()
    assert copies == [True, False, False, True]
    assert tensors[5].grad.tolist() == [2.0, 2.0]
    assert tensors[6].grad.tolist() == [4.0, 4.0]

    copies.clear()
    fewer = tensors[: on_host.max_by_value]
    assert pyreg.l1(fewer, 1.0).item() == 2.0 * len(fewer)
    assert copies == []
    rules = [pyreg.L1(float(i)) for i in range(60)]
    pack = pack_of(tensors[:60], rules, list(range(60)))
    assert kernels.value(pack, tensors[:60], rules)[0].item() == 2.0 * sum(range(60))
    assert copies == [True]


def test_the_numbers_of_a_metric_may_be_tensors(kernels, on_host, monkeypatch):
    """Read where they lie; of more rows than fit into a launch out of a table, which is copied when
    a number changed that is no tensor."""
    copies = []
    on = cuda._Table.on

    def counted(self, queue, given):
        copies.append(isinstance(given, bytes))
        return on(self, queue, given)

    monkeypatch.setattr(cuda._Table, "on", counted)
    rules = [pyreg.L1(1.0)]
    most = on_host.max_by_value_in_metric
    for count, expected in ((most, []), (most + 1, [True, False, True])):
        tensors = [torch.full((2,), 4.0) for _ in range(count)]
        beside = [torch.zeros(2) for _ in range(count)]
        pack, copies[:] = pack_of(tensors, rules), []
        for number, offset, left in ((0.25, 1.0, 3.75), (0.5, 1.0, 3.25), (0.5, 2.0, 3.0)):
            metrics = [Metric(m, torch.tensor(number), 1.0, offset) for m in beside]
            value, _ = kernels.prox_in_metric(pack, tensors, metrics, rules)
            assert value == 2 * count * left
            assert all((t == left).all() for t in tensors)
        assert copies == expected


def test_a_capture_needs_a_warm_up(kernels, monkeypatch):
    tensors = [torch.ones(2) for _ in range(1500)]
    small = tensors[:3]
    rules = [pyreg.L1(1.0)]
    pack, small_pack = pack_of(tensors, rules), pack_of(small, rules)
    with monkeypatch.context() as during:
        during.setattr(cuda, "_current", lambda device: CAPTURING)
        with pytest.raises(RuntimeError, match="no scratch memory yet: run this sweep once"):
            kernels.value(small_pack, small, rules)
    kernels.value(small_pack, small, rules)
    kernels.value(pack, tensors, rules)
    with monkeypatch.context() as during:
        during.setattr(cuda, "_current", lambda device: CAPTURING)
        assert kernels.value(small_pack, small, rules)[0] == 6
        assert kernels.value(pack, tensors, rules)[0] == 3000
        tensors[0] = torch.zeros(2)
        with pytest.raises(RuntimeError, match="a tensor or a strength that is a number has chang"):
            kernels.value(pack, tensors, rules)


def test_a_graph_outlives_its_pack(kernels, monkeypatch):
    """Its table, scratch and numbers stay where they are, whatever becomes of the pack."""
    count = cuda.load().max_by_value + 1
    tensors, rules = [torch.ones(2) for _ in range(count)], [pyreg.L1(1.0)]
    metrics = [Metric(torch.ones(2), torch.tensor(0.1)) for _ in tensors]
    pack = pack_of(tensors, rules)

    def sweep(pack):
        kernels.value(pack, tensors, rules)
        kernels.prox_in_metric(pack, tensors, metrics, rules)

    sweep(pack)
    monkeypatch.setattr(cuda, "_kept_for_graphs", {})
    state = pack.layouts["native"]
    with monkeypatch.context() as during:
        during.setattr(cuda, "_current", lambda device: CAPTURING)
        sweep(pack)
    used = [state._scratch[-1], state._numbers]
    used += [state._tables[verb]._data for verb in ("value", "prox_in_metric")]
    others = [state._scratch[0]]
    gone = [weakref.ref(t) for t in others]
    kept = [(weakref.ref(t), t.data_ptr()) for t in used]
    del pack, state, used, others
    gc.collect()
    assert all(t() is None for t in gone)
    assert all(t() is not None and t().data_ptr() == at for t, at in kept)


def test_what_stopped_the_kernels_once_is_asked_again(kernels, on_host, monkeypatch):
    """(Memory that was short as they were loaded, say.) Nor is it asked during a capture."""
    answers = iter(["out of memory", "", "not asked again"])
    monkeypatch.setattr(on_host, "unserved", lambda index: next(answers))
    with monkeypatch.context() as during:
        during.setattr(cuda, "_current", lambda device: CAPTURING)
        assert cuda.unserved(0) is None
    assert cuda.unserved(0) == "out of memory"
    assert cuda.unserved(0) is None
    assert cuda.unserved(0) is None


def test_streams_have_scratch_of_their_own(kernels, monkeypatch):
    tensors, rules = [torch.ones(2)], [pyreg.L1(1.0)]
    pack = pack_of(tensors, rules)
    for handle in (1, 2, 1):
        queue = cuda._Queue(torch.device("cpu"), handle, False, handle)
        monkeypatch.setattr(cuda, "_current", lambda device, queue=queue: queue)
        assert kernels.value(pack, tensors, rules)[0] == 2
    assert pack.layouts["native"]._scratch.keys() == {1, 2, -1}


def test_an_architecture_that_is_not_inside_is_refused(kernels, on_host, monkeypatch):
    monkeypatch.setattr(on_host, "unserved", lambda index: "no kernel image is available")
    with pytest.raises(pyreg.BackendError, match="no kernel image is available"):
        pyreg.l1([torch.ones(3)], 1.0)


def test_why_cuda_is_off(monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda: "built without CUDA (test)")
    assert cuda.CudaBackend().missing() == "built without CUDA (test)"
    assert "native CUDA sweeps: off, built without CUDA (test)" in doctor.diagnose()


def test_what_a_capture_could_not_find_out_is_asked_after_it(kernels, on_host, monkeypatch):
    pack = pack_of([torch.ones(3)], [pyreg.L1(1.0)])
    monkeypatch.setattr(on_host, "unserved", lambda device: "no kernel image")
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_current", lambda device: CAPTURING)
        assert dispatch.choose(pack).backend.name == "native"
    with pytest.raises(pyreg.BackendError, match="no kernel image"):
        dispatch.choose(pack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_sweep_left_can_be_saved_and_copied(kernels, dtype, tmp_path):
    w = nn.Parameter(torch.full((3,), 2.0, dtype=dtype))
    w.grad = torch.zeros_like(w)
    reg = pyreg.Regularizer({"w": w}, {"w": pyreg.ElasticNet(1.0, 0.5)})
    assert reg.accumulate_().item() == 12.0
    torch.save(reg, tmp_path / "reg")
    loaded = torch.load(tmp_path / "reg", weights_only=False)
    for other in (reg, loaded, copy.deepcopy(reg), pickle.loads(pickle.dumps(reg))):
        assert other.last_value["w"].item() == 12.0
        assert other.last_value["w"].dtype == value_dtype(dtype)
