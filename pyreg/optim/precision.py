"""16-bit parameters stepped in float32: what is kept beside them, and how they are rounded.

A bfloat16 number has 8 bits: an update, a decay or a threshold of less than 1/512 of a weight is
lost when the sum is rounded to nearest. Master weights keep the sum in float32 (4 bytes a weight
more); stochastic rounding loses it only in single weights, and not on average (no memory).

Source: Micikevicius et al. (2018), "Mixed precision training" (master weights); Gupta et al.
(2015), "Deep learning with limited numerical precision" (stochastic rounding).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import gathered, local, shards_of
from ..memory import has_own_dispatch, sharing_each_other
from ..metric import Metric, check_moment
from ..tensors import Label, label

MASTER = "master_param"  # the state of a parameter that has master weights
NARROW = (torch.bfloat16, torch.float16)
OPTIONS = ("state_dtype", "master_weights", "stochastic_rounding", "seed")  # of a param group
_WORD = 0xFFFFFFFF


class Wide(NamedTuple):
    """A 16-bit parameter of a step in float32."""

    param: Tensor
    mastered: bool  # its state holds, or is to hold, its master weights
    key: int | None  # where random roundings begin; None: rounded to nearest


def check_options(groups: Sequence[dict[str, Any]], named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise unless the options of param groups are such as their (named) parameters can have."""
    rest, mastered = iter(named), []
    for group in groups:
        own = list(islice(rest, len(group["params"])))
        dtype, seed = group.get("state_dtype"), group.get("seed", 0)
        if dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype: expected torch.float32 or None, got {dtype!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an integer, got {seed!r}")
        if group.get("master_weights"):
            mastered += [(name, p) for name, p in own if p.dtype in NARROW]
        if not group.get("stochastic_rounding"):
            continue
        if group.get("master_weights"):
            raise ValueError(
                "stochastic_rounding=True and master_weights=True: master weights lose nothing "
                "that would have to be rounded at random; take one of them"
            )
        for name, p in own:
            if p.dtype == torch.float16:
                raise ValueError(f"{name}: stochastic_rounding=True is for bfloat16, got float16")
    for i in sharing_each_other(p for _, p in mastered):
        raise ValueError(
            f"{mastered[i][0]}: shares memory with another parameter, so it cannot have master "
            "weights of its own"
        )


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


def key_on_this_rank(key: int, p: Tensor) -> int:
    """Other random numbers for other parts of a DTensor, and the same for replicas."""
    shards = shards_of(p)
    return key if shards is None else key_of(key, shards.part, 0)


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
    return bool(gathered(((p == rounded) | (p.isnan() & rounded.isnan())).all()))


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
    finally:  # after half a step too, as it leaves parameters that nothing stands in for
        for group, params in zip(optimizer.param_groups, kept, strict=True):
            group["params"] = params
        for row in rows:
            instead = standing[id(row.param)]
            wide, state = instead.detach(), optimizer.state.pop(instead, {})
            if row.key is None:
                row.param.copy_(wide)
            else:
                key = key_on_this_rank(row.key, row.param)
                local(row.param).copy_(round_at_random(local(wide), key))
            if row.mastered:
                state[MASTER] = wide
            if state:
                optimizer.state[row.param] = state


class LowPrecision(Optimizer):
    """What an optimizer keeps and checks for its 16-bit parameters; a mixin."""

    def __init__(self, params: Iterable[Any], *args: Any, **options: Any) -> None:
        self._agreed: dict[Tensor, tuple[int, int]] = {}  # how those stepped in float32 look
        wide = {k: options.pop(k) for k in OPTIONS if k in options}
        super().__init__(params, *args, **options)
        self.defaults.update(wide)
        for group in self.param_groups:
            for option, x in wide.items():
                group.setdefault(option, x)
        check_options(self.param_groups, self._named())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_agreed": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's.

        Raises:
            ValueError, TypeError: options that the parameters (named) cannot have; nothing was
                added then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if any(k in group for k in OPTIONS):
            try:
                check_options([group], self._named()[-len(group["params"]) :])
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's; but float32 states of 16-bit parameters stay that, and options of `OPTIONS` that
        the checkpoint lacks stay as they are.

        Raises:
            ValueError, TypeError: as torch, and options that the parameters (named) cannot have;
                nothing was loaded then.
        """
        loaded: dict[str, Any] = {}

        def complete(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            saved = given["param_groups"]
            if len(saved) == len(self.param_groups):
                own = [{k: group[k] for k in OPTIONS if k in group} for group in self.param_groups]
                saved = [{**kept, **group} for kept, group in zip(own, saved, strict=True)]
                groups = zip(saved, self.param_groups, strict=True)
                check_options(
                    [{**group, "params": now["params"]} for group, now in groups], self._named()
                )
            loaded.update(given, param_groups=saved)
            return loaded

        def restore(_: Optimizer) -> None:
            saved = [i for group in loaded["param_groups"] for i in group["params"]]
            params = [(p, group) for group in self.param_groups for p in group["params"]]
            for i, (p, group) in zip(saved, params, strict=True):
                for kind, s in loaded["state"].get(i, {}).items():
                    own = self.state[p].get(kind)
                    if is_wide(group) and isinstance(own, Tensor) and own.dtype in NARROW:
                        self.state[p][kind] = s.detach().to(p.device, copy=True)

        # After the user's hooks, and before them.
        hooks = [
            self.register_load_state_dict_pre_hook(complete),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._agreed = {}

    def _named(self) -> list[tuple[str, Tensor]]:
        named = []
        for group in self.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            named += zip(names, group["params"], strict=True)
        return [(name or f"params[{i}]", p) for i, (name, p) in enumerate(named)]

    def _label(self, tensors: Sequence[Tensor]) -> Label:
        places: dict[int, tuple[int, str]] = {}  # of every parameter, once one is asked for

        def named(i: int) -> str:
            if not places:
                places.update((id(p), (k, name)) for k, (name, p) in enumerate(self._named()))
            k, name = places[id(tensors[i])]
            return label(k) if name == label(k) else label(k, name)

        return named

    def _wide(self) -> list[Wide]:
        """Those of the parameters with a gradient that are stepped in float32.

        Raises ValueError, naming it, if one is not what its master weights are, rounded.
        """
        if not self._agreed and not any(map(is_wide, self.param_groups)):
            return []
        found, index = [], 0
        for group in self.param_groups:
            if not is_wide(group):
                self._narrow(group)
            keyed, mastered = group.get("stochastic_rounding"), bool(group.get("master_weights"))
            for i, p in enumerate(group["params"], index):
                if p.grad is None or p.dtype not in NARROW or not is_wide(group):
                    continue
                key = None
                if keyed and p.dtype == torch.bfloat16:
                    if captured(p):
                        raise RuntimeError(
                            "stochastic_rounding: a captured CUDA graph would replay the same "
                            "random numbers; step outside it, or use master_weights=True"
                        )
                    key = key_of(group.get("seed", 0), group.get("steps_rounded", 0), i)
                if p in self.state and MASTER in self.state[p]:
                    self._check_master(p, mastered)
                found.append(Wide(p, mastered, key))
            index += len(group["params"])
        return found

    def _narrow(self, group: dict[str, Any]) -> None:
        """Make the states of parameters that were stepped in float32, until now, torch's again."""
        for p in group["params"]:
            if self._agreed.pop(p, None) is not None:
                state = self.state[p]
                state.pop(MASTER, None)
                for kind, s in state.items():
                    if isinstance(s, Tensor) and kind != "step":
                        state[kind] = s.to(p.dtype)

    def _check_master(self, p: Tensor, mastered: bool) -> None:
        if not mastered:  # any more: it would not be stepped with its parameter
            del self.state[p][MASTER]
        elif self._agreed.get(p) != _look(p):
            master = self.state[p][MASTER]
            if (master.shape, master.device) == (p.shape, p.device) and agrees(p, master):
                return
            named = self._label([p])(0)
            check_moment(Metric(master, 0.0), p, named)
            raise ValueError(
                f"{named}: its master weights are not what it is: it was changed, or loaded "
                f"without them; delete optimizer.state[p][{MASTER!r}] to begin with what it is now"
            )

    def _agree(self, rows: Sequence[Wide]) -> None:
        """Remember parameters that were just stepped, and made of their master weights."""
        for row in rows:
            self._agreed[row.param] = _look(row.param)


def captured(p: Tensor) -> bool:
    """Whether what is done to it now becomes part of a CUDA graph."""
    return p.is_cuda and torch.cuda.is_current_stream_capturing()


def _look(p: Tensor) -> tuple[int, int]:
    """What changes when a parameter is assigned to, but for changes in place of `p.data`."""
    own = local(p)
    return p._version + own._version, 0 if has_own_dispatch(own) else own.data_ptr()
