"""Builds csrc with CMake and Ninja into the module pyreg._native.

PYREG_BUILD = auto (default): build it where a compiler is, and else install the pure package;
              cpu: build it or fail; none: do not build it.
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
MODES = ("auto", "cpu", "none")
MODE = os.environ.get("PYREG_BUILD") or "auto"
if MODE not in MODES:
    sys.exit(f"PYREG_BUILD={MODE!r}: expected one of {', '.join(MODES)}")


class CMakeBuild(build_ext):
    """One extension, built by CMake. In auto mode it is optional: without it, a pure package."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # an older build must not pass for this one
        try:
            self._cmake(target.parent)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"pyreg's native library was not built: {error}") from error

    def _cmake(self, into: Path) -> None:
        import pybind11

        with tempfile.TemporaryDirectory() as build:
            configure = [
                *("cmake", "-S", str(ROOT / "csrc"), "-B", build, "-G", "Ninja"),
                "-DPYREG_TESTS=OFF",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ]
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build], check=True)
            subprocess.run(["cmake", "--install", build, "--prefix", str(into)], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


NATIVE = Extension("pyreg._native", sources=[], optional=MODE == "auto")

setup(
    # Not a top-level package: Triton's own project ships one of that name.
    packages=[*find_packages(include=["pyreg", "pyreg.*"]), "pyreg.triton_kernels"],
    package_dir={"pyreg.triton_kernels": "triton_kernels"},
    ext_modules=[] if MODE == "none" else [NATIVE],
    cmdclass={"build_ext": CMakeBuild},
)
