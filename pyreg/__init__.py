"""pyreg: weight penalties (L1, L2, elastic net, MCP, ...) in one native sweep over all parameters.

loss = loss + pyreg.l1(model.parameters(), 1e-5)     # drop-in for the loop

reg = pyreg.Regularizer(model, {"*.weight": pyreg.L1(1e-5)})
value = reg.accumulate_()                            # adds the gradient to .grad, in one launch
"""

import importlib.metadata as _metadata

from . import optim, priors, schedules
from .dispatch import BackendError, backends, use_backend
from .functional import closed_form, elastic_net, l1, l2, penalty
from .penalties import (
    L0,
    L1,
    L2,
    MCP,
    SCAD,
    ElasticNet,
    Huber,
    LHalf,
    LogSum,
    Penalty,
)
from .regularizer import Regularizer

try:
    __version__ = _metadata.version("pyreg")
except _metadata.PackageNotFoundError:
    __version__ = "unknown (not installed)"

__all__ = [
    "L0",
    "L1",
    "L2",
    "MCP",
    "SCAD",
    "BackendError",
    "ElasticNet",
    "Huber",
    "LHalf",
    "LogSum",
    "Penalty",
    "Regularizer",
    "backends",
    "closed_form",
    "elastic_net",
    "l1",
    "l2",
    "optim",
    "penalty",
    "priors",
    "profile",
    "schedules",
    "use_backend",
]


def __getattr__(name: str) -> object:
    """`profile` is imported when it is first asked for."""
    if name == "profile":
        from .profiling import profile

        return profile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
