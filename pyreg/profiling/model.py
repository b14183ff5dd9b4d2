"""`pyreg.profile`: what each way to regularize a model costs, and which is best for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..pack import check as check_tensor
from ..pack import check_memory, has_own_dispatch, label
from ..penalties import Penalty
from .environment import environment
from .measure import Tell, measure
from .memory import free_bytes
from .parameters import Parameters, allocate, copy_of, workload_of
from .record import Record, Row, megabytes, milliseconds, percent, table_of
from .timing import Interrupted
from .unchanged import unchanged
from .ways import LIMITS, STEP, UPDATE, WAYS
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
# What to write in a program, by way.
_CALL = {
    "loop": "the loop",
    "loop, no .grad": "the loop",
    "foreach": "torch's foreach operations",
    "foreach, no autograd": "torch's foreach operations into .grad",
    "compile": "torch.compile of the loop",
    "compile, no autograd": "torch.compile of value and gradient into .grad",
    "pyreg in the loss": "pyreg.penalty(...) in the loss",
    "pyreg in the loss, no .grad": "pyreg.penalty(...) in the loss",
    "pyreg accumulate_": "reg.attach(optimizer) or reg.accumulate_()",
    "pyreg prox_": "reg.attach(optimizer, mode='prox') or reg.prox_(step)",
    "pyreg AdamW, grad": "pyreg.optim.AdamW(..., regularizer=reg)",
    "pyreg AdamW, prox": "pyreg.optim.AdamW(..., regularizer=reg, mode='prox')",
}
_JOBS = ("gradient", "update + gradient", "prox", "update + prox")  # that regularize a step
Model = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | Workload


@dataclass(frozen=True)
class Profile(Record):
    """The rows of one model and one penalty, with what follows from them."""

    penalty: str
    parameter_bytes: int  # N
    memory_bytes: int  # that profiling was predicted to need
    complete: bool = True  # False: stopped by Ctrl-C

    def best(self, exact_zeros: bool = False) -> Row | None:
        """The way that adds least to a training step; None if none was measured.

        Args:
            exact_zeros: among the ways that take a proximal step, instead of adding a gradient.
        """
        jobs = ("prox", "update + prox") if exact_zeros else ("gradient", "update + gradient")
        known = [row for row in self.rows if row.adds is not None and row.job in jobs]
        return min(known, key=lambda row: row.adds, default=None)

    def advice(self) -> str:
        """Which way is best for this model, in one sentence."""
        first = self.rows[0]
        found = {"the least cost is": self.best(), "for exact zeros": self.best(exact_zeros=True)}
        update = next((row for row in self.rows if row.way == UPDATE), None)
        said = [
            f"{why} {_CALL[row.way]}, which {_adds(row, update)}"
            for why, row in found.items()
            if row
        ]
        loop = next((row for row in self.rows if row.way == "loop" and row.adds is not None), None)
        if loop not in (None, self.best()):
            said.append(f"the loop {_adds(loop, update)}")
        if not said:
            stopped = "" if self.complete else " before it was stopped"
            return f"Nothing was measured that regularizes this model{stopped}."
        size = megabytes(self.parameter_bytes)
        of = f"For {first.workload} ({first.tensors:,} tensors, {size} MB) with {self.penalty}"
        stopped = "" if self.complete else " (stopped before all was measured)"
        return f"{of}, {'; '.join(said)}{stopped}."

    def table(self) -> str:
        """What was measured, one line a way, and the advice."""
        head = f"{self.rows[0].workload}, {self.penalty}"
        return f"{self.environment}\n\n{head}\n{table_of(self.rows)}\n\n{self.advice()}"

    def plot(self, path: Path | str | None = None) -> Any:
        """matplotlib's figure: time and memory of each way; also written to `path` if given.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plot import profile_figure  # imports matplotlib

        figure = profile_figure(self)
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure

    def to_dict(self) -> dict:
        own = {
            "penalty": self.penalty,
            "parameter_bytes": self.parameter_bytes,
            "memory_bytes": self.memory_bytes,
            "complete": self.complete,
            "advice": self.advice(),
        }
        return super().to_dict() | own

    def to_json(self, path: Path | str | None = None) -> str:
        return super().to_json(None if path is None else Path(path))


