"""What was measured and where: rows, the environment, and both as table, JSON and CSV."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..text import table
from .environment import Environment


@dataclass(frozen=True)
class Row:
    """One way on one workload with one penalty. None: not measured, or it does not apply."""

    workload: str
    dtype: str
    tensors: int
    elements: int
    penalty: str
    way: str
    job: str
    traffic: float | None  # predicted, in N
    seconds: float | None = None  # median
    p10: float | None = None
    p90: float | None = None
    samples: int = 0
    gb_per_s: float | None = None  # traffic / seconds
    of_limit: float | None = None  # the limit's time / this time; 1 is as fast as memory allows
    extra_bytes: int | None = None  # peak, beyond parameters and gradients
    value_error: float | None = None  # relative to float64
    element_error: float | None = None  # of gradient or prox, relative to its largest element
    host_seconds: float | None = None  # on a GPU: until the call returns
    kernels: int | None = None  # on a GPU: launched by one run, copies and fills among them
    counted: float | None = None  # on a GPU: traffic by the memory's counters, in N
    first_seconds: float | None = None  # the first run, with whatever it builds or compiles
    adds: float | None = None  # seconds that a training step takes longer by this way
    share: float | None = None  # of such a step, in 0..1, where a step was measured too
    wrong: bool = False  # its result is not the penalty's, and so it was not timed
    note: str = ""  # why it was not measured, or what is wrong with its value


HEAD = ("way", "ms", "10-90 %", "N moved", "GB/s", "of limit", "extra MB", "value error")


def cells(row: Row) -> list[str]:
    """A row as text, under HEAD."""
    if row.seconds is None:
        return [row.way, "-", "", "", "", "", "", ""]
    return [
        row.way,
        milliseconds(row.seconds),
        f"{milliseconds(row.p10)}-{milliseconds(row.p90)}",
        "" if row.traffic is None else f"{row.traffic:g}",
        "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}",
        "" if row.of_limit is None else f"{100 * row.of_limit:.0f} %",
        "-" if row.extra_bytes is None else megabytes(row.extra_bytes),
        "" if row.value_error is None else f"{row.value_error:.0e}",
    ]


# What stands in a table where one of its rows has it.
OPTIONAL: dict[str, Callable[[Row], str | None]] = {
    "adds ms": lambda row: None if row.adds is None else milliseconds(row.adds),
    "of the step": lambda row: None if row.share is None else percent(row.share),
    "host us": lambda row: None if row.host_seconds is None else f"{1e6 * row.host_seconds:.0f}",
    "launches": lambda row: None if row.kernels is None else f"{row.kernels}",
    "N counted": lambda row: None if row.counted is None else f"{row.counted:.2f}",
}


def wrong_of_ours(rows: Sequence[Row]) -> list[Row]:
    """Those of pyreg's own ways whose result is not the penalty's."""
    return [row for row in rows if row.wrong and row.way.startswith("pyreg")]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """HEAD, and what else one of the rows has."""
    return [*HEAD, *(name for name, cell in OPTIONAL.items() if any(cell(row) for row in rows))]


def cells_under(head: Sequence[str], row: Row) -> list[str]:
    """A row as text, under such a head."""
    return [*cells(row), *((OPTIONAL[name](row) or "") for name in head[len(HEAD) :])]


def table_of(rows: Sequence[Row]) -> str:
    """A line for each row, and one for every note."""
    head = columns_of(rows)
    lines = [table(head, [cells_under(head, row) for row in rows], right=range(1, len(head)))]
    return "\n".join(lines + [f"{row.way}: {row.note}" for row in rows if row.note])


def milliseconds(seconds: float) -> str:
    """Three significant digits, no exponent; none below a microsecond."""
    ms = 1e3 * seconds
    size = abs(ms)
    if size < 0.9995:
        return f"{ms:.3f}"
    return f"{ms:.0f}" if size >= 99.95 else f"{ms:.1f}" if size >= 9.995 else f"{ms:.2f}"


def percent(share: float) -> str:
    """One digit behind the point below 10 %."""
    return f"{100 * share:.1f} %" if abs(share) < 0.0995 else f"{100 * share:.0f} %"


def megabytes(n: int) -> str:
    return f"{n / 1e6:.0f}" if n >= 1e7 else f"{n / 1e6:.1f}"


def size_of(n: int) -> str:
    """In MB; in kB below 0.1 MB, in bytes below 1 kB."""
    if n < 1000:
        return f"{n} bytes"
    return f"{n / 1e3:.3g} kB" if n < 1e5 else f"{megabytes(n)} MB"


@dataclass(frozen=True)
class Record:
    """All rows of a session, with the environment that they hold for."""

    environment: Environment
    rows: tuple[Row, ...]

    def groups(self) -> dict[tuple[str, str], list[Row]]:
        """Rows by (workload, penalty), in order."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.workload, row.penalty), []).append(row)
        return groups

    def table(self) -> str:
        """A plain-text table for each workload and penalty."""
        parts = [str(self.environment)]
        for (workload, penalty), rows in self.groups().items():
            parts.append(f"{workload}, {penalty}\n{table_of(rows)}")
        return "\n\n".join(parts)

    def to_dict(self) -> dict:
        return {
            "environment": asdict(self.environment),
            "rows": [asdict(row) for row in self.rows],
        }

    def to_json(self, path: Path | None = None) -> str:
        """JSON text; also written to `path` if given."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        if path is not None:
            path.write_text(text)
        return text

    def to_csv(self, path: Path) -> None:
        """One line per row, each with the hardware and the commit."""
        environment = self.environment
        common = {"cpu": environment.cpu, "threads": environment.threads, "gpu": environment.gpu}
        common |= {"torch": environment.torch, "commit": environment.commit}
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*(f.name for f in fields(Row)), *common])
            writer.writeheader()
            writer.writerows({**asdict(row), **common} for row in self.rows)


def check_writable(what: str, path: Path) -> None:
    """Raise ValueError unless a file can be written there. (Opened: permissions do not say all.)"""
    path = path.resolve()
    existed = os.path.exists(path)
    if not os.path.isdir(path.parent):
        raise ValueError(f"{what}: there is no folder {path.parent}")
    if existed and not (path.is_file() or path.is_dir()):
        return  # a pipe, or a device: that it was opened might be seen
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{what}: {path} cannot be written: {error.strerror}") from error


def find(rows: Sequence[Row], workload: str, penalty: str, way: str) -> Row | None:
    """The row of that workload, penalty and way, if it was measured."""
    for row in rows:
        if (row.workload, row.penalty, row.way) == (workload, penalty, way):
            return row if row.seconds is not None else None
    return None


def load(path: Path) -> Record:
    """What `to_json` wrote, also what an earlier version did.

    Raises:
        ValueError: (naming the file) it is no record.
    """
    try:
        data = json.loads(path.read_text())
        rows = tuple(Row(**{k: v for k, v in row.items() if k in _FIELDS}) for row in data["rows"])
        return Record(Environment(**data["environment"]), rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no record of pyreg.profiling ({error!r})") from error


_FIELDS = {f.name for f in fields(Row)}
