"""A process group whose ranks run every scenario of DTensors."""

from __future__ import annotations

import traceback
from datetime import timedelta
from pathlib import Path

import sharded_steps
import sharded_sweeps
import torch
from sharded import RANKS, SCENARIOS
from torch import distributed as dist

__all__ = ["RANKS", "SCENARIOS", "run", "sharded_steps", "sharded_sweeps"]


def run(rank: int, folder: Path) -> None:
    """Write each scenario's traceback, or nothing, to `folder`/name.rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    for name, of in SCENARIOS.items():
        try:
            of()
            said = ""
        except BaseException:
            said = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(said)
        dist.barrier()
    dist.destroy_process_group()
