"""What one run launches on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def kernels(run: Callable[[], object]) -> list[str]:
    """The names of the kernels, copies and fills of one run, in order, by torch.profiler."""
    for _ in range(2):  # the first session of a process may miss what happens while it starts
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as session:
            run()
            torch.cuda.synchronize()
    return [event.name for event in session.events() if event.device_type == DeviceType.CUDA]
