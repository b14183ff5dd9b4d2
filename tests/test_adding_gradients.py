"""Where every .grad exists, backward() adds to them in one sweep, if nobody sees the difference."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import pyreg
from pyreg import autograd
from pyreg.backend.native import NativeBackend
from pyreg.pack import Pack

NET = pyreg.ElasticNet(0.5, 0.25)
W = [1.5, -0.5, 0.0, 2.0]
GRADIENT = [1.25, -0.75, 0.0, 1.5]  # 0.5 * sign(w) + 0.5 * w


def leaf(grad: float | None = 10.0, dtype=torch.float32) -> nn.Parameter:
    w = nn.Parameter(torch.tensor(W, dtype=dtype))
    w.grad = None if grad is None else torch.full_like(w, grad)
    return w


@pytest.fixture
def buffers(native, monkeypatch) -> list[int]:
    """One entry for each flat gradient buffer that is made; threads of other tests do not count."""
    count, others = threading.active_count, threading.active_count() - 1
    monkeypatch.setattr(threading, "active_count", lambda: count() - others)
    made = []
    flat_gradient = Pack.flat_gradient

    def counted(pack):
        made.append(len(pack.rows))
        return flat_gradient(pack)

    monkeypatch.setattr(Pack, "flat_gradient", counted)
    return made


def expected(factor: float = 1.0, old: float = 10.0) -> torch.Tensor:
    return old + factor * torch.tensor(GRADIENT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_adds_without_a_buffer(buffers, dtype):
    """(The numbers are exact in every dtype.)"""
    a, b = leaf(dtype=dtype), leaf(20.0, dtype)
    grads, versions = (a.grad, b.grad), (a.grad._version, b.grad._version)
    value = pyreg.penalty([a, b], NET)
    (3 * value).backward(retain_graph=True)
    value.backward()
    assert buffers == []
    assert a.grad is grads[0]
    assert b.grad is grads[1]
    assert a.grad.tolist() == expected(4).tolist()
    assert b.grad.tolist() == expected(4, 20.0).tolist()
    assert (a.grad._version, b.grad._version) > versions, "autograd must notice the change"


def test_beside_the_gradient_of_a_loss(buffers):
    a = leaf()
    (5 * a.sum() + pyreg.penalty([a], NET)).backward()
    assert buffers == []
    assert a.grad.tolist() == (expected() + 5).tolist()


def test_not_where_a_grad_is_missing(buffers):
    a, b = leaf(), leaf(None)
    pyreg.penalty([a, b], NET).backward()
    assert buffers == [2]
    assert a.grad.tolist() == expected().tolist()
    assert b.grad.tolist() == GRADIENT


def test_not_in_autograd_grad(buffers):
    a, b = leaf(), leaf()
    grads = torch.autograd.grad(pyreg.penalty([a, b], NET), [a, b])
    assert [g.tolist() for g in grads] == [GRADIENT, GRADIENT]
    assert a.grad.tolist() == [10.0] * 4
    assert buffers == [2]


def test_not_to_leaves_that_backward_leaves_out(buffers):
    a, b = leaf(), leaf()
    pyreg.penalty([a, b], NET).backward(inputs=[a])
    assert a.grad.tolist() == expected().tolist()
    assert b.grad.tolist() == [10.0] * 4
    assert buffers == [2]


def test_not_where_a_leaf_has_a_hook(buffers):
    seen = []
    a, b = leaf(), leaf()
    handle = a.register_hook(lambda g: seen.append(g.tolist()))
    pyreg.penalty([a, b], NET).backward()
    assert seen == [GRADIENT]
    assert buffers == [2]
    handle.remove()
    b.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.tolist()))
    pyreg.penalty([a, b], NET).backward()
    assert seen[1:] == [expected(2).tolist()]
    assert buffers == [2, 2]


def test_a_hook_behind_the_accumulation_finds_it_done(buffers):
    """What DistributedDataParallel relies on."""
    seen = []
    a = leaf()
    node = a.view_as(a).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: seen.append(a.grad.tolist()))
    pyreg.penalty([a], NET).backward()
    assert seen == [expected().tolist()]
    assert buffers == []


def test_not_to_non_leaves_nor_to_one_leaf_twice(buffers):
    a, b = leaf(), leaf()
    pyreg.penalty([a, 2 * b], NET).backward()
    assert b.grad.tolist() == (10 + 2 * (0.5 * b.sign() + b)).tolist()
    pyreg.penalty([a, a], NET).backward()
    assert a.grad.tolist() == expected(3).tolist()
    assert buffers == [2, 2]


def test_not_where_some_are_frozen(buffers):
    """A frozen tensor may still have a gradient from before."""
    a, b = leaf(), leaf().requires_grad_(False)
    pyreg.penalty([a, b], NET).backward()
    assert a.grad.tolist() == expected().tolist()
    assert b.grad.tolist() == [10.0] * 4
    assert buffers == [2]


def test_not_while_another_thread_is_at_work(buffers):
    """Autograd locks its own additions to a shared leaf, whoever makes them."""
    a, begun, over = leaf(), threading.Event(), False

    def work():
        while not over:
            begun.set()
            time.sleep(0.001)

    other = threading.Thread(target=work, daemon=True)
    other.start()
    begun.wait()
    pyreg.penalty([a], NET).backward()
    over = True
    other.join()
    assert buffers == [1]
    assert a.grad.tolist() == expected().tolist()


def test_beside_threads_that_wait(buffers, monkeypatch):
    """Such as torch.compile leaves in its pool. They are kept waiting."""
    a, over, kept = leaf(), threading.Event(), []
    accumulate = NativeBackend.accumulate

    def watched(*args, keep_gil=False):
        kept.append(keep_gil)
        return accumulate(*args, keep_gil=keep_gil)

    monkeypatch.setattr(NativeBackend, "accumulate", watched)
    waiting = threading.Thread(target=over.wait, daemon=True)
    waiting.start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        while not autograd._others_wait():  # on their way there
            time.sleep(0.001)
        pyreg.penalty([a], NET).backward()
        over.set()
    waiting.join()
    assert buffers == []
    assert kept == [True]
    assert a.grad.tolist() == expected().tolist()


def test_threads_that_wait_do_not_run_meanwhile(native, run_python):
    """One that would replace the gradients as soon as it can, and is told to before the sweep."""
    assert run_python("""
