"""Bars of milliseconds, on axes that the caller made; and the figure of a profile.

matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .record import Row, milliseconds, size_of

if TYPE_CHECKING:
    from .result import Profile

INK = "#293241"
GREY = "#8d99ae"
PEER = ("#d9dee6", "#aab4c4")  # by penalty, first to last
PYREG = ("#8fb8d6", "#3d5a80")


def style(axes: Any) -> None:
    """No frame but the axes, dark text."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontweight="bold", color=INK)


def bars(axes: Any, rows: Sequence[Row], labels: Mapping[str, str]) -> None:
    """A group of bars per way, one bar per penalty, on a log axis; whiskers at 10 and 90 %.

    Args:
        axes: matplotlib's.
        rows: of one workload; those not measured say so.
        labels: what to call each penalty, by name.
    """
    ways = list(dict.fromkeys(row.way for row in rows))
    height = 0.8 / len(labels)
    known = [row for row in rows if row.seconds is not None]
    left = min(row.p10 for row in known) * 1e3 / 3
    right = max(row.p90 for row in known) * 1e3
    axes.set_xscale("log")
    axes.set_xlim(left, right * (right / left) ** 0.25)  # room for the text
    for k, (penalty, label) in enumerate(labels.items()):
        for row in rows:
            if row.penalty != penalty:
                continue
            y = ways.index(row.way) + (k - (len(labels) - 1) / 2) * height
            if row.seconds is None:
                if k == 0:
                    middle = ways.index(row.way)
                    axes.text(left * 1.1, middle, _wrapped(row.note), va="center", color=GREY)
                continue
            ms, low, high = 1e3 * row.seconds, 1e3 * row.p10, 1e3 * row.p90
            axes.barh(y, ms - left, height * 0.92, left=left, color=_colour(row, k))
            axes.plot([low, high], [y, y], color=INK, linewidth=1)
            axes.text(
                max(ms, high) * 1.06, y, f"{milliseconds(row.seconds)} ms{label and ', '}{label}",
                va="center", fontsize=8, color=INK,
            )  # fmt: skip
    axes.set_yticks(range(len(ways)), ways)
    axes.set_ylim(len(ways) - 0.5, -0.5)  # those without a bar too
    axes.set_xlabel("milliseconds (log scale), median, 10-90 %")
    style(axes)


def profile_figure(profile: Profile) -> Any:
    """Time and memory of each way, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    rows = [row for row in profile.rows if row.job != "limit"]
    figure = Figure(figsize=(13, 1.6 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    times, memory = figure.subplots(1, 2, width_ratios=(1.6, 1), sharey=True)
    if any(row.seconds is not None for row in rows):
        bars(times, rows, {rows[0].penalty: ""})
    title(times, f"{rows[0].workload}, {profile.penalty}")
    _memory_bars(memory, rows, profile.parameter_bytes)
    title(memory, "Memory beside the model")
    environment = profile.environment
    figure.supxlabel(
        f"{environment.gpu or environment.cpu}, {environment.threads} threads, torch "
        f"{environment.torch}, backend {environment.backend.partition(' (')[0]}",
        fontsize=9,
        color=GREY,
    )
    return figure


def _memory_bars(axes: Any, rows: Sequence[Row], parameter_bytes: int) -> None:
    """On an axis of a tenth of the parameters or more, so that next to nothing looks like it."""
    most = max(0.1 * parameter_bytes, *(row.extra_bytes or 0 for row in rows)) / 1e6
    axes.set_xlim(0, 1.25 * most)
    for y, row in enumerate(rows):
        if row.extra_bytes is not None:
            axes.barh(y, row.extra_bytes / 1e6, 0.74, color=_colour(row, 0))
            axes.text(
                row.extra_bytes / 1e6 + 0.02 * most, y, size_of(row.extra_bytes),
                va="center", fontsize=8, color=INK,
            )  # fmt: skip
    axes.tick_params(labelleft=False)
    axes.set_xlabel("MB, at the peak of one run")
    style(axes)


def _colour(row: Row, k: int) -> str:
    return (PYREG if row.way.startswith("pyreg") else PEER)[k % 2]


def _wrapped(note: str) -> str:
    return "\n".join(textwrap.wrap(note, 44)[:2])
