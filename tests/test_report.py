"""What a regularizer says about its rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pyreg


def model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 4))


def test_rules_as_data():
    net = model()
    net[0].bias.requires_grad_(False)
    ramp = pyreg.schedules.Linear(0.0, 1.0, steps=10)
    rules = {"0.*": pyreg.L1(ramp), "*.weight": pyreg.L2(0.5), "2.w*": pyreg.L1(9.0)}
    reg = pyreg.Regularizer(net, rules, exclude=["1.*"])
    reg.advance()
    first, second, unused = reg.report().rules
    assert (first.pattern, first.penalty) == ("0.*", pyreg.L1(0.1))
    assert (first.parameters, first.frozen, first.elements) == (2, 1, 630)
    assert first.share == 630 / (630 + 60 + 124)
    assert first.gradient_norm is None
    assert (second.parameters, second.frozen, second.elements) == (1, 0, 120)
    assert (unused.parameters, unused.elements, unused.share) == (0, 0, 0.0)


def test_the_norm_of_the_penaltys_gradient():
    """lam sqrt(N) for L1, 2 lam ||w|| for L2; beside the clip. (Float32 terms, float64 sums.)"""
    net = model()
    rules = {"0.weight": pyreg.L1(1e-4), "2.weight": pyreg.L2(0.5), "*": pyreg.L0(1.0)}
    found = pyreg.Regularizer(net, rules).report(gradients=True, clip=0.5)
    l1, l2, l0 = (rule.gradient_norm for rule in found.rules)
    assert l1 == pytest.approx(1e-4 * math.sqrt(600), rel=1e-6)
    assert l2 == pytest.approx(net[2].weight.norm().item(), rel=1e-6)
    assert l0 is None, "L0 has no gradient"
    text = str(found)
    hint = "report(gradients=True)"
    assert hint not in text
    assert hint in str(pyreg.Regularizer(net, rules))
    assert hint not in str(pyreg.Regularizer(net, pyreg.L0(1.0)))
    assert (
        f"|gradient| of the penalty: {math.hypot(l1, l2):.3g}; gradients are clipped to 0.5" in text
    )
    assert "warning" not in text
    net[0].weight.requires_grad_(False)
    frozen = pyreg.Regularizer(net, rules).report(gradients=True).rules[0]
    assert (frozen.frozen, frozen.gradient_norm) == (1, 0.0)
    every = pyreg.Regularizer(net, rules, include_frozen=True).report(gradients=True)
    assert every.rules[0].gradient_norm == l1


@pytest.mark.parametrize("strength", [1e-4, 1e-2])
def test_a_strength_that_the_gradients_dtype_loses(strength):
    """bfloat16 at 1 has a last bit of 2^-7: what adds less than half of that is lost."""
    net = model()
    net[0].weight.data = net[0].weight.data.bfloat16()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    found = pyreg.Regularizer(net, pyreg.L1(strength)).report(gradients=True)
    (rule,) = found.rules
    warning = "rule '*' adds less to the gradient of 0.weight than its dtype resolves"
    lost = strength < 2**-8
    assert rule.lost == (("0.weight",) if lost else ())
    assert (warning in str(found)) == lost
    before = net[0].weight.grad.clone()
    pyreg.Regularizer(net, pyreg.L1(strength)).accumulate_()
    assert torch.equal(net[0].weight.grad, before) == lost, "and so it is"


def test_what_lies_beside_a_parameter_is_said():
    beside = {"w": torch.ones(3)}
    for options, said in (
        ({}, "'*': L2(lam=0.5)"),
        ({"anchor": beside}, "'*': L2(lam=0.5), anchored"),
        ({"weight": beside}, "'*': L2(lam=0.5), weighted"),
        ({"anchor": beside, "weight": beside}, "'*': L2(lam=0.5), anchored, weighted"),
    ):
        (row,) = pyreg.Regularizer({"w": torch.zeros(3)}, pyreg.L2(0.5, **options)).report().rows
        assert row.reason == f"{said}, frozen"


def test_a_gradient_is_lost_where_most_of_it_is():
    """A last bit of 2^-7 at 1, of 2^-15 at 2^-8: what is added is between the two."""
    for lost in (1, 2, 3):
        w = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        w.grad = torch.tensor([1.0] * lost + [2**-8] * (4 - lost), dtype=torch.bfloat16)
        (rule,) = pyreg.Regularizer({"w": w}, pyreg.L1(1e-3)).report(gradients=True).rules
        assert rule.lost == (("w",) if lost > 2 else ())


def test_gradients_to_which_nothing_can_be_lost():
    """Sparse ones, and those of empty parameters."""
    net = {"sparse": nn.Parameter(torch.ones(4)), "empty": nn.Parameter(torch.ones(0))}
    net["sparse"].grad = torch.ones(4).to_sparse()
    net["empty"].grad = torch.ones(0)
    (rule,) = pyreg.Regularizer(net, pyreg.L1(1e-9)).report(gradients=True).rules
    assert rule.lost == ()
    assert rule.gradient_norm == pytest.approx(2e-9)


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        (lambda step: -1.0, "L1.lam at step 0: expected a finite number >= 0, got -1.0"),
        (lambda step: "x", "L1.lam at step 0: expected a number or a 0-dim floating tensor, got "),
        (lambda step: {}[step], "KeyError: 0"),
    ],
)
def test_a_schedule_that_fails_now_is_said(schedule, problem):
    """In the text and the data, beside what the other rules are; nothing raises."""
    reg = pyreg.Regularizer(model(), {"0.*": pyreg.L1(schedule), "*": pyreg.L2(0.5)})
    for found in (reg.report(), reg.report(gradients=True)):
        bad, good = found.rules
        assert bad.problem.startswith(problem)
        assert (bad.penalty, bad.parameters) == (reg.rules["0.*"], 2)
        assert (bad.gradient_norm, good.problem) == (None, None)
        assert f"warning: rule '0.*' cannot be applied now: {problem}" in str(found)
    assert "report(gradients=True)" not in str(found)
    assert "cannot be applied now" in repr(reg)
    with pytest.raises((ValueError, TypeError, KeyError)):
        reg()


def test_gradients_on_the_meta_device_have_no_norm():
    net = model()
    net[2].to("meta")
    reg = pyreg.Regularizer(net, pyreg.L1(0.5))
    assert "meta" in str(reg)
    with pytest.raises(ValueError, match=r"'2.weight' is on the meta device"):
        reg.report(gradients=True)
