"""A step as one graph that decides inside: under `torch.compile(step, fullgraph=True)` and `torch.export`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from cachekit.deciders import Moment, Sums
from cachekit.deciders._decider import ratio, take
from cachekit.errors import ArgumentError
from cachekit.guidance import GUIDANCE, Answered
from cachekit.running.frames import GRAPH, check_reached
from cachekit.running.outputs import unconditional
from cachekit.running.sites import run_framed
from cachekit.state import State
from cachekit.structure.layout import ALL

if TYPE_CHECKING:
    from cachekit.transform import CachedStep


def run(step: CachedStep, state: State, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, State]:
    """One step, traced."""
    layout = step.layout(tuple(state.sites))
    steps = state.timesteps.shape[0]
    torch.ops.aten._assert_async.msg(
        state.step < steps, "The state has done all of its timesteps. Start another trajectory with step.init."
    )
    step.opened.prepare_trace()
    if step.branching is not None:
        raise ArgumentError(step.branching)
    nan = torch.full((), math.nan, dtype=torch.float64)
    moment = Moment(
        step=state.step,
        timestep=take(state.timesteps, state.step),
        steps=torch.full((), steps, dtype=torch.int64),
        signal=Sums(nan, nan),
    )
    policy = step.policy
    frame = step.frame(GRAPH, layout, state.sites, state.reference, step.clock(state))
    if policy.static:
        frame["compute"] = {group: take(plan, state.step) for group, plan in step.plans(state).items()}

    def decide(sums):
        seen = moment._replace(signal=_tensors(sums))
        return (state.step == 0) | policy.deciders[ALL].decide(state.decider, seen)

    frame["decide"] = decide
    out = run_framed(frame, step.shadow, args, kwargs)
    check_reached(frame)
    verdicts = list(frame["compute"].values())
    computed = verdicts[0] if len(verdicts) == 1 else torch.stack(verdicts).all()
    if frame["sums"] is not None:
        moment = moment._replace(signal=_tensors(frame["sums"]))
    decider, reference = state.decider, state.reference
    if not policy.static:
        decider = policy.deciders[ALL].update(state.decider, moment, computed)
    if step.policy.front:
        residual = frame["residual"]
        reference = torch.where(computed.to(residual.device), residual, state.reference)
        reference = state.reference.copy_(reference) if step.donate else reference
    at = (state.step.reshape(1),)
    signal = ratio(moment.signal)
    return out, State(
        step=state.step + 1,
        timesteps=state.timesteps,
        plan=state.plan,
        decider=decider,
        reference=reference,
        sites={**state.sites, **frame["updated"]},
        computed=state.computed.index_put(at, computed.reshape(1)),
        signal=state.signal.index_put(at, signal.reshape(1)),
    )


def uncond(step: CachedStep, state: State, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Answered, dict[str, Any]]:
    """The unconditional call of a step, traced."""
    done = state.step - 1
    torch.ops.aten._assert_async.msg(
        done > state.decider.last,
        "The state has done no step since its last unconditional call. Call step(state, ...).",
    )
    plan = state.plan[GUIDANCE]
    steps = torch.arange(plan.shape[0])
    needed = torch.where(plan & (steps <= done), steps, -1).max()
    computed = take(plan, done.clamp(min=0)) | (state.decider.full < needed)
    frame = step.frame(GRAPH, step.layout(tuple(state.sites)), state.sites, (), step.clock(state, done))
    frame["compute"] = {GUIDANCE: computed}
    out = unconditional(frame, step.opened.original, args, kwargs)
    return out, Answered(done, torch.where(computed, done, state.decider.full)), frame["updated"]


def _tensors(sums) -> Sums:
    both = torch.stack(tuple(sums)).to(device="cpu", dtype=torch.float64)
    return Sums(both[0], both[1])
