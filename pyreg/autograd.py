"""The differentiable value: an autograd Function in eager mode, the ops under torch.compile.

Forward reads N. Backward writes the gradient into one flat buffer, whose views autograd then adds
to each `.grad` (5 N) or keeps where `.grad` is None (2 N). Where every `.grad` exists and nobody
would see the difference, it adds to them itself, in the accumulate sweep: 3 N, and no buffer.

The torch backend needs none of this: there the value is a graph of torch operations, and so it is
inside `torch.func` transforms and in a double backward.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, reference
from .backend.torch import TorchBackend, taken
from .dispatch import choose, require_formulas
from .distributed import Shards, differentiable
from .memory import is_freed
from .pack import GradientMismatch, Pack, Packs, StaleLayout, constants, geometry
from .penalties import (
    Penalty,
    check_differentiable,
    check_strengths,
    rules_of,
    stack_strengths,
    unstack_strengths,
)
from .sweeps import add_values, by_shards
from .tensors import Label, Pair, check

_version = attrgetter("_version")
_tensor_hooks = attrgetter("_backward_hooks")
_gradient_hooks = attrgetter("_post_accumulate_grad_hooks")
_grad = attrgetter("grad")
_requires_grad = attrgetter("requires_grad")


def value(packs: Packs, tensors: list[Tensor], rules: Sequence[Penalty], label: Label) -> Tensor:
    """Omega over all tensors, 0-dim, differentiable in the tensors and in tensor strengths.

    For eager mode; while torch.compile traces, `ops.value` takes its place.
    """
    check_strengths(rules)
    if torch.is_grad_enabled():
        check_differentiable(rules, packs.rule_of, tensors)
    if torch._C._len_torch_dispatch_stack():  # make_fx, fake tensors, ...
        for i, t in enumerate(tensors):
            check(t, label(i))
        if packs.anchors is not None:
            return traced_value(tensors, rules, packs.rule_of, packs.anchors)
        return ops.value(tensors, rules, packs.rule_of)
    if (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    ):
        return _transformed_value(packs, tensors, rules, label)

    def sweep(current: list[Pack]) -> Tensor:
        values, shared = [], {None: rules}
        for shards, _ in by_shards(current) if packs.is_sharded else ():
            if shards is not None:  # (once, however many packs a rank has)
                shared[shards] = _shared(rules, shards)
        for pack in current:
            rows, backend = pack.local(tensors, differentiable), choose(pack).backend
            own = shared[pack.shards]
            if backend.name == "torch":
                values.append(_torch_value(backend, pack, rows, own))
            else:
                values.append(_native_value(backend, pack, rows, own, pack.take(tensors), label))
        if packs.is_sharded:
            sums = [
                (shards, torch.stack([values[i] for i in at]).sum())
                for shards, at in by_shards(current)
            ]
            values = [x if shards is None else shards.add_up_value(x) for shards, x in sums]
        return add_values(values, packs.value_dtype)

    return packs.run(sweep, tensors, label)


def _shared(rules: Sequence[Penalty], shards: Shards) -> tuple[Penalty, ...]:
    """The rules, whose strengths get their gradient from every rank."""
    return tuple(
        replace(
            rule,
            **{
                name: shards.shared(s)
                for name, s in zip(rule.parameters, rule.strengths, strict=True)
                if isinstance(s, Tensor)
            },
        )
        for rule in rules
    )


def _torch_value(
    backend: TorchBackend, pack: Pack, rows: list[Tensor], rules: Sequence[Penalty]
) -> Tensor:
    backend.check(pack, rows)
    return backend.differentiable_value(pack, rows, rules)


def _native_value(
    backend: Any,
    pack: Pack,
    rows: list[Tensor],
    rules: Sequence[Penalty],
    given: list[Tensor],
    label: Label,
) -> Tensor:
    strengths = None
    if torch.is_grad_enabled():
        if any(isinstance(s, Tensor) for rule in rules for s in rule.strengths):
            strengths = stack_strengths(rules, pack.device)
        if any(t.requires_grad for t in (strengths, *rows) if t is not None):
            if strengths is not None:  # backward uses these, whatever becomes of the originals
                rules = rules_of(pack.penalties, strengths.detach())
            # Function.apply would first look for functorch's dead wrappers, tensor by tensor.
            apply = super(torch.autograd.Function, _Value).apply
            leaf = _everywhere() if pack.device_type == "cpu" else None
            return apply(_Call(backend, pack, rules, given, label), strengths, leaf, *rows)
    return backend.value(pack, rows, rules)[0]


@cache
def _everywhere() -> Tensor:
    """A leaf that `backward()` reaches and that no `inputs=` can name."""
    return torch.zeros((), device="cpu", requires_grad=True)


class _Call:
    """What a forward leaves for its backward, besides tensors."""

    def __init__(
        self,
        backend: Any,
        pack: Pack,
        rules: Sequence[Penalty],
        given: list[Tensor],
        label: Label,
    ) -> None:
        self.backend = backend
        self.pack = pack
        self.rules = rules
        self.given = given  # the rows, or the DTensors that they are parts of: these have versions
        self.label = label


class _Value(torch.autograd.Function):
    """Omega of one pack. (call, strengths [rules, *] or None, a leaf, *rows) -> 0-dim float64.

    The leaf is `_everywhere()` on the CPU, else None.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, strengths: Tensor | None, leaf: Tensor | None, *rows: Tensor
    ) -> Tensor:
        value, sums = call.backend.value(call.pack, list(rows), call.rules)
        ctx.call, ctx.sums = call, sums
        ctx.rows = rows
        ctx.wanted = ctx.needs_input_grad[3:]
        # Saving thousands of tensors costs milliseconds. Autograd keeps one, which answers for the
        # graph being freed; the rest are held here, and their versions compared in backward.
        anchor = next((t for t, wanted in zip(rows, ctx.wanted, strict=True) if wanted), None)
        ctx.save_for_backward(anchor, strengths)
        ctx.versions = _versions(call.given, ctx.wanted)
        ctx.pair_versions = _pair_versions(call.pack)
        if strengths is not None:  # a double backward reads every row again, frozen ones too
            ctx.all_versions = list(map(_version, call.given))
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call, rows, wanted = ctx.call, list(ctx.rows), ctx.wanted
        if (now := _versions(call.given, wanted)) != ctx.versions:
            raise RuntimeError(_modified(call, now, ctx.versions))
        if (now := _pair_versions(call.pack)) != ctx.pair_versions:
            raise RuntimeError(_modified(call, now, ctx.pair_versions))
        _, strengths = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient itself must be differentiable
            now = list(map(_version, call.given))
            if strengths is not None and now != ctx.all_versions:
                raise RuntimeError(_modified(call, now, ctx.all_versions))
            grad_strengths, *grads = _differentiable_gradient(ctx, grad_output, strengths, rows)
            return None, grad_strengths, None, *grads
        try:
            if not any(wanted) or _added(ctx, rows, grad_output):
                grads = [None] * len(rows)
            else:
                grads = call.pack.flat_gradient()
                if not all(wanted):
                    grads = [g if w else None for g, w in zip(grads, wanted, strict=True)]
                call.backend.gradient(call.pack, rows, grads, call.rules, grad_output)
        except StaleLayout:
            raise RuntimeError(_replaced(call, rows)) from None
        grad_strengths = None
        if ctx.needs_input_grad[1]:
            sums = taken(ctx.sums, strengths.device)
            grad_strengths = grad_output * sums[:, : strengths.shape[1]]
        return None, grad_strengths, None, *grads


