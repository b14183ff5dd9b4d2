"""The GPU benchmark: gpu.json, gpu.csv and gpu.png in a folder, with every target's verdict.

Written anew after each workload, so that a limit on time costs the later ones alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import torch

import pyreg
from bench import targets as cpu_targets
from pyreg.profiling import (
    WAYS,
    WORKLOADS,
    Environment,
    Record,
    Row,
    Workload,
    allocate,
    environment,
    measure,
)
from pyreg.profiling.ways import serving

from . import targets

PENALTY = pyreg.ElasticNet(1e-5, 1e-4)
# Those with a target first, those whose peers torch.compile takes long for (minutes for the larger
# graphs, where it is not asked for) last. For 18,867 tensors the loop takes a second a run, for the
# 10,000 tiny ones 2.5.
ON_GPU = {
    "llama": ("loop", "foreach"),
    "gpt2-xl": ("loop", "foreach"),
    "experts": ("foreach",),
    "many-tiny": ("foreach",),
    "gpt2": ("loop", "foreach", "compile"),
    "resnet": ("loop", "foreach", "compile"),
}
PYREG = [
    way.name
    for way in WAYS.values()
    if way.name.startswith("pyreg") and not way.name.endswith("no .grad")
    if not way.job.startswith("update")  # (the states of an optimizer would not fit beside llama)
]


def measure_one(
    workload: Workload, peers: tuple[str, ...], backends: list[str], device: torch.device
) -> list[Row]:
    """A row per way; on the CPU from a single run each."""
    on_gpu = device.type == "cuda"
    parameters = allocate(workload, device=device)
    return measure(
        parameters,
        PENALTY,
        [*peers, *PYREG],
        rounds=31 if on_gpu else 1,
        seconds=0.5 if on_gpu else 0.0,
        fewest=5 if on_gpu else 1,
        backends=backends,
    )


def write(out: Path, where: Environment, rows: list[Row], backends: list[str]) -> str:
    """The three files; returns the tables."""
    record = Record(where, tuple(rows))
    verdicts = targets.judge(rows, backends)
    extra = {"targets": [asdict(verdict) for verdict in verdicts]}
    (out / "gpu.json").write_text(json.dumps(record.to_dict() | extra, indent=1) + "\n")
    record.to_csv(out / "gpu.csv")
    return f"{record.table()}\n\n{cpu_targets.table(verdicts)}"


def draw(out: Path, rows: list[Row]) -> None:
    """Bars of every workload, if matplotlib is here."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no plot: {error}")
        return
    from pyreg.profiling.plot import bars, title

    names = list(dict.fromkeys(row.workload for row in rows if row.seconds is not None))
    figure = Figure(figsize=(11, 5 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        bars(axes, [row for row in rows if row.workload == name], {PENALTY.name: "L1 + L2"})
        title(axes, WORKLOADS[name].title)
    figure.savefig(out / "gpu.png", dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0, help="none is begun after these")
    parser.add_argument("--dry-run", action="store_true", help="one tiny workload on CPU tensors")
    parser.add_argument("--commit", help="where the files are no checkout")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    backends = serving(device)
    where = environment(Path(__file__).resolve().parents[2])
    if options.commit:
        where = replace(where, commit=options.commit)
    plan = {"tiny": ("loop", "foreach")} if options.dry_run else ON_GPU
    began, rows, failed = time.monotonic(), [], False
    for name, peers in plan.items():
        if time.monotonic() - began > options.seconds:
            print(f"{name}: not measured, no time left")
            continue
        try:
            rows += measure_one(WORKLOADS[name], peers, backends, device)
        except Exception:  # the other workloads may still be measured
            failed = True
            traceback.print_exc()
        print(f"{name}: {time.monotonic() - began:.0f} s so far", flush=True)
        tables = write(options.out, where, rows, backends)
        if rows:
            draw(options.out, rows)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(tables)
    return 0 if cpu_targets.agreement(rows).passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
