"""`pyreg profile`: what it takes, what it writes, and one sentence for every mistake of a user."""

from __future__ import annotations

import json
import pickle
import re
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pyreg import cli, doctor
from pyreg.profiling import WAYS, WORKLOADS, Interrupted, files, memory, model
from pyreg.profiling.target import NAMES, penalty_of, target_of

QUICK = ["--seconds", "0", "--ways", "loop", "pyreg accumulate_"]
FACTORIES = """
import torch
from torch import nn

def good():
    net = nn.Linear(4, 3)
    def step():
        net.zero_grad()
        net(torch.ones(2, 4)).sum().backward()
    return net, step

def alone(): return nn.Linear(4, 3)

def lazy():
    from beside import net
    def step():
        import beside_the_step
    return net, step

def elsewhere():
    import os
    os.chdir("/")
    return lazy()

def fails(): raise OSError("no data here")
def exits(): raise SystemExit
def empty(): return nn.ReLU()
def number(): return 3

def bad_step():
    net = nn.Linear(4, 3)
    def step(): net(torch.ones(2, 5))
    return net, step

def exiting_step():
    net = nn.Linear(4, 3)
    def step(): raise SystemExit(0)
    return net, step

class Inner:
    alone = staticmethod(alone)
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module of factories in the current folder, which is on no path."""
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    (tmp_path / "raises_on_import.py").write_text("1 / 0")
    (tmp_path / "exits_on_import.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "beside.py").write_text("from torch import nn; net = nn.Linear(4, 3)")
    (tmp_path / "beside_the_step.py").write_text("")
    monkeypatch.chdir(tmp_path)
    yield name
    for imported in (name, "beside", "beside_the_step"):
        sys.modules.pop(imported, None)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["profile", *arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_a_workload_and_all_outputs(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    kinds = ("json", "html", "trace")
    paths = {kind: tmp_path / f"out.{kind}" for kind in kinds}
    options = [text for kind in kinds for text in (f"--{kind}", str(paths[kind]))]
    penalty = ["--penalty", "elastic_net:1e-5,1e-4"]
    status, out, _ = run(capsys, "tiny", *QUICK, *penalty, "--threads", "1", *options)
    assert status == 0
    assert "tiny, ElasticNet(l1=1e-05, l2=0.0001)" in out
    read = json.loads(paths["json"].read_text())
    assert read["advice"] in out
    assert read["environment"]["threads"] == 1
    page = paths["html"].read_text()
    for row in read["rows"]:
        assert f"<td>{row['way']}</td>" in page
    assert "<svg" in page
    assert not re.search(r'(src|href)="?(?!#)', page.replace("xlink:href", "")), "self-contained"
    assert json.loads(paths["trace"].read_text())["traceEvents"]


def test_threads_are_put_back(capsys):
    before = torch.get_num_threads()
    assert run(capsys, "tiny", *QUICK, "--threads", str(before + 1))[0] == 0
    assert torch.get_num_threads() == before


def test_scale_and_dtype(capsys, tmp_path):
    path = tmp_path / "scaled.json"
    options = ["--scale", "1e-4", "--dtype", "bfloat16", "--json", str(path)]
    status, out, _ = run(capsys, "resnet50", *QUICK, *options)
    assert status == 0
    names = {row["workload"] for row in json.loads(path.read_text())["rows"]}
    assert names == {"resnet50, scale 0.0001"}
    assert "For resnet50, scale 0.0001 (161 tensors, " in out
    assert "flat.sum() as float32" in out, "16-bit elements"


@pytest.mark.parametrize("name", ["gpt2", "resnet50", "llama3-8b", "moe"])
def test_the_names_that_people_know(name):
    assert target_of(name).model.shapes == WORKLOADS[NAMES.get(name, name)].shapes


def test_a_factory(capsys, factories):
    status, out, _ = run(capsys, f"{factories}:good", *QUICK)
    assert status == 0
    assert "no penalty" in out
    assert "of a step" in out
    status, out, _ = run(capsys, f"{factories}:Inner.alone", *QUICK)
    assert status == 0
    assert "For Linear (2 tensors, 60 bytes) " in out


@pytest.mark.parametrize("name", ["lazy", "elsewhere"])
def test_a_factory_that_imports_late_or_goes_elsewhere(name, capsys, factories, tmp_path):
    """A factory and its step import from the current folder; outputs stay where they were asked."""
    path = sys.path.copy()
    status, _, err = run(capsys, f"{factories}:{name}", *QUICK, "--json", "a.json", "--trace", "b")
    assert (status, err) == (0, "")
    assert json.loads((tmp_path / "a.json").read_text())["rows"]
    assert json.loads((tmp_path / "b").read_text())["traceEvents"]
    assert sys.path == path


def write_safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_safetensors_file(capsys, tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [0, 24]},
        "a.bias": {"dtype": "F32", "shape": [3], "data_offsets": [24, 36]},
        "b.weight": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "ids": {"dtype": "I64", "shape": [2], "data_offsets": [36, 52]},
        "bn.running_mean": {"dtype": "F32", "shape": [2], "data_offsets": [52, 60]},
    }
    path = write_safetensors(tmp_path / "net.safetensors", header, bytes(60))
    found = files.read(path)
    assert dict(found.shapes) == {"a.weight": (4, 3), "a.bias": (3,), "b.weight": (3,)}
    assert found.dtype == torch.bfloat16
    assert found.others == {"a.bias": torch.float32}
    assert run(capsys, str(path), *QUICK)[0] == 0


def test_it_reads_what_safetensors_writes(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    net = nn.Linear(5, 2)
    library.save_file(net.state_dict(), tmp_path / "net.safetensors")
    found = files.read(tmp_path / "net.safetensors")
    assert dict(found.shapes) == {"weight": (2, 5), "bias": (2,)}


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3, "optimizer": {}}])
def test_a_state_dict(tmp_path, wrap):
    net = nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    state = net.state_dict()
    state["tied"] = state["0.weight"]
    torch.save(wrap(state), tmp_path / "net.pt")
    found = files.read(tmp_path / "net.pt")
    assert dict(found.shapes) == {name: tuple(p.shape) for name, p in net.named_parameters()}


