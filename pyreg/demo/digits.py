"""The same small network on real digits: no penalty, the loop, pyreg in the loss, the prox.

Every run starts from the same weights and sees the same batches, so what differs is the penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import L1, Regularizer, l1

LAM = 1e-3  # strength of L1, on weights and not on biases
RATE = 0.2  # of SGD; the prox takes it as its step
EPOCHS = 60
BATCH = 64
RUNS = ("no penalty", "the loop", "pyreg.l1", "reg.prox_")


@dataclass(frozen=True)
class Digits:
    """8 x 8 images scaled to [0, 1], a fifth of each class kept for the test."""

    train: tuple[Tensor, Tensor]  # [1437, 64] float32, [1437] int64
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Training:
    """What one run left behind."""

    name: str
    losses: list[float]  # per step, as it is minimised (for the prox, without the penalty)
    accuracies: list[float]  # on the test images, per epoch
    zeros: list[float]  # share of weights that are exactly 0, per epoch
    weights: Tensor = field(repr=False)  # [epochs, 17024] all weights after each epoch


def load() -> Digits:
    """scikit-learn's copy of the UCI digits: 1,797 images; nothing is downloaded."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        images / 16, labels, test_size=0.2, random_state=0, stratify=labels
    )
    x, x_test = (torch.tensor(part, dtype=torch.float32) for part in (x, x_test))
    return Digits((x, torch.tensor(y)), (x_test, torch.tensor(y_test)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith("weight")]


def train(name: str, digits: Digits, tell: Callable[[float], None]) -> Training:
    """Train with one of RUNS; `tell` gets the share done."""
    model = network()
    weights = weights_of(model)
    regularizer = Regularizer(model, {"*.weight": L1(LAM)}, exclude="*.bias")
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, accuracies, zeros, snapshots = [], [], [], []
    for epoch in range(EPOCHS):
        for x, y in batches(digits, epoch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            if name == "the loop":
                reg = 0
                for p in weights:
                    reg = reg + torch.sum(torch.abs(p))
                loss = loss + LAM * reg
            elif name == "pyreg.l1":
                loss = loss + l1(weights, LAM)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if name == "reg.prox_":
                regularizer.prox_(RATE)
        accuracies.append(accuracy(model, *digits.test))
        snapshots.append(torch.cat([w.detach().flatten() for w in weights]))
        zeros.append((snapshots[-1] == 0).double().mean().item())
        tell((epoch + 1) / EPOCHS)
    return Training(name, losses, accuracies, zeros, torch.stack(snapshots))


def batches(digits: Digits, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images in an order that depends on the epoch alone."""
    x, y = digits.train
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
    for chosen in order.split(BATCH):
        yield x[chosen], y[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(1) == y).double().mean().item()


def largest_differences(a: Training, b: Training) -> tuple[float, float]:
    """(of the losses relative to them, over all steps; of the weights, after every epoch)"""
    losses = max(abs(x - y) / abs(x) for x, y in zip(a.losses, b.losses, strict=True))
    return losses, (a.weights - b.weights).abs().max().item()


def summary(training: Training) -> dict[str, object]:
    """For JSON: the curves without the weights."""
    return {
        "penalty": training.name,
        "losses": training.losses,
        "test_accuracy": training.accuracies,
        "share_of_exact_zeros": training.zeros,
    }
