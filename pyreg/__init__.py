"""pyreg: L1, L2 and elastic-net weight penalties in one native sweep over all parameters.

loss = loss + pyreg.l1(model.parameters(), 1e-5)     # drop-in for the loop

reg = pyreg.Regularizer(model, {"*.weight": pyreg.L1(1e-5)})
value = reg.accumulate_()                            # adds the gradient to .grad, in one launch
"""

import importlib.metadata as _metadata

from .dispatch import BackendError, backends, use_backend
from .functional import elastic_net, l1, l2, penalty
from .penalties import L1, L2, ElasticNet, Penalty
from .regularizer import Regularizer

try:
    __version__ = _metadata.version("pyreg")
except _metadata.PackageNotFoundError:
    __version__ = "unknown (not installed)"

__all__ = [
    "L1",
    "L2",
    "BackendError",
    "ElasticNet",
    "Penalty",
    "Regularizer",
    "backends",
    "elastic_net",
    "l1",
    "l2",
    "penalty",
    "use_backend",
]
