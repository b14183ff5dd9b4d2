"""A progress bar for each part of a long measurement, by rich."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .measure import Tell

_EVERY = 0.25  # seconds: to draw takes half a millisecond, which short runs would share


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], Tell]]:
    """Gives a function that begins a bar and returns what is told (what goes on, share done)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}", style="dim"),
    )
    # No thread that draws: beside other threads backward does not add to gradients in place.
    with Progress(*columns, console=console, auto_refresh=False) as bars:

        def begin(title: str) -> Tell:
            task = bars.add_task(f"{title:<32}", total=1.0, what="")
            drawn = -math.inf

            def tell(what: str, share: float) -> None:
                nonlocal drawn
                now = time.monotonic()
                due = now - drawn >= _EVERY or share >= 1
                drawn = now if due else drawn
                bars.update(task, completed=share, what="" if share >= 1 else what, refresh=due)

            return tell

        yield begin
