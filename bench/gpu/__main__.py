"""Build, measure, test and check on a GPU, without a network, within eight minutes.

Each step runs in a process of its own with a limit of its own; one that fails does not stop the
later ones. OUT then holds gpu.log, steps.json, tests.xml, sweeps.xml, optim.csv,
penalties.csv, counters.json and what figures.py writes.
This file imports the standard library alone, as nothing else may be there yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 475  # seconds for all steps
GRACE = 10  # seconds for a step to end by itself, at its limit
TOOLS = ("memcheck", "racecheck", "initcheck")
# (The others make these ready.)
CHOICES = ("kernels", "tests", "figures", "optim", "penalties", "memory", "counters")
NEEDED = ("torch", "pytest", "hypothesis", "pybind11", "setuptools")
VERSIONS = """
import platform, torch
print("Python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
try:
    import triton
    print("Triton", triton.__version__)
except ImportError as error:
    print(error)
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i))
major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
print(f"{major}{minor}")
"""
SERVING = """
import pyreg
print(pyreg.__file__)
print(*pyreg.backends(), sep="\\n")
"""


@dataclass
class Step:
    name: str
    limit: float  # seconds
    result: str = "not run"  # passed, failed, skipped
    reason: str = ""
    seconds: float = 0.0


@dataclass
class Check:
    """The steps of one run, their log and their environment."""

    out: Path
    dry: bool
    only: list[str] = field(default_factory=list)  # of the CHOICES; none: all
    seconds: float = TOTAL
    steps: list[Step] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    began: float = field(default_factory=time.monotonic)

    def skip(self, name: str, reason: str) -> None:
        self.steps.append(Step(name, 0, "skipped", reason))

    def run(
        self,
        name: str,
        limit: float,
        *commands: list[str],
        environment: Mapping[str, str] | None = None,
    ) -> list[str]:
        """One step: all commands at once; it fails if one does, or at its limit.

        Returns each command's last line of output.
        """
        if name in CHOICES and self.only and name not in self.only:
            self.skip(name, "not asked for")
            return []
        if self.dry:  # on two cores, or shared ones: the limits are a GPU machine's
            limit *= 4
        else:
            limit = max(0.0, min(limit, self.seconds - (time.monotonic() - self.began)))
        step = Step(name, limit)
        self.steps.append(step)
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        failed, lasts, late = "", [], []
        with tempfile.TemporaryDirectory() as folder:
            running = [
                (Path(folder, str(i)), self._start(command, Path(folder, str(i)), environment))
                for i, command in enumerate(commands)
            ]
            for path, process in running:
                try:
                    code = process.wait(max(0.0, start + step.limit - time.monotonic()))
                    why = f"exit status {code}" if code else ""
                except subprocess.TimeoutExpired:
                    late = late or [p for _, p in running if p.poll() is None]
                    stop(late)
                if process in late:
                    why = f"stopped after its {step.limit:.0f} s"
                text = path.read_text(errors="replace")
                self._log(f"== {name}: {' '.join(process.args)}\n{text}{why}\n")
                last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
                lasts.append(last)
                if why and not failed:
                    failed = f"{why}: {last[:90]}"
        step.seconds = time.monotonic() - start
        step.result, step.reason = ("failed", failed) if failed else ("passed", "")
        return lasts

    def _start(
        self, command: list[str], output: Path, environment: Mapping[str, str] | None
    ) -> subprocess.Popen:
        # What runs in a shell's background ignores interrupts, and so would all that it starts.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with output.open("wb") as file:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children end with it
            )

    def _log(self, text: str) -> None:
        with (self.out / "gpu.log").open("a") as file:
            file.write(text)

    def finish(self) -> int:
        """The table of steps, and the exit status."""
        width = max(len(step.name) for step in self.steps)
        lines = [
            f"{step.name:{width}}  {step.result:7}  {step.seconds:6.1f} s  {step.reason}".rstrip()
            for step in self.steps
        ]
        lines.append(f"{'all':{width}}  {'':7}  {time.monotonic() - self.began:6.1f} s")
        self._log("\n".join(lines) + "\n")
        rows = [asdict(step) for step in self.steps]
        (self.out / "steps.json").write_text(json.dumps(rows, indent=1) + "\n")
        print("\n".join(lines))
        return 1 if any(step.result == "failed" for step in self.steps) else 0


def stop(processes: list[subprocess.Popen]) -> None:
    """Interrupt them, so that they write what they have; then end them, with their children."""
    for process in processes:
        os.killpg(process.pid, signal.SIGINT)
    until = time.monotonic() + GRACE
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        with suppress(ProcessLookupError):  # where none of them is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def install(check: Check, wheels: Path | None, work: Path, architecture: str) -> None:
    """pyreg and what it is tested with, in folders that come first on the path."""
    packages, site = work / "packages", work / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
    check.environment["PYTHONPATH"] = os.pathsep.join(map(str, (site, packages, ROOT)))
    built = [*wheels.glob("pyreg-*.whl")] if wheels is not None else []
    if wheels is not None:
        files = sorted(map(str, wheels.glob("*.whl")))
        check.run("wheels", 60, [*pip, "--target", str(packages), *files])
    else:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        check.skip("wheels", f"none given; missing: {', '.join(missing) or 'nothing'}")
    if built:
        check.skip("build", f"{built[0].name} is among the wheels")
        return
    # Not auto: it is to fail here. And for this device alone, which takes seconds.
    nvcc = shutil.which("nvcc", path=check.environment["PATH"])
    check.environment.setdefault("PYREG_BUILD", "cuda" if nvcc else "cpu")
    check.environment.setdefault("PYREG_CUDA_ARCHS", architecture)
    # Not into build/ here, where modules of another day would be packed up with these.
    (work / "build.cfg").write_text(f"[build]\nbuild_base = {work / 'build'}\n")
    check.environment["DIST_EXTRA_CONFIG"] = str(work / "build.cfg")
    # (Two cores compile for every architecture in some two minutes, a GPU machine for its own.)
    check.run("build", 300, [*pip, "--no-build-isolation", "--target", str(site), str(ROOT)])


def memory(check: Check, python: list[str]) -> None:
    """The selection under each tool of compute-sanitizer; in a dry run by itself."""
    selection = [*python, "-m", "bench.gpu.selection"]
    commands = [selection]
    if not check.dry:
        if shutil.which("compute-sanitizer", path=check.environment["PATH"]) is None:
            check.skip("memory", "compute-sanitizer is not on the path")
            return
        sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
        commands = [[*sanitizer, tool, *selection] for tool in TOOLS]
    # Each tensor an allocation of its own, so that the byte behind it belongs to nobody.
    check.run("memory", 80, *commands, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def tests(check: Check, python: list[str]) -> None:
    """What only a GPU can show, and beside it every sweep against the oracle, on many cores."""
    pytest = [*python, "-m", "pytest", "--import-mode=importlib", "-p", "no:cacheprovider", "-rs"]
    commands = [[*pytest, f"--junitxml={check.out}/tests.xml", "tests/test_gpu.py"]]
    if not check.dry:  # in the dry run `make test` has run the others
        sweeps = ["tests/test_sweeps.py", "-m", "gpu"]
        if importlib.util.find_spec("xdist"):
            sweeps += ["-n", "auto"]
        commands.append([*pytest, f"--junitxml={check.out}/sweeps.xml", *sweeps])
    summaries = check.run("tests", 140, *commands)
    step = check.steps[-1]
    if step.result == "passed":  # as it is for pytest when all were skipped
        ran = all("passed" in summary for summary in summaries)
        step.result, step.reason = ("passed" if ran else "failed"), "; ".join(summaries)


def steps(check: Check, wheels: Path | None, commit: str, work: Path) -> None:
    dry = ["--dry-run"] if check.dry else []
    python = [sys.executable, "-P"]
    smi = shutil.which("nvidia-smi")
    if smi is None:
        check.skip("nvidia-smi", "is not on the path")
    else:
        check.run("nvidia-smi", 20, [smi])
    (architecture,) = check.run("versions", 60, [*python, "-c", VERSIONS])
    if (ROOT / ".git").exists() and shutil.which("git"):
        check.run("commit", 10, ["git", "log", "-1", "--oneline"], ["git", "status", "--short"])
    else:
        check.skip("commit", commit or "no checkout here")
    install(check, wheels, work, architecture)
    check.run("backends", 60, [*python, "-c", SERVING])
    # Triton compiles a kernel on one core and keeps it on disk: here on all of them.
    parts = os.cpu_count() or 1
    share = [*python, "-m", "bench.gpu.selection", "--share"]
    shares = (
        [[*share, "0", "37"]] if check.dry else [[*share, str(i), str(parts)] for i in range(parts)]
    )
    check.run("kernels", 60, *shares)
    figures = [*python, "-m", "bench.gpu.figures", "--out", str(check.out), "--seconds", "100"]
    check.run("figures", 130, [*figures, "--commit", commit, *dry])
    device = ["--device", "cpu" if check.dry else "cuda", "--commit", commit]
    for name, options in (
        ("optim", ["--workloads", *(["tiny"] if check.dry else ["gpt2-xl", "gpt2-bf16", "many"])]),
        ("penalties", ["--workload", "tiny" if check.dry else "gpt2-xl"]),
    ):
        brief = ["--rounds", "1", "--seconds", "0"] if check.dry else ["--seconds", "0.3"]
        into = ["--out", str(check.out / f"{name}.csv")]
        check.run(name, 50, [*python, "-m", f"bench.{name}", *options, *device, *brief, *into])
    counted = [*python, "-m", "pyreg", "profile", "tiny" if check.dry else "gpt2", "--counters"]
    ways = ["--ways", "loop", "foreach", "pyreg in the loss", "pyreg accumulate_", "pyreg prox_"]
    json_file = ["--json", str(check.out / "counters.json")]
    check.run("counters", 40, [*counted, "--seconds", "0.2", *ways, *json_file])
    tests(check, python)
    memory(check, python)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--commit", default="", help="to record where the files are no checkout")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all steps")
    parser.add_argument("--dry-run", action="store_true", help="every step, on CPU tensors")
    parser.add_argument(
        "--only", nargs="*", choices=CHOICES, default=[], metavar="STEP", help=", ".join(CHOICES)
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options.out.resolve(), options.dry_run, options.only, options.seconds)
    (check.out / "gpu.log").write_text("")
    # Last on the path: where CUDA's tools are by default.
    check.environment["PATH"] += os.pathsep + "/usr/local/cuda/bin"
    if check.dry:
        check.environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as work:
        steps(check, options.wheels and options.wheels.resolve(), options.commit, Path(work))
    return check.finish()


if __name__ == "__main__":
    sys.exit(main())