@pytest.mark.parametrize("key", ["net", "params", "ema", "generator"])
def test_a_state_dict_under_another_key(key, tmp_path):
    """Beside an optimizer's, random numbers and a figure."""
    net = nn.Linear(5, 2)
    beside = {"optimizer": torch.optim.AdamW(net.parameters()).state_dict(), "epoch": 3}
    beside |= {"random": {"torch": torch.get_rng_state()}, "best": torch.tensor(0.9)}
    torch.save(beside | {key: net.state_dict()}, tmp_path / "net.pt")
    assert dict(files.read(tmp_path / "net.pt").shapes) == {"weight": (2, 5), "bias": (2,)}
    torch.save({"scale": torch.tensor(1.0)}, tmp_path / "one.pt")
    assert dict(files.read(tmp_path / "one.pt").shapes) == {"scale": ()}


def test_weights_among_which_to_choose(tmp_path):
    state = nn.Linear(5, 2).state_dict()
    torch.save({"generator": state, "discriminator": state, "epoch": 3}, tmp_path / "gan.pt")
    said = "gan.pt: weights under 'generator', 'discriminator'; save the ones to profile alone"
    with pytest.raises(ValueError, match=said):
        files.read(tmp_path / "gan.pt")
    torch.save({"epoch": 3, "args": {"lr": 0.1}}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"it holds no weights of .*; its keys: 'epoch', 'args'$"):
        files.read(tmp_path / "none.pt")


def test_the_numbers_in_a_file_are_not_loaded(tmp_path, monkeypatch):
    found, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: found.append(load(*a, **k)) or found[-1])
    torch.save(nn.Linear(5, 2).state_dict(), tmp_path / "net.pt")
    files.read(tmp_path / "net.pt")
    assert [t.device.type for t in found[0].values()] == ["meta", "meta"]


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_no_pickle_is_executed(capsys, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "bomb": Bomb()}, "net.pt")
    for protocol in (2, 4):
        Path(f"{protocol}.pt").write_bytes(pickle.dumps({"bomb": Bomb()}, protocol=protocol))
    for name in ("net.pt", "2.pt", "4.pt"):
        status, _, err = run(capsys, name, *QUICK)
        assert status == 1
        assert f"{name}: " in err
        assert not Path("exploded").exists()
    assert not recwarn.list, "the sentence is enough"


