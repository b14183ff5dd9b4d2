"""Other packages at the same work: `python -m bench peers`, on GPT-2 small and 2,000 x 1,000.

For each job pyreg's way and theirs, on the same memory, in one process, by turns, medians. Each
result is checked against the formulas in float64 before it is timed, from weights of which some are
0, as biases start and a proximal step leaves them. Where a peer's answer is wrong it is not timed,
and the record says by how much; one that is not installed is named. What can be installed is in
bench/requirements-peers.txt. Writes bench/results/peers.csv.

PAT (torchao) and FTRL (pytorch_optimizer) have their L1 inside an optimizer. They are asked for one
step with gradients of 0 and a learning rate of 1, which is the proximal step. Over many steps they
are other algorithms: PAT steps from the weights before the last prox, and its threshold grows by
every learning rate; FTRL makes the weights from its state, which begins at 0. So FTRL is asked
twice: as it comes, and with the weights put into its state. Decoupled decay, w (1 - 2 lam), is the
prox of L2, w / (1 + 2 lam), up to (2 lam)^2, here 4e-8: less than a rounding.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

import pyreg
from pyreg import text
from pyreg.penalties import Penalty
from pyreg.profiling import WAYS, WORKLOADS, Environment, Parameters, Way, allocate, environment
from pyreg.profiling.check import Disagreement, Expected, check
from pyreg.profiling.record import milliseconds
from pyreg.profiling.timing import Timing, by_turns
from pyreg.profiling.ways import PROX_STEP, Run

RESULTS = Path(__file__).parent / "results" / "peers.csv"
JUDGED = ("gpt2", "many")
ZEROS = 64  # one weight in so many is 0


@dataclass(frozen=True)
class Peer:
    """Another package's way to do a job."""

    package: str  # as pip knows it
    way: Way


@dataclass(frozen=True)
class Contest:
    """One job with one penalty: pyreg's way, and those of others."""

    sweep: str
    penalty: Penalty  # of one strength
    ours: Way
    peers: tuple[Peer, ...]


@dataclass(frozen=True)
class Row:
    workload: str
    penalty: str
    sweep: str
    way: str
    version: str  # of its package; empty where that is not installed
    traffic: float | None  # predicted, in N
    seconds: float | None = None
    p10: float | None = None
    p90: float | None = None
    samples: int = 0
    over_pyreg: float | None = None  # time / that of pyreg's way
    error: float | None = None  # relative to the largest element
    note: str = ""  # why it was not timed, or what is wrong with it elsewhere


def pat_prox(parameters: Parameters, penalty: Penalty) -> Run:
    """w *= clamp(1 - lam / |w|, 0), which then counts zeros and returns |w|.

    abs 2, reciprocal 2, times 2, from one 2, clamp 2, into w 3, zeros 1.5, abs 2: 16.5 N.
    """
    from torchao.prototype.pat.optim import ProxLasso

    prox = ProxLasso(penalty.lam)

    @torch.no_grad()
    def run() -> None:
        for p in parameters.tensors:
            prox.apply_(p, PROX_STEP)

    return run


def pat_step(parameters: Parameters, penalty: Penalty) -> Run:
    """SGD 3, the weights put back 2 and kept 2, the prox 16.5: 23.5 N."""
    from torchao.prototype.pat.optim import PruneOptimizer

    group = {"params": parameters.tensors, "prox_type": "ProxLasso", "group_type": "ElemGrouper"}
    sgd = torch.optim.SGD([group], lr=PROX_STEP)
    return PruneOptimizer(sgd, reg_lambda=penalty.lam).step


def proxtorch_prox(parameters: Parameters, penalty: Penalty) -> Run:
    """sign(w) clamp(|w| - lam, 0), written into w.

    sign 2, abs 2, minus 2, clamp 2, times 3, into w 2: 13 N.
    """
    from proxtorch.operators import L1

    l1 = L1(penalty.lam)

    @torch.no_grad()
    def run() -> None:
        for p in parameters.tensors:
            p.copy_(l1.prox(p, PROX_STEP))

    return run


def proxtorch_loss(parameters: Parameters, penalty: Penalty) -> Run:
    """The penalty as it is added to a loss: norm 1; backward sgn 2, times 2; into .grad 3: 8 N."""
    from proxtorch.operators import L1

    l1 = L1(penalty.lam)

    def run() -> Tensor:
        value = sum(l1(p) for p in parameters.tensors)
        if value.requires_grad:  # else a loss has its own gradient, and nothing of this one's
            value.backward()
        return value.detach()

    return run


