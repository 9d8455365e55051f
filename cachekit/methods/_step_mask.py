"""A given compute/skip mask, as step-caching masks of cache-dit ("SCM") or a plan found elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cachekit import deciders, forecasters
from cachekit.forecasters import Forecaster
from cachekit.methods._first_block import check_forecaster
from cachekit.policy import Policy


def step_mask(mask: Sequence[bool] | Tensor, *, forecaster: Forecaster | None = None, sites: str = "chain") -> Policy:
    """Compute at step s iff `mask[s]`; on the others forecast the residual of every chain, or the model's output.

    Step 0 computes whatever the mask says.

    Args:
        mask: one bool a step, True to compute, at least as long as the trajectory.
        forecaster: what to return instead; None repeats the last value.
        sites: "chain" forecasts the residual of every chain of blocks and runs the rest of the model; "output"
            forecasts what the model returns, and nothing of it runs.

    Raises:
        ArgumentError, ArgumentTypeError: the mask is empty, holds no bools, or is shorter than the trajectory.

    Example:
        >>> import cachekit as ck
        >>> ck.step_mask([1, 0, 0, 1, 0, 0], forecaster=ck.forecasters.taylor(1)).name
        'step_mask(2 of 6, taylor 1)'
    """
    check_forecaster(forecaster)
    decider = deciders.mask(mask)
    forecaster = forecaster or forecasters.hold()
    computed = sum(bool(entry) for entry in mask)
    return Policy(
        name=f"step_mask({computed} of {len(mask)}, {forecaster.name}{', output' if sites == 'output' else ''})",
        decider=decider,
        forecaster=forecaster,
        sites=sites,
    )
