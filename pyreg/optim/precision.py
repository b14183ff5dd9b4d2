"""16-bit parameters stepped in float32: what is kept beside them, and how they are rounded.

A bfloat16 number has 8 bits: an update, a decay or a threshold of less than 1/512 of a weight is
lost when the sum is rounded to nearest. Master weights keep the sum in float32 (4 bytes a weight
more); stochastic rounding loses it only in single weights, and not on average (no memory).

Source: Micikevicius et al. (2018), "Mixed precision training" (master weights); Gupta et al.
(2015), "Deep learning with limited numerical precision" (stochastic rounding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MASTER = "master_param"  # the state of a parameter that has master weights
NARROW = (torch.bfloat16, torch.float16)
_WORD = 0xFFFFFFFF


class Wide(NamedTuple):
    """A 16-bit parameter of a step in float32."""

    param: Tensor
    mastered: bool  # its state holds, or is to hold, its master weights
    key: int | None  # where random roundings begin; None: rounded to nearest


def check_options(group: dict[str, Any], named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise unless the options of a param group are such as its parameters can have."""
    dtype, seed = group.get("state_dtype"), group.get("seed", 0)
    if dtype not in (None, torch.float32):
        raise ValueError(f"state_dtype: expected torch.float32 or None, got {dtype!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, got {seed!r}")
    if not group.get("stochastic_rounding"):
        return
    if group.get("master_weights"):
        raise ValueError(
            "stochastic_rounding=True and master_weights=True: master weights lose nothing that "
            "would have to be rounded at random; take one of them"
        )
    for name, p in named:
        if p.dtype == torch.float16:
            raise ValueError(f"{name}: stochastic_rounding=True is for bfloat16, got float16")


def is_wide(group: dict[str, Any]) -> bool:
    """Whether its 16-bit parameters are stepped in float32."""
    return any(group.get(k) for k in ("state_dtype", "master_weights", "stochastic_rounding"))


def widen_states(state: dict[str, Any]) -> bool:
    """Make what lies beside a parameter float32; whether anything was not."""
    narrow = [k for k, s in state.items() if isinstance(s, Tensor) and s.dtype in NARROW]
    for k in narrow:
        state[k] = state[k].float()
    return bool(narrow)


def key_of(seed: int, step: int, index: int) -> int:
    """32 bits from the seed, the step and the parameter's number, each of which counts."""
    key = 0
    for x in (seed, seed >> 32, step, index):
        key = _scrambled(((key + 0x9E3779B9) ^ x) & _WORD)
    return key


def _scrambled(x: Any) -> Any:
    """csrc/half.h's, of an integer or of a tensor of int64 below 2^32."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def round_at_random(x: Tensor, key: int) -> Tensor:
    """x (float32) in bfloat16: up or down, the nearer the likelier, with mean x.

    An element's random bits are those of its place in memory, as in csrc/half.h.
    """
    place = torch.empty_like(x, dtype=torch.int64)
    order = torch.arange(x.numel(), device=x.device)
    by_stride = sorted(range(x.ndim), key=lambda d: -place.stride(d))
    place.permute(by_stride).copy_(order.view([place.shape[d] for d in by_stride]))
    random = _scrambled((place & _WORD) ^ key ^ (((place >> 32) * 0x9E3779B9) & _WORD)) & 0xFFFF
    bits = x.view(torch.int32).long() & _WORD
    upper = ((bits + random) >> 16) & 0xFFFF
    signed = torch.where(upper >= 0x8000, upper - 0x10000, upper).to(torch.int16)
    return torch.where(x.isfinite(), signed.view(torch.bfloat16), x.bfloat16())


def agrees(p: Tensor, master: Tensor) -> bool:
    """Whether every element of p is its master weight, rounded."""
    rounded = master.to(p.dtype)
    return bool(((p == rounded) | rounded.isnan()).all())


@contextmanager
def stand_ins(optimizer: Optimizer, rows: Sequence[Wide]) -> Iterator[dict[int, Tensor]]:
    """{id of a parameter: float32 parameter that the optimizer holds in its place meanwhile}

    with its gradient and state; then the parameter is that, rounded, and its master that.
    """
    standing: dict[int, Tensor] = {}
    for row in rows:
        master = optimizer.state[row.param].get(MASTER) if row.param in optimizer.state else None
        wide = row.param.detach().float() if master is None else master
        standing[id(row.param)] = instead = nn.Parameter(wide)
        instead.grad = row.param.grad.float()
    kept = [list(group["params"]) for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"] = [standing.get(id(p), p) for p in group["params"]]
        for row in rows:
            state = optimizer.state[standing[id(row.param)]] = optimizer.state.pop(row.param, {})
            widen_states(state)
        yield standing
        for row in rows:
            wide = standing[id(row.param)].detach()
            row.param.copy_(wide if row.key is None else round_at_random(wide, row.key))
            if row.mastered:
                optimizer.state[standing[id(row.param)]][MASTER] = wide
    finally:
        for group, params in zip(optimizer.param_groups, kept, strict=True):
            group["params"] = params
        for row in rows:
            optimizer.state[row.param] = optimizer.state.pop(standing[id(row.param)], {})
