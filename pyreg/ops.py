"""The torch.library ops that torch.compile sees. Eager mode does not pay for them.

Strengths are an operand ([rules, most strengths of any] float64), so a changed one does not
recompile; which penalty applies to which tensor is part of the graph.

    pyreg::value(tensors, strengths, penalties, rule_of) -> 0-dim
    pyreg::gradient(grad_output, tensors, strengths, penalties, rule_of) -> one per tensor
    pyreg::strength_gradient(grad_output, tensors, strengths, penalties, rule_of) -> like strengths
    pyreg::by_formulas(value) -> value, if a backend asked for by name does not forbid the formulas
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference, sweeps
from .dispatch import choose, require_formulas
from .pack import Pack, packs_for
from .penalties import Penalty, check_differentiable, rules_of, stack_strengths, unstack_strengths
from .tensors import label

_OPERANDS = "Tensor[] tensors, Tensor strengths, str[] penalties, int[] rule_of"


def value(tensors: list[Tensor], rules: Sequence[Penalty], rule_of: Sequence[int]) -> Tensor:
    """Omega, as one op in the graph that is being traced."""
    if torch.is_grad_enabled():
        check_differentiable(rules, rule_of, tensors)
    strengths = stack_strengths(rules, tensors[0].device)
    names = [rule.name for rule in rules]
    return torch.ops.pyreg.value(tensors, strengths, names, list(rule_of))


@torch.library.custom_op("pyreg::value", mutates_args=(), schema=f"({_OPERANDS}) -> Tensor")
def value_op(tensors, strengths, penalties, rule_of):
    packs = packs_for(tensors, tuple(penalties), rule_of)
    return sweeps.value(packs, tensors, rules_of(penalties, strengths), label)


@value_op.register_fake
def _(tensors, strengths, penalties, rule_of):
    wide = any(t.dtype == torch.float64 for t in tensors)
    return tensors[0].new_empty((), dtype=torch.float64 if wide else torch.float32)


@torch.library.custom_op(
    "pyreg::gradient", mutates_args=(), schema=f"(Tensor grad_output, {_OPERANDS}) -> Tensor[]"
)
def gradient_op(grad_output, tensors, strengths, penalties, rule_of):
    packs = packs_for(tensors, tuple(penalties), rule_of)
    rules = rules_of(penalties, strengths)
    grads = [torch.empty_like(t) for t in tensors]

    def sweep(current: list[Pack]) -> None:
        for pack in current:
            rows = pack.take(tensors)
            choose(pack).backend.gradient(pack, rows, pack.take(grads), rules, grad_output)

    packs.run(sweep, tensors, label)
    return grads


@gradient_op.register_fake
def _(grad_output, tensors, strengths, penalties, rule_of):
    return [torch.empty_like(t) for t in tensors]


@torch.library.custom_op(
    "pyreg::strength_gradient",
    mutates_args=(),
    schema=f"(Tensor grad_output, {_OPERANDS}) -> Tensor",
)
def strength_gradient_op(grad_output, tensors, strengths, penalties, rule_of):
    out = torch.zeros_like(strengths)
    own = unstack_strengths(penalties, strengths)
    for r, t in zip(rule_of, tensors, strict=True):
        by = reference.FORMULAS[penalties[r]].strength_grad(t, *own[r]).to(out)
        out[r, : by.numel()] += by
    return out * grad_output


@strength_gradient_op.register_fake
def _(grad_output, tensors, strengths, penalties, rule_of):
    return torch.empty_like(strengths)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tensors, strengths, ctx.penalties, ctx.rule_of = inputs
    ctx.save_for_backward(strengths, *tensors)


def _backward(ctx: Any, grad_output: Tensor) -> tuple:
    strengths, *tensors = ctx.saved_tensors
    operands = (grad_output, tensors, strengths, ctx.penalties, ctx.rule_of)
    grads = torch.ops.pyreg.gradient(*operands)
    by_strength = None
    if ctx.needs_input_grad[1]:
        by_strength = torch.ops.pyreg.strength_gradient(*operands)
    return grads, by_strength, None, None


value_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("pyreg::by_formulas", mutates_args=(), schema="(Tensor value) -> Tensor")
def by_formulas_op(value):
    require_formulas("anchored penalties inside torch.compile")
    return value.clone()


@by_formulas_op.register_fake
def _(value):
    return torch.empty_like(value)


by_formulas_op.register_autograd(lambda ctx, grad_output: grad_output)
