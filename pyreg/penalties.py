"""The penalties as small frozen dataclasses: names and hyper-parameters.

The maths is in `pyreg.reference`; the native forms are in `csrc/penalties.h` and
`triton_kernels/penalties.py`. A strength is a number >= 0, or a 0-dim floating tensor of that
range (one that is changed in place, or a learnable one, which then receives its gradient). A shape
(MCP's gamma, Huber's delta, ...) is one too, but above a bound, at most 1e18, and not learnable.
Either may be a schedule, a callable of the optimizer step: a Regularizer takes its number at each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from . import reference
from .reference import Strength
from .strengths import check_strength, check_weight

PENALTIES: dict[str, type[Penalty]] = {}
"""Every penalty by name, in order of definition. Tests and benchmarks run over it."""

Beside = Tensor | Mapping[str, Tensor] | None  # what lies beside the parameters


def check_strengths(rules: Sequence[Penalty]) -> None:
    """Raise if a strength is bad by now: a tensor may have changed since its penalty was made."""
    for rule in rules:
        if rule.numbers is not None:
            continue
        for name, s in zip(rule.parameters, rule.strengths, strict=True):
            if isinstance(s, Tensor):
                rule._check(name, s)


def check_differentiable(
    rules: Sequence[Penalty],
    rule_of: Sequence[int],
    tensors: Sequence[Tensor],
    added: bool = False,
    created: bool = False,
) -> None:
    """Raise if the rule of a tensor that requires a gradient has none.

    `added`: or that of a tensor with a `.grad`, to which it would be added. `created`: of any.
    """
    with_one = [reference.FORMULAS[rule.name].grad is not None for rule in rules]
    if all(with_one):
        return
    for r, t in zip(rule_of, tensors, strict=True):
        if not with_one[r] and (t.requires_grad or created or (added and t.grad is not None)):
            raise _no_gradient(rules[r])


def _no_gradient(penalty: Penalty) -> RuntimeError:
    return RuntimeError(
        f"{penalty!r} has no gradient: use prox, and its value only under torch.no_grad()"
    )


@dataclass(frozen=True)
class Penalty:
    """Omega(w) = sum over elements of weight_i * rho(w_i - anchor_i), with its strengths as fields.

    Args:
        anchor: what the elements are measured from, instead of 0. A tensor like `w`, in any swept
            dtype; for a rule of a Regularizer, a mapping from parameter names to such tensors.
            L2 around pretrained weights is L2-SP, for transfer learning.
        weight: a factor >= 0 for each element, instead of 1: a tensor, or a mapping, too. With an
            anchor and an estimate F of the Fisher information, L2(lam / 2, anchor=..., weight=F)
            is elastic weight consolidation.

    The tensors stay the caller's, and what is changed in them counts from then on; a Regularizer
    looks them up in the mappings when it is made, and looks then whether the weights are good.

    Source: Li, Grandvalet, Davoine (2018), "Explicit inductive bias for transfer learning with
    convolutional networks" (L2-SP); Kirkpatrick et al. (2017), "Overcoming catastrophic forgetting
    in neural networks" (EWC).
    """

    anchor: Beside = field(default=None, kw_only=True, repr=False, compare=False)
    weight: Beside = field(default=None, kw_only=True, repr=False, compare=False)
    name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]  # the names of its strengths, then of its shapes
    above: ClassVar[Mapping[str, float]]  # what each shape must exceed
    numbers: ClassVar[tuple[float, ...] | None] = None  # its strengths, if all are plain numbers

    def __init_subclass__(cls, above: Mapping[str, float] = MappingProxyType({})) -> None:
        PENALTIES[cls.name] = cls
        cls.above = above
        cls.parameters = tuple(cls.__annotations__)

    def __post_init__(self) -> None:
        for name in self.parameters:
            object.__setattr__(self, name, self._check(name, getattr(self, name)))
        fields = tuple([getattr(self, name) for name in self.parameters])
        if all(type(s) is float for s in fields):
            object.__setattr__(self, "numbers", fields)
        for name in ("anchor", "weight"):
            beside = getattr(self, name)
            if not (beside is None or isinstance(beside, Tensor | Mapping)):
                raise TypeError(
                    f"{type(self).__name__}.{name}: expected a tensor, or a mapping from parameter "
                    f"names to tensors, got {type(beside).__name__}"
                )

    def _check(self, name: str, s: Strength) -> Strength:
        if callable(s) and not isinstance(s, Tensor):  # known only once there is a step
            return s
        return check_strength(f"{type(self).__name__}.{name}", s, self.above.get(name))

    @property
    def strengths(self) -> tuple[Strength, ...]:
        """The fields, in order. Raises TypeError if one is a schedule."""
        if self.numbers is not None:
            return self.numbers
        fields = tuple([getattr(self, name) for name in self.parameters])
        for name, s in zip(self.parameters, fields, strict=True):
            if type(s) is not float and callable(s) and not isinstance(s, Tensor):
                raise TypeError(
                    f"{type(self).__name__}.{name} is a schedule: take the penalty at a step with "
                    ".at(step), or give it to a Regularizer, which counts steps"
                )
        return fields

    def at(self, step: int) -> Penalty:
        """This penalty with the numbers of its schedules at an optimizer step.

        Raises:
            ValueError, TypeError: a schedule returns what cannot be a strength.
        """
        if self.numbers is not None:
            return self
        numbers = {}
        for name in self.parameters:
            s = getattr(self, name)
            if type(s) is not float and callable(s) and not isinstance(s, Tensor):
                where = f"{type(self).__name__}.{name}"
                if not torch.compiler.is_compiling():  # to which a step may be a symbol
                    where += f" at step {step}"
                numbers[name] = check_strength(where, s(step), self.above.get(name))
        return replace(self, **numbers) if numbers else self

    @property
    def is_anchored(self) -> bool:
        """Whether it has an anchor or weights."""
        return self.anchor is not None or self.weight is not None

    def settled(self) -> Penalty:
        """This penalty with mappings of its own."""
        own = {
            k: dict(m) for k in ("anchor", "weight") if isinstance(m := getattr(self, k), Mapping)
        }
        return replace(self, **own) if own else self

    def beside(self, *names: str) -> tuple[Tensor | None, Tensor | None]:
        """The anchor and the weight of the one parameter of these names.

        Raises:
            KeyError: a mapping has none for it.
        """
        pair = []
        for kind in ("anchor", "weight"):
            of = getattr(self, kind)
            if isinstance(of, Mapping):
                name = next((n for n in names if n in of), None)
                if name is None:
                    raise KeyError(kind)
                of = of[name]
            pair.append(of)
        return tuple(pair)

    def of(self, *names: str) -> Penalty:
        """This penalty for the one parameter of these names: mappings give way to its tensors.

        Raises:
            KeyError: a mapping has none for it.
        """
        if not self.is_anchored:
            return self
        anchor, weight = self.beside(*names)
        return replace(self, anchor=anchor, weight=weight)

    def _beside(self, w: Tensor) -> tuple[Tensor | None, Tensor | None]:
        for kind in ("anchor", "weight"):
            beside = getattr(self, kind)
            if isinstance(beside, Tensor) and beside.shape != w.shape:
                raise ValueError(
                    f"{type(self).__name__}.{kind}: expected {list(w.shape)}, like the tensor that "
                    f"it is for, got {list(beside.shape)}"
                )
            if isinstance(beside, Mapping):
                raise TypeError(
                    f"{type(self).__name__}.{kind} is a mapping: take the penalty of one parameter "
                    "with .of(name), or give it to a Regularizer, which knows the names"
                )
        if self.weight is not None:
            check_weight(self.weight, w.dtype, f"{type(self).__name__}.weight")
        return self.anchor, self.weight

    def value(self, w: Tensor) -> Tensor:
        """Omega(w): 0-dim, float32 (float64 for a float64 `w`), differentiable unless L0's."""
        formula = reference.FORMULAS[self.name]
        if self.is_anchored:
            return reference.anchored_value(formula, w, *self._beside(w), *self.strengths)
        return formula.value(w, *self.strengths)

    def grad(self, w: Tensor) -> Tensor:
        """A (sub)gradient of Omega at `w`, 0 at 0: shape and dtype of `w`.

        Raises RuntimeError if there is none (L0).
        """
        if (formula := reference.FORMULAS[self.name].grad) is None:
            raise _no_gradient(self)
        if self.is_anchored:
            of = reference.FORMULAS[self.name]
            return reference.anchored_grad(of, w, *self._beside(w), *self.strengths)
        return formula(w, *self.strengths)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """argmin_u Omega(u) + (u - w)^2 / (2 step), element by element: shape and dtype of `w`.

        `step` is a number >= 0, or a tensor of steps that broadcasts to `w`.
        """
        if not isinstance(step, Tensor):
            step = check_strength("step", step)
        formula = reference.FORMULAS[self.name]
        if self.is_anchored:
            return reference.anchored_prox(formula, w, step, *self._beside(w), *self.strengths)
        return formula.prox(w, step, *self.strengths)


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


