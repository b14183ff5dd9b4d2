"""Time by turns: every way runs once in each round, so that a slow minute falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

_BLOCK = 2e-3  # seconds: shorter runs are timed several at a time, far above the clock's grain
_LONG = 0.2  # seconds: longer runs are not warmed up before each sample


@dataclass(frozen=True)
class Timing:
    """Seconds per run."""

    median: float
    p10: float
    p90: float
    samples: int


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
) -> dict[str, Timing]:
    """Time all runs alternately.

    A sample is one untimed run, which brings caches and allocator to the state that this way leaves
    behind, then a block of timed ones. (torch.utils.benchmark.Timer warms up twice before every
    sample, long runs too, which would triple the time of the slowest ways.)

    Args:
        runs: by name; each has run before, so that nothing is built or compiled here.
        rounds: samples of each run, except that
        seconds: bounds the time spent on one run, as far as
        fewest: samples allow; these are then spread evenly over the rounds.
        tell: is told the name of what runs and the share done.
    """
    estimates = {name: _seconds(run, 1) for name, run in runs.items()}
    blocks = {name: max(1, round(_BLOCK / t)) for name, t in estimates.items()}
    wanted = {
        name: min(rounds, max(fewest, int(seconds / (t * (blocks[name] + (t < _LONG))))))
        for name, t in estimates.items()
    }
    # The estimate of a long run is a sample like the others.
    samples = {name: [t] if t >= _LONG else [] for name, t in estimates.items()}
    missing = {name: wanted[name] - len(samples[name]) for name in runs}
    for r in range(rounds):
        for name, run in runs.items():
            if (r + 1) * missing[name] // rounds == r * missing[name] // rounds:
                continue
            tell(name, r / rounds)
            if estimates[name] < _LONG:
                run()
            samples[name].append(_seconds(run, blocks[name]))
    return {name: summarize(s) for name, s in samples.items()}


def _seconds(run: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times
