"""What measuring adds to what it measures: `python -m bench overhead`; below 2 % is aimed at.

in a sample      what the timing loop takes for a run that does nothing (that it is called is in
                 it), over the median of the way's run
between samples  the time of `by_turns` outside of any run, a progress bar among it, over that
                 inside of them

Writes bench/results/overhead.csv.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyreg
from pyreg import text
from pyreg.profiling import WAYS, WORKLOADS, allocate, environment
from pyreg.profiling.measure import Tell
from pyreg.profiling.timing import Timing, summarize, take_samples, wall_seconds

RESULTS = Path(__file__).parent / "results" / "overhead.csv"
PENALTY = pyreg.ElasticNet(1e-5, 1e-4)
SIZES = ("tiny", "many", "gpt2")  # workloads
SHORTEST = ("pyreg accumulate_", "pyreg prox_", "pyreg value")  # ways, by which it shows most
ROUNDS, SECONDS = 31, 4.0
TARGET = 0.02


@dataclass(frozen=True)
class Row:
    workload: str
    way: str
    seconds: float
    p10: float
    p90: float
    in_a_sample: float  # share
    between_samples: float  # share, of all ways together


def timed(runs: Mapping[str, Callable[[], object]], tell: Tell) -> tuple[dict[str, Timing], float]:
    """As by `by_turns`, and the share of its time outside of the runs."""
    inside = 0.0

    def measure(run: Callable[[], object], times: int) -> float:
        nonlocal inside
        seconds = wall_seconds(run, times)
        inside += seconds * times
        return seconds

    samples: dict[str, list[float]] = {}
    began = time.perf_counter()
    take_samples(samples, runs, ROUNDS, SECONDS, 5, tell, measure)
    whole = time.perf_counter() - began
    return {name: summarize(s) for name, s in samples.items()}, whole / inside - 1


def measure(begin: Callable[[str], Tell]) -> list[Row]:
    rows = []
    for workload in SIZES:
        parameters = allocate(WORKLOADS[workload])
        runs = {way: WAYS[way].prepare(parameters, PENALTY) for way in SHORTEST}
        for run in runs.values():
            run()
        timings, between = timed(runs, begin(workload))
        nothing = timed({"nothing": lambda: None}, begin("nothing"))[0]["nothing"].median
        rows += [
            Row(workload, way, t.median, t.p10, t.p90, nothing / t.median, between)
            for way, t in timings.items()
        ]
    return rows


def table(rows: list[Row]) -> str:
    cells = [
        [
            row.workload,
            row.way,
            f"{1e3 * row.seconds:.4f}",
            f"{100 * row.in_a_sample:.4f} %",
            f"{100 * row.between_samples:.2f} %",
        ]
        for row in rows
    ]
    return text.table(
        ["workload", "way", "ms", "in a sample", "between samples"], cells, right=(2, 3, 4)
    )


def main() -> int:
    try:
        from rich.console import Console

        from pyreg.profiling.progress import progress
    except ImportError:
        rows = measure(lambda title: lambda what, share: None)
    else:  # drawn, as in a terminal, but seen by nobody
        with progress(Console(file=io.StringIO(), force_terminal=True)) as begin:
            rows = measure(begin)
    where = asdict(environment())
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *where])
        writer.writeheader()
        writer.writerows({**asdict(row), **where} for row in rows)
    print(environment(), table(rows), f"written: {RESULTS}", sep="\n\n")
    return 0 if all(max(row.in_a_sample, row.between_samples) < TARGET for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
