"""The native backend on GPUs: csrc's CUDA sweeps, one launch over all tensors of a device.

Torch allocates all memory (results, scratch, tables), so that it obeys streams and CUDA graphs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..metric import Metric
from ..pack import GradientMismatch, Pack, StaleLayout
from ..penalties import Penalty
from .torch import Left, add_gradient, apply_prox, apply_prox_in_metric, flat_sets


@cache
def load() -> ModuleType | str:
    """The compiled module, or why there is none."""
    try:
        return importlib.import_module("pyreg._cuda")
    except ImportError as error:
        return f"built without CUDA ({error})"


def version_text(version: int) -> str:
    """13000 -> "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


_served: set[int] = set()  # devices on which the kernels were seen to load


def unserved(index: int) -> str | None:
    """Why the compiled kernels do not run on this device, or None.

    Only success is remembered, as memory that is short now may be there later. Nor is it asked of
    a stream that is captured, where loading them would end the capture.
    """
    if index in _served:
        return None
    device = torch.device(load().device_type, index)
    with _on(device):
        if _current(device).capturing:
            return None
    if (why := load().unserved(index)) == "":
        _served.add(index)
    return why or None


@cache
def _no_gpu() -> str | None:
    if load().device_type != "cuda" or torch.cuda.is_available():
        return None
    driver = load().driver_serves()
    seen = f"the driver serves CUDA {version_text(driver)}" if driver else "no NVIDIA driver"
    return f"no GPU (torch.cuda.is_available() is False; {seen})"


class _Queue(NamedTuple):
    """Where a launch goes. Graphs that are captured share scratch memory of their own."""

    device: torch.device
    handle: int  # of the stream; 0 on the CPU, where tests run the kernels' code
    capturing: bool
    key: int

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The same as torch's object, which takes its time; None on the CPU."""
        return None if self.device.type == "cpu" else torch.cuda.current_stream(self.device)


_CAPTURED = -1  # the key of a queue that is captured


def _current(device: torch.device) -> _Queue:
    """(Within `_on(device)`.)"""
    if load().device_type == "cpu":
        return _Queue(device, 0, False, 0)
    handle = torch._C._cuda_getCurrentRawStream(device.index)
    capturing = torch.cuda.is_current_stream_capturing()
    return _Queue(device, handle, capturing, _CAPTURED if capturing else handle)


# What captured graphs go on using. A graph may outlive the pack that it was captured with, and
# nobody says when it is gone.
_kept_for_graphs: dict[int, Tensor] = {}


def _kept(t: Tensor, queue: _Queue) -> Tensor:
    if queue.capturing:
        _kept_for_graphs[id(t)] = t
    return t


_AS_IT_IS = nullcontext()


def _on(device: torch.device) -> Any:
    """A block in which this is the current device."""
    if load().device_type == "cpu" or torch.cuda.current_device() == device.index:
        return _AS_IT_IS
    return torch.cuda.device(device)


def _warm_up(what: str) -> RuntimeError:
    return RuntimeError(
        f"a CUDA graph is being captured, and {what}: run this sweep once on the same tensors "
        "before the capture, and keep their addresses (zero_grad(set_to_none=False))"
    )


