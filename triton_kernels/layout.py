"""A list of tensors laid out for the sweeps, and one method for each sweep."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter

import torch
import triton
from torch import Tensor

from .launch import (
    DTYPES,
    INTERPRETED,
    METRIC,
    NUMBERS,
    STEP_TOTALS,
    Cut,
    Kind,
    Latest,
    Plan,
    Queue,
    Row,
    StepKind,
    constants,
    current,
    cut,
    step_constants,
)
from .penalties import PENALTIES

MINIMUM_TRITON = (3, 4)  # an earlier one cannot index a tuple in a compiled kernel


class Layout:
    """Tensors of one device, dense in storage order, and the penalty of each.

    Args:
        tensors: float32, float64, bfloat16 or float16, in any mix; CUDA or ROCm tensors, or CPU
            tensors under TRITON_INTERPRET=1. Only their sizes and dtypes are kept.
        rule_of: for each tensor the index of its rule.
        penalties: for each rule a name in PENALTIES.
        anchors: for each tensor what it is measured from and its elements' weights, of any of
            those dtypes, or None; None if no tensor has any. Only their dtypes are kept.

    Every sweep is one kernel launch, however many tensors there are, and never waits for the
    device. A sweep is told where tensors are now: `w` and `g` are int64 [tensors] addresses as
    bytes, of memory that holds what the layout recorded, in storage order; that is the caller's to
    check. So are `anchors`, int64 [tensors, 2], 0 for none; a layout without any is told nothing.
    `strengths` is float64 [rules, 2] on the device, or its bytes, 0 in columns that a penalty has
    no use for. `scale` and `step` are float64 tensors of one element on the device, or numbers; of
    what a CUDA graph captured, a replay reads tensors anew, and numbers are what they were. Graphs
    captured from one layout share scratch memory: replay them one after the other.

    Raises:
        ValueError: a call's addresses or numbers are of another kind than those above; raised
            before anything is written.
        RuntimeError: a CUDA graph is being captured, and a tensor moved since the last call, a
            number in bytes changed, or there was none.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        rule_of: list[int],
        penalties: list[str],
        anchors: list[tuple[Tensor | None, Tensor | None]] | None = None,
    ) -> None:
        for beside, what in ((rule_of, "a rule"), (anchors, "an anchor")):
            if beside is not None and len(beside) != len(tensors):
                raise ValueError(
                    f"expected {what} for each of {len(tensors)} tensors, got {len(beside)}"
                )
        for i, rule in enumerate(rule_of):
            if not 0 <= rule < len(penalties):
                raise ValueError(f"rule_of[{i}]: expected 0 <= rule < {len(penalties)}, got {rule}")
        pairs = [(None, None)] * len(tensors) if anchors is None else anchors
        for i, (t, pair) in enumerate(zip(tensors, pairs, strict=True)):
            for each in (t, *pair):
                if each is not None and each.dtype not in DTYPES:
                    raise TypeError(f"tensors[{i}]: expected one of {[*DTYPES]}, got {each.dtype}")
        for name in penalties:
            if name not in PENALTIES:
                raise ValueError(f"expected a penalty of {[*PENALTIES]}, got {name!r}")
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.rules = len(penalties)
        self._dtypes, self._numels = [t.dtype for t in tensors], list(map(Tensor.numel, tensors))
        self._rule_of, self._penalties = rule_of, penalties
        self._pairs = [tuple(None if t is None else t.dtype for t in pair) for pair in pairs]
        self._anchored = anchors is not None
        self._number = len(tensors)
        self._value_dtype = torch.float64 if torch.float64 in self._dtypes else torch.float32
        self._addresses = {
            of: Latest(self.device, "tensors", torch.int64, "are new or have moved")
            for of in ("w", "w of a prox", "g", "moments", "anchors", "step")
        }
        self._strengths = Latest(self.device, "strengths")
        self._metrics = Latest(self.device, "numbers of metrics")
        self._set_numbers = Latest(self.device, "numbers of the step")
        self._keys = Latest(self.device, "keys of stochastic rounding", torch.int64)
        self._numbers: dict[tuple[int, str], tuple[float, Tensor]] = {}
        self._unasked: dict[int, Tensor] = {}
        if tensors:
            _check_usable(self.device)
        self._by_rule = self._plan_by_rule(self._dtypes)
        self._in_metric: dict[bytes, Plan] = {}
        self._steps: dict[tuple, Plan] = {}
        known = list(dict.fromkeys(self._dtypes))
        rows = [
            Row(t, n, known.index(t), i, i)
            for i, (t, n) in enumerate(zip(self._dtypes, self._numels, strict=True))
        ]
        by_row = cut(rows, [0] * len(rows), 5)
        kinds = [Kind(t, "l1", t) for t in known]
        self._by_row = Plan(self.device, by_row, 5, ["l1"], constants(5, kinds, ["l1"]))

    def _plan_by_rule(self, beside: list[torch.dtype]) -> Plan:
        """With the dtype of what lies beside each tensor: its gradient or moment."""
        penalties = [self._penalties[rule] for rule in self._rule_of]
        origins, weights = zip(*self._pairs, strict=True) if self._pairs else ((), ())
        kinds = list(map(Kind, self._dtypes, penalties, beside, origins, weights))
        by_rule, index, names = self._cut_by_rule(kinds)
        return Plan(self.device, by_rule, 2, names, constants(2, index, names))

    def _cut_by_rule(self, kinds: list) -> tuple[Cut, list, list[str]]:
        """Rows of these kinds cut into slots by rule; the kinds and the penalties that occur."""
        index = {kind: k for k, kind in enumerate(dict.fromkeys(kinds))}
        rows = [
            Row(kind.dtype, n, index[kind], rule, i)
            for i, (n, kind, rule) in enumerate(
                zip(self._numels, kinds, self._rule_of, strict=True)
            )
            if n > 0
        ]
        rows += [
            Row(torch.float32, 0, 0, rule, 0)
            for rule in {*range(self.rules)} - {row.group for row in rows}
        ]
        rows.sort(key=attrgetter("group"))
        names = list(dict.fromkeys(self._penalties))
        by_rule = cut(rows, [names.index(name) for name in self._penalties], 2)
        return by_rule, list(index), names

    def value(
        self, w: bytes, strengths: Tensor | bytes, anchors: bytes = b""
    ) -> tuple[Tensor, Tensor]:
        """sum over the rules of Omega(w; strengths), and each rule's sums. Reads N.

        Returns:
            float32 [] (float64 if any tensor is), and float64 [rules, 2], 0 in columns that a
            penalty has no use for.
        """
        values = self._values()
        sums = torch.empty(self.rules, 2, dtype=torch.float64, device=self.device)
        self._sweep(self._by_rule, "value", w, None, anchors, strengths, None, sums, values)
        return values[0], sums

    def gradient(
        self,
        w: bytes,
        g: bytes,
        strengths: Tensor | bytes,
        scale: Tensor | float,
        anchors: bytes = b"",
    ) -> None:
        """g = scale * grad Omega(w); where g is at 0, nothing. Reads N, writes N."""
        self._sweep(self._by_rule, "gradient", w, g, anchors, strengths, scale)

    def accumulate(
        self,
        w: bytes,
        g: bytes,
        strengths: Tensor | bytes,
        scale: Tensor | float,
        anchors: bytes = b"",
    ) -> Tensor:
        """g += scale * grad Omega(w), and the value. Reads 2 N, writes N.

        A tensor whose g is at 0 adds to the value only.

        Returns:
            float32 [1 + rules] (float64 if any tensor is): the value, and each rule's, not
            multiplied by `scale`.
        """
        values = self._values()
        self._sweep(self._by_rule, "accumulate", w, g, anchors, strengths, scale, None, values)
        return values

    def prox(
        self, w: bytes, strengths: Tensor | bytes, step: Tensor | float, anchors: bytes = b""
    ) -> None:
        """w = argmin_u step * Omega(u) + (u - w)^2 / 2; where w is at 0, nothing. Reads N, writes
        N."""
        self._sweep(self._by_rule, "prox", w, None, anchors, strengths, step)

    def prox_in_metric(
        self,
        w: bytes,
        moments: bytes,
        float32: bytes,
        strengths: Tensor | bytes,
        metrics: Tensor | bytes,
        anchors: bytes = b"",
    ) -> Tensor:
        """w = prox(w, step of each element), in place, and the value. Reads 2 N, writes N.

        An element's step is numerator / (factor * root(moment) + offset), and the numerator where
        there is no moment. Where w is at 0, nothing.

        Args:
            moments: addresses of tensors like w, 0 for none.
            float32: of each moment, 1 if it is float32 whatever its tensor is; 0: the same dtype.
            metrics: float64 [tensors, 4] on the device, or its bytes: numerator, factor, offset,
                and 1 for a square root or 0 for none.

        Returns:
            float32 [1 + rules] (float64 if any tensor is): the value of the new w, and each
            rule's, without what was left.
        """
        if len(float32) != self._number:
            raise ValueError(f"expected {self._number} flags, got {len(float32)}")
        if float32 not in self._in_metric:
            beside = [
                torch.float32 if flag else own
                for own, flag in zip(self._dtypes, float32, strict=True)
            ]
            own = beside == self._dtypes
            self._in_metric[float32] = self._by_rule if own else self._plan_by_rule(beside)
        values, plan = self._values(), self._in_metric[float32]
        self._sweep(plan, "prox_in_metric", w, moments, anchors, strengths, metrics, None, values)
        return values

    def stats(self, w: bytes) -> Tensor:
        """sum |w|, sum w^2, max |w|, zeros and non-finite numbers of each tensor. Reads N.

        Returns:
            float64 [tensors, 5]. NaN propagates into the first three.
        """
        out = torch.empty(self._number, 5, dtype=torch.float64, device=self.device)
        self._sweep(self._by_row, "stats", w, None, b"", out, None, out, out)
        return out

    def step(
        self,
        places: Sequence[bytes],
        updates: Sequence[str],
        float32: bytes,
        sets: Sequence[int],
        numbers: Tensor | bytes,
        penalised: bytes,
        prox: bool,
        strengths: Tensor | bytes,
        scale: Tensor | float,
        *,
        masters: bytes | None = None,
        keys: Tensor | bytes | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """An optimizer's step on every tensor, and the penalty's gradient or prox in it: reads
        weights, gradients and states, writes weights and states.

        Args:
            places: addresses of weights, of gradients of the same dtypes, and of the three kinds of
                states of an update, 0 for none.
            updates: of each tensor, a name in UPDATES.
            float32: of each tensor, 1 if its states are float32 whatever it is; 0: the same dtype.
            sets: of each tensor, which of the `numbers` are its own.
            numbers: float64 [sets, 12] on the device, or its bytes: the 9 of updates.py, and a
                metric's numerator, factor and offset, of which a prox needs the numerator.
            penalised: of each tensor, 1 or 0.
            prox: whether the penalty's prox comes after the update, in the optimizer's metric, or
                its gradient, times `scale`, joins the loss's before it.
            masters: addresses of float32 weights, 0 for none: these are read and written in the
                tensor's place, which holds them rounded.
            keys: int64 [tensors] on the device, or its bytes: bfloat16 weights are rounded
                stochastically, by these 32 bits. Their states are float32.
            grad_scale: what gradients are divided by, one floating number on the device.
            found_inf: the same; where it is not 0, nothing is written to weights and states.

        Returns:
            float32 [1 + rules] (float64 if any tensor is): the value, and each rule's, of the
            penalised weights: before the step, or after a prox. And how many of them are 0 after
            it, int64 []. Masters count instead of their tensors; what is rounded stochastically
            counts before that.
        """
        n = self._number
        if self._anchored:
            raise ValueError("a step takes no anchors")
        lists = updates, float32, sets, penalised
        if len(places) != 5 or any(map(n.__ne__, map(len, lists))):
            raise ValueError(f"expected an update, a set and flags for each of {n} tensors")
        none = bytes(8 * n)
        columns = *places, masters or none, array("q", sets).tobytes()
        if any(len(column) != 8 * n for column in columns):
            raise ValueError(f"expected {n} addresses of 8 bytes")
        for x, what in ((grad_scale, "grad_scale"), (found_inf, "found_inf")):
            if x is not None and not (
                x.is_floating_point() and x.numel() == 1 and x.device == self.device
            ):
                raise ValueError(
                    f"expected {what}, one floating number on {self.device}, "
                    f"got {x.dtype} {list(x.shape)} on {x.device}"
                )
        plan = self._step_plan(updates, float32, penalised, prox, masters, keys is not None)
        values = self._values()
        zeros = torch.empty((), dtype=torch.int64, device=self.device)
        if not n:
            return values.zero_(), zeros.zero_()
        with self._on_device():
            queue = current(self.device)
            if keys is not None:
                keys = self._given(queue, keys, (n,), self._keys)
            numbers = self._given(queue, numbers, (-1, NUMBERS), self._set_numbers)
            known = numbers.numel() // NUMBERS
            if not 0 <= min(sets) <= max(sets) < known:
                raise ValueError(f"expected sets of {known}, got {min(sets)} to {max(sets)}")
            operands = {
                "places": self._addresses["step"].on(queue, b"".join(columns)),
                "n_tensors": n,
                "keys": keys,
                "numbers": numbers,
                "strengths": self._given(queue, strengths, (self.rules, 2), self._strengths),
                "scale": self._scale(queue, "step", scale),
                "grad_scale": grad_scale,
                "found_inf": found_inf,
                "zeros": zeros,
            }
            plan.launch(queue, "step", operands, self._sums(queue), values)
        return values, zeros

    def _step_plan(
        self,
        updates: Sequence[str],
        float32: bytes,
        penalised: bytes,
        prox: bool,
        masters: bytes | None,
        stochastic: bool,
    ) -> Plan:
        own = masters or bytes(8 * self._number)
        mastered = bytes(map(bool, array("q", own)))
        key = tuple(updates), float32, penalised, prox, mastered, stochastic
        if key not in self._steps:
            kinds = [
                StepKind(
                    dtype,
                    torch.float32 if float32[i] else dtype,
                    updates[i],
                    self._penalties[self._rule_of[i]] if penalised[i] else None,
                    bool(mastered[i]),
                    stochastic and dtype == torch.bfloat16,
                )
                for i, dtype in enumerate(self._dtypes)
            ]
            by_rule, index, names = self._cut_by_rule(kinds)
            made = step_constants(index, names, prox)
            self._steps[key] = Plan(self.device, by_rule, STEP_TOTALS, names, made)
        return self._steps[key]

    def _values(self) -> Tensor:
        """Memory for the value and each rule's, in the dtype that is asked for in the end."""
        return torch.empty(1 + self.rules, dtype=self._value_dtype, device=self.device)

    def _sweep(
        self,
        plan: Plan,
        sweep: str,
        w: bytes,
        g: bytes | None,
        anchors: bytes,
        strengths: Tensor | bytes,
        scale: Tensor | float | bytes | None,
        out: Tensor | None = None,
        value: Tensor | None = None,
    ) -> None:
        for addresses in (w, g):
            if addresses is not None and len(addresses) != 8 * self._number:
                raise ValueError(
                    f"expected {self._number} addresses of 8 bytes, got {len(addresses)} bytes"
                )
        if sweep != "stats" and len(anchors) != 16 * self._number * self._anchored:
            raise ValueError(
                f"expected {2 * self._number * self._anchored} addresses of anchors, "
                f"of 8 bytes, got {len(anchors)} bytes"
            )
        if not self._number:
            for total in (out, value):
                if total is not None:
                    total.zero_()
            return
        with self._on_device():
            queue = current(self.device)
            in_metric = sweep == "prox_in_metric"
            writes = in_metric or sweep == "prox"
            tensors = self._addresses["w of a prox" if writes else "w"].on(queue, w)
            beside = self._addresses["moments" if in_metric else "g"]
            gradients = tensors if g is None else beside.on(queue, g)
            pairs = self._addresses["anchors"].on(queue, anchors) if anchors else None
            if sweep != "stats":
                strengths = self._given(queue, strengths, (self.rules, 2), self._strengths)
            if in_metric:
                scale = self._given(queue, scale, (self._number, METRIC), self._metrics)
            elif scale is not None:
                scale = self._scale(queue, sweep, scale)
            operands = {
                "tensors": tensors,
                "gradients": gradients,
                "anchors": pairs,
                "strengths": strengths,
                "scale": strengths if scale is None else scale,
            }
            if out is None and value is not None:
                out = self._sums(queue)
            plan.launch(queue, sweep, operands, out, value)

    def _sums(self, queue: Queue) -> Tensor:
        """Memory for sums that nobody asks for: one for each stream and each captured graph."""
        sums = self._unasked.get(queue.key)
        if sums is None or queue.capturing:
            sums = torch.empty(self.rules * STEP_TOTALS, dtype=torch.float64, device=self.device)
            self._unasked[queue.key] = sums
        return sums

    def _on_device(self) -> AbstractContextManager:
        if self.device.index is None or torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    def _given(
        self,
        queue: Queue,
        x: Tensor | bytes,
        shape: tuple[int, ...],
        latest: Latest,
    ) -> Tensor:
        """x in device memory, of the dtype of `latest`; a first size of -1 may be any."""
        dtype = latest.dtype
        if isinstance(x, Tensor):
            expected = x.shape[:1] + shape[1:] if shape[0] < 0 else shape
            if (x.dtype, *x.shape) != (dtype, *expected) or x.device != self.device:
                raise ValueError(
                    f"expected {dtype} {list(shape)} on {self.device} as {latest.what}, "
                    f"got {x.dtype} {list(x.shape)} on {x.device}"
                )
            return x.contiguous()
        size = 8 * abs(math.prod(shape))
        if len(x) % size if shape[0] < 0 else len(x) != size:
            raise ValueError(f"expected {dtype} {list(shape)}, got {len(x)} bytes as {latest.what}")
        return latest.on(queue, x)

    def _scale(self, queue: Queue, sweep: str, x: Tensor | float) -> Tensor:
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
