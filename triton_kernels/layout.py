"""A list of tensors laid out for the sweeps, and one method for each sweep."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from operator import attrgetter

import torch
import triton
from torch import Tensor

from .launch import DTYPES, INTERPRETED, Addresses, Plan, Queue, Row, current, cut
from .penalties import PENALTIES

MINIMUM_TRITON = (3, 4)  # an earlier one cannot index a tuple in a compiled kernel

try:  # one call for all tensors; private, so only ever used to agree faster
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

_dtype = attrgetter("dtype")


class StaleLayout(RuntimeError):
    """The tensors are no longer those that the layout was made for."""


class Layout:
    """Tensors of one device, dense in storage order, and the penalty of each.

    Args:
        tensors: float32, float64, bfloat16 or float16, in any mix; CUDA or ROCm tensors, or CPU
            tensors under TRITON_INTERPRET=1. Only their sizes, strides and dtypes are kept.
        rule_of: for each tensor the index of its rule.
        penalties: for each rule a name in PENALTIES.

    Every sweep is one kernel launch, however many tensors there are, and never waits for the
    device. `strengths` is float64 [rules, 2] on the device, 0 in columns that a penalty has no use
    for. `scale` and `step` are float64 tensors of one element on the device, or numbers; of what a
    CUDA graph captured, a replay reads tensors anew, and numbers are what they were. Graphs
    captured from one layout share scratch memory: replay them one after the other.

    Raises:
        StaleLayout: a call's tensors differ from the layout's in number, dtype, size, strides or
            device; raised before anything is written.
        RuntimeError: a CUDA graph is being captured, and a tensor moved since the last call or
            there was none.
    """

    def __init__(self, tensors: list[Tensor], rule_of: list[int], penalties: list[str]) -> None:
        if len(tensors) != len(rule_of):
            raise ValueError(
                f"expected a rule for each of {len(tensors)} tensors, got {len(rule_of)}"
            )
        for i, rule in enumerate(rule_of):
            if not 0 <= rule < len(penalties):
                raise ValueError(f"rule_of[{i}]: expected 0 <= rule < {len(penalties)}, got {rule}")
        for i, t in enumerate(tensors):
            if t.dtype not in DTYPES:
                raise TypeError(f"tensors[{i}]: expected one of {[*DTYPES]}, got {t.dtype}")
        for name in penalties:
            if name not in PENALTIES:
                raise ValueError(f"expected a penalty of {[*PENALTIES]}, got {name!r}")
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.rules = len(penalties)
        self._dtypes = list(map(_dtype, tensors))
        self._value_dtype = torch.float64 if torch.float64 in self._dtypes else torch.float32
        self._numels = list(map(Tensor.numel, tensors))
        self._contiguous = list(map(Tensor.is_contiguous, tensors))
        self._shapes = [(t.shape, t.stride()) for t in tensors]
        self._strided = [i for i, contiguous in enumerate(self._contiguous) if not contiguous]
        self._guards = None
        if TensorGuards is not None and tensors:
            self._guards = TensorGuards(
                *tensors,
                dynamic_dims_sizes=[list(t.shape) for t in tensors],
                dynamic_dims_strides=[list(t.stride()) for t in tensors],
            )
        self._addresses = Addresses(self.device)
        self._grad_addresses = Addresses(self.device)
        self._numbers: dict[tuple[int, str], tuple[float, Tensor]] = {}
        self._check_devices(tensors)
        if tensors:
            _check_usable(self.device)

        kinds = [(t, penalties[rule]) for t, rule in zip(self._dtypes, rule_of, strict=True)]
        names = list(dict.fromkeys(penalties))
        index = {kind: k for k, kind in enumerate(dict.fromkeys(kinds))}
        rows = [
            Row(kind[0], n, index[kind], rule, i)
            for i, (n, kind, rule) in enumerate(zip(self._numels, kinds, rule_of, strict=True))
            if n > 0
        ]
        rows += [
            Row(torch.float32, 0, 0, rule, 0)
            for rule in {*range(self.rules)} - {row.group for row in rows}
        ]
        rows.sort(key=attrgetter("group"))
        by_rule = cut(rows, [names.index(name) for name in penalties], 2)
        self._by_rule = Plan(self.device, by_rule, 2, list(index), names)

        dtypes = list(dict.fromkeys(self._dtypes))
        rows = [
            Row(t, n, dtypes.index(t), i, i)
            for i, (t, n) in enumerate(zip(self._dtypes, self._numels, strict=True))
        ]
        by_row = cut(rows, [0] * len(rows), 5)
        self._by_row = Plan(self.device, by_row, 5, [(t, "l1") for t in dtypes], ["l1"])

    def value(self, tensors: list[Tensor], strengths: Tensor) -> tuple[Tensor, Tensor]:
        """sum over the rules of Omega(w; strengths), and each rule's sums. Reads N.

        Returns:
            float32 [] (float64 if any tensor is), and float64 [rules, 2], 0 in columns that a
            penalty has no use for.
        """
        value, sums = self._totals()
        self._sweep(self._by_rule, "value", tensors, None, strengths, strengths, sums, value)
        return value, sums

    def gradient(
        self,
        tensors: list[Tensor],
        grads: Sequence[Tensor | None],
        strengths: Tensor,
        scale: Tensor | float,
    ) -> None:
        """grads[i] = scale * grad Omega(tensors[i]); None is left out. Reads N, writes N."""
        self._sweep(self._by_rule, "gradient", tensors, grads, strengths, scale)

    def accumulate(
        self,
        tensors: list[Tensor],
        grads: Sequence[Tensor | None],
        strengths: Tensor,
        scale: Tensor | float,
        addresses: list[int] | None = None,
    ) -> Tensor:
        """grads[i] += scale * grad Omega(tensors[i]), and the value. Reads 2 N, writes N.

        A tensor without a gradient adds to the value only. `addresses` are those of `grads`, 0 for
        none, where the caller has read them already.

        Returns:
            float32 [] (float64 if any tensor is): the value, not multiplied by `scale`.
        """
        value, sums = self._totals()
        self._sweep(
            self._by_rule, "accumulate", tensors, grads, strengths, scale, sums, value, addresses
        )
        return value

    def prox(self, tensors: list[Tensor], strengths: Tensor, step: Tensor | float) -> None:
        """w = argmin_u step * Omega(u) + (u - w)^2 / 2, in place. Reads N, writes N."""
        self._sweep(self._by_rule, "prox", tensors, None, strengths, step)

    def stats(self, tensors: list[Tensor]) -> Tensor:
        """sum |w|, sum w^2, max |w|, zeros and non-finite numbers of each tensor. Reads N.

        Returns:
            float64 [tensors, 5]. NaN propagates into the first three.
        """
        out = torch.empty(len(self._numels), 5, dtype=torch.float64, device=self.device)
        self._sweep(self._by_row, "stats", tensors, None, out, out, out)
        return out

    def _totals(self) -> tuple[Tensor, Tensor]:
        """Memory for the value, in the dtype that is asked for in the end, and for the sums."""
        value = torch.empty((), dtype=self._value_dtype, device=self.device)
        return value, torch.empty(self.rules, 2, dtype=torch.float64, device=self.device)

    def _sweep(
        self,
        plan: Plan,
        sweep: str,
        tensors: list[Tensor],
        grads: Sequence[Tensor | None] | None,
        strengths: Tensor,
        scale: Tensor | float,
        out: Tensor | None = None,
        value: Tensor | None = None,
        grad_addresses: list[int] | None = None,
    ) -> None:
        addresses = self._check(tensors)
        if grads is not None:
            grad_addresses = self._check_grads(grads, grad_addresses)
        if sweep != "stats":
            self._check_strengths(strengths)
        if not tensors:
            for total in (out, value):
                if total is not None:
                    total.zero_()
            return
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            queue = current(self.device)
            w = self._addresses.on(queue, addresses)
            g = w if grads is None else self._grad_addresses.on(queue, grad_addresses)
            scale = self._number(queue, sweep, scale)
            plan.launch(queue, sweep, w, g, strengths, scale, out, value)

    def _number(self, queue: Queue, sweep: str, x: Tensor | float) -> Tensor:
        """x in device memory; a number is written there by the stream itself when it changed."""
        if isinstance(x, Tensor):
            if x.dtype != torch.float64 or x.device != self.device:
                raise ValueError(
                    f"expected scale or step as float64 on {self.device}, "
                    f"got {x.dtype} on {x.device}"
                )
            return x
        if queue.capturing:  # the graph writes it itself, into memory of its own
            return torch.full((), x, dtype=torch.float64, device=self.device)
        known, tensor = self._numbers.get((queue.key, sweep), (None, None))
        if tensor is None:
            tensor = torch.empty((), dtype=torch.float64, device=self.device)
        if known != x:
            tensor.fill_(x)
            self._numbers[queue.key, sweep] = (x, tensor)
        return tensor

    def _check_strengths(self, strengths: Tensor) -> None:
        if (
            strengths.dtype != torch.float64
            or strengths.shape != (self.rules, 2)
            or (strengths.device != self.device and self._numels)
            or not strengths.is_contiguous()
        ):
            raise ValueError(
                f"expected contiguous strengths, float64 [{self.rules}, 2] on {self.device}, "
                f"got {strengths.dtype} {list(strengths.shape)} on {strengths.device}"
            )

    def _check(self, tensors: list[Tensor]) -> list[int]:
        """The tensors' addresses. Raises StaleLayout unless the rows still describe them.

        For a contiguous tensor, dtype and size say it all; and an address that is as before is on
        the device that it was on.
        """
        agreed = len(tensors) == len(self._numels) and self._guards and self._guards.check(*tensors)
        if not agreed and (
            list(map(_dtype, tensors)) != self._dtypes
            or list(map(Tensor.numel, tensors)) != self._numels
            or list(map(Tensor.is_contiguous, tensors)) != self._contiguous
            or any(
                (tensors[i].shape, tensors[i].stride()) != self._shapes[i] for i in self._strided
            )
        ):
            raise self._stale(tensors)
        addresses, moved = self._addresses.recognize(list(map(Tensor.data_ptr, tensors)))
        if moved:
            self._check_devices(tensors)
        return addresses

    def _check_grads(
        self, grads: Sequence[Tensor | None], addresses: list[int] | None
    ) -> list[int]:
        """The gradients' addresses, 0 for none. Looks closer at those that moved only."""
        if addresses is None:
            addresses = [0 if g is None else g.data_ptr() for g in grads]
        addresses, moved = self._grad_addresses.recognize(addresses)
        if moved:
            if len(grads) != len(self._numels):
                raise StaleLayout(f"expected {len(self._numels)} gradients, got {len(grads)}")
            for i, g in enumerate(grads):
                if g is not None and (g.dtype, g.numel(), g.device) != (
                    self._dtypes[i],
                    self._numels[i],
                    self.device,
                ):
                    raise StaleLayout(
                        f"grads[{i}]: expected {self._numels[i]} elements of {self._dtypes[i]} on "
                        f"{self.device}, got {g.numel()} of {g.dtype} on {g.device}"
                    )
        return addresses

    def _check_devices(self, tensors: list[Tensor]) -> None:
        for i, t in enumerate(tensors):
            if t.device != self.device:
                raise StaleLayout(
                    f"tensors[{i}]: expected a tensor on {self.device}, got one on {t.device}"
                )

    def _stale(self, tensors: list[Tensor]) -> StaleLayout:
        if len(tensors) != len(self._numels):
            return StaleLayout(f"expected {len(self._numels)} tensors, got {len(tensors)}")
        for i, t in enumerate(tensors):
            shape, stride = self._shapes[i]
            if (t.dtype, t.shape, t.stride()) != (self._dtypes[i], shape, stride):
                break
        return StaleLayout(
            f"tensors[{i}]: expected {self._dtypes[i]} {list(shape)} with strides {stride}, "
            f"got {t.dtype} {list(t.shape)} with strides {t.stride()}"
        )


def unusable() -> str | None:
    """Why this Triton cannot run the kernels on a GPU, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM_TRITON:
        return f"expected Triton >= 3.4, got {triton.__version__}: upgrade torch"
    return None


def _check_usable(device: torch.device) -> None:
    if INTERPRETED and device.type != "cpu":
        raise RuntimeError(
            f"Triton's interpreter (TRITON_INTERPRET=1) takes CPU tensors, got {device}"
        )
    if not INTERPRETED and device.type != "cuda":
        raise RuntimeError(
            f"Triton runs on CUDA and ROCm devices, got {device}; "
            "for CPU tensors set TRITON_INTERPRET=1 before triton is imported"
        )
    if not INTERPRETED and (why := unusable()) is not None:
        raise RuntimeError(why)
