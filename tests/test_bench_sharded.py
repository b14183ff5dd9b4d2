"""`python -m bench sharded` on few tensors: every way runs, on two ranks, and is recorded."""

import csv
from pathlib import Path

import pytest


def test_every_way_runs(native, tmp_path, monkeypatch):
    pytest.importorskip("torch.distributed.fsdp", reason="torch without torch.distributed")
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from bench import sharded

    path = tmp_path / "sharded.csv"
    sharded.measure(path, {"few": (("w", (5, 3)), ("b", (4,)))}, rounds=2)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows][:2] == [sharded.LIMIT, "loop"]
    assert len({row["way"] for row in rows}) == len(rows) == 10
    assert {(row["tensors"], row["elements"]) for row in rows} == {("2", "19")}
    assert all(0 < float(row["p10"]) <= float(row["seconds"]) for row in rows)
