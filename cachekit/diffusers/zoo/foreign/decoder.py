"""Actions of robots, in the shape of Diffusion Policy's transformer: PyTorch's own encoder and decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cachekit.diffusers.inputs import Draw, Feed
from cachekit.diffusers.zoo.foreign.layers import HEADS, WIDTH, sinusoid
from cachekit.diffusers.zoo.specimen import BATCH, Built, recipe

ACTION, STATE, HORIZON = 7, 6, 12


class SinusoidalPosEmb(nn.Module):
    """A time in [0, 1] as sines and cosines."""

    def forward(self, time: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        return sinusoid(time)


class ActionDecoder(nn.Module):
    """A transformer of PyTorch's own layers, as Diffusion Policy has it: observations encoded, actions decoded."""

    mask: Tensor
    memory_mask: Tensor

    def __init__(self, encoder_layers: int = 2, decoder_layers: int = 3, observations: int = 3) -> None:
        super().__init__()
        like: dict[str, Any] = {"dropout": 0.1, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.input_emb, self.cond_obs_emb = nn.Linear(ACTION, WIDTH), nn.Linear(STATE, WIDTH)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, HORIZON, WIDTH))
        self.cond_pos_emb = nn.Parameter(0.02 * torch.randn(1, 1 + observations, WIDTH))
        layers = nn.Linear(WIDTH, WIDTH), nn.Mish(), nn.Linear(WIDTH, WIDTH)
        self.time_emb = nn.Sequential(SinusoidalPosEmb(), *layers)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **like)
        self.encoder = nn.TransformerEncoder(layer, encoder_layers, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(WIDTH, HEADS, 4 * WIDTH, **like), decoder_layers
        )
        causal = torch.ones(HORIZON, HORIZON).tril()
        seen = (torch.arange(HORIZON)[:, None] >= torch.arange(1 + observations) - 1).float()
        self.register_buffer("mask", torch.zeros_like(causal).masked_fill(causal == 0, -torch.inf))
        self.register_buffer("memory_mask", torch.zeros_like(seen).masked_fill(seen == 0, -torch.inf))
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, ACTION)

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        """[B, L, actions], [B] or [], [B, observations, state] -> [B, L, actions]."""
        time = self.time_emb(timestep.expand(len(sample)))[:, None]
        memory = self.encoder(torch.cat((time, self.cond_obs_emb(cond)), 1) + self.cond_pos_emb)
        x = self.input_emb(sample) + self.pos_emb[:, : sample.shape[1]]
        x = self.decoder(tgt=x, memory=memory, tgt_mask=self.mask, memory_mask=self.memory_mask)
        return self.head(self.ln_f(x))


@recipe("ActionDecoder", ActionDecoder)
def _action_decoder(cls: Any, draw: Draw) -> Built:
    return cls(), Feed({"sample": draw(BATCH, HORIZON, ACTION)}, {"cond": draw(BATCH, 3, STATE)}, clock=1.0)
