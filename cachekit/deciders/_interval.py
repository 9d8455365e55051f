"""Compute at regular intervals."""

from __future__ import annotations

from cachekit.deciders._decider import Decider
from cachekit.errors import ArgumentError


def interval(every: int, *, warmup: int = 0, offset: int = 0, cooldown_after: int | None = None) -> Decider:
    """Compute every `every`-th step, counted from step `warmup + offset`.

    Args:
        every: >= 1; 1 never reuses.
        warmup: so many steps compute at the start.
        offset: moves the computed steps after the warm-up.
        cooldown_after: from this step on every step computes; None for no such step.

    Raises:
        ArgumentError: `every` is below 1, `warmup` or `cooldown_after` negative, or one of them no int.

    Example:
        >>> import cachekit as ck
        >>> ck.deciders.plan(ck.deciders.interval(3, warmup=2, cooldown_after=7), 8)
        (True, True, True, False, False, True, False, True)
    """
    for name, value, least in (("every", every, 1), ("warmup", warmup, 0), ("cooldown_after", cooldown_after, 0)):
        if name == "cooldown_after" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"`{name}` must be an int >= {least}, got {value!r}. It counts steps.")
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise ArgumentError(f"`offset` must be an int, got {offset!r}. It counts steps.")

    def decide(state, now):
        verdict = (now.step < warmup) | ((now.step - warmup - offset) % every == 0)
        return verdict if cooldown_after is None else verdict | (now.step >= cooldown_after)

    name = f"every {every}"
    if warmup:
        name += f", after {warmup} steps"
    if cooldown_after is not None:
        name += f", until step {cooldown_after}"
    return Decider(
        name=name,
        init=lambda timesteps: (),
        decide=decide,
        update=lambda state, now, computed: state,
        static=True,
    )
