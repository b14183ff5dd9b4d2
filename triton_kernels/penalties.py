"""The penalties as Triton functions: scalar maths only, one block each, shared by every sweep.

A block has
  term   the K-th sum's term of one element
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
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


# lam * sum |w|
@triton.jit
def l1_term(w, K: tl.constexpr):
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
def l2_term(w, K: tl.constexpr):
    return w * w


@triton.jit
def l2_value(s0, s1, c0, c1):
    return c0 * s0


@triton.jit
def l2_grad(w, c0, c1):
    return (2 * c0) * w


@triton.jit
def l2_prox(w, step, c0, c1):
    return divide(w, 1 + 2 * step * c0)


PENALTIES["l2"] = Penalty(1, l2_term, l2_value, l2_grad, l2_prox)


# l1 * sum |w| + l2 * sum w^2
@triton.jit
def elastic_net_term(w, K: tl.constexpr):
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
    return divide(soft_threshold(w, step * c0), 1 + 2 * step * c1)


PENALTIES["elastic_net"] = Penalty(
    2, elastic_net_term, elastic_net_value, elastic_net_grad, elastic_net_prox
)
