"""How pictures look: colours, axes, names beside points, PNG bytes."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.transforms import Bbox

INK, FAINT, TRACK = "#3e4c59", "#9aa5b1", "#eef1f4"
DPI = 180
REACHES = (4, 8, 14, 20, 27, 35, 44, 54)
"""How far a name may begin from the point it belongs to, in 1/72 inch; from the third on a line leads there."""
WAYS = tuple(np.array(way) / max(1, math.hypot(*way)) for way in itertools.product((1, -1, 0), repeat=2) if any(way))
"""The directions in which it may be, those to the right first."""
LEAD = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
"""How the line looks that leads from a point to its name."""


def plain(axes: Axes) -> None:
    """A grid behind the data, and lines at the left and the bottom alone."""
    axes.grid(color=TRACK)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


class Name(NamedTuple):
    """What is written beside a point of a picture."""

    x: float
    y: float
    text: str
    colour: str


def write_names(axes: Axes, names: Sequence[Name]) -> None:
    """Write names beside points, where they cover neither each other nor a mark nor a line.

    The picture must be finished but for its names, for they are fitted into what is free. A name for which there is no
    place is left out: say elsewhere what the points are.

    Args:
        axes: with all that is drawn in them.
        names: of points of the axes, the most important first.

    Example:
        >>> figure = Figure(layout="constrained")
        >>> axes = figure.add_subplot()
        >>> points = axes.plot([1, 1], [2, 2], "o")
        >>> write_names(axes, [Name(1, 2, "here", INK), Name(1, 2, "and here", INK)])
        >>> [text.get_text() for text in axes.texts]
        ['here', 'and here']
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_dpi(DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # lays the axes out
    inside, unit = axes.get_window_extent(renderer), DPI / 72
    paths, marks = _drawn(axes, unit)
    written: list[Bbox] = []
    for name in names:
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "color": name.colour}
        text = axes.annotate(name.text, (name.x, name.y), (0, 0), textcoords="offset points", **look)
        text.set_in_layout(False)  # or the axes would be laid out anew
        here = axes.transData.transform((name.x, name.y))
        size = np.array(text.get_window_extent(renderer).padded(unit).size)
        for middle, end in _places(size / unit):
            box = Bbox([here + unit * middle - size / 2, here + unit * middle + size / 2])
            within = inside.contains(*box.min) and inside.contains(*box.max)
            if not within or box.count_overlaps(marks + written) or _crossed(box, paths):
                continue
            lead = [] if end is None else [Path([here, here + unit * end])]
            if any(_crossed(other, lead) for other in written):
                continue
            text.set_position(tuple(middle))
            if end is not None:
                look = {"textcoords": "offset points", "arrowprops": {**LEAD, "color": name.colour}}
                axes.annotate("", (name.x, name.y), tuple(end), **look).set_in_layout(False)
            paths += lead
            written.append(box)
            break
        else:
            text.remove()


def _places(size: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Where the middle of a name of this size may be, the best first, and where a line to it ends, if it is far.

    All is seen from the point that is named, in 1/72 inch.
    """
    for reach, way in itertools.product(REACHES, WAYS):
        yield reach * way + np.sign(way) * size / 2, reach * way if reach > REACHES[1] else None


def _crossed(box: Bbox, paths: Sequence[Path]) -> bool:
    return any(path.intersects_bbox(box, filled=False) for path in paths)


def _drawn(axes: Axes, unit: float) -> tuple[list[Path], list[Bbox]]:
    """The lines of axes and the boxes around their marks, where they are on the canvas."""
    paths, marks = [], []
    for line in axes.get_lines():
        path = line.get_transform().transform_path(line.get_path())
        if line.get_linestyle() != "None":
            paths.append(path)
        if line.get_marker() not in ("", "None"):
            reach = unit * (line.get_markersize() / 2 + 1)
            marks += [
                Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in np.asarray(path.vertices)
            ]
    return paths, marks


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()
