"""Whether a way computes what it claims: against the formulas in float64, before it is timed.

u is the unit roundoff of the parameters' dtype (2^-24 for float32, 2^-8 for bfloat16).

gradient   two products and a sum, each rounded, the strengths too: at most 4 u max|gradient|.
prox       a difference and a quotient: at most 4 u max|w|.
value      pyreg: 1e-6, its contract. Others add T per-tensor sums one by one in the parameters'
           dtype: relative error at most (T + 32) u, where 32 covers a blocked sum and strengths.
           torch's norm on the CPU sums in float32 lanes without blocks and loses far more
           (pytorch#169237). Beyond the first bound a peer is timed with a remark, since its
           gradient is right; beyond WRONG it is not timed, unless the parameters have 16 bits:
           there the loop's running sum, which has 16 bits too, comes to a stop.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..penalties import Penalty
from ..reference import compute_dtype
from .ways import PROX_STEP, Run, Way
from .workloads import Parameters, synchronize

WRONG = 0.1  # of the value: no longer the same quantity
# Elements in float64 at a time: on the CPU they stay in the cache, a GPU is kept busy by them.
_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 26}


class Disagreement(AssertionError):
    """A way's result is not the penalty's; it is not timed."""


@dataclass(frozen=True)
class Errors:
    """How far a way is from float64."""

    value: float | None = None  # relative
    elements: float | None = None  # of gradient or prox, relative to the largest element
    remark: str = ""
    seconds: float | None = None  # of this first run, with whatever it builds or compiles


class Expected:
    """The penalty's value, gradient and prox of all parameters by the formulas in float64.

    Gradient and prox are kept rounded to the parameters' dtype, 2 N in all with the weights' copy.
    """

    def __init__(self, parameters: Parameters, penalty: Penalty) -> None:
        self._penalty = penalty
        self._weights = parameters.weights.clone()
        self._elements = torch.empty_like(self._weights)
        self._job = ""
        self._chunk = _CHUNK[self._weights.device.type]
        chunks = self._weights.split(self._chunk)
        self.value = sum(penalty.value(w.double()).item() for w in chunks)

    def elements(self, job: str) -> Tensor:
        """Flat: the gradient, or the prox; kept until the other is asked for."""
        if job != self._job:
            flat = (self._weights, self._elements)
            for w, out in zip(*(t.split(self._chunk) for t in flat), strict=True):
                if job == "prox":
                    out.copy_(self._penalty.prox(w.double(), PROX_STEP))
                else:
                    out.copy_(self._penalty.grad(w.double()))
            self._job = job
        return self._elements

    def error(self, found: Tensor, job: str) -> float:
        """max |found - expected| / max |expected|, over all elements."""
        expected = self.elements(job)
        dtype = compute_dtype(expected.dtype)
        error = torch.zeros((), dtype=dtype, device=expected.device)
        for got, e in zip(*(t.split(self._chunk) for t in (found, expected)), strict=True):
            error = torch.maximum(error, (got.to(dtype) - e.to(dtype)).abs_().max())  # NaN stays
        low, high = expected.aminmax()
        return error.item() / max(high.item(), -low.item())

    def restore(self, parameters: Parameters) -> None:
        parameters.weights.copy_(self._weights)
        parameters.gradients.zero_()


def check(way: Way, run: Run, parameters: Parameters, expected: Expected) -> Errors:
    """Run once from zero gradients, compare, and put everything back.

    Raises:
        Disagreement: the errors are beyond what rounding explains.
    """
    if way.job == "limit":
        return Errors()
    expected.restore(parameters)
    synchronize(parameters.device)
    start = time.perf_counter()
    value = run()
    synchronize(parameters.device)
    seconds = time.perf_counter() - start
    u = torch.finfo(parameters.workload.dtype).eps / 2
    value_error, element_error, remark = None, None, ""
    if value is not None:
        value_error = abs(value.detach().double().item() - expected.value) / abs(expected.value)
        ours = way.name.startswith("pyreg")
        bound = 1e-6 if ours else (len(parameters.tensors) + 32) * u
        wrong = WRONG if parameters.workload.dtype.itemsize > 2 else math.inf
        if not value_error <= (bound if ours else wrong):
            raise Disagreement(f"its value is off by {value_error:.1e}, more than {bound:.0e}")
        if value_error > bound:
            remark = f"its value is off by {value_error:.1e}; a blocked sum stays below {bound:.0e}"
    if way.job != "value":
        found = parameters.weights if way.job == "prox" else parameters.gradients
        element_error = expected.error(found, way.job)
        if not element_error <= 4 * u:
            off = f"its {way.job} is off by {element_error:.1e}"
            raise Disagreement(f"{off}, more than {4 * u:.0e}")
    expected.restore(parameters)
    return Errors(value_error, element_error, remark, seconds)
