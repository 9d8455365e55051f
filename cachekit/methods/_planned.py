"""A plan that was found on a recording, as a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cachekit import deciders, forecasters
from cachekit.deciders import Decider
from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.forecasters import Forecaster
from cachekit.methods._first_block import check_forecaster
from cachekit.plans import Plan
from cachekit.policy import Policy

MADE_FOR = ("scheduler", "guidance", "true_cfg_scale", "streams")
"""What of the notes of a recording is compared, where it is known."""


def planned(
    plan: Plan, *, forecaster: Forecaster | None = None, scheduler: str | None = None, guidance: float | None = None
) -> Policy:
    """Compute the steps of a plan. Nothing is measured: no probe, no read from the device, two programs.

    Args:
        plan: from `cachekit.plan`, `cachekit.choose` or `Plan.load`.
        forecaster: what stands in between; None for that of the plan.
        scheduler, guidance: what it is used with, where that is to be compared with what was recorded. A pipeline is
            asked by itself.

    Raises:
        ArgumentTypeError: `plan` is no plan.
        ArgumentError: the plan was made for another scheduler or guidance; and at `init`, for another number of steps
            or other timesteps: plan with `timesteps=..., resample=True` then.

    Example:
        >>> import torch, cachekit as ck
        >>> trace = ck.Trace.of([torch.tensor([float(step**2)]) for step in range(8)], 8)
        >>> policy = ck.planned(ck.plan(trace, computed=4))
        >>> policy.static, policy.name
        (True, 'planned(4 of 8, newton 1 repaid, output)')
    """
    if not isinstance(plan, Plan):
        raise ArgumentTypeError(f"`plan` must be a Plan, got {type(plan).__name__}. Plan.load reads one.")
    if not plan.computed or not plan.computed[0] or plan.site not in ("output", "chain"):
        raise ArgumentError("`plan` must compute step 0, and its site must be 'output' or 'chain'.")
    if plan.kinds:
        raise ArgumentError("`plan` has a plan for each kind of module. Give one for the output or for chains.")
    check_forecaster(forecaster)
    made_for = {name: plan.notes[name] for name in MADE_FOR if name in plan.notes}
    check_made_for(made_for, scheduler=scheduler, guidance=guidance)
    made = forecaster or forecasters.named(plan.forecaster)
    return Policy(
        name=f"planned({len(plan.steps)} of {len(plan)}, {made.name}, {plan.site})",
        decider=_decider(plan),
        forecaster=made,
        sites=plan.site,
        made_for=made_for,
    )


def check_made_for(made_for: Mapping[str, str], **used: Any) -> None:
    """Refuse another scheduler or guidance than a plan was recorded with, where both are known."""
    for name, given in used.items():
        noted = made_for.get(name)
        if given is not None and noted is not None and not _same(str(given), noted):
            raise ArgumentError(f"`{name}` is {given!r}, and the plan was made for {noted!r}. Record a trace with it.")


def _decider(plan: Plan) -> Decider:
    mask, times = deciders.mask(plan.computed), torch.tensor(plan.timesteps, dtype=torch.float64)

    def init(timesteps: Tensor):
        if len(timesteps) != len(plan):
            raise ArgumentError(
                f"The plan is for {len(plan)} steps, the trajectory has {len(timesteps)}. Plan for these: "
                "cachekit.plan(trace, timesteps=..., resample=True)."
            )
        if len(times) and not bool(timesteps.isnan().any()):
            off = (timesteps - times).abs()
            # A tenth of a step: what a scheduler rounds is no other trajectory.
            apart = times.diff().abs().mean().item() if len(times) > 1 else math.inf
            if bool((off > 0.1 * apart).any()):
                step = int(off.argmax())
                raise ArgumentError(
                    f"The plan is for timestep {times[step]:g} at step {step}, the trajectory has "
                    f"{timesteps[step]:g}. Plan for these: cachekit.plan(trace, timesteps=..., resample=True)."
                )
        return mask.init(timesteps)

    return mask._replace(name=f"plan of {len(plan.steps)} of {len(plan)} steps", init=init)


def _same(given: str, noted: str) -> bool:
    try:
        return float(given) == float(noted)
    except ValueError:
        return given == noted
