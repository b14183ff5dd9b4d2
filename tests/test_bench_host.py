"""`python -m bench host` on few tensors: every call is made, over launches that do nothing."""

import csv
import importlib.util
import shutil
from itertools import product

import pytest

CODE = """
from pathlib import Path
from bench import host
host.TENSORS, host.ROUNDS, host.SECONDS, host.RESULTS = (3,), 1, 0.01, Path({path!r})
host.main()
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_every_call_is_made(run_python, tmp_path, monkeypatch):
    pytest.importorskip("pyreg._native")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    path = tmp_path / "host.csv"
    run_python(CODE.format(path=str(path)))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    calls = ("accumulate_", "prox_", "a step of AdamW, prox")
    assert {(row["call"], row["by"]) for row in rows} == {
        *product(calls, ("native", "triton")),
        ("accumulate_", "the look"),
        ("a step of AdamW, prox", "torch fused, no penalty"),
    }
    assert all(0 < float(row["p10"]) <= float(row["seconds"]) for row in rows)