def _adds(row: Row, update: Row | None) -> str:
    """What it adds, unless that is less than the spread of what it is compared with."""
    if row.job.startswith("update") and row.p10 <= update.p90 and update.p10 <= row.p90:
        return "adds nothing to torch's fused AdamW that its spread would not hide"
    if row.adds < 0:
        return f"saves {milliseconds(-row.adds)} ms of torch's fused AdamW"
    share = "" if row.share is None else f" ({percent(row.share)} of a step)"
    return f"adds {milliseconds(row.adds)} ms{share}"


def profile(
    model: Model,
    penalty: Penalty,
    step: Callable[[], object] | None = None,
    device: torch.device | str | None = None,
    ways: Sequence[str] | None = None,
    *,
    seconds: float = 3.0,
    rounds: int = 15,
    tell: Tell = lambda what, share: None,
    trace: Path | str | None = None,
) -> Profile:
    """What each way to put a penalty into this model's training costs here.

    The ways run on copies of the parameters that require a gradient, by turns, after each one's
    result was checked against the formulas in float64. That takes memory, up to 9.5 N with the
    default ways and 2 N more with a step (N: the bytes of the parameters), which is compared with
    what is free before anything runs. `step` is the caller's own and runs on the model itself;
    parameters, buffers, gradients, random numbers and the optimizers that it steps are put back
    afterwards, from copies.

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

    Raises:
        TypeError, ValueError: what cannot be profiled, by name; nothing has run then.
        TooLarge: more memory is needed than is free; nothing has run then.
        RuntimeError: the step raised; the model is as it was.
        Interrupted: Ctrl-C (a KeyboardInterrupt); `measured` is the profile as far as it got.
    """
    _check_penalty(penalty)
    chosen = _check_ways(DEFAULT if ways is None else ways)
    if step is not None and not callable(step):
        raise TypeError(f"step: expected a callable without arguments, got {step!r}")
    if isinstance(model, Workload):
        if step is not None:
            raise ValueError("step: a workload of shapes alone takes no training step")
        named, workload = [], model
        where = torch.device("cpu" if device is None else device)
    else:
        named = _named(model)
        workload = workload_of(_name(model), named)
        where = _device(named, device, step)
    _check_device(where)
    needed = memory_needed(workload, chosen, step is not None)
    check_free(workload, needed, where)
    own = model if isinstance(model, nn.Module) else None
    with unchanged(own, [t for _, t in named]) if step is not None else nullcontext():
        if step is not None:
            step = _trying(step)
        parameters = (
            copy_of(workload.name, named, where) if named else allocate(workload, device=where)
        )
        _check_finite(parameters)
        result = Profile(environment(), (), repr(penalty), workload.bytes, needed)
        options = {"rounds": rounds, "seconds": seconds, "tell": tell, "step": step}
        options["trace"] = None if trace is None else Path(trace)
        try:
            rows = measure(parameters, penalty, chosen, **options)
        except Interrupted as stopped:
            stopped.measured = replace(result, rows=_added_up(stopped.measured), complete=False)
            raise
    return replace(result, rows=_added_up(rows))


