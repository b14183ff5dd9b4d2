"""The penalties as Triton functions: scalar maths only, one block each, shared by every sweep.

A block has
  term   the K-th sum's term of one element, dOmega/dc_K where that strength is learnable
  value  the penalty's value from the finished sums, in float64
  grad   its gradient at one element (sign(0) = 0, NaN stays NaN)
  prox   argmin_u step * Omega(u) + (u - w)^2 / 2 for one element
and its row of PENALTIES. Elements and strengths c0, c1 come in the compute dtype: float32, or
float64 for float64 parameters. To add a penalty: write its block. Nothing else changes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Penalty(NamedTuple):
    """A penalty's functions, and how many running sums its value needs (at most two)."""

    sums: int
    term: triton.JITFunction
    value: triton.JITFunction
    grad: triton.JITFunction
    prox: triton.JITFunction


PENALTIES: dict[str, Penalty] = {}


@triton.jit
def sign(w):
    """-1, +0 or 1; w - w keeps NaN.

    One comparison, and the sign by its bit: a second one costs a third of the loop on sm_90, where
    comparisons of widened bfloat16 pack their results into bit fields.
    """
    if w.dtype == tl.float64:
        one = (w.to(tl.int64, bitcast=True) & -0x8000000000000000) | 0x3FF0000000000000
    else:
        one = (w.to(tl.int32, bitcast=True) & -0x80000000) | 0x3F800000
    return tl.where(tl.abs(w) > 0, one.to(w.dtype, bitcast=True), w - w)


@triton.jit
def soft_threshold(x, t):
    """S(x, t) = sign(x) max(|x| - t, 0)."""
    return tl.where(x > t, x - t, tl.where(x < -t, x + t, x - x))


@triton.jit
def divide(x, y):
    """x / y rounded to nearest: the plain float32 division of a GPU is not."""
    if y.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def square_root(x):
    """sqrt(x) rounded to nearest: the plain float32 root of a GPU is not."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def at_most(a, limit):
    """The smaller one; NaN where a is."""
    return tl.where(a > limit, limit, a)


@triton.jit
def at_least(a, limit):
    """The larger one; NaN where a is."""
    return tl.where(a < limit, limit, a)


@triton.jit
def quotient(x, y):
    """x / y, y >= 1, where x is 0 for many elements, which a GPU divides in a long way: the bits
    are the division's."""
    q = divide(tl.where(x == 0, 1, x), y)
    return tl.where(x == 0, q * x, q)


@triton.jit
def log_1_plus(x):
    """log(1 + x) for x >= 0, within 2^-23 (2^-52) of it relative.

    1 + x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and `lost` is what the sum 1 + x lost in
    rounding; then log(1 + f) by fdlibm's polynomial (Sun Microsystems, 1993). Both quotients are
    small corrections, for which a GPU's own division is good enough. (csrc/penalties.h does without
    them in float32; here that takes more registers, which spill.)
    """
    y = 1 + x
    if x.dtype == tl.float64:
        bits = y.to(tl.int64, bitcast=True) + (0x3FF0000000000000 - 0x3FE6A09E00000000)
        k = ((bits >> 52) - 1023).to(tl.int32).to(tl.float64)
        bits = (bits & 0xFFFFFFFFFFFFF) + 0x3FE6A09E00000000
    else:
        bits = y.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
        k = ((bits >> 23) - 127).to(tl.float32)
        bits = (bits & 0x7FFFFF) + 0x3F3504F3
    f = bits.to(x.dtype, bitcast=True) - 1
    lost = tl.where(x < 1, x - (y - 1), 1 - (y - x))
    s = f / (2 + f)
    z = s * s
    v = z * z
    if x.dtype == tl.float64:
        even = 2.857142874366239149e-01 + v * (
            1.818357216161805012e-01 + v * 1.479819860511658591e-01
        )
        odd = 2.222219843214978396e-01 + v * 1.531383769920937332e-01
        p = z * (6.666666666666735130e-01 + v * even) + v * (3.999999999940941908e-01 + v * odd)
        high: tl.constexpr = 6.93147180369123816490e-01
        low: tl.constexpr = 1.90821492927058770002e-10
    else:
        p = z * (0.66666662693 + v * 0.28498786688) + v * (0.40000972152 + v * 0.24279078841)
        high: tl.constexpr = 6.9313812256e-01
        low: tl.constexpr = 9.0580006145e-06
    half = 0.5 * f * f
    log = s * (half + p) + (k * low + lost / y) - half + f
    return tl.where(x < float("inf"), log + k * high, x)


