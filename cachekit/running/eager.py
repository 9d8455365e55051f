"""A step as it is, decided on the way, on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cachekit.deciders import Moment
from cachekit.errors import StructureError
from cachekit.running.frames import EAGER, check_reached
from cachekit.running.outputs import unconditional
from cachekit.running.sites import run_framed
from cachekit.signals import numbers
from cachekit.state import State
from cachekit.structure.layout import Layout

if TYPE_CHECKING:
    from cachekit.transform import CachedStep


def run(
    step: CachedStep, layout: Layout, state: State, moment: Moment, args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, State]:
    """One step."""
    step.opened.tell()
    frame = step.frame(EAGER, layout, state.sites, state.reference, step.clock(state))
    if step.policy.static:
        frame["compute"] = step.planned(state, moment.step)
    frame["decide"] = lambda sums: step.verdict(state, moment._replace(signal=numbers(torch.stack(sums))))
    try:
        out = run_framed(frame, step.shadow, args, kwargs)
        check_reached(frame)
    except StructureError:
        step.opened.forget()  # so that a new state, which the message asks for, is of a new record
        raise
    computed = all(frame["compute"].values())
    if frame["sums"] is not None:
        moment = moment._replace(signal=numbers(torch.stack(frame["sums"])))
    return out, step.advance(state, moment, computed, frame["updated"], frame["residual"])


def uncond(
    step: CachedStep, layout: Layout, state: State, full: dict[str, bool], now: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The unconditional call of a step."""
    frame = step.frame(EAGER, layout, state.sites, (), now)
    frame["compute"] = full
    return unconditional(frame, step.opened.original, args, kwargs), frame["updated"]
