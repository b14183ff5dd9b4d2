"""The documents are true: every Python block runs, every local link leads somewhere, every picture
can be drawn again."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pyreg
from pyreg.profiling import model as profiling_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


class Net(nn.Module):
    """What the documents call `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.backbone(x)))


def names() -> dict[str, object]:
    """What a block may use without making it: a model in training, and what goes with it."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))

    def train_step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    train_step()
    fisher = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    loss = nn.functional.cross_entropy(model(x), y)
    known = {"model": model, "optimizer": optimizer, "train_step": train_step, "loss": loss}
    return known | {"fisher": fisher, "lam": 0.1, "torch": torch, "pyreg": pyreg}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page, tmp_path, monkeypatch):
    """In order, one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    # (What torch.compile makes of the loop takes half a minute, and has tests of its own.)
    quick = [way for way in profiling_model.DEFAULT if way != "compile"]
    monkeypatch.setattr(profiling_model, "DEFAULT", quick)
    known, text = names(), page.read_text()
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        # The same line numbers as in the page, so that a traceback leads there.
        exec(compile("\n" * line + block[1], str(page), "exec"), known)


def test_the_first_block_needs_nothing_else():
    exec(BLOCK.findall((ROOT / "docs" / "index.md").read_text())[0], {})


def test_the_reader_of_blocks_sees_them():
    assert sum(len(BLOCK.findall(page.read_text())) for page in PAGES) > 25
    assert BLOCK.findall("a\n```python\nx = 1\n```\n```sh\nls\n```\n") == ["x = 1\n"]


def test_what_is_printed_is_what_the_readme_shows(native):
    model = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30))
    reg = pyreg.Regularizer(model, {"*.weight": pyreg.ElasticNet(1e-5, 1e-4)}, exclude="1.*")
    assert f"```\n{reg}\n```" in PAGES[0].read_text()


def anchors(page: Path) -> set[str]:
    """What a link may point to on a page: its headings, as they are written in addresses."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    for link in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES[1:]]


def test_the_site_is_built_without_a_warning(tmp_path):
    """What mkdocs finds wrong with links and pages is an error."""
    pytest.importorskip("material")
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path / "site"), "--config-file", str(ROOT / "mkdocs.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    assert "<table>" in home
    assert "fonts.googleapis" not in home, "nothing is fetched from elsewhere"


def test_the_pictures_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    assert {penalty.name for penalty in figures.EXAMPLES} == set(pyreg.penalties.PENALTIES)
    figures.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "images").iterdir()}
    used = {Path(link).name for page in PAGES for link in LINK.findall(page.read_text())}
    assert drawn <= used
