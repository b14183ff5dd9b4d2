"""What a sweep must give, and how far off it may be: the float64 formulas, rounded as agreed.

Strengths, scale and step are rounded to the compute dtype C (float32; float64 for float64 tensors)
of unit roundoff u = 2^-24 (2^-53). A gradient is the exact one rounded to C, times the scale in C,
added to the old one in C, and then rounded to the tensor's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyreg.penalties import Penalty
from pyreg.reference import FORMULAS, compute_dtype

DEPTH = 16  # additions in C per lane: csrc/cpu/kernels.cpp, kDepth


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """The least positive (subnormal) number."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def rounded(x: float, dtype: torch.dtype) -> float:
    """x as a number of the compute dtype of `dtype`."""
    return torch.tensor(float(x), dtype=torch.float64).to(compute_dtype(dtype)).item()


def _strengths(penalty: Penalty, dtype: torch.dtype) -> list[float]:
    return [rounded(s, dtype) for s in penalty.strengths]


def value(penalty: Penalty, tensors: Sequence[Tensor]) -> float:
    """Omega by the float64 formula."""
    formula = FORMULAS[penalty.name].value
    return math.fsum(formula(t.detach().double(), *penalty.strengths).item() for t in tensors)


def value_tolerance(tensors: Sequence[Tensor]) -> float:
    """Relative. A lane adds DEPTH terms, each product rounded too: DEPTH + 1 roundings of u. The
    rest is in float64: 16 + 4 additions of lanes and one per segment. A float32 result is rounded
    once more."""
    u = max((unit_roundoff(compute_dtype(t.dtype)) for t in tensors), default=2**-53)
    segments = sum(1 + t.numel() // 4096 for t in tensors)
    return (DEPTH + 1) * u + (20 + segments) * 2**-53 + (0 if u == 2**-53 else 2**-24)


def gradient(penalty: Penalty, w: Tensor, scale: float = 1.0, old: Tensor | None = None) -> Tensor:
    """[old +] scale * gradient: the contract's roundings, one by one."""
    c = compute_dtype(w.dtype)
    exact = FORMULAS[penalty.name].grad(w.detach().double(), *_strengths(penalty, w.dtype))
    result = exact.to(c) * rounded(scale, w.dtype)
    if old is not None:
        result = old.to(c) + result
    return result.to(w.dtype)


def prox(penalty: Penalty, w: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """(the float64 prox, absolute tolerance per element).

    fl(step * strength) is step * strength with a step that is off by u relative, and 1 + 2 step l2
    by another u: both move the result monotonically, so proxes at step (1 +- 2u) enclose them (4u,
    as the oracle rounds too). Numerator, quotient and the oracle's own two: 4 u |r|. Then r is
    rounded to the dtype (its own u, or half of the smallest number).
    """
    strengths, t = _strengths(penalty, w.dtype), rounded(step, w.dtype)
    formula, x = FORMULAS[penalty.name].prox, w.detach().double()
    c, own = compute_dtype(w.dtype), w.dtype
    u = unit_roundoff(c)
    exact = formula(x, t, *strengths)
    near, far = (formula(x, t * (1 + d * u), *strengths) for d in (-4, 4))
    spread = (near - far).abs()
    by_result = 4 * u + (unit_roundoff(own) if own != c else 0)
    return exact, spread + 1.01 * by_result * exact.abs() + smallest(own)  # 1 %: second order


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, but any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    bits = a.detach().contiguous().view(kind) == b.detach().contiguous().view(kind)
    return bool((bits | (a.isnan() & b.isnan())).all())


def close(a: float, b: float, relative: float, absolute: float = 0.0) -> bool:
    """a is b, or within the tolerance of it; NaN and infinity equal themselves."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b or abs(a - b) <= relative * abs(b) + absolute
