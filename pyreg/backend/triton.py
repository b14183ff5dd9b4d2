"""The Triton backend: one launch over all tensors of a CUDA or ROCm device."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from array import array
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from types import ModuleType

import torch
from torch import Tensor

from ..metric import Metric, Number
from ..pack import Pack
from ..penalties import Penalty, stack_strengths
from .addresses import look_at
from .torch import Left, add_gradient, apply_prox, apply_prox_in_metric, flat_sets


@cache
def load() -> ModuleType | str:
    """The package of kernels, or why it cannot be used."""
    try:
        return importlib.import_module("pyreg.triton_kernels")
    except ImportError as error:
        return f"{error}; pip install triton (torch's Linux wheels for GPUs bring it)"


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors. (It is asked for before triton
    is imported.)"""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _no_gpu() -> str | None:
    """Why the kernels cannot run on a GPU, or None."""
    if not torch.cuda.is_available():
        return (
            "no GPU (torch.cuda.is_available() is False); TRITON_INTERPRET=1 runs the kernels "
            "on the CPU, slowly"
        )
    return load().unusable()


class _State:
    """What is kept for one pack."""

    def __init__(self, pack: Pack, tensors: list[Tensor]) -> None:
        pack.check_rows(tensors)
        self.look = look_at(pack, tensors)
        self.layout = load().Layout(tensors, pack.rule_of, list(pack.penalties), pack.anchors)


