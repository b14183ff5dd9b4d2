"""What only the Triton layouts have, under Triton's interpreter.

Their sweeps against the oracle: test_sweeps.py.

The interpreter runs programs one after the other on CPU tensors: this says nothing about races.
"""

import math
import os
from array import array

import oracle
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test sets it)", allow_module_level=True)
pytest.importorskip("triton")

from device import launches
from pyreg.triton_kernels import PENALTIES, Layout, launch

from pyreg import penalties as classes
from pyreg import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at inf - inf

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STRENGTHS = {
    "l1": (0.3, 0.0),
    "l2": (0.07, 0.0),
    "elastic_net": (0.3, 0.07),
    "l0": (0.07, 0.0),
    "l_half": (0.05, 0.0),
    "huber": (0.3, 0.1),
    "log_sum": (0.1, 0.2),
    "mcp": (0.3, 1.5),
    "scad": (0.15, 3.7),
}
SPECIALS = [0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, math.nan]


def at(tensors):
    """Where they are, as the layouts are told."""
    return array("q", [0 if t is None else t.data_ptr() for t in tensors]).tobytes()


def args_of(name, strengths):
    """The strengths as the kernel takes them, without unused columns."""
    return strengths[: len(classes.PENALTIES[name].parameters)]


def rounded(x, dtype):
    return torch.tensor(x, dtype=torch.float64).to(reference.compute_dtype(dtype)).double().item()


def strengths_of(*names):
    return torch.tensor([STRENGTHS[n] for n in names], dtype=torch.float64)


def poison(like):
    return [torch.full_like(t, math.nan) for t in like]


def value_of(name, strengths, w):
    return reference.FORMULAS[name].value(w.double(), *args_of(name, strengths)).item()


def bound(name):
    """The relative error of a sum: 16 operations in float32, then float64; and of the other
    penalties' terms, as in oracle.TERMS."""
    terms, sums = oracle.TERMS.get(name, (0, 1))
    return sums * (16 + terms) * 2**-24


