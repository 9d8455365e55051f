"""The pictures of the report as PNG bytes: sample grids, skip patterns, speed against PSNR."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

import cachekit as ck
from cachekit.demo.runs import CHOSEN, FEWER, PLANNED, UNCACHED, Row
from cachekit.drawing import INK, TRACK, plain, png
from cachekit.planning import pictures as planning

COLOURS = {
    UNCACHED: "#1f2933",
    FEWER: "#7b8794",
    "first_block_cache": "#2f6fb7",
    "mag_cache": "#d1782a",
    "step_mask": "#2e8b57",
    "taylorseer": "#7a4fb5",
    "pyramid_attention_broadcast": "#b5446e",
    "faster_cache": "#3d8f9e",
    "combination": "#8a6d1b",
    PLANNED: "#c22f2f",
    CHOSEN: "#e0876a",
}
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


def pattern(rows: Sequence[Row]) -> bytes:
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
    return png(figure)


def speed(rows: Sequence[Row]) -> bytes:
    """PSNR against computed steps (the same on every machine) and against the measured speed-up."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _scatter(left, rows, lambda row: row.computed_steps)
    _scatter(right, [row for row in rows if row.speedup is not None], lambda row: row.speedup or 0.0)
    left.invert_xaxis()
    left.set_ylabel("PSNR against the uncached samples, dB", fontsize=9, color=INK)
    left.set_xlabel("computed steps (fewer to the right)", fontsize=9, color=INK)
    right.set_xlabel("measured speed-up against the uncached run", fontsize=9, color=INK)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return png(figure)


def front(rows: Sequence[Row], trace: ck.Trace, policies: Mapping[str, Sequence[ck.Policy]]) -> bytes:
    """Predicted error of plans and methods against computed steps, and what was measured.

    Args:
        rows: of the table.
        trace: of the recorded run.
        policies: of the rows, by group; those of which the trace holds nothing are left out.
    """
    replays = {}
    for group, each in policies.items():
        with contextlib.suppress(ck.ArgumentError), warnings.catch_warnings():
            warnings.simplefilter("ignore", ck.TraceWarning)
            replays[group] = ck.replay(trace, each)
    for group in (PLANNED, CHOSEN):  # points of the line, or near it
        replays.pop(group, None)
    measured = {
        group: [(row.computed_steps, row.psnr) for row in rows if row.group == group and math.isfinite(row.psnr)]
        for group in (CHOSEN, PLANNED, FEWER, *replays)
    }
    return png(planning.front(ck.frontier(trace), replays, measured))


def _scatter(axes: Axes, rows: Sequence[Row], cost: Callable[[Row], float]) -> None:
    for group, colour in COLOURS.items():
        for forecast in (False, True):
            points = [
                (cost(row), row.psnr, re.split(r" [(+]", row.detail)[0])
                for row in rows
                if row.group == group and row.forecast == forecast and math.isfinite(row.psnr)
            ]
            if not points:
                continue
            xs, ys, names = zip(*sorted(points), strict=True)
            axes.plot(
                xs,
                ys,
                color=colour,
                marker="D" if forecast else "o",
                markersize=6,
                markerfacecolor="white" if forecast else colour,
                linestyle="-" if group == FEWER else ":",
                linewidth=1.6 if group == FEWER else 1,
                label=group + (" + forecast" if forecast else ""),
                zorder=2 if group == FEWER else 3,
            )
            for x, y, name in zip(xs, ys, names, strict=True):
                fewer = group == FEWER
                axes.annotate(
                    name,
                    (x, y),
                    xytext=(-5, -11) if fewer else (6, 4),
                    textcoords="offset points",
                    ha="right" if fewer else "left",
                    fontsize=7,
                    color=colour,
                )
    axes.margins(0.08, 0.1)
    plain(axes)
