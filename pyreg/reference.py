"""The oracle: the mathematics of every penalty in plain torch. Imports nothing but torch.

Every function works on a tensor of any floating dtype. Arithmetic is in the compute dtype (float32
for 16-bit elements, otherwise the tensor's own); `grad` and `prox` return the tensor's dtype, and
`value` is summed in float64. All of it is differentiable by autograd, in the weights and in
strengths given as tensors, any number of times.

Where a function takes `weight`, each element's term is multiplied by its own.

Conventions: sign(0) = 0; NaN and infinity propagate; `step` is a number or a tensor that broadcasts
(a step per element). S(x, t) = sign(x) max(|x| - t, 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Strength = float | Tensor


class Formula(NamedTuple):
    """A penalty's functions; strengths follow in the order of its class's fields."""

    value: Callable[..., Tensor]  # (w, *strengths, weight=None) -> 0-dim
    grad: Callable[..., Tensor] | None  # (w, *strengths) -> like w; None if there is none
    prox: Callable[..., Tensor]  # (w, step, *strengths) -> like w
    # (w, *strengths, weight=None) -> [learnable strengths] float64: dOmega/dstrength. Those come
    # first.
    strength_grad: Callable[..., Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit dtypes, else `dtype`."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a value over tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _upcast(w: Tensor) -> Tensor:
    return w.to(compute_dtype(w.dtype))


def _strength(s: Strength, w: Tensor) -> Strength:
    """A tensor strength in the compute dtype, on w's device; a float stays one."""
    return s.to(device=w.device, dtype=compute_dtype(w.dtype)) if isinstance(s, Tensor) else s


def _total(terms: Tensor, weight: Tensor | None) -> Tensor:
    """The sum in float64, or in the terms' dtype on a device without float64 (MPS)."""
    terms = terms if weight is None else weight * terms
    return terms.sum() if terms.device.type == "mps" else terms.sum(dtype=torch.float64)


