"""What a profile found, and what follows from it: what each way adds to a step, which is best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .record import Record, Row, milliseconds, percent, size_of, table_of
from .ways import STEP, UPDATE

# What to write in a program, by way.
_CALL = {
    "loop": "the loop",
    "loop, no .grad": "the loop",
    "foreach": "torch's foreach operations",
    "foreach, no autograd": "torch's foreach operations into .grad",
    "compile": "torch.compile of the loop",
    "compile, no autograd": "torch.compile of value and gradient into .grad",
    "pyreg in the loss": "pyreg.penalty(...) in the loss",
    "pyreg in the loss, no .grad": "pyreg.penalty(...) in the loss",
    "pyreg accumulate_": "reg.attach(optimizer) or reg.accumulate_()",
    "pyreg prox_": "reg.attach(optimizer, mode='prox') or reg.prox_(step)",
    "pyreg AdamW, grad": "pyreg.optim.AdamW(..., regularizer=reg)",
    "pyreg AdamW, prox": "pyreg.optim.AdamW(..., regularizer=reg, mode='prox')",
}
_JOBS = ("gradient", "update + gradient", "prox", "update + prox")  # that regularize a step


@dataclass(frozen=True)
class Profile(Record):
    """The rows of one model and one penalty, with what follows from them."""

    penalty: str
    parameter_bytes: int  # N
    memory_bytes: int  # that profiling was predicted to need
    complete: bool = True  # False: stopped by Ctrl-C

    def best(self, exact_zeros: bool = False) -> Row | None:
        """The way that adds least to a training step; None if none was measured.

        Args:
            exact_zeros: among the ways that take a proximal step, instead of adding a gradient.
        """
        jobs = ("prox", "update + prox") if exact_zeros else ("gradient", "update + gradient")
        known = [row for row in self.rows if row.adds is not None and row.job in jobs]
        return min(known, key=lambda row: row.adds, default=None)

    def advice(self) -> str:
        """Which way is best for this model, in one sentence."""
        first = self.rows[0]
        found = {"the least cost is": self.best(), "for exact zeros": self.best(exact_zeros=True)}
        update = next((row for row in self.rows if row.way == UPDATE), None)
        said = [
            f"{why} {_CALL[row.way]}, which {_adds(row, update)}"
            for why, row in found.items()
            if row
        ]
        loop = next((row for row in self.rows if row.way == "loop" and row.adds is not None), None)
        if loop not in (None, self.best()):
            said.append(f"the loop {_adds(loop, update)}")
        if not said:
            stopped = "" if self.complete else " before it was stopped"
            return f"Nothing was measured that regularizes this model{stopped}."
        size = size_of(self.parameter_bytes)
        of = f"For {first.workload} ({first.tensors:,} tensors, {size}) with {self.penalty}"
        stopped = "" if self.complete else " (stopped before all was measured)"
        return f"{of}, {'; '.join(said)}{stopped}."

    def table(self) -> str:
        """What was measured, one line a way, and the advice."""
        head = f"{self.rows[0].workload}, {self.penalty}"
        return f"{self.environment}\n\n{head}\n{table_of(self.rows)}\n\n{self.advice()}"

    def plot(self, path: Path | str | None = None) -> Any:
        """matplotlib's figure: time and memory of each way; also written to `path` if given.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plot import profile_figure  # imports matplotlib

        figure = profile_figure(self)
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure

    def to_dict(self) -> dict:
        own = {
            "penalty": self.penalty,
            "parameter_bytes": self.parameter_bytes,
            "memory_bytes": self.memory_bytes,
            "complete": self.complete,
            "advice": self.advice(),
        }
        return super().to_dict() | own

    def to_json(self, path: Path | str | None = None) -> str:
        return super().to_json(None if path is None else Path(path))


def _adds(row: Row, update: Row | None) -> str:
    """What it adds, unless that is less than the spread of what it is compared with."""
    if row.job.startswith("update") and row.p10 <= update.p90 and update.p10 <= row.p90:
        return "adds nothing to torch's fused AdamW that its spread would not hide"
    if row.adds < 0:
        return f"saves {milliseconds(-row.adds)} ms of torch's fused AdamW"
    share = "" if row.share is None else f" ({percent(row.share)} of a step)"
    return f"adds {milliseconds(row.adds)} ms{share}"


def added_up(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with what each way adds to a step."""
    seconds = {row.way: row.seconds for row in rows if row.seconds is not None}
    step, update = seconds.get(STEP), seconds.get(UPDATE)
    found = []
    for row in rows:
        base = update if row.job.startswith("update") else 0.0
        if row.seconds is not None and base is not None and row.job in _JOBS:
            adds = row.seconds - base
            row = replace(row, adds=adds, share=step and adds / (step + adds))
        found.append(row)
    return tuple(found)
