"""Builds of csrc beside the installed one.

The native library as the wheel has it, against a -march=native build of the same sources: both are
built here, loaded side by side into one process, and timed by turns on the same memory. The second
is timed as it chooses its kernels, and with its "baseline" kernels, which are then compiled with
-march=native alone; the faster of the two counts.

And the CUDA bindings over a launch that needs no GPU.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from pyreg.profiling import WORKLOADS, allocate
from pyreg.profiling.timing import by_turns

CSRC = Path(__file__).resolve().parents[1] / "csrc"


@dataclass(frozen=True)
class Comparison:
    """Median seconds of each sweep on GPT-2 small, float32."""

    wheel: dict[str, float]
    native: dict[str, float]  # the faster of its two instruction sets
    error: str = ""  # why there are no figures

    @property
    def worst(self) -> float:
        """The largest wheel / native over the sweeps."""
        return max(self.wheel[sweep] / self.native[sweep] for sweep in self.wheel)


def build(folder: Path, flags: str) -> ModuleType:
    """Configure, build and import csrc with these compiler flags."""
    import pybind11  # only here: needed to build, not to measure

    folder.mkdir()
    configure = ["cmake", "-S", str(CSRC), "-B", str(folder), "-G", "Ninja", "-DPYREG_TESTS=OFF"]
    configure += ["-DPYREG_CUDA=OFF"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_FLAGS={flags}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, ["cmake", "--build", str(folder)]):
        subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob("_native*")
    return _imported("_native", path)


def bindings(folder: Path, launch: str, optimize: str) -> ModuleType:
    """pyreg._cuda for CPU tensors: compiled from cuda/bindings.cpp and a launch of csrc/tests.

    Raises:
        FileNotFoundError: there is no C++ compiler.
        CalledProcessError: it fails; `stderr` has its words.
    """
    import pybind11

    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    name = f"_cuda_over_{launch.removesuffix('.cpp')}"
    target = folder / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    defines = ("PYREG_LIBM_FMA", f"PYREG_MODULE={name}", "PYREG_DEVICE_TYPE=1")
    includes = (CSRC, pybind11.get_include(), sysconfig.get_path("include"))
    command = [
        *(compiler, "-std=gnu++17", optimize, "-ffp-contract=off", "-shared", "-fPIC", "-w"),
        *("-fvisibility=hidden", '-DPYREG_DEVICE_NAME="cpu"'),
        *(f"-D{d}" for d in defines),
        *(f"-I{i}" for i in includes),
        *(CSRC / "cuda/bindings.cpp", CSRC / "tests" / launch, "-o", target),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return _imported(name, target)


def _imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(rounds: int = 31, seconds: float = 10.0) -> Comparison:
    """Build both, time both; a build that fails is said in `error`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel = build(Path(folder) / "wheel", "")
            native = build(Path(folder) / "native", "-march=native")
        except ImportError as error:
            return Comparison({}, {}, str(error))
        except (OSError, subprocess.CalledProcessError) as error:
            return Comparison({}, {}, getattr(error, "stderr", "") or str(error))
        return _time(wheel, native, rounds, seconds)


def _time(wheel: ModuleType, native: ModuleType, rounds: int, seconds: float) -> Comparison:
    parameters = allocate(WORKLOADS["gpt2"])
    builds = {
        "wheel": (wheel, wheel.instruction_set()),
        "native": (native, native.instruction_set()),
        "native, baseline": (native, "baseline"),
    }
    runs: dict[str, Callable[[], object]] = {}
    for name, (module, instruction_set) in builds.items():
        layout = module.Layout(parameters.tensors, [0] * len(parameters.tensors), ["elastic_net"])
        strengths = [1e-5, 1e-4] + [0.0] * (module.max_strengths - 2)
        operands = {"value": (), "accumulate": (1.0,), "prox": (1e-3,)}
        for sweep, numbers in operands.items():
            verb = getattr(layout, sweep)
            arguments = (parameters.tensors, strengths, *numbers, torch.get_num_threads())
            runs[f"{name}/{sweep}"] = _run(module, instruction_set, verb, arguments)
    for run in runs.values():
        run()
    seconds_of = {name: timing.median for name, timing in by_turns(runs, rounds, seconds).items()}
    return Comparison(
        wheel={sweep: seconds_of[f"wheel/{sweep}"] for sweep in operands},
        native={
            sweep: min(seconds_of[f"native/{sweep}"], seconds_of[f"native, baseline/{sweep}"])
            for sweep in operands
        },
    )


def _run(
    module: ModuleType, instruction_set: str, sweep: Callable, arguments: tuple
) -> Callable[[], object]:
    def run() -> None:
        module.use_instruction_set(instruction_set)
        sweep(*arguments)

    return run
