"""What parameters, gradients and anchors must be: errors that name the parameter.

Beside them, what a native sweep cannot walk although it is no error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin

from .distributed import check_beside, check_placed, local, on_one_mesh
from .memory import block, has_own_dispatch, is_dense, is_freed, overlapping, share_memory

Label = Callable[[int], str]
Pair = tuple[Tensor | None, Tensor | None]  # what a row is measured from, and its weights

SWEPT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def label(i: int, name: str | None = None) -> str:
    """How errors name the i-th parameter."""
    return f"params[{i}]" if name is None else f"params[{i}] ({name!r})"


def describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def check(t: Any, name: str) -> None:
    """Raise TypeError or ValueError, naming the parameter, unless `t` can be penalised."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a floating tensor, got {type(t).__name__}")
    if isinstance(t, UninitializedTensorMixin):
        raise ValueError(f"{name}: is not initialized yet; run the module once first")
    if t.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {t.layout} {list(t.shape)}")
    if t.is_quantized or not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {describe(t)}")
    if t.dtype not in SWEPT_DTYPES:
        swept = ", ".join(str(d).removeprefix("torch.") for d in SWEPT_DTYPES)
        raise TypeError(f"{name}: expected one of {swept}, got {describe(t)}")
    check_placed(t, name)


def check_memory(t: Tensor, name: str) -> None:
    """Raise ValueError, naming the parameter, if the storage of `t` was freed."""
    if is_freed(local(t)):
        raise ValueError(f"{name}: {describe(t)} has no memory (its storage was freed or sharded)")


def check_writable(t: Tensor, name: str) -> None:
    """Raise if `t` is expanded, which no operation can write in place."""
    several = (n > 1 and stride == 0 for n, stride in zip(t.shape, t.stride(), strict=True))
    if t.numel() > 0 and any(several):
        raise ValueError(
            f"{name} is expanded, shape {list(t.shape)}, strides {list(t.stride())}: "
            "several elements share one place, so it cannot be changed in place"
        )


def check_gradient(grad: Tensor, t: Tensor, name: str) -> None:
    """Raise unless `grad` can be the gradient of `t`."""
    if grad.layout != torch.strided:
        raise TypeError(f"{name}: its gradient has layout {grad.layout}, expected a dense one")
    if grad.is_neg():
        raise ValueError(f"{name}: its gradient is a lazily negated view; resolve_neg() it")
    check_writable(grad, f"{name}: its gradient")
    check_memory(grad, f"{name}: its gradient")
    if grad.shape != t.shape or grad.dtype != t.dtype or grad.device != t.device:
        raise ValueError(
            f"{name}: {describe(t)} on {t.device} has a gradient {describe(grad)} on {grad.device}"
        )
    if not on_one_mesh(grad, t):
        check_beside(grad, t, name, "gradient")


def check_gradients(
    grads: Sequence[Tensor | None], tensors: Sequence[Tensor], label: Label
) -> None:
    """Raise unless each gradient that there is can be its tensor's, and its alone."""
    for i, (grad, t) in enumerate(zip(grads, tensors, strict=True)):
        if grad is not None:
            check_gradient(grad, t, label(i))
    check_apart(grads, label)


def check_apart(grads: Sequence[Tensor | None], label: Label) -> None:
    """Raise ValueError, naming both tensors, if two gradients lie in the same memory."""
    blocks = [block(None if grad is None else local(grad)) for grad in grads]
    if shared := overlapping([begin for begin, _ in blocks], [size for _, size in blocks]):
        i, *others = shared
        (begin, size), later = blocks[i], ((j, *blocks[j]) for j in others)
        j = next(j for j, own, bytes_ in later if own < begin + size and begin < own + bytes_)
        raise ValueError(
            f"{label(i)} and {label(j)}: their gradients share memory, so what is added to one is "
            "added to both; give each a .grad of its own"
        )


def check_pair(pair: Pair, t: Tensor, name: str) -> None:
    """Raise TypeError or ValueError, naming the parameter, unless `t` can have this anchor."""
    for kind, beside in zip(("anchor", "weight"), pair, strict=True):
        if beside is None:
            continue
        check(beside, f"{name}: its {kind}")
        check_memory(beside, f"{name}: its {kind}")
        if beside.shape != t.shape:
            raise ValueError(f"{name}: {describe(t)}, but its {kind} is {describe(beside)}")
        check_beside(beside, t, name, kind)
        if share_memory(local(beside), local(t)):
            raise ValueError(
                f"{name}: its {kind} is the parameter itself, or shares memory with it (as a "
                "state_dict() does with the model); clone it"
            )


def irregular(t: Tensor) -> str | None:
    """Why a native sweep cannot walk `t` in storage order, or None if it can."""
    if has_own_dispatch(t):
        return f"is a {type(t).__name__}, which has no memory of its own"
    if t.device.type == "meta":
        return "is on the meta device"
    if t.is_neg():
        return "is a lazily negated view"
    if not is_dense(t):
        return f"is not dense: shape {list(t.shape)}, strides {list(t.stride())}"
    return None


def irregular_pair(pair: Pair, t: Tensor) -> str | None:
    """Why a native sweep cannot walk the pair in the storage order of `t`, or None if it can."""
    for kind, beside in zip(("anchor", "weight"), pair, strict=True):
        if beside is None:
            continue
        if beside.device != t.device:
            return f"has its {kind} on {beside.device}"
        if (why := irregular(beside)) is not None:
            return f"has its {kind} in a tensor that {why}"
        if t.numel() and _strides_that_matter(beside) != _strides_that_matter(t):
            return f"has its {kind} in a tensor of other strides"
    return None


def _strides_that_matter(t: Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1]