# lam * sum |w|
@triton.jit
def l1_term(w, c0, c1, K: tl.constexpr):
    return tl.abs(w)


@triton.jit
def l1_value(s0, s1, c0, c1):
    return c0 * s0


@triton.jit
def l1_grad(w, c0, c1):
    return c0 * sign(w)


@triton.jit
def l1_prox(w, step, c0, c1):
    return soft_threshold(w, step * c0)


PENALTIES["l1"] = Penalty(1, l1_term, l1_value, l1_grad, l1_prox)


# lam * sum w^2
@triton.jit
def l2_term(w, c0, c1, K: tl.constexpr):
    return w * w


@triton.jit
def l2_value(s0, s1, c0, c1):
    return c0 * s0


@triton.jit
def l2_grad(w, c0, c1):
    return (2 * c0) * w


@triton.jit
def l2_prox(w, step, c0, c1):
    return quotient(w, 1 + 2 * step * c0)


PENALTIES["l2"] = Penalty(1, l2_term, l2_value, l2_grad, l2_prox)


# l1 * sum |w| + l2 * sum w^2
@triton.jit
def elastic_net_term(w, c0, c1, K: tl.constexpr):
    if K == 0:
        return tl.abs(w)
    return w * w


@triton.jit
def elastic_net_value(s0, s1, c0, c1):
    return c0 * s0 + c1 * s1


@triton.jit
def elastic_net_grad(w, c0, c1):
    return tl.fma(tl.zeros_like(w) + 2 * c1, w, c0 * sign(w))


@triton.jit
def elastic_net_prox(w, step, c0, c1):
    return quotient(soft_threshold(w, step * c0), 1 + 2 * step * c1)


PENALTIES["elastic_net"] = Penalty(
    2, elastic_net_term, elastic_net_value, elastic_net_grad, elastic_net_prox
)


# lam * sum [w != 0]
@triton.jit
def l0_term(w, c0, c1, K: tl.constexpr):
    return tl.abs(sign(w))


@triton.jit
def l0_value(s0, s1, c0, c1):
    return c0 * s0


@triton.jit
def l0_grad(w, c0, c1):
    """It has none, and callers ask for none. NaN, so that nobody mistakes it for one."""
    return tl.full(w.shape, float("nan"), w.dtype)


@triton.jit
def l0_prox(w, step, c0, c1):
    return tl.where(tl.abs(w) > square_root(2 * step * c0), w, w - w)


PENALTIES["l0"] = Penalty(1, l0_term, l0_value, l0_grad, l0_prox)


# lam * sum sqrt |w|
@triton.jit
def l_half_term(w, c0, c1, K: tl.constexpr):
    return square_root(tl.abs(w))


@triton.jit
def l_half_value(s0, s1, c0, c1):
    return c0 * s0


@triton.jit
def l_half_grad(w, c0, c1):
    a = tl.where(w == 0, 1, tl.abs(w))
    return sign(w) * divide(tl.zeros_like(w) + 0.5 * c0, square_root(a))


@triton.jit
def l_half_prox(w, step, c0, c1):
    """u = r^2 |w|, r the largest root of r^3 - r + b = 0, or 0: see csrc/penalties.h."""
    a = tl.where(w == 0, 1, tl.abs(w))
    b = 0.5 * (step * c0) / a / square_root(a)
    r = tl.zeros_like(w) + 1
    for _ in tl.static_range(5 if w.dtype == tl.float64 else 4):
        r -= (r * (r * r - 1) + b) / (3 * (r * r) - 1)
    # (A difference, as a comparison rounds its constant to float32.)
    return tl.where(b - 0.27216552697590868 <= 0, w * (r * r), w - w)


PENALTIES["l_half"] = Penalty(1, l_half_term, l_half_value, l_half_grad, l_half_prox)


# lam * sum h(w), h = w^2 / (2 delta) up to |w| = delta, then |w| - delta / 2
@triton.jit
def huber_term(w, c0, c1, K: tl.constexpr):
    a = tl.abs(w)
    m = at_most(a, c1)
    return 0.5 * m * (m * divide(1, c1)) + (a - m)


