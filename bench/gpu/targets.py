"""What the sweeps must reach on a GPU, one by one: the target, the figure, whether it is met."""

from __future__ import annotations

from collections.abc import Sequence

from bench.targets import BOTH, MIB, Verdict
from pyreg.profiling import Row
from pyreg.profiling.record import find

COPY = "dst.copy_(src)"
LARGE = ("llama", "gpt2-xl")
HOST = {"llama": 100e-6, "experts": 6e-3}  # seconds at most


def judge(rows: Sequence[Row], backends: Sequence[str]) -> list[Verdict]:
    """Every target of every backend, judged from the rows of one session."""
    verdicts = []
    for b in backends:
        for workload in LARGE:
            for way in (f"pyreg accumulate_, {b}", f"pyreg value, {b}"):
                verdicts.append(_of_copy(rows, workload, way, 0.90))
        for way in (f"pyreg accumulate_, {b}", f"pyreg prox_, {b}", f"pyreg value, {b}"):
            row = find(rows, "llama", BOTH, way)
            kernels = None if row is None else row.kernels
            verdicts.append(_at_most(f"llama: launches of {way}", kernels, 1, "{:.0f}"))
        for workload, most in HOST.items():
            way = f"pyreg accumulate_, {b}"
            row = find(rows, workload, BOTH, way)
            us = None if row is None or row.host_seconds is None else 1e6 * row.host_seconds
            verdicts.append(_at_most(f"{workload}: host us of {way}", us, 1e6 * most, "{:.0f}"))
        for way in (f"pyreg accumulate_, {b}", f"pyreg prox_, {b}", f"pyreg stats, {b}"):
            row = find(rows, "llama", BOTH, way)
            mib = None if row is None or row.extra_bytes is None else row.extra_bytes / MIB
            verdicts.append(_at_most(f"llama: memory of {way}, MiB", mib, 1, "{:.3f}"))
    return verdicts


def _of_copy(rows: Sequence[Row], workload: str, way: str, least: float) -> Verdict:
    """Bytes per second (3 N or N) against those of a copy (2 N)."""
    row, copy = find(rows, workload, BOTH, way), find(rows, workload, BOTH, COPY)
    what, target = f"{workload}: {way} of the copy's bandwidth", f">= {least:.2f}"
    if row is None or copy is None:
        return Verdict(what, target, "not measured", None)
    share = row.gb_per_s / copy.gb_per_s
    return Verdict(what, target, f"{share:.3f}", share >= least)


def _at_most(what: str, figure: float | None, most: float, form: str) -> Verdict:
    if figure is None:
        return Verdict(what, f"<= {most:g}", "not measured", None)
    return Verdict(what, f"<= {most:g}", form.format(figure), figure <= most)
