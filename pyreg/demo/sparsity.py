"""Accuracy against exact zeros on the digits, trained with Adam: four ways to penalise, each at
several strengths.

All are attached to the optimizer. The subgradient never makes a zero. The prox with D = 1 cuts all
weights at lr * lam, whatever the loss says of them; the prox in Adam's metric solves the stated
problem. MCP leaves large weights alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .. import L1, MCP, Penalty, Regularizer
from .digits import Digits, accuracy, batches, network, weights_of

RATE = 3e-3
EPOCHS = 30
GAMMA = 300.0  # of MCP: beyond GAMMA * lam a weight is free


@dataclass(frozen=True)
class Curve:
    """One way at every strength."""

    name: str
    penalties: list[Penalty]
    accuracies: list[float]  # on the test images, after the last epoch
    zeros: list[float]  # share of weights that are exactly 0


WAYS: dict[str, tuple[str, str, list[Penalty]]] = {
    "L1, subgradient": ("grad", "optimizer", [L1(lam) for lam in (1e-4, 1e-3, 3e-3)]),
    "L1, prox, D = 1": ("prox", "identity", [L1(lam) for lam in (0.01, 0.03, 0.1, 0.3, 1.0)]),
    "L1, prox in Adam's metric": (
        "prox",
        "optimizer",
        [L1(lam) for lam in (1e-4, 3e-4, 1e-3, 2e-3, 3e-3)],
    ),
    "MCP, prox in Adam's metric": (
        "prox",
        "optimizer",
        [MCP(lam, GAMMA) for lam in (1e-4, 3e-4, 1e-3, 2e-3, 3e-3)],
    ),
}
RUNS = sum(len(penalties) for _, _, penalties in WAYS.values())


def curves(digits: Digits, tell: Callable[[str, float], None]) -> list[Curve]:
    """Train all; `tell` gets what goes on and the share done."""
    found, done = [], 0
    for name, (mode, metric, penalties) in WAYS.items():
        results = []
        for penalty in penalties:
            tell(f"{name}: {penalty}", done / RUNS)
            results.append(_train(digits, penalty, mode, metric))
            done += 1
        found.append(Curve(name, penalties, *map(list, zip(*results, strict=True))))
    tell("", 1.0)
    return found


def _train(digits: Digits, penalty: Penalty, mode: str, metric: str) -> tuple[float, float]:
    """(test accuracy, share of zeros)"""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    Regularizer(model, {"*.weight": penalty}, exclude="*.bias").attach(optimizer, mode, metric)
    for epoch in range(EPOCHS):
        for x, y in batches(digits, epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    weights = torch.cat([w.detach().flatten() for w in weights_of(model)])
    return accuracy(model, *digits.test), (weights == 0).double().mean().item()


def summary(curve: Curve) -> dict[str, object]:
    return {
        "way": curve.name,
        "penalties": [repr(penalty) for penalty in curve.penalties],
        "test_accuracy": curve.accuracies,
        "share_of_exact_zeros": curve.zeros,
    }
