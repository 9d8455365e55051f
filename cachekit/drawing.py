"""How pictures look: colours, axes, PNG bytes."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, TRACK = "#3e4c59", "#9aa5b1", "#eef1f4"


def plain(axes: Axes) -> None:
    """A grid behind the data, and lines at the left and the bottom alone."""
    axes.grid(color=TRACK)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, facecolor="white")
    return buffer.getvalue()
