"""Speech from text, in the shape of E2-TTS and F5-TTS: noise, a reference and letters are put side by side."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachekit.diffusers.inputs import Draw, Feed
from cachekit.diffusers.zoo.foreign.f5_parts import (
    LETTERS,
    MELS,
    Attention,
    FeedForward,
    InputEmbedding,
    TextEmbedding,
)
from cachekit.diffusers.zoo.foreign.layers import DEPTH, WIDTH, TimestepEmbedding, rotary
from cachekit.diffusers.zoo.specimen import BATCH, TEXT, Built, recipe


class AdaLayerNorm(nn.Module):
    """A norm whose shift and scale, and more, come from the time."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(width, count * width)
        self.norm, self.count = nn.LayerNorm(width, elementwise_affine=False), count

    def forward(self, x: Tensor, emb: Tensor) -> Any:
        """[B, L, D], [B, D] -> [B, L, D] and gates [B, 1, D]."""
        shift, scale, *more = self.linear(self.silu(emb))[:, None].chunk(self.count, -1)
        x = self.norm(x) * (1 + scale) + shift
        return (x, *more) if more else x


class DiTBlock(nn.Module):
    """A layer of the DiT, with gates."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attn_norm, self.attn = AdaLayerNorm(width, 6), Attention(width)
        self.ff_norm, self.ff = nn.LayerNorm(width, elementwise_affine=False), FeedForward(width)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None, rope: Any = None) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        norm, gate, shift, scale, gate_ff = self.attn_norm(x, t)
        x = x + gate * self.attn(norm, mask=mask, rope=rope)
        norm = self.ff_norm(x) * (1 + scale) + shift
        return x + gate_ff * self.ff(norm)


class F5DiT(nn.Module):
    """The DiT of F5-TTS."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.time_embed, self.text_embed = TimestepEmbedding(), TextEmbedding(16, layers=2)
        self.input_embed = InputEmbedding(16)
        self.transformer_blocks = nn.ModuleList(DiTBlock() for _ in range(depth))
        self.norm_out, self.proj_out = AdaLayerNorm(WIDTH, 2), nn.Linear(WIDTH, MELS)
        self.kept: dict[bool, Tensor] = {}  # encoded text by `drop_text`, of one sample

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        text: Tensor,
        time: Tensor,
        mask: Tensor | None = None,
        drop_audio_cond: bool = False,
        drop_text: bool = False,
        cache: bool = False,
    ) -> Tensor:
        """[B, L, mels], the same, [B, letters], [B] or [] -> [B, L, mels]."""
        time = time.repeat(len(x)) if time.ndim == 0 else time
        t = self.time_embed(time)
        letters = self.kept.get(drop_text) if cache else None
        if letters is None:
            letters = self.text_embed(text, x.shape[1], drop_text)
            if cache:
                self.kept = {**self.kept, drop_text: letters}
        x = self.input_embed(x, cond, letters, drop_audio_cond)
        rope = rotary(x.shape[1], device=x.device)
        for block in self.transformer_blocks:
            x = block(x, t, mask=mask, rope=rope)
        return self.proj_out(self.norm_out(x, t))


class F5UNetT(nn.Module):
    """The transformer with long skips of E2-TTS: its layers are lists, called part by part."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.time_embed, self.text_embed, self.input_embed = TimestepEmbedding(), TextEmbedding(16), InputEmbedding(16)
        self.layers = nn.ModuleList()
        for index in range(depth):
            skip = nn.Linear(2 * WIDTH, WIDTH, bias=False) if index >= depth // 2 else None
            parts = [skip, nn.RMSNorm(WIDTH), Attention(), nn.RMSNorm(WIDTH), FeedForward()]
            self.layers.append(nn.ModuleList(cast(Any, parts)))
        self.norm_out, self.proj_out = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, MELS)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        text: Tensor,
        time: Tensor,
        mask: Tensor | None = None,
        drop_audio_cond: bool = False,
        drop_text: bool = False,
    ) -> Tensor:
        """[B, L, mels], the same, [B, letters], [B] or [] -> [B, L, mels]."""
        time = time.repeat(len(x)) if time.ndim == 0 else time
        letters = self.text_embed(text, x.shape[1], drop_text)
        x = self.input_embed(x, cond, letters, drop_audio_cond)
        x = torch.cat((self.time_embed(time)[:, None], x), 1)
        mask = None if mask is None else functional.pad(mask, (1, 0), value=True)
        rope, skips = rotary(x.shape[1], device=x.device), []
        for index, layer in enumerate(self.layers):
            skip, attn_norm, attn, ff_norm, ff = cast(Any, layer)
            if index < len(self.layers) // 2:
                skips.append(x)
            else:
                x = skip(torch.cat((x, skips.pop()), -1))
            x = attn(attn_norm(x), rope=rope, mask=mask) + x
            x = ff(ff_norm(x)) + x
        return self.proj_out(self.norm_out(x)[:, 1:])


@recipe("F5UNetT", F5UNetT)
@recipe("F5DiT", F5DiT)
def _f5(cls: Any, draw: Draw) -> Built:
    text, mask = draw.integers(LETTERS, BATCH, TEXT), torch.ones(BATCH, 16).bool()
    text[1:, -1], mask[1:, -2:] = -1, False
    fixed = {"cond": draw(BATCH, 16, MELS), "text": text, "mask": mask}
    return cls(), Feed({"x": draw(BATCH, 16, MELS)}, fixed, clock=1.0, time="time")
