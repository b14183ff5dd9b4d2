"""The README's figures are those of the records; and what makes them, compares them, draws them."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import pyreg
from pyreg.profiling import WORKLOADS, Record, Row, allocate, environment, load, measure
from pyreg.profiling.timing import Timing

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    """The package, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    from bench import compare, readme, roofline, scaling

    return {"compare": compare, "readme": readme, "roofline": roofline, "scaling": scaling}


def test_the_figures_are_those_of_the_records(bench):
    """In every document, and no section is without a place."""
    marks = set()
    for path in bench["readme"].FILES:
        text = path.read_text()
        assert bench["readme"].written(text) == text, f"{path}: run `python -m bench readme`"
        marks |= set(re.findall(r"<!-- bench: (\w+) -->", text))
    assert marks == set(bench["readme"].SECTIONS)


def test_another_record_makes_another_text(bench):
    readme = bench["readme"]
    record = load(readme.RESULTS / "cpu.json")
    doubled = replace(record, rows=tuple(_slower(row) for row in record.rows))
    assert readme.table(doubled) != readme.table(record)
    assert readme.fresh(doubled) != readme.fresh(record)
    text = "a\n<!-- bench: table -->\nold\n<!-- end -->\nb"
    table = readme.table(record)
    assert readme.written(text) == f"a\n<!-- bench: table -->\n{table}\n<!-- end -->\nb"
    assert readme.written(text.replace("old\n", "")) == readme.written(text)
    with pytest.raises(KeyError, match="nothing"):
        readme.written(text.replace("table", "nothing"))


@pytest.mark.parametrize(
    ("backend", "cpu"),
    [
        ("native (CPU, x86-64-v4, OpenMP; no CUDA: built without CUDA)", "a chip (x86-64-v4)"),
        ("torch (anything)", "a chip"),
    ],
)
def test_the_sentence_on_optimizers_names_the_machine(bench, backend, cpu):
    where = {"cpu": "a chip", "threads": "3", "backend": backend}
    lines = [line | where for line in bench["readme"].csv_rows("optim")]
    assert bench["readme"].optimizers(lines).endswith(f" on 2,000 x 1,000: 3 threads of an {cpu}.")


def _slower(row: Row) -> Row:
    return replace(row, seconds=row.seconds and 2 * row.seconds, p10=row.p10 and 2 * row.p10)


def row(way: str, seconds: float, **more: object) -> Row:
    spread = {"p10": 0.9 * seconds, "p90": 1.1 * seconds, "samples": 5}
    of = {"dtype": "float32", "tensors": 1, "elements": 1000, "penalty": "elastic_net"}
    return Row("gpt2", way=way, job="gradient", traffic=3, seconds=seconds, **of, **spread, **more)


def test_records_are_read_back(tmp_path):
    record = Record(environment(), (row("loop", 1.0), row("compile", 2.0, note="x")))
    record.to_json(tmp_path / "a.json")
    assert load(tmp_path / "a.json") == record
    for text in ("{}", "[1]", "nonsense", '{"rows": [{}], "environment": {}}'):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=r"b\.json: no record"):
            load(tmp_path / "b.json")


def test_two_records_are_compared(bench, tmp_path, capsys):
    compare, where = bench["compare"], environment()
    before = Record(where, (row("loop", 1.0), row("foreach", 1.0), row("compile", 1.0)))
    after = Record(
        where, (row("compile", 0.5), row("loop", 2.0), row("foreach", 1.05), row("b", 1.0))
    )
    before.to_json(tmp_path / "a.json")
    after.to_csv(tmp_path / "b.csv")
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[-2:] for line in lines] == [
        ["2.00", "slower"],
        ["1.05", "same"],
        ["0.50", "faster"],
    ]


