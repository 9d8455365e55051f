"""What the demo runs: every method of the guide at a few settings, and fewer steps to hold them against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import cachekit as ck

UNCACHED = "uncached"
FEWER = "fewer steps"
PLANNED = "planned"
CHOSEN = "chosen"
PLANS = (PLANNED, CHOSEN)


class Setting(NamedTuple):
    """One line of the table: how to sample."""

    group: str  # the method
    detail: str  # its parameters, for people
    steps: int  # Euler steps
    policy: ck.Policy | None = None  # None runs the model as it is
    forecast: bool = False  # whether reused residuals are extrapolated, not repeated

    @property
    def label(self) -> str:
        """Method and parameters."""
        return f"{self.group} {self.detail}"

    @property
    def series(self) -> str:
        """Method, forecaster and place: settings of one series differ by numbers alone."""
        if self.policy is None or not self.forecast or self.group in PLANS:
            return self.group
        place = f", {self.policy.sites}" if self.policy.sites == "output" else ""
        return f"{self.group} + {self.policy.forecaster.name}{place}"

    @property
    def partial(self) -> bool:
        """Whether a step that is not computed still runs what is neither attention nor feed-forward network."""
        return self.policy is not None and self.policy.sites not in ("chain", "output")


def counts_of(steps: int, short: bool = False) -> list[int]:
    """Numbers of computed steps that are planned for."""
    shares = (0.4, 0.2) if short else (0.5, 0.38, 0.26, 0.2)
    return list(dict.fromkeys(round(share * steps) for share in shares))


def settings(steps: int, trace: ck.Trace, chosen: Mapping[int, ck.Plan], short: bool = False) -> list[Setting]:
    """All settings of a run of `steps` steps, in the order of the table; a few of them for a `short` one.

    The ratios of MagCache and the plans are from the trace of another run, `chosen` by number of computed steps. One
    that is the plan from the recording alone, as it often is, is left out: it would be the same row twice.

    The parameters are chosen for the shipped weights at 50 steps: about 3/5, 2/5 and 1/4 of the steps compute.
    """
    newton, taylor = ck.forecasters.newton(1), ck.forecasters.taylor(1)
    ratios, frontier = trace.mag_ratios(), ck.frontier(trace)
    plans = {count: frontier[count - 1] for count in counts_of(steps, short)}
    others = {count: plan for count, plan in chosen.items() if count not in plans or not _same(plan, plans[count])}
    # Up to 7/10, so that also the careful settings have a run to be held against.
    shares = (0.7, 0.4, 0.2) if short else (0.7, 0.5, 0.4, 0.3, 0.2)
    thresholds = (0.12,) if short else (0.12, 0.16)
    first = [(threshold, None) for threshold in thresholds] + [(threshold, newton) for threshold in thresholds[-1:]]
    budgets = ((0.06, 2, None), (0.06, 2, taylor))
    if not short:
        budgets = ((0.06, 2, None), (0.12, 4, None), (0.06, 2, taylor))
    intervals = (3,) if short else (3, 5)
    broadcasts = ((2, None),) if short else ((2, 4),)
    # No paper has these: parts of two methods, put together.
    probe = ck.first_block_cache(0.16, forecaster=newton)
    budget = ck.mag_cache(ratios, threshold=0.06, max_skips=2, retention=0, forecaster=newton)
    combinations = (
        ("drift 0.16 + newton 1, attention+mlp", dataclasses.replace(probe, sites="attention+mlp")),
        ("budget 0.06 + newton 1, output", dataclasses.replace(budget, sites="output")),
    )
    return [
        Setting(UNCACHED, f"{steps} steps", steps),
        *(Setting(FEWER, f"{round(share * steps)}", round(share * steps)) for share in shares),
        *(
            Setting(
                "first_block_cache",
                _detail(f"{threshold:g}", forecaster),
                steps,
                ck.first_block_cache(threshold, forecaster=forecaster),
                forecaster is not None,
            )
            for threshold, forecaster in first
        ),
        *(
            Setting(
                "mag_cache",
                _detail(f"{threshold:g} (≤ {skips} skips)", forecaster),
                steps,
                # No retention: to compute all of the start costs more here than it gains.
                ck.mag_cache(ratios, threshold=threshold, max_skips=skips, retention=0, forecaster=forecaster),
                forecaster is not None,
            )
            for threshold, skips, forecaster in budgets
        ),
        *(
            Setting(
                "step_mask",
                _detail(f"every {interval}", forecaster),
                steps,
                ck.step_mask([step % interval == 0 for step in range(steps)], forecaster=forecaster),
                forecaster is not None,
            )
            for interval, forecaster in ((intervals[-1], None), *((interval, taylor) for interval in intervals))
        ),
        *(
            Setting(
                "step_mask",
                _detail(f"every {interval}", taylor) + ", output",
                steps,
                ck.step_mask([step % interval == 0 for step in range(steps)], forecaster=taylor, sites="output"),
                True,
            )
            for interval in intervals[-1:]
        ),
        *(
            Setting("taylorseer", f"every {interval} + taylor 1", steps, ck.taylorseer(interval, warmup=2), True)
            for interval in intervals[-2:]
        ),
        *(
            Setting(
                "pyramid_attention_broadcast",
                f"{spatial}" + (f" (cross {cross})" if cross else ""),
                steps,
                ck.pyramid_attention_broadcast(spatial, cross=cross),
            )
            for spatial, cross in broadcasts
        ),
        Setting("faster_cache", "2 (uncond 5)", steps, ck.faster_cache(cfg="separate", layout="BCFHW"), True),
        *(Setting("combination", detail, steps, policy, True) for detail, policy in combinations),
        *(
            Setting(group, f"{count} + {plan.forecaster}, {plan.site}", steps, ck.planned(plan), True)
            for group, made in ((PLANNED, plans), (CHOSEN, others))
            for count, plan in made.items()
        ),
    ]


def _same(plan: ck.Plan, other: ck.Plan) -> bool:
    """Whether two plans run alike; what was predicted of them may differ."""
    return (plan.computed, plan.forecaster, plan.site) == (other.computed, other.forecaster, other.site)


def _detail(parameters: str, forecaster: ck.forecasters.Forecaster | None) -> str:
    return f"{parameters} + {forecaster.name}" if forecaster else parameters
