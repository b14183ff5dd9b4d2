"""What pyreg.profile writes: JSON, a trace, a plot, a report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from profiled import FEW, L1, model

import pyreg


def test_json_and_trace(tmp_path):
    trace = tmp_path / "trace.json"
    result = pyreg.profile(model(), L1, ways=["loop", "pyreg prox_"], trace=trace, **FEW)
    text = result.to_json(tmp_path / "profile.json")
    read = json.loads((tmp_path / "profile.json").read_text())
    assert read == json.loads(text)
    assert read["advice"] == result.advice()
    assert [row["way"] for row in read["rows"]] == [row.way for row in result.rows]
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"loop", "pyreg prox_"} <= names


def test_the_plot_has_a_bar_for_each_way(tmp_path):
    pytest.importorskip("matplotlib")
    result = pyreg.profile(model(), L1, ways=["loop", "pyreg accumulate_"], **FEW)
    figure = result.plot(tmp_path / "p.png")
    times, memory = figure.axes
    assert [label.get_text() for label in times.get_yticklabels()] == ["loop", "pyreg accumulate_"]
    assert len(times.patches) == 2
    assert len(memory.patches) == sum(
        row.extra_bytes is not None for row in result.rows if row.job != "limit"
    )
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_plot_shows():
    """Medians and memory as long as they are, whiskers from 10 to 90 %, pyreg in its own colour."""
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_hex

    from pyreg.profiling.plot import PEER, PYREG

    result = pyreg.profile(model(), L1, ways=["loop", "pyreg accumulate_"], **FEW)
    rows = tuple(
        replace(row, seconds=2e-3, p10=1e-3, p90=5e-3, extra_bytes=3_000_000) for row in result.rows
    )
    times, memory = replace(result, rows=rows).plot().axes
    assert [bar.get_x() + bar.get_width() for bar in times.patches] == pytest.approx([2.0, 2.0])
    assert [list(line.get_xdata()) for line in times.lines] == [[1.0, 5.0]] * 2
    assert [bar.get_width() for bar in memory.patches] == [3.0, 3.0]
    for axes in (times, memory):
        assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [PEER[0], PYREG[0]]


def test_the_report_has_the_notes():
    pytest.importorskip("matplotlib")
    from pyreg.profiling.report import html

    result = pyreg.profile(model(), pyreg.L0(1e-3), ways=["loop", "pyreg prox_"], **FEW)
    assert "<li>loop: not timed: L0 has no gradient</li>" in html(result)


def test_the_plot_has_room_for_what_was_not_measured():
    """And next to no memory has no bar to speak of."""
    pytest.importorskip("matplotlib")
    ways = ["loop", "foreach", "pyreg accumulate_", "pyreg prox_"]
    result = pyreg.profile(model(), pyreg.L0(1e-3), ways=ways, **FEW)
    rows = [replace(row, extra_bytes=1) for row in result.rows]
    times, memory = replace(result, rows=tuple(rows)).plot().axes
    for axes in (times, memory):
        assert axes.get_ylim() == (3.5, -0.5)
    notes = [text for text in times.texts if "L0 has no gradient" in text.get_text()]
    assert [text.get_position()[1] for text in notes] == [0, 1, 2]
    assert memory.get_xlim()[1] > 1e-7 * result.parameter_bytes
