"""The sweeps of one backend over some tensors, as the tests call them, and what they sweep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from cases import CHUNK, DTYPES, fill, penalties
from torch import Tensor

from pyreg import pack
from pyreg.backend.torch import taken
from pyreg.backend.triton import interpreted
from pyreg.dispatch import backend as backend_by_name
from pyreg.metric import Metric
from pyreg.penalties import Penalty
from pyreg.tensors import label


class Sweeps:
    """The sweeps of one backend over some tensors, each row with its own rule."""

    def __init__(
        self,
        tensors: list[Tensor],
        rules: list[Penalty],
        rule_of: list[int] | None = None,
        backend: str = "native",
        anchors: list[pack.Pair] | None = None,
    ) -> None:
        self.tensors, self.rules = tensors, rules
        self.of_rules: list[float] = []  # each rule's value in the last accumulate or metric's prox
        self.rule_of = rule_of or [0] * len(tensors)
        names = tuple(rule.name for rule in rules)
        (self.pack,) = pack.build(tensors, label, self.rule_of, names, anchors)
        self.backend = backend_by_name(backend, self.pack.device.type)
        why = self.backend.refuses(self.pack, by_name=True)
        if why and anchors and self.pack.irregular is None:
            pytest.skip(why)
        assert why is None

    def value(self) -> float:
        return self.backend.value(self.pack, self.tensors, self.rules)[0].item()

    def sums(self) -> list[list[float]]:
        """[rules, sums] the derivatives of the value by the strengths."""
        sums = self.backend.value(self.pack, self.tensors, self.rules)[1]
        return taken(sums).tolist()

    def gradient(self, scale: float = 1.0) -> list[Tensor]:
        """Written into memory full of NaN."""
        grads = self.pack.flat_gradient()
        for g in grads:
            g.fill_(math.nan)
        self.gradient_into(grads, scale)
        return grads

    def gradient_into(self, grads: list[Tensor | None], scale: float = 1.0) -> None:
        self.backend.gradient(self.pack, self.tensors, grads, self.rules, scale)

    def accumulate(self, grads: list[Tensor | None], scale: float = 1.0) -> float:
        for t, g in zip(self.tensors, grads, strict=True):
            t.grad = g
        value, of_rules, present = self.backend.accumulate(
            self.pack, self.tensors, self.rules, scale
        )
        assert present == sum(g is not None for g in grads)
        return self._value(value, of_rules)

    def prox(self, step: float) -> None:
        self.backend.prox(self.pack, self.tensors, self.rules, step)

    def prox_in_metric(self, metrics: list[Metric]) -> float:
        return self._value(
            *self.backend.prox_in_metric(self.pack, self.tensors, metrics, self.rules)
        )

    def _value(self, value: Tensor | float, of_rules: Tensor | list[float]) -> float:
        self.of_rules = taken(of_rules).tolist()
        return float(value)

    def stats(self) -> Tensor:
        return self.backend.stats(self.pack, self.tensors)

    def everything(self) -> list[Tensor]:
        """The results of all sweeps; the last two, proxes, change the tensors."""
        grads = [torch.ones_like(t) for t in self.tensors]
        results = [
            torch.tensor(self.value()).double(),
            *self.gradient(0.7),
            torch.tensor(self.accumulate(grads, 0.7)).double(),
            *grads,
            self.stats(),
        ]
        metrics = [Metric(g, 0.2, 1.5, 0.1) for g in moments(self.tensors)]
        results.append(torch.tensor(self.prox_in_metric(metrics)).double())
        self.prox(0.3)
        return [*results, *self.tensors]


@dataclass(frozen=True)
class Place:
    """A backend on a device."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    def sweeps(
        self,
        tensors: list[Tensor],
        rules: list[Penalty],
        rule_of: list[int] | None = None,
        anchors: list[pack.Pair] | None = None,
    ) -> Sweeps:
        return Sweeps(tensors, rules, rule_of, self.backend, anchors)

    def serves(self, penalty: Penalty) -> bool:
        """Whether the backend has a kernel for it."""
        backend = backend_by_name(self.backend, self.device)
        tensors = [torch.ones(1, device=self.device)]
        (sample,) = pack.build(tensors, label, [0], (penalty.name,))
        return backend.refuses(sample, by_name=True) is None

    def rounds_twice(self, dtype: torch.dtype) -> bool:
        """Whether l1 + 2 l2 w may be off by two roundings from the oracle's.

        In float64 the oracle itself rounds twice; the interpreter's tl.fma is a product and a sum.
        """
        return dtype == torch.float64 or interpreted()

    def missing(self) -> str | None:
        """Why this backend cannot sweep tensors of this device here, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no GPU (torch.cuda.is_available() is False)"
        backend = backend_by_name(self.backend, self.device)
        if (why := backend.missing()) is not None:
            return why
        (sample,) = pack.build([torch.ones(1, device=self.device)], label, [0], ("l1",))
        return backend.refuses(sample, by_name=True)


ON_CPU = Place("triton" if interpreted() else "native", "cpu")
ON_GPU = [Place("triton", "cuda"), Place("native", "cuda")]


def each(places: list[Place]) -> list:
    """The parameters of a fixture: those on a GPU have the marker."""
    gpu = pytest.mark.gpu
    return [pytest.param(p, marks=gpu if p.device == "cuda" else (), id=str(p)) for p in places]


def old_gradients(tensors: list[Tensor]) -> list[Tensor]:
    """Numbers like the tensors' own, with their strides."""
    return [torch.empty_like(t).copy_(t.flip(list(range(t.ndim))) * 3) for t in tensors]


def moments(tensors: list[Tensor]) -> list[Tensor]:
    """Numbers >= 0 like the tensors' own, with their strides."""
    return [g.abs_() for g in old_gradients(tensors)]


def flat(tensors: list[Tensor]) -> Tensor:
    """All elements in one copy: the formulas go by element, so thousands of rows are one check."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def mixed(
    seed: str = "mixed",
    place: Place = ON_CPU,
    elements: int = 3 * CHUNK,
    rules: list[Penalty] | None = None,
) -> tuple[list[Tensor], list[Penalty], list[int]]:
    """Every dtype under every penalty in one call, with an empty tensor before each."""
    rules = list(filter(place.serves, penalties())) if rules is None else rules
    tensors, rule_of = [], []
    for r in range(len(rules)):
        for i, dtype in enumerate(DTYPES):
            sizes = (0, elements + 7 * r + i)
            tensors += [fill((n,), dtype, place.device, f"{seed}{r}{i}") for n in sizes]
            rule_of += [r, r]
    return tensors, rules, rule_of
