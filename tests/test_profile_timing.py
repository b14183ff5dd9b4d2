"""The timing loop, under a clock of which every reading takes time."""

from __future__ import annotations

import pytest

from pyreg.profiling import timing

READING = 1e-6  # seconds: some twenty times that of a real clock
TELLING = 1e-4  # more than a progress bar that is drawn four times a second, on average
MOST = 0.02  # of what is measured


class Clock:
    """Stands still unless it is read, or something is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.inside = 0.0  # of that in runs

    def perf_counter(self) -> float:
        self.now += READING
        return self.now

    def tell(self, name: str, share: float) -> None:
        self.now += TELLING

    def run(self, seconds: float, cold: float) -> None:
        """A run takes so long; the first also finds caches cold."""
        seconds += 0.0 if self.inside else cold
        self.now += seconds
        self.inside += seconds


@pytest.mark.parametrize("cold", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize("seconds", [1e-6, 3e-5, 1e-3, 7e-3, 5e-2, 0.5, 3.0])
def test_measuring_takes_less_than_two_percent(seconds, cold, monkeypatch):
    """In a sample, where it would pass for the run's own time, and of the whole."""
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
    (found,) = timing.by_turns(
        {"run": lambda: clock.run(seconds, cold)}, 15, 3.0, tell=clock.tell
    ).values()
    assert seconds * (1 - 1e-9) <= found.median <= seconds * (1 + MOST)
    assert found.p90 <= (seconds + (cold if seconds >= 0.2 else 0)) * (1 + MOST)
    assert clock.now <= clock.inside * (1 + MOST)


def test_what_runs_between_two_samples_is_not_timed(monkeypatch):
    """A run that follows another way's finds caches cold."""
    clock, last = Clock(), []
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)

    def run(name: str) -> None:
        clock.now += 1e-3 if last == [name] else 6e-3
        last[:] = [name]

    for found in timing.by_turns({n: lambda n=n: run(n) for n in "ab"}, 15, 3.0).values():
        assert found.p90 <= 1e-3 * (1 + MOST)


def test_few_samples_are_spread_over_the_rounds(monkeypatch):
    """So that a slow minute falls on all ways. (The first of a long run is its estimate.)"""
    clock, rounds = Clock(), []
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
    runs = {"short": lambda: clock.run(1e-3, 0.0), "long": lambda: clock.run(1.0, 0.0)}

    def tell(name: str, share: float) -> None:
        if name == "long":
            rounds.append(round(15 * share))

    assert timing.by_turns(runs, 15, 0.0, fewest=5, tell=tell)["long"].samples == 5
    assert rounds == [3, 7, 11, 14]


def test_a_summary():
    samples = [7.0, 1.0, 11.0, 3.0, 5.0, 9.0, 2.0, 8.0, 4.0, 10.0, 6.0]
    assert timing.summarize(samples) == timing.Timing(median=6.0, p10=2.0, p90=10.0, samples=11)
    assert timing.summarize([3.0]) == timing.Timing(3.0, 3.0, 3.0, 1)
