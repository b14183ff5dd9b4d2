"""The differentiable value does all that the loop does in autograd, and gives the same numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import IRREGULAR, REGULAR, differentiable
from torch import nn

import pyreg

PENALTY = pytest.mark.parametrize("penalty", differentiable(), ids=repr)
NET = pyreg.ElasticNet(1e-3, 0.2)


def loop(params, penalty):
    """What pyreg replaces: a sum over parameters in plain torch."""
    first, second = (*penalty.strengths, None)[:2]
    term = {
        "l1": lambda p: first * torch.sum(torch.abs(p)),
        "l2": lambda p: first * torch.sum(p**2),
        "elastic_net": lambda p: first * torch.sum(torch.abs(p)) + second * torch.sum(p**2),
        "l_half": lambda p: first * torch.sum(p[p != 0].abs() ** 0.5),
        "huber": lambda p: (
            first / second * nn.functional.huber_loss(p, 0 * p, reduction="sum", delta=second)
        ),
        "log_sum": lambda p: first * torch.sum(torch.log(1 + torch.abs(p) / second)),
        "mcp": lambda p: sum(_mcp(abs(x), first, second) for x in p.flatten()),
        "scad": lambda p: sum(_scad(abs(x), first, second) for x in p.flatten()),
    }[penalty.name]
    return sum(map(term, params))


def _mcp(x, lam, gamma):
    return lam * x - x * x / (2 * gamma) if x <= gamma * lam else 0 * x + gamma * lam * lam / 2


def _scad(x, lam, a):
    if x <= lam:
        return lam * x
    if x <= a * lam:
        return (2 * a * lam * x - x * x - lam * lam) / (2 * (a - 1))
    return 0 * x + (a + 1) * lam * lam / 2


def learnable(penalty) -> list[bool]:
    return [name not in penalty.above for name in penalty.parameters]


def model(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 7), nn.Linear(7, 2)
    )
    return net.to(dtype)


def leaves(*shapes: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Away from the kink at 0."""
    generator = torch.Generator().manual_seed(6)
    made = [torch.randn(n, generator=generator, dtype=torch.float64) for n in shapes]
    return [(t + 0.1 * t.sign()).to(dtype).requires_grad_() for t in made]


@PENALTY
def test_equals_the_loop(backend, penalty):
    """Value, and every gradient, to the rounding of float64 (about 100 terms, of up to 3 times the
    value: 3e-14 relative; up to 6 roundings of a gradient, and those of the loop)."""
    ours, theirs = model(), model()
    value, expected = pyreg.penalty(ours, penalty), loop(theirs.parameters(), penalty)
    torch.testing.assert_close(value, expected, rtol=3e-14, atol=0)
    value.backward()
    expected.backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=1e-16)


def test_the_functions_are_penalties():
    """l1, l2 and elastic_net of a module, an iterator, pairs, a mapping and a tensor."""
    net = model()
    params = list(net.parameters())
    for function, strengths, penalty in [
        (pyreg.l1, (0.3,), pyreg.L1(0.3)),
        (pyreg.l2, (0.3,), pyreg.L2(0.3)),
        (pyreg.elastic_net, (0.3, 0.2), pyreg.ElasticNet(0.3, 0.2)),
    ]:
        expected = pyreg.penalty(net, penalty)
        for given in (
            net,
            net.parameters(),
            (p for p in params),
            net.named_parameters(),
            dict(net.named_parameters()),
            tuple(params),
        ):
            assert torch.equal(function(given, *strengths), expected)
        assert torch.equal(function(params[0], *strengths), pyreg.penalty(params[:1], penalty))
    assert torch.equal(pyreg.elastic_net(net, l1=0.3, l2=0.2), pyreg.elastic_net(net, 0.3, 0.2))


