"""Where figures come from: processor, threads, instruction set, versions, commit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..dispatch import backends, requested


@dataclass(frozen=True)
class Environment:
    """One machine, at one time, with one version of everything."""

    time: str  # UTC
    cpu: str
    cores: int  # that this process may use
    threads: int  # that torch, and so pyreg, uses
    memory_bytes: int | None
    gpu: str  # with the versions that matter to it; empty without one
    os: str
    python: str
    torch: str
    pyreg: str
    backend: str  # that sweeps, and with which instruction set
    commit: str  # "+dirty" if files differ from it; empty outside a checkout

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.threads} threads on {self.cores} cores, {self.os}\n"
            + (f"{self.gpu}\n" if self.gpu else "")
            + f"Python {self.python}, torch {self.torch}, pyreg {self.pyreg} "
            f"({self.commit or 'no checkout'}), backend {self.backend}"
        )


def environment(checkout: Path | None = None) -> Environment:
    """The environment now, with the commit of this checkout (by default the one it is run from)."""
    from .. import __version__  # defined once the package is fully imported

    name = requested()
    status = next(b for b in backends() if b.available and name in ("auto", b.name))
    return Environment(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_bytes=_memory(),
        gpu=_gpu(),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        pyreg=__version__,
        backend=f"{status.name} ({status.detail})",
        commit=_commit(checkout or Path(__file__).resolve().parents[2]),
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpu() -> str:
    if not torch.cuda.is_available():
        return ""
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    parts = [about.name, f"{about.multi_processor_count} multiprocessors"]
    parts.append(f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}")
    if importlib.util.find_spec("triton") is not None:
        parts.append(f"Triton {importlib.metadata.version('triton')}")
    return ", ".join(parts)


def _commit(root: Path) -> str:
    if not (root / ".git").exists():
        return ""
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head or 'no commit yet'}{'+dirty' if dirty else ''}"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
