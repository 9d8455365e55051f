"""FirstBlockCache: the change of the first block's residual stands for the change of all of them.

Source: ParaAttention, "First Block Cache" (https://github.com/chengzeyi/ParaAttention), and the hooks of diffusers.

Departures, under both semantics: a change that is NaN or infinite computes, where the hooks of diffusers reuse on NaN;
a threshold of 0 never reuses, where they reuse on an unchanged input.
"""

from __future__ import annotations

from cachekit import deciders, forecasters, signals
from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.forecasters import Forecaster
from cachekit.policy import Policy

SEMANTICS = ("paper", "diffusers")


def first_block_cache(
    threshold: float = 0.05,
    *,
    warmup: int = 0,
    max_skips: int | None = None,
    forecaster: Forecaster | None = None,
    semantics: str = "paper",
) -> Policy:
    """Reuse the blocks after the first while the first block's residual changes by less than `threshold`.

    On a reused step the chain returns the first block's output plus the forecast of what the other blocks added
    at the last computed step.

    Args:
        threshold: relative L1 change, >= 0; 0.05 is diffusers' default, 0.08 to 0.12 is usual on FLUX.
        warmup: steps that compute at the start.
        max_skips: reused steps in a row at most, None for no limit.
        forecaster: what to return instead; None repeats the last residual.
        semantics: `"paper"` reuses below the threshold, `"diffusers"` also at it.

    Raises:
        ArgumentError: a value is out of range.

    Example:
        >>> import cachekit as ck
        >>> ck.first_block_cache(0.1, max_skips=3).name
        'first_block_cache(0.1, max_skips=3)'
    """
    check_semantics(semantics)
    check_forecaster(forecaster)
    decider = deciders.drift(threshold, inclusive=semantics == "diffusers")
    name = f"{threshold:g}"
    if max_skips is not None:
        decider = deciders.max_skips(max_skips, decider)
        name += f", max_skips={max_skips}"
    if warmup != 0:
        decider = deciders.warmup(warmup, decider)
        name += f", warmup={warmup}"
    if forecaster is not None:
        name += f", {forecaster.name}"
    return Policy(
        name=f"first_block_cache({name})",
        decider=decider,
        forecaster=forecaster or forecasters.hold(),
        signal=signals.change,
        front=1,
    )


def check_forecaster(forecaster: Forecaster | None) -> None:
    """Refuse what is no forecaster."""
    if forecaster is not None and not isinstance(forecaster, Forecaster):
        raise ArgumentTypeError(
            f"`forecaster` must be a Forecaster, got {forecaster!r}. Use a factory of cachekit.forecasters."
        )


def check_semantics(semantics: str) -> None:
    """Refuse what names no semantics."""
    if semantics not in SEMANTICS:
        raise ArgumentError(f"`semantics` must be one of {SEMANTICS}, got {semantics!r}.")
