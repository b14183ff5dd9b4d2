"""The kernels compiled ahead of time, for devices that are not here: 16-byte moves, no spills.

The compiler runs in a process of its own: under TRITON_INTERPRET there are no kernels to compile.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = ["float32", "bfloat16", "float16", "float64"]
SWEEPS = {  # 16-byte loads and stores of a thread in one chunk of 4 KiB
    "value": (2, 0),
    "gradient": (2, 2),
    "accumulate": (4, 2),
    "prox": (2, 2),
    "prox_in_metric": (4, 2),
    "stats": (2, 0),
}

ANCHORED = {  # the same in one block, of bfloat16 with float32 anchors and weights
    "value": (5, 0),
    "gradient": (5, 1),
    "accumulate": (6, 1),
    "prox": (5, 1),
    "prox_in_metric": (6, 1),
}

STEPS = {  # the same in one block of an optimizer's step: 8 elements of a thread
    "float32": ("float32", "float32", {}, (8, 6)),
    "bfloat16": ("bfloat16", "bfloat16", {}, (4, 3)),
    "float32 states": ("bfloat16", "float32", {}, (6, 5)),
    "masters": ("bfloat16", "float32", {"master": True}, (7, 7)),
    "stochastic": ("bfloat16", "float32", {"stochastic": True}, (6, 5)),
}
MODES = ["grad", "prox", "scaled prox"]

FAMILIES = ["l_half", "huber", "log_sum", "mcp", "scad"]
KERNELS = [(sweep, dtype, "elastic_net", None) for sweep in SWEEPS for dtype in DTYPES]
KERNELS += [
    (sweep, "bfloat16", name, None) for sweep in ("accumulate", "prox") for name in FAMILIES
]
KERNELS += [(sweep, "bfloat16", "elastic_net", "float32") for sweep in ANCHORED]
KERNELS += [("prox_in_metric", "bfloat16", "scad", "float32")]


def compile_all(target):
    """{"sweep dtype penalty anchors": facts}, and of steps. Runs in the child."""
    import torch
    from pyreg.triton_kernels import launch, steps, sweeps

    facts = {}
    for sweep, dtype, penalty, anchors in KERNELS:
        used = "l1" if sweep == "stats" else penalty
        totals = sweep not in ("gradient", "prox")
        own, beside = getattr(torch, dtype), anchors and getattr(torch, anchors)
        kind = launch.Kind(own, used, own, beside, beside)
        constants = launch.constants(5 if sweep == "stats" else 2, [kind], [used])
        heavy = launch.is_heavy([used], constants)
        stages = launch.stages(sweep, heavy) if TARGETS[target][0] == "cuda" else 1
        constants |= {"SWEEP": sweep, "STAGES": stages}
        if anchors is None:
            constants["anchors"] = None
        types = dict.fromkeys(("strengths", "scale"), "*fp64")
        if totals:
            types |= dict.fromkeys(("out", "value", "partials"), "*fp64") | {"counters": "*i32"}
        facts[f"{sweep} {dtype} {penalty} {anchors}"] = compile_one(
            target, launch.REGISTERS[sweep][heavy], sweeps.sweep, types, constants
        ) | {"stages": stages}
    for name, (dtype, states, options, _) in STEPS.items():
        kind = launch.StepKind(
            getattr(torch, dtype), getattr(torch, states), "adam", "elastic_net", **options
        )
        for mode in MODES:
            # Beside it, as in any model, rows that are not penalised.
            kinds = [kind, kind._replace(penalty=None)]
            constants = launch.step_constants(kinds, ["elastic_net"], mode != "grad")
            if not kind.stochastic:
                constants["keys"] = None
            if mode != "scaled prox":
                constants |= {"grad_scale": None, "found_inf": None}
            types = dict.fromkeys(steps.step.arg_names, "*fp64") | {"n_tensors": "i32"}
            types |= dict.fromkeys(("places", "keys", "rows", "groups", "zeros"), "*i64")
            types |= dict.fromkeys(("grad_scale", "found_inf"), "*fp32") | {"counters": "*i32"}
            facts[f"step {name} {mode}"] = compile_one(
                target, launch.REGISTERS["step"][False], steps.step, types, constants
            )
    return facts


def compile_one(target, registers, kernel, types, constants):
    """Facts of one kernel; operands of no given type are int64 tables."""
    import triton
    from pyreg.triton_kernels import launch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, architecture, warp = TARGETS[target]
    types = dict.fromkeys(kernel.arg_names, "*i64") | types
    types |= dict.fromkeys(("slots", "share", "run", "n_rows", "n_groups"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    options = {"num_warps": launch.THREADS // warp}
    if backend == "cuda":
        options["maxnreg"] = registers
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs=constants),
        target=GPUTarget(backend, architecture, warp),
        options=options,
    )
    read = cuda_facts if backend == "cuda" else hip_facts
    return read(compiled.asm) | {"registers_given": registers}


def cuda_facts(asm):
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        usage, sass = (
            subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    return {
        # Of the tensors only: tables and partials are read with other instructions. What is loaded
        # some blocks ahead goes to shared memory.
        "loads": len(
            re.findall(r"ld\.global\.(?:v4\.b32|v2\.b64) |cp\.async\..* 0x10", asm["ptx"])
        ),
        "stores": len(re.findall(r"st\.global\.(?:v4\.b32|v2\.b64) ", asm["ptx"])),
        "kept": len(re.findall(r"\b(?:LDG\.E|LDGSTS\.E\.BYPASS)\.128\b", sass)),
        "local": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
    }


def hip_facts(asm):
    code = asm["amdgcn"]
    return {
        "loads": len(re.findall(r"(?:buffer|global)_load_dwordx4", code)),
        "stores": len(re.findall(r"(?:buffer|global)_store_dwordx4", code)),
        "local": int(re.search(r"private_segment_fixed_size: *(\d+)", code)[1]),
        "spills": int(re.search(r"vgpr_spill_count: *(\d+)", code)[1]),
    }


@pytest.fixture(scope="module", params=TARGETS)
def facts(request, tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    child = subprocess.run(
        [sys.executable, __file__, request.param], env=env, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sweep", SWEEPS)
def test_moves_are_16_bytes_and_nothing_spills(facts, sweep, dtype):
    check(facts[f"{sweep} {dtype} elastic_net None"], SWEEPS[sweep])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sweep", ["accumulate", "prox"])
def test_other_families(facts, sweep, family):
    """As above, in bfloat16; only the logarithm of LogSum may spill a few registers."""
    spills = 32 if family == "log_sum" else 0
    check(facts[f"{sweep} bfloat16 {family} None"], SWEEPS[sweep], spills)


@pytest.mark.parametrize("sweep", ANCHORED)
def test_anchored(facts, sweep):
    check(facts[f"{sweep} bfloat16 elastic_net float32"], ANCHORED[sweep])


def test_anchored_with_a_step_for_each_element(facts):
    check(facts["prox_in_metric bfloat16 scad float32"], ANCHORED["prox_in_metric"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STEPS)
def test_steps_of_adam_with_elastic_net(facts, name, mode):
    """Both kinds of rows move 16 bytes at a time; what rounds stochastically may spill a little."""
    loads, stores = STEPS[name][3]
    spills = 16 if name == "stochastic" else 0
    check(facts[f"step {name} {mode}"], (2 * loads, 2 * stores), spills)


def check(got, moves, spills=0):
    loads, stores = moves
    loads *= got.get("stages", 1)  # in the loop, and as often before it as it is ahead
    assert got["loads"] >= loads, got
    assert got["stores"] >= stores, got
    assert got.get("kept", loads) >= loads, got
    assert got["spills"] <= spills, got
    assert got["local"] == 0 or got["spills"] > 0, got
    assert got.get("registers", 0) <= got["registers_given"], got


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