def test_a_profile_is_set_beside_the_benchmark(bench, tmp_path, capsys):
    """Way by way: what differs by more than the spread of both is said to differ."""
    ways, few = ["loop", "pyreg accumulate_", "pyreg prox_"], {"seconds": 0.0, "rounds": 1}
    penalty = pyreg.ElasticNet(1e-5, 1e-4)
    rows = measure(allocate(WORKLOADS["tiny"]), penalty, ways, **few)
    Record(environment(), tuple(rows)).to_json(tmp_path / "bench.json")
    pyreg.profile(WORKLOADS["tiny"], penalty, ways=ways, **few).to_json(tmp_path / "profile.json")
    paths = [str(tmp_path / name) for name in ("bench.json", "profile.json")]
    assert bench["compare"].main(paths) == 0
    out = capsys.readouterr().out
    names = "tiny, float32, 6 tensors, 4200 elements, elastic_net"
    assert all(f"{names}, {row.way} " in out for row in rows), out


def test_rows_of_other_sizes_are_not_compared(bench, tmp_path):
    """As those of `bench scaling`, which have one name."""
    small = row("loop", 1.0)
    large = replace(small, elements=2000, seconds=2.0)
    Record(environment(), (large, small)).to_json(tmp_path / "a.json")
    Record(environment(), (large,)).to_csv(tmp_path / "b.csv")
    compare = bench["compare"]
    found = compare.pairs(*(compare.read(tmp_path / name) for name in ("a.json", "b.csv")))
    assert [pair.ratio for pair in found] == [1.0]


def test_the_record_of_overhead_is_below_its_bound(bench):
    for line in bench["readme"].csv_rows("overhead"):
        assert max(float(line["in_a_sample"]), float(line["between_samples"])) < 0.02


def test_a_verdict_needs_spreads_apart(bench):
    pair = bench["compare"].Pair
    one = Timing(1.0, 0.9, 1.2, 5)
    assert pair((), one, Timing(1.3, 1.1, 1.4, 5)).verdict == "same"
    assert pair((), one, Timing(1.3, 1.21, 1.4, 5)).verdict == "slower"
    assert pair((), one, Timing(0.8, 0.7, 0.89, 5)).verdict == "faster"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none.json", "HEAD"], "compare two commits or two files|not a valid object name"),
        (["{}/bad.json", "{}/bad.json"], "bad.json: no record of this benchmark"),
        (["{}/a.json", "HEAD"], "compare two commits or two files, not one of each"),
        (["{}/a.json", "{}/other.json"], "have no row in common"),
    ],
)
def test_what_cannot_be_compared(bench, tmp_path, capsys, arguments, message):
    (tmp_path / "bad.json").write_text("{}")
    Record(environment(), (row("loop", 1.0),)).to_json(tmp_path / "a.json")
    Record(environment(), (row("foreach", 1.0),)).to_json(tmp_path / "other.json")
    with pytest.raises(SystemExit):
        bench["compare"].main([text.replace("{}", str(tmp_path)) for text in arguments])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout: there are no commits")
