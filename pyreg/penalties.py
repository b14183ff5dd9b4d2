"""The penalties as small frozen dataclasses: names, hyper-parameters and their checks.

The maths is in `pyreg.reference`; the native forms are in `csrc/penalties.h` and
`triton_kernels/penalties.py`. A strength is a number >= 0, or a 0-dim floating tensor of that range
(a schedule that changes it in place, or a learnable strength, which then receives its gradient).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from . import reference
from .reference import Strength

PENALTIES: dict[str, type[Penalty]] = {}
"""Every penalty by name, in order of definition. Tests and benchmarks run over it."""


def check_strength(name: str, s: Strength) -> Strength:
    """`s` as a float, or as the tensor it is. Raises unless it is a finite number >= 0.

    A tensor's number is looked at only where that costs no synchronisation (on the CPU).
    """
    if isinstance(s, Tensor):
        if s.ndim != 0 or not s.is_floating_point():
            got = f"{str(s.dtype).removeprefix('torch.')} {list(s.shape)}"
            raise TypeError(f"{name}: expected a number or a 0-dim floating tensor, got {got}")
        if s.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_number(name, s.item())
        return s
    if isinstance(s, bool) or not isinstance(s, Real | torch.SymFloat):
        raise TypeError(f"{name}: expected a number or a 0-dim floating tensor, got {s!r}")
    if isinstance(s, torch.SymFloat):
        return s
    s = _as_float(name, s)
    _check_number(name, s)
    return s


def _as_float(name: str, x: Real) -> float:
    try:
        return float(x)
    except OverflowError:
        raise ValueError(f"{name}: expected a finite number, got one beyond float64") from None


def check_strengths(rules: Sequence[Penalty]) -> None:
    """Raise if a strength is bad by now: a tensor may have changed since its penalty was made."""
    for rule in rules:
        for name, s in zip(rule.parameters, rule.strengths, strict=True):
            if isinstance(s, Tensor):
                check_strength(f"{type(rule).__name__}.{name}", s)


def check_scale(scale: Strength) -> None:
    """Raise unless `scale` is a finite number, of any sign, or a 0-dim tensor."""
    if isinstance(scale, Tensor):
        if scale.ndim != 0 or not scale.is_floating_point():
            got = f"{str(scale.dtype).removeprefix('torch.')} {list(scale.shape)}"
            raise TypeError(f"scale: expected a number or a 0-dim floating tensor, got {got}")
        if scale.device.type == "cpu" and not math.isfinite(scale.item()):
            raise ValueError(f"scale: expected a finite number, got {scale.item()!r}")
    elif isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale: expected a number or a 0-dim tensor, got {scale!r}")
    elif not math.isfinite(_as_float("scale", scale)):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")


def _check_number(name: str, x: float) -> None:
    if not 0 <= x < math.inf:  # (NaN is neither)
        raise ValueError(f"{name}: expected a finite number >= 0, got {x!r}")


@dataclass(frozen=True)
class Penalty:
    """Omega(w), a function of a tensor's elements, with its strengths as fields."""

    name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]  # the names of its strengths

    def __init_subclass__(cls) -> None:
        PENALTIES[cls.name] = cls
        cls.parameters = tuple(cls.__annotations__)

    def __post_init__(self) -> None:
        for name in self.parameters:
            s = check_strength(f"{type(self).__name__}.{name}", getattr(self, name))
            object.__setattr__(self, name, s)

    @property
    def strengths(self) -> tuple[Strength, ...]:
        """The fields, in order."""
        return tuple(getattr(self, name) for name in self.parameters)

    def value(self, w: Tensor) -> Tensor:
        """Omega(w): 0-dim, float32 (float64 for a float64 `w`), differentiable."""
        return reference.FORMULAS[self.name].value(w, *self.strengths)

    def grad(self, w: Tensor) -> Tensor:
        """A (sub)gradient of Omega at `w`, with sign(0) = 0: shape and dtype of `w`."""
        return reference.FORMULAS[self.name].grad(w, *self.strengths)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """argmin_u Omega(u) + (u - w)^2 / (2 step), element by element: shape and dtype of `w`.

        `step` is a number >= 0, or a tensor of steps that broadcasts to `w`.
        """
        if not isinstance(step, Tensor):
            step = check_strength("step", step)
        return reference.FORMULAS[self.name].prox(w, step, *self.strengths)


@dataclass(frozen=True)
class L1(Penalty):
    """lam * sum |w|

    The lasso penalty: its proximal step makes weights exactly zero; its subgradient does not.
    As a prior (MAP): Laplace of scale b, for a loss averaged over n samples, is lam = 1 / (n b).

    Args:
        lam: strength, >= 0.

    Source: Tibshirani (1996), "Regression shrinkage and selection via the lasso".
    """

    name = "l1"
    lam: Strength


@dataclass(frozen=True)
class L2(Penalty):
    """lam * sum w^2

    No factor 1/2: the `weight_decay` of a torch optimizer that adds it to the gradient is 2 * lam.
    As a prior (MAP): Gaussian of standard deviation s, for a loss averaged over n samples, is
    lam = 1 / (2 n s^2).

    Args:
        lam: strength, >= 0.

    Source: Hoerl & Kennard (1970), "Ridge regression".
    """

    name = "l2"
    lam: Strength


@dataclass(frozen=True)
class ElasticNet(Penalty):
    """l1 * sum |w| + l2 * sum w^2

    scikit-learn's ElasticNet(alpha, l1_ratio), on its loss with 1/(2n), is l1 = alpha * l1_ratio
    and l2 = alpha * (1 - l1_ratio) / 2.

    Args:
        l1: strength of sum |w|, >= 0.
        l2: strength of sum w^2, >= 0 (no factor 1/2).

    Source: Zou & Hastie (2005), "Regularization and variable selection via the elastic net".
    """

    name = "elastic_net"
    l1: Strength
    l2: Strength


def stack_strengths(
    rules: Sequence[Penalty], device: torch.device | str, width: int | None = None
) -> Tensor:
    """[rules, width or else the most strengths of any] float64, 0 where unused. Keeps the graph."""
    width = width or max(len(rule.strengths) for rule in rules)
    one = torch.ones((), dtype=torch.float64, device=device)
    rows = []
    for rule in rules:
        row = [
            s.to(device=device, dtype=torch.float64)
            if isinstance(s, Tensor)
            else one * s  # of a float, torch.compile can make an operand only in arithmetic
            for s in rule.strengths
        ]
        rows.append(torch.stack(row + [0 * one] * (width - len(row))))
    return torch.stack(rows)


def unstack_strengths(names: Sequence[str], strengths: Tensor) -> list[tuple[Tensor, ...]]:
    """Each rule's strengths, as 0-dim tensors."""
    return [
        tuple(row[k] for k in range(len(PENALTIES[name].parameters)))
        for name, row in zip(names, strengths, strict=True)
    ]


def rules_of(names: Sequence[str], strengths: Tensor) -> list[Penalty]:
    """The penalties of these names and stacked strengths."""
    return [
        PENALTIES[name](*own)
        for name, own in zip(names, unstack_strengths(names, strengths), strict=True)
    ]
