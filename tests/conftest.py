"""Fixtures that every test file may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import pyreg
from pyreg import dispatch
from pyreg.backend import cuda
from pyreg.dispatch import backend as backend_by_name

sys.path.insert(0, str(Path(__file__).parent))  # for cases and oracle, under importlib mode

# The same examples in every run: a red build must mean a changed program.
settings.register_profile("pyreg", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("pyreg")

from swept import ON_CPU, ON_GPU, each  # noqa: E402


@pytest.fixture(params=["native", "torch"])
def backend(request):
    """Run the test on each backend that this installation has."""
    if (why := backend_by_name(request.param).missing()) is not None:
        pytest.skip(why)
    with pyreg.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session", params=each([ON_CPU, *ON_GPU]))
def place(request):
    """A backend and the device whose tensors it sweeps."""
    if (why := request.param.missing()) is not None:
        pytest.skip(why)
    return request.param


@pytest.fixture
def native():
    """The compiled module; its settings and torch's thread count are put back afterwards."""
    module = pytest.importorskip("pyreg._native")
    threads, instruction_set = torch.get_num_threads(), module.instruction_set()
    yield module
    torch.set_num_threads(threads)
    module.use_instruction_set(instruction_set)
    module.use_records(True)


@pytest.fixture
def swept(native, monkeypatch):
    """A step of pyreg.optim that is not one native sweep fails."""

    def by_torch(*args):
        raise AssertionError("this step was not one sweep")

    monkeypatch.setattr(pyreg.optim.fused, "step_by_torch", by_torch)


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    """pyreg._cuda over the kernels' code on the host: compiled from cuda/bindings.cpp and a launch
    that runs the kernels in loops, on CPU tensors."""
    pytest.importorskip("pyreg._native")
    pytest.importorskip("pybind11")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])  # (bench is not installed)
        from bench import builds
    try:
        return builds.bindings(tmp_path_factory.mktemp("cuda"), "launch_on_host.cpp", "-O1")
    except FileNotFoundError as why:
        pytest.skip(str(why))
    except subprocess.CalledProcessError as error:
        raise AssertionError(error.stderr[-3000:]) from None


@pytest.fixture
def kernels(on_host, monkeypatch):
    """pyreg's native backend runs the kernels' code on CPU tensors."""
    monkeypatch.setattr(cuda, "load", lambda: on_host)
    monkeypatch.setattr(dispatch, "_NATIVE_ON", {"cpu": ("cuda", "CudaBackend")})
    dispatch.backend.cache_clear()
    cuda._no_gpu.cache_clear()
    cuda._served.clear()
    with pyreg.use_backend("native"):
        yield cuda.CudaBackend()
    dispatch.backend.cache_clear()
    cuda._no_gpu.cache_clear()
    cuda._served.clear()


@pytest.fixture(scope="session")
def run_python():
    """run_python(code) -> what it prints, from a fresh interpreter with this same pyreg."""

    def run(code: str) -> str:
        root = Path(pyreg.__file__).parents[1]
        env = {**os.environ, "PYTHONPATH": str(root)}
        env.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
