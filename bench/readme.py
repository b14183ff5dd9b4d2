"""The figures in README.md, docs/ and bench/README.md, from the records: `python -m bench readme`.

A figure stands between two comments, `<!-- bench: NAME -->` and `<!-- end -->`; NAME is one of
SECTIONS. tests/test_readme.py fails where the text between them is not what the records say.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyreg.profiling import Record, Row, load
from pyreg.profiling.record import find

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
PENALTY = "elastic_net"
Line = dict[str, str]  # of a CSV
LIMIT = "dst.add_(src)"
MARKED = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
WAYS = {
    "loop": "the loop",
    "foreach": "`torch._foreach_norm` and autograd",
    "compile": "`torch.compile` of the loop",
    "pyreg in the loss": "`loss + pyreg.elastic_net(...)`",
    "pyreg accumulate_": "**`reg.accumulate_()`**",
}


def _ms(row: Row | None) -> str:
    """Three digits; two below 1."""
    if row is None:
        return "-"
    ms = 1e3 * row.seconds
    return f"{ms:.0f}" if ms >= 99.5 else f"{ms:.1f}" if ms >= 9.95 else f"{ms:.2f}"


def table(record: Record) -> str:
    """The ways on GPT-2, and on many small tensors."""
    head = (
        "| L1 + L2, value and gradient into `.grad` | GPT-2 small, ms | of the machine's limit "
        "| extra memory, MB | 2,000 tensors x 1,000, ms |\n| --- | --- | --- | --- | --- |"
    )
    lines = [head]
    for way, title in WAYS.items():
        row = find(record.rows, "gpt2", PENALTY, way)
        of_limit = f"{100 * min(1.0, row.of_limit):.0f} %"
        many = _ms(find(record.rows, "many", PENALTY, way))
        lines.append(
            f"| {title} | {_ms(row)} | {of_limit} | {row.extra_bytes / 1e6:,.0f} | {many} |"
        )
    return "\n".join(lines)


def fresh(record: Record) -> str:
    """The way in the loss where there is no gradient yet; and where all this was measured."""
    way = "pyreg in the loss, no .grad"
    gpt2, many = (find(record.rows, name, PENALTY, way) for name in ("gpt2", "many"))
    loop = find(record.rows, "gpt2", PENALTY, "loop")
    where = record.environment
    return (
        f"(`.grad` exists; where it is None, the last but one takes {_ms(gpt2)} and {_ms(many)} ms "
        f"and leaves one flat gradient of {gpt2.extra_bytes / 1e6:,.0f} MB.) Medians of repeated "
        f"runs on {where.threads} threads of an {where.cpu}, torch {where.torch}; the limit is "
        "`dst.add_(src)` on the same memory (2 N read, N written). The first three take fresh "
        f"memory from the system, at a pace that varies: the loop's runs took "
        f"{1e3 * loop.p10:,.0f} to {1e3 * loop.p90:,.0f} ms (10 to 90 %)."
    )


def optimizers(rows: Sequence[Line]) -> str:
    """AdamW with the penalty inside, over torch's fused one without."""

    def times(workload: str, way: str) -> str:
        (row,) = [r for r in rows if (r["workload"], r["way"]) == (workload, way)]
        return f"{float(row['over_limit']):.2f} x"

    workloads = {
        "gpt2": "on GPT-2 small in float32",
        "gpt2-bf16": "in bfloat16",
        "many": "on 2,000 x 1,000",
    }
    both = [
        f"{times(w, 'pyreg, grad')} (gradient) and {times(w, 'pyreg, prox')} (prox) {title}"
        for w, title in workloads.items()
    ]
    where = rows[0]
    found = re.search(r"\(CPU, ([^,;)]+)", where["backend"])
    cpu = f"{where['cpu']} ({found[1]})" if found else where["cpu"]
    return (
        "Against torch's fused AdamW *without* a penalty, a step with an elastic net takes "
        f"{', '.join(both)}: {where['threads']} threads of an {cpu}."
    )


