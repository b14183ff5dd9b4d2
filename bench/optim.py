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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import pyreg
from pyreg import text
from pyreg.profiling import WAYS, WORKLOADS, Environment, Parameters, allocate, environment
from pyreg.profiling.timing import by_turns
from pyreg.profiling.ways import run_on, serving

RESULTS = Path(__file__).parent / "results" / "optim.csv"
PENALTY = pyreg.ElasticNet(1e-5, 1e-4)
LIMIT = "torch fused, no penalty"
JUDGED = ("gpt2", "gpt2-bf16", "many")
OPTIONS = {"lr": 1e-5, "weight_decay": 0.01}
OWN = {"pyreg, no penalty": None, "pyreg, grad": "grad", "pyreg, prox": "prox"}
SAME = {
    LIMIT: "pyreg, no penalty",
    "torch fused + loop": "pyreg, grad",
    "torch fused + attach, grad": "pyreg, grad",
    "torch fused + attach, prox": "pyreg, prox",
}
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
    """A step of each way, all on one set of states; pyreg's on each backend, if several serve."""
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

    def inside(mode: str | None) -> Step:
        of = {"regularizer": pyreg.Regularizer(named, PENALTY), "mode": mode} if mode else {}
        return with_states(pyreg.optim.AdamW(named, **of, **OPTIONS)).step

    loop, last = WAYS["loop"].prepare(parameters, PENALTY), torchs()

    def in_the_loss() -> None:
        loop()
        last.step()

    backends = serving(parameters.device)
    own = {
        f"{name}, {b}" if len(backends) > 1 else name: run_on(b, lambda mode=mode: inside(mode))
        for name, mode in OWN.items()
        for b in backends
    }
    return {
        LIMIT: first.step,
        **own,
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
    largest = parameters.weights.abs().max().item()

    def result(way: str) -> torch.Tensor:
        steps[way]()
        weights = parameters.weights.clone()
        parameters.weights.copy_(kept[0])
        parameters.gradients.copy_(kept[1])
        for p, state in states.items():
            for k, s in state.items():
                first.state[p][k].copy_(s)
        return weights

    for a, same in SAME.items():
        expected = result(a)
        for b in (way for way in steps if way.startswith(same)):
            off = result(b).sub_(expected).abs_().max().item()
            if not off <= 4 * torch.finfo(expected.dtype).eps * largest:  # (NaN too)
                raise AssertionError(f"{b} and {a} differ by {off:.1e}")


def measure(workloads: list[str], rounds: int, seconds: float, device: str) -> list[Row]:
    rows = []
    for workload in workloads:
        parameters = allocate(WORKLOADS[workload], device=device)
        generator = torch.Generator(device).manual_seed(1)
        parameters.gradients.normal_(0.0, 1e-3, generator=generator)
        steps = ways(parameters)
        check(parameters, steps)
        timings = by_turns(steps, rounds, seconds, device=device)
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", default="", help="to record where the files are no checkout")
    parser.add_argument("--rounds", type=int, default=15, help="samples per way")
    parser.add_argument("--seconds", type=float, default=6.0, help="at most, per way")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file to write")
    options = parser.parse_args()
    rows = measure(options.workloads, options.rounds, options.seconds, options.device)
    where = environment()
    where = replace(where, commit=options.commit or where.commit)
    write(rows, where, options.out)
    print(where, table(rows), f"written: {options.out}", sep="\n\n")


if __name__ == "__main__":
    main()
