"""What `pyreg profile` is given: a workload's name, a factory of a model, or a file of weights."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import nn

from ..penalties import PENALTIES, Penalty
from .files import read
from .workloads import WORKLOADS, Workload

# Models by the names that people know them by.
NAMES = {"resnet50": "resnet", "llama3-8b": "llama", "moe": "experts"}


@dataclass(frozen=True)
class Target:
    """What is to be profiled."""

    model: nn.Module | Workload
    step: Callable[[], object] | None = None


def target_of(text: str) -> Target:
    """The model, or the shapes, that the text names.

    Raises:
        ValueError: it names nothing, or what it names fails; the message says which.
    """
    name = NAMES.get(text, text)
    if name in WORKLOADS:
        return Target(replace(WORKLOADS[name], name=text))
    path = Path(text)
    if path.is_file():
        return Target(read(path))
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"{text}: there is no such file")
    if ":" in text:
        return _made(text)
    known = [*WORKLOADS, *NAMES]
    close = difflib.get_close_matches(text, known, n=1)
    meant = f"; did you mean {close[0]}?" if close else "."
    raise ValueError(
        f"{text!r} is no workload, package.module:factory or file of weights{meant} The workloads: "
        f"{', '.join(sorted(set(known)))}"
    )


def _made(text: str) -> Target:
    """What `package.module:factory` gives: a module, or (a module, its training step).

    The current folder comes first on the path, and stays: factory and step may import from it too.
    """
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise ValueError(f"{text!r} lacks a name: expected package.module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        factory = attrgetter(name)(importlib.import_module(module_name))
    except ModuleNotFoundError as error:
        raise ValueError(f"{text}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"{text}: {error}") from error
    except (Exception, SystemExit) as error:  # (a script may exit when it is imported)
        raise ValueError(
            f"{text}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    if not callable(factory):
        raise ValueError(f"{text}: expected a factory, got {type(factory).__name__}")
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{text}: it raised {type(error).__name__}: {error}") from error
    model, step = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (step is None or callable(step)):
        raise ValueError(
            f"{text}: expected a module, or (a module, its training step), got {_kind(made)}"
        )
    return Target(model, step)


def _kind(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(m).__name__ for m in made)})"
    return type(made).__name__


def penalty_of(text: str) -> Penalty:
    """'l1:1e-5' or 'elastic_net:1e-5,1e-4': a penalty's name and its numbers, in order.

    Raises:
        ValueError: there is no such penalty, or it takes other numbers.
    """
    name, _, numbers = text.partition(":")
    if name not in PENALTIES:
        raise ValueError(f"--penalty: {name!r} is none of {', '.join(PENALTIES)}")
    cls = PENALTIES[name]
    wanted = [f.name for f in fields(cls) if f.name in cls.parameters]
    try:
        found = [float(n) for n in numbers.split(",")]
    except ValueError:
        found = []
    if len(found) != len(wanted):
        raise ValueError(f"--penalty: expected {name}:{','.join(wanted)} in numbers, got {text!r}")
    try:
        return cls(*found)
    except ValueError as error:
        raise ValueError(f"--penalty: {error}") from error
