"""The metric of an optimizer, read from its live state.

An adaptive optimizer moves from w to x = w - eta m / D, D_i > 0, and where it ends is decided by
the loss in the metric of D. The proximal step that solves the stated problem

    argmin_u Omega(u) + 1 / (2 eta) * sum_i D_i (u_i - x_i)^2

is the plain one with a step of its own for each element, t_i = eta / D_i.

Source: Yun, Lozano, Yang (2021), "Adaptive proximal gradient methods for structured neural
networks" (ProxGen).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

Number = float | Tensor  # a float, or a 0-dim tensor where the optimizer keeps it on a GPU


class Metric(NamedTuple):
    """t_i = numerator / (factor * root(moment_i) + offset); without a moment, t = numerator."""

    moment: Tensor | None
    numerator: Number
    factor: Number = 1.0
    offset: Number = 0.0
    root: bool = True  # the square root; False: the moment itself


def identity(group: dict[str, Any], state: dict[str, Any]) -> Metric:
    """D = 1: t = lr."""
    return Metric(None, number(group["lr"]))


def gain(group: dict[str, Any]) -> float:
    """What momentum makes of a steady gradient: (1 - dampening) / (1 - momentum).

    Raises:
        ValueError: it grows without bound, or is negative.
    """
    momentum, dampening = group.get("momentum", 0), group.get("dampening", 0)
    if not momentum:
        return 1.0
    if not (momentum < 1 and dampening <= 1):
        raise ValueError(
            f"momentum={momentum:g}, dampening={dampening:g}: no steady step, so no metric; take "
            "momentum < 1 and dampening <= 1, or metric='identity'"
        )
    return (1 - dampening) / (1 - momentum)


def sgd(group: dict[str, Any], state: dict[str, Any]) -> Metric:
    """D = 1, eta = lr (1 - dampening) / (1 - momentum): what a steady gradient is multiplied by."""
    return Metric(None, number(group["lr"]) * gain(group))


def adam(group: dict[str, Any], state: dict[str, Any]) -> Metric:
    """D = sqrt(v / (1 - beta2^k)) + eps at step k (v its running maximum with amsgrad)."""
    v = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    correction = 1 - group["betas"][1] ** number(state["step"])
    return Metric(v, number(group["lr"]), correction**-0.5, group["eps"])


def radam(group: dict[str, Any], state: dict[str, Any]) -> Metric:
    """D = (sqrt(v) + eps) / (r sqrt(1 - beta2^k)) with the rectifier r; 1 in the first steps."""
    beta2, k, lr = group["betas"][1], number(state["step"]), number(group["lr"])
    correction = 1 - beta2**k
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * k * beta2**k / correction
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    v, eps = state["exp_avg_sq"], group["eps"]
    if isinstance(length, Tensor):
        rectified = length > 5
        r = torch.where(rectified, ratio.clamp_min(0).sqrt() * correction.sqrt(), 1.0)
        on = rectified.to(r.dtype)
        return Metric(v, lr * r, on, torch.where(rectified, eps, 1.0))
    if length <= 5:
        return Metric(None, lr)
    return Metric(v, lr * (ratio * correction) ** 0.5, 1.0, eps)


def adagrad(group: dict[str, Any], state: dict[str, Any]) -> Metric:
    """D = sqrt(sum of squares) + eps, eta = lr / (1 + (k - 1) lr_decay)."""
    k = number(state["step"])
    eta = number(group["lr"]) / (1 + (k - 1) * group["lr_decay"])
    return Metric(state["sum"], eta, 1.0, group["eps"])


def rmsprop(group: dict[str, Any], state: dict[str, Any]) -> Metric:
    """D = sqrt(v) + eps, eta = lr / (1 - momentum).

    Centered: v less the square of the mean, which takes memory for one tensor.
    """
    v = state["square_avg"]
    if group["centered"]:
        v = torch.addcmul(v, state["grad_avg"], state["grad_avg"], value=-1)
    return Metric(v, number(group["lr"]) * gain(group), 1.0, group["eps"])


def adamax(group: dict[str, Any], state: dict[str, Any]) -> Metric:
    """D = the infinity norm."""
    return Metric(state["exp_inf"], number(group["lr"]), root=False)


METRICS: dict[type[Optimizer], Callable[[dict[str, Any], dict[str, Any]], Metric]] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.NAdam: adam,
    torch.optim.RAdam: radam,
    torch.optim.Adagrad: adagrad,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adamax: adamax,
}
"""(param group, a parameter's state after the step) -> its metric, by the optimizer's class."""

BY_COUNT = frozenset([identity, *METRICS.values()])
"""Those whose numbers are the same for all of a param group that took as many steps."""


def metric_of(optimizer: Optimizer) -> Callable[[dict[str, Any], dict[str, Any]], Metric]:
    """How to read this optimizer's metric.

    Raises:
        ValueError: it is not known.
    """
    for cls in type(optimizer).__mro__:
        if cls in METRICS:
            return METRICS[cls]
    known = ", ".join(cls.__name__ for cls in METRICS)
    raise ValueError(
        f"the metric of {type(optimizer).__name__} is not known (known: {known}); "
        "metric='identity' takes the learning rate as every element's step, and mode='grad' adds "
        "the gradient instead"
    )


def check_moment(metric: Metric, t: Tensor, name: str) -> None:
    """Raise, naming the parameter, unless there is a floating moment for each of its elements."""
    moment = metric.moment
    if moment is not None and not moment.is_floating_point():
        raise TypeError(f"{name}: the optimizer's moment is {moment.dtype}, expected floating")
    if moment is not None and (moment.shape != t.shape or moment.device != t.device):
        raise ValueError(
            f"{name}: {list(t.shape)} on {t.device}, but the optimizer's moment is "
            f"{list(moment.shape)} on {moment.device}"
        )


def waits(x: Tensor) -> bool:
    """Whether the host would have to wait for its number."""
    return x.device.type != "cpu"


def number(x: Number) -> Number:
    """A float, but for a tensor on a GPU, which would have to be waited for, or of several."""
    if not isinstance(x, Tensor):
        return float(x)
    return x if waits(x) or x.ndim > 0 else float(x.detach())
