"""The host's time of a call on a GPU, taken without one: `python -m bench host`.

What a call costs besides the sweep, on CPU tensors of 64 bfloat16 numbers: natively, the bindings
over a launch that does nothing; Triton over a driver that launches nothing. (On a GPU come to it a
launch, some 5 us, and what torch takes longer to allocate there.) One process, by turns, medians;
each call again and again, so that all it looks at is in the caches.

Beside them, what no call leaves out: the look, in C++, at where every tensor and its gradient lie
and whether it is frozen; and, for a step, torch's fused optimizer without a penalty, of which the
sweep itself is a part. Writes bench/results/host.csv.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import pyreg
from pyreg import dispatch, look, text
from pyreg.backend import cuda, native, triton
from pyreg.profiling import environment
from pyreg.profiling.timing import Timing, by_turns

from . import builds

RESULTS = Path(__file__).parent / "results" / "host.csv"
TENSORS = (3, 291, 18_867)  # few; Llama-3-8B; a mixture of experts
PENALTY = pyreg.ElasticNet(1e-5, 1e-4)
BACKENDS = {"native": "native", "triton": "Triton"}
ROUNDS, SECONDS = 101, 6.0


@dataclass(frozen=True)
class Row:
    tensors: int
    call: str
    by: str  # a backend of pyreg's, or what is measured beside it
    seconds: float
    p10: float
    p90: float


def stand_in_for_a_gpu(folder: Path) -> None:
    """From now on CPU tensors are swept as if they were a GPU's; nothing is computed."""
    module = builds.bindings(folder, "launch_nothing.cpp", "-O2")
    cuda.load = lambda: module
    cuda._no_gpu.cache_clear()  # what was found out for `environment()`
    dispatch.backend.cache_clear()
    dispatch._NATIVE_ON["cpu"] = ("cuda", "CudaBackend")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            launcher_cls=lambda source, metadata: lambda *args, **options: None,
            utils=SimpleNamespace(
                load_binary=lambda *args: (None, 1, 0, 0, 1024),
                get_device_properties=lambda device: {"max_shared_mem": 1 << 18},
            ),
        )
    )
    from pyreg.triton_kernels import launch, layout

    launch.options = lambda *args: {"num_warps": 4}
    layout._check_usable = lambda device: None
    triton.interpreted = lambda: True  # which is what serves CPU tensors


def model(tensors: int) -> nn.Module:
    layers = [nn.Linear(8, 8, bias=False, dtype=torch.bfloat16) for _ in range(tensors)]
    for layer in layers:
        layer.weight.grad = torch.zeros_like(layer.weight)
    return nn.ModuleList(layers)


def only_looking(of: nn.Module) -> Callable[[], object]:
    """At every tensor and its gradient, as each call does."""
    tensors = list(of.parameters())
    seen = native.load().Look(tensors, [])

    def run() -> None:
        look.require_grad(tensors)
        seen.with_own_gradients(tensors)

    return run


def calls(tensors: int) -> dict[tuple[str, str], Callable[[], object]]:
    """By what is called and the backend."""
    found: dict[tuple[str, str], Any] = {}
    for name in BACKENDS:
        of = model(tensors)
        reg = pyreg.Regularizer(of, PENALTY)
        inside = pyreg.Regularizer(of, PENALTY)
        step = pyreg.optim.AdamW(of.parameters(), 1e-3, regularizer=inside, mode="prox").step
        own = {
            "accumulate_": reg.accumulate_,
            "prox_": lambda reg=reg: reg.prox_(1e-3),
            "a step of AdamW, prox": step,
        }
        found |= {(call, name): with_backend(name, run) for call, run in own.items()}
    of = model(tensors)
    found["accumulate_", "the look"] = only_looking(of)
    fused = torch.optim.AdamW(of.parameters(), 1e-3, fused=True)
    found["a step of AdamW, prox", "torch fused, no penalty"] = fused.step
    return found


def with_backend(name: str, run: Callable[[], object]) -> Callable[[], object]:
    def named() -> None:
        token = dispatch.requested_backend.set(name)
        run()
        dispatch.requested_backend.reset(token)

    return named


def measure() -> list[Row]:
    rows = []
    for tensors in TENSORS:
        runs = calls(tensors)
        for run in (*runs.values(), *runs.values()):  # (a first step makes states)
            run()
        timings: dict[Any, Timing] = by_turns(runs, ROUNDS, SECONDS)
        rows += [Row(tensors, *key, t.median, t.p10, t.p90) for key, t in timings.items()]
    return rows


def table(rows: list[Row]) -> str:
    cells = [
        [f"{row.tensors:,}", row.call, row.by]
        + [f"{1e6 * x:,.0f}" for x in (row.seconds, row.p10, row.p90)]
        for row in rows
    ]
    head = ["tensors", "call", "by", "host us", "p10", "p90"]
    return text.table(head, cells, right=(0, 3, 4, 5))


def main() -> int:
    torch.set_num_threads(1)
    here = environment()
    with tempfile.TemporaryDirectory() as folder:
        stand_in_for_a_gpu(Path(folder))
        rows = measure()
    where = asdict(here)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *where])
        writer.writeheader()
        writer.writerows({**asdict(row), **where} for row in rows)
    print(here, table(rows), f"written: {RESULTS}", sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