BAD_FILES = {
    "empty.safetensors": b"",
    "short.safetensors": b"\x01\x02",
    "long.safetensors": struct.pack("<Q", 1 << 60) + b"{}",
    "text.safetensors": struct.pack("<Q", 4) + b"abcd",
    "list.safetensors": struct.pack("<Q", 2) + b"[]",
    "none.safetensors": struct.pack("<Q", 2) + b"{}",
    "empty.pt": b"",
    "text.pt": b"not an archive",
    "zip.pt": b"PK\x03\x04 nor this",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_not_what_its_name_says(name, capsys, tmp_path):
    (tmp_path / name).write_bytes(BAD_FILES[name])
    status, out, err = run(capsys, str(tmp_path / name), *QUICK)
    assert (status, out) == (1, "")
    assert re.match(rf"pyreg profile: .*{name}: .*\n$", err), err


@pytest.mark.parametrize(
    ("shape", "offsets", "message"),
    [
        ([-1, -2], [0, 8], "its header is not one"),
        ([2.0], [0, 8], "its header is not one"),
        ([True, 2], [0, 8], "its header is not one"),
        ([3], [0, 8], "its header is not one"),
        ([1 << 40, 1 << 40], [0, 8], "its header is not one"),
        ([1 << 62] * 64, [0, 8], "its header is not one"),
        ([1] * 1000, [0, 4], "its header is not one"),
        ([2], [8, 0], "its header is not one"),
        ([2], [-8, 0], "its header is not one"),
        ([2], [0.0, 8.0], "its header is not one"),
        ([2], [0, 8, 16], "its header is not one"),
        ([2], None, "its header is not one"),
        ([3], [0, 12], "it is cut short, or its header is wrong: 'a' ends at byte 12 of 8"),
        ([1 << 58], [0, 1 << 60], "'a' ends at byte 1,152,921,504,606,846,976 of 8"),
        ([1 << 80], [0, 1 << 82], "it is cut short, or its header is wrong: 'a' ends at byte"),
    ],
)
def test_a_header_that_tells_of_what_is_not_there(shape, offsets, message, capsys, tmp_path):
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
    path = write_safetensors(tmp_path / "net.safetensors", header, bytes(8))
    status, out, err = run(capsys, str(path), *QUICK)
    assert (status, out) == (1, "")
    assert re.match(r"pyreg profile: .*net\.safetensors: .*\n$", err), err
    assert message in err


def test_a_file_that_is_cut_short(capsys, tmp_path):
    """Wherever that is, also for a tensor that is none of the weights."""
    header = {"ids": {"dtype": "I64", "shape": [2], "data_offsets": [8, 24]}}
    header["a"] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = write_safetensors(tmp_path / "net.safetensors", header, bytes(24))
    whole = path.read_bytes()
    assert dict(files.read(path).shapes) == {"a": (2,)}
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"not a safetensors file|it is cut short"):
            files.read(path)


