"""The closed loop: which plan is best, and how few steps are enough, by real runs."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.forecasters import Forecaster
from cachekit.methods._planned import planned
from cachekit.planning.planner import computing, frontier
from cachekit.planning.trace import Trace, check_trace
from cachekit.plans import Plan
from cachekit.policy import Policy

SPREADS = (None, 1.0, 0.5)
"""How early errors may count, see `Trace.carried`: alike, and less and less."""

INTERVALS = 2
"""How many even intervals are tried: the shortest with so few computed steps, and those that leave more for the end."""

FAR = 2
"""How many steps a computed step is moved at most, of a plan that is refined."""

ENOUGH = 100.0
"""dB that a sample counts at most."""

SURE = 1.7
"""Standard errors that the gain of a move must have: twenty samples that gain nothing do so one time in twenty."""


class Choice(NamedTuple):
    """A plan, and what was measured on the way to it."""

    plan: Plan
    measured: tuple[tuple[Plan, float], ...]  # of every run, in the order they were made, what it kept: dB of PSNR
    at_least: float | None  # dB, where that was asked for
    origins: tuple[str, ...]  # of every run, where its plan came from

    def __str__(self) -> str:
        rows = [f"{self.plan}", "measured:" if self.at_least is None else f"measured, to keep {self.at_least:g} dB:"]
        for (plan, quality), origin in zip(self.measured, self.origins, strict=True):
            rows.append(f"  {len(plan.steps):>3} computed  {quality:6.2f} dB  {origin}")
        return "\n".join(rows)


def choose(
    trace: Trace,
    run: Callable[[Policy | None], Tensor],
    at_least: str | float | None = None,
    *,
    computed: int | None = None,
    peak: float | None = None,
    spreads: Sequence[float | None] = SPREADS,
    even: bool = True,
    refine: int = 0,
    forecaster: Forecaster | None = None,
    site: str = "output",
    max_gap: int | None = None,
    always: Sequence[int] = (0,),
) -> Choice:
    """The plan with the fewest computed steps that keeps a quality, or the best one of so many, by a few real runs.

    How much of an error arrives in the samples a recording does not say, and where few steps compute the loop goes
    elsewhere than it did. So of every number of computed steps there are several candidates, and what they keep is
    measured: the best plans for several `Trace.carried`, and even intervals that end in a row of computed steps. The
    number of computed steps is halved in on: some six numbers for 50 steps, each up to five runs, which cost as much as
    their plans. More runs then make the best of them better, one moved step at a time.

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
        even: whether even intervals are tried as well.
        refine: how many more runs to make, each of the best plan so far with one computed step moved by one or two, in
            the order of predicted errors; what keeps more is the best from there on. Of several samples a gain counts
            that is over 1.7 standard errors, of one sample any: give some twenty. With `at_least` the runs are spent on
            still fewer steps.
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
    if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
        raise ArgumentError(f"`refine` must be an int >= 0, a number of runs, got {refine!r}.")
    check_trace(trace)
    plans = _Plans(trace, spreads, even, forecaster, site, max_gap, always)
    counts = plans.counts
    if computed is not None and (not isinstance(computed, int) or isinstance(computed, bool) or computed not in counts):
        raise ArgumentError(f"`computed` must be an int from {counts[0]} to {counts[-1]}, got {computed!r}.")
    runs = _Runs(run, peak, forecaster)
    if computed is not None:
        best = runs.best(plans.of(computed))
        best = runs.refined(best, plans, most=len(runs.measured) + refine)
        return Choice(best, tuple(runs.measured), None, plans.origins(runs.measured))
    # The last one computes every step: it is what it is held against.
    low, high, enough = 0, len(counts) - 1, plans.of(counts[-1])[0]
    while low < high:
        middle = (low + high) // 2
        found = next((plan for plan in plans.of(counts[middle]) if runs.kept(plan) >= wanted), None)
        if found is None:
            low = middle + 1
        else:
            high, enough = middle, found
    most = len(runs.measured) + refine
    while high > 0 and len(runs.measured) < most:
        high -= 1
        found = runs.refined(runs.best(plans.of(counts[high]), most), plans, most, wanted)
        if runs.kept(found) < wanted:
            break
        enough = found
    return Choice(enough, tuple(runs.measured), wanted, plans.origins(runs.measured))


