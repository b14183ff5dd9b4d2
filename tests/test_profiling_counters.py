"""Bytes by a GPU's counters, with a stand-in for CUPTI; and what is said where there are none."""

from __future__ import annotations

import ctypes

import pytest
import torch

import pyreg
from pyreg.profiling import WORKLOADS, allocate, counters, measure, record

READ, WRITTEN = 3e9, 1e9
OPENED = {  # by what each is closed
    "ProfilerInitialize": "ProfilerDeInitialize",
    "ProfilerHostInitialize": "ProfilerHostDeinitialize",
    "RangeProfilerEnable": "RangeProfilerDisable",
    "RangeProfilerPushRange": "RangeProfilerPopRange",
}


class Cupti:
    """Answers as cupti_profiler_host.h and cupti_range_profiler.h say; one function may fail."""

    def __init__(self, failing: str = "", **answers: object) -> None:
        self.called: list[str] = []
        self._failing = failing
        self._answers = {"chip": b"GH100", "host": 1, "ranges": 2, "all": 1, "dropped": 0} | answers

    def __getattr__(self, name: str):
        if name == "cuptiGetResultString":
            return self._text
        return lambda pointer: self._answer(name.removeprefix("cupti"), pointer._obj)

    def _text(self, status: int, pointer) -> None:
        assert status == 35
        pointer._obj.value = b"CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"

    def _answer(self, name: str, parameters: ctypes.Structure) -> int:
        self.called.append(name)
        *_, (last, kind) = parameters._fields_
        assert parameters.struct_size == getattr(type(parameters), last).offset + ctypes.sizeof(
            kind
        )
        assert parameters.private is None
        if name == self._failing:
            return 35
        for field, _ in parameters._fields_[2:]:
            if field in self._answers and not getattr(parameters, field):
                setattr(parameters, field, self._answers[field])
            elif field == "size" and not parameters.size:
                parameters.size = 64
        if name == "ProfilerHostEvaluateToGpuValues":
            given = self._answers.get("values", (READ, WRITTEN))
            values = (ctypes.c_double * parameters.metrics).from_address(parameters.values)
            for i in range(parameters.metrics):
                asked = (ctypes.c_char_p * parameters.metrics).from_address(parameters.names)
                assert asked[i] == counters._METRICS[i]
                values[i] = given[i]
        return 0


def count(cupti: object, run=lambda: None) -> list[int]:
    return counters._count(run, cupti, ctypes.c_void_p(7), 0)


@pytest.fixture(autouse=True)
def _nothing_to_wait_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_bytes_of_the_run_between_push_and_pop():
    cupti = Cupti()
    assert count(cupti, lambda: cupti.called.append("the run")) == [READ, WRITTEN]
    at = cupti.called.index("the run")
    assert cupti.called.count("the run") == 1, "no replay"
    around = [cupti.called[at - 1], cupti.called[at + 1]]
    assert around == ["RangeProfilerPushRange", "RangeProfilerPopRange"]
    assert cupti.called[-3:] == [*OPENED.values()][2::-1], "closed in reverse"


def test_a_refusal_is_a_reason_and_leaves_nothing_open():
    """Whichever function refuses."""
    count(asked := Cupti())
    assert len(asked.called) == 19
    for failing in asked.called:
        cupti = Cupti(failing)
        said = f"cupti{failing}: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
        with pytest.raises(counters.Uncounted, match=said):
            count(cupti)
        for opened, closed in OPENED.items():
            was_opened = opened in cupti.called and opened != failing
            assert (closed in cupti.called) == was_opened, (failing, closed)


def test_a_run_that_fails_leaves_nothing_open():
    cupti = Cupti()
    with pytest.raises(ZeroDivisionError):
        count(cupti, lambda: 1 / 0)
    assert set(OPENED.values()) <= set(cupti.called)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"all": 0}, "one pass is not enough"),
        ({"dropped": 1}, "the range was dropped"),
        ({"values": (-1.0, 1.0)}, "the counters read"),
        ({"values": (1.0, float("nan"))}, "the counters read"),
    ],
)
def test_no_figure_is_made_up(answers, reason):
    with pytest.raises(counters.Uncounted, match=reason):
        count(Cupti(**answers))


def test_an_older_cupti():
    with pytest.raises(counters.Uncounted, match="this CUPTI has no cuptiProfilerInitialize"):
        count(object())


def test_no_library(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "0.0")
    with pytest.raises(counters.Uncounted, match=r"libcupti\.so\.0"):
        counters.bytes_moved(lambda: None, torch.device("cuda"))


def measured(monkeypatch, moved) -> tuple[dict[str, record.Row], list[str]]:
    told = []
    monkeypatch.setitem(measure.__globals__, "bytes_moved", moved)
    rows = measure(
        allocate(WORKLOADS["tiny"]), pyreg.L1(1e-3), ["loop", "pyreg accumulate_"], rounds=1,
        seconds=0.0, counters=True, tell=lambda what, share: told.append(what),
    )  # fmt: skip
    return {row.way: row for row in rows}, told


def test_the_rows_have_them_in_n_from_a_last_run_of_each(monkeypatch):
    n = WORKLOADS["tiny"].bytes
    rows, told = measured(monkeypatch, lambda run, device: 3 * n)
    assert rows["loop"].counted == rows["pyreg accumulate_"].counted == 3.0
    first = next(i for i, what in enumerate(told) if what.startswith("counting"))
    assert told[first:] == [*(f"counting bytes of {way}" for way in rows), "done"]
    head, _, line, *_ = record.table_of([*rows.values()]).splitlines()
    assert head.endswith("N counted")
    assert line.endswith("3.00")


def test_a_refusal_is_said_once_and_nothing_else_is_lost(monkeypatch):
    def refused(run, device):
        raise counters.Uncounted("for a reason")

    rows, _ = measured(monkeypatch, refused)
    assert rows["loop"].note == "from here on no bytes were counted: for a reason"
    assert all(row.counted is None and row.seconds > 0 for row in rows.values())
    assert "N counted" not in (table := record.table_of([*rows.values()]))
    assert table.count("for a reason") == 1


@pytest.mark.parametrize("large", [True, False])
def test_counters_that_saw_too_little_are_not_believed(monkeypatch, large):
    """But where it may all be in a cache."""
    n = WORKLOADS["tiny"].bytes
    monkeypatch.setitem(measure.__globals__, "_beyond_caches", lambda parameters: large)
    rows, _ = measured(monkeypatch, lambda run, device: n)
    row = rows["pyreg accumulate_"]
    assert row.counted == (None if large else 1.0)
    assert ("the counters read 1.00 N, and it moves 2 N at least" in row.note) == large


def test_without_a_gpu():
    net = torch.nn.Linear(4, 3)
    result = pyreg.profile(net, pyreg.L1(1e-3), ways=["loop"], seconds=0, rounds=1, counters=True)
    assert "no bytes were counted: cpu is no GPU of NVIDIA's" in result.table()