@pytest.fixture(params=DTYPES, ids=lambda t: str(t).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(params=sorted(PENALTIES))
def name(request):
    return request.param


def test_value_of_the_worst_case():
    """Equal addends of all mantissa bits lose the most; there may be less than 1.1e-6 of it."""
    w = [torch.full((launch.CHUNK // 4 * 2 + 700,), 1 + 2**-23 * 0x2AAAAA)]
    total, _ = Layout(w, [0], ["elastic_net"]).value(at(w), strengths_of("elastic_net"))
    exact = value_of("elastic_net", STRENGTHS["elastic_net"], w[0])
    assert abs(total.item() - exact) < 1.1e-6 * exact


def exact_grad(name, w, scale):
    c = [rounded(s, w.dtype) for s in args_of(name, STRENGTHS[name])]
    return rounded(scale, w.dtype) * reference.FORMULAS[name].grad(w.double(), *c)


@pytest.mark.parametrize("aligned", [True, False])
def test_specials(dtype, name, aligned):
    """NaN and infinity propagate, and both zeros give +0."""
    n = launch.CHUNK // dtype.itemsize
    w = torch.ones(n + 1, dtype=dtype)[:n] if aligned else torch.ones(n + 1, dtype=dtype)[1:]
    w[: len(SPECIALS)] = torch.tensor(SPECIALS)
    layout, strengths, grad = Layout([w], [0], [name]), strengths_of(name), poison([w])
    assert math.isnan(layout.value(at([w]), strengths)[0])
    assert layout.value(at([w]), strengths)[1][0, 1].isnan() == (PENALTIES[name].sums == 2)
    layout.gradient(at([w]), at(grad), strengths, 1.0)
    if name == "l0":
        assert grad[0].isnan().all()
    else:
        exact = exact_grad(name, w, 1.0)
        torch.testing.assert_close(grad[0], exact.to(dtype), equal_nan=True)
        assert grad[0][:2].tolist() == [0, 0]
    exact = reference.FORMULAS[name].prox(w.double(), 1.0, *args_of(name, STRENGTHS[name]))
    layout.prox(at([w]), strengths, 1.0)
    torch.testing.assert_close(w, exact.to(dtype), equal_nan=True)
    w[4:7] = torch.tensor([math.inf, -math.inf, 1.0])
    exact = value_of(name, STRENGTHS[name], w)
    assert layout.value(at([w]), strengths)[0].item() == pytest.approx(exact, rel=bound(name))
    assert (exact < math.inf) == (name in ("l0", "mcp", "scad"))


def test_mixed_penalties_keep_to_their_own_formula():
    """L1 at infinity is not 0 * inf."""
    w = [torch.tensor([math.inf, -1.0]), torch.tensor([2.0]), torch.tensor([3.0])]
    grads = poison(w)
    strengths = strengths_of("l1", "l2", "elastic_net")
    layout = Layout(w, [0, 1, 2], ["l1", "l2", "elastic_net"])
    layout.gradient(at(w), at(grads), strengths, 1.0)
    torch.testing.assert_close(torch.cat(grads), torch.tensor([0.3, -0.3, 0.28, 0.72]))
    assert layout.value(at(w), strengths)[0] == math.inf


def many(n=300):
    g = torch.Generator().manual_seed(3)
    lengths = [0 if i % 7 == 3 else int(torch.randint(1, 200, (), generator=g)) for i in range(n)]
    lengths[5:40:9] = [2049, 4100, 1, 9001]
    w = [torch.randn(k, generator=g).to(DTYPES[i % 4]) for i, k in enumerate(lengths)]
    return w, [i % 5 for i in range(n)], ["l1", "elastic_net", "huber", "mcp", "log_sum", "l2"]


def test_many_tensors_mixed_in_one_launch():
    w, rule_of, penalties = many()
    strengths = torch.tensor([STRENGTHS[p] for p in penalties], dtype=torch.float64)
    strengths *= torch.arange(1, 7, dtype=torch.float64)[:, None]
    layout = Layout(w, rule_of, penalties)
    grads = [torch.zeros_like(t) for t in w]
    total = torch.zeros(())

    def accumulate():
        nonlocal total
        total, *of_rules = layout.accumulate(at(w), at(grads), strengths, 1.0)
        assert sum(of_rules) == pytest.approx(total)

    assert launches(torch.device("cpu"), accumulate) == ["accumulate"]
    exact = sum(
        value_of(penalties[r], strengths[r].tolist(), t) for t, r in zip(w, rule_of, strict=True)
    )
    assert abs(total.item() - exact) <= bound("mcp") * exact
    for t, g, r in zip(w, grads, rule_of, strict=True):
        c = args_of(penalties[r], strengths[r].tolist())
        torch.testing.assert_close(
            g.double(), reference.FORMULAS[penalties[r]].grad(t.double(), *c), rtol=2**-8, atol=0
        )
    _, sums = layout.value(at(w), strengths)
    assert sums[5].tolist() == [0, 0]
    got, wanted = layout.stats(at(w)), torch.stack([reference.stats(t) for t in w])
    torch.testing.assert_close(got, wanted, rtol=16 * 2**-24, atol=0)


@pytest.mark.parametrize("partials", [64, launch.PARTIALS])
def test_bits_do_not_depend_on_the_grid(monkeypatch, partials):
    """Any grid, again and again; also where slots are many chunks and span rows."""
    monkeypatch.setattr(launch, "PARTIALS", partials)
    w, rule_of, penalties = many(40)
    strengths = torch.tensor([STRENGTHS[p] for p in penalties], dtype=torch.float64)
    layout = Layout(w, rule_of, penalties)
    seen = set()
    for programs in (1, 7, 64, 7):
        monkeypatch.setattr(launch, "share_of", lambda *of, n=programs: -(-of[-1].slots // n))
        value, sums = layout.value(at(w), strengths)
        seen.add((value.item(), *sums.flatten().tolist(), *layout.stats(at(w)).flatten().tolist()))
    assert len(seen) == 1
    exact = sum(
        value_of(penalties[r], STRENGTHS[penalties[r]], t) for t, r in zip(w, rule_of, strict=True)
    )
    assert abs(value.item() - exact) <= bound("mcp") * exact


def test_strengths_and_scale_are_read_at_every_call():
    w, scale = [torch.tensor([1.0, -2.0])], torch.tensor(1.0, dtype=torch.float64)
    layout, strengths = Layout(w, [0], ["l1"]), strengths_of("l1")
    assert layout.value(at(w), strengths)[0].item() == pytest.approx(0.9, rel=2**-23)
    strengths[0, 0] = 2.0
    assert layout.value(at(w), strengths)[0] == 6.0
    grads = poison(w)
    for factor in (scale, 2.0, 3.0, 2.0):
        layout.gradient(at(w), at(grads), strengths, factor)
        assert grads[0].tolist() == [2 * float(factor), -2 * float(factor)]
    scale.fill_(5.0)
    layout.gradient(at(w), at(grads), strengths, scale)
    assert grads[0].tolist() == [10, -10]


def test_moved_tensors_are_found():
    w = [torch.tensor([1.0, -2.0])]
    layout, strengths = Layout(w, [0], ["l1"]), strengths_of("l1")
    layout.value(at(w), strengths)
    w = [torch.tensor([10.0, -20.0])]
    assert layout.value(at(w), strengths)[0].item() == pytest.approx(9.0, rel=2**-23)


def test_strided_tensors_are_swept_in_storage_order():
    w = [torch.randn(6, 50).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    grads = [torch.full_like(t, math.nan) for t in w]
    Layout(w, [0, 0], ["l1"]).gradient(at(w), at(grads), strengths_of("l1"), 1.0)
    for t, g in zip(w, grads, strict=True):
        assert g.stride() == t.stride()
        torch.testing.assert_close(g, 0.3 * t.sign())


def test_rows_at_no_address_are_left_out():
    """By gradient, accumulate (which counts them in the value) and prox."""
    w, g = [torch.full((3,), 2.0) for _ in range(2)], [torch.zeros(3) for _ in range(2)]
    layout, strengths = Layout(w, [0, 0], ["l1"]), strengths_of("l1")
    layout.gradient(at(w), at([None, g[1]]), strengths, 1.0)
    value, of_rule = layout.accumulate(at(w), at([None, g[1]]), strengths, 1.0)
    assert value == of_rule == pytest.approx(3.6)
    layout.prox(at([None, w[1]]), strengths, 1.0)
    torch.testing.assert_close(torch.cat(g), torch.tensor([0.0] * 3 + [0.6] * 3))
    torch.testing.assert_close(torch.cat(w), torch.tensor([2.0] * 3 + [1.7] * 3))


def test_bad_input():
    w = [torch.zeros(3)]
    with pytest.raises(TypeError, match=r"tensors\[0\]"):
        Layout([torch.zeros(3, dtype=torch.int64)], [0], ["l1"])
    with pytest.raises(ValueError, match="l3"):
        Layout(w, [0], ["l3"])
    with pytest.raises(ValueError, match=r"rule_of\[0\]"):
        Layout(w, [1], ["l1"])
    layout = Layout(w, [0], ["l1"])
    with pytest.raises(ValueError, match="strengths"):
        layout.value(at(w), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="float64"):
        layout.prox(at(w), strengths_of("l1"), torch.tensor(1.0))
    with pytest.raises(ValueError, match="expected 1 addresses of 8 bytes, got 16 bytes"):
        layout.value(at(w * 2), strengths_of("l1"))
    with pytest.raises(ValueError, match="expected an anchor for each of 1 tensors, got 2"):
        Layout(w, [0], ["l1"], [(None, None)] * 2)
    with pytest.raises(TypeError, match=r"tensors\[0\].*got torch.int32"):
        Layout(w, [0], ["l1"], [(None, torch.zeros(3, dtype=torch.int32))])
    layout = Layout(w, [0], ["l1"], [(torch.zeros(3), None)])
    with pytest.raises(ValueError, match=r"expected 2 addresses of anchors.*got 0 bytes"):
        layout.value(at(w), strengths_of("l1"))


def test_nothing():
    layout = Layout([], [], ["l1"])
    assert layout.value(at([]), strengths_of("l1"))[0] == 0
    assert layout.stats(at([])).shape == (0, 5)
    w = [torch.zeros(0)] * 2
    layout = Layout(w, [0, 1], ["l1", "l2"])
    assert layout.accumulate(at(w), at(w), strengths_of("l1", "l2"), 1.0).tolist() == [0, 0, 0]
    assert layout.stats(at(w)).tolist() == [[0] * 5] * 2


def test_scratch_is_small_whatever_the_model():
    """No tensor is made: 20,000 rows of 2^24 elements each, each with a rule of its own."""
    rows = [launch.Row(torch.float32, 2**24, 0, i, i) for i in range(20_000)]
    for columns in (2, 5):
        cut = launch.cut(rows, [0] * len(rows), columns)
        assert cut.partials * columns * 8 + (cut.n_groups + 1) * 4 <= 2**19
        assert cut.slots >= 16384 // columns


def test_one_row_of_more_than_2_31_elements_is_cut():
    cut = launch.cut([launch.Row(torch.bfloat16, 2**33 + 1, 0, 0, 0)], [0], 2)
    assert cut.run * launch.CHUNK * cut.slots >= 2 * (2**33 + 1)
    assert cut.slots <= launch.PARTIALS // 2
