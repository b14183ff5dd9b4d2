"""What `bench compare` runs beside each commit's pyreg, of which it uses the pinned names alone.

Reads workloads as JSON, writes [workload, way, seconds of each sample]. Every way is checked in
float64 before it is timed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import pyreg

L1, L2 = 1e-5, 1e-4
PENALTY = pyreg.ElasticNet(L1, L2)
SAMPLES, BLOCK = 9, 1e-2  # BLOCK: seconds of runs in a sample, at least


def parameters(shapes: list[list[int]], dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in shapes:
        p = nn.Parameter(torch.empty(shape, dtype=dtype).normal_(0.0, 0.02, generator=generator))
        p.grad = torch.zeros_like(p)
        found.append(p)
    return found


def ways(params: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    named = [(f"{i}", p) for i, p in enumerate(params)]
    regularizer = pyreg.Regularizer(named, PENALTY)

    def loss() -> torch.Tensor:
        value = pyreg.penalty(params, PENALTY)
        value.backward()
        return value

    return {
        "pyreg in the loss": loss,
        "accumulate_": regularizer.accumulate_,
        "prox_": lambda: regularizer.prox_(1e-3),
    }


def check(params: list[nn.Parameter], runs: dict[str, Callable[[], object]]) -> None:
    """Values and gradients of a first run, and the prox, on the first tensor and the sum."""
    w = params[0].detach().double()
    exact = sum(
        (L1 * p.detach().double().abs().sum() + L2 * p.detach().double().square().sum()).item()
        for p in params
    )
    gradient = L1 * w.sign() + 2 * L2 * w
    bound = 2 * torch.finfo(params[0].dtype).eps
    for name in ("pyreg in the loss", "accumulate_"):
        params[0].grad.zero_()
        value = runs[name]().item()
        off = (params[0].grad.double() - gradient).abs().max() / gradient.abs().max()
        if not (math.isclose(value, exact, rel_tol=1e-6) and off <= bound):
            sys.exit(f"{name}: its value or gradient is wrong")
    runs["prox_"]()
    expected = w.sign() * (w.abs() - 1e-3 * L1).clamp(min=0) / (1 + 2e-3 * L2)
    off = (params[0].detach().double() - expected).abs().max() / w.abs().max()
    if not off <= bound:
        sys.exit("prox_: its result is wrong")


def seconds_of(run: Callable[[], object]) -> list[float]:
    start = time.perf_counter()
    run()
    times = max(1, round(BLOCK / (time.perf_counter() - start)))
    samples = []
    for _ in range(SAMPLES + 1):
        start = time.perf_counter()
        for _ in range(times):
            run()
        samples.append((time.perf_counter() - start) / times)
    return samples[1:]  # the first brings caches to the state that this way leaves


def main() -> None:
    found = []
    for workload in json.load(sys.stdin):
        params = parameters(workload["shapes"], getattr(torch, workload["dtype"]))
        runs = ways(params)
        check(params, runs)
        found += [[workload["name"], name, seconds_of(run)] for name, run in runs.items()]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