def test_two_commits_are_built_and_compared(bench, monkeypatch, capsys):
    """The same one twice, without its native library: as many rows as ways."""
    monkeypatch.setenv("PYREG_BUILD", "none")
    status = bench["compare"].main(["HEAD", "HEAD", "--workloads", "tiny", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert status == 0
    names = ["tiny, pyreg in the loss", "tiny, accumulate_", "tiny, prox_"]
    assert [line.split("  ")[0] for line in lines] == names


def test_what_runs_beside_each_commit(monkeypatch):
    """Its own process, given a tiny workload; a wrong sweep ends it."""
    import subprocess
    import sys

    job = json.dumps([{"name": "tiny", "dtype": "bfloat16", "shapes": [[3, 5], [7]]}])
    command = [sys.executable, "-P", str(ROOT / "bench" / "compared.py")]
    done = subprocess.run(command, input=job, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = {way: seconds for _, way, seconds in json.loads(done.stdout)}
    assert set(found) == {"pyreg in the loss", "accumulate_", "prox_"}
    assert all(len(seconds) == 9 and min(seconds) > 0 for seconds in found.values())
    wrong = (
        "import sys, runpy, pyreg; prox = pyreg.Regularizer.prox_;"
        "pyreg.Regularizer.prox_ = lambda self, step: prox(self, 1e6 * step);"
        f"runpy.run_path({command[-1]!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [*command[:2], "-c", wrong], input=job, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "prox_: its result is wrong" in done.stderr


def test_the_scaling_study(bench, tmp_path, monkeypatch):
    scaling = bench["scaling"]
    assert scaling.steps(10, 1e3) == [10, 30, 100, 300, 1000]
    assert scaling.steps(1, 50) == [1, 3, 10, 30, 50]
    sizes = ["--elements", "3e4", "--tensors", "3"]
    assert scaling.main([*sizes, "--rounds", "1", "--seconds", "0", "--out", str(tmp_path)]) == 0
    record = load(tmp_path / "scaling.json")
    places = {(r.workload, r.elements, r.tensors) for r in record.rows}
    first = {("elements", 10_000, 1), ("elements", 30_000, 1)}
    assert places == first | {("tensors", 1000, 1), ("tensors", 3000, 3)}
    assert {r.way for r in record.rows} == {*scaling.WAYS, scaling.LIMIT}
    pytest.importorskip("matplotlib")
    assert (tmp_path / "scaling.png").exists()


def test_the_scaling_study_leaves_out_what_does_not_fit(bench, tmp_path, monkeypatch, capsys):
    """A way that needs more memory than is free is named, and the others measured."""
    scaling = bench["scaling"]
    monkeypatch.setattr(scaling, "free_bytes", lambda: 5 * 4 * 20_000)  # pyreg's ways: 5 N
    sizes = ["--elements", "2e4", "--tensors", "1"]
    assert scaling.main([*sizes, "--rounds", "1", "--seconds", "0", "--out", str(tmp_path)]) == 0
    rows = load(tmp_path / "scaling.json").rows
    ways = {r.way for r in rows if r.workload == "elements" and r.elements == 20_000}
    assert ways == {"pyreg in the loss", "pyreg accumulate_", scaling.LIMIT}
    assert {r.way for r in rows if r.elements == 10_000} == {*scaling.WAYS, scaling.LIMIT}
    said = capsys.readouterr().err.split("elements: 20,000")[1].split("tensors:")[0]
    assert said.splitlines()[1:] == [
        f"{w} is not measured: 0 GB are needed" for w in scaling.WAYS[:2]
    ]


def test_all_is_every_part(bench, monkeypatch):
    """In an order in which the documents come last; a missed target ends nothing, but is told."""
    entry, ran = importlib.import_module("bench.__main__"), []

    def part(name: str, status: int | None) -> SimpleNamespace:
        return SimpleNamespace(main=lambda: ran.append(name) or status)

    modules = {f"bench.{name}": part(name, None) for name in entry.PARTS}
    monkeypatch.setattr(entry.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(entry, "figures", part("figures", 1).main)
    monkeypatch.setattr("sys.argv", ["bench", "all"])
    assert entry.main() == 1
    assert set(ran) == {"figures", *entry.PARTS} - {"compare"}
    assert (ran[0], ran[-2:], len(ran)) == ("figures", ["roofline", "readme"], len(set(ran)))
    assert re.search(r"^bench:.*\n.* -m bench all$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_what_is_no_part_is_not_the_name_of_a_record(bench, monkeypatch, capsys):
    entry = importlib.import_module("bench.__main__")
    for words in (["nonsense"], ["all", "--rounds", "3"], ["--rounds", "3", "scaling"]):
        monkeypatch.setattr("sys.argv", ["bench", *words])
        with pytest.raises(SystemExit) as stopped:
            entry.arguments()
        assert stopped.value.code == 2
        assert ": a part comes first, alone, and is one of compare, " in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["bench", "--name", "laptop"])
    assert entry.arguments().name == "laptop"


def test_the_roofline_has_a_point_for_each_way(bench, tmp_path):
    pytest.importorskip("matplotlib")
    roofline = bench["roofline"]
    record = load(bench["readme"].RESULTS / "cpu.json")
    found = roofline.points(record.rows, "gpt2")
    x, y = found["pyreg accumulate_"]
    assert x == 1 / (3 * 4)
    (r,) = [
        r
        for r in record.rows
        if (r.workload, r.penalty, r.way) == ("gpt2", "elastic_net", "pyreg accumulate_")
    ]
    assert y == pytest.approx(r.gb_per_s * 1e9 / (3 * 4), rel=1e-9)
    out = tmp_path / "roof.png"
    assert roofline.main([str(bench["readme"].RESULTS / "cpu.json"), str(out)]) == 0
    assert out.exists()
