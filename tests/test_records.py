"""Torch's own records of tensors, which the compiled modules read: afresh, and nothing is kept of
them. What they say of every kind of tensor: test_addresses.py, test_native.py."""

from __future__ import annotations

import sys
from array import array

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="torch before 2.9 does not tell a tensor's layout in C"
)


@pytest.fixture(autouse=True)
def _records(native):
    assert native.reads_records()


def of(*tensors: torch.Tensor) -> bytes:
    return array("q", [t.data_ptr() for t in tensors]).tobytes()


def counted_gradient() -> tuple[nn.Parameter, bytearray]:
    """A parameter, and the memory of its gradient: of each reference to that one is counted."""
    memory = bytearray(16)
    w = nn.Parameter(torch.ones(4))
    w.grad = torch.frombuffer(memory, dtype=torch.float32)
    return w, memory


def test_a_gradient_is_kept_as_long_as_its_address(native):
    """Another thread may drop it while a sweep runs."""
    w, memory = counted_gradient()
    look = native.Look([w])
    for _ in range(2):  # where it is new, and where it is known
        held = sys.getrefcount(memory)
        shown = look.with_own_gradients([w])
        assert shown.gradients == of(w.grad)
        kept, w.grad = torch.frombuffer(memory, dtype=torch.float32), None
        assert sys.getrefcount(memory) == held + 1
        del shown
        assert sys.getrefcount(memory) == held
        w.grad = kept


def test_no_gradient_is_kept_longer(native):
    """Nor after an error in another row, nor by what remembers where it was."""
    w, memory = counted_gradient()
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    look = native.Look([w, other])
    for _ in range(3):
        look.with_own_gradients([w, other])
    other.grad = torch.ones(3).to_sparse()
    with pytest.raises(native.GradientMismatch):
        look.with_own_gradients([w, other])
    held = sys.getrefcount(memory)
    w.grad = None
    assert sys.getrefcount(memory) < held


def test_other_tensors_behind_the_same_objects(native):
    """A module's conversion swaps what its parameters' objects stand for."""
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
    a.grad, b.grad = torch.ones(4), torch.zeros(4)
    look = native.Look([a, b])
    tensors, gradients = of(a, b), of(a.grad, b.grad)
    swapped = of(b, a), of(b.grad, a.grad)
    shown = look.with_own_gradients([a, b])
    assert (shown.tensors, shown.gradients) == (tensors, gradients)
    del shown
    torch.utils.swap_tensors(a, b)
    shown = look.with_own_gradients([a, b])
    assert (shown.tensors, shown.gradients) == swapped == (of(a, b), of(a.grad, b.grad))


class Disguised(nn.Parameter):
    """Its attributes are not its record's."""

    @property
    def grad(self):
        return torch.full((4,), 7.0)

    @property
    def requires_grad(self):
        return False


def test_attributes_of_a_subclass_come_first(native):
    w = Disguised(torch.ones(4))
    assert native.require_grad([w, nn.Parameter(torch.ones(4))]) == b"\0\1"
    shown = native.Look([w]).with_own_gradients([w])
    assert shown.tensors == of(w)
    assert shown.present == 1


class Nosy(nn.Parameter):
    """Asked for its gradient it gives another parameter a new one."""

    @property
    def grad(self):
        self.other.grad = torch.full((3,), 7.0)
        return self.own


def test_gradients_that_change_while_they_are_asked_for(native):
    """Those that were there at first are taken, as by attributes."""
    found = []
    for yes in (True, False):
        native.use_records(yes)
        first, last = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        nosy = Nosy(torch.ones(3))
        nosy.other, nosy.own = first, torch.zeros(3)
        look = native.Look([first, nosy, last])
        for _ in range(2):
            first.grad, last.grad = torch.zeros(3), torch.zeros(3)
            at_first = of(first.grad, nosy.own, last.grad)
            found.append(look.with_own_gradients([first, nosy, last]).gradients == at_first)
    assert found == [True] * 4


@pytest.mark.parametrize("odd", [3, "w", torch.Tensor, []], ids=repr)
def test_what_is_no_tensor(native, odd):
    w = [nn.Parameter(torch.ones(3)) for _ in range(20)]
    look = native.Look(w)
    among = [*w[:19], odd]
    with pytest.raises(native.StaleLayout):
        look.tensors(among)
    with pytest.raises(native.GradientMismatch):
        look.with_gradients(w, among)
    with pytest.raises(ValueError, match="row 19"):
        look.with_moments(w, among)
    assert look.tensors(w) == of(*w)


@pytest.mark.parametrize("strided", [True, False], ids=["strided", "jagged"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(native, strided):
    layout = torch.strided if strided else torch.jagged
    w = nn.Parameter(torch.ones(2, 3))
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=layout)
    with pytest.raises(native.StaleLayout):
        native.Look([w]).tensors([nested])
    with pytest.raises(native.GradientMismatch):
        native.Look([w]).with_gradients([w], [nested])


def test_counters_without_memory(native):
    counters = [torch.tensor(2.0), torch.tensor(2.0)]
    counters[1].untyped_storage().resize_(0)
    assert native.count(counters) is None
    assert counters[0] == 2


@pytest.mark.parametrize(
    "active",
    [
        "torch.func.grad(lambda x: (f(), x.sum())[1])(torch.ones(3))",
        "torch.func.vmap(lambda x: (f(), x)[1])(torch.ones(3))",
        "fake(f)",
    ],
)
def test_a_first_call_while_something_is_active(run_python, active):
    """It hides nothing, and nothing is printed."""
    printed = run_python(
        "import warnings\n"
        "warnings.simplefilter('error')\n"
        "import torch, pyreg\n"
        "from torch._subclasses import FakeTensorMode\n"
        "def fake(f):\n"
        "    with FakeTensorMode(allow_non_fake_inputs=True):\n"
        "        f()\n"
        "reg = pyreg.Regularizer(torch.nn.Linear(4, 4), pyreg.L1(1e-3))\n"
        "f = reg.trainable\n"
        f"{active}\n"
        "from pyreg import _native\n"
        "print(_native.reads_records())\n"
    )
    assert printed == "True\n"


@pytest.mark.parametrize(
    ("of", "name", "otherwise"),
    [
        ("torch.Tensor", "_cdata", "property(lambda tensor: 4096)"),
        ("torch.Tensor", "_cdata", "property(lambda tensor: None)"),
        ("torch.Tensor", "stride", "lambda tensor: (1, 3)"),
        ("torch.Tensor", "grad", "property(lambda tensor: None, lambda tensor, grad: None)"),
        ("torch._C", "__file__", "'/no/such/library.so'"),
    ],
)
def test_a_torch_that_is_not_as_expected(run_python, of, name, otherwise):
    """Attributes are read in its place, and `pyreg doctor` says so."""
    printed = run_python(
        "import torch\n"
        f"usual = {of}.{name}\n"
        f"{of}.{name} = {otherwise}\n"
        "from pyreg import _native\n"
        "assert not any([_native.reads_records() for _ in range(9)])\n"
        f"{of}.{name} = usual\n"
        "import pyreg\n"
        "from pyreg import doctor\n"
        "w = torch.nn.Parameter(torch.ones(100))\n"
        "w.grad = torch.full((100,), 2.0)\n"
        "with pyreg.use_backend('native'):\n"
        "    value = pyreg.Regularizer([('w', w)], pyreg.L1(0.5)).accumulate_()\n"
        "assert (value, w.grad.unique().tolist()) == (50.0, [2.5])\n"
        "print('records are not as expected' in doctor.diagnose())\n"
    )
    assert printed == "True\n"