def gpu_optimizers(rows: Sequence[Line]) -> str:
    """The same on a GPU, beside what is attached."""
    known = {(r["workload"], r["way"]): float(r["over_limit"]) for r in rows}
    titles = {"gpt2-xl": "GPT-2 XL in float32", "gpt2-bf16": "GPT-2 small in bfloat16"}
    titles["many"] = "2,000 x 1,000"
    both = [
        f"{known[w, 'pyreg, grad, native']:.2f} x inside and "
        f"{known[w, 'torch fused + attach, grad']:.2f} x attached on {title}"
        for w, title in titles.items()
    ]
    return (
        f"On an {rows[0]['gpu'].partition(',')[0]} the penalty's gradient takes {', '.join(both)}: "
        "there small models wait for the host, and `attach` is the better way."
    )


def targets(data: Mapping[str, Any]) -> str:
    """Every target of the benchmark, with its verdict, and what it holds for."""
    said = {True: "yes", False: "**no**", None: "-"}
    where = data["environment"]
    lines = [[t["what"], t["target"], t["figure"], said[t["passed"]]] for t in data["targets"]]
    memory = f"{where['memory_bytes'] / 1e9:.0f} GB"
    machine = where["gpu"] or f"{where['threads']} threads of an {where['cpu']}, {memory}"
    return "\n\n".join(
        (
            _lines(["", "target", "figure", "met"], lines),
            f"{machine}, torch {where['torch']}; "
            f"commit {where['commit'][:7]}, {where['time'][:10]}.",
        )
    )


def gpu_summary(record: Record) -> str:
    """The largest workload on a GPU, in a sentence."""

    def of(way: str) -> str:
        return _ms(find(record.rows, "llama", PENALTY, way))

    where = record.environment
    copy = find(record.rows, "llama", PENALTY, "dst.copy_(src)")
    own = find(record.rows, "llama", PENALTY, "pyreg accumulate_, native")
    share = 100 * own.gb_per_s / copy.gb_per_s
    return (
        f"On an {where.gpu.partition(',')[0]} (torch {where.torch}), L1 + L2 of Llama-3-8B in "
        f"bfloat16, 291 tensors of 16 GB: the loop takes {of('loop')} ms, `torch._foreach_norm` "
        f"and autograd {of('foreach')}, `accumulate_()` {of('pyreg accumulate_, native')} "
        f"({of('pyreg accumulate_, triton')} with Triton), one launch at {share:.0f} % of a copy's "
        f"bandwidth, the value alone {of('pyreg value, native')}, "
        f"`prox_()` {of('pyreg prox_, native')}."
    )


def on_gpu(record: Record) -> str:
    """Time, bandwidth, host time and launches of every way on each workload."""
    copies = {r.workload: r.gb_per_s for r in record.rows if r.way == "dst.copy_(src)"}
    lines = [
        [
            row.workload,
            row.way,
            _ms(row),
            f"{row.gb_per_s:,.0f}",
            f"{100 * row.gb_per_s / copies[row.workload]:.0f} %",
            "-" if row.host_seconds is None else f"{1e6 * row.host_seconds:,.0f}",
            "-" if row.kernels is None else f"{row.kernels:,}",
        ]
        for row in record.rows
        if row.seconds is not None and not row.way.endswith(" as float32")
    ]
    return _lines(["workload", "way", "ms", "GB/s", "of the copy's", "host us", "launches"], lines)


def multiples(rows: Sequence[Line], line: str, column: str) -> str:
    """A line and a column for each value of these two; in the cells times over the limit's."""
    known = {(r[line], r[column]): float(r["over_limit"]) for r in rows}
    columns = list(dict.fromkeys(r[column] for r in rows))
    lines = [
        [name, *(f"{known[name, c]:.2f} x" if (name, c) in known else "-" for c in columns)]
        for name in dict.fromkeys(r[line] for r in rows)
    ]
    return _lines([line, *columns], lines)


def peers(rows: Sequence[Line]) -> str:
    """Other packages' times over pyreg's, with what the check said of them."""
    times = {(r["workload"], r["way"]): r["over_pyreg"] for r in rows}
    lines = [
        [r["way"], r["version"], f"{r['sweep']}, {r['penalty']}"]
        + [f"{float(t):.3g} x" if (t := times[w, r["way"]]) else "-" for w in ("gpt2", "many")]
        + [r["note"]]
        for r in rows
        if r["workload"] == "gpt2" and not r["way"].startswith("pyreg ")
    ]
    return _lines(["", "version", "at", "GPT-2", "2,000 x 1,000", "the check said"], lines)


