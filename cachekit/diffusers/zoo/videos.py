"""Tiny video transformers, one recipe a class."""

from __future__ import annotations

from typing import Any

import torch

from cachekit.diffusers.inputs import Draw, Feed, feed, grid, rotary
from cachekit.diffusers.zoo.specimen import (
    BATCH,
    BOTH,
    HEADS,
    LATENT,
    TEXT,
    TINY,
    Built,
    mask,
    packed,
    recipe,
    text,
    video,
)

WAN = {"text_dim": 24, "freq_dim": 32, "ffn_dim": 48, "rope_max_seq_len": 16}
SEEN = {"image_dim": 20, "added_kv_proj_dim": 32}
SOUND = {"audio_in_channels": 5, "audio_out_channels": 5, "audio_num_attention_heads": 2}
SOUND |= {"audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
INDICES = ("text_indices", "video_indices", "audio_indices")


@recipe("Wan", "WanTransformer3DModel")
def _wan(cls: Any, draw: Draw) -> Built:
    return cls(**HEADS, **LATENT, text_dim=24, freq_dim=32, ffn_dim=48, num_layers=3, rope_max_seq_len=16)


@recipe("CogVideoX", "CogVideoXTransformer3DModel")
def _cogvideox(cls: Any, draw: Draw) -> Built:
    sizes = {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": TEXT}
    extras = {"time_embed_dim": 24, "text_embed_dim": 24, "use_rotary_positional_embeddings": True}
    return cls(**HEADS, **LATENT, **sizes, **extras, num_layers=3)


@recipe("LTX", "LTXVideoTransformer3DModel")
def _ltx(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 24}
    model = cls(**HEADS, **sizes, num_layers=3)
    return model, feed(model, TINY._replace(height=4, width=4), draw)


@recipe("Mochi", "MochiTransformer3DModel")
def _mochi(cls: Any, draw: Draw) -> Built:
    sizes = {"pooled_projection_dim": 24, "text_embed_dim": 24, "time_embed_dim": 32}
    return cls(**HEADS, **sizes, in_channels=4, num_layers=4)


@recipe("HunyuanVideo", "HunyuanVideoTransformer3DModel")
def _hunyuan_video(cls: Any, draw: Draw) -> Built:
    layers = {"num_layers": 3, "num_single_layers": 3, "num_refiner_layers": 2}
    sizes = {"text_embed_dim": 24, "pooled_projection_dim": 20, "rope_axes_dim": (4, 4, 8)}
    return cls(**HEADS, **LATENT, **layers, **sizes)


@recipe("Latte", "LatteTransformer3DModel")
def _latte(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2, "video_length": 3}
    sizes |= {"cross_attention_dim": 32, "caption_channels": 24, "num_embeds_ada_norm": 1000}
    norm = {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6}
    return cls(**HEADS, **sizes, **norm, num_layers=3, attention_bias=True, activation_fn="gelu-approximate")


@recipe("HunyuanVideoI2V", "HunyuanVideoTransformer3DModel")
def _hunyuan_video_i2v(cls: Any, draw: Draw) -> Built:
    sizes = {"text_embed_dim": 24, "pooled_projection_dim": 20, "rope_axes_dim": (4, 4, 8)}
    kind = {"guidance_embeds": False, "image_condition_type": "token_replace"}
    model = cls(**HEADS, **LATENT, **BOTH, **sizes, **kind, num_refiner_layers=2)
    fixed = {"pooled_projections": draw(BATCH, 20), "encoder_attention_mask": mask(torch.int64)}
    return model, Feed(video(draw), {**text(draw), **fixed})


@recipe("HunyuanVideoFramepack", "HunyuanVideoFramepackTransformer3DModel")
def _hunyuan_video_framepack(cls: Any, draw: Draw) -> Built:
    sizes = {"text_embed_dim": 24, "pooled_projection_dim": 20, "rope_axes_dim": (4, 4, 8)}
    extras = {"has_image_proj": True, "image_proj_dim": 20, "has_clean_x_embedder": True}
    model = cls(**HEADS, **LATENT, **BOTH, **sizes, **extras, num_refiner_layers=2)
    fixed = {"pooled_projections": draw(BATCH, 20), "encoder_attention_mask": mask(torch.int64)}
    fixed |= {"guidance": torch.full((BATCH,), 6000.0), "image_embeds": draw(BATCH, 3, 20)}
    fixed |= {"latents_clean": draw(BATCH, 4, 2, 8, 8), "indices_latents_clean": torch.arange(2)}
    fixed |= {"latents_history_2x": draw(BATCH, 4, 2, 8, 8), "indices_latents_history_2x": torch.arange(2, 4)}
    fixed |= {"latents_history_4x": draw(BATCH, 4, 4, 8, 8), "indices_latents_history_4x": torch.arange(4, 8)}
    fixed["indices_latents"] = torch.arange(8, 10)
    return model, Feed(video(draw), {**text(draw), **fixed})


@recipe("MotifVideo", "MotifVideoTransformer3DModel")
def _motif_video(cls: Any, draw: Draw) -> Built:
    sizes = {"text_embed_dim": 24, "image_embed_dim": 20, "rope_axes_dim": (4, 4, 8)}
    extras = {"enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True}
    layers = {"num_layers": 3, "num_single_layers": 6, "num_decoder_layers": 3}
    model = cls(**HEADS, **LATENT, **sizes, **extras, **layers)
    fixed = {"encoder_attention_mask": mask(torch.int64), "image_embeds": draw(BATCH, 3, 20)}
    return model, Feed(video(draw), {**text(draw), **fixed})


@recipe("WanI2V", "WanTransformer3DModel")
def _wan_i2v(cls: Any, draw: Draw) -> Built:
    model = cls(**HEADS, **LATENT, **WAN, **SEEN, num_layers=3)
    return model, Feed(video(draw), {**text(draw), "encoder_hidden_states_image": draw(BATCH, 5, 20)})


@recipe("WanVACE", "WanVACETransformer3DModel")
def _wan_vace(cls: Any, draw: Draw) -> Built:
    model = cls(**HEADS, **LATENT, **WAN, num_layers=4, vace_layers=[0, 1, 2], vace_in_channels=6)
    return model, Feed(video(draw), {**text(draw), "control_hidden_states": draw(BATCH, 6, 2, 8, 8)})


@recipe("WanAnimate", "WanAnimateTransformer3DModel")
def _wan_animate(cls: Any, draw: Draw) -> Built:
    face = {"motion_encoder_size": 8, "motion_style_dim": 16, "motion_dim": 4, "motion_encoder_dim": 16}
    face |= {"motion_encoder_channel_sizes": {"4": 8, "8": 8}, "inject_face_latents_blocks": 2}
    face |= {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2}
    channels = {"in_channels": 12, "latent_channels": 4, "out_channels": 4}
    model = cls(**HEADS, **channels, **WAN, **SEEN, **face, num_layers=4)
    fixed = {"encoder_hidden_states_image": draw(BATCH, 5, 20), "pose_hidden_states": draw(BATCH, 4, 2, 8, 8)}
    fixed["face_pixel_values"] = draw(BATCH, 3, 5, 8, 8)
    return model, Feed(video(draw, frames=3, channels=12), {**text(draw), **fixed})


@recipe("ChronoEdit", "ChronoEditTransformer3DModel")
def _chrono_edit(cls: Any, draw: Draw) -> Built:
    model = cls(**HEADS, **LATENT, **WAN, **SEEN, num_layers=3, rope_temporal_skip_len=2)
    return model, Feed(video(draw), {**text(draw), "encoder_hidden_states_image": draw(BATCH, 5, 20)})


@recipe("SkyReelsV2", "SkyReelsV2Transformer3DModel")
def _skyreels_v2(cls: Any, draw: Draw) -> Built:
    model = cls(**HEADS, **LATENT, **WAN, num_layers=3, num_frame_per_block=1)
    return model, Feed(video(draw), {**text(draw), "enable_diffusion_forcing": True}, shape=(BATCH, 2))


@recipe("AnyFlow", "AnyFlowTransformer3DModel")
def _any_flow(cls: Any, draw: Draw) -> Built:
    model = cls(**HEADS, **LATENT, **WAN, num_layers=3)
    fixed = {"r_timestep": torch.zeros(BATCH, 2)}
    return model, Feed({"hidden_states": draw(BATCH, 2, 4, 8, 8)}, {**text(draw), **fixed}, shape=(BATCH, 2))


@recipe("AnyFlowFAR", "AnyFlowFARTransformer3DModel")
def _any_flow_far(cls: Any, draw: Draw) -> Built:
    model = cls(**HEADS, **LATENT, **WAN, num_layers=3, chunk_partition=(1, 2), full_chunk_limit=2)
    fixed = {"r_timestep": torch.zeros(BATCH, 3), "chunk_partition": [1, 2]}
    return model, Feed({"hidden_states": draw(BATCH, 3, 4, 8, 8)}, {**text(draw), **fixed}, shape=(BATCH, 3))


@recipe("Helios", "HeliosTransformer3DModel")
def _helios(cls: Any, draw: Draw) -> Built:
    sizes = {"text_dim": 24, "freq_dim": 32, "ffn_dim": 48, "rope_dim": (4, 4, 8)}
    model = cls(**HEADS, **LATENT, **sizes, num_layers=3, is_amplify_history=True)
    fixed = {
        "indices_hidden_states": torch.arange(8, 10),
        "indices_latents_history_short": torch.arange(6, 8),
    }
    fixed |= {
        "indices_latents_history_mid": torch.arange(4, 6),
        "indices_latents_history_long": torch.arange(4),
    }
    fixed = {name: indices.expand(BATCH, -1) for name, indices in fixed.items()}
    fixed |= {
        "latents_history_short": draw(BATCH, 4, 2, 8, 8),
        "latents_history_mid": draw(BATCH, 4, 2, 8, 8),
    }
    return model, Feed(video(draw), {**text(draw), **fixed, "latents_history_long": draw(BATCH, 4, 4, 8, 8)})


@recipe("Allegro", "AllegroTransformer3DModel")
def _allegro(cls: Any, draw: Draw) -> Built:
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 24,
    }
    model = cls(**sizes, **LATENT, num_layers=3, sample_height=8, sample_width=8, sample_frames=2)
    fixed = {"attention_mask": torch.ones(BATCH, 2, 8, 8), "encoder_attention_mask": mask()}
    angles = [draw(4, 2).repeat(1, 2) for _ in range(3)]
    places = tuple(torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).T[:, None])
    fixed |= {"image_rotary_emb": (tuple((angle.cos(), angle.sin()) for angle in angles), places)}
    return model, Feed(video(draw), {**text(draw), **fixed})


@recipe("ConsisID", "ConsisIDTransformer3DModel")
def _consis_id(cls: Any, draw: Draw) -> Built:
    sizes = {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": TEXT}
    sizes |= {"time_embed_dim": 24, "text_embed_dim": 24, "use_rotary_positional_embeddings": True}
    face = {"is_train_face": True, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2, "LFE_id_dim": 12}
    face |= {"LFE_vit_dim": 12, "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 2}
    face |= {"LFE_num_querie": 3, "LFE_output_dim": 32, "LFE_ff_mult": 2}
    model = cls(**LATENT, **sizes, **face, num_layers=4, num_attention_heads=2, attention_head_dim=24)
    fixed = {"image_rotary_emb": rotary(draw, 32, width=24), "id_cond": draw(BATCH, 12)}
    fixed["id_vit_hidden"] = [draw(BATCH, 4, 12) for _ in range(5)]
    return model, Feed({"hidden_states": draw(BATCH, 2, 4, 8, 8)}, {**text(draw), **fixed})


@recipe("EasyAnimate", "EasyAnimateTransformer3DModel")
def _easy_animate(cls: Any, draw: Draw) -> Built:
    sizes = {
        "sample_width": 8,
        "sample_height": 8,
        "patch_size": 2,
        "time_embed_dim": 24,
        "text_embed_dim": 24,
    }
    model = cls(**HEADS, **LATENT, **sizes, num_layers=4, mmdit_layers=2, add_norm_text_encoder=True)
    return model, Feed(video(draw), text(draw))


@recipe("HunyuanVideo15", "HunyuanVideo15Transformer3DModel")
def _hunyuan_video15(cls: Any, draw: Draw) -> Built:
    sizes = {"text_embed_dim": 24, "text_embed_2_dim": 20, "image_embed_dim": 12, "rope_axes_dim": (4, 4, 8)}
    model = cls(**HEADS, **LATENT, **sizes, num_layers=3, num_refiner_layers=2, patch_size=2)
    fixed = {"encoder_attention_mask": mask(torch.int64), "encoder_hidden_states_2": draw(BATCH, 5, 20)}
    fixed |= {
        "encoder_attention_mask_2": mask(torch.int64, length=5),
        "image_embeds": torch.zeros(BATCH, 3, 12),
    }
    return model, Feed(video(draw), {**text(draw), **fixed})


@recipe("Kandinsky5", "Kandinsky5Transformer3DModel")
def _kandinsky5(cls: Any, draw: Draw) -> Built:
    sizes = {"in_text_dim": 24, "in_text_dim2": 20, "time_dim": 24, "model_dim": 32, "ff_dim": 48}
    return cls(**sizes, num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 4, 8))


@recipe("Kandinsky6", "Kandinsky6Transformer3DModel")
def _kandinsky6(cls: Any, draw: Draw) -> Built:
    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_audio_dim": 5, "out_audio_dim": 5, "time_dim": 24}
    sizes |= {"in_text_dim": 24, "in_text_dim2": 20, "model_dim": 32, "ff_dim": 48, "axes_dims": (4, 4, 8)}
    flags = {"visual_cond": False, "ca_rope": True, "cross_gates": True, "fix_modulation": True}
    model = cls(**sizes, **flags, num_text_blocks=2, num_visual_blocks=3)
    moving = {"hidden_states": draw(BATCH, 2, 8, 8, 4), "audio_hidden_states": draw(BATCH, 7, 5)}
    return model, Feed(moving, {**text(draw), "pooled_projections": draw(BATCH, 20)})


@recipe("SanaVideo", "SanaVideoTransformer3DModel")
def _sana_video(cls: Any, draw: Draw) -> Built:
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
    model = cls(**HEADS, **LATENT, **cross, caption_channels=24, num_layers=3, sample_size=8)
    return model, Feed(video(draw), {**text(draw), "encoder_attention_mask": mask()})


@recipe("Cosmos", "CosmosTransformer3DModel")
def _cosmos(cls: Any, draw: Draw) -> Built:
    sizes = {"text_embed_dim": 24, "adaln_lora_dim": 8, "max_size": (4, 8, 8), "concat_padding_mask": False}
    return cls(**HEADS, **LATENT, **sizes, num_layers=3), Feed(video(draw), {**text(draw), "fps": 24}, clock=1.0)


@recipe("LTX2", "LTX2VideoTransformer3DModel")
def _ltx2(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 24}
    model = cls(**HEADS, **sizes, **SOUND, num_layers=3)
    fixed = {"audio_encoder_hidden_states": draw(BATCH, TEXT, 24), "encoder_attention_mask": mask()}
    fixed |= {"num_frames": 2, "height": 4, "width": 4, "audio_num_frames": 7}
    moving = {**packed(draw, frames=2), "audio_hidden_states": draw(BATCH, 7, 5)}
    return model, Feed(moving, {**text(draw), **fixed}, shape=(BATCH, 1))


@recipe("MiniMaxH3", "MiniMaxH3Transformer3DModel")
def _minimax_h3(cls: Any, draw: Draw) -> Built:
    sizes = {"hidden_size": 24, "ffn_dim": 48, "in_channels": 4, "audio_in_channels": 5, "text_dim": 24}
    sizes |= {"freq_dim": 32, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2}
    model = cls(**HEADS, **sizes, num_layers=3, num_refiner_layers=2)
    kinds = torch.tensor([0] * TEXT + [1] * 32 + [2] * 7)
    fixed = {"timestep_indices": torch.zeros_like(kinds), "token_tags": kinds}
    fixed |= {name: (kinds == kind).nonzero()[:, 0] for kind, name in enumerate(INDICES)}
    fixed["position_ids"] = torch.cat([grid(TEXT, 1, 1), grid(2, 4, 4), grid(7, 1, 1)])
    moving = {"hidden_states": draw(BATCH, 32, 16), "audio_hidden_states": draw(BATCH, 7, 5)}
    return model, Feed(moving, {**text(draw), **fixed}, clock=1.0, shape=(1,))


@recipe("Cosmos3Omni", "Cosmos3OmniTransformer")
def _cosmos3_omni(cls: Any, draw: Draw) -> Built:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "latent_channel": 4, "patch_latent_dim": 16, "vocab_size": 40}
    model = cls(**sizes, num_hidden_layers=3, rope_axes_dim=(4, 2, 2))
    fixed = {"input_ids": draw.integers(40, TEXT), "text_indexes": torch.arange(TEXT), "und_len": TEXT}
    fixed |= {"sequence_length": TEXT + 32, "vision_token_shapes": [(2, 4, 4)]}
    fixed |= {f"vision_{name}_indexes": torch.arange(TEXT, TEXT + 32) for name in ("sequence", "mse_loss")}
    fixed["vision_noisy_frame_indexes"] = [torch.arange(2)]
    fixed["position_ids"] = torch.cat([grid(TEXT, columns=3), grid(2, 4, 4)]).long().T
    moving = {"vision_tokens": [draw(1, 4, 2, 8, 8)]}
    return model, Feed(moving, fixed, shape=(32,), time="vision_timesteps")


@recipe("SanaWM", "SanaWMTransformer3DModel")
def _sana_wm(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 4, "hidden_size": 32, "linear_head_dim": 16, "chunk_plucker_channels": 6}
    model = cls(**sizes, num_attention_heads=2, num_layers=4, softmax_every_n=2, caption_channels=24)
    fixed = {"encoder_hidden_states": draw(BATCH, 1, TEXT, 24), "encoder_attention_mask": mask()}
    fixed["chunk_plucker"] = draw(BATCH, 6, 2, 4, 4)
    return model, Feed({"hidden_states": draw(BATCH, 4, 2, 4, 4)}, fixed, shape=(BATCH, 1, 2))


@recipe("SanaWMRefiner", "SanaWMLTX2RefinerTransformer3DModel")
def _sana_wm_refiner(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 24}
    model = cls(**HEADS, **sizes, **SOUND, num_layers=3)
    angles = draw(BATCH, 32, 16).repeat_interleave(2, dim=2)
    fixed = {"video_rotary_emb": (angles.cos(), angles.sin()), "encoder_attention_mask": mask()}
    return model, Feed(packed(draw, frames=2), {**text(draw), **fixed}, shape=(BATCH, 1))


@recipe("Kandinsky6SR", "Kandinsky6SRTransformer3DModel")
def _kandinsky6_sr(cls: Any, draw: Draw) -> Built:
    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 24, "model_dim": 32, "ff_dim": 48}
    model = cls(**sizes, num_visual_blocks=3, axes_dims=(4, 4, 8))
    return model, Feed({"hidden_states": draw(BATCH, 2, 8, 8, 9)}, {})