def coupled_decay(parameters: Parameters, penalty: Penalty) -> Run:
    """grad += 2 lam w, as its optimizers have it; no value: 3 N."""
    return _decay(parameters, penalty, decoupled=False)


def decoupled_decay(parameters: Parameters, penalty: Penalty) -> Run:
    """w *= 1 - 2 lam: 2 N."""
    return _decay(parameters, penalty, decoupled=True)


def _decay(parameters: Parameters, penalty: Penalty, decoupled: bool) -> Run:
    from pytorch_optimizer.base.optimizer import BaseOptimizer

    decay = 2 * penalty.lam

    @torch.no_grad()
    def run() -> None:
        params = parameters.tensors
        grads = [p.grad for p in params]
        BaseOptimizer.apply_weight_decay_foreach(
            params, grads, PROX_STEP, decay, weight_decouple=decoupled, fixed_decay=False
        )

    return run


def ftrl(parameters: Parameters, penalty: Penalty) -> Run:
    """20 foreach operations 47, a mask 5.5: 52.5 N."""
    return _ftrl(parameters, penalty).step


def ftrl_from_weights(parameters: Parameters, penalty: Penalty) -> Run:
    """The same with z = -w, of which w is the minimum without a penalty."""
    optimizer = _ftrl(parameters, penalty)
    for p in parameters.tensors:
        optimizer.state[p] = {"z": -p.detach(), "n": torch.zeros_like(p)}
    return optimizer.step


def _ftrl(parameters: Parameters, penalty: Penalty) -> torch.optim.Optimizer:
    from pytorch_optimizer import FTRL

    return FTRL(parameters.tensors, lr=PROX_STEP, beta=1.0, lambda_1=penalty.lam)


def pyreg_step(parameters: Parameters, penalty: Penalty) -> Run:
    """SGD with the prox in its step: w and g are read, w is written."""
    options = {"lr": PROX_STEP, "regularizer": penalty, "mode": "prox"}
    step = pyreg.optim.SGD(parameters.named, **options).step

    def run() -> None:
        step()

    return run


STEP = "prox in an optimizer's step"
L1, L2 = pyreg.L1(1e-5), pyreg.L2(1e-4)
CONTESTS = (
    Contest(
        "prox",
        L1,
        WAYS["pyreg prox_"],
        (
            Peer("torchao", Way("torchao PAT, ProxLasso.apply_", "prox", pat_prox, 16.5)),
            Peer("ProxTorch", Way("ProxTorch, L1.prox", "prox", proxtorch_prox, 13)),
        ),
    ),
    Contest(
        STEP,
        L1,
        Way("pyreg SGD, prox", "prox", pyreg_step, 3),
        (
            Peer("torchao", Way("torchao PAT, PruneOptimizer", "prox", pat_step, 23.5)),
            Peer("pytorch_optimizer", Way("pytorch_optimizer FTRL", "prox", ftrl, 52.5)),
            Peer(
                "pytorch_optimizer",
                Way("pytorch_optimizer FTRL, from w", "prox", ftrl_from_weights, 52.5),
            ),
        ),
    ),
    Contest(
        "accumulate_",
        L1,
        WAYS["pyreg accumulate_"],
        (Peer("ProxTorch", Way("ProxTorch, L1 in the loss", "gradient", proxtorch_loss, 8)),),
    ),
    Contest(
        "accumulate_",
        L2,
        WAYS["pyreg accumulate_"],
        (
            Peer(
                "pytorch_optimizer",
                Way("pytorch_optimizer, coupled decay", "gradient", coupled_decay, 3),
            ),
        ),
    ),
    Contest(
        "prox",
        L2,
        WAYS["pyreg prox_"],
        (
            Peer(
                "pytorch_optimizer",
                Way("pytorch_optimizer, decoupled decay", "prox", decoupled_decay, 2),
            ),
        ),
    ),
)


def measure(
    workloads: Sequence[str], contests: Sequence[Contest], rounds: int, seconds: float
) -> list[Row]:
    rows = []
    for workload in workloads:
        parameters = _weights(workload)
        for contest in contests:
            rows += _held(contest, parameters, rounds, seconds)
    return rows


def _weights(workload: str) -> Parameters:
    parameters = allocate(WORKLOADS[workload])
    parameters.weights[::ZEROS] = 0.0
    return parameters


