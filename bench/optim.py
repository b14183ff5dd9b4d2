"""The penalty in an optimizer's step: `python -m bench.optim`, AdamW with elastic net.

Against torch's fused AdamW without a penalty, with one in the loss, written as a loop, and with one
attached. One process, by turns, medians. All ways step the same parameters with the same states,
from gradients that stay; what a step does is checked on them before it is timed. Writes
bench/results/optim.csv.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import pyreg
from pyreg import text
from pyreg.profiling import WAYS, WORKLOADS, Environment, Parameters, allocate, environment
from pyreg.profiling.timing import by_turns

RESULTS = Path(__file__).parent / "results" / "optim.csv"
PENALTY = pyreg.ElasticNet(1e-5, 1e-4)
LIMIT = "torch fused, no penalty"
JUDGED = ("gpt2", "gpt2-bf16", "many")
OPTIONS = {"lr": 1e-5, "weight_decay": 0.01}
Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    workload: str
    way: str
    seconds: float
    p10: float
    p90: float
    over_limit: float  # time / that of torch's fused step without a penalty


def ways(parameters: Parameters) -> dict[str, Step]:
    """A step of each way, all on one set of states."""
    named, first = parameters.named, torch.optim.AdamW(parameters.tensors, fused=True, **OPTIONS)
    first.step()

    def with_states(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.state = first.state
        return optimizer

    def torchs() -> torch.optim.Optimizer:
        return with_states(torch.optim.AdamW(parameters.tensors, fused=True, **OPTIONS))

    def attached(mode: str) -> Step:
        optimizer = torchs()
        pyreg.Regularizer(named, PENALTY).attach(optimizer, mode)
        return optimizer.step

    def inside(mode: str) -> Step:
        of = {"regularizer": pyreg.Regularizer(named, PENALTY), "mode": mode}
        return with_states(pyreg.optim.AdamW(named, **of, **OPTIONS)).step

    loop, last = WAYS["loop"].prepare(parameters, PENALTY), torchs()

    def in_the_loss() -> None:
        loop()
        last.step()

    return {
        LIMIT: first.step,
        "pyreg, no penalty": with_states(pyreg.optim.AdamW(named, **OPTIONS)).step,
        "pyreg, grad": inside("grad"),
        "pyreg, prox": inside("prox"),
        "torch fused + loop": in_the_loss,
        "torch fused + attach, grad": attached("grad"),
        "torch fused + attach, prox": attached("prox"),
    }


def check(parameters: Parameters, steps: dict[str, Step]) -> None:
    """Those that do the same do the same, from the same weights, gradients and first state.

    To four units in the last place of the largest weight: pyreg and torch round in other places.
    """
    first = steps[LIMIT].__self__
    kept = [parameters.weights.clone(), parameters.gradients.clone()]
    states = {p: {k: s.clone() for k, s in state.items()} for p, state in first.state.items()}
    largest, results = parameters.weights.abs().max().item(), {}
    for name, step in steps.items():
        step()
        results[name] = parameters.weights.clone()
        parameters.weights.copy_(kept[0])
        parameters.gradients.copy_(kept[1])
        for p, state in states.items():
            for k, s in state.items():
                first.state[p][k].copy_(s)
    for a, b in (
        (LIMIT, "pyreg, no penalty"),
        ("torch fused + loop", "pyreg, grad"),
        ("torch fused + attach, grad", "pyreg, grad"),
        ("torch fused + attach, prox", "pyreg, prox"),
    ):
        off = (results[a].float() - results[b].float()).abs().max().item()
        if off > 4 * torch.finfo(results[a].dtype).eps * largest:
            raise AssertionError(f"{b} and {a} differ by {off:.1e}")


def measure(workloads: list[str], rounds: int, seconds: float) -> list[Row]:
    rows = []
    for workload in workloads:
        parameters = allocate(WORKLOADS[workload])
        generator = torch.Generator().manual_seed(1)
        parameters.gradients.normal_(0.0, 1e-3, generator=generator)
        steps = ways(parameters)
        check(parameters, steps)
        timings = by_turns(steps, rounds, seconds)
        limit = timings[LIMIT].median
        for way, t in timings.items():
            rows.append(Row(workload, way, t.median, t.p10, t.p90, t.median / limit))
    return rows


def table(rows: list[Row]) -> str:
    cells = [
        [row.workload, row.way, f"{1e3 * row.seconds:.2f}", f"{row.over_limit:.2f}"] for row in rows
    ]
    return text.table(["workload", "AdamW", "ms", "/ torch fused"], cells, right={2, 3})


def write(rows: list[Row], where: Environment, path: Path) -> None:
    facts = asdict(where)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *facts])
        writer.writeheader()
        writer.writerows({**asdict(row), **facts} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.optim", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(JUDGED))
    parser.add_argument("--rounds", type=int, default=15, help="samples per way")
    parser.add_argument("--seconds", type=float, default=6.0, help="at most, per way")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file to write")
    options = parser.parse_args()
    rows = measure(options.workloads, options.rounds, options.seconds)
    write(rows, environment(), options.out)
    print(environment(), table(rows), f"written: {options.out}", sep="\n\n")


if __name__ == "__main__":
    main()