def test_the_value_is_a_scalar_of_the_right_dtype(backend):
    """0-dim; float32, or float64 when any tensor is; without a graph where none is needed."""
    for dtypes, expected in [
        ([torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
    ]:
        tensors = [torch.ones(3, dtype=d) for d in dtypes]
        value = pyreg.l1(tensors, 1.0)
        assert value.dtype == expected
        assert value.shape == ()
        assert not value.requires_grad
        assert value.item() == 3 * len(dtypes)


def test_an_empty_list_gives_zero():
    for nothing in ([], (), {}, iter([]), nn.ReLU(), nn.ReLU().named_parameters()):
        value = pyreg.l1(nothing, 1.0)
        assert (value.item(), value.shape) == (0.0, ())
    (torch.ones((), requires_grad=True) * 2 + pyreg.l1([], 1.0)).backward()


def test_empty_tensors(backend):
    """Tensors without elements among others: value, and a gradient of their shape."""
    tensors = [torch.empty(0, 3), torch.ones(2), torch.empty(0)]
    tensors = [t.requires_grad_() for t in tensors]
    pyreg.l1(tensors, 0.5).backward()
    assert [t.grad.shape for t in tensors] == [t.shape for t in tensors]
    assert tensors[1].grad.tolist() == [0.5, 0.5]
    assert pyreg.l1([torch.empty(0, requires_grad=True)], 1.0).item() == 0


@PENALTY
def test_autograd_grad(backend, penalty):
    """torch.autograd.grad gives the gradients and leaves .grad alone."""
    tensors = leaves(3, 5)
    grads = torch.autograd.grad(pyreg.penalty(tensors, penalty), tensors)
    for t, g in zip(tensors, grads, strict=True):
        torch.testing.assert_close(g, penalty.grad(t.detach()), rtol=4e-15, atol=1e-16)
        assert t.grad is None
    (only,) = torch.autograd.grad(pyreg.penalty(tensors, penalty), tensors[1:])
    assert torch.equal(only, grads[1])


def test_retain_graph_and_second_backward(backend):
    """With retain_graph a second backward adds the same again; without, it raises."""
    tensors = leaves(3, 5)
    value = pyreg.penalty(tensors, NET)
    value.backward(retain_graph=True)
    once = [t.grad.clone() for t in tensors]
    value.backward()
    for t, g in zip(tensors, once, strict=True):
        assert torch.equal(t.grad, 2 * g)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@PENALTY
def test_double_backward(backend, penalty):
    """gradcheck and gradgradcheck of the whole call, in tensors and in strengths."""
    names = penalty.parameters
    strengths = [
        torch.tensor(s + 0.1, dtype=torch.float64, requires_grad=by)
        for s, by in zip(penalty.strengths, learnable(penalty), strict=True)
    ]

    def function(a, b, *strengths):
        own = type(penalty)(**dict(zip(names, strengths, strict=True)))
        return pyreg.penalty([a, b], own)

    inputs = (*leaves(4, 2), *strengths)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_create_graph(backend):
    """A penalty on the gradient of a penalty: d/dw sum (2 lam w)^2 = 8 lam^2 w."""
    tensors = leaves(3, 5)
    value = pyreg.l2(tensors, 0.5)
    grads = torch.autograd.grad(value, tensors, create_graph=True)
    sum((g * g).sum() for g in grads).backward()
    for t in tensors:
        torch.testing.assert_close(t.grad, 8 * 0.25 * t.detach(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_an_in_place_change_before_backward_raises(changed):
    """As torch's own do; the message names the parameter, whichever it is."""
    net = model()
    names = [name for name, _ in net.named_parameters()]
    value = pyreg.penalty(net, NET)
    with torch.no_grad():
        next(p for i, p in enumerate(net.parameters()) if i == changed).mul_(2)
    with pytest.raises(RuntimeError) as error:
        value.backward()
    assert "inplace" in str(error.value) or "in-place" in str(error.value)
    if pyreg.backends()[0].available:
        assert f"params[{changed}] ({names[changed]!r})" in str(error.value)
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_tensor_may_change_before_backward(backend, frozen):
    """The loop saves nothing of a tensor that needs no gradient, so neither does pyreg."""
    tensors = leaves(3, 5)
    tensors[frozen].requires_grad_(False)
    value = pyreg.l1(tensors, 0.5)
    tensors[frozen].mul_(2)
    value.backward()
    assert tensors[frozen].grad is None
    assert torch.equal(tensors[1 - frozen].grad, 0.5 * tensors[1 - frozen].sign().detach())


@pytest.mark.parametrize("learnable", [False, True])
def test_a_strength_changed_before_backward(backend, learnable):
    """Native keeps the strength that the value was made with; the torch backend raises, as the loop
    does. A gradient with the new strength would belong to no value."""
    (w,) = leaves(4)
    lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=learnable)
    value = pyreg.l1([w], lam)
    with torch.no_grad():
        lam.fill_(4.0)
    if backend == "torch":
        with pytest.raises(RuntimeError, match="inplace"):
            value.backward()
    else:
        value.backward()
        assert torch.equal(w.grad, 0.5 * w.detach().sign())


def test_no_grad_and_inference_mode(backend):
    """A value without a graph; inference tensors too."""
    tensors = leaves(3, 5)
    expected = pyreg.penalty(tensors, NET).item()
    with torch.no_grad():
        assert not (value := pyreg.penalty(tensors, NET)).requires_grad
    assert value.item() == expected
    with torch.inference_mode():
        assert pyreg.penalty(tensors, NET).item() == expected
        made = [t.clone() for t in tensors]
        assert pyreg.penalty(made, NET).item() == expected
    assert pyreg.penalty(made, NET).item() == expected


@PENALTY
def test_func_grad(penalty):
    """torch.func.grad, value_and_grad, vmap of grad, jvp and hessian."""
    (w,) = leaves(6)
    w = w.detach()
    expected = penalty.grad(w)

    def function(t):
        return pyreg.penalty([t], penalty)

    torch.testing.assert_close(torch.func.grad(function)(w), expected)
    gradient, value = torch.func.grad_and_value(function)(w)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(value, penalty.value(w))
    batch = torch.stack([w, 2 * w, -w])
    rows = torch.func.vmap(torch.func.grad(function))(batch)
    torch.testing.assert_close(rows, penalty.grad(batch))
    values = torch.func.vmap(function)(batch)
    torch.testing.assert_close(values, torch.stack([penalty.value(row) for row in batch]))
    _, tangent = torch.func.jvp(function, (w,), (torch.ones_like(w),))
    torch.testing.assert_close(tangent, expected.sum())
    curvature = torch.func.hessian(function)(w).diagonal()
    torch.testing.assert_close(curvature, torch.func.jacrev(penalty.grad)(w).diagonal())


def test_func_grad_over_a_module():
    """The functional style: gradients of a loss over a dict of parameters."""
    net = model()
    params = {name: p.detach() for name, p in net.named_parameters()}
    grads = torch.func.grad(lambda p: pyreg.penalty(p, NET))(params)
    for name, p in params.items():
        torch.testing.assert_close(grads[name], NET.grad(p))


def test_func_grad_of_a_strength():
    w = torch.tensor([1.0, -2.0])
    derivative = torch.func.grad(lambda lam: pyreg.l1([w], lam))(torch.tensor(0.5))
    assert derivative.item() == 3.0


def test_func_refuses_what_the_loop_refuses():
    """Input errors are raised inside a transform too."""
    with pytest.raises(TypeError, match=r"params\[1\]: expected a floating tensor, got int64"):
        torch.func.grad(lambda t: pyreg.l1([t, torch.ones(2, dtype=torch.int64)], 1.0))(
            torch.ones(2)
        )


@PENALTY
def test_learnable_strengths(backend, penalty):
    """d/d strength of the penalty, which where it is a factor is Omega itself; scaled like all."""
    tensors = leaves(30, 5)
    strengths = [
        torch.tensor(s, dtype=torch.float64, requires_grad=by)
        for s, by in zip(penalty.strengths, learnable(penalty), strict=True)
    ]
    own = type(penalty)(*strengths)
    (3 * pyreg.penalty(tensors, own)).backward()
    (total,) = torch.autograd.grad(loop([t.detach() for t in tensors], own), strengths[:1])
    torch.testing.assert_close(strengths[0].grad, 3 * total, rtol=1e-14, atol=0)
    if penalty.name == "elastic_net":
        squares = sum(t.detach().square().sum() for t in tensors)
        torch.testing.assert_close(strengths[1].grad, 3 * squares, rtol=1e-14, atol=0)
    for t in tensors:
        torch.testing.assert_close(t.grad, 3 * penalty.grad(t.detach()), rtol=4e-15, atol=1e-16)


def test_a_penalty_without_a_gradient(backend):
    """L0: its value without a graph, its proximal step, and an error that names it for the rest,
    before anything is written; also as one rule among others, and while torch.compile traces."""
    net, l0 = model(), pyreg.L0(0.5)
    weights = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        assert pyreg.penalty(net, l0).item() == 0.5 * sum((w != 0).sum() for w in weights)
    reg = pyreg.Regularizer(net, {"0.*": pyreg.L1(0.1), "*": l0})
    for call in (
        lambda: pyreg.penalty(net, l0),
        reg,
        lambda: reg.accumulate_(create_grads=True),
        lambda: l0.grad(weights[0]),
        lambda: torch.func.grad(lambda w: pyreg.penalty([w], l0))(weights[0]),
    ):
        with pytest.raises(RuntimeError, match=r"L0\(lam=0.5\) has no gradient"):
            call()
    assert all(p.grad is None for p in net.parameters())
    compiled = torch.compile(lambda: pyreg.penalty(net, l0), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="has no gradient"):
        compiled()
    lam = torch.tensor(0.5, requires_grad=True)
    pyreg.penalty(weights, pyreg.L0(lam)).backward()
    assert lam.grad == sum((w != 0).sum() for w in weights)
    pyreg.Regularizer(net, l0).prox_(0.01)
    for p, w in zip(net.parameters(), weights, strict=True):
        assert torch.equal(p.detach(), torch.where(w.abs() > 0.1, w, 0))


@pytest.mark.parametrize("create_grads", [False, True])
def test_a_penalty_without_a_gradient_on_a_frozen_tensor(backend, create_grads):
    """It would be added to a `.grad` that is there, or is created; without one it only counts."""
    first, frozen = nn.Parameter(torch.ones(2)), torch.ones(3)
    first.grad = torch.zeros(2)
    rules = {"first": pyreg.L1(0.5), "frozen": pyreg.L0(0.5)}
    reg = pyreg.Regularizer({"first": first, "frozen": frozen}, rules, include_frozen=True)
    assert reg().item() == reg.accumulate_().item() == 2.5
    first.grad.zero_()
    frozen.grad = None if create_grads else torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"L0\(lam=0.5\) has no gradient"):
        reg.accumulate_(create_grads=create_grads)
    assert first.grad.tolist() == [0, 0]
    assert create_grads == (frozen.grad is None)
    assert reg().item() == 2.5, "its value is fine"


def test_a_learnable_strength_of_frozen_tensors(backend):
    """Only the strength needs a gradient; a non-leaf strength passes it on."""
    w = torch.tensor([1.0, -2.0])
    raw = torch.tensor(0.0, requires_grad=True)
    lam = raw.exp()
    value = pyreg.l1([w], lam)
    assert value.item() == 3.0
    value.backward()
    assert raw.grad.item() == 3.0


def test_strengths_as_tensors(backend):
    """A 0-dim tensor of any floating dtype gives what the float gives, and may change."""
    tensors = leaves(30, 5)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        lam = torch.tensor(0.25, dtype=dtype)
        assert torch.equal(pyreg.l1(tensors, lam), pyreg.l1(tensors, 0.25))
        lam.fill_(0.5)
        assert torch.equal(pyreg.l1(tensors, lam), pyreg.l1(tensors, 0.5))


def test_only_some_tensors_need_a_gradient(backend):
    """The others count in the value, and get none."""
    tensors = leaves(3, 5, 7)
    tensors[1].requires_grad_(False)
    value = pyreg.penalty(tensors, NET)
    torch.testing.assert_close(value, loop(tensors, NET).detach(), check_dtype=False)
    value.backward()
    assert tensors[1].grad is None
    for t in (tensors[0], tensors[2]):
        torch.testing.assert_close(t.grad, NET.grad(t.detach()))


def test_non_leaf_tensors(backend):
    """A penalty on activations: the gradient flows on."""
    (w,) = leaves(6)
    pyreg.l2([(w * 3).view(2, 3), w], 0.5).backward()
    torch.testing.assert_close(w.grad, (9 + 1) * w.detach())


def test_gradients_share_one_buffer():
    """One flat allocation; each view has its tensor's own strides and starts at 64 bytes."""
    pytest.importorskip("pyreg._native")
    for case in REGULAR:
        tensors = [t.requires_grad_() for t in case.build(torch.float32)]
        grads = torch.autograd.grad(pyreg.penalty(tensors, NET), tensors)
        assert len({g.untyped_storage().data_ptr() for g in grads}) == 1
        spans = []
        for t, g in zip(tensors, grads, strict=True):
            assert (g.shape, g.stride()) == (t.shape, t.stride()), case
            assert g.storage_offset() % 16 == 0
            spans.append((g.storage_offset(), g.storage_offset() + g.numel()))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        used = sum(-(-4 * t.numel() // 64) * 64 for t in tensors)
        assert grads[0].untyped_storage().nbytes() == used


def test_a_missing_grad_becomes_a_view_of_the_buffer():
    """Where .grad is None autograd keeps the view: no copy; where it exists it is added to."""
    pytest.importorskip("pyreg._native")
    net = model(torch.float32)
    pyreg.penalty(net, NET).backward()
    assert len({p.grad.untyped_storage().data_ptr() for p in net.parameters()}) == 1
    places = [p.grad.data_ptr() for p in net.parameters()]
    once = [p.grad.clone() for p in net.parameters()]
    pyreg.penalty(net, NET).backward()
    assert places == [p.grad.data_ptr() for p in net.parameters()]
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(net.parameters(), once, strict=True))


def test_hooks_see_the_gradient(backend):
    """Tensor hooks may replace it; post-accumulate hooks fire once per tensor."""
    tensors = leaves(3, 5)
    seen = []
    tensors[0].register_hook(lambda g: g * 10)
    tensors[1].register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    pyreg.l1(tensors, 0.5).backward()
    assert torch.equal(tensors[0].grad, 5 * tensors[0].detach().sign())
    assert len(seen) == 1
    assert torch.equal(seen[0], tensors[1].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_scaled_penalty_has_scaled_gradients(backend, dtype):
    """DDP divides by the world size, GradScaler multiplies by a power of two: both exact here."""
    for factor in (0.25, 1024.0):
        (w,) = leaves(50, dtype=dtype)
        (factor * pyreg.l1([w], 0.125)).backward()
        assert torch.equal(w.grad, factor * 0.125 * w.detach().sign())


def test_mixed_dtypes(backend):
    """Each gradient in its tensor's dtype, each the rounding of its own formula."""
    tensors = [
        t
        for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        for t in leaves(9, dtype=d)
    ]
    pyreg.l1(tensors, 0.3).backward()
    for t in tensors:
        assert t.grad.dtype == t.dtype
        assert torch.equal(t.grad, pyreg.L1(0.3).grad(t.detach()))


@pytest.mark.parametrize("case", IRREGULAR, ids=repr)
def test_irregular_tensors(case):
    """Expanded, sliced, overlapping and negated views: as the loop, through to the base."""
    tensors = [t.requires_grad_() for t in case.build(torch.float64)]
    expected = torch.autograd.grad(loop(tensors, NET), tensors)
    grads = torch.autograd.grad(pyreg.penalty(tensors, NET), tensors)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16)
    base = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    pyreg.penalty([base.expand(5, 300)], NET).backward()
    torch.testing.assert_close(base.grad, 300 * NET.grad(base.detach()))


def test_an_empty_tensor_is_not_expanded(backend):
    """Of no elements none share a place, whatever the strides."""
    empty = torch.ones(0).expand(3, 0).detach().requires_grad_()
    assert empty.stride() == (0, 1)
    (w,) = leaves(4)
    pyreg.l1([empty, w], 0.5).backward()
    assert empty.grad.shape == (3, 0)
    empty.grad = torch.ones(0).expand(3, 0)
    reg = pyreg.Regularizer({"empty": empty, "w": w}, pyreg.L1(0.5))
    reg.accumulate_()
    assert torch.equal(w.grad, w.detach().sign())
    reg.prox_(0.1)


def test_regular_and_irregular_together():
    """Two packs: an in-place change of either raises, and both get their gradient."""
    base = torch.randn(8, dtype=torch.float64, requires_grad=True)
    (w,) = leaves(4)
    pyreg.penalty([base[::2], w, base[1::2]], NET).backward()
    torch.testing.assert_close(base.grad, NET.grad(base.detach()))
    torch.testing.assert_close(w.grad, NET.grad(w.detach()))


def test_duplicates_count_twice(backend):
    """A tensor listed twice counts twice, as in the loop; a module lists a tied one once."""
    (w,) = leaves(4)
    value = pyreg.l1([w, w], 0.5)
    torch.testing.assert_close(value, 2 * pyreg.l1([w], 0.5))
    value.backward()
    torch.testing.assert_close(w.grad, 2 * 0.5 * w.detach().sign())
    tied = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    tied["b"].weight = tied["a"].weight
    torch.testing.assert_close(pyreg.l1(tied, 0.5), pyreg.l1(tied["a"], 0.5))


def test_a_generator_is_read_once(backend):
    (w,) = leaves(4)
    assert pyreg.l1((t for t in [w, w]), 1.0).item() == pytest.approx(2 * w.abs().sum().item())


def test_memory_that_moves_between_calls():
    """The cached layout follows: other data, dtype, strides and length."""
    w = nn.Parameter(torch.ones(4, 6))
    assert pyreg.l1([w], 1.0).item() == 24
    for data, expected in [
        (torch.full((4, 6), 2.0), 48),
        (torch.full((6, 4), 3.0).t(), 72),
        (torch.full((4, 6), 2.0, dtype=torch.float64), 48),
        (torch.full((5,), 2.0, dtype=torch.bfloat16), 10),
        (torch.full((12,), 4.0)[::2], 24),
        (torch.empty(0), 0),
        (torch.ones(4, 6), 24),
    ]:
        w.data = data
        assert pyreg.l1([w], 1.0).item() == expected
        w.grad = None
        pyreg.l1([w], 0.5).backward()
        assert torch.equal(w.grad, torch.full_like(w, 0.5))


def test_nan_and_infinity_reach_value_and_gradient(backend):
    """(torch's own derivative of |w| at NaN, which the torch backend uses here, is 0.)"""
    w = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    value = pyreg.l1([w], 0.5)
    value.backward()
    assert value.isnan()
    assert w.grad[0] == 0.5
    assert w.grad[1].isnan() or backend == "torch"
    assert w.grad[2] == 0.5
    assert pyreg.l1([torch.tensor([float("inf")])], 0.5).item() == float("inf")


def test_parameters_replaced_before_backward():
    """p.data = ... between forward and backward. Of the same kind: as in torch, nobody notices, and
    the new numbers are used. Of another dtype or shape: an error. Never a crash."""
    pytest.importorskip("pyreg._native")
    (w,) = leaves(2000)
    value = pyreg.l1([w], 0.5)
    w.data = -w.data.clone()
    value.backward()
    assert torch.equal(w.grad, 0.5 * w.detach().sign())
    for data in (torch.ones(2000), torch.ones(3, dtype=torch.float64), torch.ones(0)):
        (w,) = leaves(2000)
        value = pyreg.l1([w], 0.5)
        w.data = data
        with pytest.raises(RuntimeError):
            value.backward()


def test_the_graph_keeps_its_tensors_alive(backend):
    """A temporary that only the graph knows is still there in backward."""
    (w,) = leaves(2000)
    value = pyreg.l2([w * 2], 0.5)
    junk = [torch.full((2000,), float("nan"), dtype=torch.float64) for _ in range(20)]
    value.backward()
    torch.testing.assert_close(w.grad, 4 * w.detach())
    assert len(junk) == 20


def test_threads_may_call_at_once():
    """Several Python threads, each with its own tensors and packs."""
    from concurrent.futures import ThreadPoolExecutor

    def work(seed: int) -> float:
        w = torch.full((50_000 + seed,), 0.5, requires_grad=True)
        for _ in range(20):
            w.grad = None
            value = pyreg.l1([w], 1.0)
            value.backward()
            assert (w.grad == 1).all()
        return value.item()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(8))) == [(50_000 + i) / 2 for i in range(8)]


def test_make_fx_records_the_sweep():
    """A tracer that runs real tensors through a dispatch mode gets an op, not a constant."""
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda w: pyreg.l1([w], 1.0))(torch.ones(3))
    assert graph(2 * torch.ones(3)).item() == 6.0


