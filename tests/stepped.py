"""An optimizer's step in Triton as its tests take it, and how two of them are compared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import oracle
import torch
from pyreg.triton_kernels import UPDATES, launch
from torch import Tensor

import pyreg
from pyreg import pack
from pyreg.backend.torch import taken
from pyreg.backend.triton import TritonBackend
from pyreg.metric import Metric
from pyreg.penalties import Penalty
from pyreg.tensors import label

NET = pyreg.ElasticNet(0.3, 0.07)
# Of each update: numbers as its optimizer has them, with coupled and decoupled decay.
NUMBERS = {
    "adam": (1.0, 0.999, 0.01, 0.1, 0.98, 0.02, 0.05, 1.3, 1e-3),
    "adam amsgrad": (-1.0, 0.999, 0.0, 0.1, 0.98, 0.02, 0.05, 1.3, 1e-3),
    "sgd": (1.0, 1.0, 0.01, 0.1),
    "sgd momentum": (1.0, 1.0, 0.01, 0.1, 0.9, 0.5),
    "sgd nesterov": (-1.0, 1.0, 0.0, 0.1, 0.9, 1.0),
    "adagrad": (1.0, 1.0, 0.01, 0.1, 1e-3),
    "rmsprop": (1.0, 1.0, 0.01, 0.05, 0.9, 0.1, 1e-2),
    "rmsprop momentum": (1.0, 1.0, 0.01, 0.05, 0.9, 0.1, 1e-2, 0.5),
    "rmsprop centered": (-1.0, 1.0, 0.0, 0.05, 0.9, 0.1, 1e-2),
    "rmsprop centered momentum": (1.0, 1.0, 0.01, 0.05, 0.9, 0.1, 1e-2, 0.5),
}
STEP = 0.1  # a metric's numerator
KINDS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]
EXACT = [(torch.float32, torch.float32), (torch.float64, torch.float64)]


class Size(NamedTuple):
    chunks: int
    more: int = 0
    offset: int = 0  # elements between a 16-byte boundary and the first


AROUND_A_CHUNK = [Size(0), Size(0, 1), Size(1, -1), Size(1, 1), Size(0, 1100, 1)]
SEVERAL = [Size(0, 700), Size(1), Size(0, 600, 1)]


def metric(name: str) -> Metric:
    """That of the update, as its optimizer's state has it; its moment the sweep knows."""
    n = NUMBERS[name]
    if name.startswith("adam"):
        return Metric(None, STEP, n[7], n[8])
    if name.startswith("sgd"):
        return Metric(None, STEP)
    return Metric(None, STEP, 1.0, n[4] if name == "adagrad" else n[6])


@dataclass
class Step:
    """All that a step is told, and the same again for another backend."""

    updates: list[str]
    tensors: list[Tensor]
    states: list[list[Tensor | None]]
    rules: list[Penalty] = field(default_factory=lambda: [NET])
    rule_of: list[int] | None = None
    penalised: bytes | None = None
    prox: bool = False
    scale: float = 1.0
    more: dict = field(default_factory=dict)

    def copy(self) -> Step:
        """With tensors of its own, that lie at the same distance from a boundary."""
        tensors = [beside(t, t) for t in self.tensors]
        for t, own in zip(self.tensors, tensors, strict=True):
            own.grad = beside(t.grad, t)
        states = [[None if s is None else beside(s, s) for s in kind] for kind in self.states]
        return replace(self, tensors=tensors, states=states, more=dict(self.more))

    def take(self, backend=None, numbers=None):
        """(value, each rule's, zeros) as tensors, or None."""
        backend = backend or TritonBackend()
        sets = list(dict.fromkeys(self.updates))
        rule_of = self.rule_of or [0] * len(self.tensors)
        names = tuple(rule.name for rule in self.rules)
        (built,) = pack.build(self.tensors, label, rule_of, names)
        done = backend.step(
            built,
            self.tensors,
            self.states,
            self.updates,
            [sets.index(name) for name in self.updates],
            numbers if numbers is not None else [(NUMBERS[n], metric(n)) for n in sets],
            bytes([1] * len(self.tensors)) if self.penalised is None else self.penalised,
            self.prox,
            self.rules,
            self.scale,
            **self.more,
        )
        return None if done is None else [*map(taken, done)]

    def all(self) -> list[Tensor]:
        """Weights and states."""
        return [*self.tensors, *[s for kind in self.states for s in kind if s is not None]]


def beside(t: Tensor, like: Tensor) -> Tensor:
    """A copy in memory of its own, as far from a 16-byte boundary as `like` is."""
    offset = like.data_ptr() % 16 // like.element_size()
    memory = torch.empty(t.numel() + offset, dtype=t.dtype)
    return memory[offset:].copy_(t) if t.numel() else memory[:0]


def make(
    update: str, kinds=KINDS, sizes=AROUND_A_CHUNK, seed: int = 0, zeros: bool = True, **more
) -> Step:
    """Rows of these sizes in each of the kinds: (dtype, states' dtype)."""
    generator = torch.Generator().manual_seed(seed)
    tensors, states = [], [[] for _ in range(UPDATES[update].states)]
    for dtype, own in kinds:
        for size in sizes:
            n = size.chunks * launch.CHUNK // dtype.itemsize + size.more

            def new(dtype: torch.dtype, positive: bool = False, n=n, at=size.offset) -> Tensor:
                x = torch.randn(n, generator=generator).clamp(-3, 3)
                memory = torch.empty(n + at, dtype=dtype)
                return memory[at:].copy_(x.square() + 1 if positive else x)

            w = new(dtype)
            if zeros:
                w[3::7] = 0.0
            w.grad = new(dtype)
            tensors.append(w)
            for k, kind in enumerate(states):
                # a second moment is positive, and more than the square of a mean
                square = k == 0 if "rmsprop" in update or update == "adagrad" else k > 0
                s = new(own, positive=square)
                kind.append(s if square else s.mul_(0.3))
    return Step([update] * len(tensors), tensors, states, **more)


def compare(ours: Step, theirs: Step, bits: bool = False) -> None:
    for a, b in zip(ours.all(), theirs.all(), strict=True):
        if bits:
            assert oracle.same(a, b)
            continue
        u = 2**-53 if a.dtype == torch.float64 else 2**-24
        eps = torch.finfo(a.dtype).eps if a.element_size() == 2 else 0.0
        torch.testing.assert_close(a, b, rtol=eps, atol=128 * u, equal_nan=True)


def same_totals(ours, theirs, rtol: float = 2**-19) -> None:
    """2^-19: value and rules' are within 1.02e-6 each, of weights that are CLOSE."""
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=0, equal_nan=True)
    assert ours[2] == theirs[2]
