"""A workload in memory, or a copy of a model's parameters: what is measured."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .workloads import Workload


@dataclass(frozen=True)
class Flat:
    """All parameters of one dtype, one behind the other."""

    weights: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Parameters:
    """A workload in memory: parameters and their gradients, each dtype's in one flat tensor.

    The limits of the machine are measured on the flat tensors, the ways on the views into them:
    where the system put the pages changes a bandwidth by 10 %, and so it is the same for both.
    """

    workload: Workload
    flats: tuple[Flat, ...]  # one per dtype
    tensors: list[nn.Parameter]  # views of weights; each .grad is the same view of gradients
    states: dict[Tensor, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    """Of the optimizers that step them: one set for all of these."""

    @property
    def weights(self) -> Tensor:
        """The flat weights, where there is one dtype."""
        (flat,) = self.flats
        return flat.weights

    @property
    def gradients(self) -> Tensor:
        """The flat gradients, where there is one dtype."""
        (flat,) = self.flats
        return flat.gradients

    @property
    def device(self) -> torch.device:
        return self.flats[0].weights.device

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        names = (name for name, _ in self.workload.shapes)
        return list(zip(names, self.tensors, strict=True))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocate(
    workload: Workload, seed: int = 0, std: float = 0.02, device: torch.device | str = "cpu"
) -> Parameters:
    """Weights ~ Normal(0, std), from the seed; gradients of zeros, which exist from the start."""
    parameters = _place(workload, [_contiguous(shape) for _, shape in workload.shapes], device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for p in parameters.tensors:
            p.normal_(0.0, std, generator=generator)
    return parameters


def copy_of(
    name: str, named: Sequence[tuple[str, Tensor]], device: torch.device | str
) -> Parameters:
    """Copies of these tensors, with their strides where they are dense, and gradients of zeros."""
    workload = workload_of(name, named)
    # (What empty_like makes of a tensor that is not dense is dense.)
    strides = [torch.empty_like(t, device="meta").stride() for _, t in named]
    parameters = _place(workload, strides, device)
    with torch.no_grad():
        for p, (_, t) in zip(parameters.tensors, named, strict=True):
            p.copy_(t)
    return parameters


def workload_of(name: str, named: Sequence[tuple[str, Tensor]]) -> Workload:
    """The names, shapes and dtypes of these tensors; the commonest dtype is the workload's."""
    (dtype, _), *_ = Counter(t.dtype for _, t in named).most_common(1)
    return Workload(
        name,
        name,
        tuple((n, tuple(t.shape)) for n, t in named),
        dtype,
        {n: t.dtype for n, t in named if t.dtype != dtype},
    )


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _place(
    workload: Workload, strides: Sequence[tuple[int, ...]], device: torch.device | str
) -> Parameters:
    """Each tensor begins at a multiple of 64 bytes, as torch's own do."""
    sizes: dict[torch.dtype, int] = {}
    places = []
    for name, shape in workload.shapes:
        dtype = workload.dtype_of(name)
        places.append(sizes.setdefault(dtype, 0))
        step = 64 // dtype.itemsize
        sizes[dtype] += -(-math.prod(shape) // step) * step
    flats = {}
    for dtype, size in sizes.items():
        weights, gradients = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        gradients.fill_(0)  # zeros() may share one page of zeros until it is written
        flats[dtype] = Flat(weights, gradients)
    tensors = []
    for at, stride, (name, shape) in zip(places, strides, workload.shapes, strict=True):
        flat = flats[workload.dtype_of(name)]
        parameter = nn.Parameter(flat.weights.as_strided(shape, stride, at))
        parameter.grad = flat.gradients.as_strided(shape, stride, at)
        tensors.append(parameter)
    return Parameters(workload, tuple(flats.values()), tensors)
