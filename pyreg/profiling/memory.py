"""Memory: what is free, and the peak of one run beyond what the process held before it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch

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
