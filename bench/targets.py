"""What part 1 must reach, one by one: the target, the figure, whether it is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyreg import text
from pyreg.profiling import Row
from pyreg.profiling.record import find, wrong_of_ours

from .builds import Comparison

BOTH = "elastic_net"  # L1 and L2 together
MIB = 1 << 20
JUDGED = ("gpt2", "gpt2-bf16", "many")  # workloads


@dataclass(frozen=True)
class Verdict:
    what: str
    target: str
    figure: str
    passed: bool | None  # None: not measured


def judge(rows: Sequence[Row], builds: Comparison | None) -> list[Verdict]:
    """Every target, judged from the rows of one session.

    For bfloat16 the limits are torch's own operations on bfloat16, which can be slower than the
    memory; the same bytes taken as float32 are shown too, without a verdict.
    """
    return [
        _times_limit(rows, "gpt2", "pyreg value", "flat.sum()", 1.10),
        _times_limit(rows, "gpt2", "pyreg accumulate_", "dst.add_(src)", 1.10),
        _times_limit(rows, "gpt2-bf16", "pyreg value", "flat.sum()", 1.15),
        _times_limit(rows, "gpt2-bf16", "pyreg accumulate_", "dst.add_(src)", 1.15),
        *(
            replace(
                _times_limit(rows, "gpt2-bf16", way, f"{limit} as float32", 1.15),
                target="(stricter)",
                passed=None,
            )
            for way, limit in (
                ("pyreg value", "flat.sum()"),
                ("pyreg accumulate_", "dst.add_(src)"),
            )
        ),
        _faster(rows, "gpt2", "pyreg accumulate_", 25),
        _faster(rows, "gpt2", "pyreg in the loss", 8),
        _faster(rows, "gpt2", "pyreg in the loss, no .grad", 8, "loop, no .grad"),
        _faster(rows, "many", "pyreg accumulate_", 100),
        _faster(rows, "many", "pyreg in the loss", 8),
        _faster(rows, "many", "pyreg in the loss, no .grad", 8, "loop, no .grad"),
        _memory(rows, "pyreg accumulate_", 0),
        _memory(rows, "pyreg prox_", 0),
        _memory(rows, "pyreg stats", 0),
        _memory(rows, "pyreg in the loss", 0),
        _memory(rows, "pyreg in the loss, no .grad", 1),
        _builds(builds),
        *(_accuracy(rows, workload) for workload in ("gpt2", "gpt2-bf16")),
        agreement(rows),
    ]


def agreement(rows: Sequence[Row]) -> Verdict:
    """Whether what pyreg's ways compute is the penalty; one that is wrong has no figures."""
    wrong = [f"{row.workload}, {row.penalty}: {row.way}" for row in wrong_of_ours(rows)]
    return Verdict("pyreg's ways that are wrong", "none", "; ".join(wrong) or "none", not wrong)


def _verdict(what: str, target: str, figure: float | None, form: str, passed: bool) -> Verdict:
    if figure is None:
        return Verdict(what, target, "not measured", None)
    return Verdict(what, target, form.format(figure), passed)


def _ratio(a: Row | None, b: Row | None) -> float | None:
    return None if a is None or b is None else a.seconds / b.seconds


def _times_limit(rows: Sequence[Row], workload: str, way: str, limit: str, most: float) -> Verdict:
    ratio = _ratio(find(rows, workload, BOTH, way), find(rows, workload, BOTH, limit))
    what = f"{workload}: {way} / {limit}"
    return _verdict(what, f"<= {most:.2f}", ratio, "{:.3f}", ratio is not None and ratio <= most)


def _faster(
    rows: Sequence[Row], workload: str, way: str, least: float, loop: str = "loop"
) -> Verdict:
    ratio = _ratio(find(rows, workload, BOTH, loop), find(rows, workload, BOTH, way))
    what = f"{workload}: {loop} (L1 + L2) / {way}"
    return _verdict(what, f">= {least:g}", ratio, "{:.1f}", ratio is not None and ratio >= least)


def _memory(rows: Sequence[Row], way: str, gradients: int) -> Verdict:
    """Beyond the model, and beyond so many flat buffers of its size."""
    row = find(rows, "gpt2", BOTH, way)
    extra = None
    if row is not None and row.extra_bytes is not None:
        extra = (row.extra_bytes - gradients * 4 * row.elements) / MIB
    beyond = " beyond a flat gradient" if gradients else ""
    what = f"gpt2: memory of {way}{beyond}, MiB"
    return _verdict(what, "<= 1", extra, "{:.2f}", extra is not None and extra <= 1)


def _builds(builds: Comparison | None) -> Verdict:
    what, target = "wheel / -march=native, slowest sweep", "<= 1.05"
    if builds is None or builds.error:
        return Verdict(what, target, "not measured", None)
    return _verdict(what, target, builds.worst, "{:.3f}", builds.worst <= 1.05)


def _accuracy(rows: Sequence[Row], workload: str) -> Verdict:
    row = find(rows, workload, BOTH, "pyreg value")
    error = None if row is None else row.value_error
    what = f"{workload}: value against float64"
    return _verdict(what, "<= 1e-6", error, "{:.1e}", error is not None and error <= 1e-6)


def table(verdicts: Sequence[Verdict]) -> str:
    """One line each."""
    word = {True: "pass", False: "FAIL", None: "-"}
    rows = [[v.what, v.target, v.figure, word[v.passed]] for v in verdicts]
    return text.table(["target", "", "measured", ""], rows, right=(1, 2))