MISTAKES = {
    "a typing error": (["gpt"], "'gpt' is no workload, .*; did you mean gpt2?"),
    "no file": (["net.safetensors"], "net.safetensors: there is no such file"),
    "no module": (["nowhere.at_all:make"], "No module named 'nowhere'"),
    "a module that fails": (["raises_on_import:make"], "importing .* raised ZeroDivisionError"),
    "a script": (["exits_on_import:make"], "importing .* raised SystemExit: 0"),
    "no factory": (["{}:lacks"], "has no attribute 'lacks'"),
    "a factory that fails": (["{}:fails"], "{}:fails: it raised OSError: no data here"),
    "a factory that exits": (["{}:exits"], "{}:exits: it raised SystemExit"),
    "no module made": (["{}:number"], r"expected a module, or \(.*\), got int"),
    "no parameters": (["{}:empty"], "model: it has no parameters"),
    "a step that raises": (["{}:bad_step"], "step: it raised RuntimeError: "),
    "a step that exits": (["{}:exiting_step"], "step: it raised SystemExit: 0"),
    "a scaled model": (["{}:alone", "--scale", "0.5"], "--scale: for a workload or a file"),
    "a model's dtype": (["{}:alone", "--dtype", "float16"], "--dtype: for a workload or a file"),
    "a scale": (["tiny", "--scale", "2"], "scale: expected a number above 0 and at most 1, got 2"),
    "too large": (["moe", "--dtype", "float64", "--scale", "1"], r"; try --scale 0\.0*[1-9]$"),
    "a penalty": (["tiny", "--penalty", "l3:1"], "--penalty: 'l3' is none of l1, l2"),
    "a number short": (["tiny", "--penalty", "mcp:1"], "expected mcp:lam,gamma in numbers"),
    "a strength": (["tiny", "--penalty", "l1:-1"], "--penalty: L1.lam: expected a finite number"),
    "threads": (["tiny", "--threads", "0"], "--threads: expected a number above 0 .*, got 0"),
    "many threads": (
        ["tiny", "--threads", "99999999"],
        r"--threads: .* up to \d+ .*, got 99999999",
    ),
    "seconds": (["tiny", "--seconds", "inf"], "seconds: expected a finite number, 0 or above"),
    "a device": (["tiny", "--device", "mps"], "device: expected cpu or cuda, got mps$"),
    "no device": (["tiny", "--device", "gpu"], "device: expected cpu or cuda, got gpu$"),
    "a model's device": (["{}:alone", "--device", "gpu"], "device: expected cpu or cuda, got gpu$"),
    "no module's name": ([":f"], "':f' lacks a name: expected package.module:factory"),
    "no factory's name": (["bad:"], "'bad:' lacks a name: expected package.module:factory"),
    "a strength too small": (
        ["tiny", "--penalty", "l1:1e-60"],
        "penalty: lam: expected 0 or a number from 1e-12 to 1e\\+12, .*, got 1e-60",
    ),
    "a strength too large": (["tiny", "--penalty", "l2:1e30"], "penalty: lam: .*, got 1e\\+30"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, capsys, factories, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4e9)
    arguments, message = MISTAKES[name]
    arguments = [text.replace("{}", factories) for text in arguments]
    status, out, err = run(capsys, arguments[0], *QUICK, *arguments[1:])
    assert (status, out) == (1, "")
    assert err.startswith("pyreg profile: ")
    assert re.search(message.replace("{}", factories), err.splitlines()[0]), err
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", ["json", "html", "trace"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/a", "there is no folder .*/nowhere"),
        (".", ".* cannot be written: Is a directory"),
        ("a" * 300, ".* cannot be written: File name too long"),
        ("/proc/a", "(/proc/a cannot be written: .*|there is no folder .*)"),
    ],
)
def test_what_cannot_be_written_is_said_first(kind, path, message, capsys, factories):
    """Before the factory runs, which would fail."""
    status, out, err = run(capsys, f"{factories}:fails", *QUICK, f"--{kind}", path)
    assert (status, out) == (1, "")
    assert re.fullmatch(f"pyreg profile: --{kind}: {message}\n", err), err


def test_to_ask_whether_it_can_be_written_leaves_no_trace(capsys, tmp_path):
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "new.json")
    for name in ("old.json", "link.json", "other.json"):
        path = str(tmp_path / name)
        assert run(capsys, "tiny", "--json", path, "--penalty", "l1:nothing")[0] == 1
    assert (tmp_path / "old.json").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"old.json", "link.json"}


@pytest.mark.parametrize("name", ["gpt2", "many"])
def test_the_scale_that_it_offers_fits(name, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 30e6)
    _, _, err = run(capsys, name, *QUICK)
    (scale,) = re.findall(r"try --scale (\S+)$", err)
    assert run(capsys, name, *QUICK, "--scale", scale)[0] == 0


