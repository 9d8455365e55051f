"""Compute when the signal has moved too far."""

from __future__ import annotations

import math

from cachekit.deciders._decider import Decider, check_number, ratio
from cachekit.errors import ArgumentError


def drift(threshold: float, *, inclusive: bool = False) -> Decider:
    """Reuse while the relative change of the signal, `numerator / denominator`, stays below `threshold`.

    The change is measured against the last computed step. NaN and infinity compute. A threshold of 0 never
    reuses.

    Args:
        threshold: relative change, >= 0, no unit.
        inclusive: whether a change equal to the threshold is reused.

    Raises:
        ArgumentError: `threshold` is negative or NaN.
        ArgumentTypeError: `threshold` is no number.

    Example:
        >>> import cachekit as ck
        >>> d = ck.deciders.drift(0.1)
        >>> now = ck.deciders.Moment(step=3, timestep=700.0, steps=28, signal=ck.deciders.Sums(0.5, 10.0))
        >>> d.decide((), now)
        False
    """
    check_number("threshold", threshold)
    if not threshold >= 0:
        raise ArgumentError(f"`threshold` must be >= 0, got {threshold!r}. Use 0 to switch reuse off.")
    inclusive = inclusive and 0 < threshold < math.inf

    def decide(state: tuple[()], now):
        change = ratio(now.signal)
        close = change <= threshold if inclusive else change < threshold
        # Written so that a comparison with NaN, which is false, computes. Anything is small beside a reference
        # that has overflown, so that computes too.
        reuse = close & (now.signal.denominator < math.inf)
        return reuse == False  # noqa: E712

    return Decider(
        name=f"drift under {threshold:g}",
        init=lambda timesteps: (),
        decide=decide,
        update=lambda state, now, computed: state,
        static=False,
    )
