"""Other packages beside pyreg: who is right is timed, who is wrong is said to be, and not timed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from pyreg.profiling import WAYS, WORKLOADS, Way, allocate, environment
from pyreg.profiling.check import Expected, check

ROOT = Path(__file__).parents[1]
INSTALLED = "torch"  # a package whose version is known


@pytest.fixture
def peers(monkeypatch):
    """The module, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    from bench import peers

    return peers


def soft_threshold(excess: float):
    """Each weight moved to 0 by the strength, and by some more."""

    def prepare(parameters, penalty):
        @torch.no_grad()
        def run():
            for p in parameters.tensors:
                p.copy_(p.sign() * (p.abs() - penalty.lam - excess).clamp(min=0))

        return run

    return prepare


def divided(parameters, penalty):
    """Right but where strength and weight are 0: 0 / 0."""

    @torch.no_grad()
    def run():
        for p in parameters.tensors:
            p.mul_((1 - penalty.lam / p.abs()).clamp(min=0))

    return run


def not_there(parameters, penalty):
    raise ImportError("no module of that name")


def contest(peers, **ways):
    found = tuple(peers.Peer(INSTALLED, Way(name, "prox", way, 2)) for name, way in ways.items())
    absent = peers.Peer("no-such-package", Way("absent", "prox", not_there, 2))
    return peers.Contest("prox", peers.L1, WAYS["pyreg prox_"], (*found, absent))


@pytest.fixture
def rows(peers):
    ways = {"right": soft_threshold(0.0), "wrong": soft_threshold(1e-3), "divided": divided}
    held = contest(peers, **ways, broken=not_there)
    return {row.way: row for row in peers.measure(["tiny"], [held], rounds=1, seconds=0.0)}


def test_who_is_right_is_timed(rows):
    for way in ("pyreg prox_", "right"):
        assert rows[way].seconds > 0
        assert rows[way].error < 4 * 2**-24
        assert rows[way].note == ""
    assert rows["right"].version == torch.__version__
    assert rows["right"].over_pyreg == rows["right"].seconds / rows["pyreg prox_"].seconds


def test_who_is_wrong_is_not(rows):
    row = rows["wrong"]
    assert (row.seconds, row.over_pyreg, row.error) == (None, None, None)
    largest = 0.02 * 3.5  # standard deviations, of 4,200 weights
    off = float(row.note.split("is off by ")[1].split(",")[0])
    assert row.note.startswith("not timed: its prox is off by")
    assert off == pytest.approx(1e-3 / largest, rel=0.3)


def test_strength_zero_is_tried_too(rows):
    """It is timed: at the strength that is timed it is right."""
    assert rows["divided"].seconds > 0
    assert rows["divided"].note.startswith("at strength 0 its prox is off by nan")


def test_who_is_absent_or_fails_is_named(rows):
    assert rows["absent"].note == "not timed: no-such-package is not installed"
    assert rows["absent"].version == ""
    assert rows["broken"].note == "not timed: it raises ImportError: no module of that name"
    assert rows["broken"].version == torch.__version__


def test_what_is_written(peers, rows, tmp_path):
    where, path = environment(), tmp_path / "peers.csv"
    peers.write(list(rows.values()), where, path)
    with path.open(newline="") as file:
        written = {row["way"]: row for row in csv.DictReader(file)}
    assert list(written) == list(rows)
    assert written["wrong"]["seconds"] == ""
    assert {row["commit"] for row in written.values()} == {where.commit}
    text = peers.table(list(rows.values()))
    assert f"tiny, wrong {torch.__version__}: {rows['wrong'].note}" in text.splitlines()


def test_the_gradient_of_a_detached_penalty_is_missed(peers):
    """A peer of the gradient's job that leaves .grad alone is off by all of it."""

    def detached(parameters, penalty):
        return lambda: penalty.value(torch.cat([p.detach().flatten() for p in parameters.tensors]))

    peer = peers.Peer(INSTALLED, Way("detached", "gradient", detached, 1))
    held = peers.Contest("accumulate_", peers.L1, WAYS["pyreg accumulate_"], (peer,))
    first, second = peers.measure(["tiny"], [held], rounds=1, seconds=0.0)
    assert first.seconds > 0
    assert second.note == "not timed: its gradient is off by 1.0e+00, more than 2e-07"


def test_pyregs_own_ways_do_the_jobs(peers):
    """Among them the optimizer's step, at a learning rate of 1 from gradients of 0."""
    for held in peers.CONTESTS:
        parameters = allocate(WORKLOADS["tiny"])
        run = held.ours.prepare(parameters, held.penalty)
        check(held.ours, run, parameters, Expected(parameters, held.penalty))


def test_the_peers_that_are_installed_can_be_asked(peers):
    """Right or wrong, none of them raises; those that are not installed are named."""
    rows = peers.measure(["tiny"], peers.CONTESTS, rounds=1, seconds=0.0)
    assert len(rows) == sum(1 + len(held.peers) for held in peers.CONTESTS)
    assert not [row for row in rows if "it raises" in row.note]
    assert all(row.seconds is not None or row.note for row in rows)


def test_every_peer_is_pinned(peers):
    lines = (ROOT / "bench" / "requirements-peers.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line and not line.startswith("#")}
    assert pinned == {peer.package for held in peers.CONTESTS for peer in held.peers}
