"""Compute when the error that calibrated magnitudes predict is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cachekit.deciders._decider import Decider, Moment, Number, check_number, doubles, take, where
from cachekit.errors import ArgumentError, ArgumentTypeError

INTERPOLATIONS = ("nearest", "log")


class MagnitudeState(NamedTuple):
    """State of `magnitude_budget`."""

    gamma: Tensor  # [T], magnitude ratio of step s to step s - 1
    ratio: Tensor  # [], product of gamma since the last computed step
    error: Tensor  # [], sum of |1 - ratio| since then
    skips: Tensor  # [] int64, steps counted since then


torch.serialization.add_safe_globals([MagnitudeState])


def magnitude_budget(
    ratios: Sequence[float] | Tensor,
    *,
    threshold: float = 0.06,
    max_skips: int = 3,
    retention: float = 0.2,
    interpolation: str = "nearest",
    dtype: torch.dtype = torch.float64,
) -> Decider:
    """Reuse while the accumulated `|1 - product of gamma|` stays within `threshold`, at most `max_skips` in a row.

    The first `int(retention * T + 0.5)` steps compute. Nothing is measured: the verdicts are known before the
    first step.

    Args:
        ratios: calibrated `gamma`, one a step of the calibration run; stretched to T by `interpolation`.
        threshold: error budget, >= 0, no unit.
        max_skips: reuses in a row, >= 0.
        retention: share of the trajectory that computes at the start, in [0, 1].
        interpolation: `"nearest"` picks the ratio of the nearest calibrated step; `"log"` interpolates the
            cumulative logarithm, so that the product over the trajectory is that of the calibration.
        dtype: type of the accumulators.

    Raises:
        ArgumentError: a value is out of range, or `ratios` is empty, negative, zero or NaN.
        ArgumentTypeError: a value is no number, `dtype` no floating point type.

    Source: MagCache, arXiv 2506.09045, section 3.2.
    """
    gammas = check_ratios(ratios)
    check_number("threshold", threshold)
    check_number("retention", retention)
    if not threshold >= 0:
        raise ArgumentError(f"`threshold` must be >= 0, got {threshold!r}. Use max_skips=0 to switch reuse off.")
    if isinstance(max_skips, bool) or not isinstance(max_skips, int) or max_skips < 0:
        raise ArgumentError(f"`max_skips` must be an int >= 0, got {max_skips!r}. Use 0 to switch reuse off.")
    if not 0 <= retention <= 1:
        raise ArgumentError(f"`retention` must be in [0, 1], got {retention!r}. It is a share of the steps.")
    if interpolation not in INTERPOLATIONS:
        raise ArgumentError(f"`interpolation` must be one of {INTERPOLATIONS}, got {interpolation!r}.")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentTypeError(f"`dtype` must be a floating point torch.dtype, got {dtype!r}.")

    def init(timesteps: Tensor) -> MagnitudeState:
        return MagnitudeState(
            gamma=stretch(gammas, len(timesteps), interpolation).to(dtype, copy=True),
            ratio=torch.ones((), dtype=dtype),
            error=torch.zeros((), dtype=dtype),
            skips=torch.zeros((), dtype=torch.int64),
        )

    def advance(state: MagnitudeState, now: Moment) -> MagnitudeState:
        ratio = state.ratio * take(state.gamma, now.step)
        return state._replace(ratio=ratio, error=state.error + abs(1 - ratio), skips=state.skips + 1)

    def retained(now: Moment) -> Number:
        if isinstance(now.steps, Tensor):
            return now.step < torch.floor(now.steps.to(torch.float64) * retention + 0.5)
        return now.step < int(retention * now.steps + 0.5)

    def decide(state: MagnitudeState, now: Moment):
        spent = advance(state, now)
        reuse = (spent.error <= threshold) & (spent.skips <= max_skips)
        return (reuse == False) | retained(now)  # noqa: E712

    def update(state: MagnitudeState, now: Moment, computed) -> MagnitudeState:
        spent = advance(state, now)
        # A retained step has always computed, so resetting there changes nothing: the budget is still whole.
        return MagnitudeState(
            gamma=state.gamma,
            ratio=where(computed, torch.ones_like(spent.ratio), spent.ratio),
            error=where(computed, torch.zeros_like(spent.error), spent.error),
            skips=where(computed, torch.zeros_like(spent.skips), spent.skips),
        )

    return Decider(
        name=f"magnitude budget {threshold:g}, {max_skips} in a row",
        init=init,
        decide=decide,
        update=update,
        static=True,
    )


def stretch(gammas: Tensor, steps: int, interpolation: str = "nearest") -> Tensor:
    """Ratios of a calibration over L steps for a trajectory of `steps`: [L] float64 -> [steps] float64.

    `"nearest"` reads index `round(arange(T) * (L - 1) / (T - 1))` (T = 1 reads the last). It does not rescale: at
    half the steps each step spans two calibrated ones and the product over the trajectory is wrong. `"log"`
    interpolates the cumulative logarithm of the ratios linearly, which conserves the product (T = 1 has all of it).
    """
    length = len(gammas)
    if interpolation == "log":
        if steps == length:
            return gammas
        total = torch.cumsum(gammas.log(), 0)
        at = torch.linspace(0, length - 1, steps, dtype=torch.float64) if steps > 1 else gammas.new_tensor([length - 1])
        low = at.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        curve = total[low] + (at - low) * (total[high] - total[low])
        return torch.cat((curve[:1], curve.diff())).exp()
    if steps == 1:
        return gammas[-1:]
    # float32 as both references have it: their rounding decides which ratio a step gets.
    index = torch.arange(steps, dtype=torch.float32) * ((length - 1) / (steps - 1))
    return gammas[index.round().long()]


def check_ratios(ratios: Sequence[float] | Tensor) -> Tensor:
    """Ratios as a [L] float64 tensor of its own, or an error that names what is wrong with them."""
    try:
        gammas = doubles(ratios)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"`ratios` must be a sequence of numbers, got {type(ratios).__name__}. "
            "Calibrate with mag_calibration() and pass MagRatios.from_state(state)."
        ) from error
    if gammas.ndim != 1 or gammas.numel() == 0:
        raise ArgumentError(
            f"`ratios` must be 1-D and not empty, got shape {tuple(gammas.shape)}. "
            "Calibrate with mag_calibration() and pass MagRatios.from_state(state)."
        )
    for index, gamma in enumerate(gammas.tolist()):
        if not (gamma > 0 and math.isfinite(gamma)):
            raise ArgumentError(
                f"`ratios` must be positive and finite, got {gamma!r} at index {index}. Calibrate again: a ratio "
                "of norms cannot be that."
            )
    return gammas
