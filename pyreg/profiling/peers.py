"""What pyreg is compared with: the loop, torch's foreach operations and torch.compile.

Each as a practitioner would write it today. Traffic is derived beside it, in N, for the L1 part,
the L2 part and the sum of both gradients (3 N) where autograd makes two.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..penalties import L1, L2, ElasticNet, Penalty
from .parameters import Parameters

MOST_COMPILED = 500  # tensors


class NotWritten(TypeError):
    """Nobody has such a way for this penalty."""


def strengths_of(penalty: Penalty) -> tuple[float | None, float | None]:
    """(strength of sum |w|, strength of sum w^2), for the penalties that are made of these; None
    for the one that it is not made of."""
    match penalty:
        case L1(lam):
            return lam, None
        case L2(lam):
            return None, lam
        case ElasticNet(l1, l2):
            return l1, l2
    raise NotWritten(f"written for L1, L2 and elastic net, not for {type(penalty).__name__}")


def loop(parameters: Parameters, penalty: Penalty) -> Callable[[], Tensor]:
    """The loop that every practitioner writes.

    L1: abs 2, sum 1; backward sgn 2, times the incoming gradient 2; into .grad 3: 10 N.
    L2: pow 2, sum 1; backward pow 2, times 2 2, times the incoming gradient 2; into .grad 3: 12 N.
    Both: 7 + 9, the sum of the two gradients 3, into .grad 3: 22 N. Of other penalties the formula
    in torch.
    """
    params = parameters.tensors
    if not isinstance(penalty, L1 | L2 | ElasticNet):
        return lambda: _backward(sum(penalty.value(p) for p in params))
    l1, l2 = strengths_of(penalty)

    def run() -> Tensor:
        reg = 0
        if l1 is not None:
            total = 0
            for p in params:
                total = total + torch.sum(torch.abs(p))
            reg = reg + l1 * total
        if l2 is not None:
            total = 0
            for p in params:
                total = total + p.pow(2).sum()
            reg = reg + l2 * total
        return _backward(reg)

    return run


def _backward(value: Tensor) -> Tensor:
    value.backward()
    return value.detach()


def foreach(parameters: Parameters, penalty: Penalty) -> Callable[[], Tensor]:
    """Norms of all tensors in one call, and autograd.

    L1: norm 1; backward sgn 2, times 2; into .grad 3: 8 N. L2: norm 1; backward divide 2, mask 2,
    times 2; into .grad 3: 10 N. Both: 5 + 7, the sum of the two gradients 3, into .grad 3: 18 N.
    """
    l1, l2 = strengths_of(penalty)

    def run() -> Tensor:
        return _backward(_norms(parameters.tensors, l1, l2))

    return run


def foreach_into_grad(parameters: Parameters, penalty: Penalty) -> Callable[[], Tensor]:
    """Norms, and the gradient's formula added to .grad with no graph: the best of torch's own.

    L1: norm 1, sign 2, add 3: 6 N. L2: norm 1, add 3: 4 N.
    """
    l1, l2 = strengths_of(penalty)

    @torch.no_grad()
    def run() -> Tensor:
        params = parameters.tensors
        grads = [p.grad for p in params]
        if l1 is not None:
            torch._foreach_add_(grads, torch._foreach_sign(params), alpha=l1)
        if l2 is not None:
            torch._foreach_add_(grads, params, alpha=2 * l2)
        return _norms(params, l1, l2)

    return run


def _norms(params: Sequence[Tensor], l1: float | None, l2: float | None) -> Tensor:
    value = 0
    if l1 is not None:
        value = value + l1 * torch.stack(torch._foreach_norm(params, 1)).sum()
    if l2 is not None:
        value = value + l2 * torch.stack(torch._foreach_norm(params, 2)).square().sum()
    return value


def compiled(parameters: Parameters, penalty: Penalty) -> Callable[[], Tensor]:
    """torch.compile of the loop: forward 1, backward 2, into .grad 3: 6 N."""
    l1, l2 = (torch.tensor(s or 0.0, device=parameters.device) for s in strengths_of(penalty))

    def run() -> Tensor:
        return _backward(_compile(_both)(parameters.tensors, l1, l2))

    return run


def compiled_into_grad(parameters: Parameters, penalty: Penalty) -> Callable[[], Tensor]:
    """torch.compile of value and gradient formula, added to .grad with no graph: 3 N if fused."""
    l1, l2 = (torch.tensor(s or 0.0, device=parameters.device) for s in strengths_of(penalty))

    @torch.no_grad()
    def run() -> Tensor:
        params = parameters.tensors
        return _compile(_both_into_grad)(params, [p.grad for p in params], l1, l2)

    return run


def compile_refuses(parameters: Parameters) -> str | None:
    """Why torch.compile is not tried here, if so."""
    count = len(parameters.tensors)
    if count > MOST_COMPILED:
        return f"a graph of {count:,} tensors is not tried: it compiles for many minutes"
    if importlib.util.find_spec("torch._inductor") is None:
        return "this torch has no inductor"
    return None


@cache
def _compile(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


# Strengths are operands, so one compilation serves L1 (l2 = 0) and L1 + L2: to compile takes the
# best part of a minute, and the fused loops move the same bytes for both.
def _both(params: list[Tensor], l1: Tensor, l2: Tensor) -> Tensor:
    sum_abs, sum_squares = 0, 0
    for p in params:
        sum_abs = sum_abs + torch.sum(torch.abs(p))
        sum_squares = sum_squares + p.pow(2).sum()
    return l1 * sum_abs + l2 * sum_squares


def _both_into_grad(params: list[Tensor], grads: list[Tensor], l1: Tensor, l2: Tensor) -> Tensor:
    sum_abs, sum_squares = 0, 0
    for p, g in zip(params, grads, strict=True):
        sum_abs = sum_abs + torch.sum(torch.abs(p))
        sum_squares = sum_squares + p.pow(2).sum()
        g.add_(l1 * p.sign() + 2 * l2 * p)
    return l1 * sum_abs + l2 * sum_squares
