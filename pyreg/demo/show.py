"""The demo in the terminal: tables of what was found."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..profiling import WORKLOADS, Record, Row
from ..profiling.record import megabytes, milliseconds
from . import sparsity
from .digits import EPOCHS, LAM, Training, largest_differences
from .overhead import PENALTIES
from .sparsity import Curve


def digits_table(console: Console, trainings: Sequence[Training]) -> None:
    table = Table(
        title=f"Digits: 1,797 images, 64-128-64-10 network, {EPOCHS} epochs, L1 of {LAM:g}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("penalty")
    for name in ("loss at the end", "test accuracy", "weights exactly 0"):
        table.add_column(name, justify="right")
    for t in trainings:
        table.add_row(
            t.name,
            f"{t.losses[-1]:.4f}",
            f"{100 * t.accuracies[-1]:.1f} %",
            f"{100 * t.zeros[-1]:.1f} %",
        )
    console.print()
    console.print(table)
    by_name = {t.name: t for t in trainings}
    losses, weights = largest_differences(by_name["the loop"], by_name["pyreg.l1"])
    console.print(
        f"The loop and pyreg.l1 agree in each of {len(trainings[0].losses):,} steps: losses within "
        f"{losses:.0e} of each other, weights {_within(weights)}."
    )
    console.print(
        "The subgradient steps over zero and never stays there; the prox makes exact zeros."
    )


def sparsity_table(console: Console, curves: Sequence[Curve]) -> None:
    table = Table(
        title=f"The same network with Adam, {sparsity.EPOCHS} epochs, penalties attached to it",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("way", no_wrap=True)
    table.add_column("penalty", no_wrap=True)
    for name in ("test accuracy", "weights exactly 0"):
        table.add_column(name, justify="right")
    for curve in curves:
        for i, penalty in enumerate(curve.penalties):
            table.add_row(
                "" if i else curve.name,
                repr(penalty),
                f"{100 * curve.accuracies[i]:.1f} %",
                f"{100 * curve.zeros[i]:.1f} %",
            )
        table.add_section()
    console.print()
    console.print(table)


def _within(difference: float) -> str:
    return f"within {difference:.0e}" if difference else "equal to the last bit"


def overhead_tables(console: Console, record: Record) -> None:
    labels = {penalty.name: label for label, penalty in PENALTIES.items()}
    console.print()
    console.print(Text(str(record.environment)))
    for (workload, penalty), rows in record.groups().items():
        _overhead_table(console, f"{labels[penalty]} on {WORKLOADS[workload].title}", rows)
    console.print(
        "ms: median of one penalty, value and gradient into .grad (prox_ and value: that alone). "
        "GB/s: the traffic that this way should take / time. of limit: time of the torch operation "
        "below the line that moves the least bytes this job needs, on the same memory / time. "
        "+MB: peak memory beyond parameters and gradients. speed-up: over the loop. "
        "torch.compile serves both penalties with one graph (strengths are operands)."
    )


def _overhead_table(console: Console, title: str, rows: Sequence[Row]) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("way", no_wrap=True)
    for name in ("ms", "10-90 %", "GB/s", "of limit", "+MB", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    loop = next(row for row in rows if row.way == "loop")
    limits = False
    for row in rows:
        if row.seconds is None:
            table.add_row(row.way, "-")
            continue
        if row.job == "limit" and not limits:
            table.add_section()
            limits = True
        table.add_row(
            row.way,
            milliseconds(row.seconds),
            f"{milliseconds(row.p10)}-{milliseconds(row.p90)}",
            f"{row.gb_per_s:.1f}",
            f"{100 * row.of_limit:.0f} %",
            "-" if row.extra_bytes is None else megabytes(row.extra_bytes),
            _ratio(loop, row) if row.job == "gradient" else "",
        )
    console.print()
    console.print(table)
    for row in rows:
        if row.note:
            console.print(Text(f"{row.way}: {row.note}"))
        elif row.way == "compile" and row.first_seconds > 5:
            seconds = f"{row.first_seconds:.0f} s"
            console.print(Text(f"compile: the first run, which compiles, took {seconds}"))


def _ratio(loop: Row, row: Row) -> str:
    if loop.seconds is None:
        return ""
    ratio = loop.seconds / row.seconds
    return f"{ratio:.0f} x" if ratio >= 9.95 else f"{ratio:.1f} x"