@triton.jit
def huber_value(s0, s1, c0, c1):
    return c0 * s0


@triton.jit
def huber_grad(w, c0, c1):
    return c0 * at_least(at_most(w * divide(1, c1), 1), -1)


@triton.jit
def huber_prox(w, step, c0, c1):
    t = step * c0
    far = tl.where(w > 0, w - t, w + t)
    return tl.where(tl.abs(w) <= c1 + t, w * divide(1, 1 + divide(t, c1)), far)


PENALTIES["huber"] = Penalty(1, huber_term, huber_value, huber_grad, huber_prox)


# lam * sum log(1 + |w| / eps)
@triton.jit
def log_sum_term(w, c0, c1, K: tl.constexpr):
    return log_1_plus(tl.abs(w) * divide(1, c1))


@triton.jit
def log_sum_value(s0, s1, c0, c1):
    return c0 * s0


@triton.jit
def log_sum_grad(w, c0, c1):
    return sign(w) * divide(tl.zeros_like(w) + c0, tl.abs(w) + c1)


@triton.jit
def log_sum_prox(w, step, c0, c1):
    """The stationary point u = |w| - cut, or 0: see csrc/penalties.h.

    Where there is none, the objective increases from 0 on, and beats any u > 0.
    """
    a = tl.abs(w)
    t = step * c0
    total = a + c1
    p = 2 * square_root(t) / total
    cut = 2 * t / (total + total * tl.sqrt(at_least((1 - p) * (1 + p), 0)))
    u = a - cut
    logs = log_1_plus(at_least(u, 0) * divide(1, c1))
    u = tl.where((u > 0) & ~(t * logs > u * (0.5 * u + cut)), u, w - w)
    return tl.where(w < 0, -u, u)


PENALTIES["log_sum"] = Penalty(1, log_sum_term, log_sum_value, log_sum_grad, log_sum_prox)


# lam sum m - sum m^2 / (2 gamma), m = min(|w|, gamma lam)
@triton.jit
def mcp_term(w, c0, c1, K: tl.constexpr):
    m = at_most(tl.abs(w), c1 * c0)
    if K == 0:
        return m
    return m * m


@triton.jit
def mcp_value(s0, s1, c0, c1):
    return c0 * s0 - s1 / (2 * c1)


@triton.jit
def mcp_grad(w, c0, c1):
    return sign(w) * at_least(c0 - tl.abs(w) * divide(1, c1), 0)


@triton.jit
def mcp_prox(w, step, c0, c1):
    a = tl.abs(w)
    hard = tl.where(a > c0 * square_root(step * c1), w, w - w)
    left = tl.where(step < c1, c1 - step, 1)
    firm = soft_threshold(w, step * c0) * divide(c1, left)
    return tl.where(step < c1, tl.where(a <= c1 * c0, firm, w), hard)


PENALTIES["mcp"] = Penalty(2, mcp_term, mcp_value, mcp_grad, mcp_prox)


# lam s0 - s1 / (2 (a - 1)): see csrc/penalties.h
@triton.jit
def scad_term(w, c0, c1, K: tl.constexpr):
    m = at_most(tl.abs(w), c1 * c0)
    over = at_least(m - c0, 0)
    if K == 0:
        return m + over * divide(1, c1 - 1)
    return over * (m + c0)


@triton.jit
def scad_value(s0, s1, c0, c1):
    return c0 * s0 - s1 / (2 * (c1 - 1))


@triton.jit
def scad_grad(w, c0, c1):
    slope = (c1 * c0 - tl.abs(w)) * divide(1, c1 - 1)
    return sign(w) * at_most(at_least(slope, 0), c0)


@triton.jit
def scad_prox(w, step, c0, c1):
    x = tl.abs(w)
    soft = soft_threshold(w, step * c0)
    convex = step < c1 - 1
    by = divide(step, tl.where(convex, c1 - 1 - step, 1)) * (c1 * c0 - x)
    middle = tl.where(w > 0, w - by, w + by)
    small = tl.where(x <= c0 * (1 + step), soft, tl.where(x <= c1 * c0, middle, w))
    total = c1 + 1
    tie = c0 * tl.where(step < total, 0.5 * (total + step), square_root(step * total))
    return tl.where(convex, small, tl.where(x > tie, w, soft))


PENALTIES["scad"] = Penalty(2, scad_term, scad_value, scad_grad, scad_prox)