def _added_up(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with what each way adds to a step."""
    seconds = {row.way: row.seconds for row in rows if row.seconds is not None}
    step, update = seconds.get(STEP), seconds.get(UPDATE)
    found = []
    for row in rows:
        base = update if row.job.startswith("update") else 0.0
        if row.seconds is not None and base is not None and row.job in _JOBS:
            adds = row.seconds - base
            row = replace(row, adds=adds, share=step and adds / (step + adds))
        found.append(row)
    return tuple(found)


def memory_needed(workload: Workload, ways: Sequence[str], step: bool = False) -> int:
    """Bytes, at most, beside the model: see `_NEEDS`."""
    own = [_NEEDS.get(name, 0.0) for name in ways]
    states = 2.0 if any(WAYS[name].job.startswith("update") for name in ways) else 0.0
    # Parameters, gradients, the expected result and a copy to restore; for a step two copies more.
    times = 4.0 + states + max(own, default=0.0) + (2.0 if step else 0.0)
    return round(times * workload.bytes)


# What a way takes while it runs, in N, for the penalty that takes most.
_NEEDS = {
    "loop": 3.2,
    "loop, no .grad": 3.2,
    "foreach": 3.5,
    "foreach, no autograd": 1.2,
    "compile": 1.2,
    "compile, no autograd": 0.2,
    "pyreg in the loss": 1.0,
    "pyreg in the loss, no .grad": 1.0,
}


class TooLarge(MemoryError):
    """What is to be profiled needs more memory than is free."""

    def __init__(self, workload: Workload, needed: int, free: int, device: torch.device) -> None:
        super().__init__(
            f"{workload.name}: profiling its {_gb(workload.bytes)} of parameters needs about "
            f"{_gb(needed)} on {device}, and {_gb(free)} are free"
        )
        self.fits = free / needed  # this share of it would


def check_free(workload: Workload, needed: int, device: torch.device) -> None:
    """Raise TooLarge if more is needed than is free."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise TooLarge(workload, needed, free, device)


def _gb(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{megabytes(n)} MB"


def _check_penalty(penalty: object) -> None:
    if not isinstance(penalty, Penalty):
        raise TypeError(f"penalty: expected a pyreg penalty, got {penalty!r}")
    if penalty.is_anchored:
        raise TypeError(f"penalty: {penalty!r} has an anchor or weights, which copies do not have")
    for name, s in zip(penalty.parameters, penalty.strengths, strict=True):
        if not isinstance(s, float):
            raise TypeError(f"penalty: {name} is to be a number here, got {s!r}")


def _check_ways(ways: Sequence[str]) -> list[str]:
    known = [name for name in WAYS if name not in LIMITS]
    if isinstance(ways, str) or not ways:
        raise ValueError(f"ways: expected a list of names, got {ways!r}")
    for name in ways:
        if name not in known:
            raise ValueError(f"ways: {name!r} is none of {', '.join(map(repr, known))}")
    # What an optimizer with a penalty inside is compared with.
    inside = any(WAYS[name].job.startswith("update") for name in ways)
    return list(dict.fromkeys([*ways, *([UPDATE] if inside else [])]))


def _named(model: Any) -> list[tuple[str, Tensor]]:
    """What is penalised: the parameters that require a gradient; each once, however it is tied."""
    if isinstance(model, nn.Module):
        pairs = list(model.named_parameters())
    elif isinstance(model, Mapping):
        pairs = list(model.items())
    elif isinstance(model, Iterable) and not isinstance(model, Tensor | str):
        pairs = list(model)
    else:
        raise TypeError(f"model: expected a module or (name, tensor) pairs, got {model!r}")
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            got = type(pair).__name__
            raise TypeError(f"model: item {i}: expected a (name, tensor) pair, got {got}")
    pairs = list({id(t): (name, t) for name, t in reversed(pairs)}.values())[::-1]
    trained = [(n, t) for n, t in pairs if not isinstance(t, Tensor) or t.requires_grad]
    if not trained:
        said = f"none of its {len(pairs)} parameters requires a gradient"
        raise ValueError(f"model: {said if pairs else 'it has no parameters'}")
    for i, (name, t) in enumerate(trained):
        check_tensor(t, label(i, name))
        if has_own_dispatch(t):
            kind = type(t).__name__
            raise TypeError(f"{label(i, name)}: a {kind} cannot be copied; profile what it holds")
        if t.device.type == "meta":
            raise ValueError(
                f"{label(i, name)}: is on meta and has no memory; give it some, or profile a "
                "Workload of the model's shapes"
            )
        check_memory(t, label(i, name))
    if not any(t.numel() for _, t in trained):
        raise ValueError("model: its parameters have no elements")
    return trained


def _name(model: Any) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else "tensors"


def _device(
    named: list[tuple[str, Tensor]], asked: torch.device | str | None, step: object
) -> torch.device:
    own = list(dict.fromkeys(t.device for _, t in named))
    if asked is None:
        if len(own) > 1:
            found = ", ".join(map(str, own))
            raise ValueError(f"model: it is on {found}; say where to profile it: device=...")
        return own[0]
    where = torch.device(asked)
    if step is not None and [d.type for d in own] != [where.type]:
        found = ", ".join(map(str, own))
        raise ValueError(f"step: it runs on {found}, and the ways are to be measured on {where}")
    return where


def _check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no GPU here (torch.cuda.is_available() is False)")


def _check_finite(parameters: Parameters) -> None:
    """A value that is not finite compares with nothing."""
    for name, t in parameters.named:
        if not torch.isfinite(t).all():
            raise ValueError(f"model: {name!r} has elements that are not finite")


def _trying(step: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        try:
            return step()
        except Exception as error:
            raise RuntimeError(f"step: it raised {type(error).__name__}: {error}") from error

    return run
