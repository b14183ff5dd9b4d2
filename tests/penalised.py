"""A small model that the regularizers' tests penalise."""

from __future__ import annotations

import torch
from torch import nn

import pyreg

NET = pyreg.ElasticNet(0.25, 0.125)


def model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 7))
    return net.to(dtype)


def with_gradients(net: nn.Module) -> nn.Module:
    for i, p in enumerate(net.parameters()):
        p.grad = torch.full_like(p, float(i))
    return net
