"""TaylorSeer: what modules return follows a smooth path, so it can be extrapolated.

Source: TaylorSeer, arXiv 2503.06923 (https://github.com/Shenyi-Z/TaylorSeer), and the hooks of diffusers.

Departures: attention and feed-forward networks are found by what they do, where the hooks of diffusers go by names and
match nothing on models that call theirs `attn1`. A block that runs both side by side into one projection, as the single
blocks of FLUX do, has no feed-forward module: there attention alone is left out, unless the projection is named in
`sites`. `basis="newton"` is no part of the paper.
"""

from __future__ import annotations

import torch

from cachekit import deciders, forecasters
from cachekit.errors import ArgumentError
from cachekit.methods._first_block import check_semantics
from cachekit.policy import Policy

BASES = {"taylor": forecasters.taylor, "newton": forecasters.newton}


def taylorseer(
    interval: int = 5,
    *,
    warmup: int = 3,
    cooldown_after: int | None = None,
    order: int = 1,
    basis: str = "taylor",
    dtype: torch.dtype | None = None,
    sites: str | tuple[str, ...] | None = None,
    semantics: str = "paper",
) -> Policy:
    """Compute every `interval`-th step and extrapolate what the modules return in between.

    Args:
        interval: steps from one computed step to the next, >= 1.
        warmup: steps that compute at the start. Under "paper" the last of them is followed by `interval - 1`
            reused steps, under "diffusers" one more step computes first.
        cooldown_after: from this step on every step computes; None for no such step.
        order: of the extrapolation, >= 0; order + 1 tensors of state a site.
        basis: "taylor", the published sum, or "newton", exact on polynomials of this order on any spacing.
        dtype: storage type of the state; None for that of the values under "paper", bfloat16 under "diffusers".
        sites: "attention+mlp", "attention", "mlp"; "chain" for the residual of every chain of blocks, a fraction of
            the state; "output" for what the model returns, one tensor of state an order; or a tuple of patterns of
            module names. None for "attention+mlp" under "paper", "attention" under "diffusers".
        semantics: "paper" or "diffusers", whose hooks place the computed steps otherwise.

    Raises:
        ArgumentError, ArgumentTypeError: a value is out of range.

    Example:
        >>> import cachekit as ck
        >>> ck.deciders.plan(ck.taylorseer(4, warmup=2).decider, 10)
        (True, True, False, False, False, True, False, False, False, True)
        >>> ck.deciders.plan(ck.taylorseer(4, warmup=2, semantics="diffusers").decider, 10)
        (True, True, False, True, False, False, False, True, False, False)
    """
    check_semantics(semantics)
    if not isinstance(basis, str) or basis not in BASES:
        raise ArgumentError(f"`basis` must be one of {tuple(BASES)}, got {basis!r}.")
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ArgumentError(f"`interval` must be an int >= 1, got {interval!r}. 1 computes every step.")
    theirs = semantics == "diffusers"
    if sites is None:
        sites = "attention" if theirs else "attention+mlp"
    if dtype is None and theirs:
        dtype = torch.bfloat16
    offset = 1 if theirs else -1
    decider = deciders.interval(interval, warmup=warmup, offset=offset, cooldown_after=cooldown_after)
    forecaster = BASES[basis](order, dtype=dtype)
    shown = sites if isinstance(sites, str) else "by name"
    return Policy(
        name=f"taylorseer({interval}, {forecaster.name}, {shown})", decider=decider, forecaster=forecaster, sites=sites
    )
