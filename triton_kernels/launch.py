"""Tables in device memory, scratch and grids: what a sweep needs besides the tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import sweeps
from .penalties import PENALTIES

INTERPRETED = sweeps.INTERPRETED.value
CHUNK = sweeps.CHUNK.value
THREADS = sweeps.THREADS.value
METRIC = sweeps.METRIC.value
DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
PARTIALS = 16384  # numbers aimed at: 128 KiB; many groups take at most twice that
# Registers of a thread on NVIDIA, at which no sweep spills but LogSum's, and proxes of float64 with
# anchors. They say how many programs a multiprocessor (65,536 registers) runs at a time, which is
# the grid: a second wave would leave most of the device idle at the end.
REGISTERS = {
    "value": 96,
    "gradient": 96,
    "prox": 96,
    "accumulate": 128,
    "prox_in_metric": 160,
    "stats": 128,
}
PROGRAMS_ON_ROCM = 8


class Kind(NamedTuple):
    """What a row is compiled for."""

    dtype: torch.dtype
    penalty: str
    beside: torch.dtype  # of its gradient or moment
    origin: torch.dtype | None = None  # of what it is measured from
    weight: torch.dtype | None = None  # of its elements' weights


class Cut(NamedTuple):
    """Rows cut into slots (see sweeps.py): the numbers of its tables."""

    rows: list[int]  # [n_rows + 1, 5]
    groups: list[int]  # [n_groups, 4]
    n_rows: int
    n_groups: int
    slots: int
    run: int  # chunks in a slot
    partials: int  # slots that leave a partial


class Row(NamedTuple):
    dtype: torch.dtype
    numel: int
    kind: int
    group: int
    tensor: int


def cut(rows: Iterable[Row], penalties: list[int], columns: int) -> Cut:
    """Cut rows, sorted by group and at least one for each; totals have `columns` columns.

    An empty row is one chunk without elements, so that its totals are written like any other's.
    """
    rows = list(rows)
    chunks = [max(1, -(-r.numel * r.dtype.itemsize // CHUNK)) for r in rows]
    run = max(1, -(-sum(chunks) // (PARTIALS // columns)))
    table: list[int] = []
    begins = []
    first = 0
    group = -1
    for row, n in zip(rows, chunks, strict=True):
        if row.group != group:
            group = row.group
            first = -(-first // run) * run
            begins.append(first // run)
        table += (first, row.numel, row.kind, group, row.tensor)
        first += n
    slots = -(-first // run)
    table += (slots * run, 0, 0, 0, 0)
    groups: list[int] = []
    ends = [*begins[1:], slots] if begins else []
    partials = 0
    for begin, end, penalty in zip(begins, ends, penalties, strict=True):
        groups += (begin, end, partials, penalty)
        partials += end - begin if end - begin > 1 else 0
    return Cut(table, groups, len(rows), len(penalties), slots, run, partials)


class Queue(NamedTuple):
    """Where a launch goes: a CUDA stream, a stream that is captured into a graph, or the CPU."""

    stream: torch.cuda.Stream | None  # None on the CPU
    capturing: bool

    @property
    def key(self) -> int:
        return -1 if self.capturing else 0 if self.stream is None else self.stream.cuda_stream


def current(device: torch.device) -> Queue:
    if device.type == "cpu":
        return Queue(None, False)
    return Queue(torch.cuda.current_stream(device), torch.cuda.is_current_stream_capturing())


def _warm_up(what: str) -> RuntimeError:
    return RuntimeError(
        f"a CUDA graph is being captured, and {what}: run this sweep once on the same tensors "
        "before the capture, and keep their addresses (zero_grad(set_to_none=False))"
    )


class Table:
    """int64 numbers in device memory, copied on one stream; other streams wait for the copy.

    It never changes: a captured graph goes on reading the one that it was captured with.
    """

    def __init__(self, numbers: Tensor, device: torch.device, queue: Queue) -> None:
        host = numbers if queue.stream is None else numbers.pin_memory()
        self._data = host.to(device, non_blocking=True)
        if queue.stream is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(queue.stream)
            self._ordered = {queue.key}  # streams whose work comes after the copy

    def on(self, queue: Queue) -> Tensor:
        # A capture cannot wait for an event from outside; torch.cuda.graph synchronizes before it.
        if queue.stream is not None and not queue.capturing and queue.key not in self._ordered:
            queue.stream.wait_event(self._copied)
            self._data.record_stream(queue.stream)
            self._ordered.add(queue.key)
        return self._data


class Latest:
    """Numbers of 8 bytes in device memory, copied there when one is another than at the last call.

    `changed` says in an error what it means that one is.
    """

    def __init__(self, device: torch.device, changed: str) -> None:
        self._device, self._changed = device, changed
        self._numbers = b""
        self._table: Table | None = None
        self._captured: list[Table] = []

    def on(self, queue: Queue, numbers: bytes) -> Tensor:
        if self._table is None or numbers != self._numbers:
            if queue.capturing:
                raise _warm_up(self._changed if self._table else "there is no table yet")
            host = torch.frombuffer(bytearray(numbers), dtype=torch.int64)
            self._table = Table(host, self._device, queue)
            self._numbers = numbers
        if queue.capturing and self._table not in self._captured:
            self._captured.append(self._table)
        return self._table.on(queue)


class Plan:
    """A cut, its tables and its scratch on one device. `kinds` is what rows' kinds stand for."""

    def __init__(
        self,
        device: torch.device,
        cut: Cut,
        columns: int,
        kinds: list[Kind],
        names: list[str],
    ) -> None:
        self._device = device
        self._cut = cut
        self._columns = columns
        self._tables: tuple[Table, Table] | None = None
        self._scratch: dict[int, tuple[Tensor, Tensor]] = {}
        self._constants = constants(columns, kinds, names)

    def launch(
        self,
        queue: Queue,
        sweep: str,
        tensors: Tensor,
        gradients: Tensor,
        anchors: Tensor | None,
        strengths: Tensor,
        scale: Tensor,
        out: Tensor | None = None,
        value: Tensor | None = None,
    ) -> None:
        """One kernel launch. Without `out`, a sweep that leaves no totals."""
        cut = self._cut
        if self._tables is None:
            if queue.capturing:
                raise _warm_up("there is no table yet")
            self._tables = tuple(
                Table(torch.tensor(numbers, dtype=torch.int64), self._device, queue)
                for numbers in (cut.rows, cut.groups)
            )
        rows, groups = (table.on(queue) for table in self._tables)
        partials, counters = (rows, rows) if out is None else self._scratch_of(queue)
        sweeps.sweep[(min(cut.slots, programs(self._device, sweep)),)](
            tensors,
            gradients,
            anchors,
            rows,
            groups,
            strengths,
            scale,
            rows if out is None else out,
            rows if value is None else value,
            partials,
            counters,
            cut.slots,
            cut.run,
            cut.n_rows,
            cut.n_groups,
            SWEEP=sweep,
            **self._constants,
            **options(self._device, sweep),
        )

    def _scratch_of(self, queue: Queue) -> tuple[Tensor, Tensor]:
        """Partials and zeroed counters: one pair for each stream, one for captured graphs."""
        if queue.key not in self._scratch:
            if queue.capturing:
                raise _warm_up("there is no scratch memory yet")
            capture = Queue(queue.stream, True)
            for key in {queue.key, capture.key} - self._scratch.keys():
                self._scratch[key] = (
                    torch.empty(
                        max(1, self._cut.partials) * self._columns,
                        dtype=torch.float64,
                        device=self._device,
                    ),
                    torch.zeros(self._cut.n_groups + 1, dtype=torch.int32, device=self._device),
                )
        return self._scratch[queue.key]