def host(rows: Sequence[Line]) -> str:
    """A call's time on the host of a GPU, without one, in us."""
    lines = []
    for tensors, call in dict.fromkeys((r["tensors"], r["call"]) for r in rows):
        of_call = [r for r in rows if (r["tensors"], r["call"]) == (tensors, call)]
        own = {r["by"]: f"{1e6 * float(r['seconds']):,.0f}" for r in of_call}
        beside = [f"{b}: {x}" for b, x in own.items() if b not in ("native", "triton")]
        lines.append([f"{int(tensors):,}", call, own["native"], own["triton"], *(beside or ["-"])])
    return _lines(["tensors", "call", "native", "Triton", "beside them"], lines)


def sharded(rows: Sequence[Line]) -> str:
    """Every way's time on DTensors, and over the limit's."""
    lines = []
    for row in rows:
        limit = next(r for r in rows if (r["workload"], r["way"]) == (row["workload"], LIMIT))
        times = float(row["seconds"]) / float(limit["seconds"])
        ms = f"{1e3 * float(row['seconds']):,.3g}"
        lines.append([row["workload"], row["tensors"], row["way"], ms, f"{times:.3g} x"])
    return _lines(["workload", "tensors", "way", "ms", "of the limit"], lines)


def overhead(rows: Sequence[Line]) -> str:
    """The shares of measuring, for each workload: the largest of its ways."""
    lines = []
    for workload in dict.fromkeys(r["workload"] for r in rows):
        own = [r for r in rows if r["workload"] == workload]
        ms = sorted(1e3 * float(r["seconds"]) for r in own)
        inside, between = (
            100 * max(float(r[share]) for r in own) for share in ("in_a_sample", "between_samples")
        )
        lines.append(
            [workload, f"{ms[0]:.2g} to {ms[-1]:.2g}", f"{inside:.4f} %", f"{between:.2f} %"]
        )
    return _lines(["workload", "runs, ms", "in a sample, at most", "between samples"], lines)


def _lines(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def csv_rows(name: str) -> list[Line]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _sweeps(name: str) -> list[Line]:
    return [r for r in csv_rows(name) if r["sweep"] != LIMIT]


SECTIONS: dict[str, Callable[[], str]] = {
    "table": lambda: table(load(RESULTS / "cpu.json")),
    "fresh": lambda: fresh(load(RESULTS / "cpu.json")),
    "optimizers": lambda: optimizers(csv_rows("optim")),
    "targets": lambda: targets(json.loads((RESULTS / "cpu.json").read_text())),
    "steps": lambda: multiples(csv_rows("optim"), "way", "workload"),
    "penalties": lambda: multiples(_sweeps("penalties"), "penalty", "sweep"),
    "steps_zen3": lambda: multiples(csv_rows("optim-zen3"), "way", "workload"),
    "penalties_zen3": lambda: multiples(_sweeps("penalties-zen3"), "penalty", "sweep"),
    "gpu_optimizers": lambda: gpu_optimizers(csv_rows("optim-h200")),
    "gpu_summary": lambda: gpu_summary(load(RESULTS / "h200.json")),
    "gpu": lambda: on_gpu(load(RESULTS / "h200.json")),
    "gpu_targets": lambda: targets(json.loads((RESULTS / "h200.json").read_text())),
    "gpu_steps": lambda: multiples(csv_rows("optim-h200"), "way", "workload"),
    "gpu_penalties": lambda: multiples(_sweeps("penalties-h200"), "penalty", "sweep"),
    "peers": lambda: peers(csv_rows("peers")),
    "overhead": lambda: overhead(csv_rows("overhead")),
    "host": lambda: host(csv_rows("host")),
    "sharded": lambda: sharded(csv_rows("sharded")),
}
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "README.md")


def written(text: str) -> str:
    """The text with every marked part as the records have it.

    Raises:
        KeyError: a mark names no section.
    """
    return MARKED.sub(lambda m: f"{m[1]}{SECTIONS[m[2]]()}\n{m[3]}", text)


def main() -> int:
    for path in FILES:
        before = path.read_text()
        after = written(before)
        if after != before:
            path.write_text(after)
            print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
