"""The native backend: csrc's sweeps over CPU tensors. (Those over CUDA tensors: cuda.py.)"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..metric import Metric
from ..pack import GradientMismatch, Pack, StaleLayout
from ..penalties import Penalty
from . import cuda
from .torch import add_gradient, apply_prox, apply_prox_in_metric, flat_sets


@cache
def load() -> ModuleType | str:
    """The compiled module, or why there is none."""
    try:
        return importlib.import_module("pyreg._native")
    except ImportError as error:
        return f"the compiled module is missing ({error})"


def _number(x: float | Tensor) -> float:
    """A float, without torch's warning about a tensor that requires a gradient."""
    return float(x.detach() if isinstance(x, Tensor) else x)


class NativeBackend:
    name = "native"

    def missing(self) -> str | None:
        native = load()
        return native if isinstance(native, str) else None

    def version(self) -> str:
        native = load()
        if isinstance(native, str):
            return ""
        threads = "OpenMP" if native.has_openmp() else "one thread"
        why = cuda.CudaBackend().missing()
        gpu = cuda.CudaBackend().version() if why is None else f"no CUDA: {why}"
        return f"CPU, {native.instruction_set()}, {threads}; {gpu}"

    def refuses(self, pack: Pack, by_name: bool = False) -> str | None:
        if pack.irregular is not None:
            return pack.irregular
        if pack.device_type != "cpu":
            return f"no native sweeps for device {pack.device}"
        for name in pack.penalties:
            if name not in load().penalties:
                return f"no native kernel for penalty {name!r}"
        return None

    def _layout(self, pack: Pack, tensors: list[Tensor]):
        layout = pack.layouts.get(self.name)
        if layout is None:
            pack.check_rows(tensors)
            layout = load().Layout(tensors, pack.rule_of, list(pack.penalties), pack.anchors or [])
            pack.layouts[self.name] = layout
        return layout

    def _strengths(self, rules: Sequence[Penalty]) -> list[float]:
        width = load().max_strengths
        padded = [(*rule.strengths, *[0.0] * (width - len(rule.strengths))) for rule in rules]
        return [_number(s) for row in padded for s in row]

    def _sweep(self, verb: str, pack: Pack, tensors: list[Tensor], *args, **options):
        native = load()
        layout = self._layout(pack, tensors)
        try:
            return getattr(layout, verb)(tensors, *args, torch.get_num_threads(), **options)
        except native.StaleLayout as error:
            raise StaleLayout(str(error)) from None
        except native.GradientMismatch:
            raise GradientMismatch from None

    def steps(self, pack: Pack) -> bool:
        """Whether `step` knows its penalties."""
        return True

    def check(self, pack: Pack, tensors: list[Tensor]) -> None:
        pack.check_rows(tensors)

    def value(
        self, pack: Pack, tensors: list[Tensor], rules: Sequence[Penalty]
    ) -> tuple[Tensor, list[list[float]]]:
        value, sums = self._sweep("value", pack, tensors, self._strengths(rules))
        width = load().max_sums
        rows = [sums[i : i + width] for i in range(0, len(sums), width)]
        return torch.tensor(value, dtype=torch.float64, device=pack.device), rows

    def gradient(
        self,
        pack: Pack,
        tensors: list[Tensor],
        grads: list[Tensor | None],
        rules: Sequence[Penalty],
        scale: float | Tensor,
    ) -> None:
        self._sweep("gradient", pack, tensors, grads, self._strengths(rules), _number(scale))

    def accumulate(
        self,
        pack: Pack,
        tensors: list[Tensor],
        rules: Sequence[Penalty],
        scale: float | Tensor,
        keep_gil: bool = False,
    ) -> tuple[float, list[float], int]:
        """`keep_gil`: let no other Python thread run meanwhile."""
        strengths = self._strengths(rules)
        value, of_rules, present, others = self._sweep(
            "accumulate", pack, tensors, strengths, _number(scale), keep_gil=keep_gil
        )
        for i in others:
            add_gradient(pack.penalty(i, rules), tensors[i], scale)
        return value, of_rules, present

    def prox(
        self, pack: Pack, tensors: list[Tensor], rules: Sequence[Penalty], step: float | Tensor
    ) -> None:
        for i in self._sweep("prox", pack, tensors, self._strengths(rules), _number(step)):
            apply_prox(pack.penalty(i, rules), tensors[i], step)
        torch.autograd.graph.increment_version(tensors)

    def prox_in_metric(
        self,
        pack: Pack,
        tensors: list[Tensor],
        metrics: Sequence[Metric],
        rules: Sequence[Penalty],
    ) -> tuple[float, list[float]]:
        value, of_rules, others = self._sweep(
            "prox_in_metric",
            pack,
            tensors,
            [m.moment for m in metrics],
            [float(x) for m in metrics for x in (m.numerator, m.factor, m.offset)],
            [m.root for m in metrics],
            self._strengths(rules),
        )
        for i in others:
            apply_prox_in_metric(pack.penalty(i, rules), tensors[i], metrics[i])
        for i in others:
            own = pack.penalty(i, rules).value(tensors[i]).item()
            value += own
            of_rules[pack.rule_of[i]] += own
        torch.autograd.graph.increment_version(tensors)
        return value, of_rules

    def step(
        self,
        pack: Pack,
        tensors: list[Tensor],
        states: list[list[Tensor | None]],
        updates: list[str],
        sets: list[int],
        numbers: list[tuple[Sequence[float], Metric]],
        penalised: bytes,
        prox: bool,
        rules: Sequence[Penalty],
        scale: float,
        masters: Sequence[Tensor | None] = (),
        keys: Sequence[int | None] = (),
    ) -> tuple[float, list[float], int] | None:
        """An optimizer's step on every row, and the penalty's gradient or prox in it.

        Args:
            states: for each kind of state, [rows]; they are changed.
            updates: [rows] an update of csrc/updates.h, by name.
            sets: [rows] which of the `numbers` are a row's own.
            penalised: [rows] 1 or 0.
            scale: what the penalty's gradient is multiplied by.
            masters: nothing, or [rows] the float32 weights that a 16-bit row is the rounded copy
                of, or None.
            keys: nothing, or [rows] where the random roundings of a bfloat16 row begin, or None.

        Returns:
            The value, each rule's, and how many penalised weights are 0 now; None where it cannot
            be one sweep, and nothing was done.
        """
        native = load()
        index = {name: native.updates.index(name) for name in set(updates)}
        done = self._sweep(
            "step",
            pack,
            tensors,
            states,
            [index[name] for name in updates],
            sets,
            flat_sets(numbers),
            penalised,
            prox,
            self._strengths(rules),
            scale,
            masters=list(masters),
            keys=list(keys),
        )
        if done is not None:
            torch.autograd.graph.increment_version(tensors)
        return done

    def stats(self, pack: Pack, tensors: list[Tensor]) -> Tensor:
        rows = self._sweep("stats", pack, tensors)
        return torch.tensor(rows, dtype=torch.float64, device=pack.device).view(-1, 5)