@recipe("WanAnimate2", "WanAnimate2Transformer3DModel")
def _wan_animate2(cls: Any, draw: Draw) -> Built:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
    from torch.nn.attention.flex_attention import create_block_mask

    sizes = {"text_len": TEXT, "in_dim": 10, "dim": 32, "ffn_dim": 48, "freq_dim": 32, "text_dim": 24}
    model = cls(**sizes, out_dim=4, num_heads=2, num_layers=3)
    grids = [torch.tensor([[frames, 2, 2]] * BATCH) for frames in (3, 2)]  # generated, reference
    fixed = {"offset_grid_sizes": grids[0], "reference_grid_sizes": grids[1], "seq_len": 12}
    fixed |= {"encoder_hidden_states": [draw(TEXT, 24), draw(4, 24)], "kv_cache": WanAnimate2KVCache(3)}
    fixed |= {"encoder_hidden_states_image": draw(BATCH, 5, 1280), "origin_len": 5, "origin_area": (32, 32)}
    reference = {
        "hidden_states": list(draw(BATCH, 4, 2, 4, 4)),
        "condition_latents": list(draw(BATCH, 6, 2, 4, 4)),
    }
    with torch.no_grad():  # the pass over the reference video fills the cache once, before the loop
        model(**fixed | reference | {"timestep": torch.ones(BATCH), "kv_cache_mode": "extract", "seq_len": 8})
    # The class would compile this mask; here every token sees all tokens of both videos.
    model.block_masks[2, 4] = create_block_mask(
        lambda b, h, query, key: (key < 12) | ((key >= 128) & (key < 136)), None, None, 128, 256, device="cpu"
    )
    fixed |= {"condition_latents": list(draw(BATCH, 6, 3, 4, 4)), "kv_cache_mode": "cached"}
    return model, Feed({"hidden_states": list(draw(BATCH, 4, 3, 4, 4))}, fixed)
