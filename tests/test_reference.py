"""The oracle, by mathematics alone: the others compare with it, so it is compared with none."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, differentiable, penalties
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import pyreg
from pyreg import reference

PENALTIES = pytest.mark.parametrize("penalty", penalties(), ids=repr)
DIFFERENTIABLE = pytest.mark.parametrize("penalty", differentiable(), ids=repr)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# By hand, at w = [-1, 0, 3]: value, gradient, step, prox.
HAND = [
    (pyreg.L1(2.0), 8.0, [-2.0, 0.0, 2.0], 0.5, [0.0, 0.0, 2.0]),
    (pyreg.L2(2.0), 20.0, [-4.0, 0.0, 12.0], 0.25, [-0.5, 0.0, 1.5]),
    (pyreg.ElasticNet(1.0, 2.0), 24.0, [-5.0, 0.0, 13.0], 0.25, [-0.375, 0.0, 1.375]),
    (pyreg.L0(2.0), 4.0, None, 0.5, [0.0, 0.0, 3.0]),
    (pyreg.LHalf(0.0), 0.0, [0.0, 0.0, 0.0], 0.5, [-1.0, 0.0, 3.0]),
    (pyreg.Huber(2.0, 2.0), 4.5, [-1.0, 0.0, 2.0], 0.5, [-0.6666666865348816, 0.0, 2.0]),
    (pyreg.LogSum(4.0, 1.0), 8.317766166719343, [-2.0, 0.0, 1.0], 0.25, [0.0, 0.0, 2.7320508]),
    (pyreg.MCP(1.0, 2.0), 1.75, [-0.5, 0.0, 0.0], 0.5, [-0.6666666865348816, 0.0, 3.0]),
    (pyreg.MCP(1.0, 2.0), 1.75, [-0.5, 0.0, 0.0], 4.0, [0.0, 0.0, 3.0]),
    (pyreg.SCAD(1.0, 3.0), 3.0, [-1.0, 0.0, 0.0], 0.5, [-0.5, 0.0, 3.0]),
    (pyreg.SCAD(0.5, 3.0), 0.9375, [-0.25, 0.0, 0.0], 4.0, [0.0, 0.0, 3.0]),
]


def away_from_zero(n: int = 12) -> torch.Tensor:
    """Both signs, 0.1 <= |w| <= 2: a finite difference of 1e-6 never crosses the kink at 0."""
    w = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.9 + 0.1
    w[::2] *= -1
    return w.requires_grad_()


def strength_tensors(penalty: pyreg.Penalty) -> list[torch.Tensor]:
    own = torch.tensor(penalty.strengths, dtype=torch.float64) + 0.1
    return [s.clone().requires_grad_() for s in own]


@DIFFERENTIABLE
def test_value_is_differentiable_twice(penalty):
    """gradcheck and gradgradcheck of the value, in the weights and in the strengths."""
    value = reference.FORMULAS[penalty.name].value
    inputs = (away_from_zero(), *strength_tensors(penalty))
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


@PENALTIES
def test_strength_grad_is_the_derivative_of_value(penalty):
    """By each learnable strength, those that come first."""
    formula, strengths = reference.FORMULAS[penalty.name], strength_tensors(penalty)
    learnable = strengths[: len(strengths) - len(penalty.above)]
    w = away_from_zero().detach()
    expected = torch.autograd.grad(formula.value(w, *strengths), learnable)
    got = formula.strength_grad(w, *strengths)
    torch.testing.assert_close(got.detach(), torch.stack(expected), rtol=1e-14, atol=0)


@DIFFERENTIABLE
def test_grad_is_the_derivative_of_value(penalty):
    """grad equals autograd's derivative of value, and is differentiable itself."""
    w = away_from_zero()
    (expected,) = torch.autograd.grad(penalty.value(w), w)
    torch.testing.assert_close(penalty.grad(w).detach(), expected, rtol=1e-14, atol=0)
    formula = reference.FORMULAS[penalty.name].grad
    assert torch.autograd.gradcheck(formula, (w, *strength_tensors(penalty)))


