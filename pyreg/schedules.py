"""Strengths that change from step to step: functions of the number of optimizer steps so far.

    reg = pyreg.Regularizer(model, pyreg.L1(pyreg.schedules.Cosine(0.0, 1e-4, steps=10_000)))
    reg.attach(optimizer)

Any callable of the step that returns a finite number >= 0 will do. A Regularizer counts the steps:
an attached one by itself, another one in `advance()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

Schedule = Callable[[int], float]


def _check(**numbers: float) -> None:
    """Raise, naming it, unless each is a finite number >= 0; a tensor's is looked at in use."""
    for name, x in numbers.items():
        if isinstance(x, Tensor):
            continue
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(f"{name}: expected a finite number >= 0, got {x!r}")
        if not 0 <= x < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {x!r}")


@dataclass(frozen=True)
class Constant:
    """value"""

    value: float

    def __post_init__(self) -> None:
        _check(value=self.value)

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class _Ramp:
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: expected an integer >= 1, got {self.steps!r}")
        _check(start=self.start, end=self.end)

    def _part(self, step: int) -> float:
        return min(max(step, 0), self.steps) / self.steps


@dataclass(frozen=True)
class Linear(_Ramp):
    """start + (end - start) * step / steps, and `end` from then on"""

    def __call__(self, step: int) -> float:
        part = self._part(step)
        return (1 - part) * self.start + part * self.end


@dataclass(frozen=True)
class Cosine(_Ramp):
    """end + (start - end) * (1 + cos(pi * step / steps)) / 2, and `end` from then on

    Source: Loshchilov & Hutter (2017), "SGDR", eq. 5, without restarts.
    """

    def __call__(self, step: int) -> float:
        part = (1 + math.cos(math.pi * self._part(step))) / 2
        return part * self.start + (1 - part) * self.end


@dataclass(frozen=True)
class WarmUp:
    """then(0) * step / steps before `steps`, and then(step - steps) from then on

    Args:
        steps: how many steps the strength takes to rise from 0.
        then: what follows: a number or another schedule.
    """

    steps: int
    then: float | Schedule

    def __post_init__(self) -> None:
        Linear(0.0, 0.0, self.steps)  # checks the number of steps
        if isinstance(self.then, Tensor) or not callable(self.then):
            _check(then=self.then)

    def __call__(self, step: int) -> float:
        after = self.then(max(step - self.steps, 0)) if callable(self.then) else self.then
        return after * min(max(step, 0) / self.steps, 1.0)
