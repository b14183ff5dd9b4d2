"""The oracle: the mathematics of every penalty in plain torch. Imports nothing but torch.

Every function works on a tensor of any floating dtype. Arithmetic is in the compute dtype (float32
for 16-bit elements, otherwise the tensor's own); `grad` and `prox` return the tensor's dtype, and
`value` is summed in float64. All of it is differentiable by autograd, in the weights and in
strengths given as tensors, any number of times.

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

    value: Callable[..., Tensor]  # (w, *strengths) -> 0-dim
    grad: Callable[..., Tensor]  # (w, *strengths) -> like w
    prox: Callable[..., Tensor]  # (w, step, *strengths) -> like w
    strength_grad: Callable[..., Tensor]  # (w, *strengths) -> [strengths] float64: dOmega/dstrength


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


def _total(terms: Tensor) -> Tensor:
    """The sum in float64, or in the terms' dtype on a device without float64 (MPS)."""
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


def l1_value(w: Tensor, lam: Strength) -> Tensor:
    """lam * sum |w|"""
    return _weigh(lam, _total(_upcast(w).abs())).to(value_dtype(w.dtype))


def l1_grad(w: Tensor, lam: Strength) -> Tensor:
    """lam * sign(w)"""
    return (_strength(lam, w) * sign(_upcast(w))).to(w.dtype)


def l1_prox(w: Tensor, step: Strength, lam: Strength) -> Tensor:
    """S(w, step * lam)"""
    return soft_threshold(_upcast(w), _strength(step, w) * _strength(lam, w)).to(w.dtype)


def l1_strength_grad(w: Tensor, lam: Strength) -> Tensor:
    """[sum |w|]"""
    return _total(_upcast(w).abs())[None]


def l2_value(w: Tensor, lam: Strength) -> Tensor:
    """lam * sum w^2"""
    return _weigh(lam, _total(_upcast(w).square())).to(value_dtype(w.dtype))


def l2_grad(w: Tensor, lam: Strength) -> Tensor:
    """2 * lam * w"""
    return (2 * _strength(lam, w) * _upcast(w)).to(w.dtype)


def l2_prox(w: Tensor, step: Strength, lam: Strength) -> Tensor:
    """w / (1 + 2 * step * lam)"""
    return (_upcast(w) / (1 + 2 * _strength(step, w) * _strength(lam, w))).to(w.dtype)


def l2_strength_grad(w: Tensor, lam: Strength) -> Tensor:
    """[sum w^2]"""
    return _total(_upcast(w).square())[None]


def elastic_net_value(w: Tensor, l1: Strength, l2: Strength) -> Tensor:
    """l1 * sum |w| + l2 * sum w^2"""
    x = _upcast(w)
    value = _weigh(l1, _total(x.abs())) + _weigh(l2, _total(x.square()))
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


def elastic_net_strength_grad(w: Tensor, l1: Strength, l2: Strength) -> Tensor:
    """[sum |w|, sum w^2]"""
    x = _upcast(w)
    return torch.stack([_total(x.abs()), _total(x.square())])


FORMULAS: dict[str, Formula] = {
    "l1": Formula(l1_value, l1_grad, l1_prox, l1_strength_grad),
    "l2": Formula(l2_value, l2_grad, l2_prox, l2_strength_grad),
    "elastic_net": Formula(
        elastic_net_value, elastic_net_grad, elastic_net_prox, elastic_net_strength_grad
    ),
}


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