@DIFFERENTIABLE
def test_autograd_of_the_value_keeps_small_gradients(penalty):
    """In float32, weights far below every shape: no more roundings than 4 of 2^-24 in either."""
    w = 1e-7 * torch.linspace(1.0, 4.0, 50)
    w = torch.cat([w, -w, 1e3 * w]).requires_grad_()
    (got,) = torch.autograd.grad(penalty.value(w), w)
    exact = penalty.grad(w.detach().double())
    torch.testing.assert_close(got.double(), exact, rtol=8 * 2**-24, atol=0)


def test_hubers_value_where_its_parts_meet():
    """There its slope is lam, once."""
    w = torch.tensor([-0.5, 0.5], requires_grad=True)
    for delta in (0.5, torch.tensor(0.5)):
        (got,) = torch.autograd.grad(pyreg.Huber(2.0, delta).value(w), w)
        assert got.tolist() == [-2.0, 2.0]


@PENALTIES
def test_no_point_of_a_dense_grid_beats_prox(penalty):
    """step * Omega(u) + (u - x)^2 / 2 is nowhere on a grid less than at prox(x), for any step.

    The tolerance is the rounding of the objective itself (a few roundings of 2^-53 relative).
    """
    generator = torch.Generator().manual_seed(2)
    omega = torch.func.vmap(torch.func.vmap(penalty.value))
    for step in [*(10 ** (torch.rand(12, generator=generator) * 8 - 3)).tolist(), 1e-3, 1e5]:
        x = torch.randn(40, 1, generator=generator, dtype=torch.float64) * 3
        x[0] = 0
        assert_no_grid_point_is_lower(penalty, omega, x, step)


def assert_no_grid_point_is_lower(penalty, omega, x, step):
    u = penalty.prox(x, step)
    grid = torch.cat([torch.linspace(-1.5, 1.5, 2001, dtype=torch.float64), u.flatten() / 3])
    grid = torch.cat([grid * x.abs().clamp_min(0.1), u + 1e-4, u - 1e-4, 0 * x], dim=1)
    best = step * omega(u) + (u - x) ** 2 / 2
    others = step * omega(grid) + (grid - x) ** 2 / 2
    lowest = others.amin(dim=1, keepdim=True)
    assert (best <= lowest + 1e-14 * (lowest + x**2) + 1e-300).all(), (penalty, step)


@settings(max_examples=150)
@given(
    st.sampled_from(list(pyreg.penalties.PENALTIES.values())),
    st.lists(st.floats(0.01, 3), min_size=2, max_size=2),
    st.floats(-3, 5),
    st.sampled_from([0.01, 1.0, 30.0]),
)
def test_no_point_of_a_dense_grid_beats_prox_whatever_the_strengths(cls, numbers, power, size):
    """Any strengths, shapes from just above their bounds on, steps of 1e-3 to 1e5."""
    bounds = [cls.above.get(name, 0.0) for name in cls.parameters]
    penalty = cls(*(x + low for x, low in zip(numbers, bounds, strict=False)))
    x = torch.linspace(-1, 1, 23, dtype=torch.float64)[:, None] * size
    omega = torch.func.vmap(torch.func.vmap(penalty.value))
    assert_no_grid_point_is_lower(penalty, omega, x, 10**power)


@PENALTIES
def test_a_small_step_is_the_identity(penalty):
    """prox(x, step) -> x as step -> 0: it moves by at most step * |gradient|; at 0 it is x."""
    x = away_from_zero().detach()
    assert torch.equal(penalty.prox(x, 0.0), x)
    moved = (penalty.prox(x, 1e-6) - x).abs()
    if reference.FORMULAS[penalty.name].grad is None:
        assert not moved.any()
    else:  # (to first order)
        assert (moved <= 1e-6 * penalty.grad(x).abs() * (1 + 1e-5) + 1e-15).all()