class _Plans:
    """The plans that may be run."""

    def __init__(
        self,
        trace: Trace,
        spreads: Sequence[float | None],
        even: bool,
        forecaster: Forecaster | None,
        site: str,
        max_gap: int | None,
        always: Sequence[int],
    ) -> None:
        fronts = [
            frontier(trace.carried(spread), forecaster=forecaster, site=site, max_gap=max_gap, always=always)
            for spread in spreads
        ]
        self.counts = [len(plan.steps) for plan in fronts[0]]
        self._origin: dict[tuple[int, ...], str] = {}
        for spread, front in zip(spreads, fronts, strict=True):
            name = "planned" if spread is None else f"planned, spread {spread:g}"
            self._origin |= {plan.steps: name for plan in front if plan.steps not in self._origin}
        self._best = {len(plans[0].steps): [plan.steps for plan in plans] for plans in zip(*fronts, strict=True)}
        self._even = even
        self._plan = functools.cache(lambda nodes: computing(trace, nodes, forecaster=forecaster, site=site))
        self._steps, self._longest, self._forced = len(trace), max_gap, {0, *always}

    def of(self, count: int) -> tuple[Plan, ...]:
        """Of so many computed steps, those that differ; each with the error that the trace itself predicts."""
        even = [*filter(self._fits, _even(self._steps, count))] if self._even else []
        for nodes in even:
            self._origin.setdefault(nodes, f"even, every {nodes[1] if len(nodes) > 1 else self._steps}")
        return tuple(map(self._plan, dict.fromkeys((*self._best[count], *even))))

    def origins(self, measured: Sequence[tuple[Plan, float]]) -> tuple[str, ...]:
        """Where plans come from: those that are in no list are others with a step moved."""
        return tuple(self._origin.get(plan.steps, "refined") for plan, _ in measured)

    def near(self, plan: Plan) -> list[Plan]:
        """The plan with one step moved, by predicted error."""
        moved = (
            tuple(sorted({*plan.steps, step + by} - {step}))
            for step in plan.steps
            for by in range(-FAR, FAR + 1)
            if 0 < step + by < self._steps and step + by not in plan.steps
        )
        return sorted(map(self._plan, filter(self._fits, moved)), key=lambda each: each.error or 0.0)

    def _fits(self, nodes: tuple[int, ...]) -> bool:
        longest = max(end - node - 1 for node, end in itertools.pairwise((*nodes, self._steps)))
        return self._forced <= {*nodes} and (self._longest is None or longest <= self._longest)


def _even(steps: int, count: int) -> Iterator[tuple[int, ...]]:
    """So many steps: every n-th from step 0 on, then a row of them up to the last."""
    shortest = next(interval for interval in range(1, steps + 1) if len(range(0, steps, interval)) <= count)
    for interval in range(shortest, min(shortest + INTERVALS, steps + 1)):
        # As the row gets longer by a step there is one more of them, or as many.
        rows = (tuple(sorted({*range(0, start, interval), *range(start, steps)})) for start in range(steps, 0, -1))
        yield next(nodes for nodes in rows if len(nodes) == count)


class _Runs:
    """Real runs, and what the plans of them keep."""

    def __init__(
        self, run: Callable[[Policy | None], Tensor], peak: float | None, forecaster: Forecaster | None
    ) -> None:
        self.measured: list[tuple[Plan, float]] = []
        self._run, self._forecaster = run, forecaster
        self._reference = _samples(run(None))
        if not bool(self._reference.isfinite().all()):
            raise ArgumentError("`run` returned samples that are not finite without a cache: nothing to compare with.")
        self._peak = peak if peak is not None else float(self._reference.max() - self._reference.min()) or 1.0
        self._kept: dict[tuple[int, ...], Tensor] = {}  # steps -> dB of every sample

    def kept(self, plan: Plan) -> float:
        """PSNR in dB, by a run if there was none of it yet."""
        if plan.steps not in self._kept:
            samples = _samples(self._run(planned(plan, forecaster=self._forecaster)))
            if samples.shape != self._reference.shape:
                raise ArgumentError(f"`run` returned {list(samples.shape)}, uncached {list(self._reference.shape)}.")
            each = psnr(samples, self._reference, self._peak).clamp(max=ENOUGH)
            self._kept[plan.steps] = each.nan_to_num(-math.inf, neginf=-math.inf)
            self.measured.append((plan, float(self._kept[plan.steps].mean())))
        return float(self._kept[plan.steps].mean())

    def surely_more(self, plan: Plan, than: Plan) -> bool:
        """Whether a plan keeps more than another, and not by the chance of a few samples."""
        if not self.kept(plan) > self.kept(than):
            return False
        gains = self._kept[plan.steps] - self._kept[than.steps]
        return len(gains) == 1 or not float(gains.mean()) <= SURE * float(gains.std()) / math.sqrt(len(gains))

    def best(self, plans: Sequence[Plan], most: float = math.inf) -> Plan:
        """The plan that keeps most, of those that `most` runs in all leave time for; the first in any case."""
        may_run = (p for n, p in enumerate(plans) if not n or p.steps in self._kept or len(self.measured) < most)
        return max(may_run, key=self.kept)

    def refined(self, best: Plan, plans: _Plans, most: int, wanted: float = math.inf) -> Plan:
        """A plan that keeps more, or as much as is wanted, found by moving one step at a time."""
        while len(self.measured) < most and self.kept(best) < min(wanted, ENOUGH):
            near = next((plan for plan in plans.near(best) if plan.steps not in self._kept), None)
            if near is None:
                break
            if self.kept(near) >= wanted or self.surely_more(near, best):
                best = near
        return best


def _samples(returned: Any) -> Tensor:
    """What `run` returned, as float64: a copy, for `run` may write where it wrote before."""
    try:
        samples = torch.as_tensor(returned).detach()
        if samples.dtype is torch.bool or samples.is_complex():
            raise TypeError(f"{samples.dtype} is no real number")
        samples = samples.to(device="cpu", dtype=torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"`run` must return samples [B, ...], numbers, got {type(returned).__name__}: {error}."
        ) from error
    if samples.layout is not torch.strided or not samples.ndim or not samples.numel():
        raise ArgumentError(f"`run` must return samples [B, ...], dense, got {list(samples.shape)}, {samples.layout}.")
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
        if math.isnan(quality) or isinstance(at_least, bool) or quality <= 0:
            raise ValueError(at_least)
        return quality
    except (ValueError, TypeError) as error:
        raise ArgumentError(
            f'`at_least` must be a quality in dB, above 0, e.g. "40 dB", got {at_least!r}. At 0 dB the error is as '
            "large as the range of the data."
        ) from error
