"""Time against size and against the number of tensors: `python -m bench scaling`.

Two studies: one tensor of 1e4 elements and more, and 1 tensor of 1,000 elements and more. L1 + L2,
value and gradient into `.grad`. Writes bench/results/scaling.json, .csv and, with matplotlib, .png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyreg
from pyreg.profiling import Record, Row, allocate, environment, measure
from pyreg.profiling.memory import free_bytes, memory_needed
from pyreg.profiling.workloads import Workload, many

from . import targets

RESULTS = Path(__file__).parent / "results"
PENALTY = pyreg.ElasticNet(1e-5, 1e-4)
WAYS = ("loop", "foreach", "pyreg in the loss", "pyreg accumulate_")
LIMIT = "dst.add_(src)"
ELEMENTS, TENSORS = "elements", "tensors"  # the studies
EACH = 1000  # elements of a tensor, where tensors are many


def steps(first: int, last: float) -> list[int]:
    """1, 3, 10, 30, ... times the first, and the last."""
    found, factor = [], 1
    while first * factor < last:
        found.append(first * factor)
        factor = factor * 10 // 3 if str(factor)[0] == "3" else factor * 3
    return [*found, int(last)]


def workloads(most_elements: float, most_tensors: int) -> list[Workload]:
    return [
        *(Workload(ELEMENTS, f"{n:,}", (("0", (n,)),)) for n in steps(10_000, most_elements)),
        *(Workload(TENSORS, f"{t:,}", tuple(many(t, EACH))) for t in steps(1, most_tensors)),
    ]


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    for workload in workloads(options.elements, options.tensors):
        print(f"{workload.name}: {workload.title}", file=sys.stderr, flush=True)
        ways = [way for way in WAYS if _fits(workload, way)]
        if not ways:
            continue
        yield from (
            row
            for row in measure(
                allocate(workload), PENALTY, ways, rounds=options.rounds, seconds=options.seconds
            )
            if row.job != "limit" or row.way == LIMIT
        )


def _fits(workload: Workload, way: str) -> bool:
    needed, free = memory_needed(workload, [way]), free_bytes()
    fits = free is None or needed <= free
    if not fits:
        print(f"{way} is not measured: {needed / 1e9:.0f} GB are needed", file=sys.stderr)
    return fits


def draw(record: Record) -> Any:
    """Both studies, and the useful bandwidth: 3 N over the time, against the machine's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pyreg.profiling.plot import GREY, style, title

    colours = dict(zip(WAYS, ("#e0a458", "#c8553d", "#8fb8d6", "#3d5a80"), strict=True))
    figure = Figure(figsize=(16, 5), layout="constrained")
    FigureCanvasAgg(figure)
    size, count, roof = figure.subplots(1, 3)
    for axes, study, x in ((size, ELEMENTS, "elements"), (count, TENSORS, "tensors")):
        for way in (*WAYS, LIMIT):
            rows = [r for r in record.rows if r.workload == study and r.way == way and r.seconds]
            places = [getattr(r, x) for r in rows]
            options = {"color": colours.get(way, GREY), "marker": ".", "label": way}
            if way == LIMIT:
                options |= {"linestyle": "--", "marker": "", "label": f"{way}, the limit"}
            axes.plot(places, [1e3 * r.seconds for r in rows], **options)
            axes.fill_between(
                places, [1e3 * r.p10 for r in rows], [1e3 * r.p90 for r in rows],
                color=options["color"], alpha=0.2, linewidth=0,
            )  # fmt: skip
            if study == ELEMENTS:
                useful = [3 * 4 * r.elements / r.seconds / 1e9 for r in rows]
                roof.plot(places, useful, **options)
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel="milliseconds, median, 10-90 %")
        axes.legend(frameon=False)
        style(axes)
    title(size, "One tensor: time against its size")
    title(count, f"Tensors of {EACH:,} elements: time against their number")
    roof.set(xscale="log", yscale="log", xlabel="elements", ylabel="3 N / time, GB/s")
    title(roof, "Useful bandwidth, and the limit's")
    style(roof)
    environment = record.environment
    figure.supxlabel(
        f"L1 + L2 in float32, value and gradient into .grad; {environment.cpu}, "
        f"{environment.threads} threads, torch {environment.torch}",
        fontsize=9,
        color=GREY,
    )
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench scaling", description=__doc__)
    parser.add_argument("--elements", type=float, default=1e8, help="at most (up to 1e9)")
    parser.add_argument("--tensors", type=int, default=5_000, help="at most (up to 20,000)")
    parser.add_argument("--rounds", type=int, default=11, help="samples per way")
    parser.add_argument("--seconds", type=float, default=2.0, help="at most, per way")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(environment(), tuple(rows_of(options)))
    path = options.out / "scaling.json"
    record.to_json(path)
    record.to_csv(path.with_suffix(".csv"))
    try:
        draw(record).savefig(path.with_suffix(".png"), dpi=90)
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
    print(record.table(), f"written: {path}", sep="\n\n")
    return 0 if targets.agreement(record.rows).passed else 1


if __name__ == "__main__":
    sys.exit(main())
