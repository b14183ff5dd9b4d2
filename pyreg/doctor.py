"""What `pyreg doctor` prints: what is available here, what works, how to get what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import __version__
from .backend import cuda, native
from .dispatch import BackendError, backends, requested, use_backend
from .penalties import ElasticNet
from .profiling.ways import serving
from .reference import compute_dtype
from .regularizer import Regularizer
from .text import table

_SIZES = (0, 1, 7, 4097)  # elements


@dataclass(frozen=True)
class Check:
    """A tiny sweep of one backend, compared with the formulas in float64."""

    backend: str
    device: str
    passed: bool
    detail: str


def examine() -> list[Check]:
    """Each backend that serves here, on each kind of device: accumulate_ and prox_."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [_check(b, device) for device in devices for b in [*serving(device), "torch"]]


def _check(backend: str, device: str) -> Check:
    try:
        errors = [_error(backend, device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    except Exception as error:  # whatever it is, the report goes on
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return Check(backend, device, False, said)
    for off in errors:
        if not off <= 1.0:  # NaN is not
            return Check(backend, device, False, f"{off:.1g} x its bound off")
    return Check(backend, device, True, "agrees")


def _error(backend: str, device: str, dtype: torch.dtype) -> float:
    """The largest error of value, gradient and prox, over 4 units of roundoff (a value: 1e-6)."""
    penalty = ElasticNet(0.5, 0.25)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).to(device, dtype) for n in _SIZES]
    tensors = [t.requires_grad_() for t in tensors]
    exact = [t.detach().double() for t in tensors]
    for t in tensors:
        t.grad = torch.zeros_like(t)
    with use_backend(backend):
        regularizer = Regularizer([(f"{i}", t) for i, t in enumerate(tensors)], penalty)
        value = regularizer.accumulate_().double().item()
        regularizer.prox_(0.5)
    expected = sum(penalty.value(w).item() for w in exact)
    errors = [abs(value - expected) / expected / 1e-6]
    bound = 2 * torch.finfo(dtype).eps
    for t, w in zip(tensors, exact, strict=True):
        for found, right in ((t.grad, penalty.grad(w)), (t.detach(), penalty.prox(w, 0.5))):
            if w.numel():
                off = (found.to(compute_dtype(dtype)).double() - right).abs().max()
                errors.append((off / right.abs().max() / bound).item())
    return float("nan") if any(e != e for e in errors) else max(errors)


def diagnose(checks: Sequence[Check] = ()) -> str:
    """A report as text."""
    lines = [
        f"pyreg {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        "",
        table(
            ["backend", "available", "detail"],
            [[b.name, "yes" if b.available else "no", b.detail] for b in backends()],
        ),
        "",
        f"backend asked for: {_asked_for()}",
        f"threads: {torch.get_num_threads()} (torch.get_num_threads())",
    ]
    module = native.load()
    if isinstance(module, str):
        lines += ["", *_how_to_build()]
    else:
        lines += [
            f"instruction sets: {module.instruction_set()} in use, built in: "
            + ", ".join(module.instruction_sets()),
            f"penalties with native kernels: {', '.join(module.penalties)}",
            "tensor look-up: "
            + (
                "torch's own records"
                if module.reads_records()
                else "Python attributes, 1 us each (records are not as expected; torch < 2.9?)"
            ),
        ]
        if not module.has_openmp():
            lines.append(
                "built without OpenMP: one thread; install libgomp (GCC) or libomp (Clang) and "
                "reinstall pyreg"
            )
    lines += _about_cuda()
    if checks:
        rows = [[c.backend, c.device, "passed" if c.passed else "FAILED", c.detail] for c in checks]
        lines += ["", table(["self-test", "device", "result", "against float64"], rows)]
    return "\n".join(lines)


def _about_cuda() -> list[str]:
    module = cuda.load()
    if isinstance(module, str):
        nvcc = shutil.which("nvcc")
        found = f"nvcc is here: {nvcc}" if nvcc else "nvcc was not found; get the CUDA toolkit"
        return [
            f"native CUDA sweeps: off, {module}; without them Triton serves GPUs",
            f"to build them (nvcc >= 12.1 needed; {found}), in pyreg's source folder:",
            f"    PYREG_BUILD=cuda {sys.executable} -m pip install --force-reinstall --no-deps .",
        ]
    needed, served = module.built_with, module.driver_serves()
    linux = {12: "530", 13: "580"}.get(needed // 1000)
    return [
        f"native CUDA sweeps: architectures {module.architectures}",
        f"driver needed: for CUDA {needed // 1000}"
        + (f" (on Linux {linux} or later)" if linux else "")
        + (f"; here: for CUDA {cuda.version_text(served)}" if served else "; here: none"),
        *(
            f"cuda:{i}, {torch.cuda.get_device_name(i)}: {cuda.unserved(i) or 'served'}"
            for i in range(torch.cuda.device_count())
        ),
    ]


def _asked_for() -> str:
    try:
        name = requested()
    except BackendError as error:
        return str(error)
    source = "PYREG_BACKEND" if os.environ.get("PYREG_BACKEND") else "the default"
    return f"{name} ({source})"


def _how_to_build() -> list[str]:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if compiler is None:
        missing = (
            "No C++ compiler was found. Install one (Debian, Ubuntu: apt install g++; Fedora: dnf "
            "install gcc-c++; macOS: xcode-select --install; conda: conda install cxx-compiler)."
        )
    else:
        missing = f"A C++ compiler is here: {compiler}."
    return [
        "Without the native library, sweeps run tensor by tensor on the torch backend.",
        missing,
        "Then, in pyreg's source folder, build again and see what it says:",
        f"    PYREG_BUILD=cpu {sys.executable} -m pip install --force-reinstall --no-deps -v .",
    ]
