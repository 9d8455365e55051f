"""What several of these models have alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WIDTH, HEADS, DEPTH = 32, 2, 4


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    """[B, L, D] -> [B, H, L, D / H]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """[B, H, L, D / H] -> [B, L, D]."""
    return x.transpose(1, 2).flatten(-2)


def sinusoid(time: Tensor, width: int = WIDTH) -> Tensor:
    """[B] -> [B, width]."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=time.device) * (-math.log(10000) / half))
    angles = 1000 * time.float()[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), -1)


def rotary(length: int, width: int = WIDTH // HEADS, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [L, width / 2] each."""
    rates = 10000 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys, [B, H, L, D], turned by their positions."""
    (cos, sin), (one, other) = turn, x.chunk(2, -1)
    return torch.cat((one * cos - other * sin, one * sin + other * cos), -1)


class TimestepEmbedding(nn.Module):
    """A time in [0, 1] as a vector."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.width = width

    def forward(self, time: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        return self.mlp(sinusoid(time, self.width))
