"""What a policy would have done to a recorded run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cachekit.errors import ArgumentError
from cachekit.forecasters import Forecaster
from cachekit.planning.trace import Trace


class Replay(NamedTuple):
    """A plan, held against a trace."""

    computed: tuple[int, ...]  # the steps that compute
    errors: Tensor  # [T] float64, norm of forecast minus value over the norm of the value, 0 where computed
    error: float  # norm of the sum of all errors, each as far as the sampler goes with it, over that of all values


def replay_steps(trace: Trace, computed: Sequence[int], forecaster: Forecaster) -> Replay:
    """What these computed steps would have given.

    Raises:
        ArgumentError: the forecaster is not linear, or step 0 is not among the steps.
    """
    coefficients = deviations(len(trace), computed, forecaster)
    values = trace.gram.diagonal().clamp(min=0).sqrt()
    errors = trace.error(coefficients)
    whole = trace.error(trace.sizes[None])[0]
    end = trace.error((trace.sizes[:, None] * coefficients).sum(0))
    return Replay(tuple(computed), torch.where(errors > 0, errors / values, errors), float(end / whole))


def deviations(steps: int, computed: Sequence[int], forecaster: Forecaster) -> Tensor:
    """Forecast minus value at every step, as factors of the values: [T, T] float64, rows of zeros where computed."""
    if forecaster.weights is None:
        raise ArgumentError(
            f"`forecaster` {forecaster.name!r} has no weights: only forecasts that are fixed linear combinations of "
            "computed values can be replayed. Give Forecaster(weights=...)."
        )
    nodes = sorted(computed)
    if not nodes or nodes[0] != 0 or nodes[-1] >= steps or len(set(nodes)) < len(nodes):
        raise ArgumentError(f"`computed` must hold step 0 and steps below {steps}, each once, got {list(computed)}.")
    rows = [[0.0] * steps for _ in range(steps)]
    seen: list[int] = []
    following = iter([*nodes, steps])
    after = next(following)
    for step, row in enumerate(rows):
        if step == after:
            seen.append(step)
            after = next(following)
            continue
        near = seen if forecaster.memory is None else seen[-forecaster.memory :]
        for node, weight in zip(near, forecaster.weights(near, step, steps), strict=True):
            row[node] = weight
        row[step] -= 1.0
    return torch.tensor(rows, dtype=torch.float64)