class _Table:
    """The tensors of a sweep in device memory, for more of them than fit into a launch.

    A copy never changes, as a captured graph goes on reading it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._data: Tensor | None = None
        self._ordered: set[int] = set()  # streams whose work comes after the copy

    def on(self, queue: _Queue, given: bytes | int) -> int:
        """The address of these bytes on the device, copied now; or of the last ones."""
        if isinstance(given, bytes):
            if queue.capturing:
                raise _warm_up(
                    "there is no table yet"
                    if self._data is None
                    else "a tensor or a strength that is a number has changed"
                )
            host = torch.frombuffer(bytearray(given), dtype=torch.uint8)
            stream = queue.stream
            if stream is not None:
                host = host.pin_memory()
            self._data = host.to(self._device, non_blocking=True, copy=True)
            self._ordered = {queue.key}
            if stream is not None:
                self._copied = torch.cuda.Event()
                self._copied.record(stream)
        # A capture cannot wait for an event from outside; torch.cuda.graph synchronizes before it.
        elif not queue.capturing and queue.key not in self._ordered:
            if (stream := queue.stream) is not None:
                stream.wait_event(self._copied)
                self._data.record_stream(stream)
            self._ordered.add(queue.key)
        return _kept(self._data, queue).data_ptr()


class _State:
    """What is kept for one pack."""

    def __init__(self, pack: Pack, tensors: list[Tensor]) -> None:
        device = pack.device
        self.layout = load().Layout(tensors, pack.rule_of, list(pack.penalties), device.index or 0)
        self._device = device
        self._tables: dict[str, _Table] = {}  # by sweep
        self._targets: dict[tuple[str, int], Any] = {}  # by sweep and stream
        self._scratch: dict[int, Tensor] = {}
        self._numbers: Tensor | None = None
        self._sets: Tensor | None = None
        self._rows = len(tensors)
        self._rules, self._is_wide = len(pack.penalties), pack.is_wide
        self._results: dict[int | None, Tensor] = {}  # by columns

    def results(self, columns: int | None = None) -> Tensor:
        """[1 + rules * columns + rules + 2] float64: the value, each rule's sums (after a step its
        zeros too), each rule's value, the value as float32, the zeros.

        As twice as many float32 unless a row is float64: the value is one of those, without a
        launch to convert it, and what is saved lies in memory of one dtype.
        """
        if (like := self._results.get(columns)) is None:
            size = 3 + self._rules * ((columns or load().max_sums) + 1)
            size, dtype = (size, torch.float64) if self._is_wide else (2 * size, torch.float32)
            like = self._results[columns] = torch.empty(size, dtype=dtype, device=self._device)
        return torch.empty_like(like)  # (quicker than by size, dtype and device)

    def target(self, sweep: str) -> Any:
        queue = _current(self._device)
        if (known := self._targets.get((sweep, queue.key))) is not None:
            return known
        scratch = self._scratch_of(queue)
        if (table := self._tables.get(sweep)) is None:
            table = self._tables[sweep] = _Table(self._device)
        target = load().Target(
            scratch.data_ptr(), queue.handle, lambda given: table.on(queue, given)
        )
        if not queue.capturing:
            self._targets[sweep, queue.key] = target
        return target

    def lasting(self, numbers: list[float | Tensor]) -> list[float | Tensor]:
        """A metric's numbers, with tensors copied to where they were at the last call if a table
        tells where that is: an optimizer makes them anew at every step."""
        tensors = {i: x for i, x in enumerate(numbers) if isinstance(x, Tensor)}
        if not tensors or len(numbers) <= 3 * load().max_by_value_in_metric:
            return numbers
        if self._numbers is None:
            self._numbers = torch.empty(len(numbers), dtype=torch.float64, device=self._device)
        with _on(self._device), torch.no_grad():
            kept = _kept(self._numbers, _current(self._device)).unbind()
            torch._foreach_copy_(
                [kept[i] for i in tensors], [x.reshape(()) for x in tensors.values()]
            )
        return [kept[i] if i in tensors else x for i, x in enumerate(numbers)]

    def lasting_sets(
        self, numbers: list[tuple[Sequence[float], Metric]] | Tensor
    ) -> list[float] | Tensor:
        """A step's numbers: in the launch, or, where a table tells of the tensors, in device memory
        at the same place as before, lest the table change at every step."""
        with _on(self._device):
            queue = _current(self._device)
        in_table = not load().step_fits(self._rows, 0)
        if not isinstance(numbers, Tensor):
            flat = flat_sets(numbers)
            if load().step_fits(self._rows, len(numbers)):
                return flat
            if queue.capturing:
                raise RuntimeError(
                    "a CUDA graph is being captured, and an optimizer's learning rate or step "
                    "count is on the host: take capturable=True"
                )
            numbers = torch.tensor(flat, dtype=torch.float64)
            if self._device.type == "cuda":
                numbers = numbers.pin_memory()
        elif not in_table:
            return numbers.contiguous()
        if self._sets is None or self._sets.numel() != numbers.numel():
            self._sets = torch.empty(numbers.numel(), dtype=torch.float64, device=self._device)
        with torch.no_grad():
            return _kept(self._sets, queue).copy_(numbers.reshape(-1), non_blocking=True)

    def _scratch_of(self, queue: _Queue) -> Tensor:
        """A zeroed counter and partials: one for each stream, one for captured graphs."""
        if queue.key not in self._scratch:
            if queue.capturing:
                raise _warm_up("there is no scratch memory yet")
            size = self.layout.scratch_bytes()
            for key in {queue.key, _CAPTURED} - self._scratch.keys():
                self._scratch[key] = torch.zeros(size, dtype=torch.uint8, device=self._device)
        return _kept(self._scratch[queue.key], queue)


class CudaBackend:
    name = "native"

    def missing(self) -> str | None:
        native = load()
        return native if isinstance(native, str) else _no_gpu()

    def version(self) -> str:
        native = load()
        if isinstance(native, str):
            return ""
        return f"CUDA {version_text(native.built_with)} for {native.architectures}"

    def refuses(self, pack: Pack, by_name: bool = False) -> str | None:
        if pack.irregular is not None:
            return pack.irregular
        if pack.anchors is not None:
            return "anchored penalties have no kernels there yet"
        if pack.device_type != load().device_type:
            return f"no native sweeps for device {pack.device}"
        if torch.version.hip:
            return "no native sweeps for ROCm devices"
        for name in pack.penalties:
            if name not in load().penalties:
                return f"no native kernel for penalty {name!r}"
        return unserved(pack.device.index or 0)

    def steps(self, pack: Pack) -> bool:
        """Whether `step` knows its penalties."""
        return set(pack.penalties) <= set(load().stepped_penalties)

    def check(self, pack: Pack, tensors: list[Tensor]) -> None:
        pack.check_rows(tensors)

    def value(
        self, pack: Pack, tensors: list[Tensor], rules: Sequence[Penalty]
    ) -> tuple[Tensor, Left]:
        out = self._state(pack, tensors).results()
        self._sweep("value", pack, tensors, _strengths(rules, pack), out.data_ptr())
        width = load().max_sums
        sums = Left(out, torch.float64, slice(1, 1 + len(rules) * width), width)
        return self._value(pack, out), sums

    def gradient(
        self,
        pack: Pack,
        tensors: list[Tensor],
        grads: list[Tensor | None],
        rules: Sequence[Penalty],
        scale: float | Tensor,
    ) -> None:
        strengths = _strengths(rules, pack)
        self._sweep("gradient", pack, tensors, grads, strengths, _number(scale, pack))

    def accumulate(
        self, pack: Pack, tensors: list[Tensor], rules: Sequence[Penalty], scale: float | Tensor
    ) -> tuple[Tensor, Left, int]:
        out = self._state(pack, tensors).results()
        strengths = _strengths(rules, pack)
        present, others = self._sweep(
            "accumulate", pack, tensors, strengths, _number(scale, pack), out.data_ptr()
        )
        for i in others:
            add_gradient(pack.penalty(i, rules), tensors[i], scale)
        return self._value(pack, out), self._of_rules(pack, out), present

    def prox(
        self, pack: Pack, tensors: list[Tensor], rules: Sequence[Penalty], step: float | Tensor
    ) -> None:
        strengths = _strengths(rules, pack)
        others = self._sweep("prox", pack, tensors, strengths, _number(step, pack))
        for i in others:
            apply_prox(pack.penalty(i, rules), tensors[i], step)
        torch.autograd.graph.increment_version(tensors)

    def prox_in_metric(
        self,
        pack: Pack,
        tensors: list[Tensor],
        metrics: Sequence[Metric],
        rules: Sequence[Penalty],
    ) -> tuple[Tensor, Left]:
        out = self._state(pack, tensors).results()
        numbers = [_number(x, pack) for m in metrics for x in (m.numerator, m.factor, m.offset)]
        others = self._sweep(
            "prox_in_metric",
            pack,
            tensors,
            [m.moment for m in metrics],
            self._state(pack, tensors).lasting(numbers),
            [m.root for m in metrics],
            _strengths(rules, pack),
            out.data_ptr(),
        )
        for i in others:
            apply_prox_in_metric(pack.penalty(i, rules), tensors[i], metrics[i])
        torch.autograd.graph.increment_version(tensors)
        value, of_rules = self._value(pack, out), self._of_rules(pack, out)
        with torch.no_grad():
            for i in others:
                own = pack.penalty(i, rules).value(tensors[i])
                value += own
                of_rules()[pack.rule_of[i]] += own
        return value, of_rules

    def step(
        self,
        pack: Pack,
        tensors: list[Tensor],
        states: list[list[Tensor | None]],
        updates: list[str],
        sets: list[int],
        numbers: list[tuple[Sequence[float], Metric]] | Tensor,
        penalised: bytes,
        prox: bool,
        rules: Sequence[Penalty],
        scale: float | Tensor,
        *,
        masters: Sequence[Tensor | None] = (),
        keys: Sequence[int | None] = (),
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> tuple[Tensor, Left, Tensor] | None:
        """An optimizer's step on every row, and the penalty's gradient or prox in it.

        Args:
            states: for each kind of state, [rows]; they are changed.
            updates: [rows] an update of csrc/updates.h, by name.
            sets: [rows] which of the `numbers` are a row's own.
            numbers: of each set, or float64 [sets, 12] on the device: the update's 9, and the
                metric's numerator, factor and offset.
            penalised: [rows] 1 or 0.
            scale: what the penalty's gradient is multiplied by.
            masters: nothing, or [rows] the float32 weights that a 16-bit row is the rounded copy
                of, or None.
            keys: nothing, or [rows] where the random roundings of a bfloat16 row begin, or None.
            grad_scale: what gradients are divided by, one number on the device.
            found_inf: the same; where it is not 0, nothing is changed.

        Returns:
            The value, each rule's, and how many penalised weights are 0 now, on the device; None
            where it cannot be one sweep, and nothing was done.
        """
        native = load()
        index = {name: native.updates.index(name) for name in set(updates)}
        out = self._state(pack, tensors).results(native.max_sums + 1)
        taken = self._sweep(
            "step",
            pack,
            tensors,
            states,
            [index[name] for name in updates],
            sets,
            self._state(pack, tensors).lasting_sets(numbers),
            penalised,
            prox,
            _strengths(rules, pack),
            _number(scale, pack),
            list(masters),
            list(keys),
            None if grad_scale is None else _number(grad_scale, pack),
            None if found_inf is None else _number(found_inf, pack),
            out.data_ptr(),
        )
        if not taken:
            return None
        torch.autograd.graph.increment_version(tensors)
        return self._value(pack, out), self._of_rules(pack, out), out.view(torch.int64)[-1]

    def stats(self, pack: Pack, tensors: list[Tensor]) -> Tensor:
        out = torch.empty(len(tensors), 5, dtype=torch.float64, device=pack.device)
        self._sweep("stats", pack, tensors, out.data_ptr())
        return out

    def _of_rules(self, pack: Pack, out: Tensor) -> Left:
        return Left(out, torch.float64, slice(-2 - len(pack.penalties), -2))

    def _value(self, pack: Pack, out: Tensor) -> Tensor:
        return out[0 if pack.is_wide else -4]

    def _state(self, pack: Pack, tensors: list[Tensor]) -> _State:
        state = pack.layouts.get(self.name)
        if state is None:
            pack.check_rows(tensors)
            state = pack.layouts[self.name] = _State(pack, tensors)
        return state

    def _sweep(self, verb: str, pack: Pack, tensors: list[Tensor], *args: Any) -> Any:
        native = load()
        with _on(pack.device):
            state = self._state(pack, tensors)
            try:
                return getattr(state.layout, verb)(tensors, *args, state.target(verb))
            except native.StaleLayout as error:
                raise StaleLayout(str(error)) from None
            except native.GradientMismatch:
                raise GradientMismatch from None


def _number(x: float | Tensor, pack: Pack) -> float | Tensor:
    """A number, or one that the kernel reads from device memory."""
    if type(x) is float:
        return x
    if not isinstance(x, Tensor):
        return float(x)
    if x.device == pack.device and x.dtype in (torch.float32, torch.float64):
        return x
    return x.detach().to(pack.device, torch.float64)


def _strengths(rules: Sequence[Penalty], pack: Pack) -> list[float | Tensor]:
    """[rules * max_strengths], 0 where a penalty has no use for one."""
    width, found = load().max_strengths, []
    for rule in rules:
        own = rule.strengths
        if rule.numbers is None:
            own = tuple([_number(s, pack) for s in own])
        found += own if len(own) == width else own + (0.0,) * (width - len(own))
    return found