def constants(columns: int, kinds: list[Kind], names: list[str]) -> dict:
    """What a kernel is compiled for, SWEEP apart: the dtypes and penalties that occur."""
    used = [PENALTIES[name] for name in names]
    return {
        "COLUMNS": columns,
        "DTYPES": tuple(DTYPES[kind.dtype] for kind in kinds),
        "BESIDE": tuple(DTYPES[kind.beside] for kind in kinds),
        "ORIGINS": tuple(DTYPES.get(kind.origin) for kind in kinds),
        "WEIGHTS": tuple(DTYPES.get(kind.weight) for kind in kinds),
        "PENALTY_OF": tuple(names.index(kind.penalty) for kind in kinds),
        "SUMS": tuple(p.sums for p in used),
        "TERMS": tuple(p.term for p in used),
        "VALUES": tuple(p.value for p in used),
        "GRADS": tuple(p.grad for p in used),
        "PROXES": tuple(p.prox for p in used),
        "SOURCES": _sources(),
    }


@cache
def options(device: torch.device, sweep: str) -> dict[str, int]:
    """Triton's compiler options."""
    if device.type == "cpu":
        return {}
    warps = THREADS // torch.cuda.get_device_properties(device).warp_size
    registers = {} if torch.version.hip else {"maxnreg": REGISTERS[sweep]}
    return {"num_warps": warps, **registers}


@cache
def programs(device: torch.device, sweep: str) -> int:
    """The size of a persistent grid. Results do not depend on it."""
    if device.type == "cpu":
        return 4
    fit = PROGRAMS_ON_ROCM if torch.version.hip else 65536 // (REGISTERS[sweep] * THREADS)
    return fit * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _sources() -> str:
    """A hash of the penalties' code: Triton's cache on disk knows a tuple of functions by name."""
    if INTERPRETED:
        return ""
    keys = [f.cache_key for p in PENALTIES.values() for f in p[1:]]
    return hashlib.sha256("".join(keys).encode()).hexdigest()
