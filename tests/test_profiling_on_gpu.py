"""The GPU's side of measuring, with a stand-in for the device; and the verdicts on its figures."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from pyreg.profiling import Row, record
from pyreg.profiling.kernels import kernels
from pyreg.profiling.memory import peak_extra_bytes
from pyreg.profiling.timing import by_turns, host_seconds

NAP = 0.003  # seconds


class Event:
    """torch.cuda.Event, for work that is done when the host gets to the record."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def stand_in(monkeypatch):
    """What torch.cuda is asked for while measuring."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)


def nap() -> None:
    time.sleep(NAP)


def test_times_are_seconds_per_run(stand_in):
    timing = by_turns({"nap": nap}, rounds=3, seconds=1.0, fewest=2, device="cuda")["nap"]
    assert NAP <= timing.median < 100 * NAP
    assert timing.samples == 3
    assert NAP <= host_seconds(nap, 2) < 100 * NAP


def test_host_time_waits_for_the_gpu_between_rows_of_calls(stand_in, monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    assert host_seconds(lambda: told.append("call"), 5, in_a_row=2) > 0
    assert told == [*["wait", "call", "call"] * 2, "wait", "call", "wait"]


def test_memory_is_beyond_what_was_there(stand_in):
    assert peak_extra_bytes(nap, 2, "cuda") == 250


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_run_without_kernels(stand_in):
    if torch.cuda.is_available():
        pytest.skip("a GPU needs no stand-in")
    assert kernels(nap) == []


def row(workload: str, way: str, **measured: object) -> Row:
    return Row(workload, "bfloat16", 291, 10, "elastic_net", way, "gradient", 3, 1.0, **measured)


def test_verdicts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from bench.gpu import targets

    way = "pyreg accumulate_, triton"
    measured = {"host_seconds": 50e-6, "kernels": 1, "extra_bytes": 512}
    rows = [
        row("llama", targets.COPY, gb_per_s=1000.0),
        row("llama", way, gb_per_s=950.0, **measured),
        row("gpt2-xl", targets.COPY, gb_per_s=1000.0),
        row("gpt2-xl", way, gb_per_s=850.0),
        row("experts", way, host_seconds=7e-3),
    ]
    verdicts = {v.what: v for v in targets.judge(rows, ["triton"])}
    found = {what: v.passed for what, v in verdicts.items() if v.passed is not None}
    assert found == {
        f"llama: {way} of the copy's bandwidth": True,
        f"gpt2-xl: {way} of the copy's bandwidth": False,
        f"llama: launches of {way}": True,
        f"llama: host us of {way}": True,
        f"experts: host us of {way}": False,
        f"llama: memory of {way}, MiB": True,
        "pyreg's ways that are wrong": True,
    }
    wrong = row("gpt2-xl", way, wrong=True)
    verdict = targets.judge([wrong], ["triton"])[-1]
    assert (verdict.figure, verdict.passed) == (f"gpt2-xl, elastic_net: {way}", False)
    assert verdicts[f"experts: host us of {way}"].figure == "7000"


def test_the_table_shows_what_a_gpu_adds():
    measured = {"p10": 0.9, "p90": 1.1, "host_seconds": 2e-5, "kernels": 1}
    head, _, line = record.table_of([row("llama", "pyreg value, triton", **measured)]).splitlines()
    assert head.split()[-3:] == ["host", "us", "launches"]
    assert line.split()[-2:] == ["20", "1"]
