"""What `pyreg doctor` prints: what is available on this machine, what is missing, how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys

import torch

from . import __version__
from .backend import cuda, native
from .dispatch import BackendError, backends, requested
from .text import table


def diagnose() -> str:
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
                "DLPack exchange API"
                if module.has_exchange_api()
                else "Python attributes (torch >= 2.10 has a faster way)"
            ),
        ]
        if not module.has_openmp():
            lines.append(
                "built without OpenMP: one thread; install libgomp (GCC) or libomp (Clang) and "
                "reinstall pyreg"
            )
    return "\n".join([*lines, *_about_cuda()])


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
