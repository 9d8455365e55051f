"""The closed loop: which plan is best, and how few steps are enough, by real runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.forecasters import Forecaster
from cachekit.methods._planned import planned
from cachekit.planning.planner import frontier
from cachekit.planning.trace import Trace, check_trace
from cachekit.plans import Plan
from cachekit.policy import Policy

SPREADS = (None, 1.0, 0.5)
"""How early errors may count, see `Trace.carried`: alike, and less and less."""


ENOUGH = 100.0
"""dB that a sample counts at most."""


class Choice(NamedTuple):
    """A plan, and what was measured on the way to it."""

    plan: Plan
    measured: tuple[tuple[int, float], ...]  # computed steps and dB of PSNR of every run, in the order they were made
    at_least: float | None  # dB, where that was asked for

    def __str__(self) -> str:
        rows = [f"{self.plan}", "measured:" if self.at_least is None else f"measured, to keep {self.at_least:g} dB:"]
        rows += [f"  {computed:>3} computed  {quality:6.2f} dB" for computed, quality in self.measured]
        return "\n".join(rows)


def choose(
    trace: Trace,
    run: Callable[[Policy | None], Tensor],
    at_least: str | float | None = None,
    *,
    computed: int | None = None,
    peak: float | None = None,
    spreads: Sequence[float | None] = SPREADS,
    forecaster: Forecaster | None = None,
    site: str = "output",
    max_gap: int | None = None,
    always: Sequence[int] = (0,),
) -> Choice:
    """The plan with the fewest computed steps that keeps a quality, or the best one of so many, by a few real runs.

    How much of an error arrives in the samples a recording does not say. So of every number of computed steps there are
    several plans, each the best for another `Trace.carried`, and what they keep is measured. The number of computed
    steps is halved in on: some six numbers for 50 steps, each up to three runs, which cost as much as their plans.

    Args:
        trace: of an uncached run.
        run: `run(policy)` samples under a policy, or uncached for None, always from the same noise, and returns what
            is compared, [B, ...]: a tensor or a NumPy array.
        at_least: PSNR against the uncached samples that is to be kept, e.g. "40 dB"; the mean over the samples, of
            which none counts more than 100 dB, so that one that is equal does not hide the others. Samples that are not
            finite keep nothing.
        computed: how many steps compute, instead: of the plans for that many the one that keeps most.
        peak: range of the data; None for that of the uncached samples.
        spreads: for which to plan, instead of that of the trace; (None,) for one plan of each number of steps.
        forecaster, site, max_gap, always: as for `cachekit.plan`.

    Returns:
        The plan, and what was measured. Where even all steps but one do not keep it, the plan computes all.

    Raises:
        ArgumentError: `at_least` is no quality, no plan has as many steps as `computed`, not one of them is given, or
            the samples do not fit together.

    Example:
        >>> import torch, cachekit as ck
        >>> values = torch.stack([torch.linspace(1, 2, 10), torch.linspace(1, 2, 10) ** 2], -1)
        >>> def run(policy):
        ...     computed = [True] * 10 if policy is None else ck.deciders.plan(policy.decider, 10)
        ...     last, x = values[0], torch.zeros(1, 2)
        ...     for step in range(10):
        ...         last = values[step] if computed[step] else last
        ...         x = x + 0.1 * last
        ...     return x
        >>> choice = ck.choose(ck.Trace.of(values, 10), run, "30 dB", peak=2.0, forecaster=ck.forecasters.hold())
        >>> len(choice.plan.steps)
        8
    """
    if (at_least is None) == (computed is None):
        raise ArgumentError('Give one of `at_least`, e.g. "40 dB", and `computed`: what to choose by.')
    wanted = math.inf if at_least is None else _decibels(at_least)
    if not callable(run):
        raise ArgumentTypeError(f"`run` must be a function of a policy, got {type(run).__name__}.")
    if not isinstance(spreads, Sequence) or not spreads:
        raise ArgumentError(f"`spreads` must be a list of at least one, e.g. (None,), got {spreads!r}.")
    if peak is not None and not (isinstance(peak, (int, float)) and 0 < peak < math.inf):
        raise ArgumentError(f"`peak` must be positive, the range of the data, or None, got {peak!r}.")
    check_trace(trace)
    fronts = [
        frontier(trace.carried(spread), forecaster=forecaster, site=site, max_gap=max_gap, always=always)
        for spread in spreads
    ]
    # For every number of computed steps, the plans that differ.
    candidates = [tuple({plan.steps: plan for plan in plans}.values()) for plans in zip(*fronts, strict=True)]
    counts = [len(plans[0].steps) for plans in candidates]
    if computed is not None and (not isinstance(computed, int) or isinstance(computed, bool) or computed not in counts):
        raise ArgumentError(f"`computed` must be an int from {counts[0]} to {counts[-1]}, got {computed!r}.")
    reference = _samples(run(None))
    scale = peak if peak is not None else float(reference.max() - reference.min()) or 1.0
    measured: list[tuple[int, float]] = []

    def quality(plan: Plan) -> float:
        samples = _samples(run(planned(plan, forecaster=forecaster)))
        if samples.shape != reference.shape:
            raise ArgumentError(f"`run` returned {list(samples.shape)}, uncached {list(reference.shape)}.")
        kept = float(psnr(samples, reference, scale).clamp(max=ENOUGH).nan_to_num(-math.inf, neginf=-math.inf).mean())
        measured.append((len(plan.steps), kept))
        return kept

    if computed is not None:
        best = max(candidates[counts.index(computed)], key=quality)
        return Choice(best, tuple(measured), None)
    # The last one computes every step: it is what it is held against.
    low, high, enough = 0, len(candidates) - 1, candidates[-1][0]
    while low < high:
        middle = (low + high) // 2
        found = next((plan for plan in candidates[middle] if quality(plan) >= wanted), None)
        if found is None:
            low = middle + 1
        else:
            high, enough = middle, found
    return Choice(enough, tuple(measured), wanted)


def _samples(returned: Any) -> Tensor:
    """What `run` returned."""
    try:
        samples = torch.as_tensor(returned).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(f"`run` must return samples [B, ...], got {type(returned).__name__}.") from error
    if not samples.ndim or not samples.numel():
        raise ArgumentError(f"`run` must return samples [B, ...], got {list(samples.shape)}.")
    return samples


def psnr(samples: Tensor, reference: Tensor, peak: float) -> Tensor:
    """Peak signal-to-noise ratio of every sample, `10 log10(peak^2 / MSE)` in dB: [B] float64, infinite where equal.

    Args:
        samples, reference: [B, ...] of equal shape.
        peak: range of the data.
    """
    error = (samples.double() - reference.double()).square().reshape(len(reference), -1).mean(1)
    return 10 * torch.log10(peak**2 / error)


def _decibels(at_least: Any) -> float:
    try:
        quality = float(at_least.lower().removesuffix("db")) if isinstance(at_least, str) else float(at_least)
        if math.isnan(quality) or isinstance(at_least, bool):
            raise ValueError(at_least)
        return quality
    except (ValueError, TypeError) as error:
        raise ArgumentError(f'`at_least` must be a quality in dB, e.g. "40 dB", got {at_least!r}.') from error
