"""The ways to regularize: what each computes, how it runs once, and the traffic it should take.

gradient   value, and gradient added into gradients that exist (a later micro-batch, or
           `zero_grad(set_to_none=False)`), so that all of these ways do the same work; the ways
           named "..., no .grad" start from `zero_grad()`, where autograd keeps what it computed
value      the value alone
prox       the proximal step, in place
step       a training step without a penalty, which the caller gives
update     an optimizer's step without a penalty; "update + gradient" and "update + prox" with one
limit      one torch operation on the same memory that does no more than move it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import dispatch, pack
from ..functional import penalty as penalty_of
from ..penalties import Penalty
from ..regularizer import Regularizer
from ..tensors import label
from . import optimizers, peers
from .parameters import Parameters

Run = Callable[[], Tensor | None]  # one run; returns the value where there is one
PROX_STEP = 1.0
UNCHECKED = ("limit", "step", "update")  # jobs without a penalty


@dataclass(frozen=True)
class Way:
    """One way to do one job to all parameters."""

    name: str
    job: str  # one of the above
    prepare: Callable[[Parameters, Penalty], Run]  # what is done once per model
    traffic: Mapping[str, float] | float | None  # predicted bytes in N, by penalty if that matters
    refuses: Callable[[Parameters], str | None] = field(default=lambda parameters: None)
    limit_of: str | None = None  # for a limit: the job that can be no faster

    def traffic_of(self, penalty: Penalty) -> float | None:
        """Predicted bytes, in N."""
        if isinstance(self.traffic, Mapping):
            return self.traffic.get(penalty.name)
        return self.traffic


def _loss(parameters: Parameters, penalty: Penalty) -> Run:
    def run() -> Tensor:
        value = penalty_of(parameters.tensors, penalty)
        value.backward()
        return value

    return run


def _no_grad_yet(prepare: Callable[[Parameters, Penalty], Run]) -> Callable[..., Run]:
    """The same way with every .grad None, as zero_grad() leaves it; dropping them is timed too."""

    def prepare_fresh(parameters: Parameters, penalty: Penalty) -> Run:
        inner, tensors = prepare(parameters, penalty), parameters.tensors
        kept = [p.grad for p in tensors]
        checked = False

        def run() -> Tensor | None:
            nonlocal checked
            for p in tensors:
                p.grad = None
            try:
                value = inner()
                if not checked:  # the first run is: its result is looked for in the kept gradients
                    checked = True
                    torch._foreach_copy_(kept, [p.grad for p in tensors])
            finally:
                for p, grad in zip(tensors, kept, strict=True):
                    p.grad = grad
            return value

        return run

    return prepare_fresh


def _accumulate(parameters: Parameters, penalty: Penalty) -> Run:
    return Regularizer(parameters.named, penalty).accumulate_


def _value(parameters: Parameters, penalty: Penalty) -> Run:
    regularizer = Regularizer(parameters.named, penalty)

    @torch.no_grad()
    def run() -> Tensor:
        return regularizer()

    return run


def _stats(parameters: Parameters, penalty: Penalty) -> Run:
    """All statistics; the value is made from them, so that they can be checked."""
    regularizer = Regularizer(parameters.named, penalty)
    l1, l2 = (s or 0.0 for s in peers.strengths_of(penalty))

    def run() -> Tensor:
        stats = regularizer.stats()
        return l1 * stats.l1.sum() + l2 * stats.l2_squared.sum()

    return run


def _prox(parameters: Parameters, penalty: Penalty) -> Run:
    regularizer = Regularizer(parameters.named, penalty)
    return lambda: regularizer.prox_(PROX_STEP)


def _limits(kind: str, as_float32: bool) -> Callable[[Parameters, Penalty], Run]:
    """A torch operation on the flat memory; 16-bit elements optionally taken in pairs.

    In pairs because torch's own sums of 16-bit elements can be slower than the memory. There
    `alpha=0` leaves the bits alone; factors of 1 do so everywhere.
    """

    def prepare(parameters: Parameters, penalty: Penalty) -> Run:
        pairs = [(flat.weights, flat.gradients) for flat in parameters.flats]
        if as_float32:
            pairs = [(w.view(torch.float32), g.view(torch.float32)) for w, g in pairs]
        alpha = 0 if as_float32 else 1
        operation: Callable[[Tensor, Tensor], Tensor] = {
            "read": lambda w, g: w.sum(),
            "update": lambda w, g: g.add_(w, alpha=alpha),
            "rewrite": lambda w, g: w.mul_(1.0),
            "copy": lambda w, g: g.copy_(w),
        }[kind]

        def run() -> None:
            for w, g in pairs:
                operation(w, g)

        return run

    return prepare


def _not_16_bit(parameters: Parameters) -> str | None:
    bits = {8 * dtype.itemsize for dtype in parameters.workload.dtypes}
    return None if bits == {16} else f"elements have {max(bits)} bits"


def _make_limits() -> list[Way]:
    limits = []
    for kind, job, traffic, text in (
        ("read", "value", 1, "flat.sum()"),
        ("update", "gradient", 3, "dst.add_(src)"),
        ("rewrite", "prox", 2, "flat.mul_(1)"),
    ):
        limits += [
            Way(text, "limit", _limits(kind, False), traffic, limit_of=job),
            Way(f"{text} as float32", "limit", _limits(kind, True), traffic, _not_16_bit, job),
        ]
    return [*limits, Way("dst.copy_(src)", "limit", _limits("copy", False), 2, limit_of="prox")]


def serving(device: torch.device | str) -> list[str]:
    """The backends that sweep tensors of this device, asked for by name; torch's is not counted."""
    (sample,) = pack.build([torch.ones(1, device=device)], label, [0], ("l1",))
    names = (status.name for status in dispatch.backends() if status.name != "torch")
    found = [dispatch.backend(name, sample.device.type) for name in names]
    return [b.name for b in found if not b.missing() and not b.refuses(sample, by_name=True)]


