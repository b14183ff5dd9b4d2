"""A model to profile, and how little is enough of it."""

from __future__ import annotations

import torch
from torch import nn

import pyreg
from pyreg.profiling import LIMITS, WAYS

L1 = pyreg.L1(1e-3)
WITHOUT_COMPILE = [w for w in WAYS if w not in LIMITS and not w.startswith("compile")]
FEW = {"seconds": 0.0, "rounds": 1}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Dropout(), nn.Linear(30, 4))


def trained(net: nn.Module):
    """(a training step of it, its optimizer)"""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    x, y = torch.randn(8, 20), torch.randint(0, 4, (8,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step, optimizer
