"""A launch as Triton makes it, up to the launch: operands bound, specialized, compiled for sm_90.

The driver is a stand-in that knows a device and a stream, and notes what it would launch.
test_triton_machine_code.py compiles the same kernels by another entrance, which binds nothing.
"""

import importlib.util

import pytest

CHILD = """
from array import array

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched = []

class Launcher:
    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, *args):
        launched.append((self.name, *args))

class Utils:
    def load_binary(self, *args):
        return object(), object(), 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
from pyreg.triton_kernels import Layout, launch, layout, steps, sweeps

kept = []

class Compiled:  # and launched by Triton's own way, every time
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *a, **k: kept.append(self.kernel[grid](*a, **k))

own_kernels = sweeps.sweep, steps.step
layout._check_usable = lambda device: None
launch.options = lambda device, sweep, heavy: {
    "num_warps": 4, "maxnreg": launch.REGISTERS[sweep][heavy]
}
strengths = torch.zeros(2, 2, dtype=torch.float64)

def sweep_all(sizes, offset, times=1):
    w = [torch.ones(n + offset)[offset:] for n in sizes]
    w[1] = w[1].bfloat16()
    g = [torch.zeros_like(t) for t in w]
    made = Layout(w, [0, 1], ["l1", "elastic_net"])
    w, g = (array("q", map(torch.Tensor.data_ptr, these)).tobytes() for these in (w, g))
    scale = torch.ones(3, dtype=torch.float64)[offset]
    found = torch.zeros(2)[offset:][:1]
    beside = [w, g, w, g, bytes(16)], ["sgd momentum", "adam"], bytes(2), [0, 0], bytes(96)
    for _ in range(times):
        made.value(w, strengths)
        made.gradient(w, g, strengths, 1.0)
        made.accumulate(w, g, strengths, scale)
        made.prox(w, strengths, 0.1)
        made.prox_in_metric(w, g, bytes(2), strengths, bytes(64))
        made.stats(w)
        for more in ({}, {"grad_scale": found, "found_inf": found, "keys": bytes(16)}):
            made.step(*beside, bytes([1, 0]), True, strengths, 1.0, **more)

sweeps.sweep, steps.step = map(Compiled, own_kernels)
sweep_all((5000, 4096), 0)
first = list(kept)
sweep_all((16, 1), 1)
w = [torch.ones(16), torch.ones(5000).bfloat16()]
pairs = [(None, torch.ones(16)), (torch.ones(5000), None)]
places = [array("q", [t.data_ptr() if t is not None else 0 for t in these]).tobytes()
          for these in (w, sum(pairs, ()))]
Layout(w, [0, 1], ["l1", "elastic_net"], pairs).accumulate(
    places[0], places[0], strengths, 1.0, places[1]
)
print(len(first), len(kept), len(set(map(id, kept))), type(kept[0]).__name__)

# A layout's second launch of a kind goes to the compiled kernel, and brings the same.
sweeps.sweep, steps.step = own_kernels
launched.clear()
through_triton = []
run = type(own_kernels[0]).run
type(own_kernels[0]).run = lambda self, *a, **k: through_triton.append(1) or run(self, *a, **k)
sweep_all((5000, 4096), 1, times=3)
def told(call):
    name, *grid, stream, function, metadata, launch_metadata, enter, leave = call[:10]
    values = [x.dtype if isinstance(x, torch.Tensor) else x for x in call[10:]]
    return name, grid, stream, function, metadata, values
by_triton, *again = (list(map(told, launched[i:i + 8])) for i in (0, 8, 16))
assert len(launched) == 24 and again == [by_triton] * 2, launched
print(len(through_triton))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_operands_bind_and_sizes_compile_nothing_anew(run_python, tmp_path, monkeypatch):
    """Six sweeps and two steps, eight kernels: other sizes, grids and alignments find the same
    ones. One of two kinds of anchored rows is another. Triton itself is asked once for each."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert run_python(CHILD).split() == ["8", "17", "9", "CompiledKernel", "8"]
