"""Time by turns: every way runs once in each round, so that a slow minute falls on all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from statistics import median
from typing import Any

import torch

_BLOCK = 1e-2  # seconds: shorter runs are timed several at a time, until caches are settled
_GPU_BLOCK = 5e-2  # and here the first of them waits for its launch, some 0.2 ms
_LONG = 0.2  # seconds: longer runs are not warmed up before each sample


@dataclass(frozen=True)
class Timing:
    """Seconds per run."""

    median: float
    p10: float
    p90: float
    samples: int


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what was measured until then."""

    def __init__(self, measured: Any) -> None:
        super().__init__()
        self.measured = measured


def check_budget(rounds: int, seconds: float) -> None:
    """Raise ValueError, or TypeError, unless `by_turns` can keep to this."""
    if not isinstance(rounds, int):
        raise TypeError(f"rounds: expected a whole number, got {rounds!r}")
    if rounds < 1:
        raise ValueError(f"rounds: expected 1 or more, got {rounds}")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds: expected a finite number, 0 or above, got {seconds!r}")


def summarize(seconds: list[float]) -> Timing:
    """Median and 10th, 90th percentile (nearest sample)."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Timing(
        median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered)
    )


def by_turns(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    fewest: int = 5,
    tell: Callable[[str, float], None] = lambda name, share: None,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time all runs alternately: by the wall clock, on a GPU by events on its stream.

    A sample is a block of untimed runs, which brings caches and allocator to the state that this
    way leaves behind, then a block of timed ones: the steady state, as of torch.utils.benchmark and
    triton.testing.do_bench. (The former warms up twice before every sample, long runs too, which
    would triple the time of the slowest ways.) Blocks keep the measuring itself below 2 % of what
    is measured: see `python -m bench overhead`.

    Args:
        runs: by name; each has run before, so that nothing is built or compiled here.
        rounds: samples of each run, except that
        seconds: bounds the time spent on one run, as far as
        fewest: samples allow; these are then spread evenly over the rounds.
        tell: is told the name of what runs and the share done.
        device: where the runs' tensors are.

    Raises:
        Interrupted: Ctrl-C; with the timings of what has samples.
    """
    on_cpu = torch.device(device).type == "cpu"
    how = (wall_seconds, _BLOCK) if on_cpu else (device_seconds, _GPU_BLOCK)
    samples: dict[str, list[float]] = {}
    try:
        take_samples(samples, runs, rounds, seconds, fewest, tell, *how)
    except KeyboardInterrupt:
        raise Interrupted({name: summarize(s) for name, s in samples.items() if s}) from None
    return {name: summarize(s) for name, s in samples.items()}


def take_samples(
    samples: dict[str, list[float]],
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    fewest: int,
    tell: Callable[[str, float], None],
    measure: Callable[[Callable[[], object], int], float],
    block: float = _BLOCK,
) -> None:
    """What `by_turns` summarizes, into `samples`; `measure` gives seconds per run of so many."""
    estimates = {name: _estimate(run, measure) for name, run in runs.items()}
    blocks = {name: max(1, round(block / t)) for name, t in estimates.items()}
    wanted = {
        name: min(rounds, max(fewest, int(seconds / (t * blocks[name] * (1 + (t < _LONG))))))
        for name, t in estimates.items()
    }
    # The estimate of a long run is a sample like the others.
    samples |= {name: [t] if t >= _LONG else [] for name, t in estimates.items()}
    missing = {name: wanted[name] - len(samples[name]) for name in runs}
    for r in range(rounds):
        for name, run in runs.items():
            if (r + 1) * missing[name] // rounds == r * missing[name] // rounds:
                continue
            tell(name, r / rounds)
            if estimates[name] < _LONG:
                measure(run, blocks[name])
            samples[name].append(measure(run, blocks[name]))


def _estimate(
    run: Callable[[], object], measure: Callable[[Callable[[], object], int], float]
) -> float:
    """Seconds per run; from a block of short ones, as the first alone is cold, and partly clock."""
    seconds = measure(run, 1)
    return seconds if seconds >= _LONG else measure(run, max(1, round(_BLOCK / seconds)))


def wall_seconds(run: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in repeat(None, times):
        run()
    return (time.perf_counter() - start) / times


def device_seconds(run: Callable[[], object], times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def host_seconds(run: Callable[[], object], samples: int, in_a_row: int = 1) -> float:
    """Median time until a run returns to the host, of so many between two waits for the GPU.

    In a training step the host is ahead of the GPU, and does not wait for it: several in a row are
    like that, as long as their launches fit into its queue.
    """
    seconds = []
    for i in range(samples):
        if i % in_a_row == 0:
            torch.cuda.synchronize()
        seconds.append(wall_seconds(run, 1))
    torch.cuda.synchronize()
    return median(seconds)
