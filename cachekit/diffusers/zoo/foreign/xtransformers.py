"""A stack of mixed layers in the shape of x-transformers: each is a list of norms, a block and a residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachekit.diffusers.inputs import Draw, Feed
from cachekit.diffusers.zoo.foreign.layers import WIDTH, TimestepEmbedding, heads, merged, rotary, rotate
from cachekit.diffusers.zoo.specimen import BATCH, TEXT, Built, mask, recipe


@dataclass
class Intermediates:
    """What an attention tells of itself: its keys and values, as a cache of past tokens wants them."""

    cached_kv: tuple[Tensor, Tensor] | None = None
    layer_type: str | None = None


class AdaptiveLayerNorm(nn.Module):
    """A norm whose gain comes from a condition."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_gain = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, *, condition: Tensor) -> Tensor:
        """[B, L, D], [B, 1, D] -> [B, L, D]."""
        gain = 1 + self.to_gain(condition)
        return gain * self.norm(x)


class AdaptiveLayerScale(nn.Module):
    """A gate from a condition."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.to_gate = nn.Linear(width, width)

    def forward(self, x: Tensor, *, condition: Tensor) -> Tensor:
        """[B, L, D], [B, 1, D] -> [B, L, D]."""
        return x * self.to_gate(condition).sigmoid()


class Attention(nn.Module):
    """Attention to itself, or to a context."""

    def __init__(self, width: int = WIDTH, context: int = WIDTH) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = nn.RMSNorm(width // 2), nn.RMSNorm(width // 2)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, rotary_pos_emb: Any = None
    ) -> tuple[Tensor, Intermediates]:
        """[B, L, D], [B, S, C], [B, S] -> [B, L, D], and what is told of it."""
        source = x if context is None else context
        query, key, value = heads(self.to_q(x)), heads(self.to_k(source)), heads(self.to_v(source))
        query, key = self.q_norm(query), self.k_norm(key)
        if rotary_pos_emb is not None:
            query, key = rotate(query, rotary_pos_emb), rotate(key, rotary_pos_emb)
        keep = None if mask is None else mask[:, None, None]
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=keep)
        return self.to_out(merged(out)), Intermediates(cached_kv=(key, value))


class FeedForward(nn.Module):
    """Two products with a gate."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.proj, self.act, self.ff = (
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            nn.Sequential(nn.Linear(2 * width, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x, gate = self.proj(x).chunk(2, -1)
        return self.ff(x * self.act(gate))


class Residual(nn.Module):
    """A sum with what was there, scaled by a weight."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.residual_scale = nn.Parameter(torch.ones(width))

    def prepare(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What the branch is given, and what it is added to."""
        return residual, residual * self.residual_scale

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[B, L, D], the same -> [B, L, D]."""
        return x + residual


class AttentionLayers(nn.Module):
    """The layers, of the types a (attention), c (to a context) and f (feed-forward), again and again."""

    def __init__(self, depth: int, context: int) -> None:
        super().__init__()
        self.layer_types, self.layers = ("a", "c", "f") * depth, nn.ModuleList()
        made = {"a": Attention, "c": lambda: Attention(context=context), "f": FeedForward}
        for kind in self.layer_types:
            norms = nn.ModuleList(cast(Any, [AdaptiveLayerNorm(), AdaptiveLayerScale(), None]))
            self.layers.append(nn.ModuleList([norms, made[kind](), Residual()]))
        self.final_norm = AdaptiveLayerNorm()

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None, condition: Tensor) -> Tensor:
        """[B, L, D], [B, S, C], [B, S], [B, 1, D] -> [B, L, D]."""
        turn = rotary(x.shape[1], device=x.device)
        for kind, layer in zip(self.layer_types, self.layers, strict=True):
            (before, after, last), block, residual_fn = cast(Any, layer)
            x, inner = residual_fn.prepare(x)
            x = before(x, condition=condition)
            given = {"a": {"rotary_pos_emb": turn}, "c": {"context": context, "mask": context_mask}, "f": {}}[kind]
            out = block(x, **given)
            if kind != "f":
                out, _ = out
            x = residual_fn(after(out, condition=condition), inner)
            x = x if last is None else last(x)
        return self.final_norm(x, condition=condition)


class XTransformers(nn.Module):
    """A wrapper for continuous tokens, conditioned on the time."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.project_in, self.project_out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8, bias=False)
        self.time_embed, self.attn_layers = TimestepEmbedding(), AttentionLayers(depth, 24)

    def forward(self, x: Tensor, times: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """[B, L, 8], [B], [B, S, 24], [B, S] -> [B, L, 8]."""
        condition = self.time_embed(times)[:, None]
        x = self.attn_layers(self.project_in(x), context, context_mask, condition)
        return self.project_out(x)


@recipe("XTransformers", XTransformers)
def _x_transformers(cls: Any, draw: Draw) -> Built:
    fixed = {"context": draw(BATCH, TEXT, 24), "context_mask": mask().bool()}
    return cls(), Feed({"x": draw(BATCH, 16, 8)}, fixed, clock=1.0, time="times")
