"""What L1 and L1 + L2 cost on the parameters of GPT-2 small, and on many small tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..penalties import L1, ElasticNet
from ..profiling import WORKLOADS, Record, allocate, environment, measure

PENALTIES = {"L1": L1(1e-5), "L1 + L2": ElasticNet(1e-5, 1e-4)}
MODELS = ("gpt2", "many")
# torch.compile once, for the loop as it is written: to compile takes the best part of a minute.
SHOWN = (
    "loop",
    "foreach",
    "foreach, no autograd",
    "compile",
    "pyreg in the loss",
    "pyreg accumulate_",
    "pyreg prox_",
    "pyreg value",
)


def measure_all(progress: Callable[[str], Callable[[str, float], None]]) -> Record:
    """Rows of both penalties on both models: few samples, for a demo of three minutes."""
    rows = []
    for name in MODELS:
        tell = progress(WORKLOADS[name].title)
        parameters = allocate(WORKLOADS[name])
        for i, (label, penalty) in enumerate(PENALTIES.items()):
            rows += measure(
                parameters,
                penalty,
                SHOWN,
                rounds=11,
                seconds=2.0,
                fewest=3,
                tell=partial(_tell_part, tell, label, i),
            )
    return Record(environment(), tuple(rows))


def _tell_part(
    tell: Callable[[str, float], None], label: str, i: int, what: str, share: float
) -> None:
    tell(f"{label}: {what}", (i + share) / len(PENALTIES))
