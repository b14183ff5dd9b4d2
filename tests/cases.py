"""The one list that every backend runs: penalties x shapes x dtypes.

A case builds its tensors on a device, so a backend for another device runs the same list. Values
are seeded by the case's name: normal numbers, with exact zeros of both signs among them.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyreg.penalties import PENALTIES, Penalty
from pyreg.reference import FORMULAS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHUNK = 4096  # csrc/table.h: kChunk
LANES = 256  # csrc/cpu/kernels.cpp: kLanes
SEGMENTS = 4096  # csrc/table.h: kSegments
TRITON_CHUNKS = (512, 1024, 2048)  # triton_kernels/sweeps.py: CHUNK, or half, by the dtype's size

# Example strengths (and shapes) by penalty. 0 is allowed as a strength; 1e-3 is no float32; each
# penalty has at least one set. Weights are about 0.5, so each branch is met.
STRENGTHS: dict[str, tuple[tuple[float, ...], ...]] = {
    "l1": ((1e-3,),),
    "l2": ((0.37,),),
    "elastic_net": ((1e-3, 0.2), (0.3, 0.0), (0.0, 1e-2)),
    "l0": ((0.07,),),
    "l_half": ((0.05,),),
    "huber": ((0.3, 0.1), (1e-3, 2.0)),
    "log_sum": ((0.1, 0.2), (0.0, 1e-3)),
    "mcp": ((0.3, 1.5), (1e-3, 30.0)),
    "scad": ((0.15, 3.7), (0.4, 2.5)),
}


def penalties() -> list[Penalty]:
    """Every registered penalty at every set of example strengths."""
    return [cls(*s) for name, cls in PENALTIES.items() for s in STRENGTHS[name]]


def differentiable() -> list[Penalty]:
    """Those that have a gradient."""
    return [penalty for penalty in penalties() if FORMULAS[penalty.name].grad is not None]


def fill(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: str
) -> Tensor:
    """Contiguous values of about 0.1 to 1, every 7th one 0 and every 11th one -0."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    flat = torch.randn(torch.Size(shape).numel(), generator=generator) * 0.5
    flat[3::7] = 0.0
    flat[5::11] = -0.0
    return flat.view(shape).to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """Some tensors. `build(dtype, device)` gives them; `regular` ones a native sweep can walk."""

    name: str
    make: Callable[[Callable[..., Tensor]], list[Tensor]]
    regular: bool = True

    def build(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
        count = itertools.count()
        return self.make(lambda *shape: fill(shape, dtype, device, f"{self.name}{next(count)}"))

    def __repr__(self) -> str:
        return self.name


def _thousands(new: Callable[..., Tensor]) -> list[Tensor]:
    """4,000 tensors of 0 to 6 elements, out of one storage (as many offsets as there are)."""
    sizes = [(0, 1, 0, 2, 3, 6, 5)[i % 7] for i in range(4000)]
    return list(new(sum(sizes)).split(sizes))


CASES = [
    Case("empty", lambda new: [new(0)]),
    Case("empties", lambda new: [new(0), new(3, 0), new(0, 2), new(0).expand(3, 0)]),
    Case("scalar", lambda new: [new()]),
    Case("one", lambda new: [new(1)]),
    *(Case(f"{n}", lambda new, n=n: [new(n)]) for n in (15, 16, 17, 31, 32, 33)),
    *(Case(f"lanes{d:+}", lambda new, d=d: [new(LANES + d)]) for d in (-1, 0, 1)),
    *(Case(f"chunk{d:+}", lambda new, d=d: [new(CHUNK + d)]) for d in (-1, 0, 1)),
    Case("kib", lambda new: [new(n + d) for n in TRITON_CHUNKS for d in (-1, 0, 1)]),
    Case("segments", lambda new: [new(5 * CHUNK + 1), new(CHUNK), new(3 * CHUNK - 1)]),
    Case("threaded", lambda new: [new(9 * CHUNK + 13), new(7), new(257, 17)]),
    Case("offset", lambda new: [new(18)[1:], new(CHUNK + 2)[1:], new(9, 8)[1:]]),
    Case("channels_last", lambda new: [new(5, 7, 3, 9).to(memory_format=torch.channels_last)]),
    Case("transposed", lambda new: [new(33, 65).t(), new(3, 4, 5).permute(2, 0, 1)]),
    Case(
        "size_one", lambda new: [new(1, 9, 1), new(6, 1).t(), new(12).as_strided((1, 12), (7, 1))]
    ),
    Case(
        "hundreds",
        lambda new: [new(*((0,) if i % 5 == 0 else (i, 3))) for i in range(350)],
    ),
    Case("thousands", _thousands),
    Case("expanded", lambda new: [new(5, 1).expand(5, 300), new(4), new().expand(3)], False),
    Case("strided", lambda new: [new(600)[::2], new(20, 30)[:, 3:17], new(2, 2)], False),
    Case("overlapping", lambda new: [new(20).as_strided((9, 4), (2, 1))], False),
    Case("negated", lambda new: [torch._neg_view(new(40)), new(3)], False),
]
REGULAR = [case for case in CASES if case.regular]
IRREGULAR = [case for case in CASES if not case.regular]
