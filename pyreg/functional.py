"""Drop-in replacements for the loop over parameters: a differentiable penalty in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from . import autograd, ops, sweeps
from .dispatch import requested
from .distributed import check_beside, gathered, local
from .metric import Metric
from .pack import Packs, Params, collect, packs_for
from .penalties import L1, L2, ElasticNet, Penalty
from .reference import Strength, compute_dtype
from .tensors import check, check_pair


def penalty(params: Params, penalty: Penalty) -> Tensor:
    """sum over params of Omega(w), differentiable: `loss + pyreg.penalty(model, pyreg.L1(1e-5))`.

    Forward reads N (the parameters' bytes). Backward reads N and writes N, a flat buffer whose
    parts autograd keeps where `.grad` is None. Where every `.grad` exists, it reads 2 N and writes
    N, adding to them in place, if nobody could see the difference (CPU tensors, no hooks, no other
    Python thread at work).

    Args:
        params: a module, an iterable of tensors or of (name, tensor) pairs, a mapping, or a tensor.
            float32, float64, bfloat16 and float16, mixed as you like; any shape and strides.
            A tensor that is listed twice counts twice, as in the loop (a module lists it once). Of
            DTensors the value is that of the whole, on every rank, and every rank must call.
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


def closed_form(
    w_star: Tensor | Sequence[Tensor],
    hessian_diag: float | Tensor | Sequence[Tensor],
    penalty: Penalty,
) -> Tensor | list[Tensor]:
    """argmin_w 1/2 sum h_i (w_i - w*_i)^2 + Omega(w), the penalised minimum of a quadratic loss

    with minimum w* and diagonal Hessian h: the proximal step with a step 1 / h_i per element. For
    L1(a) it is sign(w*) max(|w*| - a / h, 0), for L2(a / 2) it is h w* / (h + a). One sweep over
    all tensors, in place on copies: reads 2 N, writes N.

    Args:
        w_star: where the loss alone is least: a tensor of any shape, or a sequence of them.
        hessian_diag: the loss's second derivatives there, > 0: a tensor that broadcasts to
            `w_star`, or a sequence of one for each; or one number for all.
        penalty: any penalty. An anchor or weights must be a tensor, and so must `w_star` then.

    Returns:
        New tensors of the shapes and dtypes of `w_star`, without a graph; a list for a sequence.

    Raises:
        ValueError: a second derivative that is not a number > 0, or does not broadcast (by name).
        TypeError: what is no tensor, or no penalty.
    """
    if not isinstance(penalty, Penalty):
        raise TypeError(f"penalty: expected a pyreg penalty, got {penalty!r}")
    alone = isinstance(w_star, Tensor)
    if not alone and (isinstance(w_star, str | bytes) or not isinstance(w_star, Iterable)):
        got = type(w_star).__name__
        raise TypeError(f"w_star: expected a tensor or a sequence of them, got {got}")
    minima = [w_star] if alone else list(w_star)
    many = isinstance(hessian_diag, Sequence)
    curvatures = list(hessian_diag) if many else [hessian_diag] * len(minima)
    if len(curvatures) != len(minima):
        raise ValueError(
            f"hessian_diag: expected {len(minima)} tensors, like w_star, got {len(curvatures)}"
        )
    if penalty.is_anchored and not alone:
        raise TypeError(f"penalty: {penalty!r} has an anchor or weights: take one tensor at a time")

    def label(i: int) -> str:
        return "w_star" if alone else f"w_star[{i}]"

    def metric(i: int) -> Metric:
        w, given = minima[i], curvatures[i]
        where = f"hessian_diag[{i}]" if many else "hessian_diag"
        check(w, label(i))
        exact = {"dtype": torch.float64, "device": "cpu"} if isinstance(given, Real) else {}
        try:
            own = torch.as_tensor(given, **exact).detach()
        except (TypeError, ValueError, RuntimeError):
            got = type(given).__name__
            raise TypeError(f"{where}: expected a number or a tensor, got {got}") from None
        if own.is_complex():
            raise TypeError(f"{where}: expected real numbers, got {_name(own.dtype)}")
        h = own.to(w.device, compute_dtype(w.dtype))
        if not gathered((good := h > 0).all()):
            bad = own[~good.to(own.device)][0].item()
            lost = f", 0 in {_name(h.dtype)}" if bad > 0 else ""
            raise ValueError(f"{where}: expected numbers > 0, got {bad}{lost}")
        curvature = torch.empty_like(w, dtype=h.dtype)
        if h.ndim == 0:
            local(curvature).fill_(h)
            return Metric(curvature, 1.0, root=False)
        check_beside(h, w, label(i), where)
        try:
            h = h.expand(w.shape)
        except RuntimeError:
            raise ValueError(
                f"{where}: {list(h.shape)} does not broadcast to {list(w.shape)} of {label(i)}"
            ) from None
        return Metric(curvature.copy_(h), 1.0, root=False)

    metrics = [metric(i) for i in range(len(minima))]
    if not minima:
        return []
    pairs = None
    if penalty.is_anchored:
        pairs = [penalty._beside(w_star)]
        check_pair(pairs[0], w_star, "w_star")
    found = [w.detach().clone() for w in minima]
    packs = Packs((penalty.name,), [0] * len(found), pairs)
    sweeps.prox_in_metric(packs, found, metrics, (penalty,), label)
    return found[0] if alone else found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
