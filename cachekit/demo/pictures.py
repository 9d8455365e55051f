"""The pictures of the report: sample grids as PNG bytes, charts as figures."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import cachekit as ck
from cachekit.demo.scores import Row, timed
from cachekit.demo.settings import CHOSEN, FEWER, PLANNED, PLANS, UNCACHED
from cachekit.drawing import INK, TRACK, Name, plain, write_names

COLOURS = {
    UNCACHED: "#1f2933",
    FEWER: "#616e7c",
    "first_block_cache": "#2f6fb7",
    "mag_cache": "#d1782a",
    "step_mask": "#2e8b57",
    "taylorseer": "#7a4fb5",
    "pyramid_attention_broadcast": "#b5446e",
    "faster_cache": "#3d8f9e",
    "combination": "#8a6d1b",
    PLANNED: "#c22f2f",
    CHOSEN: "#56b4e9",
}
JOINED = (FEWER, PLANNED)
"""The series whose points a line joins: between two of them lie others that differ by their number of steps alone."""
DIFFERENCE = 0.2
"""Absolute difference that the difference pictures paint in full colour: a tenth of the range."""
SCALE, GAP = 4, 3


def samples(images: Tensor, columns: int) -> bytes:
    """Images [B, 1, 1, H, W] in [-1, 1] as a grid, dark ink on white."""
    ink = (images.flatten(1, 2)[:, 0].clamp(-1, 1).numpy(force=True) + 1) / 2
    return _grid(np.repeat(1 - ink[..., None], 3, axis=-1), columns)


def differences(images: Tensor, reference: Tensor, columns: int) -> bytes:
    """Absolute differences as a grid: white for none, full red for `DIFFERENCE` and more."""
    off = (images - reference).abs().flatten(1, 2)[:, 0].numpy(force=True)
    share = np.clip(off / DIFFERENCE, 0, 1)[..., None]
    return _grid(1 - share * (1 - np.array([0.78, 0.1, 0.12])), columns)


def _grid(tiles: np.ndarray, columns: int) -> bytes:
    """Tiles [B, H, W, 3] in [0, 1], row by row."""
    tiles = tiles.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    rows, (height, width) = -(-len(tiles) // columns), tiles.shape[1:3]
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 0.93)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (height + GAP), i % columns * (width + GAP)
        canvas[y : y + height, x : x + width] = tile
    buffer = io.BytesIO()
    imsave(buffer, canvas, format="png")
    return buffer.getvalue()


def pattern(rows: Sequence[Row]) -> Figure:
    """Which steps each row computed, from noise (left) to image (right).

    One tick is one forward, as wide as an uncached step; runs of fewer steps stand where their times fall. Where the
    streams differ, the conditional one is above and the unconditional one below.
    """
    total = rows[0].steps
    figure = Figure(figsize=(10, 0.3 * len(rows) + 0.9), layout="constrained")
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        axes.barh(y, total, left=0, height=0.72, color=TRACK)
        colour = COLOURS[row.group]
        streams = list(dict.fromkeys(row.computed.values()))
        height = 0.72 / len(streams)
        for n, stream in enumerate(streams):
            lefts = [step * total / row.steps for step, computed in enumerate(stream) if computed]
            middle = y - 0.36 + height * (n + 0.5)
            axes.barh([middle] * len(lefts), 0.86, left=[x + 0.07 for x in lefts], height=height * 0.94, color=colour)
        count = " / ".join(str(sum(stream)) for stream in streams)
        axes.text(total + 0.6, y, count, va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, total + 4.5)
    axes.set_xticks(range(0, total + 1, 10 if total > 20 else 5))
    axes.set_xlabel("step, from noise to image; at the right the computed steps (cond / uncond)", fontsize=9, color=INK)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.spines[:].set_visible(False)
    return figure


def speed(rows: Sequence[Row]) -> Figure:
    """PSNR against computed steps and against the speed-up: by time where seconds can be trusted, else by work.

    Rows whose other steps run in part are on the right alone: of what they cost, computed steps are no measure.
    """
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by_time = timed(rows)
    costs: dict[Axes, Callable[[Row], float]] = {
        left: lambda row: row.computed_steps,
        right: lambda row: (row.speedup_by_time or math.nan) if by_time else row.speedup_by_work,
    }
    shown = [row for row in rows if math.isfinite(row.psnr)]
    drawn = {left: [row for row in shown if not row.partial], right: shown}
    for axes, cost in costs.items():
        for series, each in _series(drawn[axes]).items():
            points = sorted((cost(row), row.psnr) for row in each)
            axes.plot(*zip(*points, strict=True), label=series, **_look(each[0]))
        axes.margins(0.1, 0.1)
        plain(axes)
    _count_down(left)
    left.set_ylabel("PSNR against the uncached samples, dB", fontsize=9, color=INK)
    measure = "measured in seconds" if by_time else "by work, counted in multiplications"
    right.set_xlabel(f"speed-up over the uncached run, {measure}", fontsize=9, color=INK)
    _legend(figure, right)
    for axes, cost in costs.items():
        each = sorted(drawn[axes], key=lambda row: (cost(row), row.psnr))
        write_names(axes, [Name(cost(row), row.psnr, _short(row), COLOURS[row.group]) for row in each])
    return figure


def front(rows: Sequence[Row], trace: ck.Trace, policies: Mapping[str, ck.Policy]) -> Figure:
    """Predicted error of plans and methods against computed steps, and what was measured.

    Args:
        rows: of the table.
        trace: of the recorded run.
        policies: of the rows, by their labels; those of which the trace holds nothing are left out.
    """
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    plans = [(len(plan.steps), plan.error) for plan in ck.frontier(trace) if plan.error]
    planned = next(row for row in rows if row.group == PLANNED)
    left.plot(*zip(*plans, strict=True), **{**_look(planned), "marker": ""})
    predicted: dict[str, tuple[float, float]] = {}
    for label, policy in policies.items():
        with contextlib.suppress(ck.ArgumentError), warnings.catch_warnings():
            warnings.simplefilter("ignore", ck.TraceWarning)
            replayed = ck.replay(trace, policy)
            predicted[label] = (replayed.computed_steps, replayed.error)
    shown = [row for row in rows if row.label in predicted or row.group == FEWER]
    for series, each in _series(shown).items():
        points = sorted(predicted[row.label] for row in each if row.label in predicted)
        if points and each[0].group != PLANNED:  # these are on the line
            left.plot(*zip(*points, strict=True), **{**_look(each[0]), "linestyle": "none"})
        measured = sorted((row.computed_steps, row.psnr) for row in each)
        right.plot(*zip(*measured, strict=True), label=series, **_look(each[0]))
    left.set_yscale("log")
    left.set_ylabel("predicted error, of the whole way", fontsize=9, color=INK)
    right.set_ylabel("measured PSNR, dB", fontsize=9, color=INK)
    for axes in (left, right):
        _count_down(axes)
        plain(axes)
    _legend(figure, right)
    return figure


def _count_down(axes: Axes) -> None:
    axes.invert_xaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("computed steps (fewer to the right)", fontsize=9, color=INK)


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by series: those of the plans and of fewer steps first, for they are what others are held against."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.group not in (FEWER, *PLANS)):
        groups.setdefault(row.series, []).append(row)
    return groups


def _look(row: Row) -> dict[str, Any]:
    """Colour by method; the mark says what stands in: what is held, a forecast at the blocks, one of the output."""
    colour = COLOURS[row.group]
    forecast = row.forecast and row.group not in PLANS
    mark = {PLANNED: "s", CHOSEN: "^"}.get(row.group, "o")
    if forecast:
        mark = "s" if row.series.endswith(", output") else "D"
    return {
        "color": colour,
        "marker": mark,
        "markersize": 6,
        "markerfacecolor": "white" if forecast else colour,
        "linestyle": "-" if row.group in JOINED else "none",
        "linewidth": 1.4,
        "zorder": 2 if row.group in JOINED else 3,
    }


def _short(row: Row) -> str:
    """The number that tells a row from others of its series."""
    return re.split(r" [(+]", row.detail)[0]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
