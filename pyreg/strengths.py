"""The checks of numbers that a user gives: strengths and shapes, a step, a scale, weights."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .reference import Strength, compute_dtype

# In float32: its inverse is finite; and so are its square, and its product with a step and a
# strength, where step * strength is below 3e20.
_SMALLEST_SHAPE, _LARGEST_SHAPE = torch.finfo(torch.float32).tiny, 1e18


def check_strength(name: str, s: Strength, above: float | None = None) -> Strength:
    """`s` as a float, or as the tensor it is. Raises unless it is a finite number >= 0; or, for a
    shape, one `above` a bound that sweeps in float32 can work with, and not learnable.

    A tensor's number is looked at only where that costs no synchronisation (on the CPU).
    """
    if isinstance(s, Tensor):
        if s.ndim != 0 or not s.is_floating_point():
            got = f"{str(s.dtype).removeprefix('torch.')} {list(s.shape)}"
            raise TypeError(f"{name}: expected a number or a 0-dim floating tensor, got {got}")
        if above is not None and s.requires_grad:
            raise ValueError(f"{name}: has no gradient, got a tensor that requires one")
        if s.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_number(name, s.item(), above)
        return s
    if isinstance(s, bool) or not isinstance(s, Real | torch.SymFloat):
        raise TypeError(f"{name}: expected a number or a 0-dim floating tensor, got {s!r}")
    if isinstance(s, torch.SymFloat):
        return s
    s = _as_float(name, s)
    _check_number(name, s, above)
    return s


def check_scale(scale: Strength) -> None:
    """Raise unless `scale` is a finite number, of any sign, or a 0-dim tensor."""
    if type(scale) is float and math.isfinite(scale):
        return
    if isinstance(scale, Tensor):
        if scale.ndim != 0 or not scale.is_floating_point():
            got = f"{str(scale.dtype).removeprefix('torch.')} {list(scale.shape)}"
            raise TypeError(f"scale: expected a number or a 0-dim floating tensor, got {got}")
        if scale.device.type == "cpu" and not math.isfinite(scale.item()):
            raise ValueError(f"scale: expected a finite number, got {scale.item()!r}")
    elif isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale: expected a number or a 0-dim tensor, got {scale!r}")
    elif not math.isfinite(_as_float("scale", scale)):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")


def check_weight(weight: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise ValueError unless every element is a finite number >= 0 in that dtype's compute dtype.

    Waits for the device. Where numbers cannot be asked for, nothing is looked at: traced, mapped by
    torch.func, fake, or captured in a CUDA graph.
    """
    if (
        torch.compiler.is_compiling()
        or weight.device.type == "meta"
        or torch._C._functorch.is_functorch_wrapped_tensor(weight)
        or torch._C._len_torch_dispatch_stack() > 0
        or (weight.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return
    w = weight.detach().to(compute_dtype(dtype))
    if not ((w >= 0) & w.isfinite()).all():
        raise ValueError(f"{name} has elements that are not finite numbers >= 0")


def _check_number(name: str, x: float, above: float | None = None) -> None:
    if above is None:
        if not 0 <= x < math.inf:  # (NaN is neither)
            raise ValueError(f"{name}: expected a finite number >= 0, got {x!r}")
    elif not (above < x and _SMALLEST_SHAPE <= x <= _LARGEST_SHAPE):
        bounds = f"from {_SMALLEST_SHAPE:.3g} to {_LARGEST_SHAPE:g}"
        raise ValueError(f"{name}: expected a number > {above:g}, {bounds}, got {x!r}")


def _as_float(name: str, x: Real) -> float:
    try:
        return float(x)
    except OverflowError:
        raise ValueError(f"{name}: expected a finite number, got one beyond float64") from None
