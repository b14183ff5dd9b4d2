"""The house stays in order: no penalty lacks a block, and imports run one way."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from cases import STRENGTHS

import pyreg
from pyreg import reference
from pyreg.penalties import PENALTIES, Penalty

PACKAGE = Path(pyreg.__file__).parent

# A module imports only from the layers below its own.
LAYERS = [
    ["cli", "__main__", "demo", "doctor", "profiling"],  # (these may import one another)
    ["optim"],
    ["optim.optimizers"],
    ["optim.fused"],
    ["optim.by_torch"],
    ["optim.arguments", "optim.parts"],
    ["optim.precision"],
    ["regularizer"],
    ["attachment", "members"],
    ["functional"],
    ["autograd"],
    ["ops"],
    ["sweeps"],
    ["dispatch", "look"],
    ["backend.triton"],
    ["backend.addresses"],
    ["backend.native"],
    ["backend.cuda"],
    ["backend.torch"],
    ["pack", "coverage", "stats", "priors", "metric", "schedules"],
    ["penalties", "text"],
    ["strengths", "tensors"],
    ["distributed", "memory"],
    ["reference"],
    ["_native", "_cuda"],
]
FACE = "__init__"  # pyreg/__init__.py gathers the public names, and may import anything


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_has_its_blocks(name):
    """Class, formula, struct and example strengths: the message names the place that lacks one."""
    cls = PENALTIES[name]
    assert name in reference.FORMULAS, f"{name}: no formula in pyreg/reference.py: FORMULAS"
    assert name in STRENGTHS, f"{name}: no example strengths in tests/cases.py: STRENGTHS"
    for strengths in STRENGTHS[name]:
        assert len(strengths) == len(cls.parameters), f"{name}: takes {cls.parameters}"
    assert getattr(pyreg, cls.__name__, None) is cls, f"{name}: not exported by pyreg/__init__.py"
    assert cls.__doc__, f"{name}: pyreg/penalties.py: {cls.__name__} has no docstring"
    native = pytest.importorskip("pyreg._native")
    assert name in native.penalties, f"{name}: no struct in csrc/penalties.h: PYREG_PENALTIES"
    assert len(cls.parameters) <= native.max_strengths, f"{name}: csrc/penalties.h: kMaxStrengths"
    triton = pytest.importorskip("pyreg.triton_kernels")
    assert name in triton.PENALTIES, f"{name}: no block in triton_kernels/penalties.py: PENALTIES"


def test_nothing_is_left_over():
    """No formula, struct or example without a penalty."""
    assert set(reference.FORMULAS) == set(PENALTIES)
    assert set(STRENGTHS) == set(PENALTIES)
    native = pytest.importorskip("pyreg._native")
    assert set(native.penalties) == set(PENALTIES)


def test_parameters_are_the_fields_in_order():
    """A penalty's strengths go to every backend in the order of its fields."""
    assert pyreg.ElasticNet.parameters == ("l1", "l2")
    assert pyreg.ElasticNet(l2=2.0, l1=1.0).strengths == (1.0, 2.0)
    assert all(issubclass(cls, Penalty) for cls in PENALTIES.values())


def module_name(file: Path) -> str:
    """ "backend.native" for pyreg/backend/native.py; a package is called by its folder."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir() or name in ("_native", "_cuda")


def imports(file: Path) -> set[str]:
    """The modules of pyreg that a file imports, wherever in the file (but for annotations only)."""
    package = ["pyreg", *file.relative_to(PACKAGE).parts[:-1]]
    tree, found = ast.parse(file.read_text()), set()
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for parts in (".".join(name).split(".") for name in names):
            if parts[0] != "pyreg":
                continue
            name = ".".join(parts[1:])
            while name and not is_module(name):  # a name inside a module
                name = name.rpartition(".")[0]
            found.add(name or FACE)
    return found


def layer(name: str) -> int:
    for same in (str.__eq__, lambda name, n: name.startswith(n + ".")):
        for i, names in enumerate(LAYERS):
            if any(same(name, n) for n in names):
                return i
    raise AssertionError(f"pyreg/{name}: give it a place in tests/test_registry.py: LAYERS")


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_one_way(file):
    """regularizer -> functional -> autograd -> ... -> backend -> reference, and never back."""
    own = module_name(file)
    if own == "backend":
        assert imports(file) == set(), "pyreg/backend/__init__.py imports nothing"
        return
    for other in imports(file):
        if other == FACE:
            assert layer(own) == 0, f"{own} imports pyreg itself"
        elif other == "backend":
            raise AssertionError(f"{own} imports the package backend instead of one of its modules")
        else:
            inside_top = layer(own) == layer(other) == 0
            assert inside_top or layer(other) > layer(own), f"the arrow {own} -> {other} runs back"


def test_the_import_reader_sees_arrows():
    """The reader itself: what it makes of two known files."""
    assert {"dispatch", "pack", "penalties"} <= imports(PACKAGE / "sweeps.py")
    assert {"pack", "penalties", "backend.torch"} <= imports(PACKAGE / "backend" / "native.py")
    assert {"reference", "sweeps", "backend.torch"} <= imports(PACKAGE / "autograd.py")


def test_the_oracle_imports_only_torch():
    """reference.py: torch and the standard library, nothing compiled and nothing of pyreg."""
    roots = set()
    for node in ast.walk(ast.parse((PACKAGE / "reference.py").read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.partition(".")[0])
    assert roots <= {"torch", *sys.stdlib_module_names}


def test_import_brings_nothing_optional(run_python):
    """`import pyreg` loads torch, the standard library and pyreg's own Python: nothing else, and
    not the compiled module."""
    new = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import pyreg\n"
        "print(*sorted(set(sys.modules) - before))"
    ).split()
    others = {m for m in new if m.partition(".")[0] not in {"pyreg", "torch"}}
    assert {m.partition(".")[0] for m in others} <= set(sys.stdlib_module_names)
    assert "pyreg._native" not in new
    assert not any(m.startswith("pyreg.profiling") for m in new)
