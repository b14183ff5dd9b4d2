"""Rules by parameter name: which one a parameter belongs to, and the printed table."""

from __future__ import annotations

import pytest
import torch
from penalised import NET, model
from torch import nn

import pyreg


def kinds(reg: pyreg.Regularizer) -> dict[str, str | None]:
    """{name: the pattern that it belongs to}"""
    return {row.name: row.rule for row in reg.report().rows}


def test_the_first_rule_that_matches_wins():
    rules = {"0.*": pyreg.L1(1.0), "*.weight": pyreg.L2(1.0)}
    reg = pyreg.Regularizer(model(), rules)
    assert kinds(reg) == {
        "0.weight": "0.*", "0.bias": "0.*", "1.weight": "*.weight", "1.bias": None,
        "3.weight": "*.weight", "3.bias": None,
    }  # fmt: skip
    swapped = pyreg.Regularizer(model(), dict(reversed(rules.items())))
    assert kinds(swapped)["0.weight"] == "*.weight"
    net = model()
    weights = dict(net.named_parameters())
    expected = sum(pyreg.L1(1.0).value(weights[n]) for n in ("0.weight", "0.bias"))
    expected = expected + sum(pyreg.L2(1.0).value(weights[n]) for n in ("1.weight", "3.weight"))
    torch.testing.assert_close(pyreg.Regularizer(net, rules)(), expected)


def test_exclude_comes_before_all_rules():
    reg = pyreg.Regularizer(model(), {"*": NET}, exclude=("1.*", "*.bias"))
    assert [n for n, rule in kinds(reg).items() if rule] == ["0.weight", "3.weight"]
    row = next(row for row in reg.report().rows if row.name == "1.bias")
    assert row.excluded_by == "1.*"
    assert row.penalty is None
    one = pyreg.Regularizer(model(), NET, exclude="*.bias")  # a single pattern, a single penalty
    assert kinds(one)["3.bias"] is None
    assert kinds(one)["3.weight"] == "*"


def test_globs_are_case_sensitive_and_cross_dots():
    net = nn.ModuleDict({"Enc": nn.Sequential(nn.Linear(2, 2)), "enc": nn.Linear(2, 2)})
    assert [n for n, r in kinds(pyreg.Regularizer(net, {"enc*": NET})).items() if r] == [
        "enc.weight", "enc.bias",
    ]  # fmt: skip
    reg = pyreg.Regularizer(net, {"[Ee]nc*.w?ight": NET})
    assert [n for n, r in kinds(reg).items() if r] == ["Enc.0.weight", "enc.weight"]


def test_aliases_count_once(backend):
    """Tied weights are one row: excluded if any name is, else by the first rule for any name."""
    net = nn.ModuleDict({"emb": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    net["head"].weight = net["emb"].weight
    reg = pyreg.Regularizer(net, {"head.*": pyreg.L1(1.0)})
    assert reg().item() == pytest.approx(net["emb"].weight.abs().sum().item())
    (row,) = reg.report().rows
    assert (row.name, row.aliases, row.rule) == ("emb.weight", ("head.weight",), "head.*")
    assert "also head.weight" in str(reg)
    with pytest.raises(ValueError, match="nothing to penalise"):
        pyreg.Regularizer(net, {"emb.*": NET}, exclude="head.*")
    net["emb"].weight.grad = torch.zeros(5, 3)
    reg.accumulate_()
    assert torch.equal(net["emb"].weight.grad, net["emb"].weight.detach().sign())


def test_a_pattern_that_matches_nothing_raises():
    """By name, with what names look like; strict=False reports it instead."""
    for kwargs in (
        {"rules": {"*.wieght": NET, "*": NET}},
        {"rules": NET, "exclude": "*.wieght"},
        {"rules": {"*.wieght": NET}, "exclude": "*.bias"},
    ):
        with pytest.raises(ValueError, match=r"pattern '\*\.wieght' matches no parameter.*weight"):
            pyreg.Regularizer(model(), **kwargs)
    reg = pyreg.Regularizer(model(), {"*.wieght": NET, "0.*": NET}, strict=False)
    assert reg.report().unmatched == ["*.wieght"]
    assert "pattern '*.wieght' matches no parameter" in str(reg)


def test_nothing_left_to_penalise_raises():
    for make in (
        lambda: pyreg.Regularizer(model(), NET, exclude="*"),
        lambda: pyreg.Regularizer(model(), {"nope": NET}, strict=False),
        lambda: pyreg.Regularizer(nn.ReLU(), {}),
        lambda: pyreg.Regularizer([], NET, strict=False),
        lambda: pyreg.Regularizer(model(), {}),
    ):
        with pytest.raises(ValueError, match="nothing to penalise"):
            make()


def test_models_other_than_modules():
    """A mapping, pairs, a generator of pairs; not bare tensors, which have no names."""
    net = model()
    for given in (
        dict(net.named_parameters()), list(net.named_parameters()), net.named_parameters()
    ):  # fmt: skip
        assert torch.equal(pyreg.Regularizer(given, NET)(), pyreg.Regularizer(net, NET)())
    with pytest.raises(TypeError, match=r"item 0: expected a \(name, tensor\) pair, got Parameter"):
        pyreg.Regularizer(net.parameters(), NET)


def test_the_printed_table():
    """What is penalised, what is not and why, aliases, numbers, and who sweeps."""
    net = model()
    net[0].bias.requires_grad_(False)
    text = str(pyreg.Regularizer(net, {"*.weight": NET, "0.*": pyreg.L1(1.0)}, exclude="1.*"))
    head, _, columns, _, *rows = text.splitlines()
    assert head == "Regularizer: 3 of 6 parameters, 224 of 239 elements (93.7 %)"
    assert columns.split() == ["parameter", "dtype", "shape", "elements", "rule"]
    cells = [row.split(maxsplit=4) for row in rows[:6]]
    assert cells == [
        ["0.weight", "float32", "4x3x3x3", "108", "'*.weight': ElasticNet(l1=0.25, l2=0.125)"],
        ["0.bias", "float32", "4", "4", "'0.*': L1(lam=1.0), frozen"],
        ["1.weight", "float32", "4", "4", "excluded by '1.*'"],
        ["1.bias", "float32", "4", "4", "excluded by '1.*'"],
        ["3.weight", "float32", "7x16", "112", "'*.weight': ElasticNet(l1=0.25, l2=0.125)"],
        ["3.bias", "float32", "7", "7", "no rule matches"],
    ]
    assert rows[-1].startswith("sweep: 3 tensors on cpu: ")
