"""Tiny sound transformers, one recipe a class."""

from __future__ import annotations

from typing import Any

import torch

from cachekit.diffusers.inputs import Draw, Feed, rotary
from cachekit.diffusers.zoo.specimen import BATCH, HEADS, LATENT, Built, mask, recipe, text


@recipe("StableAudio", "StableAudioDiTModel")
def _stable_audio(cls: Any, draw: Draw) -> Built:
    sizes = {"sample_size": 16, "num_key_value_attention_heads": 1, "cross_attention_dim": 16}
    sizes |= {"time_proj_dim": 32, "global_states_input_dim": 20, "cross_attention_input_dim": 24}
    model = cls(**HEADS, **LATENT, **sizes, num_layers=3)
    fixed = {"global_hidden_states": draw(BATCH, 1, 20), "rotary_embedding": rotary(draw, 17, width=8)}
    return model, Feed({"hidden_states": draw(BATCH, 4, 16)}, {**text(draw), **fixed}, clock=1.0)


@recipe("StableAudio3", "StableAudio3DiTModel")
def _stable_audio3(cls: Any, draw: Draw) -> Built:
    sizes = {"io_channels": 4, "embed_dim": 32, "num_heads": 2, "cond_token_dim": 24, "global_cond_dim": 20}
    model = cls(**sizes, depth=3, local_add_cond_dim=5, timestep_features_dim=32, num_memory_tokens=3)
    fixed = {"global_hidden_states": draw(BATCH, 20), "encoder_attention_mask": mask()}
    fixed["local_add_cond"] = draw(BATCH, 5, 16)
    return model, Feed({"hidden_states": draw(BATCH, 4, 16)}, {**text(draw), **fixed}, clock=1.0)


@recipe("AceStep", "AceStepTransformer1DModel")
def _ace_step(cls: Any, draw: Draw) -> Built:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 16, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "encoder_hidden_size": 24}
    model = cls(**sizes, num_hidden_layers=4, sliding_window=2)
    fixed = {"timestep_r": torch.zeros(BATCH), "context_latents": draw(BATCH, 15, 8)}
    return model, Feed({"hidden_states": draw(BATCH, 15, 4)}, {**text(draw), **fixed}, clock=1.0)


@recipe("LongCatAudioDiT", "LongCatAudioDiTTransformer")
def _longcat_audio(cls: Any, draw: Draw) -> Built:
    model = cls(dit_dim=32, dit_depth=3, dit_heads=2, dit_text_dim=24, latent_dim=4, use_latent_condition=False)
    fixed = {"encoder_attention_mask": mask(torch.int64), "attention_mask": torch.ones(BATCH, 16).bool()}
    return model, Feed({"hidden_states": draw(BATCH, 16, 4)}, {**text(draw), **fixed}, clock=1.0)


@recipe("MiniMaxMusic3", "MiniMaxMusic3Transformer1DModel")
def _minimax_music3(cls: Any, draw: Draw) -> Built:
    model = cls(**HEADS, in_channels=4, condition_dim=24, num_layers=3, ff_inner_dim=48, rotary_dim=8)
    fixed = {"encoder_hidden_states": draw(BATCH, 16, 24)}
    return model, Feed({"hidden_states": draw(BATCH, 4, 16)}, fixed, clock=1.0)
