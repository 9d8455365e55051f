"""Caching against simply taking fewer steps: the comparison, and what it comes to in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from cachekit.demo.scores import Row, timed
from cachekit.demo.settings import FEWER


class Gain(NamedTuple):
    """PSNR of a row over what fewer Euler steps would have at the same cost, in dB; None where it is unknown."""

    at_equal_work: float | None  # as many multiplications
    at_equal_time: float | None  # as many seconds; unknown where these cannot be trusted


def gain(row: Row, rows: Sequence[Row]) -> Gain:
    """Compare a cached row with the runs of fewer steps among `rows`.

    Between two such runs the PSNR is taken as linear in the logarithm of the cost. Beyond the costliest a row can
    only be held to lose, beyond the cheapest only to win: then the difference from that run is a lower bound.
    """
    return Gain(
        at_equal_work=_gain(row, rows, lambda entry: entry.work),
        at_equal_time=_gain(row, rows, lambda entry: entry.seconds) if timed([row, *rows]) else None,
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


def measure(rows: Sequence[Row]) -> str:
    """Which speed-ups the report shows, and why."""
    if timed(rows):
        return (
            "Speed-ups are shown by time and, beside it, by work, which is counted in multiplications: no run was "
            "disturbed, so its seconds can be held against those of the others."
        )
    busy = sum(row.busy for row in rows)
    return (
        "Speed-ups are shown by work, which is counted in multiplications, not by time: during "
        f"{busy} of the {len(rows)} runs this machine was busy with something else, so seconds cannot be trusted here. "
        "These runs are marked ~ in the table."
    )


def headline(rows: Sequence[Row]) -> list[str]:
    """What the numbers say, in sentences: the best setting, how many win, and every one that loses."""
    gains = [(row, gain(row, rows)) for row in rows if row.cached]
    by_work = [(gained.at_equal_work, row) for row, gained in gains if gained.at_equal_work is not None]
    by_time = [(gained.at_equal_time, row) for row, gained in gains if gained.at_equal_time is not None]
    if not by_work:
        return ["No cached run costs about as much as a run of fewer steps, so nothing can be compared."]
    most, best = max(by_work, key=lambda entry: entry[0])
    sentences = [
        _best(most, best, rows),
        f"The best cached run is “{best.label}”. PSNR says how close its digits are to those of the full run from the "
        "same noise: more is closer, and 10 dB more are a tenth of the squared error.",
        _count("At equal work", by_work, len(gains)),
    ]
    if by_time:
        sentences.append(_count("In equal time", by_time, len(gains)))
    return sentences


def _best(most: float, row: Row, rows: Sequence[Row]) -> str:
    work, plain = shown(row.work), shown(row.psnr - most)
    # Cheaper than the cheapest run of fewer steps, of a row that wins only a bound is known.
    about = "about" if row.work >= min(entry.work for entry in rows if entry.group == FEWER) else "less than"
    if shown(most) <= 0:
        return (
            f"Here no cache beats simply taking fewer steps: with the work of {work:g} of {row.steps} steps the best "
            f"one keeps {row.psnr:.1f} dB of PSNR, where fewer steps keep {about} {plain:.1f} dB."
        )
    return (
        f"With the work of {work:g} of {row.steps} steps, the best cache keeps {row.psnr:.1f} dB of PSNR, where simply "
        f"taking fewer steps keeps {about} {plain:.1f} dB."
    )


def _count(cost: str, gains: Sequence[tuple[float, Row]], total: int) -> str:
    """What becomes of the `total` cached settings, of which `gains` are those that can be compared."""
    rest = sorted((entry for entry in gains if shown(entry[0]) <= 0), key=lambda entry: entry[0])
    said = f"{cost}, {len(gains) - len(rest)} of {len(gains)} cached settings beat taking fewer steps."
    if rest:
        said += f" These do not: {'; '.join(f'{row.label} ({shown(each):+.1f} dB)' for each, row in rest)}."
    if others := total - len(gains):
        named = "one" if others == 1 else f"{others}"
        said += f" The other {named} cannot be compared: no run of fewer steps costs as much, or none as little."
    return said


def shown(value: float) -> float:
    """As it is printed, to a tenth: what rounds to nothing is nothing, without a sign of its own."""
    return round(value, 1) + 0.0