def run_on(backend: str, make: Callable[[], Run]) -> Run:
    """What `make` returns, made and run on one of pyreg's backends, whichever else there are."""
    context = copy_context()  # entering use_backend at each run would be timed
    context.run(dispatch.requested_backend.set, backend)
    run = context.run(make)
    return lambda: context.run(run)


def on_backend(way: Way, name: str) -> Way:
    """The same way on that backend."""

    def prepare(parameters: Parameters, penalty: Penalty) -> Run:
        return run_on(name, lambda: way.prepare(parameters, penalty))

    return replace(way, name=f"{way.name}, {name}", prepare=prepare)


STEP = "no penalty"  # the name of the caller's own step
UPDATE = "AdamW, no penalty"  # of what an optimizer with the penalty inside is compared with
WAYS = {
    way.name: way
    for way in (
        Way("loop", "gradient", peers.loop, {"l1": 10, "l2": 12, "elastic_net": 22}),
        Way(
            "loop, no .grad",
            "gradient",
            _no_grad_yet(peers.loop),
            {"l1": 7, "l2": 9, "elastic_net": 19},
        ),
        Way("foreach", "gradient", peers.foreach, {"l1": 8, "l2": 10, "elastic_net": 18}),
        Way(
            "foreach, no autograd",
            "gradient",
            peers.foreach_into_grad,
            {"l1": 6, "l2": 4, "elastic_net": 10},
        ),
        Way("compile", "gradient", peers.compiled, 6, peers.compile_refuses),
        Way(
            "compile, no autograd",
            "gradient",
            peers.compiled_into_grad,
            3,
            peers.compile_refuses,
        ),
        Way("pyreg in the loss", "gradient", _loss, 4),
        Way("pyreg in the loss, no .grad", "gradient", _no_grad_yet(_loss), 3),
        Way("pyreg accumulate_", "gradient", _accumulate, 3),
        Way("pyreg prox_", "prox", _prox, 2),
        Way("pyreg value", "value", _value, 1),
        Way("pyreg stats", "value", _stats, 1),
        Way(UPDATE, "update", optimizers.plain, 7),
        Way("pyreg AdamW, grad", "update + gradient", optimizers.with_gradient, 7),
        Way("pyreg AdamW, prox", "update + prox", optimizers.with_prox, 7),
        *_make_limits(),
    )
}
"""Every way by name, slowest kind first; a table keeps this order."""
LIMITS = tuple(name for name, way in WAYS.items() if way.job == "limit")
