"""What is asked of every parameter at every call: compiled and in Python, the same answers."""

import pytest
import torch
from torch import nn

from pyreg import look
from pyreg.backend import native


@pytest.fixture(params=["compiled", "python"])
def asked(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(look, "load", lambda: "no compiled module")
    elif isinstance(native.load(), str):
        pytest.skip(native.load())
    return look


class Stubborn(nn.Parameter):
    """A parameter with an opinion of its own."""

    @property
    def requires_grad(self):
        return False


def test_require_grad(asked):
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    tensors = [torch.ones(1), nn.Parameter(torch.ones(1)), frozen, Stubborn(torch.ones(1))]
    assert asked.require_grad(tensors) == b"\0\1\0\0"
    frozen.requires_grad_(True)
    assert asked.require_grad(tensors) == b"\0\1\1\0"
    assert asked.require_grad([]) == b""


def test_unchanged(asked):
    a, b, c = object(), object(), object()
    place = {"a": a, "b": b, "c": c}
    slots = [({}, (), ()), (place, ("a", "c"), (a, c))]
    assert asked.unchanged(slots)
    place["b"] = object()  # not asked for
    place["d"] = object()
    assert asked.unchanged(slots)
    place["c"] = object()
    assert not asked.unchanged(slots)
    place["c"] = c
    assert asked.unchanged(slots)
    del place["c"]
    assert not asked.unchanged(slots)


def test_unchanged_asks_for_the_same_object_not_an_equal_one(asked):
    one = torch.ones(1)
    place = {"w": one}
    slots = [(place, ("w",), (one,))]
    assert asked.unchanged(slots)
    place["w"] = torch.ones(1)
    assert not asked.unchanged(slots)


def test_counters(asked):
    counters = [torch.tensor(1.0), torch.tensor(41.0, dtype=torch.float64)]
    assert asked.count(counters) == [2.0, 42.0]
    assert [c.item() for c in counters] == [2.0, 42.0]
    assert asked.count([]) == []
    for other in (torch.tensor(1), torch.ones(1), torch.ones((), device="meta"), 1, None):
        assert asked.count([counters[0], other]) is None
    assert counters[0] == 2.0
    found = asked.count([torch.zeros((), device="meta")] * 2)  # as on a GPU
    assert (found.dtype, found.device.type, found.shape) == (torch.float64, "meta", (2,))


def test_numbers(asked):
    """What the host has, and nothing that it would have to wait for or choose from."""
    freed = torch.tensor(1.0)
    freed.untyped_storage().resize_(0)
    given = {
        2: 2.0,
        0.5: 0.5,
        torch.tensor(3.0): 3.0,
        torch.tensor(1 / 3, dtype=torch.float64): 1 / 3,
        nn.Parameter(torch.tensor(4.0)): 4.0,
        torch.arange(4.0)[3]: 3.0,
        torch.tensor([1.0]): None,
        torch.tensor(1): None,
        torch.tensor(1.0, device="meta"): None,
        torch.tensor(1.0, dtype=torch.bfloat16): None,
        freed: None,
        "3": None,
        None: None,
    }
    assert asked.numbers(list(given)) == list(given.values())
    assert asked.numbers([]) == []