@pytest.mark.parametrize(("penalty", "value", "grad", "step", "prox"), HAND, ids=lambda x: str(x))
@DTYPE
def test_hand_computed(penalty, value, grad, step, prox, dtype):
    """Numbers, most of which every dtype holds exactly."""
    w = torch.tensor([-1.0, 0.0, 3.0], dtype=dtype)
    assert penalty.value(w).item() == pytest.approx(value, rel=1e-7)
    if grad is not None:
        assert penalty.grad(w).tolist() == grad
    eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-7
    assert penalty.prox(w, step).tolist() == pytest.approx(prox, rel=eps)


def test_elastic_net_contains_l1_and_l2():
    """elastic_net(l2=0) = l1 and elastic_net(l1=0) = l2: value, gradient and prox, bit by bit."""
    w = torch.randn(1000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w[::9] = 0
    for net, alone in [
        (pyreg.ElasticNet(0.3, 0), pyreg.L1(0.3)),
        (pyreg.ElasticNet(0, 0.3), pyreg.L2(0.3)),
    ]:
        assert torch.equal(net.value(w), alone.value(w))
        assert torch.equal(net.grad(w), alone.grad(w))
        for step in (1e-3, 1.0, 1e5):
            assert torch.equal(net.prox(w, step), alone.prox(w, step))


def test_closed_form_of_a_quadratic_model():
    """L(w) = 1/2 (w - w*)' H (w - w*) plus a penalty: the minimum is prox with steps 1 / H_ii."""
    h = torch.tensor([4.0, 1.0, 0.25, 10.0], dtype=torch.float64)
    w = torch.tensor([1.0, -0.5, 0.3, -0.05], dtype=torch.float64)
    a = 0.2
    sparse = torch.tensor([0.95, -0.3, 0.0, -0.03], dtype=torch.float64)
    torch.testing.assert_close(pyreg.closed_form(w, h, pyreg.L1(a)), sparse, rtol=1e-14, atol=1e-17)
    shrunk = pyreg.closed_form(w, h, pyreg.L2(a / 2))
    torch.testing.assert_close(shrunk, h * w / (h + a), rtol=1e-14, atol=0)
    net = pyreg.closed_form(w, h, pyreg.ElasticNet(a, a / 2))
    torch.testing.assert_close(net, sparse * h / (h + a), rtol=1e-14, atol=1e-17)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"hessian_diag: expected numbers > 0, got {bad}"):
            pyreg.closed_form(w, torch.tensor([1.0, bad, 1.0, 1.0]), pyreg.L1(a))


@pytest.mark.parametrize("penalty", [pyreg.L1(0.2), pyreg.ElasticNet(0.2, 0.1), pyreg.SCAD(0.2, 3)])
def test_closed_forms_of_many_tensors(backend, penalty):
    """One sweep over all, on copies; a Hessian broadcasts, and is in the compute dtype."""
    torch.manual_seed(0)
    w = [torch.randn(7, 5).t(), torch.randn(3).bfloat16(), torch.randn(4).double().requires_grad_()]
    h = [torch.rand(5, 1) + 0.5, torch.rand(3).double() + 0.5, 0.3]
    kept = [t.detach().clone() for t in w]
    found = pyreg.closed_form(w, h, penalty)
    for i, (u, at, hessian) in enumerate(zip(found, w, h, strict=True)):
        expected = penalty.prox(
            at.detach().double(), 1 / torch.as_tensor(hessian, dtype=torch.float64)
        )
        eps = torch.finfo(at.dtype).eps
        torch.testing.assert_close(u.double(), expected, rtol=eps, atol=4 * eps)
        assert u.dtype == at.dtype
        assert not u.requires_grad
        assert torch.equal(at, kept[i])
        if not isinstance(hessian, float):
            assert torch.equal(u, pyreg.closed_form(at, hessian, penalty))
    assert pyreg.closed_form([], 1.0, penalty) == []
    anchored = type(penalty)(*penalty.strengths, anchor=torch.ones(3, dtype=torch.bfloat16))
    moved = pyreg.closed_form(w[1], 0.5, anchored)
    torch.testing.assert_close(moved, anchored.prox(w[1], 2.0))


