"""Every penalty against the machine's limit: `python -m bench.penalties`, by default on GPT-2 small
in float32 on the CPU.

Per penalty `accumulate_`, and the prox in an optimizer's metric (reads w and a moment, writes w);
both move 3 N, and so does `dst.add_(src)` on the same memory. One process, by turns, medians; each
result is checked against the formulas in float64 before it is timed. Writes
bench/results/penalties.csv.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import pyreg
from pyreg import reference, text
from pyreg.metric import Metric
from pyreg.penalties import PENALTIES, Penalty
from pyreg.profiling import WORKLOADS, Environment, allocate, environment
from pyreg.profiling.parameters import Parameters
from pyreg.profiling.timing import by_turns

RESULTS = Path(__file__).parent / "results" / "penalties.csv"
EXAMPLES = (
    pyreg.L1(1e-5),
    pyreg.L2(1e-4),
    pyreg.ElasticNet(1e-5, 1e-4),
    pyreg.L0(1e-5),
    pyreg.LHalf(1e-5),
    pyreg.Huber(1e-5, 1e-2),
    pyreg.LogSum(1e-5, 1e-2),
    pyreg.MCP(1e-5, 300.0),
    pyreg.SCAD(1e-5, 300.0),
)
TRANSCENDENTAL = {"l_half", "log_sum"}  # a root or a logarithm an element: no target
TARGETS = {"accumulate_": 1.15, "prox in a metric": 1.10}  # on the CPU
LIMIT = "dst.add_(src)"
CHECKED = 1 << 20  # elements


@dataclass(frozen=True)
class Row:
    workload: str
    penalty: str
    sweep: str
    seconds: float
    p10: float
    p90: float
    over_limit: float  # time / the limit's
    target: float | None


def sweeps_of(parameters: Parameters, moments: Tensor, penalty: Penalty) -> Iterator[tuple]:
    """(name, run), after a look at the result of one run."""
    reg = pyreg.Regularizer(parameters.named, penalty)
    metrics = {}
    for p in parameters.tensors:
        at = p.storage_offset()
        metrics[id(p)] = Metric(moments[at : at + p.numel()].view(p.shape), 1e-3, 1.0, 1e-8)
    before = parameters.weights.clone()
    w = before[:CHECKED].double()
    if reference.FORMULAS[penalty.name].grad is not None:
        parameters.gradients.zero_()
        reg.accumulate_()
        _check(parameters.gradients[:CHECKED], penalty.grad(w), f"{penalty}: gradient")
        yield "accumulate_", reg.accumulate_

    def prox() -> None:
        reg._prox(lambda p: metrics[id(p)])

    prox()
    steps = reference.metric_step(moments[:CHECKED].double(), 1e-3, 1.0, 1e-8, True, torch.float64)
    _check(parameters.weights[:CHECKED], penalty.prox(w, steps), f"{penalty}: prox")
    parameters.weights.copy_(before)
    yield "prox in a metric", prox


def _check(found: Tensor, expected: Tensor, what: str) -> None:
    """Within 64 float32 roundings of the largest element; jumps of a hard threshold apart."""
    off = (found.double() - expected).abs() > 64 * 2**-24 * expected.abs().max()
    if off.double().mean() > 1e-5:
        raise AssertionError(f"{what} is off in {off.sum()} of {len(off)} elements")


def measure(workload: str, rounds: int, seconds: float, device: str) -> list[Row]:
    parameters = allocate(WORKLOADS[workload], device=device)
    w, g = parameters.weights, parameters.gradients
    generator = torch.Generator(device).manual_seed(1)
    moments = torch.empty_like(w).uniform_(1e-6, 1e-4, generator=generator)
    rows = []
    for penalty in EXAMPLES:
        runs: dict[str, Callable[[], object]] = dict(sweeps_of(parameters, moments, penalty))
        runs[LIMIT] = lambda: g.add_(w)
        timings = by_turns(runs, rounds, seconds, device=device)
        for name in runs:
            t = timings[name]
            judged = device == "cpu" and penalty.name not in TRANSCENDENTAL
            target = TARGETS.get(name) if judged else None
            ratio = t.median / timings[LIMIT].median
            rows.append(Row(workload, penalty.name, name, t.median, t.p10, t.p90, ratio, target))
    return rows


def table(rows: list[Row]) -> str:
    cells = [
        [
            row.penalty,
            row.sweep,
            f"{1e3 * row.seconds:.2f}",
            f"{row.over_limit:.2f}",
            "-" if row.target is None else f"<= {row.target:.2f}",
            "" if row.target is None else "pass" if row.over_limit <= row.target else "FAIL",
        ]
        for row in rows
        if row.sweep != LIMIT
    ]
    return text.table(["penalty", "sweep", "ms", "/ limit", "target", ""], cells, right={2, 3, 4})


def write(rows: list[Row], where: Environment, path: Path) -> None:
    facts = asdict(where)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *facts])
        writer.writeheader()
        writer.writerows({**asdict(row), **facts} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.penalties", description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", default="", help="to record where the files are no checkout")
    parser.add_argument("--rounds", type=int, default=15, help="samples per sweep")
    parser.add_argument("--seconds", type=float, default=4.0, help="at most, per sweep")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file to write")
    options = parser.parse_args()
    assert {penalty.name for penalty in EXAMPLES} == set(PENALTIES), "an example for each penalty"
    rows = measure(options.workload, options.rounds, options.seconds, options.device)
    where = environment()
    where = replace(where, commit=options.commit or where.commit)
    write(rows, where, options.out)
    print(where, table(rows), f"written: {options.out}", sep="\n\n")


if __name__ == "__main__":
    main()
