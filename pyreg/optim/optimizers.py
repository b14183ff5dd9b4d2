"""The optimizers: each one's rows, update and numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..metric import Number, number
from .arguments import Rows
from .fused import Fused, with_gradient
from .precision import NARROW, is_wide


def _doc(of: str) -> str:
    return f"{of} with a penalty in its step.\n{(Fused.__doc__ or '').partition(chr(10))[2]}"


class _Adam(Fused):
    _lists = 6

    def _states(self, group: dict[str, Any]) -> list[str]:
        return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]

    def _update(self, group: dict[str, Any]) -> str:
        return "adam amsgrad" if group["amsgrad"] else "adam"

    def _numbers(self, group: dict[str, Any], step: Number, new: bool) -> tuple[Number, ...]:
        lr, decay, eps = number(group["lr"]), group["weight_decay"], group["eps"]
        beta1, beta2 = map(number, group["betas"])
        decoupled = isinstance(self, AdamW) or group.get("decoupled_weight_decay", False)
        kept, joins = (1 - lr * decay, 0.0) if decoupled else (1.0, decay)
        move, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
        return kept, joins, 1 - beta1, beta2, 1 - beta2, move, root, eps


class Adam(_Adam, torch.optim.Adam):
    __doc__ = _doc("torch.optim.Adam")
    _torch = torch.optim.Adam


class AdamW(_Adam, torch.optim.AdamW):
    __doc__ = _doc("torch.optim.AdamW")
    _torch = torch.optim.AdamW


class SGD(Fused, torch.optim.SGD):
    __doc__ = _doc("torch.optim.SGD")
    _torch = torch.optim.SGD
    _lists = 3

    def _rows(self, group: dict[str, Any]) -> Rows:
        params = with_gradient(group)
        if not group["momentum"]:
            return Rows(params, [], [], ())
        states = [self.state[p] for p in params]
        new = [state.get("momentum_buffer") is None for state in states]
        for p, state, first in zip(params, states, new, strict=True):
            if first:
                state["momentum_buffer"] = torch.zeros_like(p)
        return Rows(params, [[state["momentum_buffer"] for state in states]], [], new)

    def _update(self, group: dict[str, Any]) -> str:
        if not group["momentum"]:
            return "sgd"
        return "sgd nesterov" if group["nesterov"] else "sgd momentum"

    def _numbers(self, group: dict[str, Any], step: Number, new: bool) -> tuple[Number, ...]:
        joined = 1.0 if new else 1 - group["dampening"]
        return 1.0, group["weight_decay"], number(group["lr"]), number(group["momentum"]), joined


class Adagrad(Fused, torch.optim.Adagrad):
    __doc__ = _doc("torch.optim.Adagrad")
    _torch = torch.optim.Adagrad
    _lists = 4

    def __init__(self, params: Iterable[Any], *args: Any, **options: Any) -> None:
        super().__init__(params, *args, **options)
        for group in self.param_groups:
            for p in group["params"]:
                if is_wide(group) and p.dtype in NARROW:  # not what torch rounded
                    first = group["initial_accumulator_value"]
                    self.state[p]["sum"] = torch.full_like(p, first, dtype=torch.float32)

    def _states(self, group: dict[str, Any]) -> list[str]:
        return ["sum"]

    def _update(self, group: dict[str, Any]) -> str:
        return "adagrad"

    def _numbers(self, group: dict[str, Any], step: Number, new: bool) -> tuple[Number, ...]:
        eta = number(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
        return 1.0, group["weight_decay"], eta, group["eps"]


class RMSprop(Fused, torch.optim.RMSprop):
    __doc__ = _doc("torch.optim.RMSprop")
    _torch = torch.optim.RMSprop
    _lists = 6

    def _states(self, group: dict[str, Any]) -> list[str]:
        centered = ["grad_avg"] if group["centered"] else []
        return ["square_avg", *centered, *(["momentum_buffer"] if group["momentum"] > 0 else [])]

    def _update(self, group: dict[str, Any]) -> str:
        centered = " centered" if group["centered"] else ""
        return f"rmsprop{centered}" + (" momentum" if group["momentum"] > 0 else "")

    def _numbers(self, group: dict[str, Any], step: Number, new: bool) -> tuple[Number, ...]:
        lr, alpha = number(group["lr"]), group["alpha"]
        own = lr, alpha, 1 - alpha, group["eps"], group["momentum"]
        return 1.0, group["weight_decay"], *own
