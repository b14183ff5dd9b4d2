"""A small model, and torch's optimizers with the options that change what a step does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyreg

NET = pyreg.ElasticNet(0.05, 0.02)
OPTIONS = {
    "SGD": [
        {"lr": 0.05},
        {"lr": 0.001, "momentum": 1.0},
        {"lr": torch.tensor(0.05).double(), "weight_decay": 0.1, "maximize": True},
        {"lr": 0.02, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        {"lr": 0.02, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    "Adam": [
        {"lr": 0.02},
        {"lr": torch.tensor(0.02).double(), "weight_decay": 0.1, "amsgrad": True},
        {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3, "maximize": True, "weight_decay": 0.1},
        {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    "AdamW": [
        {"lr": 0.02, "weight_decay": 0.1},
        {"lr": 0.02, "amsgrad": True, "maximize": True},
    ],
    "Adagrad": [
        {"lr": 0.1, "eps": 1e-3},
        {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "maximize": True, "eps": 1e-3},
    ],
    "RMSprop": [
        {"lr": 0.02, "eps": 1e-3},
        {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1, "eps": 1e-3, "maximize": True},
        {"lr": 0.01, "centered": True, "eps": 1e-3},
        {"lr": 0.01, "centered": True, "momentum": 0.5, "eps": 1e-2},
    ],
}
EVERY = [
    pytest.param(name, options, id=f"{name}-{i}")
    for name, several in OPTIONS.items()
    for i, options in enumerate(several)
]
ONE_EACH = [pytest.param(name, several[-1], id=name) for name, several in OPTIONS.items()]
# Where a metric is asked for, which a momentum of 1 has not, and to minimise: the objective with a
# penalty has no use for maximize.
MINIMIZE = [
    p for p in EVERY if not p.values[1].get("maximize") and p.values[1].get("momentum", 0) < 1
]


def minimizing(options: dict) -> dict:
    return {k: v for k, v in options.items() if k != "maximize"}


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 2)).to(dtype)


def groups(model: nn.Module, options: dict) -> list[dict]:
    """Two of different learning rates, with the parameters' names."""
    return [
        {"params": list(model[0].named_parameters("0"))},
        {"params": list(model[2].named_parameters("2")), "lr": options["lr"] * 0.5},
    ]


def make(module, name: str, model: nn.Module, options: dict, **more) -> torch.optim.Optimizer:
    options = copy.deepcopy(options)
    return getattr(module, name)(groups(model, options), **options, **more)


def backward(model: nn.Module, k: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(k)
    dtype = model[0].weight.dtype
    x, y = (torch.randn(8, n, generator=generator).to(dtype) for n in (5, 2))
    model.zero_grad()
    loss = nn.functional.mse_loss(model(x), y) * scale
    loss.backward()
    return loss


def tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Weights, then states in the order of their names."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.detach() for p in params] + [
        torch.as_tensor(state)
        for p in params
        for _, state in sorted(optimizer.state.get(p, {}).items())
        if state is not None
    ]


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer, rtol: float = 0, atol: float = 0):
    for p, q in zip(tensors_of(a), tensors_of(b), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, equal_nan=True)


def train(optimizer, model: nn.Module, steps: range) -> None:
    for k in steps:
        backward(model, k)
        optimizer.step()
