"""Deciders made of deciders."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cachekit.deciders._decider import Decider, Moment, Number, check_number, where
from cachekit.errors import ArgumentError, ArgumentTypeError


class SkipsState(NamedTuple):
    """State of `max_skips`."""

    skips: Number  # [] int64, reuses since the last computed step
    inner: Any  # state of the wrapped decider


torch.serialization.add_safe_globals([SkipsState])


def always() -> Decider:
    """Compute every step."""
    return Decider(
        name="always compute",
        init=lambda timesteps: (),
        decide=lambda state, now: now.step >= 0,
        update=lambda state, now, computed: state,
        static=True,
    )


def warmup(steps: int, decider: Decider) -> Decider:
    """Compute the first `steps` steps, then do as `decider` says.

    Example:
        >>> import cachekit as ck
        >>> ck.deciders.plan(ck.deciders.warmup(2, ck.deciders.mask([0, 0, 0, 1])), 4)
        (True, True, False, True)
    """
    _count("warmup", steps)
    _decider("warmup", decider)
    return decider._replace(
        name=f"{decider.name}, after {steps} steps",
        decide=lambda state, now: (now.step < steps) | decider.decide(state, now),
    )


def max_skips(skips: int, decider: Decider) -> Decider:
    """Do as `decider` says, but reuse at most `skips` steps in a row; 0 never reuses.

    Example:
        >>> import cachekit as ck
        >>> ck.deciders.plan(ck.deciders.max_skips(1, ck.deciders.mask([1, 0, 0, 0])), 4)
        (True, False, True, False)
    """
    _count("max_skips", skips)
    _decider("max_skips", decider)

    def update(state: SkipsState, now: Moment, computed) -> SkipsState:
        return SkipsState(
            skips=where(computed, state.skips * 0, state.skips + 1),
            inner=decider.update(state.inner, now, computed),
        )

    return Decider(
        name=f"{decider.name}, at most {skips} in a row",
        init=lambda timesteps: SkipsState(skips=torch.zeros((), dtype=torch.int64), inner=decider.init(timesteps)),
        decide=lambda state, now: (state.skips >= skips) | decider.decide(state.inner, now),
        update=update,
        static=decider.static,
    )


def within(low: float, high: float, decider: Decider) -> Decider:
    """Reuse only while `low < timestep < high`, open on both ends; compute outside.

    Needs the values of the timesteps at `init`, not only their number, on the scale of the range.

    Raises:
        ArgumentError, ArgumentTypeError: the ends are no numbers, or the wrong way round; at `init`, the range is one
            of 0..1000 and the timesteps are not.
    """
    check_number("low", low)
    check_number("high", high)
    if not low < high:
        raise ArgumentError(f"`low` must be below `high`, got ({low!r}, {high!r}). Swap them.")
    _decider("within", decider)

    def init(timesteps):
        if bool(timesteps.isnan().any()):
            raise ArgumentError(
                f"`timesteps` must hold the values for `within({low:g}, {high:g})`, got only their number "
                f"{len(timesteps)}. Pass the scheduler's timesteps to init."
            )
        most = float(timesteps.abs().max())
        if timesteps[0] != timesteps[-1] and most < 2 < high <= 1000:  # 0..1, angles, logarithms
            raise ArgumentError(
                f"`timesteps` go from {float(timesteps[0]):g} to {float(timesteps[-1]):g}, and the range "
                f"({low:g}, {high:g}) is one of 0..1000, where 1000 is noise. Pass the share of noise on that scale to "
                "init, e.g. 1000 * timesteps where they are 0..1, or give a range on theirs. A pipeline under "
                "cachekit.diffusers does the first by itself."
            )
        return decider.init(timesteps)

    def decide(state, now: Moment):
        inside = (now.timestep > low) & (now.timestep < high)
        return (inside == False) | decider.decide(state, now)  # noqa: E712

    return decider._replace(name=f"{decider.name}, within ({low:g}, {high:g})", init=init, decide=decide)


def any_of(*deciders: Decider) -> Decider:
    """Compute if any of `deciders` says so. Each is told the common verdict."""
    if not deciders:
        raise ArgumentError("`deciders` is empty. Give any_of at least one decider.")
    for decider in deciders:
        _decider("any_of", decider)

    def decide(state: tuple, now: Moment):
        verdict = deciders[0].decide(state[0], now)
        for decider, inner in zip(deciders[1:], state[1:], strict=True):
            verdict = verdict | decider.decide(inner, now)
        return verdict

    def update(state: tuple, now: Moment, computed) -> tuple:
        pairs = zip(deciders, state, strict=True)
        return tuple(decider.update(inner, now, computed) for decider, inner in pairs)

    return Decider(
        name=" or ".join(decider.name for decider in deciders),
        init=lambda timesteps: tuple(decider.init(timesteps) for decider in deciders),
        decide=decide,
        update=update,
        static=all(decider.static for decider in deciders),
    )


def _count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ArgumentError(f"`{name}` must be an int >= 0, got {value!r}. It counts steps.")


def _decider(name: str, value: Decider) -> None:
    if not isinstance(value, Decider):
        raise ArgumentTypeError(
            f"`decider` of {name} must be a Decider, got {type(value).__name__}. Use a factory of cachekit.deciders."
        )
