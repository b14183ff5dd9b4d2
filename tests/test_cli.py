"""The command: what it prints, and how it fails."""

import sys

import pytest

import pyreg
from pyreg import cli, doctor
from pyreg.backend import native


def test_doctor_lists_every_backend(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for backend in pyreg.backends():
        assert backend.name in out
        assert backend.detail in out


def test_doctor_says_how_to_get_the_native_library(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: "the compiled module is missing (test)")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    text = doctor.diagnose()
    assert "No C++ compiler was found" in text
    assert "PYREG_BUILD=cpu" in text


def test_doctor_reports_a_wrong_environment_variable(monkeypatch):
    monkeypatch.setenv("PYREG_BACKEND", "cuda13")
    assert "unknown backend 'cuda13'" in doctor.diagnose()


def test_demo_names_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match=r'needs scikit-learn: pip install "pyreg\[demo\]"'):
        cli.main(["demo", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["nonsense"])
    assert error.value.code == 2


def test_triton_without_a_gpu_says_so(run_python):
    """The reason, from backends() and from asking by name."""
    code = """
import os, torch, pyreg
torch.cuda.is_available = lambda: False
triton = {b.name: b for b in pyreg.backends()}["triton"]
print(triton.available, triton.detail)
try:
    pyreg.use_backend("triton").__enter__()
except pyreg.BackendError as error:
    print(error)
"""
    pytest.importorskip("triton")
    out = run_python(code)
    assert "False no GPU" in out
    assert "backend 'triton' is not available: no GPU" in out