@dataclass(frozen=True)
class L0(Penalty):
    """lam * sum [w != 0]

    The number of weights that are not zero. It has a proximal step, hard thresholding, and no
    gradient: asking for one raises.

    Args:
        lam: strength, >= 0.

    Source: Blumensath & Davies (2008), "Iterative thresholding for sparse approximations".
    """

    name = "l0"
    lam: Strength


@dataclass(frozen=True)
class LHalf(Penalty):
    """lam * sum sqrt |w|

    Sparser than L1, and large weights shrink less. The gradient lam sign(w) / (2 sqrt |w|) grows
    without bound towards 0, where it is taken as 0: a proximal step does not have that edge.

    Args:
        lam: strength, >= 0.

    Source: Xu, Chang, Xu & Zhang (2012), "L1/2 regularization: a thresholding representation
    theory", of the objective (u - w)^2 + lam sqrt |u|, twice this one at step 1 and lam / 2.
    """

    name = "l_half"
    lam: Strength


@dataclass(frozen=True)
class Huber(Penalty, above={"delta": 0.0}):
    """lam * sum h(w), h(w) = w^2 / (2 delta) where |w| <= delta, else |w| - delta / 2

    L1 with a rounded corner: differentiable at 0, so it makes small weights and no zeros.

    Args:
        lam: strength, >= 0: the slope of the linear part.
        delta: where the linear part begins, > 0 and <= 1e18.

    Source: Huber (1964), "Robust estimation of a location parameter", over delta.
    """

    name = "huber"
    lam: Strength
    delta: Strength


