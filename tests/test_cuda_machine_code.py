"""The CUDA kernels' machine code for devices that are not here: 16-byte moves, no spills."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = ["75", "80", "90", "100"]
SWEEPS = ["value", "gradient", "accumulate", "prox", "stats"]

# 16-byte loads and stores in the loop over whole aligned chunks, by dtype (chunk.h: kInFlight loads
# at a time; float64 in as many parts as fill a row of lanes), for each of the penalties.
PENALTIES = 3
LOADS = {  # float32, bfloat16, float16, float64
    "value": PENALTIES * (8 + 8 + 8 + 4),
    "gradient": PENALTIES * (8 + 8 + 8 + 4),
    "accumulate": PENALTIES * (8 + 8 + 8 + 8),
    "prox": PENALTIES * (8 + 8 + 8 + 4),
    "stats": 8 + 8 + 8 + 4,
}
STORES = {
    "value": 0,
    "gradient": PENALTIES * (8 + 8 + 8 + 4),
    "accumulate": PENALTIES * (4 + 4 + 4 + 4),
    "prox": PENALTIES * (8 + 8 + 8 + 4),
    "stats": 0,
}
# Registers of a thread at which as many blocks run as kernels.cu counts on.
REGISTERS = {"75": 96, "80": 96, "90": 80, "100": 128}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def facts(request, tmp_path_factory):
    """{sweep: facts}, after a compilation in which every warning is an error, spills among them."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    triton = pytest.importorskip("triton")
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout
    if f"compute_{request.param}" not in known.split():
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    cubin = tmp_path_factory.mktemp("cuda") / "kernels.cubin"
    command = [
        *(NVCC, "-cubin", f"-arch=sm_{request.param}", "-std=c++17", "-O3", "-fmad=false"),
        *("-Werror=all-warnings", "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage"),
        *("-Xcompiler=-Wall,-Wextra,-Werror", '-DPYREG_CUDA_ARCHITECTURES="test"'),
        *(f"-I{CSRC}", "-o", cubin, CSRC / "cuda/kernels.cu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage, sass = (
        subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout
        for option in ("--dump-resource-usage", "-sass")
    )
    return {name: read(name, usage, sass) | {"arch": request.param} for name in SWEEPS}


def read(sweep, usage, sass):
    """What the tools say of one kernel, `pyreg::cuda::sweep<(Sweep)i>` in its mangled form."""
    mark = f"5sweepILNS0_5SweepE{SWEEPS.index(sweep)}E"
    own = re.search(rf"Function \S*{mark}\S*:\s*(.*)", usage)[1]
    code = next(part for part in sass.split("Function : ")[1:] if mark in part.split("\n")[0])
    return {
        "registers": int(re.search(r"REG:(\d+)", own)[1]),
        "local": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", own))),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": len(re.findall(r"\bLDG\.E\.128\b", code)),
        "stores": len(re.findall(r"\bSTG\.E\.128\b", code)),
        "generic": len(re.findall(r"\b(?:LD|ST)\.E\b", code)),  # of an unknown kind of memory
    }


@pytest.mark.parametrize("sweep", SWEEPS)
def test_moves_are_16_bytes_and_nothing_spills(facts, sweep):
    got = facts[sweep]
    assert (got["loads"], got["stores"]) == (LOADS[sweep], STORES[sweep]), got
    assert got["local"] == got["spills"] == got["generic"] == 0, got
    assert got["registers"] <= REGISTERS[got["arch"]], got
