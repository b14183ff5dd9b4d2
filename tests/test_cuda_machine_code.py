"""The CUDA kernels' machine code for devices that are not here: 16-byte moves, no spills."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = ["75", "80", "90", "100"]
SWEEPS = ["value", "gradient", "accumulate", "prox", "prox_in_metric", "stats", "step"]
FAMILIES = ["Elementary", "All"]

# 16-byte loads and stores in the loops over whole aligned chunks. Where a penalty and a dtype have
# a loop of their own (chunk.h: kInFlight loads at a time; float64 in as many parts as fill a row of
# lanes): by dtype, for each of the penalties. Where they share it (rows.h: kSlots elements at a
# time): by dtype; for prox_in_metric, each with a moment of its own dtype and in float32.
PENALTIES = 3
MOVES = {  # float32, bfloat16, float16, float64
    ("value", "Elementary"): (PENALTIES * (8 + 8 + 8 + 4), 0),
    ("gradient", "Elementary"): (PENALTIES * (8 + 8 + 8 + 4), PENALTIES * (8 + 8 + 8 + 4)),
    ("accumulate", "Elementary"): (PENALTIES * (8 + 8 + 8 + 8), PENALTIES * (4 + 4 + 4 + 4)),
    ("prox", "Elementary"): (PENALTIES * (8 + 8 + 8 + 4), PENALTIES * (8 + 8 + 8 + 4)),
    ("prox_in_metric", "Elementary"): (8 + (4 + 6) + (4 + 6) + (2 + 1), 4 + 2 + 2 + 1),
    ("stats", "Elementary"): (8 + 8 + 8 + 4, 0),
    ("value", "All"): (4 + 2 + 2 + 2, 0),
    ("gradient", "All"): (4 + 2 + 2 + 2, 4 + 2 + 2 + 2),
    ("accumulate", "All"): (4 + 2 + 2 + 2, 2 + 1 + 1 + 1),
    ("prox", "All"): (4 + 2 + 2 + 2, 4 + 2 + 2 + 2),
    ("prox_in_metric", "All"): (4 + (2 + 3) + (2 + 3) + (2 + 1), 2 + 1 + 1 + 1),
}
# A step (step.h) moves 8 elements at a time, 2 of float64: weights, gradients, three states and,
# for 16 bits, a master; float32 states of others than float32 make a loop of their own. A bfloat16
# weight is stored in two ways. (Two float32 states beside two float64 weights are 8 bytes.)
MOVES["step", "Elementary"] = (
    10 + (5 + 2) + (2 + 6 + 2) + (5 + 2) + (2 + 6 + 2) + 5 + 2,
    8 + (3 + 2 + 2) + (6 + 2 + 2) + (3 + 2 + 1) + (6 + 2 + 1) + 4 + 1,
)
# Registers of a thread at which as many blocks run as kernels.cu counts on.
OWN_LOOPS = {"75": 96, "80": 96, "90": 80, "100": 128}
SHARED_LOOPS = {"75": 80, "80": 80, "90": 80, "100": 128}
IN_METRIC = {"Elementary": dict.fromkeys(ARCHITECTURES, 128), "All": OWN_LOOPS | {"90": 96}}
STEP = {"75": 168, "80": 168, "90": 128, "100": 128}


@pytest.fixture(
    scope="module",
    params=[(family, arch) for family in FAMILIES for arch in ARCHITECTURES],
    ids=lambda param: "-".join(param),
)
def facts(request, tmp_path_factory):
    """{sweep: facts}, after a compilation in which every warning is an error, spills among them."""
    family, arch = request.param
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    triton = pytest.importorskip("triton")
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout
    if f"compute_{arch}" not in known.split():
        pytest.skip(f"this nvcc does not know sm_{arch}")
    cubin = tmp_path_factory.mktemp("cuda") / "kernels.cubin"
    command = [
        *(NVCC, "-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-fmad=false"),
        *("-Werror=all-warnings", "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage"),
        *("-Xcompiler=-Wall,-Wextra,-Werror", f"-DPYREG_FAMILY=k{family}"),
        *(f"-I{CSRC}", "-o", cubin, CSRC / "cuda/kernels.cu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage, sass = (
        subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout
        for option in ("--dump-resource-usage", "-sass")
    )
    return {
        sweep: read(sweep, family, usage, sass) | {"family": family, "arch": arch}
        for sweep in SWEEPS
        if (sweep, family) in MOVES
    }


def read(sweep, family, usage, sass):
    """What the tools say of one kernel, `pyreg::cuda::sweep<(Sweep)i, (Family)j>` in its mangled
    form."""
    sweep, family = SWEEPS.index(sweep), FAMILIES.index(family)
    mark = f"5sweepILNS0_5SweepE{sweep}ELNS0_6FamilyE{family}E"
    own = re.search(rf"Function \S*{mark}\S*:\s*(.*)", usage)[1]
    code = next(part for part in sass.split("Function : ")[1:] if mark in part.split("\n")[0])
    # What is called lies behind it: divisions, and the last block's sums, done once in a launch.
    called = [int(at, 16) for at in re.findall(r"\bCALL\.REL\S* (?:`\(\S+\) )?0x([0-9a-f]+)", code)]
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?;)", code)
    loops = "\n".join(text for at, text in lines if int(at, 16) < min(called, default=1 << 32))
    assert loops, "no code was read"
    return {
        "registers": int(re.search(r"REG:(\d+)", own)[1]),
        "local": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", own))),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": len(re.findall(r"\bLDG\.E\.128\b", code)),
        "stores": len(re.findall(r"\bSTG\.E\.128\b", code)),
        "generic": len(re.findall(r"\b(?:LD|ST)\.E\b", loops)),  # of an unknown kind of memory
    }


def test_moves_are_16_bytes_and_nothing_spills(facts):
    """Stats asks no penalty: the elementary kernel serves all. A step knows the elementary ones."""
    (family,) = {got["family"] for got in facts.values()}
    assert set(SWEEPS) - set(facts) == ({"stats", "step"} if family == "All" else set())
    for sweep, got in facts.items():
        assert (got["loads"], got["stores"]) == MOVES[sweep, family], (sweep, got)
        assert got["local"] == got["spills"] == got["generic"] == 0, (sweep, got)
        own = {"prox_in_metric": IN_METRIC[family], "step": STEP}
        most = own.get(sweep, SHARED_LOOPS if family == "All" else OWN_LOOPS)[got["arch"]]
        assert got["registers"] <= most, (sweep, got)
