"""Memory: what is free, what profiling needs, the peak of one run beyond what was held before."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .record import size_of
from .ways import WAYS
from .workloads import Workload

_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")


def peak_extra_bytes(
    run: Callable[[], object], tries: int, device: torch.device | str = "cpu"
) -> int | None:
    """Peak memory during a run minus that before it; the least of some tries.

    What a way keeps from an earlier run is not counted: run it once before. On a GPU, the bytes of
    tensors by torch's allocator. On the CPU resident memory, which counts pages that were touched;
    Linux only (VmHWM, reset through clear_refs), None elsewhere. The kernel keeps that count per
    core, exact to a few hundred kB.
    """
    if torch.device(device).type == "cuda":
        return min(_one_on_gpu(run) for _ in range(tries))
    try:
        return min(_one(run) for _ in range(tries))
    except (OSError, KeyError):
        return None


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Bytes that could be had on this device now; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _kilobytes(_MEMORY)["MemAvailable"]
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def memory_needed(workload: Workload, ways: Sequence[str]) -> int:
    """Bytes, at most, beside the model: see `_NEEDS`."""
    own = [_NEEDS.get(name, 0.0) for name in ways]
    states = 2.0 if any(WAYS[name].job.startswith("update") for name in ways) else 0.0
    # Parameters, gradients, the expected result and a copy to restore.
    times = 4.0 + states + max(own, default=0.0)
    return round(times * workload.bytes)


# What a way takes while it runs, in N, for the penalty that takes most.
_NEEDS = {
    "loop": 3.6,
    "loop, no .grad": 3.6,
    "foreach": 4.2,  # two gradients, each with a temporary of its size
    "foreach, no autograd": 1.2,
    "compile": 1.2,
    "compile, no autograd": 0.2,
    "pyreg in the loss": 1.0,
    "pyreg in the loss, no .grad": 1.0,
}


class TooLarge(MemoryError):
    """What is to be profiled needs more memory than is free."""

    def __init__(self, workload: Workload, needed: int, free: int, device: torch.device) -> None:
        super().__init__(
            f"{workload.name}: profiling its {_gb(workload.bytes)} of parameters needs about "
            f"{_gb(needed)} on {device}, and {_gb(free)} are free"
        )
        self.fits = free / needed  # this share of it would


def check_free(workload: Workload, needed: int, device: torch.device) -> None:
    """Raise TooLarge if more is needed than is free."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise TooLarge(workload, needed, free, device)


def _gb(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else size_of(n)


def _one(run: Callable[[], object]) -> int:
    _give_back_free_memory()
    before = _kilobytes(_STATUS)["VmRSS"]
    _REFS.write_text("5")  # the peak starts at what is resident now
    run()
    return max(0, _kilobytes(_STATUS)["VmHWM"] - before)


def _one_on_gpu(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _kilobytes(path: Path) -> dict[str, int]:
    """Bytes by name, of the lines that count in kB."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1:] == ["kB"]}


def _give_back_free_memory() -> None:
    """So that a run that needs memory has to ask for it (glibc keeps what was freed)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