@pytest.mark.filterwarnings("ignore")  # of the tracer: it is deprecated
def test_jit_trace_records_the_sweep():
    traced = torch.jit.trace(lambda w: pyreg.l1([w], 1.0), torch.ones(3), check_trace=False)
    assert traced(2 * torch.ones(3)).item() == 6.0


def test_forward_mode():
    """d/dt (w + t v)^2 = 2 w v, with and without requires_grad."""
    for requires_grad in (False, True):
        w = torch.tensor([1.0, -2.0], requires_grad=requires_grad)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(w, torch.tensor([1.0, 10.0]))
            tangent = torch.autograd.forward_ad.unpack_dual(pyreg.l2([dual], 1.0)).tangent
        assert tangent.item() == 2 * (1 - 20)


def test_a_frozen_tensor_that_changed_is_not_used_in_a_double_backward(native):
    """The strength's own gradient would read it again; the plain backward has its sums already."""
    frozen, lam = torch.ones(5), torch.tensor(1.0, requires_grad=True)
    value = pyreg.l1([("fc.weight", frozen)], lam)
    frozen.add_(100)
    assert torch.autograd.grad(value, lam, retain_graph=True)[0].item() == 5.0
    with pytest.raises(RuntimeError, match=r"params\[0\] \('fc.weight'\): .*inplace"):
        torch.autograd.grad(value, lam, create_graph=True)


@pytest.mark.parametrize("data", [torch.ones(7), torch.ones(5).double()], ids=["shape", "dtype"])
def test_data_of_another_kind_before_backward_names_the_parameter(native, data):
    w = nn.Parameter(torch.ones(5))
    value = pyreg.l1([("fc.weight", w)], 1.0)
    w.data = data
    with pytest.raises(RuntimeError, match=r"params\[0\] \('fc.weight'\): .*replaced"):
        value.backward()
