"""The pictures of these documents, by pyreg's own code: `python docs/figures.py [folder]`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import pyreg
from pyreg import reference
from pyreg.profiling.plot import GREY, INK, style, title

VALUE, GRADIENT, PROX = "#3d5a80", "#e0a458", "#c8553d"
STEP = 0.5
EXAMPLES = (
    pyreg.L1(1.0),
    pyreg.L2(0.5),
    pyreg.ElasticNet(0.6, 0.3),
    pyreg.L0(1.0),
    pyreg.LHalf(1.0),
    pyreg.Huber(1.0, 1.0),
    pyreg.LogSum(1.0, 0.5),
    pyreg.MCP(1.0, 2.0),
    pyreg.SCAD(0.8, 3.0),
)


def blank(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    return figure


def penalties() -> Figure:
    """Value, gradient and proximal step of every penalty, of one weight."""
    figure = blank(12, 10.5)
    w = torch.arange(-600, 601, dtype=torch.float64) / 200
    for axes, penalty in zip(figure.subplots(3, 3).flat, EXAMPLES, strict=True):
        values = torch.stack([penalty.value(x) for x in w])
        prox = penalty.prox(w, STEP)
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.plot(w, w, color=GREY, linewidth=0.8, linestyle=":")
        axes.plot(w, broken(values), color=VALUE, linewidth=2, label="value")
        axes.plot(0, 0, ".", color=VALUE)  # the value at 0, also where it jumps
        if reference.FORMULAS[penalty.name].grad is not None:
            axes.plot(w, broken(penalty.grad(w)), color=GRADIENT, label="gradient")
        axes.plot(w, broken(prox), color=PROX, label=f"prox, step {STEP:g}")
        axes.set(xlim=(-3, 3), ylim=(-3, 3))
        title(axes, repr(penalty))
        style(axes)
    figure.axes[0].legend(frameon=False, loc="lower right")
    return figure


def broken(y: torch.Tensor) -> torch.Tensor:
    """With a gap where it jumps, so that no line is drawn across."""
    jumps = (y[1:] - y[:-1]).abs() > 0.15
    y = y.clone()
    y[1:][jumps] = torch.nan
    return y


def geometry() -> Figure:
    """Level sets of the penalty and of a quadratic loss, and where they meet."""
    figure = blank(13, 4.8)
    best = torch.tensor([1.6, 0.7], dtype=torch.float64)
    curvature = torch.tensor([1.0, 1.6], dtype=torch.float64)
    grid = torch.linspace(-1.6, 3.6, 261, dtype=torch.float64)
    x, y = torch.meshgrid(grid, grid, indexing="xy")
    loss = 0.5 * (curvature[0] * (x - best[0]) ** 2 + curvature[1] * (y - best[1]) ** 2)
    cases = {
        "L1: a diamond": (lambda s: pyreg.L1(s), 1.2),
        "L2: a circle": (lambda s: pyreg.L2(s), 0.6),
        "L1 + L2: round sides, corners": (lambda s: pyreg.ElasticNet(s, 0.4 * s), 0.9),
    }
    for axes, (name, (make, strength)) in zip(figure.subplots(1, 3), cases.items(), strict=True):
        penalty = make(strength)
        strengths = torch.cat([torch.zeros(1), torch.logspace(-3, 1, 200)]).tolist()
        path = torch.stack([pyreg.closed_form(best, curvature, make(s)) for s in strengths])
        found = pyreg.closed_form(best, curvature, penalty)
        omega = torch.stack([penalty.value(p) for p in torch.stack([x, y], -1).reshape(-1, 2)])
        omega = omega.reshape(x.shape)
        level = penalty.value(found).item()
        reached = (0.5 * curvature * (found - best) ** 2).sum().item()
        levels = [reached * share for share in (0.1, 0.4, 1.0, 2.0, 3.5, 6.0)]
        widths = [0.7, 0.7, 1.6, 0.7, 0.7, 0.7]  # one of them touches the penalty's set
        axes.contour(x, y, loss, levels=levels, colors=GREY, linewidths=widths)
        axes.contourf(x, y, omega, levels=[-1.0, level], colors=["#8fb8d6"], alpha=0.5)
        axes.contour(x, y, omega, levels=[level], colors=[VALUE])
        axes.plot(*path.T, color=PROX, linewidth=1.5)
        axes.plot(*best, "o", color=INK)
        axes.annotate("least loss", tuple(best.tolist()), (5, 6), textcoords="offset points")
        axes.plot(*found, "o", color=PROX, markersize=8)
        place = ", ".join(f"{v:.2f}" for v in found.tolist())
        axes.annotate(
            f"penalised: ({place})", tuple(found.tolist()), (8, -16),
            textcoords="offset points", ha="left", color=PROX,
        )  # fmt: skip
        axes.axhline(0, color=GREY, linewidth=0.5)
        axes.axvline(0, color=GREY, linewidth=0.5)
        axes.set(xlabel="first weight", ylabel="second weight", aspect="equal")
        title(axes, name)
        style(axes)
    return figure


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (penalties, geometry):
        draw().savefig(folder / f"{draw.__name__}.png", dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
