"""What one run launches on a GPU, and a trace of what runs do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function


def kernels(run: Callable[[], object]) -> list[str]:
    """The names of the kernels, copies and fills of one run, in order, by torch.profiler."""
    for _ in range(2):  # the first session of a process may miss what happens while it starts
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as session:
            run()
            torch.cuda.synchronize()
    return [event.name for event in session.events() if event.device_type == DeviceType.CUDA]


def trace_of(runs: Mapping[str, Callable[[], object]], path: Path, device: torch.device) -> None:
    """One run of each, under its name, as a Chrome trace."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as session:
        for name, run in runs.items():
            with record_function(name):
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    session.export_chrome_trace(str(path))
