"""Where tensors lie: compiled and in Python, the same answers."""

from __future__ import annotations

import gc
import weakref
from array import array

import pytest
import torch
from torch import Tensor, nn

from pyreg import pack
from pyreg.backend import addresses, native
from pyreg.pack import GradientMismatch, StaleLayout
from pyreg.tensors import label


@pytest.fixture(params=["compiled", "attributes", "python", "python without guards"])
def look_at(request, monkeypatch):
    """look_at(tensors, their anchors) -> a look of theirs."""
    compiled = native.load()
    if request.param.startswith("python"):
        monkeypatch.setattr(addresses, "load", lambda: "no compiled module")
        if request.param != "python":
            monkeypatch.setattr(addresses, "TensorGuards", None)
    elif isinstance(compiled, str):
        pytest.skip(compiled)
    else:
        compiled.use_records(request.param == "compiled")

    def look(tensors: list[Tensor], anchors: list[pack.Pair] | None = None):
        (only,) = pack.build(tensors, label, [0] * len(tensors), ("l1",), anchors)
        return addresses.look_at(only, tensors)

    yield look
    if not isinstance(compiled, str):
        compiled.use_records(True)


def at(*tensors: Tensor | None) -> bytes:
    return array("q", [0 if t is None else t.data_ptr() for t in tensors]).tobytes()


def test_tensors(look_at):
    """Of every dtype, transposed and with an offset; where they are now."""
    w = [torch.ones(3), torch.ones(4, 6).bfloat16().t(), torch.ones(5).half()[1:]]
    w.append(nn.Parameter(torch.ones(2).double()))
    look = look_at(w)
    assert look.tensors(w) == look.separate_tensors(w)[0] == at(*w)
    w[0] = torch.ones(3)
    assert look.tensors(w) == at(*w)
    assert look.separate_tensors(w) == (at(*w), [])


