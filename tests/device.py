"""What the GPU tests do to a device, with the nearest thing to it on the CPU.

There the same test bodies run under Triton's interpreter, so that they are tried before a GPU is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from pyreg.profiling.kernels import kernels
from pyreg.profiling.memory import peak_extra_bytes


def capture(device: torch.device, run: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of `run`; on the CPU, run itself, as if it were captured."""
    if device.type == "cpu":
        return as_if_captured(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def as_if_captured(run: Callable[[], object]) -> Callable[[], object]:
    """On CPU tensors: what a capture refuses raises."""
    from pyreg.triton_kernels import launch, layout

    def capturing(device: torch.device) -> launch.Queue:
        return launch.Queue(device, 0, True, launch.CAPTURED)

    def captured() -> None:
        before, layout.current = layout.current, capturing
        try:
            run()
        finally:
            layout.current = before

    return captured


def launches(device: torch.device, run: Callable[[], object]) -> list[str]:
    """The kernels, copies and fills of one run; on the CPU, the sweeps that Triton is asked for."""
    if device.type == "cuda":
        return kernels(run)
    from pyreg.triton_kernels import steps, sweeps

    names: list[str] = []

    class Counted:
        def __init__(self, kernel: Callable) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            def launch(*operands: object, **named: object) -> None:
                names.append(named.get("SWEEP", "step"))
                self.kernel[grid](*operands, **named)

            return launch

    kernels_of = sweeps.sweep, steps.step
    sweeps.sweep, steps.step = map(Counted, kernels_of)
    try:
        run()
    finally:
        sweeps.sweep, steps.step = kernels_of
    return names


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within the block, whatever makes the host wait for the GPU raises."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stream(device: torch.device):
    """A block whose work goes to a stream of its own, after what was asked for before it."""
    if device.type == "cpu":
        return nullcontext()
    new = torch.cuda.Stream(device)
    new.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(new)


def peak(device: torch.device, run: Callable[[], object]) -> int:
    """Bytes that one run needs at its peak; on the CPU, where many others are counted, 0."""
    run()
    return peak_extra_bytes(run, 1, device) if device.type == "cuda" else 0
