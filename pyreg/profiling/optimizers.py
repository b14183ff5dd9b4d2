"""AdamW's step without a penalty by torch, and with the penalty inside by pyreg.optim.

All of them step the same parameters with the same states. Traffic: w, g and two moments are read,
all but g are written: 7 N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import optim
from ..penalties import Penalty
from ..reference import metric_step
from ..regularizer import Regularizer
from .parameters import Parameters

# (With a large eps a step depends on the size of the gradient, and so the check sees a wrong one.)
LR, EPS, DECAY = 1e-4, 1e-3, 0.01
_OPTIONS = {"lr": LR, "eps": EPS, "weight_decay": DECAY, "fused": True}
SLOPE = 0.05  # gradients are this times the weights when a step is checked


def plain(parameters: Parameters, penalty: Penalty) -> Callable[[], None]:
    """torch's fused AdamW, which knows of no penalty."""
    optimizer = torch.optim.AdamW(parameters.tensors, **_OPTIONS)
    optimizer.state = parameters.states
    return lambda: optimizer.step()


def with_gradient(parameters: Parameters, penalty: Penalty) -> Callable[[], Tensor]:
    """The penalty's gradient in the step; its value comes with it."""
    regularizer, step = _inside(parameters, penalty, "grad")

    def run() -> Tensor:
        step()
        return regularizer.last_value["*"]

    return run


def with_prox(parameters: Parameters, penalty: Penalty) -> Callable[[], None]:
    """The proximal step behind the update, in AdamW's metric."""
    return _inside(parameters, penalty, "prox")[1]


def _inside(
    parameters: Parameters, penalty: Penalty, mode: str
) -> tuple[Regularizer, Callable[[], None]]:
    regularizer = Regularizer(parameters.named, penalty)
    optimizer = optim.AdamW(parameters.named, regularizer=regularizer, mode=mode, **_OPTIONS)
    optimizer.state = parameters.states
    return regularizer, lambda: optimizer.step()


def first_step(w: Tensor, g: Tensor, penalty: Penalty, job: str) -> Tensor:
    """Where AdamW's first step takes w from states of zeros: there m / sqrt(v) is g / |g|."""
    if job == "update + gradient":
        g = g + penalty.grad(w)
    x = w * (1 - LR * DECAY) - LR * g / (g.abs() + EPS)
    if job != "update + prox":
        return x
    return penalty.prox(x, metric_step(g.square(), LR, 1.0, EPS, True, w.dtype))
