"""The wheel: built in isolation without torch, used outside the tree."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

USE = """
import pathlib, sys, torch, pyreg
assert pathlib.Path(pyreg.__file__).is_relative_to(sys.argv[1]), pyreg.__file__
print({b.name: b.available for b in pyreg.backends()})
from pyreg.backend import cuda
assert isinstance(cuda.load(), str) or cuda.load().built_with > 0
w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
loss = pyreg.l1([w], 0.5)
loss.backward()
assert loss.item() == 1.5 and w.grad.tolist() == [0.5, -0.5, 0.0]
with pyreg.use_backend(sys.argv[2]):
    assert pyreg.l2([w], 1.0).item() == 5.0
"""


def build(tmp_path: Path, **env: str) -> Path:
    """The wheel that `pip wheel .` builds in an isolated environment, from a copy of the tree."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", str(tmp_path / "out")]
    subprocess.run(command, cwd=source, env={**os.environ, **env}, check=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    return wheel


def site_packages() -> set[str]:
    """Where torch lies."""
    return {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}


def use(wheel: Path, tmp_path: Path, backend: str) -> str:
    """Unpack the wheel, leave the tree, import it from there; the output."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # -S: the development install announces itself in site-packages, and must stay out of this.
    return subprocess.run(
        [sys.executable, "-P", "-S", "-c", USE, str(site), backend],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *site_packages()])},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.wheel
def test_wheel_with_native_library(tmp_path):
    """`pip wheel .` needs no torch to build, and the wheel's native backend works elsewhere."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: see test_wheel_without_compiler")
    wheel = build(tmp_path, PYREG_BUILD="cpu")
    assert "linux" in wheel.name or "macosx" in wheel.name
    assert "'native': True" in use(wheel, tmp_path, "native")


@pytest.mark.wheel
def test_wheel_with_cuda(tmp_path):
    """Where nvcc is, the default build has both modules; without a GPU one of them says so."""
    if shutil.which("c++") is None or shutil.which("nvcc") is None:
        pytest.skip("needs a C++ compiler and nvcc")
    wheel = build(tmp_path, PYREG_CUDA_ARCHS="90")
    with zipfile.ZipFile(wheel) as archive:
        modules = [name for name in archive.namelist() if name.endswith(".so")]
    assert [name.split(".")[0] for name in sorted(modules)] == ["pyreg/_cuda", "pyreg/_native"]
    assert "'native': True" in use(wheel, tmp_path, "native")


@pytest.mark.wheel
def test_wheel_without_compiler(tmp_path):
    """Where nothing can compile, the default build gives the pure package, which says so."""
    wheel = build(tmp_path, CXX="/nonexistent/c++")
    assert "'native': False" in use(wheel, tmp_path, "torch")


@pytest.mark.wheel
def test_wheel_with_build_switched_off(tmp_path):
    """PYREG_BUILD=none gives a wheel for every platform."""
    wheel = build(tmp_path, PYREG_BUILD="none")
    assert wheel.name.endswith("-none-any.whl")
    assert "'native': False" in use(wheel, tmp_path, "torch")