def _weigh(s: Strength, total: Tensor) -> Tensor:
    return (
        s.to(device=total.device, dtype=total.dtype) * total if isinstance(s, Tensor) else s * total
    )


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1, and NaN for NaN (torch.sign gives 0 there)."""
    return torch.where(x.isnan(), x, x.sign())


def soft_threshold(x: Tensor, t: Strength) -> Tensor:
    """S(x, t) = sign(x) max(|x| - t, 0)."""
    return sign(x) * (x.abs() - t).clamp_min(0)


def _where_kept(kept: Tensor, x: Tensor) -> Tensor:
    """x where kept, else 0, and NaN for NaN."""
    return torch.where(kept | x.isnan(), x, 0)


def _tensor(t: Strength, x: Tensor) -> Tensor:
    """t as a tensor of x's dtype, on x's device."""
    if isinstance(t, Tensor):
        return t.to(device=x.device, dtype=x.dtype)
    # (A copy would wait for the device; `full` refuses what its dtype rounds to infinity.)
    return torch.ones((), dtype=x.dtype, device=x.device) * t


def _at_most(x: Tensor, limit: Strength) -> Tensor:
    """min(x, limit), of slope 1 at the limit."""
    return x.clamp_max(_tensor(limit, x))


def l1_value(w: Tensor, lam: Strength, weight: Tensor | None = None) -> Tensor:
    """lam * sum |w|"""
    return _weigh(lam, _total(_upcast(w).abs(), weight)).to(value_dtype(w.dtype))


def l1_grad(w: Tensor, lam: Strength) -> Tensor:
    """lam * sign(w)"""
    return (_strength(lam, w) * sign(_upcast(w))).to(w.dtype)


def l1_prox(w: Tensor, step: Strength, lam: Strength) -> Tensor:
    """S(w, step * lam)"""
    return soft_threshold(_upcast(w), _strength(step, w) * _strength(lam, w)).to(w.dtype)


def l1_strength_grad(w: Tensor, lam: Strength, weight: Tensor | None = None) -> Tensor:
    """[sum |w|]"""
    return _total(_upcast(w).abs(), weight)[None]


def l2_value(w: Tensor, lam: Strength, weight: Tensor | None = None) -> Tensor:
    """lam * sum w^2"""
    return _weigh(lam, _total(_upcast(w).square(), weight)).to(value_dtype(w.dtype))


def l2_grad(w: Tensor, lam: Strength) -> Tensor:
    """2 * lam * w"""
    return (2 * _strength(lam, w) * _upcast(w)).to(w.dtype)


def l2_prox(w: Tensor, step: Strength, lam: Strength) -> Tensor:
    """w / (1 + 2 * step * lam)"""
    return (_upcast(w) / (1 + 2 * _strength(step, w) * _strength(lam, w))).to(w.dtype)


def l2_strength_grad(w: Tensor, lam: Strength, weight: Tensor | None = None) -> Tensor:
    """[sum w^2]"""
    return _total(_upcast(w).square(), weight)[None]


def elastic_net_value(
    w: Tensor, l1: Strength, l2: Strength, weight: Tensor | None = None
) -> Tensor:
    """l1 * sum |w| + l2 * sum w^2"""
    x = _upcast(w)
    value = _weigh(l1, _total(x.abs(), weight)) + _weigh(l2, _total(x.square(), weight))
    return value.to(value_dtype(w.dtype))


def elastic_net_grad(w: Tensor, l1: Strength, l2: Strength) -> Tensor:
    """l1 * sign(w) + 2 * l2 * w"""
    x = _upcast(w)
    return (_strength(l1, w) * sign(x) + 2 * _strength(l2, w) * x).to(w.dtype)


def elastic_net_prox(w: Tensor, step: Strength, l1: Strength, l2: Strength) -> Tensor:
    """S(w, step * l1) / (1 + 2 * step * l2)"""
    t = _strength(step, w)
    shrunk = soft_threshold(_upcast(w), t * _strength(l1, w))
    return (shrunk / (1 + 2 * t * _strength(l2, w))).to(w.dtype)


def elastic_net_strength_grad(
    w: Tensor, l1: Strength, l2: Strength, weight: Tensor | None = None
) -> Tensor:
    """[sum |w|, sum w^2]"""
    x = _upcast(w)
    return torch.stack([_total(x.abs(), weight), _total(x.square(), weight)])


def l0_value(w: Tensor, lam: Strength, weight: Tensor | None = None) -> Tensor:
    """lam * sum [w != 0]"""
    return _weigh(lam, _total(sign(_upcast(w)).abs(), weight)).to(value_dtype(w.dtype))


def l0_prox(w: Tensor, step: Strength, lam: Strength) -> Tensor:
    """w where |w| > sqrt(2 * step * lam), else 0"""
    x = _upcast(w)
    t = _tensor(2 * _strength(step, w) * _strength(lam, w), x)
    return _where_kept(x.abs() > t.sqrt(), x).to(w.dtype)


def l0_strength_grad(w: Tensor, lam: Strength, weight: Tensor | None = None) -> Tensor:
    """[sum [w != 0]]"""
    return _total(sign(_upcast(w)).abs(), weight)[None]


def _root(x: Tensor) -> Tensor:
    """sqrt |x|, of derivatives 0 at 0."""
    return torch.where(x == 0, 0, torch.where(x == 0, 1, x.abs()).sqrt())


def l_half_value(w: Tensor, lam: Strength, weight: Tensor | None = None) -> Tensor:
    """lam * sum sqrt |w|"""
    return _weigh(lam, _total(_root(_upcast(w)), weight)).to(value_dtype(w.dtype))


def l_half_grad(w: Tensor, lam: Strength) -> Tensor:
    """lam * sign(w) / (2 * sqrt |w|), 0 at 0"""
    x = _upcast(w)
    root = torch.where(x == 0, 1, x.abs()).sqrt()
    return (sign(x) * (_strength(lam, w) / (2 * root))).to(w.dtype)


def l_half_prox(w: Tensor, step: Strength, lam: Strength) -> Tensor:
    """With u = step * lam: 0 where |w| <= 1.5 u^(2/3), else
    2/3 w (1 + cos(2/3 pi - 2/3 arccos(u/4 (|w|/3)^-1.5)))
    """
    x = _upcast(w)
    u = _tensor(_strength(step, w) * _strength(lam, w), x)
    kept = x.abs() > 1.5 * u.pow(2 / 3)
    a = torch.where(kept, x.abs(), 1)
    angle = (torch.where(kept, u, 0) / 4 * (a / 3).pow(-1.5)).arccos()
    shrunk = x * (2 / 3 * (1 + (2 / 3 * (torch.pi - angle)).cos()))
    return _where_kept(kept, torch.where(u == 0, x, shrunk)).to(w.dtype)


def l_half_strength_grad(w: Tensor, lam: Strength, weight: Tensor | None = None) -> Tensor:
    """[sum sqrt |w|]"""
    return _total(_root(_upcast(w)), weight)[None]


def _huber_terms(w: Tensor, delta: Strength) -> Tensor:
    """m^2 / (2 delta) + max(|w| - delta, 0) with m = min(|w|, delta)"""
    a, delta = _upcast(w).abs(), _strength(delta, w)
    m = a.clamp_max(delta)
    # (The slope of relu at 0 is 0, and so the slopes of the parts do not add up at delta.)
    return m / 2 * (m / delta) + (a - delta).relu()


def huber_value(w: Tensor, lam: Strength, delta: Strength, weight: Tensor | None = None) -> Tensor:
    """lam * sum h(w), h = w^2 / (2 delta) where |w| <= delta, else |w| - delta / 2"""
    return _weigh(lam, _total(_huber_terms(w, delta), weight)).to(value_dtype(w.dtype))


def huber_grad(w: Tensor, lam: Strength, delta: Strength) -> Tensor:
    """lam * w / delta where |w| <= delta, else lam * sign(w)"""
    return (_strength(lam, w) * (_upcast(w) / _strength(delta, w)).clamp(-1, 1)).to(w.dtype)


def huber_prox(w: Tensor, step: Strength, lam: Strength, delta: Strength) -> Tensor:
    """w / (1 + step lam / delta) where |w| <= delta + step lam, else w - step lam sign(w)"""
    x, delta = _upcast(w), _strength(delta, w)
    t = _strength(step, w) * _strength(lam, w)
    return torch.where(x.abs() <= delta + t, x / (1 + t / delta), x - t * sign(x)).to(w.dtype)


def huber_strength_grad(
    w: Tensor, lam: Strength, delta: Strength, weight: Tensor | None = None
) -> Tensor:
    """[sum h(w)]"""
    return _total(_huber_terms(w, delta), weight)[None]


def log_sum_value(w: Tensor, lam: Strength, eps: Strength, weight: Tensor | None = None) -> Tensor:
    """lam * sum log(1 + |w| / eps)"""
    return _weigh(lam, log_sum_strength_grad(w, lam, eps, weight)[0]).to(value_dtype(w.dtype))


def log_sum_grad(w: Tensor, lam: Strength, eps: Strength) -> Tensor:
    """lam * sign(w) / (|w| + eps)"""
    x = _upcast(w)
    return (sign(x) * (_strength(lam, w) / (x.abs() + _strength(eps, w)))).to(w.dtype)


def log_sum_prox(w: Tensor, step: Strength, lam: Strength, eps: Strength) -> Tensor:
    """The better of 0 and the stationary point u > 0 with (|w| - u) (u + eps) = step * lam:
    u = (|w| - eps + sqrt(d)) / 2 = |w| - 2 step lam / (|w| + eps + sqrt(d)) with
    d = (|w| + eps)^2 - 4 step lam, if d >= 0
    """
    x, eps = _upcast(w), _strength(eps, w)
    a, t = x.abs(), _tensor(_strength(step, w) * _strength(lam, w), x)
    p = 2 * t.sqrt() / (a + eps)  # d = (a + eps)^2 (1 - p^2)
    cut = 2 * t / ((a + eps) * (1 + ((1 - p) * (1 + p)).clamp_min(0).sqrt()))
    u = a - cut
    beaten = t * torch.log1p(u.clamp_min(0) / eps) > u * (u / 2 + cut)
    return _where_kept((p <= 1) & (u > 0) & ~beaten, sign(x) * u).to(w.dtype)


def log_sum_strength_grad(
    w: Tensor, lam: Strength, eps: Strength, weight: Tensor | None = None
) -> Tensor:
    """[sum log(1 + |w| / eps)]"""
    return _total(torch.log1p(_upcast(w).abs() / _strength(eps, w)), weight)[None]


def mcp_value(w: Tensor, lam: Strength, gamma: Strength, weight: Tensor | None = None) -> Tensor:
    """sum of lam |w| - w^2 / (2 gamma) where |w| <= gamma lam, else gamma lam^2 / 2"""
    lam, gamma = _strength(lam, w), _strength(gamma, w)
    m = _at_most(_upcast(w).abs(), gamma * lam)
    return _total(m * (lam - m / (2 * gamma)), weight).to(value_dtype(w.dtype))


def mcp_grad(w: Tensor, lam: Strength, gamma: Strength) -> Tensor:
    """sign(w) * max(lam - |w| / gamma, 0)"""
    x = _upcast(w)
    return (sign(x) * (_strength(lam, w) - x.abs() / _strength(gamma, w)).clamp_min(0)).to(w.dtype)


def mcp_prox(w: Tensor, step: Strength, lam: Strength, gamma: Strength) -> Tensor:
    """step < gamma: S(w, step lam) / (1 - step / gamma) where |w| <= gamma lam, else w;
    step >= gamma: w where |w| > lam sqrt(step gamma), else 0
    """
    x, lam, gamma = _upcast(w), _strength(lam, w), _strength(gamma, w)
    t = _tensor(_strength(step, w), x)
    firm = soft_threshold(x, t * lam) * (gamma / torch.where(t < gamma, gamma - t, 1))
    firm = torch.where(x.abs() > gamma * lam, x, firm)
    hard = _where_kept(x.abs() > lam * (t * gamma).sqrt(), x)
    return torch.where(t < gamma, firm, hard).to(w.dtype)


def mcp_strength_grad(
    w: Tensor, lam: Strength, gamma: Strength, weight: Tensor | None = None
) -> Tensor:
    """[sum min(|w|, gamma lam)]"""
    limit = _strength(gamma, w) * _strength(lam, w)
    return _total(_at_most(_upcast(w).abs(), limit), weight)[None]


def _scad_parts(w: Tensor, lam: Strength, a: Strength) -> tuple[Tensor, Tensor]:
    """m = min(|w|, a lam), and by how much it exceeds lam"""
    m = _at_most(_upcast(w).abs(), a * lam)
    return m, (m - lam).clamp_min(0)


def scad_value(w: Tensor, lam: Strength, a: Strength, weight: Tensor | None = None) -> Tensor:
    """sum of lam |w| where |w| <= lam, (2 a lam |w| - w^2 - lam^2) / (2 (a - 1)) where
    |w| <= a lam, else (a + 1) lam^2 / 2
    """
    lam, a = _strength(lam, w), _strength(a, w)
    m, over = _scad_parts(w, lam, a)
    return _total(lam * m - over * over / (2 * (a - 1)), weight).to(value_dtype(w.dtype))


def scad_grad(w: Tensor, lam: Strength, a: Strength) -> Tensor:
    """sign(w) * (lam where |w| <= lam, (a lam - |w|) / (a - 1) where |w| <= a lam, else 0)"""
    x, lam, a = _upcast(w), _strength(lam, w), _strength(a, w)
    slope = _at_most(((a * lam - x.abs()) / (a - 1)).clamp_min(0), lam)
    return (sign(x) * slope).to(w.dtype)


def scad_prox(w: Tensor, step: Strength, lam: Strength, a: Strength) -> Tensor:
    """step < a - 1: S(w, step lam) where |w| <= lam (1 + step),
    ((a - 1) w - sign(w) a step lam) / (a - 1 - step) where |w| <= a lam, else w;
    step >= a - 1: w where |w| > tie, else S(w, step lam): equally good at
    tie = lam (a + 1 + step) / 2 if step < a + 1, else lam sqrt(step (a + 1))
    """
    x, lam, a = _upcast(w), _strength(lam, w), _strength(a, w)
    t = _tensor(_strength(step, w), x)
    soft = soft_threshold(x, t * lam)
    middle = x - sign(x) * (t / torch.where(t < a - 1, a - 1 - t, 1) * (a * lam - x.abs()))
    middle = torch.where(x.abs() > a * lam, x, middle)
    small = torch.where(x.abs() > lam * (1 + t), middle, soft)
    tie = lam * torch.where(t < a + 1, (a + 1 + t) / 2, (t * (a + 1)).sqrt())
    large = torch.where(x.abs() > tie, x, soft)
    return torch.where(t < a - 1, small, large).to(w.dtype)


def scad_strength_grad(
    w: Tensor, lam: Strength, a: Strength, weight: Tensor | None = None
) -> Tensor:
    """[sum of min(|w|, a lam) + (min(max(|w|, lam), a lam) - lam) / (a - 1)]"""
    lam, a = _strength(lam, w), _strength(a, w)
    m, over = _scad_parts(w, lam, a)
    return _total(m + over / (a - 1), weight)[None]


FORMULAS: dict[str, Formula] = {
    "l1": Formula(l1_value, l1_grad, l1_prox, l1_strength_grad),
    "l2": Formula(l2_value, l2_grad, l2_prox, l2_strength_grad),
    "elastic_net": Formula(
        elastic_net_value, elastic_net_grad, elastic_net_prox, elastic_net_strength_grad
    ),
    "l0": Formula(l0_value, None, l0_prox, l0_strength_grad),
    "l_half": Formula(l_half_value, l_half_grad, l_half_prox, l_half_strength_grad),
    "huber": Formula(huber_value, huber_grad, huber_prox, huber_strength_grad),
    "log_sum": Formula(log_sum_value, log_sum_grad, log_sum_prox, log_sum_strength_grad),
    "mcp": Formula(mcp_value, mcp_grad, mcp_prox, mcp_strength_grad),
    "scad": Formula(scad_value, scad_grad, scad_prox, scad_strength_grad),
}


def _measured(w: Tensor, anchor: Tensor | None) -> Tensor:
    """w - anchor in the compute dtype."""
    x = _upcast(w)
    return x if anchor is None else x - anchor.to(x)


def anchored_value(
    formula: Formula, w: Tensor, anchor: Tensor | None, weight: Tensor | None, *strengths: Strength
) -> Tensor:
    """Of Omega = sum weight_i rho(w_i - anchor_i); without an anchor it is 0, without weights 1."""
    x = _measured(w, anchor)
    return formula.value(x, *strengths, weight=None if weight is None else weight.to(x))


def anchored_grad(
    formula: Formula, w: Tensor, anchor: Tensor | None, weight: Tensor | None, *strengths: Strength
) -> Tensor:
    """weight * rho'(w - anchor)"""
    grad = formula.grad(_measured(w, anchor), *strengths)
    return (grad if weight is None else weight.to(grad) * grad).to(w.dtype)


