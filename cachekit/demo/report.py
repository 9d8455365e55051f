"""The table as text, and the report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from cachekit.demo.pictures import COLOURS, DIFFERENCE
from cachekit.demo.runs import Row
from cachekit.demo.verdict import gain, shown

TEMPLATE = Path(__file__).with_name("report.html")
COLUMNS = (
    "computed steps",
    "seconds",
    "speed-up",
    "PSNR dB",
    "worst",
    "SSIM",
    "recognised",
    "equal steps",
    "equal time",
)
"""The last two: PSNR over that of fewer Euler steps, see `cachekit.demo.verdict.gain`."""


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """The row under `COLUMNS`, as text."""
    counts = list(dict.fromkeys(sum(stream) for stream in row.computed.values()))
    gained = gain(row, rows)
    return [
        " / ".join(map(str, counts)) + ("*" if row.partial else ""),
        f"{'~' if row.busy else ''}{row.seconds:.2f}",
        f"{row.speedup:.2f}x" if row.speedup is not None else "",
        *(f"{distance:.1f}" if math.isfinite(distance) else "same" for distance in (row.psnr, row.worst)),
        f"{row.ssim:.4f}",
        f"{row.recognised:.1%}".replace(".0%", "%"),
        *("" if value is None else f"{shown(value):+.1f}" for value in gained),
    ]


def table(rows: Sequence[Row]) -> str:
    """For a terminal: one block a method."""
    width = max(len(row.label) for row in rows)
    lines = ["  ".join([f"{'':<{width}}", *COLUMNS])]
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append("-" * len(lines[0]))
        values = (f"{cell:>{len(name)}}" for cell, name in zip(cells(row, rows), COLUMNS, strict=True))
        lines.append("  ".join([f"{row.label:<{width}}", *values]))
    return "\n".join(lines)


def html(
    rows: Sequence[Row],
    sentences: Sequence[str],
    facts: Mapping[str, str],
    pictures: Mapping[str, bytes],
    digits: int,
) -> str:
    """The report.

    Args:
        rows: of the table, in groups, the uncached one first.
        sentences: the headline, then what follows it.
        facts: what was run, on what.
        pictures: PNGs: "pattern", "speed", "front", and for every row "samples/<number>" and "differences/<number>".
        digits: how many samples each row has.
    """
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        headline=escape(sentences[0]),
        digits=str(digits),
        steps=str(rows[0].steps),
        verdict="".join(f"<p>{escape(sentence)}</p>" for sentence in sentences[1:]),
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()),
        table=_table(rows),
        cards="".join(_card(n, row, rows, pictures) for n, row in enumerate(rows)),
        pattern=_image(pictures["pattern"], "Which steps every setting computed"),
        front=_image(pictures["front"], "Predicted error against computed steps, and the measured PSNR"),
        speed=_image(pictures["speed"], "PSNR against computed steps and against speed-up"),
        difference=f"{DIFFERENCE:g}",
    )


def _table(rows: Sequence[Row]) -> str:
    lines, group = [], ""
    for row in rows:
        start = ' class="first"' if row.group != group else ""
        group = row.group
        values = []
        for name, cell in zip(COLUMNS, cells(row, rows), strict=True):
            kinds = {"-": ' class="worse"', "+": ' class="better"'} if cell != "+0.0" else {}
            sign = kinds.get(cell[:1], "") if name.startswith("equal") else ""
            values.append(f"<td{sign}>{escape(cell)}</td>")
        lines.append(f"<tr{start}><th>{_tag(row)}</th>{''.join(values)}</tr>")
    return "\n".join(lines)


def _tag(row: Row) -> str:
    return f'<i style="background:{COLOURS[row.group]}"></i>{escape(row.group)} <b>{escape(row.detail)}</b>'


def _card(n: int, row: Row, rows: Sequence[Row], pictures: Mapping[str, bytes]) -> str:
    computed, _, speedup, distance, *_ = cells(row, rows)
    parts = (f"{computed} steps computed", speedup, f"{distance} dB")
    score = "the reference" if n == 0 else ", ".join(filter(None, parts))
    shown = _image(pictures[f"samples/{n:02d}"], f"Samples of {row.label}")
    off = _image(pictures[f"differences/{n:02d}"], f"Differences of {row.label} from the uncached samples")
    return f"<figure><figcaption>{_tag(row)}<span>{escape(score)}</span></figcaption>{shown}{off}</figure>\n"


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'
