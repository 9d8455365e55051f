"""Hyper-connections: several residual streams, mixed by weights that depend on them before and after every branch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachekit.diffusers.inputs import Draw, Feed
from cachekit.diffusers.zoo.foreign.layers import DEPTH, WIDTH, TimestepEmbedding, heads, merged, rotary, rotate
from cachekit.diffusers.zoo.specimen import BATCH, Built, recipe

STREAMS = 3


class HyperConnection(nn.Module):
    """Around one branch: what it is given out of the streams, and how its result is given to each of them."""

    def __init__(self, index: int, width: int = WIDTH, streams: int = STREAMS) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.RMSNorm(width))
        first = functional.one_hot(torch.tensor([index % streams]), streams).float().T
        self.static_alpha = nn.Parameter(torch.cat((first, torch.eye(streams)), 1))
        self.static_beta = nn.Parameter(1 + 0.1 * torch.randn(streams))
        self.dynamic_alpha = nn.Parameter(torch.randn(width, streams + 1) / width**0.5)
        self.dynamic_beta = nn.Parameter(torch.randn(width) / width**0.5)
        self.scales = nn.Parameter(torch.tensor([0.1, 0.1]))

    def forward(self, streams: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """[B, n, L, D] -> [B, L, D], and what adds a branch's result to the streams."""
        normed = self.norm(streams)
        alpha = self.static_alpha[:, None] + (normed @ self.dynamic_alpha).tanh() * self.scales[0]
        beta = self.static_beta[:, None] + (normed @ self.dynamic_beta).tanh() * self.scales[1]
        mixed = torch.einsum("bsld,bslt->btld", streams, alpha)
        return mixed[:, 0], partial(self.add, streams=mixed[:, 1:], beta=beta)

    def add(self, branch: Tensor, *, streams: Tensor, beta: Tensor) -> Tensor:
        """[B, L, D] -> [B, n, L, D]."""
        return streams + torch.einsum("bld,bsl->bsld", branch, beta)


class Attention(nn.Module):
    """Attention to itself."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turn: Any) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        query, key, value = map(heads, self.to_qkv(x).chunk(3, -1))
        query, key = rotate(query, turn), rotate(key, turn)
        return self.to_out(merged(functional.scaled_dot_product_attention(query, key, value)))


class Layer(nn.Module):
    """Attention and a feed-forward network, each between its connections."""

    def __init__(self, index: int, width: int = WIDTH) -> None:
        super().__init__()
        self.attn_connection, self.mlp_connection = HyperConnection(2 * index), HyperConnection(2 * index + 1)
        self.modulation = nn.Linear(width, 4 * width)
        self.attn_norm, self.mlp_norm = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, streams: Tensor, condition: Tensor, turn: Any) -> Tensor:
        """[B, n, L, D], [B, D] -> [B, n, L, D]."""
        shift, scale, shift_mlp, scale_mlp = self.modulation(condition)[:, None].chunk(4, -1)
        x, add = self.attn_connection(streams)
        streams = add(self.attn(self.attn_norm(x) * (1 + scale) + shift, turn))
        x, add = self.mlp_connection(streams)
        return add(self.mlp(self.mlp_norm(x) * (1 + scale_mlp) + shift_mlp))


class HyperConnections(nn.Module):
    """A DiT whose residual streams are several."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.embed, self.time_embed = nn.Linear(8, WIDTH), TimestepEmbedding()
        self.layers = nn.ModuleList(Layer(index) for index in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, L, 8], [B] -> [B, L, 8]."""
        condition, turn = functional.silu(self.time_embed(time)), rotary(x.shape[1], device=x.device)
        streams = self.embed(x)[:, None].expand(-1, STREAMS, -1, -1)
        for layer in self.layers:
            streams = layer(streams, condition, turn)
        return self.head(self.norm(streams.sum(1)))


@recipe("HyperConnections", HyperConnections)
def _hyper_connections(cls: Any, draw: Draw) -> Built:
    return cls(), Feed({"x": draw(BATCH, 16, 8)}, {}, clock=1.0, time="time")
