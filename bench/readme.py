"""The figures in README.md, written from the records: `python -m bench readme`.

A figure stands between two comments, `<!-- bench: NAME -->` and `<!-- end -->`; NAME is one of
SECTIONS. tests/test_readme.py fails where the text between them is not what the records say.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pyreg.profiling import Record, Row, load
from pyreg.profiling.record import find

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
PENALTY = "elastic_net"
MARKED = re.compile(r"(<!-- bench: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
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


def optimizers(rows: Sequence[dict[str, str]]) -> str:
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
    return (
        "Against torch's fused AdamW *without* a penalty, a step with an elastic net takes "
        f"{', '.join(both)}."
    )


def _optim_rows() -> list[dict[str, str]]:
    with (RESULTS / "optim.csv").open(newline="") as file:
        return list(csv.DictReader(file))


SECTIONS: dict[str, Callable[[], str]] = {
    "table": lambda: table(load(RESULTS / "cpu.json")),
    "fresh": lambda: fresh(load(RESULTS / "cpu.json")),
    "optimizers": lambda: optimizers(_optim_rows()),
}


def written(text: str) -> str:
    """The text with every marked part as the records have it.

    Raises:
        KeyError: a mark names no section.
    """
    return MARKED.sub(lambda m: f"{m[1]}{SECTIONS[m[2]]()}{m[3]}", text)


def main() -> int:
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = path.read_text()
        after = written(before)
        if after != before:
            path.write_text(after)
            print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
