"""The oracle, by mathematics alone: the others compare with it, so it is compared with none."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, penalties

import pyreg
from pyreg import reference

PENALTIES = pytest.mark.parametrize("penalty", penalties(), ids=repr)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# By hand, at w = [-1, 0, 3]: value, gradient, step, prox.
HAND = [
    (pyreg.L1(2.0), 8.0, [-2.0, 0.0, 2.0], 0.5, [0.0, 0.0, 2.0]),
    (pyreg.L2(2.0), 20.0, [-4.0, 0.0, 12.0], 0.25, [-0.5, 0.0, 1.5]),
    (pyreg.ElasticNet(1.0, 2.0), 24.0, [-5.0, 0.0, 13.0], 0.25, [-0.375, 0.0, 1.375]),
]


def away_from_zero(n: int = 12) -> torch.Tensor:
    """Both signs, 0.1 <= |w| <= 2: a finite difference of 1e-6 never crosses the kink at 0."""
    w = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.9 + 0.1
    w[::2] *= -1
    return w.requires_grad_()


def strength_tensors(penalty: pyreg.Penalty) -> list[torch.Tensor]:
    own = torch.tensor(penalty.strengths, dtype=torch.float64) + 0.1
    return [s.clone().requires_grad_() for s in own]


@PENALTIES
def test_value_is_differentiable_twice(penalty):
    """gradcheck and gradgradcheck of the value, in the weights and in the strengths."""
    value = reference.FORMULAS[penalty.name].value
    inputs = (away_from_zero(), *strength_tensors(penalty))
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


@PENALTIES
def test_grad_is_the_derivative_of_value(penalty):
    """grad equals autograd's derivative of value, and is differentiable itself."""
    w = away_from_zero()
    (expected,) = torch.autograd.grad(penalty.value(w), w)
    torch.testing.assert_close(penalty.grad(w).detach(), expected, rtol=1e-15, atol=0)
    formula = reference.FORMULAS[penalty.name].grad
    assert torch.autograd.gradcheck(formula, (w, *strength_tensors(penalty)))


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
        u = penalty.prox(x, step)
        grid = torch.cat([torch.linspace(-1.5, 1.5, 2001, dtype=torch.float64), u.flatten() / 3])
        grid = torch.cat([grid * x.abs().clamp_min(0.1), u + 1e-4, u - 1e-4, 0 * x], dim=1)
        best = step * omega(u) + (u - x) ** 2 / 2
        others = step * omega(grid) + (grid - x) ** 2 / 2
        assert (best <= others.amin(dim=1, keepdim=True) * (1 + 1e-14) + 1e-300).all()


@PENALTIES
def test_a_small_step_is_the_identity(penalty):
    """prox(x, step) -> x as step -> 0: it moves by at most step * |gradient|; at 0 it is x."""
    x = away_from_zero().detach()
    assert torch.equal(penalty.prox(x, 0.0), x)
    moved = (penalty.prox(x, 1e-6) - x).abs()
    assert (moved <= 1e-6 * penalty.grad(x).abs() + 1e-15).all()


@pytest.mark.parametrize(("penalty", "value", "grad", "step", "prox"), HAND, ids=lambda x: str(x))
@DTYPE
def test_hand_computed(penalty, value, grad, step, prox, dtype):
    """Numbers that every dtype holds exactly."""
    w = torch.tensor([-1.0, 0.0, 3.0], dtype=dtype)
    assert penalty.value(w).item() == value
    assert penalty.grad(w).tolist() == grad
    assert penalty.prox(w, step).tolist() == prox


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
    torch.testing.assert_close(pyreg.L1(a).prox(w, 1 / h), sparse, rtol=1e-14, atol=1e-17)
    torch.testing.assert_close(pyreg.L2(a / 2).prox(w, 1 / h), h * w / (h + a), rtol=1e-14, atol=0)


@PENALTIES
def test_a_step_per_element(penalty):
    """A tensor of steps gives what each step gives alone."""
    w, steps = away_from_zero().detach(), torch.logspace(-3, 5, 12, dtype=torch.float64)
    alone = [penalty.prox(x, t.item()) for x, t in zip(w, steps, strict=True)]
    torch.testing.assert_close(penalty.prox(w, steps), torch.stack(alone), rtol=1e-15, atol=0)


@PENALTIES
@DTYPE
def test_zero_has_gradient_and_prox_zero(penalty, dtype):
    """sign(0) = sign(-0) = 0, whatever the strength."""
    w = torch.tensor([0.0, -0.0], dtype=dtype)
    assert penalty.value(w).item() == 0
    assert (penalty.grad(w) == 0).all()
    assert (penalty.prox(w, 10.0) == 0).all()


@PENALTIES
@DTYPE
def test_nan_and_infinity_propagate(penalty, dtype):
    """A NaN stays one in all three functions; an infinite weight is no longer finite."""
    w = torch.tensor([math.nan, 1.0], dtype=dtype)
    assert penalty.value(w).isnan()
    assert penalty.grad(w).isnan().tolist() == [True, False]
    assert penalty.prox(w, 0.1).isnan().tolist() == [True, False]
    infinite = torch.tensor([math.inf, -math.inf], dtype=dtype)
    assert not penalty.value(infinite).isfinite()
    moved = penalty.prox(infinite, 0.1)
    assert moved.tolist() == [math.inf, -math.inf]


@PENALTIES
@DTYPE
def test_dtypes(penalty, dtype):
    """grad and prox keep the dtype; a value is float32, or float64 for float64; empty gives 0."""
    w = torch.randn(5, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert penalty.grad(w).dtype == penalty.prox(w, 0.1).dtype == dtype
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