import sys, threading, torch
from pyreg import _native
ps = [torch.nn.Parameter(torch.ones(8_000_000)) for _ in range(2)]
for p in ps:
    p.grad = torch.zeros_like(p)
layout = _native.Layout(ps, [0, 0], ["l1"])
layout.accumulate(ps, [1.0, 0.0], 1.0, 2)  # a first call looks torch's functions up
ran = threading.Event()
go = threading.Event()
thread = threading.Thread(target=lambda: (go.wait(), ran.set()))
thread.start()
sys.setswitchinterval(1000)  # no switch but where the GIL is let go
go.set()
layout.accumulate(ps, [1.0, 0.0], 1.0, 2, keep_gil=True)
kept = not ran.is_set()
layout.accumulate(ps, [1.0, 0.0], 1.0, 2)
print(kept, ran.wait(60))
thread.join()
""").split() == ["True", "True"]


def test_not_to_a_leaf_frozen_since_the_forward(buffers):
    a = leaf()
    value = pyreg.penalty([a], NET)
    a.requires_grad_(False)
    value.backward()
    assert a.grad.tolist() == [10.0] * 4


def test_not_under_anomaly_detection(buffers):
    """Which looks at gradients on their way."""
    a = leaf()
    with torch.no_grad():
        a[0] = math.nan
    value = pyreg.penalty([a], NET)
    with (
        pytest.warns(UserWarning, match="Anomaly"),
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        value.backward()
    assert a.grad.tolist() == [10.0] * 4


def test_not_in_sight_of_a_dispatch_mode(buffers):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Watch.seen += "add_" in str(function)
            return function(*args, **(kwargs or {}))

    a = leaf()
    value = pyreg.penalty([a], NET)
    with Watch():
        value.backward()
    assert Watch.seen == 1
    assert a.grad.tolist() == expected().tolist()


def test_in_compiled_autograd(buffers):
    """It traces backward; nothing may be missing from its graph."""
    from torch._dynamo import compiled_autograd

    a = leaf()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        (pyreg.penalty([a], NET) + (5 * a).sum()).backward()
    assert a.grad.tolist() == (expected() + 5).tolist()


def test_a_sparse_gradient_is_autograds_matter(buffers):
    a = leaf()
    a.grad = torch.full((4,), 10.0).to_sparse()
    pyreg.penalty([a], NET).backward()
    assert a.grad.to_dense().tolist() == expected().tolist()
    assert buffers == [1]


def test_a_non_leaf_with_a_gradient_of_its_own(buffers):
    a = leaf()
    b = 2 * a
    b.retain_grad()
    b.sum().backward(retain_graph=True)
    assert b.grad.tolist() == [1.0] * 4
    pyreg.penalty([b], NET).backward()
    gradient = 0.5 * b.sign() + 0.5 * b
    assert b.grad.tolist() == (1 + gradient).tolist()
    assert a.grad.tolist() == (10 + 2 + 2 * gradient).tolist()
    assert buffers == [1]


def test_a_learnable_strength(buffers):
    a, lam = leaf(), torch.tensor(0.5, requires_grad=True)
    pyreg.l1([a], lam).backward()
    assert lam.grad.item() == 4.0
    assert a.grad.tolist() == [10.5, 9.5, 10.0, 10.5]
    assert buffers == []


def test_gradients_with_other_strides(buffers):
    a = nn.Parameter(torch.arange(-3.0, 3.0).view(2, 3))
    a.grad = torch.ones(3, 2).t()
    pyreg.penalty([a], NET).backward()
    assert a.grad.tolist() == (1 + 0.5 * a.sign() + 0.5 * a).tolist()
    assert a.grad.stride() == (1, 2)
    assert buffers == []


def test_gradients_that_share_memory(buffers):
    """Every row's gradient is added, one after the other, as the loop does."""
    memory = torch.zeros(6)
    rows = [leaf(), leaf(), leaf()]
    rows[0].grad, rows[1].grad = memory[:4], memory[2:]
    for times in (1, 2):
        pyreg.penalty(rows, NET).backward()
        g = times * torch.tensor(GRADIENT)
        assert memory.tolist() == [*g[:2].tolist(), *(g[2:] + g[:2]).tolist(), *g[2:].tolist()]
        assert rows[2].grad.tolist() == expected(times).tolist()
    assert buffers == [3, 3]
    rows[1].grad = torch.zeros(4)  # no longer shared
    pyreg.penalty(rows, NET).backward()
    assert rows[1].grad.tolist() == GRADIENT
    assert buffers == [3, 3]


