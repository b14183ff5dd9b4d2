"""`pyreg.profile`: what each way to regularize a model costs, and which is best for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..penalties import Penalty
from . import inputs
from .environment import environment
from .measure import Tell, measure
from .memory import check_free, memory_needed
from .parameters import allocate, copy_of, workload_of
from .record import check_writable
from .result import Profile, added_up
from .timing import Interrupted, check_budget
from .unchanged import Kept
from .ways import UPDATE
from .workloads import Workload

DEFAULT = (
    "loop",
    "foreach",
    "compile",
    "pyreg in the loss",
    "pyreg accumulate_",
    "pyreg prox_",
    UPDATE,
    "pyreg AdamW, grad",
    "pyreg AdamW, prox",
)


def profile(
    model: inputs.Model,
    penalty: Penalty,
    step: Callable[[], object] | None = None,
    device: torch.device | str | None = None,
    ways: Sequence[str] | None = None,
    *,
    seconds: float = 3.0,
    rounds: int = 15,
    tell: Tell = lambda what, share: None,
    trace: Path | str | None = None,
    counters: bool = False,
) -> Profile:
    """What each way to put a penalty into this model's training costs here.

    The ways run on copies of the parameters that require a gradient, by turns, after each one's
    result was checked against the formulas in float64; a wrong one is not timed, and its row says
    so. That takes memory, up to 10.2 N with the default ways (N: the bytes of the parameters),
    which is compared with what is free before anything runs. `step` is the caller's own and runs on
    the model itself; parameters, buffers, gradients, `training`, `requires_grad`, random numbers,
    the torch optimizers and the Regularizers of these parameters are put back afterwards, from
    copies: 2 N more, and the optimizers' states, the buffers and the parameters that are not
    penalised.

    A way `adds` its own time to a step; an optimizer with the penalty inside adds what it takes
    longer than torch's fused one without. `share` is that over the whole step, the penalty in it.

    Args:
        model: a module, a mapping, (name, tensor) pairs, or a `Workload` of shapes alone, whose
            weights are then random.
        penalty: one penalty for all parameters, with strengths that are numbers.
        step: takes one training step without a penalty.
        device: where the copies are, "cpu" or "cuda"; by default where the model is.
        ways: names of `pyreg.profiling.WAYS`; by default those of `DEFAULT`.
        seconds, rounds: at most so long, and so often, for each way.
        tell: is told what goes on and the share done.
        trace: where to write a Chrome trace of one run of each way.
        counters: on a GPU, count the bytes that its memory moves in one more run of each way, by
            CUPTI; where that cannot be, a note says why.

    Raises:
        TypeError, ValueError: what cannot be profiled, by name; nothing has run then.
        TooLarge: more memory is needed than is free; nothing has run then.
        RuntimeError: the step raised; the model is as it was.
        Interrupted: Ctrl-C (a KeyboardInterrupt); `measured` is the profile as far as it got.
    """
    inputs.check_penalty(penalty)
    check_budget(rounds, seconds)
    if trace is not None:
        trace = Path(trace).absolute()  # wherever the step goes
        check_writable("trace", trace)
    chosen = inputs.check_ways(DEFAULT if ways is None else ways)
    if step is not None and not callable(step):
        raise TypeError(f"step: expected a callable without arguments, got {step!r}")
    if isinstance(model, Workload):
        if step is not None:
            raise ValueError("step: a workload of shapes alone takes no training step")
        pairs, named, workload = [], [], model
        where = inputs.named_device("cpu" if device is None else device)
    else:
        pairs = inputs.pairs_of(model)
        named = inputs.trained(pairs)
        workload = workload_of(inputs.name_of(model), named)
        where = inputs.device_of(named, device, step)
    inputs.check_device(where)
    own = [model] if isinstance(model, nn.Module) else [t for _, t in pairs]
    kept = Kept(*([] if step is None else own))
    needed = memory_needed(workload, chosen) + kept.bytes
    check_free(workload, needed, where)
    with kept.put_back():
        if step is not None:
            step = _trying(step)
        parameters = (
            copy_of(workload.name, named, where) if named else allocate(workload, device=where)
        )
        inputs.check_finite(parameters)
        result = Profile(environment(), (), repr(penalty), workload.bytes, needed)
        options = {"rounds": rounds, "seconds": seconds, "tell": tell, "counters": counters}
        try:
            rows = measure(parameters, penalty, chosen, step=step, trace=trace, **options)
        except Interrupted as stopped:
            stopped.measured = replace(result, rows=added_up(stopped.measured), complete=False)
            raise
    return replace(result, rows=added_up(rows))


def _trying(step: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        try:
            return step()
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"step: it raised {type(error).__name__}: {error}") from error

    return run
