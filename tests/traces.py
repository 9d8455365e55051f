"""Trajectories of a small model, values to plan on, and forecasters: what the tests of traces share."""

from __future__ import annotations

import functools
import math
import warnings

import dit
import torch
from hypothesis import strategies as st
from torch import Tensor

import cachekit as ck
from cachekit.forecasters import hold, newton, taylor, two_point

STEPS = 12
FORECASTERS = {
    "hold": hold(),
    **{f"newton {order}": newton(order) for order in range(4)},
    **{f"newton {order} repaid": newton(order, repay=True) for order in range(3)},
    **{f"taylor {order}": taylor(order) for order in range(4)},
    "two-point": two_point(0.3),
    "ramp": two_point("ramp"),
    "of the step": two_point(lambda step, steps: step / (steps + 1)),
    "feedback": two_point(0.4, feedback=True),
}
FLOWS = ("plain", "two", "interleaved", "swapped", "inplace")


def plans_of(steps: int) -> st.SearchStrategy[list[int]]:
    """Computed steps of a trajectory, step 0 among them."""
    return st.sets(st.integers(1, steps - 1), min_size=1, max_size=steps - 1).map(lambda rest: [0, *sorted(rest)])


def inputs(step: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What the model is called with at a step, whatever it returned before."""
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, 2, dit.IMAGE, dit.CHANNELS, generator=generator)
    text = torch.randn(2, dit.WORDS, dit.CHANNELS, generator=generator)
    share = step / STEPS
    return start * (1 - share) + end * share, torch.full((2,), 1 - share), text


def times() -> Tensor:
    """The timesteps of these inputs."""
    return torch.tensor([1000.0 * (1 - step / STEPS) for step in range(STEPS)], dtype=torch.float64)


@functools.cache
def model_of(flow: str) -> dit.DiT:
    """A model with weights of its own, the same at every call: no test changes anything about it."""
    torch.manual_seed(3)
    return dit.DiT(flow)


@torch.no_grad()
def run(step, seed: int = 0) -> tuple[list[Tensor], ck.State]:
    """All steps on the same inputs: what they return, and the last state."""
    state, outs = step.init(times(), *inputs(0, seed)), []
    for now in range(STEPS):
        out, state = step(state, *inputs(now, seed))
        outs.append(out.clone())
    return outs, state


def smooth(seed: int, steps: int, numbers: int = 6) -> list[Tensor]:
    """Values that change from step to step as those of a model do: slowly, and not evenly."""
    generator = torch.Generator().manual_seed(seed)
    base, slope, bend, noise = torch.randn(4, numbers, generator=generator, dtype=torch.float64)
    share = [step / steps for step in range(steps)]
    return [base + slope * s + bend * math.sin(5 * s) + 0.05 * noise * (-1) ** n for n, s in enumerate(share)]


def quietly(trace: ck.Trace, policy: ck.Policy) -> ck.Replay:
    """A replay without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ck.TraceWarning)
        return ck.replay(trace, policy)
