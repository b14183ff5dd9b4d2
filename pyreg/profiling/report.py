"""A profile as one HTML file that needs no other."""

from __future__ import annotations

import io
from html import escape

from .record import cells_under, columns_of
from .result import Profile

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #293241; margin: 2rem auto; max-width: 75rem;
       padding: 0 1rem; }
h1 { font-size: 1.4rem; } .advice { font-size: 1.1rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #8d99ae; } td { border-bottom: 1px solid #e3e7ee; }
th:first-child, td:first-child { text-align: left; }
tr.pyreg td { background: #eef5fa; } tr.limit td { color: #6b7689; }
svg { width: 100%; min-width: 45rem; height: auto; } footer { color: #6b7689; margin-top: 1.5rem; }
"""
_MEANING = (
    "ms: the median of one run, with 10 and 90 %. N moved: the traffic that the way should take, N "
    "being the bytes of the parameters. N counted: that by the GPU's own counters. of limit: the "
    "time of the torch operation that moves as many bytes as the job needs at least, on the same "
    "memory, over the way's. adds ms: what a training step takes longer by it; for AdamW, longer "
    "than torch's fused one without a penalty. extra MB: the peak of one run beyond parameters, "
    "gradients and an optimizer's states."
)


def html(profile: Profile) -> str:
    """Advice, picture, table and environment.

    Raises:
        ImportError: matplotlib is not installed.
    """
    name = profile.rows[0].workload
    head = columns_of(profile.rows)
    lines = [_line(head, "th")]
    for row in profile.rows:
        kind = "limit" if row.job == "limit" else "pyreg" if row.way.startswith("pyreg") else ""
        lines.append(_line(cells_under(head, row), "td", kind))
    notes = [f"<li>{escape(row.way)}: {escape(row.note)}</li>" for row in profile.rows if row.note]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f"<title>pyreg profile: {escape(name)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(name)}, {escape(profile.penalty)}</h1>",
            f'<p class="advice">{escape(profile.advice())}</p>',
            f'<div class="wide">{_svg(profile)}</div>',
            f'<div class="wide"><table>{"".join(lines)}</table></div>',
            f"<ul>{''.join(notes)}</ul>" if notes else "",
            f"<p>{escape(_MEANING)}</p>",
            f"<footer>{escape(str(profile.environment)).replace(chr(10), '<br>')}<br>"
            f"{escape(profile.environment.time)}</footer>",
            "</body></html>\n",
        ]
    )


def _line(cells: list[str], tag: str, kind: str = "") -> str:
    return f'<tr class="{kind}">' + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"


def _svg(profile: Profile) -> str:
    text = io.StringIO()
    profile.plot().savefig(text, format="svg")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
