"""A block in the shape of LTX-2's own code: what it is given is a frozen object for video, and one for sound."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachekit.diffusers.zoo.foreign.layers import heads, merged, rotate

VIDEO, AUDIO = 32, 16
Turn = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Modality:
    """All that the blocks are given of one modality."""

    x: Tensor  # [B, L, D]
    context: Tensor  # [B, S, D]
    text_mask: Tensor | None
    timesteps: Tensor  # [B, 1, 9 D]: shifts, scales and gates
    time: Tensor  # [B, 1, D]
    turn: Turn
    shared_turn: Turn


class Attention(nn.Module):
    """Attention to itself, or to a context."""

    def __init__(self, query_dim: int, context_dim: int | None = None, inner: int | None = None) -> None:
        super().__init__()
        context_dim, inner = context_dim or query_dim, inner or query_dim
        self.to_q, self.to_out = nn.Linear(query_dim, inner), nn.Sequential(nn.Linear(inner, query_dim), nn.Identity())
        self.to_k, self.to_v = nn.Linear(context_dim, inner), nn.Linear(context_dim, inner)
        self.q_norm, self.k_norm = nn.RMSNorm(inner), nn.RMSNorm(inner)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        pe: Turn | None = None,
        k_pe: Turn | None = None,
    ) -> Tensor:
        """[B, L, D], [B, S, C] -> [B, L, D]."""
        source = x if context is None else context
        query, key = heads(self.q_norm(self.to_q(x))), heads(self.k_norm(self.to_k(source)))
        if pe is not None:
            query, key = rotate(query, pe), rotate(key, pe if k_pe is None else k_pe)
        keep = None if mask is None else mask[:, None, None]
        out = functional.scaled_dot_product_attention(query, key, heads(self.to_v(source)), attn_mask=keep)
        return self.to_out(merged(out))


class FeedForward(nn.Module):
    """Two products."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"))
        self.net = nn.Sequential(first, nn.Identity(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.net(x)


def rms_norm(x: Tensor) -> Tensor:
    """Without a weight."""
    return functional.rms_norm(x, x.shape[-1:], eps=1e-6)


class Layer(nn.Module):
    """Each modality to itself, to its text, to the other one, and through a network of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2, self.ff = Attention(VIDEO), Attention(VIDEO), FeedForward(VIDEO)
        self.audio_attn1, self.audio_attn2, self.audio_ff = Attention(AUDIO), Attention(AUDIO), FeedForward(AUDIO)
        self.audio_to_video_attn = Attention(VIDEO, AUDIO, AUDIO)
        self.video_to_audio_attn = Attention(AUDIO, VIDEO, AUDIO)
        self.scale_shift_table = nn.Parameter(torch.randn(9, VIDEO) / VIDEO**0.5)
        self.audio_scale_shift_table = nn.Parameter(torch.randn(9, AUDIO) / AUDIO**0.5)

    def forward(self, video: Modality, audio: Modality) -> tuple[Modality, Modality]:
        """The same objects with new tokens."""
        by_video, by_audio = values(self.scale_shift_table, video), values(self.audio_scale_shift_table, audio)
        vx = alone(self.attn1, self.attn2, video.x, video, by_video)
        ax = alone(self.audio_attn1, self.audio_attn2, audio.x, audio, by_audio)
        vx_norm, ax_norm = rms_norm(vx), rms_norm(ax)
        v_pe, a_pe = video.shared_turn, audio.shared_turn
        listens = vx_norm * (1 + by_video[3]) + by_video[4]
        vx = vx + self.audio_to_video_attn(listens, context=ax_norm, pe=v_pe, k_pe=a_pe) * by_video[5]
        looks = ax_norm * (1 + by_audio[3]) + by_audio[4]
        ax = ax + self.video_to_audio_attn(looks, context=vx_norm, pe=a_pe, k_pe=v_pe) * by_audio[5]
        vx = vx + self.ff(rms_norm(vx) * (1 + by_video[6]) + by_video[7]) * by_video[8]
        ax = ax + self.audio_ff(rms_norm(ax) * (1 + by_audio[6]) + by_audio[7]) * by_audio[8]
        return replace(video, x=vx), replace(audio, x=ax)


def values(table: Tensor, args: Modality) -> tuple[Tensor, ...]:
    """Shifts, scales and gates of a block."""
    return (table + args.timesteps.unflatten(-1, table.shape)).unbind(2)


def alone(own: nn.Module, text: nn.Module, x: Tensor, args: Modality, by_time: tuple[Tensor, ...]) -> Tensor:
    """What needs no other modality."""
    shift, scale, gate = by_time[:3]
    x = x + own(rms_norm(x) * (1 + scale) + shift, pe=args.turn) * gate
    return x + text(rms_norm(x), context=args.context, mask=args.text_mask)
