"""What a penalty costs: every way to regularize, checked, timed and set against the machine.

    print(pyreg.profile(model, pyreg.L1(1e-5), step=train_step).table())

    parameters = allocate(WORKLOADS["gpt2"])  # or what that is made of
    rows = measure(parameters, pyreg.L1(1e-5))
    print(Record(environment(), tuple(rows)).table())

Imports neither matplotlib nor rich; `plot` imports matplotlib when it draws.
"""

from .environment import Environment, environment
from .measure import measure
from .model import profile
from .parameters import Parameters, allocate
from .record import Record, Row, load
from .result import Profile
from .timing import Interrupted
from .ways import LIMITS, WAYS, Way
from .workloads import WORKLOADS, Workload

__all__ = [
    "LIMITS",
    "WAYS",
    "WORKLOADS",
    "Environment",
    "Interrupted",
    "Parameters",
    "Profile",
    "Record",
    "Row",
    "Way",
    "Workload",
    "allocate",
    "environment",
    "load",
    "measure",
    "profile",
]