CHANGES = {
    "dtype": lambda t: t.double(),
    "size": lambda t: torch.cat([t, t]),
    "strides": lambda t: t.t(),
    "fewer dimensions": lambda t: t[0],
    "device": lambda t: t.to("meta"),
    "negated": lambda t: torch._neg_view(t.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("i", [1, 2])
def test_a_tensor_that_changed(look_at, change, i):
    w = [torch.randn(5), torch.randn(4, 6), torch.randn(4, 6).t()]
    look = look_at(w)
    look.tensors(w)
    changed = [CHANGES[change](t) if k == i else t for k, t in enumerate(w)]
    for ask in (look.tensors, look.separate_tensors, look.with_own_gradients):
        with pytest.raises(StaleLayout):
            ask(changed)
        with pytest.raises(StaleLayout):
            ask(w[:2])
    assert look.tensors(w) == at(*w)


def test_freed_memory(look_at):
    w = [torch.ones(6), torch.ones(7)]
    look = look_at(w)
    look.tensors(w)
    w[1].untyped_storage().resize_(0)
    with pytest.raises(StaleLayout):
        look.tensors(w)


def test_own_gradients(look_at):
    """What there is, where it is now; rows of other strides are the caller's."""
    w = [nn.Parameter(torch.ones(4, 6)) for _ in range(4)]
    w[0].grad, w[3].grad = torch.zeros(4, 6), torch.zeros(4, 6)
    look = look_at(w)
    for _ in range(2):
        shown = look.with_own_gradients(w)
        assert (shown.tensors, shown.present, list(shown.others)) == (at(*w), 2, [])
        assert shown.gradients == at(w[0].grad, None, None, w[3].grad)
    memory = torch.zeros(24)
    w[1].grad = memory.view(4, 6)
    assert look.with_own_gradients(w).gradients == at(*(t.grad for t in w))
    w[1].grad = memory.view(6, 4).t()  # at the same address
    shown = look.with_own_gradients(w)
    assert (shown.present, list(shown.others)) == (3, [1])
    assert shown.gradients == at(w[0].grad, None, None, w[3].grad)
    for t in w:
        t.grad = torch.zeros(4, 6)
    shown = look.with_own_gradients(w)
    assert (shown.gradients, shown.present) == (at(*(t.grad for t in w)), 4)
    w[2].grad = None
    assert look.with_own_gradients(w).gradients == at(w[0].grad, w[1].grad, None, w[3].grad)


def test_given_gradients(look_at):
    w = [torch.ones(3), torch.ones(4)]
    grads = [None, torch.zeros(4)]
    shown = look_at(w).with_gradients(w, grads)
    assert (shown.tensors, shown.gradients) == (at(*w), at(*grads))


def test_states(look_at):
    """Of the tensor's dtype or all float32, or none, and float32 masters of 16-bit tensors."""
    w = [torch.ones(4, 6, dtype=torch.bfloat16) for _ in range(3)] + [torch.ones(5)]
    first, second = [[t.clone() for t in w] for _ in range(2)]
    first[1], second[1] = first[1].float(), second[1].float()
    first[2] = second[2] = None
    masters = [None, w[1].float(), None, None]
    look = look_at(w)
    for given in ([], masters, []):
        found = look.states([first, second], given)
        assert found.states == [at(*first), at(*second)]
        assert found.float32 == bytes([0, 1, 0, 0])
        assert found.masters == at(*(given or [None] * 4))
    assert look.states([first], []).states == [at(*first)]

    def with_one(i: int, state: torch.Tensor | None) -> list[torch.Tensor | None]:
        return [state if k == i else t for k, t in enumerate(first)]

    for bad in (
        first[0].float(),  # the other is not
        first[0].half(),
        first[0].t().contiguous().t(),
        second[0],  # in the memory of the other
    ):
        assert look.states([with_one(0, bad), second], []) is None
    assert look.states([with_one(0, torch.ones(4, 6)), second], []) is None
    shared = torch.ones(4, 6, dtype=torch.bfloat16)
    for given in ([[shared] * 2, [shared.clone(), shared]], [[shared, None], [None, shared]]):
        rows = [[*kind, None, None] for kind in given]
        assert look.states(rows, []) is None
    assert look.states([first, second], [second[1], None, None, None]) is None  # shared, too
    assert look.states([first, second], [w[0].clone(), None, None, None]) is None  # not float32
    for bad in (torch.ones(6, 4), torch.ones(4, 6, device="meta"), torch._neg_view(w[0].clone())):
        with pytest.raises(ValueError, match="row 0"):
            look.states([with_one(0, bad), second], [])
    assert look.states([first, second], masters).states == [at(*first), at(*second)]


def test_moments(look_at):
    """Of the tensor's dtype or float32, or none; others are the caller's, and rows that overlap."""
    memory = torch.ones(5)
    w = [torch.ones(4, 6, dtype=torch.bfloat16) for _ in range(5)] + [memory[:3], memory[2:]]
    beside = [t.clone() for t in w]
    beside[1] = beside[1].float()
    beside[2] = None
    beside[3] = beside[3].t().contiguous().t()
    beside[4] = beside[4].half()
    look = look_at(w)
    for _ in range(2):
        shown = look.with_moments(w, beside)
        assert shown.tensors == at(*w[:3], None, None, None, None)
        assert shown.moments == at(*beside[:3], None, None, None, None)
        assert (shown.float32, sorted(shown.others)) == (bytes([0, 1, 0, 0, 0, 0, 0]), [3, 4, 5, 6])
    for bad in (torch.ones(6, 4), torch.ones(4, 6, device="meta"), torch._neg_view(w[0].clone())):
        with pytest.raises(ValueError, match="row 0"):
            look.with_moments(w, [bad, *beside[1:]])


def test_anchors(look_at):
    """Of any dtype, where they are now; none have no address."""
    w = [torch.ones(4, 6).t(), torch.ones(5), torch.ones(0)]
    pairs = [(torch.ones(4, 6).half().t(), None), (None, torch.ones(5)), (torch.ones(0), None)]
    look = look_at(w, pairs)
    for _ in range(2):
        assert look.tensors(w) == at(*w)
        assert look.anchors() == at(*(t for pair in pairs for t in pair))
        pairs[0][0].data = torch.zeros(4, 6).half().t()
        w[1] = torch.ones(5)
    plain = look_at(w)
    plain.tensors(w)
    assert plain.anchors() == b""


@pytest.mark.parametrize("change", ["dtype", "size", "strides", "negated", "freed", "the tensor"])
@pytest.mark.parametrize("k", [0, 1])
def test_an_anchor_that_changed(look_at, change, k):
    w = [torch.ones(3), torch.ones(4, 6)]
    pairs = [(torch.ones(3), None), (torch.ones(4, 6), torch.ones(4, 6))]
    look = look_at(w, pairs)

    def ask():
        look.separate_tensors(w)
        look.anchors()

    ask()
    changed = pairs[1][k]
    if change == "freed":
        changed.untyped_storage().resize_(0)
    elif change == "the tensor":
        changed.data = w[1]
    elif change == "strides":
        changed.data = torch.ones(6, 4).t()
    else:
        changed.data = CHANGES[change](changed)
    for _ in range(2):
        with pytest.raises(StaleLayout):
            ask()


MISMATCHES = {
    "dtype": torch.zeros(4, 6).double(),
    "shape": torch.zeros(6, 4),
    "expanded": torch.zeros(1, 6).expand(4, 6),
    "sparse": torch.zeros(4, 6).to_sparse(),
    "negated": torch._neg_view(torch.zeros(4, 6)),
    "device": torch.zeros(4, 6, device="meta"),
}


@pytest.mark.parametrize("bad", MISMATCHES)
def test_a_gradient_that_cannot_be_one(look_at, bad):
    w, good = [torch.ones(4, 6), torch.ones(4, 6)], torch.zeros(4, 6)
    look = look_at(w)
    look.with_gradients(w, [good, good.clone()])
    with pytest.raises(GradientMismatch):
        look.with_gradients(w, [good, MISMATCHES[bad]])


def test_rows_that_share_memory(look_at):
    """Each of them is the caller's; neighbours and empty rows share nothing. Gradients must not."""
    memory = torch.zeros(20)
    w = [memory[:8], memory[8:12], memory[2:4], memory[12:18], memory[17:], memory[3:3]]
    w = [t.detach() for t in w]
    look = look_at(w)
    separate, others = look.separate_tensors(w)
    assert others == [0, 2, 3, 4]
    assert separate[8:16] == at(w[1])
    assert not any(separate[:8])
    assert look.tensors(w) == at(*w)
    for t in w:
        t.grad = torch.zeros_like(t)
    look.with_own_gradients(w)
    grads = torch.zeros(20)
    w[0].grad, w[1].grad = grads[:8], grads[7:11]
    for _ in range(2):
        with pytest.raises(GradientMismatch):
            look.with_own_gradients(w)
    w[1].grad = grads[8:12]
    assert look.with_own_gradients(w).gradients == at(*(t.grad for t in w))


def test_gradients_of_other_strides_that_share_memory(look_at):
    """Dense ones wherever it is; of others the first element's place is known to be theirs."""
    w, memory = [torch.ones(3, 4) for _ in range(2)], torch.zeros(4, 8)
    look = look_at(w)
    for first, second, shared in (
        (memory[:3, :4], memory[:3, 4:], False),
        (memory[:3, :4], memory[:3, :4], True),
        (memory[:3, :4], memory.view(-1)[:12].view(3, 4), True),
        (memory.view(-1)[:12].view(4, 3).t(), memory.view(-1)[11:23].view(3, 4), True),
        (memory.view(-1)[:12].view(4, 3).t(), memory.view(-1)[12:24].view(3, 4), False),
    ):
        w[0].grad, w[1].grad = first, second
        for _ in range(2):
            if shared:
                with pytest.raises(GradientMismatch):
                    look.with_own_gradients(w)
            else:
                assert look.with_own_gradients(w).present == 2


class OwnGrad(nn.Parameter):
    """A parameter whose gradient nobody else holds."""

    @property
    def grad(self):
        made = torch.zeros(3)
        self.made = weakref.ref(made)
        return made


def test_gradients_live_as_long_as_their_addresses(look_at):
    w = [OwnGrad(torch.ones(3))]
    look = look_at(w)
    shown = look.with_own_gradients(w)
    assert shown.gradients == at(w[0].made())
    del shown
    gc.collect()
    assert w[0].made() is None
