"""Caching against simply running fewer steps: the comparison, and what it comes to in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from cachekit.demo.runs import FEWER, Row


class Gain(NamedTuple):
    """PSNR of a row over what fewer Euler steps would have at the same cost, in dB; None where it is unknown."""

    at_equal_steps: float | None  # as many computed steps; unknown where the others run in part
    at_equal_time: float | None  # as many seconds; unknown where the machine was busy


def gain(row: Row, rows: Sequence[Row]) -> Gain:
    """Compare a cached row with the runs of fewer steps among `rows`.

    Between two such runs the PSNR is taken as linear in the logarithm of the cost. Beyond the costliest a row can
    only be held to lose, beyond the cheapest only to win: then the difference from that run is a lower bound.
    """
    alone = [entry for entry in rows if not entry.busy]
    return Gain(
        at_equal_steps=None if row.partial else _gain(row, rows, lambda entry: entry.computed_steps),
        at_equal_time=None if row.busy else _gain(row, alone, lambda entry: entry.seconds),
    )


def _gain(row: Row, rows: Sequence[Row], cost: Callable[[Row], float]) -> float | None:
    curve = sorted((cost(entry), entry.psnr) for entry in rows if entry.group == FEWER and math.isfinite(entry.psnr))
    if not (row.cached and math.isfinite(row.psnr) and curve):
        return None
    here = cost(row)
    for (low, worse), (high, better) in pairwise(curve):
        if low <= here <= high:
            share = math.log(here / low) / math.log(high / low) if high > low else 0.0
            return row.psnr - (worse + share * (better - worse))
    cheapest, costliest = curve[0], curve[-1]
    if here > costliest[0] and row.psnr < costliest[1]:
        return row.psnr - costliest[1]
    if here < cheapest[0] and row.psnr > cheapest[1]:
        return row.psnr - cheapest[1]
    return None


def headline(rows: Sequence[Row]) -> list[str]:
    """What the numbers say, in sentences: the best setting, how many win, and every one that loses."""
    gains = [(row, gain(row, rows)) for row in rows if row.cached]
    by_steps = [(gained.at_equal_steps, row) for row, gained in gains if gained.at_equal_steps is not None]
    by_time = [(gained.at_equal_time, row) for row, gained in gains if gained.at_equal_time is not None]
    if not by_steps:
        return ["No cached run lies within the range of the runs with fewer steps, so nothing can be compared."]
    sentences = [
        _best(*max(by_steps, key=lambda entry: entry[0])),
        _count("At equal computed steps", by_steps, len(gains)),
    ]
    if by_time:
        sentences.append(_count("At equal wall time", by_time, len(gains)))
    if busy := [row.label for row in rows if row.busy]:
        sentences.append(
            "The machine was busy with something else during some runs, so their seconds (marked ~) mean little and "
            f"are left out of what is said about time: {', '.join(busy)}."
        )
    return sentences


def _best(most: float, row: Row) -> str:
    plain = f"{row.psnr - most:.1f} dB"
    if most <= 0:
        return (
            f"Here no cache beats simply running fewer Euler steps: the best, {row.label}, has {row.psnr:.1f} dB with "
            f"{row.computed_steps:g} of {row.steps} steps computed, where fewer steps reach about {plain}."
        )
    return (
        f"Of {row.steps} steps, {row.label} computes {row.computed_steps:g} and keeps {row.psnr:.1f} dB of PSNR; "
        f"simply running {row.computed_steps:g} Euler steps would keep about {plain}."
    )


def _count(cost: str, gains: Sequence[tuple[float, Row]], total: int) -> str:
    """One sentence, in which `gains` are those of the `total` cached settings that can be compared."""
    out = "" if len(gains) == total else f" ({total - len(gains)} of {total} cannot be compared)"
    rest = sorted((entry for entry in gains if shown(entry[0]) <= 0), key=lambda entry: entry[0])
    sentence = f"{cost}{out}, {len(gains) - len(rest)} of {len(gains)} cached settings beat running fewer steps"
    if not rest:
        return f"{sentence}."
    return f"{sentence}; these do not: {', '.join(f'{row.label} ({shown(gained):+.1f} dB)' for gained, row in rest)}."


def shown(gained: float) -> float:
    """As the table shows it, to a tenth of a dB: what rounds to nothing is nothing, without a sign of its own."""
    return round(gained, 1) + 0.0
