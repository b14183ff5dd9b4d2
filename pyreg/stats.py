"""What `Regularizer.stats()` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .text import table


@dataclass(frozen=True)
class Stats:
    """Norms and counts per parameter, from one sweep: [parameters] tensors on the CPU."""

    names: list[str]
    elements: list[int]
    table: Tensor  # [parameters, 5] float64: the five columns below

    @property
    def l1(self) -> Tensor:
        """sum |w|"""
        return self.table[:, 0]

    @property
    def l2_squared(self) -> Tensor:
        """sum w^2"""
        return self.table[:, 1]

    @property
    def max_abs(self) -> Tensor:
        """max |w|; NaN if any element is, 0 for an empty parameter"""
        return self.table[:, 2]

    @property
    def zeros(self) -> Tensor:
        """number of elements equal to 0, int64"""
        return self.table[:, 3].long()

    @property
    def non_finite(self) -> Tensor:
        """number of NaN and infinite elements, int64"""
        return self.table[:, 4].long()

    def total(self) -> dict[str, float]:
        """Over all parameters: elements, l1, l2_squared, max_abs, zeros, non_finite, sparsity."""
        elements, zeros = sum(self.elements), int(self.zeros.sum())
        return {
            "elements": elements,
            "l1": self.l1.sum().item(),
            "l2_squared": self.l2_squared.sum().item(),
            "max_abs": self.max_abs.max().item(),
            "zeros": zeros,
            "non_finite": int(self.non_finite.sum()),
            "sparsity": zeros / elements if elements else 0.0,
        }

    def __str__(self) -> str:
        total = self.total()
        rows = [
            (name, n, *row)
            for name, n, row in zip(self.names, self.elements, self.table.tolist(), strict=True)
        ]
        keys = ("elements", "l1", "l2_squared", "max_abs", "zeros", "non_finite")
        rows.append(("total", *(total[key] for key in keys)))
        return table(
            ["parameter", "elements", "sum |w|", "||w||", "max |w|", "zeros", "non-finite"],
            [
                [
                    name,
                    f"{n:,}",
                    f"{l1:.6g}",
                    f"{math.sqrt(l2):.6g}",
                    f"{top:.6g}",
                    f"{100 * z / n if n else 0:.1f} %",
                    f"{int(bad):,}",
                ]
                for name, n, l1, l2, top, z, bad in rows
            ],
            right=range(1, 7),
        )