def test_closed_forms_that_are_refused():
    w = [torch.ones(3), torch.ones(2, 2)]
    with pytest.raises(
        ValueError, match=r"hessian_diag\[1\]: \[3\] does not broadcast to \[2, 2\]"
    ):
        pyreg.closed_form(w, [torch.ones(3), torch.ones(3)], pyreg.L1(0.1))
    with pytest.raises(ValueError, match="expected 2 tensors, like w_star, got 1"):
        pyreg.closed_form(w, [torch.ones(3)], pyreg.L1(0.1))
    with pytest.raises(TypeError, match=r"w_star\[0\]: expected a floating tensor, got int64"):
        pyreg.closed_form([torch.ones(3, dtype=torch.long)], 1.0, pyreg.L1(0.1))
    with pytest.raises(TypeError, match="take one tensor at a time"):
        pyreg.closed_form(w, 1.0, pyreg.L1(0.1, anchor=torch.ones(3)))
    with pytest.raises(TypeError, match="expected a pyreg penalty, got 'l1'"):
        pyreg.closed_form(w, 1.0, "l1")
    for bad in (None, "1", object()):
        with pytest.raises(TypeError, match=r"hessian_diag.*: expected a number or a tensor"):
            pyreg.closed_form(w[0], bad, pyreg.L1(0.1))
    for bad, got in ((1.0, "float"), (None, "NoneType"), ("w", "str")):
        with pytest.raises(
            TypeError, match=f"w_star: expected a tensor or a sequence of them, got {got}"
        ):
            pyreg.closed_form(bad, 1.0, pyreg.L1(0.1))
    for bad in (torch.ones(3, dtype=torch.complex64), [torch.ones(3, dtype=torch.complex64)], 1j):
        with pytest.raises(
            TypeError, match=r"hessian_diag.*: expected real numbers, got complex64"
        ):
            pyreg.closed_form(w[0], bad, pyreg.L1(0.1))
    for bad in (1e-300, torch.tensor([1.0, 1e-300, 2.0], dtype=torch.float64)):
        with pytest.raises(
            ValueError, match=r"hessian_diag: expected numbers > 0, got 1e-300, 0 in float32"
        ):
            pyreg.closed_form(w[0], bad, pyreg.L1(0.1))
    assert pyreg.closed_form(w[0].double(), 1e-300, pyreg.L1(1e-302))[0] == pytest.approx(0.99)


def test_weights_whose_numbers_cannot_be_asked_for():
    def value(weight):
        return pyreg.L2(0.1, weight=weight).value(torch.ones(3))

    weights = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(torch.vmap(value)(weights), torch.tensor([0.6, 0.1]))
    traced = make_fx(value)(weights[0])
    torch.testing.assert_close(traced(weights[0]), torch.tensor(0.6))
    with FakeTensorMode():
        assert value(torch.ones(3)).shape == ()


def test_a_weight_that_cannot_be(backend):
    w = torch.ones(3)
    for bad in (-1.0, math.nan, math.inf):
        rule = pyreg.L1(0.1, weight=torch.tensor([1.0, bad, 1.0]))
        for run in (rule.value, rule.grad, lambda t, rule=rule: rule.prox(t, 0.1)):
            with pytest.raises(ValueError, match=r"L1\.weight has elements that are not finite"):
                run(w)


def test_priors():
    """-log p(w) / n of independent weights, up to a constant, by torch's own distributions."""
    w = torch.tensor([0.5, -2.0], dtype=torch.float64)
    distributions = torch.distributions
    for prior, density in [
        (pyreg.priors.laplace(0.7, 50), distributions.Laplace(w.new_zeros(()), w.new_tensor(0.7))),
        (pyreg.priors.gaussian(0.7, 50), distributions.Normal(w.new_zeros(()), w.new_tensor(0.7))),
    ]:
        expected = (density.log_prob(w.new_zeros(2)) - density.log_prob(w)).sum() / 50
        torch.testing.assert_close(prior.value(w), expected, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="scale: expected a number > 0"):
        pyreg.priors.laplace(0, 50)
    with pytest.raises(ValueError, match=r"L2\.lam: expected a finite number >= 0, got inf"):
        pyreg.priors.gaussian(1e-200, 50)
    with pytest.raises(ValueError, match="n: expected a finite number >= 0, got -1"):
        pyreg.priors.gaussian(1.0, -1)


