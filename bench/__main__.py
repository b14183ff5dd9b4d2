"""Workloads x penalties x ways: tables and targets, written to bench/results/<name>.json, .csv.

`python -m bench PART ...` runs another part: compare, scaling, roofline, readme, optim, penalties,
peers, overhead, host, sharded. `python -m bench all` runs everything, and writes every record,
picture and figure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyreg
from pyreg.profiling import LIMITS, WAYS, WORKLOADS, Record, Row, allocate, environment, measure

from . import builds, targets

PENALTIES = (pyreg.L1(1e-5), pyreg.ElasticNet(1e-5, 1e-4))
PARTS = (
    "compare",
    "scaling",
    "roofline",
    "readme",
    "optim",
    "penalties",
    "peers",
    "overhead",
    "host",
    "sharded",
)
RECORDED = (
    "scaling",
    "optim",
    "penalties",
    "peers",
    "overhead",
    "host",
    "sharded",
    "roofline",
    "readme",
)  # in order
RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    # (The optimizers have a benchmark of their own.)
    ways = [name for name in WAYS if name not in LIMITS and not WAYS[name].job.startswith("update")]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("part", nargs="?", help="if any, first")
    parser.add_argument("--name", default="cpu", help="of the record (default: cpu)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(targets.JUDGED))
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways, metavar="WAY",
                        help=f"each in quotes; of: {', '.join(map(repr, ways))}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=31, help="samples per way")
    parser.add_argument("--seconds", type=float, default=20.0, help="at most, per way")
    parser.add_argument("--skip-builds", action="store_true", help="do not compare native builds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args()
    if options.part is not None:
        parts = ", ".join([*PARTS, "all"])
        parser.error(f"{options.part!r}: a part comes first, alone, and is one of {parts}")
    return options


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    for name in options.workloads:
        parameters = allocate(WORKLOADS[name])
        for penalty in PENALTIES:
            title = f"{name}, {penalty.name}"
            yield from measure(
                parameters,
                penalty,
                options.ways,
                rounds=options.rounds,
                seconds=options.seconds,
                tell=lambda what, share, title=title: tell(f"{title}: {what}"),
            )


def tell(what: str) -> None:
    """One line that is written over, where there is someone to read it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        return part(sys.argv.pop(1))
    if sys.argv[1:] == ["all"]:
        sys.argv.pop()
        return max([figures(), *map(part, RECORDED)])  # a target that is missed ends nothing
    return figures()


def part(name: str) -> int:
    return importlib.import_module(f"bench.{name}").main() or 0


def figures() -> int:
    """What most of README.md is about: the exit status is 1 if a target is missed."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(environment(), tuple(rows_of(options)))
    comparison = None
    if not options.skip_builds:
        tell("building csrc twice")
        comparison = builds.compare()
    tell("")
    verdicts = targets.judge(record.rows, comparison)
    print(record.table(), targets.table(verdicts), sep="\n\n")
    extra = {
        "builds": None if comparison is None else asdict(comparison),
        "targets": [asdict(verdict) for verdict in verdicts],
    }
    path = options.out / f"{options.name}.json"
    path.write_text(json.dumps(record.to_dict() | extra, indent=1) + "\n")
    record.to_csv(path.with_suffix(".csv"))
    print(f"\nwritten: {path}, {path.with_suffix('.csv').name}")
    return 0 if all(verdict.passed is not False for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
