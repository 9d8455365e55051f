"""What timesteps tell of a sampler: how far its steps go, and how much noise is left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cachekit.deciders._decider import doubles
from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.planning.matrices import between


def step_sizes(times: Sequence[float] | Tensor) -> Tensor:
    """[T] float64: how far a sampler goes with each of its steps, up to a factor, as far as its timesteps tell.

    Falling timesteps go down to 0; rising ones, and those that have come to 0, a step like the one before. A timestep
    that is there again, as for Heun's method, which calls the model at both ends of a step, has the step shared among
    its calls. Steps between timesteps that are not known, or go to and fro, are even.
    """
    times = doubles(times)
    gone = times.diff()
    if not bool(gone.any()) or bool(gone.isnan().any()) or not bool((gone <= 0).all() or (gone >= 0).all()):
        return torch.ones(len(times), dtype=torch.float64)
    last = times[-1:] if gone.sum() < 0 < times[-1] else gone[gone != 0][-1:]
    sizes = torch.cat((gone, last)).abs()
    step = torch.cat((sizes.new_ones(1), (sizes[1:] > 0).double())).cumsum(0).long() - 1  # to which each call belongs
    whole = sizes.new_zeros(len(times)).index_add_(0, step, sizes)
    return (whole / step.bincount(minlength=len(times)).clamp(min=1))[step]


def sizes_of(times: Tensor, given: Sequence[float] | Tensor | None) -> Tensor:
    """[T] float64: the step sizes that were given, or those of the timesteps."""
    if given is None:
        return step_sizes(times)
    try:
        sizes = doubles(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(f"`step_sizes` must hold numbers, got {given!r}: {error}. Give one a step.") from error
    if tuple(sizes.shape) != (len(times),):
        raise ArgumentError(f"`step_sizes` is {list(sizes.shape)} for {len(times)} steps: give one a step.")
    return sizes


def noise_left(times: Tensor, sizes: Tensor) -> Tensor:
    """[T]: the noise level after each step, from 1 down to 0."""
    falls = len(times) > 1 and bool((times.diff() <= 0).all()) and times[0] > times[-1] >= 0 and times[0] <= 1000
    if falls and sizes[:-1].sum() != 0:
        # The last step goes as far as its size says, by the measure of those before it.
        beyond = sizes[-1:] * (times[0] - times[-1]) / sizes[:-1].sum()
        return torch.cat((times[1:], times[-1:] - beyond)).clamp(min=0) / (1000 if times[0] > 1 else 1)
    return 1 - sizes.cumsum(0) / sizes.sum()


def resampled(times: Tensor, sizes: Tensor, others: Tensor) -> Tensor:
    """The step sizes of another trajectory of the same sampler."""
    own = step_sizes(times)
    if torch.allclose(sizes * own.sum(), own * sizes.sum()):
        return step_sizes(others) * (sizes.sum() / own.sum())
    # The way that is gone at a timestep, and at the end, which is as far off as its step is long.
    ends = [torch.cat((each, each[-1:] - step_sizes(each)[-1:])) for each in (times, others)]
    way = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
    return (between(*ends) @ way).diff()
