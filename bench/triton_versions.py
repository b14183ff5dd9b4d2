"""Triton's interpreter, version by version: `python -m bench.triton_versions`, some ten minutes.

Each version is installed into a folder of its own, which comes first on the path, and runs the same
selection of tests, one after the other. Writes bench/results/triton_versions.csv.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from pyreg.profiling import environment

VERSIONS = ("3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
NUMPY = "numpy<2.4"  # the interpreter of Triton 3.3 to 3.6 fails with later ones
TESTS = (
    "tests/test_triton_kernels.py",
    "tests/test_triton_steps.py",
    "tests/test_triton_precision.py",
    "tests/test_triton_backend.py",
    "tests/test_sweeps.py",
)
SELECTION = "test_triton or float32 or bfloat16 or test_mixed"
ROOT = Path(__file__).resolve().parents[1]


def run(version: str) -> dict[str, object]:
    """Counts of one version's tests, and the first that failed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "--no-deps"]
        subprocess.run([*pip, f"triton=={version}", NUMPY], check=True)
        report = Path(folder, "report.xml")
        pytest = [sys.executable, "-P", "-m", "pytest", "--import-mode=importlib", "-m", "not gpu"]
        subprocess.run(
            [*pytest, "-k", SELECTION, f"--junitxml={report}", *TESTS],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": folder, "TRITON_INTERPRET": "1"},
            stdout=subprocess.DEVNULL,
        )
        suite = ElementTree.parse(report).getroot().find("testsuite")
        numpy = next(Path(folder).glob("numpy-*.dist-info")).stem.removeprefix("numpy-")
    cases = suite.findall("testcase")
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {
        "triton": version,
        "numpy": numpy,
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "first_failed": failed[0].get("name") if failed else "",
    }


def main() -> int:
    where = environment()
    common = {"python": where.python, "torch": where.torch, "commit": where.commit}
    common["time"] = where.time
    rows = []
    for version in VERSIONS:
        rows.append({**run(version), **common})
        print(*rows[-1].values(), flush=True)
        with (ROOT / "bench/results/triton_versions.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return 1 if any(row["failed"] or not row["passed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