class TritonBackend:
    name = "triton"

    def missing(self) -> str | None:
        if isinstance(kernels := load(), str):
            return kernels
        return None if interpreted() else _no_gpu()

    def version(self) -> str:
        where = "interpreter on CPU tensors" if interpreted() else torch.cuda.get_device_name()
        return f"Triton {importlib.metadata.version('triton')}, {where}"

    def refuses(self, pack: Pack, by_name: bool = False) -> str | None:
        if pack.irregular is not None:
            return pack.irregular
        serves = "cpu" if interpreted() else "cuda"
        if pack.device_type != serves:
            return f"no Triton sweeps for device {pack.device} (they serve {serves} tensors here)"
        if interpreted() and not by_name:
            return "Triton's interpreter is slow, and runs only when asked for by name"
        for name in pack.penalties:
            if name not in load().PENALTIES:
                return f"no Triton kernel for penalty {name!r}"
        return None

    def steps(self, pack: Pack) -> bool:
        """Whether `step` knows its penalties."""
        return True

    def check(self, pack: Pack, tensors: Sequence[Tensor]) -> None:
        pack.check_rows(tensors)

    def value(
        self, pack: Pack, tensors: list[Tensor], rules: Sequence[Penalty]
    ) -> tuple[Tensor, Tensor]:
        state = self._state(pack, tensors)
        w = state.look.tensors(tensors)
        return state.layout.value(w, _strengths(rules, pack), _anchors(state, pack))

    def gradient(
        self,
        pack: Pack,
        tensors: list[Tensor],
        grads: list[Tensor | None],
        rules: Sequence[Penalty],
        scale: float | Tensor,
    ) -> None:
        state = self._state(pack, tensors)
        shown = state.look.with_gradients(tensors, grads)
        if shown.others:
            raise ValueError("a gradient has other strides than its tensor")
        strengths, anchors = _strengths(rules, pack), _anchors(state, pack)
        scale = _on_device(scale, pack)
        state.layout.gradient(shown.tensors, shown.gradients, strengths, scale, anchors)

    def accumulate(
        self, pack: Pack, tensors: list[Tensor], rules: Sequence[Penalty], scale: float | Tensor
    ) -> tuple[Tensor, Left, int]:
        state = self._state(pack, tensors)
        shown = state.look.with_own_gradients(tensors)
        strengths, anchors = _strengths(rules, pack), _anchors(state, pack)
        scale = _on_device(scale, pack)
        values = state.layout.accumulate(shown.tensors, shown.gradients, strengths, scale, anchors)
        for i in shown.others:
            add_gradient(pack.penalty(i, rules), tensors[i], scale)
        return values[0], _of_rules(values), shown.present

    def prox(
        self, pack: Pack, tensors: list[Tensor], rules: Sequence[Penalty], step: float | Tensor
    ) -> None:
        state = self._state(pack, tensors)
        w, others = state.look.separate_tensors(tensors)
        strengths, anchors = _strengths(rules, pack), _anchors(state, pack)
        step = _on_device(step, pack)
        state.layout.prox(w, strengths, step, anchors)
        for i in others:
            apply_prox(pack.penalty(i, rules), tensors[i], step)
        torch.autograd.graph.increment_version(tensors)

    def prox_in_metric(
        self,
        pack: Pack,
        tensors: list[Tensor],
        metrics: Sequence[Metric],
        rules: Sequence[Penalty],
    ) -> tuple[Tensor, Left]:
        state = self._state(pack, tensors)
        shown = state.look.with_moments(tensors, [m.moment for m in metrics])
        values = state.layout.prox_in_metric(
            shown.tensors,
            shown.moments,
            shown.float32,
            _strengths(rules, pack),
            _numbers(metrics, pack.device),
            _anchors(state, pack),
        )
        for i in shown.others:
            apply_prox_in_metric(pack.penalty(i, rules), tensors[i], metrics[i])
        torch.autograd.graph.increment_version(tensors)
        with torch.no_grad():
            for i in shown.others:
                own = pack.penalty(i, rules).value(tensors[i])
                values[0] += own
                values[1 + pack.rule_of[i]] += own
        return values[0], _of_rules(values)

    def step(
        self,
        pack: Pack,
        tensors: list[Tensor],
        states: list[list[Tensor | None]],
        updates: list[str],
        sets: list[int],
        numbers: list[tuple[Sequence[float], Metric]] | Tensor,
        penalised: bytes,
        prox: bool,
        rules: Sequence[Penalty],
        scale: float | Tensor,
        *,
        masters: list[Tensor | None] | None = None,
        keys: list[int | None] | Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> tuple[Tensor, Left, Tensor] | None:
        """An optimizer's step on every row, and the penalty's gradient or prox in it.

        Args:
            states: for each kind of state, [rows]; they are changed.
            updates: [rows] an update of triton_kernels/updates.py, by name.
            sets: [rows] which of the `numbers` are a row's own.
            numbers: of each set, or float64 [sets, 12] on the device: the 9 of updates.py, and the
                metric's numerator, factor and offset.
            penalised: [rows] 1 or 0.
            scale: what the penalty's gradient is multiplied by.
            masters: [rows] float32 weights that are read and written in their tensor's place, which
                holds them rounded, or None.
            keys: [rows] 32 bits each, from which bfloat16 tensors are rounded stochastically; such
                tensors all or none.
            grad_scale: what gradients are divided by, one number on the device.
            found_inf: the same; where it is not 0, nothing is changed.

        Returns:
            The value, each rule's, and how many penalised weights are 0 now, on the device; None
            where it cannot be one sweep, and nothing was done.
        """
        mixed = isinstance(keys, list) and any(
            key is None and t.dtype == torch.bfloat16 for key, t in zip(keys, tensors, strict=False)
        )
        if pack.anchors is not None or mixed:
            return None
        rows, known = len(tensors), load().UPDATES
        if unknown := {*updates} - known.keys():
            raise ValueError(f"expected updates of {[*known]}, got {unknown}")
        for k in range(max(known[name].states for name in {*updates})):
            there = states[k] if k < len(states) else [None] * rows
            for i, (t, name) in enumerate(zip(there, updates, strict=True)):
                if t is None and known[name].states > k:
                    raise ValueError(f"row {i}: a state is missing")
        state = self._state(pack, tensors)
        shown = state.look.with_own_gradients(tensors)
        if shown.present != rows:
            raise ValueError("a gradient is missing")
        beside = state.look.states(states, masters or [])
        if shown.others or state.look.separate_tensors(tensors)[1] or beside is None:
            return None
        none = [bytes(8 * rows)] * (3 - len(states))
        values, zeros = state.layout.step(
            [shown.tensors, shown.gradients, *beside.states, *none],
            updates,
            beside.float32,
            sets,
            _sets(numbers),
            penalised,
            prox,
            _strengths(rules, pack),
            _on_device(scale, pack),
            masters=beside.masters,
            keys=_keys(keys),
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        torch.autograd.graph.increment_version(tensors)
        return values[0], _of_rules(values), zeros

    def stats(self, pack: Pack, tensors: list[Tensor]) -> Tensor:
        state = self._state(pack, tensors)
        return state.layout.stats(state.look.tensors(tensors))

    def _state(self, pack: Pack, tensors: list[Tensor]) -> _State:
        state = pack.layouts.get(self.name)
        if state is None:
            state = pack.layouts[self.name] = _State(pack, tensors)
        return state


def _anchors(state: _State, pack: Pack) -> bytes:
    """Where they are, after a look at the tensors."""
    return b"" if pack.anchors is None else state.look.anchors()


def _of_rules(values: Tensor) -> Left:
    return Left(values, values.dtype, slice(1, None))


def _strengths(rules: Sequence[Penalty], pack: Pack) -> Tensor | bytes:
    """[rules, 2] float64; on the device if any is a tensor."""
    numbers = [rule.numbers for rule in rules]
    if None in numbers:
        with torch.no_grad():
            return stack_strengths(rules, pack.device, width=2)
    return array("d", [x for own in numbers for x in (*own, 0.0)[:2]]).tobytes()


def _on_device(x: float | Tensor, pack: Pack) -> float | Tensor:
    return x.detach().to(pack.device, torch.float64) if isinstance(x, Tensor) else float(x)


def _numbers(metrics: Sequence[Metric], device: torch.device) -> Tensor | bytes:
    """[rows, 4] float64: numerator, factor, offset, root; on the device if any number is."""
    rows = [(m.numerator, m.factor, m.offset, float(m.root)) for m in metrics]
    if any(isinstance(x, Tensor) for row in rows for x in row):
        with torch.no_grad():
            return torch.stack([_column(c, device) for c in zip(*rows, strict=True)], dim=1)
    return array("d", [x for row in rows for x in row]).tobytes()


def _sets(numbers: list[tuple[Sequence[float], Metric]] | Tensor) -> Tensor | bytes:
    """[sets, 12] float64."""
    if isinstance(numbers, Tensor):
        return numbers
    return array("d", flat_sets(numbers)).tobytes()


def _keys(keys: list[int | None] | Tensor | None) -> Tensor | bytes | None:
    return array("q", [k or 0 for k in keys]).tobytes() if isinstance(keys, list) else keys


def _column(numbers: Sequence[Number], device: torch.device) -> Tensor:
    """Floats are filled in, not copied from the host, which a CUDA graph could not replay."""

    def part(x: float | None, run: list[Number]) -> Tensor:
        if x is None:
            return torch.stack(run).to(device, torch.float64)
        return torch.full((len(run),), x, dtype=torch.float64, device=device)

    runs = groupby(numbers, key=lambda x: None if isinstance(x, Tensor) else x)
    return torch.cat([part(x, list(run)) for x, run in runs])
