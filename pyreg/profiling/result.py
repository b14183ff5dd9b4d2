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
_STEADY = 2.0  # 90 % over 10 % of the runs; beyond it the machine did something else too
_JOBS = ("gradient", "update + gradient", "prox", "update + prox")  # that regularize a step


@dataclass(frozen=True)
class Profile(Record):
    """The rows of one model and one penalty, with what follows from them."""

    penalty: str
    parameter_bytes: int  # N
    memory_bytes: int  # that profiling was predicted to need
    complete: bool = True  # False: stopped by Ctrl-C

    def best(self, exact_zeros: bool = False, adamw: bool = False) -> Row | None:
        """The way that adds least to a training step; None if none was measured.

        Args:
            exact_zeros: among the ways that take a proximal step, instead of adding a gradient.
            adamw: for who trains with AdamW: among its steps with the penalty inside too.
        """
        return min(self._known(exact_zeros, adamw), key=lambda row: row.adds, default=None)

    def _known(self, exact_zeros: bool, adamw: bool) -> list[Row]:
        job = "prox" if exact_zeros else "gradient"
        jobs = (job, f"update + {job}") if adamw else (job,)
        return [row for row in self.rows if row.adds is not None and row.job in jobs]

    def advice(self) -> str:
        """Which way is best for this model, in one sentence; the next says of a busy machine."""
        first = self.rows[0]
        said, named = [], []
        for exact_zeros, adamw, why in (
            (False, False, "for any optimizer the least cost is"),
            (False, True, "if you train with AdamW,"),
            (True, False, "for exact zeros"),
            (True, True, "for exact zeros with AdamW"),
        ):
            row, known = self.best(exact_zeros, adamw), self._known(exact_zeros, adamw)
            if row is None or (adamw and not any(r.job.startswith("update") for r in known)):
                continue
            if adamw and row in named:
                said.append(f"{why} the same")
                continue
            named.append(row)
            said.append(f"{why} {_CALL[row.way]}, which {self._adds(row)}")
            if alike := self._alike(row, known):
                said[-1] += f", no measurable difference from {' or '.join(alike)}"
        loop = next((row for row in self.rows if row.way == "loop" and row.adds is not None), None)
        if loop is not None and loop not in named:
            said.append(f"the loop {self._adds(loop)}")
        if not said:
            stopped = "" if self.complete else " before it was stopped"
            return f"Nothing was measured that regularizes this model{stopped}."
        size = size_of(self.parameter_bytes)
        of = f"For {first.workload} ({first.tensors:,} tensors, {size}) with {self.penalty}"
        stopped = "" if self.complete else " (stopped before all was measured)"
        return f"{of}, {'; '.join(said)}{stopped}.{self._busy(named)}"

    def _busy(self, named: Sequence[Row]) -> str:
        """A sentence, if what these are judged by differs too much from run to run."""
        judged = [row for row in self.rows if row.job == "limit" or row in named]
        widest = max((r for r in judged if r.p10), key=lambda r: r.p90 / r.p10, default=None)
        if widest is None or widest.p90 <= _STEADY * widest.p10:
            return ""
        spread = f"{milliseconds(widest.p10)} to {milliseconds(widest.p90)} ms (10-90 %)"
        return (
            f" The machine was busy: {widest.way} took {spread}, so that these figures say little; "
            "run again, or on one thread (--threads 1)."
        )

    def _spread(self, row: Row) -> tuple[float, float]:
        """The least and the most that it adds, by 10 and 90 % of it and of what it is beside."""
        if not row.job.startswith("update"):
            return row.p10, row.p90
        update = next(r for r in self.rows if r.way == UPDATE)
        return row.p10 - update.p90, row.p90 - update.p10

    def _alike(self, best: Row, known: Sequence[Row]) -> list[str]:
        """What cannot be told from the best, as calls."""
        _, most = self._spread(best)
        alike = [row for row in known if self._spread(row)[0] <= most]
        calls = dict.fromkeys(_CALL[row.way] for row in alike)
        return [call for call in calls if call != _CALL[best.way]]

    def _adds(self, row: Row) -> str:
        """What it adds, unless that is less than the spread of what it is compared with."""
        least, most = self._spread(row)
        if row.job.startswith("update") and least <= 0 <= most:
            return "makes no measurable difference from torch's fused AdamW without a penalty"
        if row.adds < 0:
            return f"saves {milliseconds(-row.adds)} ms of torch's fused AdamW without a penalty"
        share = "" if row.share is None else f" ({percent(row.share)} of a step)"
        return f"adds {milliseconds(row.adds)} ms{share}"

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
