"""Parameters sharded over ranks, as FSDP2 has them: `python -m bench sharded`.

Two processes with a thread each hold halves of DTensors and speak by gloo. `llama, scaled` is the
291 tensors of Llama-3-8B with few elements, where all is the host's time; `gpt2` has traffic.
Beside pyreg's ways the loop over the parameters, whose value is gathered, and torch's fused
optimizer. By turns, medians of what rank 0 takes from a barrier on. Writes
bench/results/sharded.csv.
"""

from __future__ import annotations

import csv
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import pyreg
from pyreg import text
from pyreg.profiling import WORKLOADS, environment
from pyreg.profiling.timing import summarize

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
RESULTS = Path(__file__).parent / "results" / "sharded.csv"
RANKS, ROUNDS = 2, 21
PENALTY = pyreg.L1(1e-5)
SHAPES = {
    "llama, scaled": WORKLOADS["llama"].scaled(1e-5).shapes,
    "gpt2": WORKLOADS["gpt2"].shapes,
}
LIMIT = "dst.add_(src)"


@dataclass(frozen=True)
class Row:
    workload: str
    tensors: int
    elements: int  # of all ranks
    way: str
    seconds: float
    p10: float
    p90: float


def parameters(shapes: Shapes) -> dict[str, nn.Parameter]:
    """With gradients; a rank makes its half."""
    mesh, rank, found = init_device_mesh("cpu", (RANKS,)), distributed.get_rank(), {}
    for name, (rows, *others) in shapes:
        parts = torch.arange(rows).chunk(RANKS)
        own = len(parts[rank]) if rank < len(parts) else 0
        shape, stride = (rows, *others), torch.empty(rows, *others, device="meta").stride()
        local = torch.randn(own, *others) * 0.02
        whole = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size(shape), stride=stride)
        found[name] = nn.Parameter(whole)
        found[name].grad = torch.zeros_like(whole)
    return found


def ways(params: dict[str, nn.Parameter]) -> dict[str, Callable[[], object]]:
    tensors = list(params.values())

    def penalty() -> Tensor:
        return sum((p.abs().sum() for p in tensors), start=0) * PENALTY.lam

    def loop() -> None:
        penalty().full_tensor().backward()

    plain = torch.optim.AdamW(tensors, 1e-4, fused=True)

    def loop_and_step() -> None:
        loop()
        plain.step()

    reg = pyreg.Regularizer(params, PENALTY)
    attached = torch.optim.AdamW(tensors, 1e-4, fused=True)
    pyreg.Regularizer(params, PENALTY).attach(attached, mode="prox")
    inside = pyreg.Regularizer(params, PENALTY)
    fused = pyreg.optim.AdamW(tensors, 1e-4, regularizer=inside, mode="prox")
    locals_ = [(p.grad.to_local(), p.detach().to_local()) for p in tensors]
    return {
        LIMIT: lambda: [dst.add_(src, alpha=0.0) for dst, src in locals_],
        "loop": loop,
        "pyreg in the loss": lambda: reg().backward(),
        "pyreg accumulate_": reg.accumulate_,
        "pyreg prox_": lambda: reg.prox_(1e-6),
        "pyreg stats": reg.stats,
        "torch fused AdamW, no penalty": plain.step,
        "torch fused AdamW + loop": loop_and_step,
        "torch fused AdamW + attach, prox": attached.step,
        "pyreg AdamW, prox": fused.step,
    }


def check(params: dict[str, nn.Parameter]) -> None:
    """Raise AssertionError unless value and gradient are those of the loop, in float64."""
    reg = pyreg.Regularizer(params, PENALTY)
    exact = sum(p.detach().to_local().double().abs().sum() for p in params.values()) * PENALTY.lam
    distributed.all_reduce(exact)
    assert math.isclose(reg.accumulate_().item(), exact.item(), rel_tol=1.1e-6)
    for p in params.values():
        expected = PENALTY.lam * p.detach().to_local().sign()
        torch.testing.assert_close(p.grad.to_local(), expected, rtol=1e-6, atol=0)
        p.grad.zero_()


def on_rank(number: int, folder: Path, path: Path, shapes: dict[str, Shapes], rounds: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(number)
    where = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", init_method=where, rank=number, world_size=RANKS)
    rows = []
    for workload, of in shapes.items():
        params = parameters(of)
        check(params)
        runs, elements = ways(params), sum(p.numel() for p in params.values())
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds + 2):  # (the first two make states, and warm up)
            for name, run in runs.items():
                distributed.barrier()
                start = time.perf_counter()
                run()
                if turn > 1:
                    samples[name].append(time.perf_counter() - start)
        for name, own in samples.items():
            t = summarize(own)
            rows.append(Row(workload, len(params), elements, name, t.median, t.p10, t.p90))
    if number == 0:
        write(rows, path)
    distributed.destroy_process_group()


def write(rows: list[Row], path: Path) -> None:
    where = asdict(environment())
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *where])
        writer.writeheader()
        writer.writerows({**asdict(row), **where} for row in rows)
    cells = [
        [row.workload, row.way, *(f"{1e3 * x:,.2f}" for x in (row.seconds, row.p10, row.p90))]
        for row in rows
    ]
    print(text.table(["workload", "way", "ms", "p10", "p90"], cells, right=(2, 3, 4)))


def measure(path: Path, shapes: dict[str, Shapes], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        told = (Path(folder), path, shapes, rounds)
        torch.multiprocessing.start_processes(on_rank, told, nprocs=RANKS, start_method="spawn")


def main() -> int:
    measure(RESULTS, SHAPES, ROUNDS)
    print(f"\nwritten: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
