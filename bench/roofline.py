"""Elements per second against elements per byte: `python -m bench roofline [RECORD [OUT.png]]`.

A way stands where its predicted traffic puts it; the line is the bandwidth of `dst.add_(src)` on
the same memory. What lies below the line loses time to something else: fresh pages, launches, the
host.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyreg.profiling import Record, Row, load
from pyreg.profiling.record import find

RESULTS = Path(__file__).parent / "results"
LIMITS = ("dst.add_(src)", "dst.add_(src) as float32")
PENALTY = "elastic_net"


def points(rows: Sequence[Row], workload: str) -> dict[str, tuple[float, float]]:
    """{way: (elements per byte moved, elements per second)}, into gradients that exist."""
    found = {}
    for row in rows:
        wanted = (row.workload, row.penalty, row.job) == (workload, PENALTY, "gradient")
        if wanted and row.seconds is not None and row.traffic and "no .grad" not in row.way:
            size = 2 if row.dtype in ("bfloat16", "float16") else 4
            found[row.way] = (1 / (row.traffic * size), row.elements / row.seconds)
    return found


def draw(record: Record) -> Any:
    """A panel for each workload."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pyreg.profiling.plot import GREY, INK, PYREG, style, title

    names = [name for name, penalty in record.groups() if penalty == PENALTY]
    figure = Figure(figsize=(6.5 * len(names), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, workload in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        found = points(record.rows, workload)
        limits = [find(record.rows, workload, PENALTY, way) for way in LIMITS]
        bandwidth = max(row.gb_per_s for row in limits if row is not None) * 1e9
        xs = [min(x for x, _ in found.values()) / 1.5, max(x for x, _ in found.values()) * 3]
        axes.plot(xs, [bandwidth * x for x in xs], color=GREY)
        axes.annotate(
            f"{bandwidth / 1e9:.0f} GB/s", (xs[1] / 2, bandwidth * xs[1] / 2), (-6, 6),
            textcoords="offset points", ha="right", color=GREY,
        )  # fmt: skip
        lowest: dict[float, float] = {}  # labels of one column, so that they do not overlap
        for way, (x, y) in sorted(found.items(), key=lambda item: -item[1][1]):
            ours = way.startswith("pyreg")
            axes.plot(x, y, "o", color=PYREG[1] if ours else INK)
            at = min(y, lowest.get(x, y))
            axes.text(x * 1.06, at, way, va="center", fontsize=8, color=INK)
            lowest[x] = at / 1.25
        axes.set(xscale="log", yscale="log", xlim=xs)
        axes.set(xlabel="elements per byte moved (predicted)", ylabel="elements per second")
        title(axes, f"{workload}: L1 + L2, value and gradient")
        style(axes)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench roofline", description=__doc__)
    parser.add_argument(
        "record", nargs="?", type=Path, default=RESULTS / "cpu.json", help="of `python -m bench`"
    )
    parser.add_argument(
        "out", nargs="?", type=Path, default=RESULTS / "roofline.png", help="the picture"
    )
    options = parser.parse_args(argv)
    try:
        record = load(options.record)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    draw(record).savefig(options.out, dpi=90)
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
