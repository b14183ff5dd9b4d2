"""What the sweeps must reach on a GPU, one by one: the target, the figure, whether it is met."""

from __future__ import annotations

from collections.abc import Sequence

from bench.targets import BOTH, MIB, Verdict, agreement
from pyreg.profiling import Row
from pyreg.profiling.record import find

COPY = "dst.copy_(src)"
NATIVE = "pyreg accumulate_, native"
LARGE = ("llama", "gpt2-xl")
HOST = {"llama": 100e-6, "experts": 6e-3}  # seconds at most
BANDWIDTH = {"native": 0.93, "triton": 0.90}  # of a copy's, at least


def judge(rows: Sequence[Row], backends: Sequence[str]) -> list[Verdict]:
    """Every target of every backend, judged from the rows of one session."""
    verdicts = []
    for b in backends:
        for workload in LARGE:
            for way in (f"pyreg accumulate_, {b}", f"pyreg value, {b}"):
                verdicts.append(_of_copy(rows, workload, way, BANDWIDTH[b]))
        for way in (f"pyreg accumulate_, {b}", f"pyreg prox_, {b}", f"pyreg value, {b}"):
            row = find(rows, "llama", BOTH, way)
            kernels = None if row is None else row.kernels
            verdicts.append(_one(f"llama: launches of {way}", kernels))
        for workload, most in HOST.items():
            way = f"pyreg accumulate_, {b}"
            row = find(rows, workload, BOTH, way)
            us = None if row is None or row.host_seconds is None else 1e6 * row.host_seconds
            most = 60e-6 if (b, workload) == ("native", "llama") else most
            verdicts.append(_at_most(f"{workload}: host us of {way}", us, 1e6 * most, "{:.0f}"))
        for way in (f"pyreg accumulate_, {b}", f"pyreg prox_, {b}", f"pyreg stats, {b}"):
            row = find(rows, "llama", BOTH, way)
            mib = None if row is None or row.extra_bytes is None else row.extra_bytes / MIB
            verdicts.append(_at_most(f"llama: memory of {way}, MiB", mib, 1, "{:.3f}"))
    if {"native", "triton"} <= set(backends):
        for workload in dict.fromkeys(row.workload for row in rows):
            verdicts.append(_ratio(rows, workload, NATIVE, "pyreg accumulate_, triton", most=1.02))
    if "native" in backends:
        verdicts.append(_ratio(rows, "many-tiny", NATIVE, "foreach", most=1 / 20))
    return [*verdicts, agreement(rows)]


def _ratio(rows: Sequence[Row], workload: str, way: str, other: str, most: float) -> Verdict:
    """One way's time over another's."""
    a, b = find(rows, workload, BOTH, way), find(rows, workload, BOTH, other)
    what, target = f"{workload}: {way} / {other}", f"<= {most:g}"
    if a is None or b is None or not a.seconds or not b.seconds:
        return Verdict(what, target, "not measured", None)
    return Verdict(what, target, f"{a.seconds / b.seconds:.3f}", a.seconds / b.seconds <= most)


def _of_copy(rows: Sequence[Row], workload: str, way: str, least: float) -> Verdict:
    """Bytes per second (3 N or N) against those of a copy (2 N)."""
    row, copy = find(rows, workload, BOTH, way), find(rows, workload, BOTH, COPY)
    what, target = f"{workload}: {way} of the copy's bandwidth", f">= {least:.2f}"
    if row is None or copy is None:
        return Verdict(what, target, "not measured", None)
    share = row.gb_per_s / copy.gb_per_s
    return Verdict(what, target, f"{share:.3f}", share >= least)


def _one(what: str, figure: int | None) -> Verdict:
    """(None at all would be a profiler that sees nothing.)"""
    if figure is None:
        return Verdict(what, "1", "not measured", None)
    return Verdict(what, "1", str(figure), figure == 1)


def _at_most(what: str, figure: float | None, most: float, form: str) -> Verdict:
    if figure is None:
        return Verdict(what, f"<= {most:g}", "not measured", None)
    return Verdict(what, f"<= {most:g}", form.format(figure), figure <= most)
