"""Tables in device memory, scratch and grids: what a sweep needs besides the tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import steps, sweeps, walk
from .penalties import PENALTIES
from .updates import UPDATES

INTERPRETED = walk.INTERPRETED.value
CHUNK = walk.CHUNK.value
THREADS = walk.THREADS.value
METRIC = sweeps.METRIC.value
NUMBERS = steps.NUMBERS.value
STEP_TOTALS = steps.TOTALS.value
DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
ELEMENTARY = {"l1": 1, "l2": 2, "elastic_net": 3}  # those whose prox takes no division of its own
PARTIALS = 16384  # numbers aimed at: 128 KiB; many groups take at most twice that
SHARE = 64  # chunks of a program at most, or one slot, where all multiprocessors have some
# Registers of a thread on NVIDIA, for light kernels and for heavy ones, at which no sweep spills
# but LogSum's of float64, anchored proxes of float64, and steps of float64 or, a few, with three
# states. They say how many programs a multiprocessor (65,536 registers) runs at a time.
REGISTERS = {
    "value": (80, 96),
    "gradient": (64, 64),
    "prox": (80, 128),
    "accumulate": (88, 128),
    "prox_in_metric": (128, 160),
    "stats": (80, 80),
    "step": (128, 128),
}
HEAVY = {"l_half", "log_sum"}  # their maths takes registers; so does float64
STAGES = {"accumulate": 4, "prox": 4}  # blocks whose loads are under way at a time; else one
PROGRAMS_ON_ROCM = 8


class Kind(NamedTuple):
    """What a row is compiled for."""

    dtype: torch.dtype
    penalty: str
    beside: torch.dtype  # of its gradient or moment
    origin: torch.dtype | None = None  # of what it is measured from
    weight: torch.dtype | None = None  # of its elements' weights


class StepKind(NamedTuple):
    """What a row is compiled for in an optimizer's step."""

    dtype: torch.dtype  # of the weights and the gradient
    states: torch.dtype
    update: str
    penalty: str | None
    master: bool = False  # whether there is a float32 master of the weights
    stochastic: bool = False  # whether weights are rounded stochastically


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
    """Where a launch goes: a stream, one that is captured into a graph, or the CPU."""

    device: torch.device
    handle: int  # of the stream; 0 on the CPU
    capturing: bool
    key: int  # captured graphs share memory of their own, whatever their stream

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The same as torch's object, which takes its time; None on the CPU."""
        return None if self.device.type == "cpu" else torch.cuda.current_stream(self.device)


CAPTURED = -1  # the key of a queue that is captured


def current(device: torch.device) -> Queue:
    """(Where that is the current device.)"""
    if device.index is None:  # the CPU; its type takes torch half a microsecond to tell
        return Queue(device, 0, False, 0)
    handle = torch._C._cuda_getCurrentRawStream(device.index)
    capturing = torch.cuda.is_current_stream_capturing()
    return Queue(device, handle, capturing, CAPTURED if capturing else handle)


def _warm_up(what: str) -> RuntimeError:
    return RuntimeError(
        f"a CUDA graph is being captured, and {what}: run this sweep once on the same tensors "
        "before the capture, and keep their addresses (zero_grad(set_to_none=False))"
    )


# What captured graphs go on using. A graph may outlive the layout that it was captured with, and
# nobody says when it is gone.
_kept_for_graphs: dict[int, Tensor] = {}


def keep_for_graphs(*tensors: Tensor) -> None:
    _kept_for_graphs.update((id(t), t) for t in tensors)


class Table:
    """Numbers in device memory, copied on one stream; other streams wait for the copy.

    It never changes, as a captured graph goes on reading it.
    """

    def __init__(self, numbers: Tensor, device: torch.device, queue: Queue) -> None:
        stream = queue.stream
        host = numbers if stream is None else numbers.pin_memory()
        self._data = host.to(device, non_blocking=True)
        self._ordered = {queue.key}  # streams whose work comes after the copy
        if stream is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(stream)

    def on(self, queue: Queue) -> Tensor:
        if queue.capturing:
            # It cannot wait for an event from outside; torch.cuda.graph synchronizes before it.
            keep_for_graphs(self._data)
        elif queue.key not in self._ordered:
            if (stream := queue.stream) is not None:
                stream.wait_event(self._copied)
                self._data.record_stream(stream)
            self._ordered.add(queue.key)
        return self._data


