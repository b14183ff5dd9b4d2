"""The optimizers' updates as Triton functions: scalar maths only, those of csrc/updates.h by name.

An update has
  states   how many tensors of state lie beside a weight
  ratio    whether the weight loses move / q, or else move
  block    (move, q, a, b, c) from a weight, its gradient and its states a, b, c: what the weight
           loses, the optimizer's metric there (or everywhere: a scalar), and the new states
  variant  two flags, of which variant of its block it is
and its row of UPDATES. The numbers n come in the compute dtype: n[0] multiplies the gradient
(1 / its scale; negative where the objective is maximized), n[1] the weight beforehand
(1 - lr * decay, decoupled decay), n[2] * w joins the gradient (coupled decay). The rest are each
update's own. The arithmetic is csrc's, but that a GPU may fuse a product and a sum.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .penalties import divide, square_root


class Update(NamedTuple):
    """An update's block, and what a sweep must know of it."""

    states: int
    ratio: bool
    block: triton.JITFunction
    variant: tuple[bool, bool] = (False, False)


UPDATES: dict[str, Update] = {}


@triton.jit
def joined(w, g, n):
    """The gradient, or its opposite, with the coupled decay."""
    g = n[0] * g
    return tl.where(n[2] == 0, g, g + n[2] * w)  # (w may be infinite)


# m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= n[6] m / (n[7] sqrt(v) + eps), and with
# amsgrad the largest v so far.
@triton.jit
def adam(w, g, a, b, c, n, AMSGRAD: tl.constexpr, UNUSED: tl.constexpr):
    g = joined(w, g, n)
    a = a + n[3] * (g - a)
    b = b * n[4] + n[5] * g * g
    v = b
    if AMSGRAD:
        c = tl.where(c > b, c, b)  # NaN in b stays
        v = c
    return n[6] * a, n[7] * square_root(v) + n[8], a, b, c


UPDATES["adam"] = Update(2, True, adam)
UPDATES["adam amsgrad"] = Update(3, True, adam, (True, False))


# buffer = momentum buffer + (1 - dampening) g; w -= lr times that, or g + momentum buffer.
@triton.jit
def sgd(w, g, a, b, c, n, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr):
    g = joined(w, g, n)
    if MOMENTUM:
        a = n[4] * a + n[5] * g
        g = g + n[4] * a if NESTEROV else a
    return n[3] * g, tl.full([], 1, g.dtype), a, b, c


UPDATES["sgd"] = Update(0, False, sgd)
UPDATES["sgd momentum"] = Update(1, False, sgd, (True, False))
UPDATES["sgd nesterov"] = Update(1, False, sgd, (True, True))


# sum += g^2; w -= lr g / (sqrt(sum) + eps)
@triton.jit
def adagrad(w, g, a, b, c, n, UNUSED: tl.constexpr, UNUSED_TOO: tl.constexpr):
    g = joined(w, g, n)
    a = a + g * g
    return n[3] * g, square_root(a) + n[4], a, b, c


UPDATES["adagrad"] = Update(1, True, adagrad)


# v = alpha v + (1 - alpha) g^2, less the square of the mean where centered; w -= lr g / (sqrt(v) +
# eps), or that in a buffer with momentum. The states are v, the mean, the buffer.
@triton.jit
def rmsprop(w, g, a, b, c, n, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr):
    g = joined(w, g, n)
    a = a * n[4] + n[5] * g * g
    v = a
    if CENTERED:
        b = b + n[5] * (g - b)
        v = a - b * b
    q = square_root(v) + n[6]
    move = g
    if MOMENTUM:
        move = n[7] * (c if CENTERED else b) + divide(g, q)
        if CENTERED:
            c = move
        else:
            b = move
    return n[3] * move, q, a, b, c


UPDATES["rmsprop"] = Update(1, True, rmsprop)
UPDATES["rmsprop momentum"] = Update(2, False, rmsprop, (False, True))
UPDATES["rmsprop centered"] = Update(2, True, rmsprop, (True, False))
UPDATES["rmsprop centered momentum"] = Update(3, False, rmsprop, (True, True))
