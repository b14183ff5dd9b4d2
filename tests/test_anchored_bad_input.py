"""Anchors and weights that are refused, by name, and before anything is written."""

import math

import pytest
import torch
from torch import nn

import pyreg
from pyreg import L2, Regularizer
from pyreg.attachment import metric_of_rows

W = {"layer.weight": torch.randn(4, 3)}


class TestBadInput:
    def make(self, match, error=ValueError, **fields):
        before = W["layer.weight"].clone()
        with pytest.raises(error, match=match):
            Regularizer(W, L2(0.1, **fields), include_frozen=True).prox_(0.1)
        assert torch.equal(before, W["layer.weight"])

    def test_missing(self):
        self.make("'layer.weight'.*rule '\\*' has no anchor for it", anchor={"other": None})

    def test_another_shape(self):
        self.make(
            "'layer.weight'.*float32 \\[4, 3\\], but its anchor is float32 \\[3, 4\\]",
            anchor={"layer.weight": torch.zeros(3, 4)},
        )

        with pytest.raises(ValueError, match=r"L2.anchor: expected \[3\]"):
            L2(0.1, anchor=torch.zeros(4, 3)).value(torch.ones(3))

    def test_overlapping(self):
        buffer = torch.randn(21)
        with pytest.raises(ValueError, match=r"'w'.*shares memory"):
            Regularizer({"w": buffer[1:]}, L2(0.1, anchor={"w": buffer[:-1]}), include_frozen=True)

    def test_integers(self):
        zeros = torch.zeros(4, 3, dtype=torch.int64)
        self.make(
            "'layer.weight'\\): its anchor: expected a floating tensor",
            TypeError,
            anchor={"layer.weight": zeros},
        )

    def test_no_tensor(self):
        self.make(
            "its weight: expected a floating tensor, got float",
            TypeError,
            weight={"layer.weight": 1.0},
        )
        self.make("L2.anchor: expected a tensor, or a mapping", TypeError, anchor=0.5)

    def test_the_parameter_itself(self):
        self.make("'layer.weight'.*is the parameter itself.*clone", anchor=W)

    @pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
    def test_weights(self, bad):
        weight = torch.ones(4, 3)
        weight[2, 1] = bad
        self.make("'layer.weight'.*its weight has elements", weight={"layer.weight": weight})

    def test_freed(self):
        anchor = torch.zeros(4, 3)
        reg = Regularizer(W, L2(0.1, anchor={"layer.weight": anchor}), include_frozen=True)
        reg()
        anchor.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"'layer.weight'\): its anchor.*has no memory"):
            reg()

    def test_a_mapping_outside_of_a_regularizer(self):
        with pytest.raises(TypeError, match="is a mapping"):
            L2(0.1, anchor=W).value(torch.ones(3))
        with pytest.raises(TypeError, match="make it a Regularizer's"):
            pyreg.penalty([torch.ones(3)], L2(0.1, anchor=torch.ones(3)))


class TestNothingHalfDone:
    """A plain and an anchored rule: two packs. Neither is written if the other cannot be."""

    def make(self):
        self.a, self.b = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
        for p in (self.a, self.b):
            p.grad = torch.zeros(5)
        rules = {"a": L2(1.0), "b": L2(1.0, anchor={"b": torch.zeros(5)})}
        self.reg = Regularizer({"a": self.a, "b": self.b}, rules)
        self.reg()

    def test_a_negated_view(self):
        self.make()
        self.b.data = torch._neg_view(torch.ones(5))
        self.reg.accumulate_()
        assert self.a.grad.tolist() == [2.0] * 5
        assert self.b.grad.tolist() == [-2.0] * 5

    def test_freed(self, backend):
        self.make()
        self.b.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"'b'.*has no memory"):
            self.reg.accumulate_()
        assert self.a.grad.tolist() == [0.0] * 5

    def test_a_freed_anchor(self, backend):
        self.make()
        self.reg.rules["b"].anchor["b"].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"'b'\): its anchor.*has no memory"):
            self.reg.prox_(1.0)
        assert self.a.tolist() == [1.0] * 5

    def test_a_negated_gradient(self, backend):
        self.make()
        self.b.grad = torch._neg_view(torch.zeros(5))
        with pytest.raises(ValueError, match=r"'b'\): its gradient is a lazily negated view"):
            self.reg.accumulate_()
        assert self.a.grad.tolist() == [0.0] * 5

    def test_a_moment_of_integers(self, backend):
        self.make()
        optimizer = torch.optim.Adam([self.a, self.b])
        optimizer.step()
        optimizer.state[self.b]["exp_avg_sq"] = torch.zeros(5, dtype=torch.int32)
        attachment = self.reg.attach(optimizer, "prox")
        before = self.a.tolist()
        with pytest.raises(TypeError, match=r"'b'.*moment is torch.int32"):
            self.reg._prox(metric_of_rows(attachment.optimizer, attachment._metric))
        assert self.a.tolist() == before

    def test_weights_that_became_their_own_anchor(self, backend):
        self.make()
        self.b.data = self.reg.rules["b"].anchor["b"]
        with pytest.raises(ValueError, match=r"'b'.*is the parameter itself"):
            self.reg.accumulate_()
        assert self.a.grad.tolist() == [0.0] * 5
