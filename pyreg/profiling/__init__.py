"""What a penalty costs: every way to regularize, checked, timed and set against the machine.

    parameters = allocate(WORKLOADS["gpt2"])
    rows = measure(parameters, pyreg.L1(1e-5))
    print(Record(environment(), tuple(rows)).table())

Imports neither matplotlib nor rich; `plot` imports matplotlib when it draws.
"""

from .environment import Environment, environment
from .measure import measure
from .record import Record, Row
from .ways import LIMITS, WAYS, Way
from .workloads import WORKLOADS, Parameters, Workload, allocate

__all__ = [
    "LIMITS",
    "WAYS",
    "WORKLOADS",
    "Environment",
    "Parameters",
    "Record",
    "Row",
    "Way",
    "Workload",
    "allocate",
    "environment",
    "measure",
]