def _added(ctx: Any, rows: list[Tensor], grad_output: Tensor) -> bool:
    """Adds the gradient to every row's `.grad`, as autograd would do next; False if it may not.

    It may where each row is a leaf with a plain `.grad` that this backward() accumulates into
    (`torch.autograd.grad` does not), and nobody looks on: no hook of the leaf, no anomaly
    detection, no dispatch mode, no compiler. (Hooks of its AccumulateGrad node cannot be seen from
    here; they find None, and `.grad` as it should be.) Autograd's own addition is locked against
    other threads' and ordered among streams; this one is not, so it is for CPU tensors and
    for a thread that is alone, or beside threads that wait and are kept waiting.
    """
    call = ctx.call
    alone = threading.active_count() == 1
    if (
        call.pack.device_type != "cpu"
        or not (alone or (call.backend.name == "native" and _others_wait()))
        or torch.is_anomaly_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch.compiler.is_compiling()
    ):
        return False
    everywhere, *nodes = [node for node, _ in ctx.next_functions[-len(rows) - 1 :]]
    if set(map(type, nodes)) != {torch._C._functions.AccumulateGrad} or len(set(nodes)) < len(rows):
        return False
    if not torch._C._will_engine_execute_node(everywhere):
        return False
    if not all(map(_requires_grad, rows)):  # frozen since the forward
        return False
    if any(map(_tensor_hooks, rows)) or any(map(_gradient_hooks, rows)):
        return False
    grads = list(map(_grad, rows))
    if set(map(type, grads)) != {Tensor}:
        return False
    try:
        if alone:
            call.backend.accumulate(call.pack, rows, call.rules, grad_output)
        else:  # so that they go on waiting
            call.backend.accumulate(call.pack, rows, call.rules, grad_output, keep_gil=True)
    except GradientMismatch:
        return False
    torch.autograd.graph.increment_version(grads)
    return True


# Where an idle thread waits: in a pool (torch.compile leaves one), for an event, for a socket.
_WAITING = {
    ("concurrent.futures.thread", "_worker"),
    ("threading", "wait"),
    ("selectors", "select"),
}


