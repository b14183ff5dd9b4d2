"""The command `pyreg`: doctor, demo."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pyreg


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="pyreg", description="Weight penalties in one sweep.")
    parser.add_argument("--version", action="version", version=f"pyreg {pyreg.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what is available here, what is missing, how to get it")
    demo = commands.add_parser("demo", help="train on real data and measure what a penalty costs")
    demo.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder for results (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "doctor":
        from .doctor import diagnose

        print(diagnose())
        return 0
    from .demo import run

    run(arguments.out)
    return 0
