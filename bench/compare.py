"""Two commits, or two records: `python -m bench compare A B`.

A commit is built in a folder of its own, and measured there by `bench/compared.py`, in processes
that alternate: A, B, A, B, ... What differs by more than the spread of both is said to differ. A
record is a .json or .csv file of this benchmark; of two records the rows with the same names are
set side by side, whatever machines they are from.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyreg import text
from pyreg.profiling import WORKLOADS
from pyreg.profiling.record import milliseconds
from pyreg.profiling.timing import Timing, summarize

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("tensors", "elements")
NAMES = ("workload", "dtype", *SIZES, "penalty", "sweep", "way")  # what tells rows from one another
Key = tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """One thing, measured twice."""

    key: Key
    a: Timing
    b: Timing

    @property
    def ratio(self) -> float:
        return self.b.median / self.a.median

    @property
    def verdict(self) -> str:
        """Of b against a; a difference is one if not even their 10-90 % overlap."""
        if self.b.p90 < self.a.p10:
            return "faster"
        return "slower" if self.b.p10 > self.a.p90 else "same"


def read(path: Path) -> dict[Key, Timing]:
    """A record's rows that were measured.

    Raises:
        ValueError: (naming the file) it is no record.
    """
    try:
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        else:
            rows = json.loads(path.read_text())["rows"]
        return {
            _key(row): Timing(
                *(float(row[q]) for q in ("seconds", "p10", "p90")), int(row.get("samples") or 0)
            )
            for row in rows
            if row["seconds"] not in (None, "")
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no record of this benchmark ({error!r})") from error


def _key(row: Mapping[str, object]) -> Key:
    return tuple(f"{row[n]} {n}" if n in SIZES else row[n] for n in NAMES if n in row)


def pairs(a: Mapping[Key, Timing], b: Mapping[Key, Timing]) -> list[Pair]:
    """What both have, in the order of a."""
    return [Pair(key, a[key], b[key]) for key in a if key in b]


def table(found: Sequence[Pair]) -> str:
    rows = [
        [
            ", ".join(pair.key),
            milliseconds(pair.a.median),
            milliseconds(pair.b.median),
            f"{pair.ratio:.2f}",
            pair.verdict,
        ]
        for pair in found
    ]
    return text.table(["", "A, ms", "B, ms", "B / A", "B is"], rows, right={1, 2, 3})


def measure_commits(
    commits: Sequence[str], workloads: Sequence[str], rounds: int
) -> list[dict[Key, Timing]]:
    """Each commit's timings, from processes by turns."""
    job = json.dumps([_shapes(name) for name in workloads])
    with tempfile.TemporaryDirectory() as folder:
        sites = [_built(commit, Path(folder) / str(i)) for i, commit in enumerate(commits)]
        samples: list[dict[Key, list[float]]] = [{} for _ in commits]
        for _ in range(rounds):
            for site, of in zip(sites, samples, strict=True):
                for workload, way, seconds in json.loads(_measured(site, job)):
                    of.setdefault((workload, way), []).extend(seconds)
    return [{key: summarize(s) for key, s in of.items()} for of in samples]


def _shapes(name: str) -> dict[str, object]:
    workload = WORKLOADS[name]
    dtype = str(workload.dtype).removeprefix("torch.")
    return {"name": name, "dtype": dtype, "shapes": [shape for _, shape in workload.shapes]}


def _built(commit: str, folder: Path) -> Path:
    """Where that commit is installed."""
    source, site = folder / "source", folder / "site"
    source.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True
    )
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True)
    return site


def _measured(site: Path, job: str) -> str:
    command = [sys.executable, "-P", str(Path(__file__).with_name("compared.py"))]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        command, input=job, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("a", help="a commit, or a record's file")
    parser.add_argument("b", help="another")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["gpt2", "many"])
    parser.add_argument("--rounds", type=int, default=5, help="processes of each commit")
    options = parser.parse_args(argv)
    files = [Path(name).is_file() for name in (options.a, options.b)]
    try:
        if all(files):
            a, b = read(Path(options.a)), read(Path(options.b))
        elif any(files):
            raise ValueError("compare two commits or two files, not one of each")
        else:
            a, b = measure_commits((options.a, options.b), options.workloads, options.rounds)
    except ValueError as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode(errors="replace").strip() if error.stderr else ""
        parser.error(f"{' '.join(map(str, error.cmd))} failed. {said}")
    found = pairs(a, b)
    if not found:
        parser.error(f"{options.a} and {options.b} have no row in common")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