def _held(contest: Contest, parameters: Parameters, rounds: int, seconds: float) -> list[Row]:
    ours, penalty = contest.ours, contest.penalty
    expected = Expected(parameters, penalty)
    runs = {ours.name: ours.prepare(parameters, penalty)}
    first = Row(
        parameters.workload.name,
        penalty.name,
        contest.sweep,
        ours.name,
        pyreg.__version__,
        ours.traffic_of(penalty),
        error=check(ours, runs[ours.name], parameters, expected).elements,
    )
    rows = [first]
    for peer in contest.peers:
        version, run, found = _checked(peer, parameters, penalty, expected)
        of = {"way": peer.way.name, "traffic": peer.way.traffic_of(penalty), "version": version}
        rows.append(replace(first, **{**of, "error": None, **found}))
        if run is not None:
            runs[peer.way.name] = run
    timings = by_turns(runs, rounds, seconds)
    expected.restore(parameters)
    return [
        _timed(row, timings[row.way], timings[ours.name]) if row.way in timings else row
        for row in rows
    ]


def _timed(row: Row, t: Timing, ours: Timing) -> Row:
    ratio = t.median / ours.median
    of = {"p10": t.p10, "p90": t.p90, "samples": t.samples, "over_pyreg": ratio}
    return replace(row, seconds=t.median, **of)


def _checked(
    peer: Peer, parameters: Parameters, penalty: Penalty, expected: Expected
) -> tuple[str, Run | None, dict[str, object]]:
    """Its version, its run if it does the job, and what its row says."""
    try:
        version = metadata.version(peer.package)
    except metadata.PackageNotFoundError:
        return "", None, {"note": f"not timed: {peer.package} is not installed"}
    try:
        run = peer.way.prepare(parameters, penalty)
        errors = check(peer.way, run, parameters, expected)
    except Exception as error:  # a peer that cannot run here is a row, not the end
        expected.restore(parameters)
        return version, None, {"note": f"not timed: {_reason(error)}"}
    remarks = [remark for remark in (errors.remark, _at_zero(peer.way, penalty)) if remark]
    return version, run, {"error": errors.elements, "note": "; ".join(remarks)}


def _at_zero(way: Way, penalty: Penalty) -> str:
    """What is wrong with it at strength 0, where a schedule may begin."""
    parameters, nothing = _weights("tiny"), type(penalty)(0.0)
    try:
        run = way.prepare(parameters, nothing)
        check(way, run, parameters, Expected(parameters, nothing))
    except Exception as error:
        return f"at strength 0 {_reason(error)}"
    return ""


def _reason(error: Exception) -> str:
    if isinstance(error, Disagreement):
        return str(error)
    first, *_ = [*str(error).strip().splitlines(), ""]
    return f"it raises {type(error).__name__}: {first[:200]}"


def table(rows: Sequence[Row]) -> str:
    """A line for each row, and one for every note."""
    names = [f"{row.way} {row.version}".rstrip() for row in rows]
    cells = [
        [
            row.workload,
            row.penalty,
            row.sweep,
            name,
            "" if row.traffic is None else f"{row.traffic:g}",
            *(["-", "", ""] if row.seconds is None else _figures(row)),
        ]
        for row, name in zip(rows, names, strict=True)
    ]
    head = ["workload", "penalty", "sweep", "way", "N moved", "ms", "10-90 %", "/ pyreg"]
    notes = [
        f"{row.workload}, {name}: {row.note}"
        for row, name in zip(rows, names, strict=True)
        if row.note
    ]
    return "\n".join([text.table(head, cells, right={4, 5, 6, 7}), *notes])


def _figures(row: Row) -> list[str]:
    spread = f"{milliseconds(row.p10)}-{milliseconds(row.p90)}"
    return [milliseconds(row.seconds), spread, f"{row.over_pyreg:.2f}"]


def write(rows: Sequence[Row], where: Environment, path: Path) -> None:
    facts = asdict(where)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *facts])
        writer.writeheader()
        writer.writerows({**asdict(row), **facts} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench peers", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(JUDGED))
    parser.add_argument("--rounds", type=int, default=15, help="samples per way")
    parser.add_argument("--seconds", type=float, default=6.0, help="at most, per way")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file to write")
    options = parser.parse_args()
    rows = measure(options.workloads, CONTESTS, options.rounds, options.seconds)
    write(rows, environment(), options.out)
    print(environment(), table(rows), f"written: {options.out}", sep="\n\n")


if __name__ == "__main__":
    main()
