"""Builds csrc with CMake and Ninja into the modules pyreg._native and, with nvcc, pyreg._cuda.

PYREG_BUILD = auto (default): build what the compilers found here can, down to the pure package;
              cuda: both, or fail; cpu: _native, or fail; none: neither.
PYREG_CUDA_ARCHS: architectures, as CMAKE_CUDA_ARCHITECTURES takes them, such as "90;120-virtual".
`pyreg doctor` shows what came of it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MODULES = {
    "auto": ["pyreg._native", "pyreg._cuda"],
    "cuda": ["pyreg._native", "pyreg._cuda"],
    "cpu": ["pyreg._native"],
    "none": [],
}
MODE = os.environ.get("PYREG_BUILD") or "auto"
if MODE not in MODULES:
    sys.exit(f"PYREG_BUILD={MODE!r}: expected one of {', '.join(MODULES)}")


class CMakeBuild(build_ext):
    """Each extension is a target of CMake. One that is optional may fail, and is left out then."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # an older build must not pass for this one
        try:
            self._cmake(target.parent, ext.name.rpartition(".")[2])
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{ext.name} was not built: {error}") from error

    def _cmake(self, into: Path, module: str) -> None:
        import pybind11

        with tempfile.TemporaryDirectory() as build:
            configure = [
                *("cmake", "-S", str(ROOT / "csrc"), "-B", build, "-G", "Ninja"),
                "-DPYREG_TESTS=OFF",
                f"-DPYREG_CUDA={'ON' if module == '_cuda' else 'OFF'}",
                f"-DPYREG_CUDA_ARCHS={os.environ.get('PYREG_CUDA_ARCHS', '')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ]
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build, "--target", module], check=True)
            install = ["cmake", "--install", build, "--component", module, "--prefix", str(into)]
            subprocess.run(install, check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    # Not a top-level package: Triton's own project ships one of that name.
    packages=[*find_packages(include=["pyreg", "pyreg.*"]), "pyreg.triton_kernels"],
    package_dir={"pyreg.triton_kernels": "triton_kernels"},
    ext_modules=[Extension(name, sources=[], optional=MODE == "auto") for name in MODULES[MODE]],
    cmdclass={"build_ext": CMakeBuild},
)