class Latest:
    """Numbers of 8 bytes in device memory, copied there when one is another than at the last call.

    Errors say what they are, and what it means that one is another.
    """

    def __init__(
        self,
        device: torch.device,
        what: str,
        dtype: torch.dtype = torch.float64,
        changed: str = "have changed",
    ) -> None:
        self._device, self.what, self.dtype, self._changed = device, what, dtype, changed
        self._numbers = b""
        self._table: Table | None = None

    def on(self, queue: Queue, numbers: bytes) -> Tensor:
        if self._table is None or numbers != self._numbers:
            if queue.capturing:
                changed = f"{self.what} {self._changed}"
                raise _warm_up(changed if self._table else "there is no table yet")
            host = torch.frombuffer(bytearray(numbers), dtype=self.dtype)
            self._table = Table(host, self._device, queue)
            self._numbers = numbers
        return self._table.on(queue)


class Ready(NamedTuple):
    """A kernel that is compiled, and what does not change from launch to launch."""

    run: Callable[..., None]  # it, on a grid
    arguments: dict[str, Any]  # by name, in order; None for those that change


class Plan:
    """A cut, its tables and its scratch on one device. `constants` is what a kernel is compiled
    for, by penalties of these names, and totals have `columns` columns."""

    def __init__(
        self, device: torch.device, cut: Cut, columns: int, names: list[str], constants: dict
    ) -> None:
        self._device = device
        self._cut = cut
        self._columns = columns
        self._tables: tuple[Table, Table] | None = None
        self._scratch: dict[int, tuple[Tensor, Tensor]] = {}
        self._heavy = is_heavy(names, constants)
        self._constants = constants
        self._ready: dict[tuple, Ready] = {}

    def launch(
        self,
        queue: Queue,
        sweep: str,
        operands: dict[str, Tensor | int | None],
        out: Tensor | None = None,
        value: Tensor | None = None,
    ) -> None:
        """One kernel launch, of operands by name and those that all kernels have. Without `out`, a
        sweep that leaves no totals."""
        cut = self._cut
        if self._tables is None:
            if queue.capturing:
                raise _warm_up("there is no table yet")
            self._tables = tuple(
                Table(torch.tensor(numbers, dtype=torch.int64), self._device, queue)
                for numbers in (cut.rows, cut.groups)
            )
        rows, groups = [table.on(queue) for table in self._tables]
        # What Triton would compile it for, plans apart: their constants are one plan's.
        kind = (sweep, *[getattr(x, "dtype", None) for x in (*operands.values(), value)])
        if out is None:
            out = value = partials = counters = rows
        else:
            partials, counters = self._scratch_of(queue)
        arguments = {
            **operands,
            "rows": rows,
            "groups": groups,
            "out": out,
            "value": value,
            "partials": partials,
            "counters": counters,
        }
        if (ready := self._ready.get(kind)) is None:
            kernel = steps.step if sweep == "step" else sweeps.sweep
            share = share_of(self._device, sweep, self._heavy, cut)
            grid = (-(-cut.slots // share), 1, 1)
            fixed = {
                "slots": cut.slots,
                "share": share,
                "run": cut.run,
                "n_rows": cut.n_rows,
                "n_groups": cut.n_groups,
                **self._constants,
            }
            if sweep != "step":
                fixed |= {"SWEEP": sweep, "STAGES": stages(sweep, self._heavy)}
            made = options(self._device, sweep, self._heavy)
            if (compiled := kernel[grid](**arguments, **fixed, **made)) is not None:
                in_order = {name: fixed.get(name) for name in kernel.arg_names}
                self._ready[kind] = Ready(compiled[grid], in_order)
            return
        # Triton's own way here looks at every argument for some 40 us.
        ready.run(*(ready.arguments | arguments).values(), stream=queue.handle)

    def _scratch_of(self, queue: Queue) -> tuple[Tensor, Tensor]:
        """Partials and zeroed counters: one pair for each stream, one for captured graphs."""
        if queue.key not in self._scratch:
            if queue.capturing:
                raise _warm_up("there is no scratch memory yet")
            for key in {queue.key, CAPTURED} - self._scratch.keys():
                self._scratch[key] = (
                    torch.empty(
                        max(1, self._cut.partials) * self._columns,
                        dtype=torch.float64,
                        device=self._device,
                    ),
                    torch.zeros(self._cut.n_groups + 1, dtype=torch.int32, device=self._device),
                )
        if queue.capturing:
            keep_for_graphs(*self._scratch[queue.key])
        return self._scratch[queue.key]


def constants(columns: int, kinds: list[Kind], names: list[str]) -> dict:
    """What a sweep is compiled for, SWEEP apart: the dtypes and penalties that occur."""
    return {
        "COLUMNS": columns,
        "DTYPES": tuple(DTYPES[kind.dtype] for kind in kinds),
        "BESIDE": tuple(DTYPES[kind.beside] for kind in kinds),
        "ORIGINS": tuple(DTYPES.get(kind.origin) for kind in kinds),
        "WEIGHTS": tuple(DTYPES.get(kind.weight) for kind in kinds),
        "PENALTY_OF": tuple(names.index(kind.penalty) for kind in kinds),
        **_penalties(names),
    }


def step_constants(kinds: list[StepKind], names: list[str], prox: bool) -> dict:
    """The same for an optimizer's step."""
    updates = [UPDATES[kind.update] for kind in kinds]
    return {
        "DTYPES": tuple(DTYPES[kind.dtype] for kind in kinds),
        "STATE_DTYPES": tuple(DTYPES[kind.states] for kind in kinds),
        "MASTERED": tuple(kind.master for kind in kinds),
        "STOCHASTIC": tuple(kind.stochastic for kind in kinds),
        "PENALISED": tuple(kind.penalty is not None for kind in kinds),
        "PENALTY_OF": tuple(names.index(kind.penalty or names[0]) for kind in kinds),
        "KEPT": tuple(update.states for update in updates),
        "RATIOS": tuple(update.ratio for update in updates),
        "UPDATES": tuple(update.block for update in updates),
        "VARIANTS": tuple(update.variant[0] for update in updates),
        "VARIANTS_TOO": tuple(update.variant[1] for update in updates),
        "WITH": "prox" if prox else "grad",
        "ELEMENTARY": tuple(ELEMENTARY.get(name, 0) for name in names),
        **_penalties(names),
    }


def _penalties(names: list[str]) -> dict:
    used = [PENALTIES[name] for name in names]
    return {
        "SUMS": tuple(p.sums for p in used),
        "TERMS": tuple(p.term for p in used),
        "VALUES": tuple(p.value for p in used),
        "GRADS": tuple(p.grad for p in used),
        "PROXES": tuple(p.prox for p in used),
        "SOURCES": _sources(),
    }


def is_heavy(names: list[str], constants: dict) -> bool:
    return not HEAVY.isdisjoint(names) or tl.float64 in constants["DTYPES"]


@cache
def options(device: torch.device, sweep: str, heavy: bool) -> dict[str, int]:
    """Triton's compiler options."""
    if device.type == "cpu":
        return {}
    warps = THREADS // torch.cuda.get_device_properties(device).warp_size
    registers = {} if torch.version.hip else {"maxnreg": REGISTERS[sweep][heavy]}
    return {"num_warps": warps, **registers}


def stages(sweep: str, heavy: bool) -> int:
    """Blocks of a program whose loads are under way at a time, through shared memory if several."""
    return 1 if heavy or torch.version.hip else STAGES.get(sweep, 1)


def share_of(device: torch.device, sweep: str, heavy: bool, cut: Cut) -> int:
    """The slots of a program, on which results do not depend.

    Programs begin in the order of memory. Their shares are short, so that what runs at a time lies
    close together, which makes memory faster; and not so short that beginning is what they do.
    """
    if device.type == "cpu":
        return max(1, -(-cut.slots // 4))
    return max(1, min(SHARE // cut.run, -(-cut.slots // _at_a_time(device, sweep, heavy))))


@cache
def _at_a_time(device: torch.device, sweep: str, heavy: bool) -> int:
    """Programs that run at a time."""
    fit = PROGRAMS_ON_ROCM if torch.version.hip else 65536 // (REGISTERS[sweep][heavy] * THREADS)
    return fit * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _sources() -> str:
    """A hash of the penalties' and updates' code: Triton's cache on disk knows a tuple of functions
    by name."""
    if INTERPRETED:
        return ""
    functions = [f for p in PENALTIES.values() for f in p[1:]]
    keys = [f.cache_key for f in (*functions, *(u.block for u in UPDATES.values()))]
    return hashlib.sha256("".join(keys).encode()).hexdigest()
