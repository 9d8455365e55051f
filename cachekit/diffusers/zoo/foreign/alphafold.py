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
        self.a_norm, self.s_norm = nn.LayerNorm(dim, elementwise_affine=False), nn.LayerNorm(cond, bias=False)
        self.s_scale, self.s_bias = nn.Linear(cond, dim), nn.Linear(cond, dim, bias=False)

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        """[B, N, D], [B, N, S] -> [B, N, D]."""
        s = self.s_norm(s)
        return torch.sigmoid(self.s_scale(s)) * self.a_norm(a) + self.s_bias(s)


class AttentionPairBias(nn.Module):
    """Attention with a bias from the pairs, and two gates."""

    def __init__(self, dim: int = WIDTH) -> None:
        super().__init__()
        self.adaln, self.proj_q = AdaLN(dim), nn.Linear(dim, dim)
        self.proj_k, self.proj_v, self.proj_g, self.proj_o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.proj_z = nn.Sequential(nn.LayerNorm(PAIR), nn.Linear(PAIR, HEADS, bias=False))
        self.output_projection = nn.Linear(SINGLE, dim)

    def forward(self, a: Tensor, s: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """[B, N, D], [B, N, S], [B, N, N, Z], [B, N] -> [B, N, D]."""
        b = self.adaln(a, s)
        query, key, value = heads(self.proj_q(b)), heads(self.proj_k(b)), heads(self.proj_v(b))
        weights = torch.einsum("bhid,bhjd->bhij", query, key) / query.shape[-1] ** 0.5
        weights = weights + self.proj_z(z).movedim(-1, 1) + (1 - mask[:, None, None]) * -1e6
        b = merged(torch.einsum("bhij,bhjd->bhid", weights.softmax(-1), value))
        b = self.proj_o(self.proj_g(b).sigmoid() * b)
        return torch.sigmoid(self.output_projection(s)) * b


class ConditionedTransitionBlock(nn.Module):
    """SwiGLU, with a gate from the conditioning."""

    def __init__(self, dim: int = WIDTH) -> None:
        super().__init__()
        self.adaln, self.output_projection = AdaLN(dim), nn.Linear(SINGLE, dim)
        self.swish_gate = nn.Linear(dim, 4 * dim, bias=False)
        self.a_to_b, self.b_to_a = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        """[B, N, D], [B, N, S] -> [B, N, D]."""
        a = self.adaln(a, s)
        x, gate = self.swish_gate(a).chunk(2, -1)
        b = nn.functional.silu(gate) * x * self.a_to_b(a)
        return torch.sigmoid(self.output_projection(s)) * self.b_to_a(b)


class DiffusionTransformerBlock(nn.Module):
    """Both, one after the other or side by side."""

    def __init__(self, parallel: bool) -> None:
        super().__init__()
        self.pair_bias_attn, self.transition, self.parallel = (
            AttentionPairBias(),
            ConditionedTransitionBlock(),
            parallel,
        )

    def forward(self, a: Tensor, s: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """[B, N, D], [B, N, S], [B, N, N, Z], [B, N] -> [B, N, D]."""
        b = self.pair_bias_attn(a, s, z, mask)
        if self.parallel:
            return a + b + self.transition(a, s)
        a = a + b
        return a + self.transition(a, s)


class Transition(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim)
        self.fc3 = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x = self.norm(x)
        return self.fc3(nn.functional.silu(self.fc1(x)) * self.fc2(x))


class SingleConditioning(nn.Module):
    """The trunk's representation of every token, with the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_single, self.single_embed = nn.LayerNorm(20), nn.Linear(20, SINGLE)
        self.fourier_embed, self.norm_fourier = TimestepEmbedding(16), nn.LayerNorm(16)
        self.fourier_to_single = nn.Linear(16, SINGLE, bias=False)
        self.transitions = nn.ModuleList(Transition(SINGLE) for _ in range(2))

    def forward(self, times: Tensor, s_trunk: Tensor) -> Tensor:
        """[B], [B, N, 20] -> [B, N, S]."""
        s = self.single_embed(self.norm_single(s_trunk))
        s = s + self.fourier_to_single(self.norm_fourier(self.fourier_embed(times)))[:, None]
        for transition in self.transitions:
            s = transition(s) + s
        return s


class TokenTransformer(nn.Module):
    """The update of noisy coordinates."""

    def __init__(self, depth: int = 4, *, parallel: bool = False) -> None:
        super().__init__()
        self.single_conditioner, self.z_embed = SingleConditioning(), nn.Linear(PAIR, PAIR)
        self.r_to_a, self.s_to_a = nn.Linear(3, WIDTH, bias=False), nn.Linear(SINGLE, WIDTH, bias=False)
        self.layers = nn.ModuleList(DiffusionTransformerBlock(parallel) for _ in range(depth))
        self.a_norm, self.a_to_r = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3, bias=False)

    def forward(self, r_noisy: Tensor, times: Tensor, s_trunk: Tensor, z_trunk: Tensor, mask: Tensor) -> Tensor:
        """[B, N, 3], [B], [B, N, 20], [B, N, N, Z], [B, N] -> [B, N, 3]."""
        s, z = self.single_conditioner(times, s_trunk), self.z_embed(z_trunk)
        a = self.r_to_a(r_noisy) + self.s_to_a(s)
        for layer in self.layers:
            a = layer(a, s, z, mask)
        return self.a_to_r(self.a_norm(a))


@recipe("TokenTransformer", TokenTransformer)
def _token_transformer(cls: Any, draw: Draw) -> Built:
    mask = torch.ones(BATCH, 16)
    mask[1:, -2:] = 0
    fixed = {"s_trunk": draw(BATCH, 16, 20), "z_trunk": draw(BATCH, 16, 16, PAIR), "mask": mask}
    return cls(), Feed({"r_noisy": draw(BATCH, 16, 3)}, fixed, clock=1.0, time="times")
