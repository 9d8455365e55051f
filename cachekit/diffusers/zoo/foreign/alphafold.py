"""Coordinates of atoms, in the shape of AlphaFold 3's diffusion module: its token transformer, and its conditioning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cachekit.diffusers.inputs import Draw, Feed
from cachekit.diffusers.zoo.foreign.layers import HEADS, WIDTH, TimestepEmbedding, heads, merged
from cachekit.diffusers.zoo.specimen import BATCH, Built, recipe

SINGLE, PAIR = 24, 8


class AdaLN(nn.Module):
    """A norm with gain and shift from the conditioning of every token."""

    def __init__(self, dim: int = WIDTH, cond: int = SINGLE) -> None:
        super().__init__()
        self.plain, self.conditioned = nn.LayerNorm(dim, elementwise_affine=False), nn.LayerNorm(cond, bias=False)
        self.gain, self.shift = nn.Linear(cond, dim), nn.Linear(cond, dim, bias=False)

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        """[B, N, D], [B, N, S] -> [B, N, D]."""
        told = self.conditioned(s)
        return self.plain(a) * self.gain(told).sigmoid() + self.shift(told)


class PairBiasedAttention(nn.Module):
    """Attention with a bias from the pairs, and two gates."""

    def __init__(self, dim: int = WIDTH) -> None:
        super().__init__()
        self.norm_in, self.query = AdaLN(dim), nn.Linear(dim, dim)
        self.key, self.value, self.gate, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.pair_bias = nn.Sequential(nn.LayerNorm(PAIR), nn.Linear(PAIR, HEADS, bias=False))
        self.last_gate = nn.Linear(SINGLE, dim)

    def forward(self, a: Tensor, s: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """[B, N, D], [B, N, S], [B, N, N, Z], [B, N] -> [B, N, D]."""
        b = self.norm_in(a, s)
        query, key, value = (heads(each(b)) for each in (self.query, self.key, self.value))
        gate = self.gate(b).sigmoid()
        weights = torch.einsum("bhid,bhjd->bhij", query, key) / query.shape[-1] ** 0.5
        weights = weights + self.pair_bias(z).movedim(-1, 1)
        weights = weights.masked_fill(mask[:, None, None] == 0, -1e4)
        b = merged(torch.einsum("bhij,bhjd->bhid", weights.softmax(-1), value))
        return self.out(b * gate) * self.last_gate(s).sigmoid()


class ConditionedTransition(nn.Module):
    """SwiGLU, with a gate from the conditioning."""

    def __init__(self, dim: int = WIDTH) -> None:
        super().__init__()
        self.norm_in, self.last_gate = AdaLN(dim), nn.Linear(SINGLE, dim)
        self.wide = nn.Linear(dim, 4 * dim, bias=False)
        self.beside, self.narrow = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        """[B, N, D], [B, N, S] -> [B, N, D]."""
        a = self.norm_in(a, s)
        value, gate = self.wide(a).chunk(2, -1)
        b = value * nn.functional.silu(gate) * self.beside(a)
        return self.narrow(b) * self.last_gate(s).sigmoid()


class TokenLayer(nn.Module):
    """Both, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.transition = PairBiasedAttention(), ConditionedTransition()

    def forward(self, a: Tensor, s: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """[B, N, D], [B, N, S], [B, N, N, Z], [B, N] -> [B, N, D]."""
        a = a + self.attention(a, s, z, mask)
        return a + self.transition(a, s)


class Transition(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.bent, self.straight = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x = self.norm(x)
        return self.down(nn.functional.silu(self.bent(x)) * self.straight(x))


class Conditioning(nn.Module):
    """The trunk's representation of every token, with the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk_norm, self.trunk_in = nn.LayerNorm(20), nn.Linear(20, SINGLE)
        self.time_embed, self.time_norm = TimestepEmbedding(16), nn.LayerNorm(16)
        self.time_in = nn.Linear(16, SINGLE, bias=False)
        self.transitions = nn.ModuleList(Transition(SINGLE) for _ in range(2))

    def forward(self, times: Tensor, trunk: Tensor) -> Tensor:
        """[B], [B, N, 20] -> [B, N, S]."""
        s = self.trunk_in(self.trunk_norm(trunk))
        s = s + self.time_in(self.time_norm(self.time_embed(times)))[:, None]
        for transition in self.transitions:
            s = s + transition(s)
        return s


class TokenTransformer(nn.Module):
    """The update of noisy coordinates."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.conditioning, self.pair_in = Conditioning(), nn.Linear(PAIR, PAIR)
        self.embed, self.cond_in = nn.Linear(3, WIDTH, bias=False), nn.Linear(SINGLE, WIDTH, bias=False)
        self.layers = nn.ModuleList(TokenLayer() for _ in range(depth))
        self.norm_out, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3, bias=False)

    def forward(self, noisy: Tensor, times: Tensor, trunk: Tensor, pairs: Tensor, mask: Tensor) -> Tensor:
        """[B, N, 3], [B], [B, N, 20], [B, N, N, Z], [B, N] -> [B, N, 3]."""
        s, z = self.conditioning(times, trunk), self.pair_in(pairs)
        a = self.embed(noisy) + self.cond_in(s)
        for layer in self.layers:
            a = layer(a, s, z, mask)
        return self.head(self.norm_out(a))


@recipe("TokenTransformer", TokenTransformer)
def _token_transformer(cls: Any, draw: Draw) -> Built:
    mask = torch.ones(BATCH, 16)
    mask[1:, -2:] = 0
    fixed = {"trunk": draw(BATCH, 16, 20), "pairs": draw(BATCH, 16, 16, PAIR), "mask": mask}
    return cls(), Feed({"noisy": draw(BATCH, 16, 3)}, fixed, clock=1.0, time="times")