def test_prox_of_parameters_that_share_memory(native):
    """One after the other, in order: the native sweep leaves them to torch."""
    shared = torch.ones(6)
    layout = native.Layout([torch.ones(2), shared[:4], shared[2:]], [0, 0, 0], ["l1"])
    strengths = [1.0] + [0.0] * (native.max_strengths - 1)
    assert layout.prox([torch.ones(2), shared[:4], shared[2:]], strengths, 0.5, 2) == [1, 2]
    assert shared.tolist() == [1.0] * 6
    memory = torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    a, b, c = nn.Parameter(memory[:4]), nn.Parameter(memory[2:]), leaf()
    reg = pyreg.Regularizer({"a": a, "b": b, "c": c}, pyreg.L1(1.0))
    reg.prox_(0.5)
    assert memory.tolist() == [2.5, 2.5, 2.0, 2.0, 2.5, 2.5]
    assert c.tolist() == [1.0, 0.0, 0.0, 1.5]


def test_a_gradient_that_is_dropped_meanwhile(native, run_python):
    """Another thread sets .grad to None while it is swept: its memory stays until the end.

    The thread holds the gradient until it is no longer `.grad`: torch 2.13 itself crashes if one
    thread reads `.grad` while `p.grad = None` in another, which has let go of the GIL, frees it.
    """
    run_python("""
import threading, time, torch, pyreg
ps = [torch.nn.Parameter(torch.ones(8_000_000)) for _ in range(2)]
reg = pyreg.Regularizer([(str(i), p) for i, p in enumerate(ps)], pyreg.L1(1.0))
stop = False
def drop():
    while not stop:
        for p in ps:
            held = p.grad
            p.grad = None
            del held
        time.sleep(0.001)
thread = threading.Thread(target=drop)
thread.start()
for _ in range(40):
    for p in ps:
        p.grad = torch.zeros_like(p)
    try:
        reg.accumulate_()
    except RuntimeError:
        pass  # all of them were gone
stop = True
thread.join()
""")