def anchored_prox(
    formula: Formula,
    w: Tensor,
    step: Strength,
    anchor: Tensor | None,
    weight: Tensor | None,
    *strengths: Strength,
) -> Tensor:
    """anchor + prox(w - anchor, step * weight), and w itself where that does not move it"""
    x = _measured(w, anchor)
    step = _strength(step, x)
    moved = formula.prox(x, step if weight is None else step * weight.to(x), *strengths)
    if anchor is not None:
        moved = torch.where(moved == x, _upcast(w), anchor.to(x) + moved)
    return moved.to(w.dtype)


def anchored_strength_grad(
    formula: Formula, w: Tensor, anchor: Tensor | None, weight: Tensor | None, *strengths: Strength
) -> Tensor:
    """dOmega/dstrength, as of `Formula.strength_grad`"""
    x = _measured(w, anchor)
    return formula.strength_grad(x, *strengths, weight=None if weight is None else weight.to(x))


def metric_step(
    moment: Tensor | None,
    numerator: Strength,
    factor: Strength,
    offset: Strength,
    root: bool,
    dtype: torch.dtype,
) -> Strength:
    """numerator / (factor * root(moment) + offset), in the compute dtype of `dtype`.

    root: the square root, or the moment itself. The numerator alone, without a moment.
    """
    if moment is None:
        return numerator
    d = moment.to(compute_dtype(dtype))
    d = d.sqrt() if root else d
    return _strength(numerator, d) / (_strength(factor, d) * d + _strength(offset, d))


def stats(w: Tensor) -> Tensor:
    """[sum |w|, sum w^2, max |w|, number of zeros, of non-finite]: float64, on w's device."""
    x = w.detach().to(torch.float64)
    if x.numel() == 0:
        return x.new_zeros(5)
    a = x.abs()
    return torch.stack(
        [
            a.sum(),
            x.square().sum(),
            a.max(),
            (x == 0).sum().double(),
            (~x.isfinite()).sum().double(),
        ]
    )
