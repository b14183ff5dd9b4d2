"""Drop-in replacements for the loop over parameters: a differentiable penalty in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, ops
from .dispatch import requested
from .pack import Params, collect, packs_for
from .penalties import L1, L2, ElasticNet, Penalty
from .reference import Strength


def penalty(params: Params, penalty: Penalty) -> Tensor:
    """sum over params of Omega(w), differentiable: `loss + pyreg.penalty(model, pyreg.L1(1e-5))`.

    Forward reads N (the parameters' bytes). Backward reads N and writes N, a flat buffer whose
    parts autograd keeps where `.grad` is None. Where every `.grad` exists, it reads 2 N and writes
    N, adding to them in place, if nobody could see the difference (CPU tensors, no hooks, no other
    Python thread at work).

    Args:
        params: a module, an iterable of tensors or of (name, tensor) pairs, a mapping, or a tensor.
            float32, float64, bfloat16 and float16, mixed as you like; any shape and strides.
            A tensor that is listed twice counts twice, as in the loop (a module lists it once).
        penalty: what applies to each of them.

    Returns:
        0-dim, on the first tensor's device, float32 (float64 when any tensor is float64).
        Exactly 0 for an empty list.

    Raises:
        TypeError, ValueError: a tensor that cannot be penalised, by name; a strength that is not a
            finite number >= 0.
        RuntimeError: a tensor requires a gradient, and the penalty has none (L0).
        BackendError: the backend asked for by name cannot serve.
    """
    if not isinstance(penalty, Penalty):
        raise TypeError(f"penalty: expected a pyreg penalty, got {penalty!r}")
    if penalty.is_anchored:
        raise TypeError(f"penalty: {penalty!r} has an anchor or weights: make it a Regularizer's")
    tensors, label = collect(params)
    if not tensors:
        requested()  # an unknown backend is an error here too
        return torch.zeros(())
    if torch.compiler.is_compiling():
        return ops.value(tensors, (penalty,), [0] * len(tensors))
    packs = packs_for(tensors, (penalty.name,), [0] * len(tensors))
    return autograd.value(packs, tensors, (penalty,), label)


def l1(params: Params, lam: Strength) -> Tensor:
    """lam * sum |w| over all params, differentiable; see `penalty` for arguments and errors.

    Equivalent to `lam * sum(p.abs().sum() for p in params)`; the gradient is lam * sign(w), with
    sign(0) = 0.
    """
    return penalty(params, L1(lam))


def l2(params: Params, lam: Strength) -> Tensor:
    """lam * sum w^2 over all params (no 1/2), differentiable; see `penalty`.

    Equivalent to `lam * sum(p.square().sum() for p in params)`. An optimizer's `weight_decay` that
    is added to the gradient is 2 * lam.
    """
    return penalty(params, L2(lam))


def elastic_net(params: Params, l1: Strength, l2: Strength) -> Tensor:
    """l1 * sum |w| + l2 * sum w^2 over all params, differentiable, in one sweep; see `penalty`."""
    return penalty(params, ElasticNet(l1, l2))