def _others_wait() -> bool:
    """Whether all other Python threads wait in the standard library, and so are not in backward."""
    own = threading.get_ident()
    return all(
        (frame.f_globals.get("__name__"), frame.f_code.co_name) in _WAITING
        for thread, frame in sys._current_frames().items()
        if thread != own
    )


def _versions(rows: Sequence[Tensor], wanted: Sequence[bool]) -> list[int]:
    """How often each row that gets a gradient was changed in place so far (0 for the others)."""
    if all(wanted):
        return list(map(_version, rows))
    return [t._version if w else 0 for t, w in zip(rows, wanted, strict=True)]


def _pair_versions(pack: Pack) -> list[tuple[int, ...]]:
    """Of each row's anchor and weights, if there are any."""
    return [tuple(t._version for t in p if t is not None) for p in pack.given]


def _modified(call: _Call, now: list, before: list) -> str:
    i = next(i for i, (a, b) in enumerate(zip(now, before, strict=True)) if a != b)
    return (
        f"{call.label(call.pack.rows[i])}: needed for the penalty's gradient, but modified by an "
        f"inplace operation between forward and backward: it is at version {now[i]}, expected "
        f"version {before[i]}"
    )


def _replaced(call: _Call, rows: list[Tensor]) -> str:
    pairs = call.pack.anchors or [()] * len(rows)
    changed = (
        i
        for i, (t, pair) in enumerate(zip(rows, pairs, strict=True))
        if geometry(t) != call.pack.geometry[i]
        or any(is_freed(each) for each in (t, *pair) if each is not None)
    )
    i = next(changed, 0)
    return (
        f"{call.label(call.pack.rows[i])}: needed for the penalty's gradient, but its data (or "
        "its anchor's) was replaced by another kind, or freed, between forward and backward"
    )


def _differentiable_gradient(
    ctx: Any, grad_output: Tensor, strengths: Tensor | None, rows: list[Tensor]
) -> list[Tensor | None]:
    """[gradient of the strengths, of each row], by the formulas, with a graph of their own."""
    call = ctx.call
    names = [rule.name for rule in call.rules]
    own = (
        [rule.strengths for rule in call.rules]
        if strengths is None
        else unstack_strengths(names, strengths)
    )
    formulas = [reference.FORMULAS[name] for name in names]
    pairs = _constants(call.pack.anchors, rows)
    grads = [
        (grad_output * reference.anchored_grad(formulas[r], w, *pair, *own[r])).to(w.dtype)
        if wanted
        else None
        for r, w, pair, wanted in zip(call.pack.rule_of, rows, pairs, ctx.wanted, strict=True)
    ]
    grad_strengths = None
    if ctx.needs_input_grad[1]:
        totals = [torch.zeros_like(row) for row in strengths]
        for r, w, pair in zip(call.pack.rule_of, rows, pairs, strict=True):
            by = reference.anchored_strength_grad(formulas[r], w, *pair, *own[r]).to(strengths)
            totals[r] = totals[r] + torch.nn.functional.pad(by, (0, len(totals[r]) - len(by)))
        grad_strengths = grad_output * torch.stack(totals)
    return [grad_strengths, *grads]


def _transformed_value(
    packs: Packs, tensors: list[Tensor], rules: Sequence[Penalty], label: Label
) -> Tensor:
    """Under torch.func, forward-mode AD and torch.jit.trace: the formulas, which all understand."""
    require_formulas("inside torch.func, forward-mode AD or torch.jit.trace")
    for i, t in enumerate(tensors):
        check(t, label(i))
    return formula_value(tensors, rules, packs.rule_of, packs.anchors)


def _constants(anchors: Sequence[Pair] | None, tensors: Sequence[Tensor]) -> list[Pair]:
    return [(None, None)] * len(tensors) if anchors is None else list(map(constants, anchors))


def traced_value(
    tensors: Sequence[Tensor],
    rules: Sequence[Penalty],
    rule_of: Sequence[int],
    anchors: Sequence[Pair],
) -> Tensor:
    """Omega of anchored penalties while a graph is traced: no op of ours takes anchors."""
    return torch.ops.pyreg.by_formulas(formula_value(tensors, rules, rule_of, anchors))


def formula_value(
    tensors: Sequence[Tensor],
    rules: Sequence[Penalty],
    rule_of: Sequence[int],
    anchors: Sequence[Pair] | None,
) -> Tensor:
    """Omega as a graph of torch operations, tensor by tensor."""
    pairs = _constants(anchors, tensors)
    terms = [
        reference.anchored_value(reference.FORMULAS[rule.name], t, *pair, *rule.strengths)
        for t, rule, pair in zip(tensors, [rules[r] for r in rule_of], pairs, strict=True)
    ]
    wide = any(t.dtype == torch.float64 for t in tensors)
    return (
        torch.stack([t.double() for t in terms]).sum().to(torch.float64 if wide else torch.float32)
    )
