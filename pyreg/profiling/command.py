"""`pyreg profile`: the command line of pyreg.profile."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from .measure import Tell
from .memory import TooLarge
from .model import DEFAULT, profile
from .record import check_writable, wrong_of_ours
from .result import Profile
from .target import NAMES, Target, penalty_of, target_of
from .timing import Interrupted
from .ways import LIMITS, WAYS
from .workloads import WORKLOADS, Workload

STOPPED, FAILED = 130, 1  # exit status; the former as shells have it
_MOST_THREADS = 16  # for each core; what more of them measures is the system
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_to(commands: argparse._SubParsersAction) -> None:
    """The command's arguments."""
    named = ", ".join(sorted({*WORKLOADS, *NAMES}))
    parser = commands.add_parser(
        "profile",
        help="what each way to regularize a model costs here",
        description="What each way to regularize a model costs on this machine.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "target",
        help=f"a workload ({named}), your own package.module:factory, which gives a module or (a "
        "module, its training step), or a file of weights (.safetensors, or of torch.save): of a "
        "workload or a file the shapes alone, with random weights",
    )
    parser.add_argument(
        "--penalty", default="l1:1e-5", help="name:numbers, as elastic_net:1e-5,1e-4 (%(default)s)"
    )
    parser.add_argument("--device", help="cpu or cuda (where the model is; else a GPU, if any)")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--scale", type=float, help="this share of a workload's elements, 0 to 1")
    parser.add_argument("--dtype", choices=_DTYPES, help="of a workload (its own)")
    ways = [name for name in WAYS if name not in LIMITS]
    parser.add_argument(
        "--ways", nargs="+", choices=ways, metavar="WAY", default=list(DEFAULT),
        help=f"each in quotes, after the target; of: {', '.join(map(repr, ways))}",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=3.0, help="at most, for each way")
    parser.add_argument(
        "--counters", action="store_true",
        help="on a GPU, count the bytes that its memory moves; that may need rights",
    )  # fmt: skip
    for kind, what in {
        "json": "what was measured",
        "html": "a report in one file, with plots",
        "trace": "a Chrome trace of one run of each way, by torch.profiler",
    }.items():
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"write {what}")


def run(options: argparse.Namespace) -> int:
    """Measure, print, write; returns the exit status. A mistake of the user is one sentence.

    A way of pyreg's own whose result is wrong fails the command; another package's is just said.
    """
    threads, path = torch.get_num_threads(), sys.path.copy()
    try:
        return _run(options)
    except (OSError, TypeError, ValueError, MemoryError, RuntimeError) as error:
        print(f"pyreg profile: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("pyreg profile: stopped before anything was measured", file=sys.stderr)
        return STOPPED
    finally:
        torch.set_num_threads(threads)
        sys.path[:] = path


def _run(options: argparse.Namespace) -> int:
    _check_outputs(options)
    penalty = penalty_of(options.penalty)
    if options.threads is not None:
        most = _MOST_THREADS * (os.cpu_count() or 1)
        if not 0 < options.threads <= most:
            raise ValueError(
                f"--threads: expected a number above 0 and up to {most} ({_MOST_THREADS} for each "
                f"core), got {options.threads}"
            )
        torch.set_num_threads(options.threads)
    target = _adapted(target_of(options.target), options)
    device = options.device
    if device is None and isinstance(target.model, Workload) and torch.cuda.is_available():
        device = "cuda"
    status = 0
    with _progress(options.target) as tell:
        try:
            result = profile(
                target.model, penalty, target.step, device, options.ways,
                seconds=options.seconds, tell=tell, trace=options.trace, counters=options.counters,
            )  # fmt: skip
        except Interrupted as stopped:
            result, status = stopped.measured, STOPPED
        except TooLarge as error:
            if not isinstance(target.model, Workload):
                raise
            fits = (options.scale or 1.0) * error.fits
            raise MemoryError(f"{error}; try --scale {_rounded_down(fits)}") from error
    with _undisturbed():
        print(result.table())
        _write(result, options)
    if wrong := wrong_of_ours(result.rows):
        names = ", ".join(row.way for row in wrong)
        said = f"wrong by pyreg's own check: {names}; that is a mistake of pyreg's, not of yours"
        print(f"pyreg profile: {said}", file=sys.stderr)
        return FAILED
    return status


def _rounded_down(share: float) -> str:
    """To one digit."""
    unit = 10.0 ** math.floor(math.log10(share))
    return f"{math.floor(share / unit) * unit:.1g}"


def _adapted(target: Target, options: argparse.Namespace) -> Target:
    """Shapes in the scale and dtype asked for."""
    if isinstance(target.model, Workload):
        workload = target.model.scaled(1.0 if options.scale is None else options.scale)
        if options.dtype:
            workload = replace(workload, dtype=getattr(torch, options.dtype), others={})
        return Target(workload)
    for name in ("scale", "dtype"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: for a workload or a file; {options.target} is a model")
    return target


def _check_outputs(options: argparse.Namespace) -> None:
    """All can be written; their paths lead to the same places wherever a factory goes."""
    for kind in ("json", "html", "trace"):
        if getattr(options, kind) is not None:
            path = getattr(options, kind).absolute()
            check_writable(f"--{kind}", path)
            setattr(options, kind, path)
    if options.html is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--html needs matplotlib: pip install "pyreg[profile]"')


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without Ctrl-C, by which what was measured would be lost."""
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write(result: Profile, options: argparse.Namespace) -> None:
    if options.json is not None:
        result.to_json(options.json)
    if options.html is not None:
        from .report import html

        options.html.write_text(html(result))
    paths = (options.json, options.html, options.trace if result.complete else None)
    if written := [str(path) for path in paths if path is not None]:
        print(f"\nwritten: {', '.join(written)}")


@contextmanager
def _progress(title: str) -> Iterator[Tell]:
    """A bar by rich, where there is someone to see it and rich to draw it."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda what, share: None
        return
    from rich.console import Console

    from .progress import progress

    with progress(Console(stderr=True)) as begin:
        yield begin(title)
