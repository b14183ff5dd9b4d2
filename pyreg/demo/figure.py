"""The demo's picture: three panels on the digits, two on the overhead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..profiling import WORKLOADS, Record
from ..profiling.plot import GREY, INK, bars, style, title
from .digits import EPOCHS, Training, largest_differences
from .overhead import MODELS, PENALTIES, SHOWN
from .sparsity import Curve

COLOURS = {
    "no penalty": GREY,
    "the loop": "#e0a458",
    "pyreg.l1": "#3d5a80",
    "reg.prox_": "#c8553d",
}


def draw(
    trainings: Sequence[Training], curves: Sequence[Curve], record: Record, path: Path
) -> None:
    """Write the picture as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic(
        [["same"] * 2 + ["zeros"] * 2 + ["curves"] * 2, [MODELS[0]] * 3 + [MODELS[1]] * 3],
        height_ratios=(0.8, 1),
    )
    _same_path(panels["same"], {t.name: t for t in trainings})
    _zeros(panels["zeros"], trainings)
    _curves(panels["curves"], curves)
    labels = {penalty.name: label for label, penalty in PENALTIES.items()}
    for workload in MODELS:
        axes = panels[workload]
        rows = [row for row in record.rows if row.workload == workload and row.way in SHOWN]
        bars(axes, rows, labels)
        title(axes, f"Cost of a penalty: {WORKLOADS[workload].title}")
    environment = record.environment
    figure.supxlabel(
        f"{environment.cpu}, {environment.threads} threads, torch {environment.torch}, "
        f"pyreg backend {environment.backend}",
        fontsize=9,
        color=GREY,
    )
    figure.savefig(path, dpi=130)


def _same_path(axes, trainings: dict[str, Training]) -> None:
    loop, pyreg = trainings["the loop"], trainings["pyreg.l1"]
    axes.plot(loop.losses, color=COLOURS["the loop"], linewidth=5, label="the loop")
    axes.plot(pyreg.losses, color=COLOURS["pyreg.l1"], linewidth=1, label="pyreg.l1")
    losses, weights = largest_differences(loop, pyreg)
    axes.text(
        0.97,
        0.62,
        f"largest difference in {len(loop.losses):,} steps\n"
        f"loss: {losses:.0e} (relative)\nweights: {weights:.0g}",
        transform=axes.transAxes,
        ha="right",
        va="top",
        color=INK,
    )
    axes.set(xlabel="step", ylabel="loss with L1 (log scale)", yscale="log")
    title(axes, "Digits: pyreg takes the loop's path")
    axes.legend(frameon=False, loc="upper right")
    style(axes)


def _zeros(axes, trainings: Sequence[Training]) -> None:
    epochs = range(1, EPOCHS + 1)
    widths = {"no penalty": 6, "the loop": 4, "pyreg.l1": 1.5, "reg.prox_": 2.5}
    for t in trainings:
        axes.plot(
            epochs,
            [100 * share for share in t.zeros],
            color=COLOURS[t.name],
            linewidth=widths[t.name],
            label=f"{t.name}: {100 * t.zeros[-1]:.0f} % zeros, "
            f"test accuracy {100 * t.accuracies[-1]:.1f} %",
        )
    axes.set(xlabel="epoch", ylabel="weights that are exactly 0, %", ylim=(-4, 165))
    axes.set_yticks(range(0, 101, 25))
    title(axes, "Digits: only the prox makes exact zeros")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    style(axes)


def _curves(axes, curves: Sequence[Curve]) -> None:
    colours = ("#3d5a80", "#e0a458", "#c8553d", "#6a994e")
    for curve, colour, marker in zip(curves, colours, "osD^", strict=True):
        axes.plot(
            [100 * share for share in curve.zeros],
            [100 * share for share in curve.accuracies],
            color=colour,
            marker=marker,
            label=curve.name,
        )
    axes.set(
        xlabel="weights that are exactly 0, %",
        ylabel="test accuracy, %",
        xlim=(-3, 103),
        ylim=(78, 100),
    )
    title(axes, "Digits, Adam: accuracy, zeros")
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    style(axes)
