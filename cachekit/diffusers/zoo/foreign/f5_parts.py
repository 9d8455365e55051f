"""The parts that E2-TTS and F5-TTS have alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachekit.diffusers.zoo.foreign.layers import WIDTH, heads, merged, rotary, rotate

MELS, LETTERS = 8, 20


class Attention(nn.Module):
    """Attention to itself, with rotary positions."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.1)])

    def forward(self, x: Tensor, mask: Tensor | None = None, rope: Any = None) -> Tensor:
        """[B, L, D] -> [B, L, D]; nothing where the mask ends."""
        query, key = (rotate(heads(part(x)), rope) for part in (self.to_q, self.to_k))
        keep = None if mask is None else mask[:, None, None].expand(-1, query.shape[1], query.shape[2], -1)
        x = merged(functional.scaled_dot_product_attention(query, key, heads(self.to_v(x)), attn_mask=keep))
        x = self.to_out[1](self.to_out[0](x))
        return x if mask is None else x.masked_fill(~mask[..., None], 0.0)


class FeedForward(nn.Module):
    """Two products."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"))
        self.ff = nn.Sequential(first, nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.ff(x)


class ResponseNorm(nn.Module):
    """Every channel against all others, by its norm over the sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        size = x.norm(dim=1, keepdim=True)
        return self.gamma * (x * size / (size.mean(-1, keepdim=True) + 1e-6)) + self.beta + x


class LetterBlock(nn.Module):
    """A convolution over the letters and two products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.along = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm, self.act, self.response = nn.LayerNorm(width), nn.GELU(), ResponseNorm(2 * width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        out = self.norm(self.along(x.transpose(1, 2)).transpose(1, 2))
        return x + self.down(self.response(self.act(self.up(out))))


class TextEmbedding(nn.Module):
    """Letters, as long as the sound: what is missing is the letter 0."""

    positions: Tensor

    def __init__(self, width: int, layers: int = 0) -> None:
        super().__init__()
        self.text_embed = nn.Embedding(LETTERS + 1, width)
        self.text_blocks = nn.Sequential(*(LetterBlock(width) for _ in range(layers)))
        self.register_buffer("positions", torch.cat(rotary(64, width), -1), persistent=False)

    def forward(self, text: Tensor, length: int, drop_text: bool = False) -> Tensor:
        """[B, letters] -> [B, L, D]."""
        text = text[:, :length] + 1
        text = functional.pad(text, (0, length - text.shape[1]), value=0)
        text = torch.zeros_like(text) if drop_text else text
        return self.text_blocks(self.text_embed(text) + self.positions[:length])


class InputEmbedding(nn.Module):
    """Noise, reference and text in one, and where they are by a convolution."""

    def __init__(self, text: int, width: int = WIDTH) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * MELS + text, width)
        convolutions = (nn.Conv1d(width, width, 5, groups=4, padding=2) for _ in range(2))
        self.conv_pos_embed = nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.Mish())))

    def forward(self, x: Tensor, cond: Tensor, text: Tensor, drop_audio_cond: bool = False) -> Tensor:
        """[B, L, mels], the same, [B, L, text] -> [B, L, D]."""
        cond = torch.zeros_like(cond) if drop_audio_cond else cond
        x = self.proj(torch.cat((x, cond, text), -1))
        return self.conv_pos_embed(x.transpose(1, 2)).transpose(1, 2) + x