@dataclass(frozen=True)
class LogSum(Penalty, above={"eps": 0.0}):
    """lam * sum log(1 + |w| / eps)

    The slope at 0 is lam / eps, and falls to 0 for large weights. For small eps it counts weights.

    Args:
        lam: strength, >= 0.
        eps: the size of a weight that counts as large, > 0 and <= 1e18.

    Source: Candes, Wakin & Boyd (2008), "Enhancing sparsity by reweighted l1 minimization".
    """

    name = "log_sum"
    lam: Strength
    eps: Strength


@dataclass(frozen=True)
class MCP(Penalty, above={"gamma": 1.0}):
    """sum of lam |w| - w^2 / (2 gamma) where |w| <= gamma lam, else gamma lam^2 / 2

    The minimax concave penalty: L1 near 0, and no pull at all on weights beyond gamma lam.

    Args:
        lam: strength, >= 0: the slope at 0.
        gamma: > 1 and <= 1e18; the larger, the more like L1. Up to a step of gamma the proximal
            objective is convex; from there on the step is a hard threshold.

    Source: Zhang (2010), "Nearly unbiased variable selection under minimax concave penalty".
    """

    name = "mcp"
    lam: Strength
    gamma: Strength


@dataclass(frozen=True)
class SCAD(Penalty, above={"a": 2.0}):
    """sum of lam |w| where |w| <= lam, (2 a lam |w| - w^2 - lam^2) / (2 (a - 1)) where
    |w| <= a lam, else (a + 1) lam^2 / 2

    Smoothly clipped absolute deviation: L1 up to lam, and no pull on weights beyond a lam.

    Args:
        lam: strength, >= 0: the slope at 0.
        a: > 2 and <= 1e18; the authors use 3.7.

    Source: Fan & Li (2001), "Variable selection via nonconcave penalized likelihood and its oracle
    properties".
    """

    name = "scad"
    lam: Strength
    a: Strength


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
    """Each rule's strengths and shapes, as 0-dim tensors; shapes are not learnable."""
    return [
        tuple(
            row[k].detach() if parameter in PENALTIES[name].above else row[k]
            for k, parameter in enumerate(PENALTIES[name].parameters)
        )
        for name, row in zip(names, strengths, strict=True)
    ]


def rules_of(names: Sequence[str], strengths: Tensor) -> list[Penalty]:
    """The penalties of these names and stacked strengths."""
    return [
        PENALTIES[name](*own)
        for name, own in zip(names, unstack_strengths(names, strengths), strict=True)
    ]
