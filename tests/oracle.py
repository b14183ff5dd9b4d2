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

from pyreg.metric import Metric
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


# Roundings of a term and of the strengths in it, and how many times its value a penalty's sums may
# be: MCP and SCAD are differences of lam s0 <= 2 Omega and of something <= Omega.
TERMS = {"l_half": (2, 1), "huber": (6, 1), "log_sum": (6, 1), "mcp": (6, 3), "scad": (8, 3)}


def value_tolerance(tensors: Sequence[Tensor], penalty: Penalty | None = None) -> float:
    """Relative. A lane adds DEPTH terms, each product rounded too: DEPTH + 1 roundings of u. The
    rest is in float64: 16 + 4 additions of lanes and one per segment. A float32 result is rounded
    once more."""
    terms, sums = TERMS.get(penalty.name, (1, 1)) if penalty else (1, 1)
    u = max((unit_roundoff(compute_dtype(t.dtype)) for t in tensors), default=2**-53)
    segments = sum(1 + t.numel() // 4096 for t in tensors)
    each = (DEPTH + terms) * u + (20 + segments) * 2**-53
    return sums * each + (0 if u == 2**-53 else 2**-24)


def gradient(penalty: Penalty, w: Tensor, scale: float = 1.0, old: Tensor | None = None) -> Tensor:
    """[old +] scale * gradient: the contract's roundings, one by one."""
    c = compute_dtype(w.dtype)
    exact = FORMULAS[penalty.name].grad(w.detach().double(), *_strengths(penalty, w.dtype))
    result = exact.to(c) * rounded(scale, w.dtype)
    if old is not None:
        result = old.to(c) + result
    return result.to(w.dtype)


def agrees(
    got: Tensor,
    expected: Tensor,
    penalty: Penalty,
    scale: float = 1.0,
    old: Tensor | None = None,
    twice: bool = False,
    fused: bool = False,
) -> bool:
    """`got` is what `gradient` expects: the bits for L1, L2 and elastic net, unless

    twice  l1 + 2 l2 w is rounded twice, by the oracle (float64) or for want of a fused product: the
           product (<= |g| + l1) and the sum may each be off by u, before and after a scale <= 1,
           and an addition;
    fused  scale * gradient and the addition of `old` may be one rounding: then the product, which
           is at most |result| + |old|, is not rounded (u of it), and the two sums are (2 u).

    For the others a gradient of size <= |g| + max(strengths) has up to 6 roundings of u before the
    scale, the product and the sum. 16 bits may round both numbers from either side of a border.
    """
    size, top = expected.double().abs(), max(penalty.strengths)
    added, u = torch.zeros(()), unit_roundoff(compute_dtype(got.dtype))
    if old is not None:
        added = old.double().abs()
    if penalty.name in ("l1", "l2", "elastic_net"):
        twice = twice and penalty.name == "elastic_net"
        if not twice and not fused:
            return same(got, expected)
        sums = 4 if old is None else 6
        bound = twice * u * (sums * size + 4 * added + 2 * top)
        bound += fused * u * (3 * size + added)
    else:
        bound = 8 * u * (size + 2 * added + abs(scale) * top) + smallest(got.dtype)
    if got.dtype.itemsize == 2:
        bound = bound + 2 * unit_roundoff(got.dtype) * size + smallest(got.dtype)
    near = (got.double() - expected.double()).abs() <= bound
    return bool((near | (got == expected) | (got.isnan() & expected.isnan())).all())


def _step(step: float | Tensor, w: Tensor) -> float | Tensor:
    return step if isinstance(step, Tensor) else rounded(step, w.dtype)


def prox(penalty: Penalty, w: Tensor, step: float | Tensor, more: int = 0) -> tuple[Tensor, Tensor]:
    """(the float64 prox, absolute tolerance per element), at a step that is off by `more` u.

    fl(step * strength) is step * strength with a step that is off by u relative, and 1 + 2 step l2
    by another u: both move the result monotonically, so proxes at step (1 +- 2u) enclose them (4u,
    as the oracle rounds too), and so for each strength (2u), where thresholds are products of them.
    A product step * strength may underflow. Numerator, quotient and the oracle's own two: 4 u |r|;
    the root of LHalf: 4 more, and its b has 5 roundings where it jumps. Then r is rounded to the
    dtype (its own u, or half of the smallest number). Where the prox jumps, any point of the jump
    is within the tolerance: see `is_minimal`.
    """
    strengths, t = _strengths(penalty, w.dtype), _step(step, w)
    formula, x = FORMULAS[penalty.name].prox, w.detach().double()
    c, own = compute_dtype(w.dtype), w.dtype
    u = unit_roundoff(c)
    exact = formula(x, t, *strengths)
    error = ((8 if penalty.name == "l_half" else 4) + more) * u * t + (
        smallest(c) / strengths[0] if strengths[0] > 0 else 0
    )
    low = (t - error).clamp_min(0) if isinstance(t, Tensor) else max(t - error, 0)
    near, far = formula(x, low, *strengths), formula(x, t + error, *strengths)
    spread = (near - far).abs()
    if penalty.name not in ("l1", "l2", "elastic_net"):
        for k in range(len(strengths)):
            for d in (-2, 2):
                moved = [s * (1 + d * u) if i == k else s for i, s in enumerate(strengths)]
                spread = spread + (formula(x, t, *moved) - exact).abs()
    by_result = (8 if penalty.name == "l_half" else 4) * u
    by_result += unit_roundoff(own) if own != c else 0
    return exact, spread + 1.01 * by_result * exact.abs() + smallest(own)  # 1 %: second order


def is_minimal(
    penalty: Penalty, w: Tensor, step: float | Tensor, got: Tensor, more: int = 0
) -> bool:
    """step * Omega(u) + (u - w)^2 / 2 is at `got` what it is at the prox, so that of two minimisers
    either will do.

    For penalties that are concave on each side of 0: an error e of `got` costs <= e^2 / 2. Step and
    strengths that are off by 8 u (and `more`), in all, move the objective (<= w^2 / 2) by 8 u of it
    at each end.
    """
    if penalty.name not in ("l0", "l_half", "log_sum", "mcp", "scad") or w.numel() == 0:
        return True
    strengths, t = _strengths(penalty, w.dtype), _step(step, w)
    own, x, found = type(penalty)(*strengths), w.detach().double(), got.detach().double()
    omega = torch.func.vmap(own.value)
    exact = own.prox(x, t)
    cost, least = (t * omega(p) + (p - x) ** 2 / 2 for p in (found, exact))
    u, rounding = unit_roundoff(compute_dtype(w.dtype)), unit_roundoff(w.dtype)
    bound = ((16 + more) * u + rounding**2) * x**2 + smallest(w.dtype) ** 2
    bound = bound + t * strengths[0] * 2**-149
    return bool((((cost - least) <= bound) | ~x.isfinite()).all())


# A step in a metric: the root, the product, the sum and the quotient, 1 u each. A ratio form
# rounds a product by q and a sum with q besides (2 u), which elastic net, MCP and SCAD may have to
# difference: an error of u (q |w|) is one of u step and u |result| where they differ by step.
IN_METRIC = 8


def prox_in_metric(
    penalty: Penalty, w: Tensor, metric: Metric
) -> tuple[Tensor, Tensor, float | Tensor]:
    """(the float64 prox, absolute tolerance per element, the float64 steps).

    The numbers of the metric are rounded to the compute dtype, as strengths are. A step is capped
    by the least q, the smallest normal number. Elastic net's q |w| may underflow, and is divided by
    q + 2 numerator l2.
    """
    numbers = (rounded(x, w.dtype) for x in (metric.numerator, metric.factor, metric.offset))
    numerator, factor, offset = numbers
    if metric.moment is None:
        steps = numerator
    else:
        d = metric.moment.double()
        d = d.sqrt() if metric.root else d
        least = torch.finfo(compute_dtype(w.dtype)).tiny
        steps = numerator / (factor * d + offset).clamp_min(least)
    exact, tolerance = prox(penalty, w, steps, IN_METRIC)
    if penalty.name == "elastic_net":
        tolerance = tolerance + smallest(compute_dtype(w.dtype)) / (
            numerator * (1 / steps + 2 * penalty.strengths[1])
        )
    return exact, tolerance, steps


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
