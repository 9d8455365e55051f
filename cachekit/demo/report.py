"""The table as text, and the report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

from cachekit.demo.pictures import COLOURS, DIFFERENCE
from cachekit.demo.scores import Row, timed
from cachekit.demo.verdict import gain, shown

TEMPLATE = Path(__file__).with_name("report.html")
Heading = tuple[str, str]
"""Of a column: what it has in common with those beside it, "" for nothing, and its own name."""
SPEEDUP, GAINED = "speed-up by", "dB gained at equal"


def cells(row: Row, rows: Sequence[Row]) -> dict[Heading, str]:
    """The row as text, by column. Columns of time are there only where seconds can be trusted."""
    counts = list(dict.fromkeys(sum(stream) for stream in row.computed.values()))
    gained = gain(row, rows)
    by_time = timed(rows)
    made = {
        ("", "computed steps"): " / ".join(map(str, counts)) + ("*" if row.partial else ""),
        ("", "work"): f"{shown(row.work):.1f}",
        ("", "seconds"): f"{'~' if row.busy else ''}{row.seconds:.2f}",
        (SPEEDUP, "work"): f"{row.speedup_by_work:.2f}x",
        (SPEEDUP, "time"): f"{row.speedup_by_time:.2f}x" if row.speedup_by_time is not None else "",
        ("", "PSNR dB"): _decibel(row.psnr),
        ("", "worst"): _decibel(row.worst),
        ("", "SSIM"): f"{row.ssim:.4f}",
        ("", "read"): f"{row.recognised:.1%}".replace(".0%", "%"),
        (GAINED, "work"): _signed(gained.at_equal_work),
        (GAINED, "time"): _signed(gained.at_equal_time),
    }
    return {heading: cell for heading, cell in made.items() if by_time or heading[1] != "time"}


def legend(rows: Sequence[Row]) -> list[str]:
    """What the columns and the marks of the table mean; of the marks, those that are in it."""
    at_equal = "as much work, or in as much time" if timed(rows) else "as much work"
    said = [
        "Work is what a run multiplies, in steps of the full run; what is done element by element is not counted. "
        "Speed-ups are over the full run.",
        f"dB gained: PSNR over that of runs of fewer Euler steps with {at_equal}, read off between the two nearest. "
        "Empty where no such run is near.",
    ]
    if any(row.partial for row in rows):
        said.append(
            "* Its other steps are not free: they leave out attention, or attention and feed-forward networks, and run "
            "the rest. So its work says more than its number of computed steps."
        )
    if any(len(set(row.computed.values())) > 1 for row in rows):
        said.append("a / b: computed by the conditional and by the unconditional stream.")
    if not timed(rows):
        said.append("~ The machine was busy with something else during this run, so its seconds mean little.")
    return said


def table(rows: Sequence[Row]) -> str:
    """For a terminal: one block a method."""
    width = max(len(row.label) for row in rows)
    made = [cells(row, rows) for row in rows]
    headings = list(made[0])
    widths = [max(len(heading[1]), *(len(each[heading]) for each in made)) for heading in headings]
    above = f"{'':<{width}}"
    for common, group in groupby(zip(headings, widths, strict=True), lambda entry: entry[0][0]):
        spans = [span for _, span in group]
        if len(common) > sum(spans) + 2 * (len(spans) - 1):  # the first of them makes room
            missing = len(common) - sum(spans) - 2 * (len(spans) - 1)
            widths[headings.index(next(heading for heading in headings if heading[0] == common))] += missing
            spans[0] += missing
        above += "  " + f"{common:^{sum(spans) + 2 * (len(spans) - 1)}}"
    names = "  ".join(
        [f"{'':<{width}}", *(f"{name:>{span}}" for (_, name), span in zip(headings, widths, strict=True))]
    )
    lines, group = [above.rstrip(), names], ""
    for row, each in zip(rows, made, strict=True):
        if row.group != group:
            group = row.group
            lines.append("-" * len(names))
        values = (f"{cell:>{span}}" for cell, span in zip(each.values(), widths, strict=True))
        lines.append("  ".join([f"{row.label:<{width}}", *values]))
    return "\n".join(lines)


def html(
    rows: Sequence[Row],
    sentences: Sequence[str],
    measure: str,
    facts: Mapping[str, str],
    pictures: Mapping[str, bytes],
    digits: int,
) -> str:
    """The report.

    Args:
        rows: of the table, in groups, the uncached one first.
        sentences: the headline, then what follows it.
        measure: which speed-ups are shown, and why.
        facts: what was run, on what.
        pictures: PNGs: "pattern", "speed", "front", and for every row "samples/<number>" and "differences/<number>".
        digits: how many samples each row has.
    """
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        headline=escape(sentences[0]),
        digits=str(digits),
        steps=str(rows[0].steps),
        verdict="".join(f"<p>{escape(sentence)}</p>" for sentence in sentences[1:]),
        measure=escape(measure),
        trust="" if timed(rows) else "busy",
        shown="measured in seconds" if timed(rows) else "by work, for seconds cannot be trusted here",
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()),
        head=_head(list(cells(rows[0], rows))),
        table=_table(rows),
        legend="".join(f"<li>{escape(said)}</li>" for said in legend(rows)),
        cards="".join(_card(n, row, rows, pictures) for n, row in enumerate(rows)),
        pattern=_image(pictures["pattern"], "Which steps every setting computed"),
        front=_image(pictures["front"], "Predicted error against computed steps, and the measured PSNR"),
        speed=_image(pictures["speed"], "PSNR against computed steps and against speed-up"),
        difference=f"{DIFFERENCE:g}",
    )


def _head(headings: Sequence[Heading]) -> str:
    above = ""
    for common, group in groupby(heading[0] for heading in headings):
        above += f'<th{" class=over" if common else ""} colspan="{len(list(group))}">{escape(common)}</th>'
    names = "".join(f"<th>{escape(name)}</th>" for _, name in headings)
    return f"<tr><th></th>{above}</tr>\n<tr><th>method</th>{names}</tr>"


def _table(rows: Sequence[Row]) -> str:
    lines, group = [], ""
    for row in rows:
        start = ' class="first"' if row.group != group else ""
        group = row.group
        values = []
        for (common, _), cell in cells(row, rows).items():
            kinds = {"-": ' class="worse"', "+": ' class="better"'} if cell != "+0.0" else {}
            sign = kinds.get(cell[:1], "") if common == GAINED else ""
            values.append(f"<td{sign}>{escape(cell)}</td>")
        lines.append(f"<tr{start}><th>{_tag(row)}</th>{''.join(values)}</tr>")
    return "\n".join(lines)


def _tag(row: Row) -> str:
    return f'<i style="background:{COLOURS[row.group]}"></i>{escape(row.group)} <b>{escape(row.detail)}</b>'


def _card(n: int, row: Row, rows: Sequence[Row], pictures: Mapping[str, bytes]) -> str:
    made = cells(row, rows)
    speedup = made.get((SPEEDUP, "time")) or f"{made[SPEEDUP, 'work']} by work"
    score = f"{made['', 'computed steps']} steps computed, {speedup}, {made['', 'PSNR dB']} dB"
    shown = _image(pictures[f"samples/{n:02d}"], f"Samples of {row.label}")
    off = _image(pictures[f"differences/{n:02d}"], f"Differences of {row.label} from the uncached samples")
    score = "the reference" if n == 0 else score
    return f"<figure><figcaption>{_tag(row)}<span>{escape(score)}</span></figcaption>{shown}{off}</figure>\n"


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'


def _decibel(distance: float) -> str:
    return f"{distance:.1f}" if math.isfinite(distance) else "same"


def _signed(gained: float | None) -> str:
    return "" if gained is None else f"{shown(gained):+.1f}"
