"""Whether a way computes what it claims: against the formulas in float64, before it is timed.

u is the unit roundoff of the parameters' dtype (2^-24 for float32, 2^-8 for bfloat16).

gradient   two products and a sum, each rounded, the strengths too: at most 4 u max|gradient|.
prox       a difference and a quotient: at most 4 u max|w|. Where a penalty's prox jumps, a weight
           beside the jump may fall on its other side: in one of 1e5 elements, at most.
update     an optimizer's first step, from states of zeros: five roundings of the weight's size or
           less, at most 8 u max|w|.
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
from . import optimizers
from .parameters import Parameters, synchronize
from .ways import PROX_STEP, UNCHECKED, Run, Way

WRONG = 0.1  # of the value: no longer the same quantity
_SMOOTH = ("l1", "l2", "elastic_net", "huber")  # these have a prox without jumps
_BESIDE_A_JUMP = 1e-5  # share of the elements
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
    """The penalty's value, gradient, prox, ... of all parameters by the formulas in float64.

    Elements are kept rounded to the parameters' dtype, 2 N in all with the weights' copy.
    """

    def __init__(self, parameters: Parameters, penalty: Penalty) -> None:
        self._penalty = penalty
        self._weights = [flat.weights.clone() for flat in parameters.flats]
        self._elements = [torch.empty_like(w) for w in self._weights]
        self._job = ""
        self.jumps = penalty.name not in _SMOOTH
        self._chunk = _CHUNK[parameters.device.type]
        chunks = (w for flat in self._weights for w in flat.split(self._chunk))
        self.value = sum(penalty.value(w.double()).item() for w in chunks)

    def elements(self, job: str) -> list[Tensor]:
        """Flat, for each dtype; kept until those of another job are asked for."""
        if job != self._job:
            for pair in zip(self._weights, self._elements, strict=True):
                for w, out in zip(*(t.split(self._chunk) for t in pair), strict=True):
                    out.copy_(self._formula(w, job))
            self._job = job
        return self._elements

    def _formula(self, w: Tensor, job: str) -> Tensor:
        if job == "prox":
            return self._penalty.prox(w.double(), PROX_STEP)
        if job == "gradient":
            return self._penalty.grad(w.double())
        gradient = w * optimizers.SLOPE
        return optimizers.first_step(w.double(), gradient.double(), self._penalty, job)

    def error(self, found: list[Tensor], job: str, bound: float) -> tuple[float, float]:
        """max |found - expected| / max |expected|, and the share of elements beyond the bound."""
        worst, beyond, elements = 0.0, 0, 0
        for got_flat, flat in zip(found, self.elements(job), strict=True):
            if not flat.numel():
                continue
            low, high = flat.aminmax()
            largest = max(high.item(), -low.item()) or 1.0
            dtype = compute_dtype(flat.dtype)
            for got, e in zip(*(t.split(self._chunk) for t in (got_flat, flat)), strict=True):
                off = (got.to(dtype) - e.to(dtype)).abs_()
                error = off.max().item() / largest
                if not error <= bound:  # NaN is neither
                    beyond += int((~(off <= bound * largest)).sum())
                worst = error if error != error or worst != worst else max(worst, error)
            elements += flat.numel()
        return worst, beyond / max(elements, 1)

    def restore(self, parameters: Parameters) -> None:
        """The weights as they were, gradients and states of zeros."""
        for flat, weights in zip(parameters.flats, self._weights, strict=True):
            flat.weights.copy_(weights)
            flat.gradients.zero_()
        for state in parameters.states.values():
            for tensor in state.values():
                tensor.zero_()


def check(way: Way, run: Run, parameters: Parameters, expected: Expected) -> Errors:
    """Run once from zero gradients, compare, and put everything back.

    Raises:
        Disagreement: the errors are beyond what rounding explains.
    """
    if way.job in UNCHECKED:
        run()  # so that what it builds is there
        return Errors()
    expected.restore(parameters)
    if updates := way.job.startswith("update"):
        for flat in parameters.flats:
            flat.gradients.copy_(flat.weights * optimizers.SLOPE)
    synchronize(parameters.device)
    start = time.perf_counter()
    value = run()
    synchronize(parameters.device)
    seconds = time.perf_counter() - start
    u = max(torch.finfo(dtype).eps for dtype in parameters.workload.dtypes) / 2
    value_error, element_error, remark = None, None, ""
    if value is not None:
        off = abs(value.detach().double().item() - expected.value)
        value_error = off / (abs(expected.value) or 1.0)
        ours = way.name.startswith("pyreg")
        bound = 1e-6 if ours else (len(parameters.tensors) + 32) * u
        wrong = WRONG if all(d.itemsize > 2 for d in parameters.workload.dtypes) else math.inf
        if not value_error <= (bound if ours else wrong):
            raise Disagreement(f"its value is off by {value_error:.1e}, more than {bound:.0e}")
        if value_error > bound:
            remark = f"its value is off by {value_error:.1e}; a blocked sum stays below {bound:.0e}"
    if way.job != "value":
        in_place = updates or way.job == "prox"
        found = [flat.weights if in_place else flat.gradients for flat in parameters.flats]
        bound = (8 if updates else 4) * u
        element_error, beyond = expected.error(found, way.job, bound)
        jumps = way.job.endswith("prox") and expected.jumps
        if beyond > (_BESIDE_A_JUMP if jumps else 0):
            off = f"its {way.job} is off by {element_error:.1e}"
            raise Disagreement(f"{off}, more than {bound:.0e}")
    expected.restore(parameters)
    return Errors(value_error, element_error, remark, seconds)