def test_without_matplotlib_html_is_refused_first(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run(capsys, "tiny", *QUICK, "--html", "a.html")
    assert (status, out) == (1, "")
    assert '--html needs matplotlib: pip install "pyreg[profile]"' in err


@pytest.mark.parametrize(("way", "status"), [("pyreg accumulate_", 1), ("loop", 0)])
def test_a_wrong_way_of_pyregs_fails_the_command(way, status, capsys, tmp_path, monkeypatch):
    """Behind the table and the files; another's is just said."""
    right = WAYS[way]

    def wrong(parameters, penalty):
        return right.prepare(parameters, replace(penalty, lam=2 * penalty.lam))

    monkeypatch.setitem(WAYS, way, replace(right, prepare=wrong))
    path = tmp_path / "wrong.json"
    found, out, err = run(capsys, "tiny", *QUICK, "--json", str(path))
    assert found == status
    assert f"{way}: not timed: its value is off by " in out
    assert [row["way"] for row in json.loads(path.read_text())["rows"] if row["wrong"]] == [way]
    said = f"pyreg profile: wrong by pyreg's own check: {way}; that is a mistake of pyreg's"
    assert err.startswith(said) if status else not err


def test_ctrl_c_prints_and_writes_what_was_measured(capsys, tmp_path, monkeypatch):
    def stopped(*args, **options):
        raise Interrupted([row for row in measured(*args, **options) if row.way != "loop"])

    measured = model.measure
    monkeypatch.setattr(model, "measure", stopped)
    path = tmp_path / "part.json"
    status, out, _ = run(capsys, "tiny", *QUICK, "--json", str(path))
    assert status == 130
    assert "pyreg accumulate_" in out
    assert "(stopped before all was measured)" in out
    assert json.loads(path.read_text())["complete"] is False


def test_ctrl_c_while_files_are_written(capsys, tmp_path, monkeypatch):
    """Nothing is lost, and afterwards it works as before."""
    report = pytest.importorskip("pyreg.profiling.report")

    def disturbed(result):
        signal.raise_signal(signal.SIGINT)
        return "the report"

    monkeypatch.setattr(report, "html", disturbed)
    before = signal.getsignal(signal.SIGINT)
    path = tmp_path / "out.html"
    assert run(capsys, "tiny", *QUICK, "--html", str(path))[0] == 0
    assert path.read_text() == "the report"
    assert signal.getsignal(signal.SIGINT) is before


def test_the_help_quotes_the_names_of_ways(capsys):
    with pytest.raises(SystemExit):
        cli.main(["profile", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "each in quotes, after the target; of: 'loop', 'loop, no .grad', 'foreach'," in out


def test_ctrl_c_before_anything(capsys, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "copy_of", stopped)
    monkeypatch.setattr(model, "allocate", stopped)
    status, out, err = run(capsys, "tiny", *QUICK)
    assert (status, out) == (130, "")
    assert err == "pyreg profile: stopped before anything was measured\n"


def test_the_progress_bar(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    status, _, err = run(capsys, "tiny", *QUICK)
    assert status == 0
    assert "tiny" in err


def test_penalties_by_name_and_numbers():
    assert repr(penalty_of("mcp:0.1,3")) == "MCP(lam=0.1, gamma=3.0)"


def test_the_self_test_passes_here_and_fails_for_a_wrong_sweep(capsys, monkeypatch):
    checks = doctor.examine()
    assert "torch" in {check.backend for check in checks}
    assert all(check.passed for check in checks), checks
    right = doctor.Regularizer.prox_
    monkeypatch.setattr(doctor.Regularizer, "prox_", lambda self, step: right(self, 2 * step))
    assert not any(check.passed for check in doctor.examine())
    assert cli.main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_test_fails_for_nan(dtype, monkeypatch):
    right = doctor.Regularizer.prox_

    def wrong(self, step):
        right(self, step)
        for _, t in self.trainable():
            if t.dtype == dtype:
                t.data[:1] = float("nan")

    monkeypatch.setattr(doctor.Regularizer, "prox_", wrong)
    assert all(not c.passed and c.detail == "nan x its bound off" for c in doctor.examine())


def test_as_a_program(tmp_path):
    command = [sys.executable, "-P", "-m", "pyreg", "profile", "tiny", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "For tiny (6 tensors, " in done.stdout
