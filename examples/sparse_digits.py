"""Train a small network on the digits to 90 % exact zeros: `python examples/sparse_digits.py`.

The penalty is inside the optimizer: MCP, which leaves large weights alone, by its proximal step in
Adam's own metric, rising over the first third of the training. Beside it the same network without a
penalty. Needs scikit-learn.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import pyreg
from pyreg.demo.digits import accuracy, batches, load, network

EPOCHS = 60
LAM = 4e-3  # of MCP, for a mean loss
GAMMA = 100.0  # beyond GAMMA * LAM a weight is free
RATE = 3e-3


def train(lam: float, epochs: int = EPOCHS) -> tuple[float, float]:
    """(share of the weights that are exactly zero, accuracy on the test images)"""
    digits, model = load(), network()
    weights = {k: p for k, p in model.named_parameters() if k.endswith("weight")}
    steps = epochs * len(list(batches(digits, 0)))
    rising = pyreg.schedules.Linear(0.0, lam, steps // 3)
    optimizer = pyreg.optim.AdamW(
        model.named_parameters(),
        lr=RATE,
        weight_decay=0.0,
        regularizer=pyreg.Regularizer(weights, pyreg.MCP(rising, GAMMA)),
        mode="prox",
    )
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for x, y in batches(digits, epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            falling.step()
    zeros = optimizer.last_zeros / sum(w.numel() for w in weights.values())
    return zeros, accuracy(model, *digits.test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--lam", type=float, default=LAM, help="strength of MCP")
    options = parser.parse_args()
    for name, lam in (("dense", 0.0), ("MCP, prox in Adam's metric", options.lam)):
        zeros, correct = train(lam, options.epochs)
        print(f"{name:28} {100 * zeros:5.1f} % exact zeros, {100 * correct:5.1f} % correct")


if __name__ == "__main__":
    main()
