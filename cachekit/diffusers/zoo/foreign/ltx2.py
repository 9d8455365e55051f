"""Video and sound together, in the shape of LTX-2's own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachekit.diffusers.inputs import Draw, Feed
from cachekit.diffusers.zoo.foreign.layers import HEADS, TimestepEmbedding, rotary
from cachekit.diffusers.zoo.foreign.ltx2_block import AUDIO, VIDEO, Layer, Modality
from cachekit.diffusers.zoo.specimen import BATCH, TEXT, Built, mask, recipe


class Preprocessor(nn.Module):
    """Makes the arguments of one modality."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.patchify_proj, self.caption_projection = nn.Linear(channels, dim), nn.Linear(24, dim)
        self.adaln, self.linear = TimestepEmbedding(dim), nn.Linear(dim, 9 * dim)

    def forward(self, latent: Tensor, timesteps: Tensor, context: Tensor, text_mask: Tensor | None) -> Any:
        """[B, L, C], [B], [B, S, 24], [B, S] -> the arguments."""
        embedded, length = self.adaln(timesteps)[:, None], latent.shape[1]
        return Modality(
            x=self.patchify_proj(latent),
            context=self.caption_projection(context),
            text_mask=text_mask,
            timesteps=self.linear(functional.silu(embedded)),
            time=embedded,
            turn=rotary(length, embedded.shape[-1] // HEADS, latent.device),
            shared_turn=rotary(length, AUDIO // HEADS, latent.device),
        )


class LTX2Own(nn.Module):
    """A model of video and sound."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.video_args_preprocessor, self.audio_args_preprocessor = Preprocessor(8, VIDEO), Preprocessor(6, AUDIO)
        self.transformer_blocks = nn.ModuleList(Layer() for _ in range(num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, VIDEO) / VIDEO**0.5)
        self.audio_scale_shift_table = nn.Parameter(torch.randn(2, AUDIO) / AUDIO**0.5)
        self.proj_out, self.audio_proj_out = nn.Linear(VIDEO, 8), nn.Linear(AUDIO, 6)

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        timesteps: Tensor,
        video_context: Tensor,
        audio_context: Tensor,
        text_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[B, L, 8], [B, A, 6], [B], [B, S, 24], the same, [B, S] -> [B, L, 8], [B, A, 6]."""
        video_args = self.video_args_preprocessor(video, timesteps, video_context, text_mask)
        audio_args = self.audio_args_preprocessor(audio, timesteps, audio_context, text_mask)
        for block in self.transformer_blocks:
            video_args, audio_args = block(video=video_args, audio=audio_args)
        return (
            self.answer(self.scale_shift_table, self.proj_out, video_args),
            self.answer(self.audio_scale_shift_table, self.audio_proj_out, audio_args),
        )

    def answer(self, table: Tensor, proj_out: nn.Module, args: Modality) -> Tensor:
        """[B, L, D] -> [B, L, C]."""
        shift, scale = (table + args.time).chunk(2, 1)
        return proj_out(functional.layer_norm(args.x, args.x.shape[-1:]) * (1 + scale) + shift)


@recipe("LTX2Own", LTX2Own)
def _ltx2(cls: Any, draw: Draw) -> Built:
    fixed = {name: draw(BATCH, TEXT, 24) for name in ("video_context", "audio_context")}
    fixed["text_mask"] = mask().bool()
    moving = {"video": draw(BATCH, 16, 8), "audio": draw(BATCH, 12, 6)}
    return cls(), Feed(moving, fixed, clock=1.0, time="timesteps")
