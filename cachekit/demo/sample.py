"""Sampling the digits model: Euler steps from noise to image, with classifier-free guidance."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from cachekit.diffusers.digits import NULL, SIZE

GUIDANCE = 2.0
"""Of the demo, and of what the command line samples."""
Stream = Literal["cond", "uncond"]
Velocity = Callable[[Tensor, Tensor, Tensor, Stream], Tensor]
"""`velocity(x, t, labels, stream)`: x [B, 1, 1, 16, 16], t [] in [0, 1], labels [B] -> [B, 1, 1, 16, 16].

The stream tells the two calls of a step apart, so that a caller may keep one cache state for each.
"""


def timesteps(n: int) -> Tensor:
    """[n + 1] float32: the times of `n` equal Euler steps, from 1 (noise) down to 0 (image)."""
    return torch.linspace(1, 0, n + 1)


@torch.no_grad()
def sample(velocity: Velocity, labels: Tensor, steps: int = 50, guidance: float = GUIDANCE, seed: int = 0) -> Tensor:
    """Draw one image for each label [B]: [B, 1, 1, 16, 16] float32, about [-1, 1], on the device of `labels`.

    `seed` alone decides the noise, whatever the device and the number of steps.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 1, 1, SIZE, SIZE, generator=generator).to(labels.device)
    null = torch.full_like(labels, NULL)
    times = timesteps(steps).to(labels.device)
    for now, after in pairwise(times):
        cond = velocity(x, now, labels, "cond")
        uncond = velocity(x, now, null, "uncond")
        x = x + (after - now) * (uncond + guidance * (cond - uncond))
    return x
