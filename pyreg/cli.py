"""The command `pyreg`: doctor, profile, demo."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .profiling import command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="pyreg", description="Weight penalties in one sweep.")
    parser.add_argument("--version", action="version", version=f"pyreg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is available here, and whether it works")
    doctor.set_defaults(run=_doctor)
    command.add_to(commands)
    demo = commands.add_parser("demo", help="train on real data and measure what a penalty costs")
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder for results (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import diagnose, examine

    checks = examine()
    print(diagnose(checks))
    return 0 if all(check.passed for check in checks) else 1


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run

    run(arguments.out)
    return 0
