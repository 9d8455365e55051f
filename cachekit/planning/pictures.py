"""Pictures of a recording, of what was replayed on it, and of plans. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from cachekit.drawing import INK, TRACK, plain
from cachekit.planning.replay import Replay, replay
from cachekit.planning.trace import Trace
from cachekit.plans import Plan
from cachekit.policy import Policy

PLANNED = "planned"
COLOURS = ("#2f6fb7", "#d1782a", "#2e8b57", "#7a4fb5", "#b5446e", "#3d8f9e", "#8a6d1b")
BEST = "#1f2933"


def similarity(trace: Trace, site: str = "output") -> Figure:
    """How alike the values of any two steps are: the Gram matrix over the norms, as a heat map."""
    gram = trace.gram(site)
    norms = gram.diagonal().clamp(min=0).sqrt()
    shown = (gram / (norms[:, None] * norms).clamp(min=1e-300)).numpy()
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shown, cmap="magma", vmin=float(shown.min()), vmax=1.0, interpolation="nearest")
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.set_ylabel("step", fontsize=9, color=INK)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label(f"cosine between values of the {site}", fontsize=9, color=INK)
    bar.ax.tick_params(length=0, colors=INK, labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def front(plans: Sequence[Plan], replays: Mapping[str, Sequence[Replay]]) -> Figure:
    """Predicted error against computed steps: plans as a line, methods as points.

    Args:
        plans: best ones, from `frontier`.
        replays: method -> what its settings would have done. A thin line joins them, so they should differ by a number
            alone: settings with other forecasters are other methods here.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    drawn = [(len(plan.steps), plan.error) for plan in plans if plan.error]
    axes.plot(*zip(*drawn, strict=True), color=BEST, linewidth=1.6, label=PLANNED, zorder=3)
    for (name, each), colour in zip(replays.items(), _colours(len(replays)), strict=True):
        points = sorted((one.computed_steps, one.error) for one in each if one.error)
        if points:
            axes.plot(*zip(*points, strict=True), "o:", color=colour, markersize=4, linewidth=1, label=name)
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("computed steps (fewer to the right)", fontsize=9, color=INK)
    axes.set_ylabel("predicted error, of the whole way", fontsize=9, color=INK)
    plain(axes)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def errors(trace: Trace, policies: Mapping[str, Policy]) -> Figure:
    """The error of every step, and below it the steps that compute, for each policy."""
    figure = Figure(figsize=(8, 3.0 + 0.3 * len(policies)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 0.25 * len(policies) + 0.25])
    for n, ((name, policy), colour) in enumerate(zip(policies.items(), _colours(len(policies)), strict=True)):
        replayed = replay(trace, policy)
        steps = range(replayed.steps)
        above.plot(steps, [error or math.nan for error in replayed.errors], ".-", color=colour, label=name)
        nodes = sorted(set().union(*replayed.computed.values()))
        below.barh(n, replayed.steps, left=-0.5, height=0.7, color=TRACK)
        below.barh([n] * len(nodes), 0.86, left=[node - 0.43 for node in nodes], height=0.7, color=colour)
    above.set_ylabel("relative error\nof the forecast", fontsize=9, color=INK)
    above.set_ylim(bottom=0)
    above.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    plain(above)
    below.set_yticks(range(len(policies)), list(policies), fontsize=9, color=INK)
    below.invert_yaxis()
    below.set_xlabel("step, from noise to image; filled: computed", fontsize=9, color=INK)
    below.tick_params(length=0, colors=INK, labelsize=9)
    below.spines[:].set_visible(False)
    return figure


def _colours(count: int) -> tuple[str, ...]:
    return (COLOURS * (count // len(COLOURS) + 1))[:count]
