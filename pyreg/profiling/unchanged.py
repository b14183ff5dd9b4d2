"""A model that is trained while it is measured, and is afterwards as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class _Kept:
    """An optimizer's states and param groups before its first step here."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._states = {p: _copy(state) for p, state in optimizer.state.items()}
        self._groups = [_copy(group) for group in optimizer.param_groups]

    def restore(self) -> None:
        state = self._optimizer.state
        for p in list(state):
            if p in self._states:
                _put_back(state[p], self._states[p])
            else:
                del state[p]
        for group, kept in zip(self._optimizer.param_groups, self._groups, strict=True):
            _put_back(group, kept)


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in values.items()}


@torch.no_grad()
def _put_back(values: dict[str, Any], kept: dict[str, Any]) -> None:
    """In place where there is a tensor to write into: others may hold it."""
    for k in list(values):
        if k not in kept:
            del values[k]
        elif isinstance(kept[k], Tensor) and isinstance(values[k], Tensor):
            values[k].copy_(kept[k])
        else:
            values[k] = kept[k]


@contextmanager
def unchanged(model: nn.Module | None, tensors: list[Tensor]) -> Iterator[None]:
    """Whatever happens within the block, afterwards these are as before: parameters, buffers,
    gradients, random numbers, and every torch optimizer that takes a step meanwhile.

    Keeps copies: N for the parameters, N for their gradients, and the optimizers' states. What a
    program holds elsewhere (a data loader's place, a learning-rate schedule) is not seen.
    """
    held = list(tensors)
    if model is not None:
        held = list({id(t): t for t in (*tensors, *model.parameters(), *model.buffers())}.values())
    values = [t.detach().clone() for t in held]
    gradients = [(t.grad, None if t.grad is None else t.grad.detach().clone()) for t in held]
    optimizers: dict[int, _Kept] = {}

    def keep(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if id(optimizer) not in optimizers:
            optimizers[id(optimizer)] = _Kept(optimizer)

    hook = register_optimizer_step_pre_hook(keep)
    devices = sorted({t.device.index for t in held if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        hook.remove()
        with torch.no_grad():
            for t, value, (grad, kept) in zip(held, values, gradients, strict=True):
                t.copy_(value)
                t.grad = grad
                if grad is not None:
                    grad.copy_(kept)
        for kept in optimizers.values():
            kept.restore()
