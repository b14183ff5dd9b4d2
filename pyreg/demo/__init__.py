"""`pyreg demo`: digits with and without penalties, accuracy against exact zeros, and what L1 and
L1 + L2 cost on two models."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..dispatch import backends, requested

_NEEDS = {"matplotlib": "matplotlib", "rich": "rich", "sklearn": "scikit-learn"}


def run(out: Path) -> None:
    """Run all parts, print their tables, write demo.png and demo.json to the folder `out`.

    Raises:
        SystemExit: an optional package is missing; the message names it.
    """
    missing = [name for module, name in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f'pyreg demo needs {" and ".join(missing)}: pip install "pyreg[demo]"')
    from rich.console import Console

    from ..profiling.progress import progress
    from . import digits, figure, overhead, show, sparsity

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    console.print(_backend_line(), markup=False, soft_wrap=True)
    with progress(console) as begin:
        data = digits.load()
        trainings = _train(data, begin)
        curves = sparsity.curves(data, begin("digits, accuracy against zeros"))
        record = overhead.measure_all(begin)
    show.digits_table(console, trainings)
    show.sparsity_table(console, curves)
    show.overhead_tables(console, record)
    figure.draw(trainings, curves, record, out / "demo.png")
    result = {
        "digits": [digits.summary(t) for t in trainings],
        "sparsity": [sparsity.summary(c) for c in curves],
        "overhead": record.to_dict(),
    }
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    written = f"\nWritten to {out.resolve()}: demo.png, demo.json"
    console.print(written, soft_wrap=True, markup=False)


def _train(data: Any, progress: Callable[[str], Callable[[str, float], None]]) -> list:
    from . import digits

    tell = progress("digits, four trainings")
    trainings = []
    for i, name in enumerate(digits.RUNS):
        trainings.append(
            digits.train(
                name,
                data,
                lambda share, i=i, name=name: tell(name, (i + share) / len(digits.RUNS)),
            )
        )
    return trainings


def _backend_line() -> str:
    """Who sweeps, and what that means if it is not the native library."""
    if requested() == "torch":
        return "Backend: torch, asked for by name; the native library is faster."
    native = next(b for b in backends() if b.name == "native")
    if native.available:
        return f"Backend: native ({native.detail})."
    return (
        f"Backend: torch, because {native.detail}. The results are the same; the figures below are "
        "not those of the native library."
    )
