"""Actions of robots, in the shape of pi0's expert: it reads the keys and values of a prefix that ran before."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachekit.diffusers.inputs import Draw, Feed
from cachekit.diffusers.zoo.foreign.layers import HEADS, WIDTH, heads, merged, rotary, rotate, sinusoid
from cachekit.diffusers.zoo.specimen import BATCH, Built, recipe

HEAD, ACTION, STATE, HORIZON, PREFIX = WIDTH // HEADS, 7, 6, 12, 10


class RMSNorm(nn.Module):
    """A norm whose weight counts from 1."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return functional.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + self.weight)


class Attention(nn.Module):
    """Grouped queries, over the prefix and the tokens themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, HEAD, bias=False) for _ in range(2))

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor, past_key_value: Any
    ) -> Tensor:
        """[B, L, D], angles, [B, 1, L, S + L], keys and values [B, 1, S, D / H] -> [B, L, D]."""
        query = rotate(heads(self.q_proj(hidden_states)), position_embeddings)
        key = rotate(heads(self.k_proj(hidden_states), 1), position_embeddings)
        key = torch.cat((past_key_value[0], key), 2).repeat_interleave(HEADS, 1)
        value = torch.cat((past_key_value[1], heads(self.v_proj(hidden_states), 1)), 2).repeat_interleave(HEADS, 1)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return self.o_proj(merged(out))


class MLP(nn.Module):
    """GeGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.down_proj(functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A layer in the shape of Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ActionExpert(nn.Module):
    """The velocity of noisy actions, after a prefix of images and words whose keys and values are there."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.state_proj, self.action_in_proj = nn.Linear(STATE, WIDTH), nn.Linear(ACTION, WIDTH)
        self.action_time_mlp_in, self.action_time_mlp_out = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers, self.norm = nn.ModuleList(DecoderLayer() for _ in range(depth)), RMSNorm()
        self.action_out_proj = nn.Linear(WIDTH, ACTION)

    def forward(
        self, x_t: Tensor, timestep: Tensor, state: Tensor, prefix_pad_masks: Tensor, past_key_values: list[Any]
    ) -> Tensor:
        """[B, L, actions], [B], [B, state], [B, S], (keys, values) of every layer -> [B, L, actions]."""
        time = sinusoid(timestep, WIDTH)[:, None].expand(-1, x_t.shape[1], -1)
        x = self.action_time_mlp_in(torch.cat((self.action_in_proj(x_t), time), -1))
        x = self.action_time_mlp_out(functional.silu(x))
        x = torch.cat((self.state_proj(state)[:, None], x), 1)
        length, past = x.shape[1], prefix_pad_masks.shape[1]
        own = torch.ones(length, length, dtype=torch.bool, device=x.device)
        own[0, 1:] = False  # the state sees no actions
        seen = prefix_pad_masks[:, None, None].expand(-1, 1, length, -1)
        mask = torch.cat((seen, own.expand(len(x), 1, -1, -1)), -1)
        turn = tuple(each[past:] for each in rotary(past + length, device=x.device))
        for layer, past_key_value in zip(self.layers, past_key_values, strict=True):
            x = layer(x, position_embeddings=turn, attention_mask=mask, past_key_value=past_key_value)
        return self.action_out_proj(self.norm(x)[:, -x_t.shape[1] :])


@recipe("ActionExpert", ActionExpert)
def _action_expert(cls: Any, draw: Draw) -> Built:
    model, seen = cls(), torch.ones(BATCH, PREFIX).bool()
    seen[1:, -3:] = False
    past = [tuple(draw(BATCH, 1, PREFIX, HEAD) for _ in range(2)) for _ in cast(Any, model).layers]
    fixed = {"state": draw(BATCH, STATE), "prefix_pad_masks": seen, "past_key_values": past}
    return model, Feed({"x_t": draw(BATCH, HORIZON, ACTION)}, fixed, clock=1.0)
