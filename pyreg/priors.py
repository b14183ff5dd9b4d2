"""Penalties read as priors (MAP): what a belief about the weights is as a penalty on a mean loss.

The posterior of weights w given n samples is proportional to exp(-n L(w)) p(w), for a loss L that
is the mean of the samples' negative log-likelihoods. Its logarithm over -n is L(w) - log p(w) / n,
up to a constant: the most probable w minimise L + Omega with Omega(w) = -log p(w) / n. (For a loss
that is a sum, n = 1.)
"""

from __future__ import annotations

import math
from numbers import Real

from .penalties import L1, L2
from .strengths import check_strength


def laplace(scale: float, n: int) -> L1:
    """L1(1 / (n * scale)): independent weights of density exp(-|w| / scale) / (2 scale)

    -log p(w) / n = sum |w| / (n scale) + constant.

    Args:
        scale: the weights' mean |w|, > 0.
        n: how many samples the loss is a mean of, > 0.
    """
    return L1(_inverse(_positive("n", n) * _positive("scale", scale)))


def gaussian(std: float, n: int) -> L2:
    """L2(1 / (2 * n * std^2)): independent weights of density exp(-w^2 / (2 std^2)) / (...)

    -log p(w) / n = sum w^2 / (2 n std^2) + constant.

    Args:
        std: the weights' standard deviation, > 0.
        n: how many samples the loss is a mean of, > 0.
    """
    return L2(_inverse(2 * _positive("n", n) * _positive("std", std) * std))


def _positive(name: str, x: Real) -> float:
    if (x := check_strength(name, x)) == 0:
        raise ValueError(f"{name}: expected a number > 0, got {x!r}")
    return x


def _inverse(x: float) -> float:
    """1 / x; infinity, which no strength may be, where x is too small for that."""
    return 1 / x if x else math.inf