@PENALTIES
def test_a_step_per_element(penalty):
    """A tensor of steps gives what each step gives alone."""
    w, steps = away_from_zero().detach(), torch.logspace(-3, 5, 12, dtype=torch.float64)
    alone = [penalty.prox(x, t.item()) for x, t in zip(w, steps, strict=True)]
    torch.testing.assert_close(penalty.prox(w, steps), torch.stack(alone), rtol=1e-15, atol=0)


@PENALTIES
@DTYPE
def test_zero_has_gradient_and_prox_zero(penalty, dtype):
    """sign(0) = sign(-0) = 0, whatever the strength and the slope beside 0."""
    w = torch.tensor([0.0, -0.0], dtype=dtype, requires_grad=True)
    assert penalty.value(w).item() == 0
    if reference.FORMULAS[penalty.name].grad is not None:
        assert (penalty.grad(w) == 0).all()
        (by_autograd,) = torch.autograd.grad(penalty.value(w), w)
        assert (by_autograd == 0).all()
    assert (penalty.prox(w, 10.0) == 0).all()


@PENALTIES
@DTYPE
def test_nan_and_infinity_propagate(penalty, dtype):
    """A NaN stays one in all three functions. An infinite weight stays infinite, and so is its
    penalty, but where that is bounded."""
    w = torch.tensor([math.nan, 1.0], dtype=dtype)
    assert penalty.value(w).isnan()
    differentiable = reference.FORMULAS[penalty.name].grad is not None
    assert not differentiable or penalty.grad(w).isnan().tolist() == [True, False]
    assert penalty.prox(w, 0.1).isnan().tolist() == [True, False]
    infinite = torch.tensor([math.inf, -math.inf], dtype=dtype)
    limit = penalty.value(torch.tensor([1e300, 1e300], dtype=torch.float64))
    if penalty.name in ("l0", "mcp", "scad"):
        assert penalty.value(infinite).item() == pytest.approx(limit.item())
        assert not differentiable or (penalty.grad(infinite) == 0).all()
    else:
        assert not penalty.value(infinite).isfinite()
    moved = penalty.prox(infinite, 0.1)
    assert moved.tolist() == [math.inf, -math.inf]


@PENALTIES
@DTYPE
def test_dtypes(penalty, dtype):
    """grad and prox keep the dtype; a value is float32, or float64 for float64; empty gives 0."""
    w = torch.randn(5, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert penalty.prox(w, 0.1).dtype == dtype
    if reference.FORMULAS[penalty.name].grad is not None:
        assert penalty.grad(w).dtype == dtype
    assert penalty.value(w).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert penalty.value(w).shape == ()
    assert penalty.value(w[:0]).item() == 0


@DTYPE
def test_sums_do_not_saturate(dtype):
    """100,001 ones: a sum in bfloat16 would stop at 256, one in float16 overflow at 65,504."""
    w = torch.ones(100_001, dtype=dtype)
    assert pyreg.L1(1.0).value(w).item() == 100_001
    assert pyreg.L2(1.0).value(w).item() == 100_001


def test_stats_by_hand():
    """[sum |w|, sum w^2, max |w|, zeros, non-finite], and 0 for an empty tensor."""
    w = torch.tensor([[1.0, -2.0], [0.0, -0.0]])
    assert reference.stats(w).tolist() == [3.0, 5.0, 2.0, 2.0, 0.0]
    assert reference.stats(w[:0]).tolist() == [0.0] * 5
    bad = reference.stats(torch.tensor([math.nan, math.inf, 1.0, 0.0]))
    assert bad[:3].isnan().all()
    assert bad[3:].tolist() == [1.0, 2.0]
    assert reference.stats(torch.tensor([-math.inf, 1.0])).tolist() == [math.inf] * 3 + [0.0, 1.0]
