"""The closed loop: how few steps are enough, by real runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.forecasters import Forecaster
from cachekit.methods._planned import planned
from cachekit.planning.planner import frontier
from cachekit.planning.trace import Trace
from cachekit.plans import Plan
from cachekit.policy import Policy


class Choice(NamedTuple):
    """A plan, and what was measured on the way to it."""

    plan: Plan
    measured: tuple[tuple[int, float], ...]  # computed steps and dB of PSNR of every run, in the order they were made
    at_least: float  # dB

    def __str__(self) -> str:
        rows = [f"{self.plan}", f"measured, to keep {self.at_least:g} dB:"]
        rows += [f"  {computed:>3} computed  {quality:6.2f} dB" for computed, quality in self.measured]
        return "\n".join(rows)


def choose(
    trace: Trace,
    run: Callable[[Policy | None], Tensor],
    at_least: str | float = "40 dB",
    *,
    peak: float | None = None,
    forecaster: Forecaster | None = None,
    site: str = "output",
    max_gap: int | None = None,
    always: Sequence[int] = (0,),
) -> Choice:
    """The plan with the fewest computed steps that keeps a quality, by a few real runs.

    The number of computed steps is halved in on: some six runs for 50 steps. Each costs as much as its plan.

    Args:
        trace: of an uncached run.
        run: `run(policy)` samples under a policy, or uncached for None, always from the same noise, and returns what
            is compared, [B, ...].
        at_least: PSNR against the uncached samples that is to be kept, e.g. "40 dB"; the mean over the samples.
        peak: range of the data; None for that of the uncached samples.
        forecaster, site, max_gap, always: as for `cachekit.plan`.

    Returns:
        The plan, and what was measured. Where even all steps but one do not keep it, the plan computes all.

    Raises:
        ArgumentError: `at_least` is no quality, or the samples do not fit together.

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
    wanted = _decibels(at_least)
    if not callable(run):
        raise ArgumentTypeError(f"`run` must be a function of a policy, got {type(run).__name__}.")
    plans = frontier(trace, forecaster=forecaster, site=site, max_gap=max_gap, always=always)
    reference = run(None).detach()
    scale = peak if peak is not None else float(reference.max() - reference.min()) or 1.0
    measured: list[tuple[int, float]] = []

    def enough(plan: Plan) -> bool:
        samples = run(planned(plan, forecaster=forecaster)).detach()
        if samples.shape != reference.shape:
            raise ArgumentError(f"`run` returned {list(samples.shape)}, uncached {list(reference.shape)}.")
        quality = float(psnr(samples, reference, scale).mean())
        measured.append((len(plan.steps), quality))
        return quality >= wanted

    # The last one computes every step: it is what it is held against.
    low, high = 0, len(plans) - 1
    while low < high:
        middle = (low + high) // 2
        if enough(plans[middle]):
            high = middle
        else:
            low = middle + 1
    return Choice(plans[low], tuple(measured), wanted)


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
        return float(at_least.lower().removesuffix("db")) if isinstance(at_least, str) else float(at_least)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f'`at_least` must be a quality in dB, e.g. "40 dB", got {at_least!r}.') from error
