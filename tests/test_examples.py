"""The programs in examples/ do what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


def test_the_digits_at_90_percent_zeros(native, examples):
    """Within one point of the dense network's accuracy, on images that neither has seen."""
    pytest.importorskip("sklearn")
    import sparse_digits

    (no_zeros, dense), (zeros, sparse) = map(sparse_digits.train, (0.0, sparse_digits.LAM))
    assert no_zeros == 0
    assert dense > 0.95
    assert zeros >= 0.9
    assert sparse >= dense - 0.01


def test_the_transformer(native, examples, tmp_path, monkeypatch):
    """A few steps: it learns, makes zeros, and writes its curves and their picture."""
    pytest.importorskip("matplotlib")
    import char_transformer

    arguments = ["char_transformer.py", "--steps", "6", "--lam", "2e-4", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(char_transformer, "EVERY", 3)
    char_transformer.main()
    dense, sparse = json.loads((tmp_path / "curves.json").read_text())
    for curve in (dense, sparse):
        assert curve["steps"] == [3, 6]
        assert curve["loss"][1] < curve["loss"][0] < 5  # log 129 = 4.86 at random
    assert dense["zeros"] == [0.0, 0.0]
    assert sparse["zeros"][1] > 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000
