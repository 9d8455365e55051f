"""Recipes of `zoo.py` for the transformer classes beyond its `REQUIRED` ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

# isort: off
if TYPE_CHECKING or __package__:  # the tests are a package, or their folder is on the path
    from .zoo import BATCH, HEADS, LATENT, TEXT, Built, Draw, Feed
    from .zoo import grid, image, mask, packed, recipe, rotary, text, video
else:
    from zoo import BATCH, HEADS, LATENT, TEXT, Built, Draw, Feed
    from zoo import grid, image, mask, packed, recipe, rotary, text, video
# isort: on

PACKED = {"in_channels": 8, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 8)}
BOTH = {"num_layers": 3, "num_single_layers": 3}
IDS = {"img_ids": grid(4, 4, columns=3), "txt_ids": torch.zeros(TEXT, 3)}


# Two lists of blocks, one for image and text apart and one for them together.


@recipe("Chroma", "ChromaTransformer2DModel")
def _chroma(cls: Any, draw: Draw) -> Built:
    approximator = {"approximator_num_channels": 64, "approximator_hidden_dim": 32, "approximator_layers": 2}
    model = cls(**HEADS, **PACKED, **BOTH, **approximator)
    return model, Feed(packed(draw), {**text(draw), **IDS}, clock=1.0)


@recipe("Bria", "BriaTransformer2DModel")
def _bria(cls: Any, draw: Draw) -> Built:
    return cls(**HEADS, **PACKED, **BOTH), Feed(packed(draw), {**text(draw), **IDS})


@recipe("BriaFibo", "BriaFiboTransformer2DModel")
def _bria_fibo(cls: Any, draw: Draw) -> Built:
    layers = [draw(BATCH, TEXT, 20) for _ in range(6)]
    model = cls(**HEADS, **PACKED, **BOTH, text_encoder_dim=20)
    return model, Feed(packed(draw), {**text(draw), **IDS, "text_encoder_layers": layers})


@recipe("BriaFibo2", "BriaFibo2Transformer2DModel")
def _bria_fibo2(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 4, "dim": 32, "n_heads": 2, "cap_feat_dim": 24, "axes_dims": (4, 4, 8)}
    gist = {"min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 4}
    gist |= {"gist_min_text_len": 4, "gist_max_text_len": 8}
    model = cls(**sizes, **gist, n_layers=4, injection_layer_ids=(1, 2), axes_lens=(16, 16, 16))
    fixed = {"encoder_hidden_states": draw(BATCH, 3, TEXT, 24), "encoder_attention_mask": mask(torch.bool)}
    return model, Feed(image(draw), fixed, clock=1.0)


@recipe("LongCatImage", "LongCatImageTransformer2DModel")
def _longcat_image(cls: Any, draw: Draw) -> Built:
    return cls(**HEADS, **PACKED, **BOTH), Feed(packed(draw), {**text(draw), **IDS}, clock=1.0)


@recipe("OvisImage", "OvisImageTransformer2DModel")
def _ovis_image(cls: Any, draw: Draw) -> Built:
    return cls(**HEADS, **PACKED, **BOTH, out_channels=8), Feed(packed(draw), {**text(draw), **IDS}, clock=1.0)


@recipe("Flux3", "Flux3Transformer2DModel")
def _flux3(cls: Any, draw: Draw) -> Built:
    sizes = {
        "in_channels": 8,
        "cond_in_channels": 8,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    model = cls(**HEADS, **sizes, **BOTH, timestep_channels=32)
    fixed = {"img_ids": grid(1, 4, 4, 1), "txt_ids": grid(1, 1, 1, TEXT)}
    fixed |= {"image_cond_hidden_states": draw(BATCH, 4, 8), "image_cond_ids": grid(1, 2, 2, 1)}
    return model, Feed(packed(draw), {**text(draw), **fixed}, clock=1.0)


@recipe("HiDream", "HiDreamImageTransformer2DModel")
def _hidream(cls: Any, draw: Draw) -> Built:
    sizes = {"patch_size": 2, "caption_channels": (24, 20), "text_emb_dim": 20, "axes_dims_rope": (4, 4, 8)}
    extras = {"max_resolution": (8, 8), "llama_layers": (0, 1, 2, 3, 4, 5), "force_inference_output": True}
    model = cls(**HEADS, **LATENT, **BOTH, **sizes, **extras)
    fixed = {"encoder_hidden_states_t5": draw(BATCH, TEXT, 24), "pooled_embeds": draw(BATCH, 20)}
    fixed["encoder_hidden_states_llama3"] = draw(6, BATCH, TEXT, 20)
    return model, Feed(image(draw), fixed, time="timesteps")


@recipe("HunyuanImage", "HunyuanImageTransformer2DModel")
def _hunyuan_image(cls: Any, draw: Draw) -> Built:
    sizes = {"text_embed_dim": 24, "text_embed_2_dim": 20, "rope_axes_dim": (8, 8), "patch_size": (2, 2)}
    model = cls(**HEADS, **LATENT, **BOTH, **sizes, num_refiner_layers=2, guidance_embeds=True)
    fixed = {"encoder_attention_mask": mask(torch.int64), "guidance": torch.full((BATCH,), 3500.0)}
    fixed |= {"encoder_hidden_states_2": draw(BATCH, 5, 20), "encoder_attention_mask_2": mask(length=5)}
    return model, Feed(image(draw), {**text(draw), **fixed})


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


# One list of blocks over images.


@recipe("CogView3Plus", "CogView3PlusTransformer2DModel")
def _cogview3_plus(cls: Any, draw: Draw) -> Built:
    sizes = {"text_embed_dim": 24, "time_embed_dim": 24, "condition_dim": 8, "pos_embed_max_size": 8}
    model = cls(**HEADS, **LATENT, **sizes, num_layers=3, sample_size=8)
    side = torch.full((BATCH, 2), 64.0)
    fixed = {"original_size": side, "target_size": side, "crop_coords": torch.zeros(BATCH, 2)}
    return model, Feed(image(draw), {**text(draw), **fixed})


@recipe("CogView4", "CogView4Transformer2DModel")
def _cogview4(cls: Any, draw: Draw) -> Built:
    sizes = {"text_embed_dim": 24, "time_embed_dim": 24, "condition_dim": 8, "rope_axes_dim": (8, 8)}
    model = cls(**HEADS, **LATENT, **sizes, num_layers=3, sample_size=8)
    side = torch.full((BATCH, 2), 64.0)
    fixed = {"original_size": side, "target_size": side, "crop_coords": torch.zeros(BATCH, 2)}
    return model, Feed(image(draw), {**text(draw), **fixed, "attention_mask": mask(torch.int64)})


@recipe("GlmImage", "GlmImageTransformer2DModel")
def _glm_image(cls: Any, draw: Draw) -> Built:
    sizes = {"text_embed_dim": 24, "time_embed_dim": 24, "condition_dim": 8}
    model = cls(**HEADS, **LATENT, **sizes, num_layers=3, prior_vq_quantizer_codebook_size=32)
    fixed = {"prior_token_id": draw.integers(32, BATCH, 16), "target_size": torch.full((BATCH, 2), 64.0)}
    fixed |= {
        "prior_token_drop": torch.zeros(BATCH, 16, dtype=torch.bool),
        "crop_coords": torch.zeros(BATCH, 2),
    }
    return model, Feed(image(draw), {**text(draw), **fixed})


@recipe("HunyuanDiT", "HunyuanDiT2DModel")
def _hunyuan_dit(cls: Any, draw: Draw) -> Built:
    sizes = {
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 32,
        "pooled_projection_dim": 16,
    }
    extras = {"cross_attention_dim": 24, "cross_attention_dim_t5": 16, "text_len": TEXT, "text_len_t5": 5}
    model = cls(**HEADS, **sizes, **extras, num_layers=6, use_style_cond_and_image_meta_size=False)
    fixed = {"text_embedding_mask": mask(), "image_rotary_emb": rotary(draw, 16)}
    fixed |= {"encoder_hidden_states_t5": draw(BATCH, 5, 16), "text_embedding_mask_t5": mask(length=5)}
    return model, Feed(image(draw), {**text(draw), **fixed})


@recipe("Sana", "SanaTransformer2DModel")
def _sana(cls: Any, draw: Draw) -> Built:
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
    model = cls(**HEADS, **LATENT, **cross, caption_channels=24, num_layers=3, sample_size=8, patch_size=2)
    return model, Feed(image(draw), {**text(draw), "encoder_attention_mask": mask()})


@recipe("DiT", "DiTTransformer2DModel")
def _dit(cls: Any, draw: Draw) -> Built:
    model = cls(**HEADS, in_channels=4, out_channels=8, num_layers=3, sample_size=8, num_embeds_ada_norm=1001)
    return model, Feed(image(draw), {"class_labels": torch.tensor([3, 1000])})


@recipe("LuminaNext", "LuminaNextDiT2DModel")
def _lumina_next(cls: Any, draw: Draw) -> Built:
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
    }
    model = cls(**sizes, num_layers=3, multiple_of=8, cross_attention_dim=24)
    angles = draw(8, 8, 8)
    nn.init.normal_(model.pad_token)
    fixed = {"encoder_mask": mask(), "image_rotary_emb": torch.polar(torch.ones_like(angles), angles)}
    fixed |= {"cross_attention_kwargs": {}}
    return model, Feed(image(draw), {**text(draw), **fixed}, clock=1.0)


@recipe("ErnieImage", "ErnieImageTransformer2DModel")
def _ernie_image(cls: Any, draw: Draw) -> Built:
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "text_in_dim": 24, "rope_axes_dim": (4, 4, 8)}
    model = cls(**LATENT, **sizes, num_attention_heads=2, num_layers=3, patch_size=2)
    return model, Feed(image(draw), {"text_bth": draw(BATCH, TEXT, 24), "text_lens": torch.tensor([TEXT, 4])})


@recipe("PRX", "PRXTransformer2DModel")
def _prx(cls: Any, draw: Draw) -> Built:
    model = cls(in_channels=4, context_in_dim=24, hidden_size=32, num_heads=2, depth=3, axes_dim=(8, 8))
    return model, Feed(image(draw), {**text(draw), "attention_mask": mask(torch.bool)}, clock=1.0)


@recipe("ZImage", "ZImageTransformer2DModel")
def _z_image(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 4, "dim": 32, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 24}
    model = cls(**sizes, n_layers=3, axes_dims=[4, 4, 8], axes_lens=[128, 32, 32])
    moving = {"x": [draw(4, 1, 8, 8) for _ in range(BATCH)]}
    return model, Feed(moving, {"cap_feats": [draw(TEXT, 24), draw(4, 24)]}, clock=1.0, time="t")


@recipe("NucleusMoEImage", "NucleusMoEImageTransformer2DModel")
def _nucleus_moe_image(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 8, "out_channels": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 8)}
    experts = {"num_experts": 4, "moe_intermediate_dim": 32, "capacity_factors": [2.0] * 6}
    model = cls(**HEADS, **sizes, **experts, num_layers=6)
    for block in model.transformer_blocks[3:-1]:  # the class leaves its experts uninitialised
        nn.init.normal_(block.img_mlp.experts.gate_up_proj, std=0.1)
        nn.init.normal_(block.img_mlp.experts.down_proj, std=0.1)
    fixed = {"encoder_hidden_states_mask": mask(torch.bool), "img_shapes": [(1, 4, 4)] * BATCH}
    return model, Feed(packed(draw), {**text(draw), **fixed}, clock=1.0)


@recipe("OmniGen", "OmniGenTransformer2DModel")
def _omnigen(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {
        "intermediate_size": 48,
        "num_layers": 3,
        "vocab_size": 40,
        "pad_token_id": 0,
        "pos_embed_max_size": 16,
    }
    scaling = {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
    model = cls(**sizes, rope_scaling=scaling, time_step_dim=32)
    length = TEXT + 17
    fixed = {"input_ids": draw.integers(40, BATCH, TEXT), "input_img_latents": [], "input_image_sizes": {}}
    fixed |= {"attention_mask": torch.ones(BATCH, length, length)}
    fixed |= {"position_ids": torch.arange(length).expand(BATCH, -1)}
    return model, Feed(image(draw), fixed, clock=1.0)


@recipe("Krea2", "Krea2Transformer2DModel")
def _krea2(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 8, "num_key_value_heads": 1, "intermediate_size": 48, "timestep_embed_dim": 32}
    words = {"text_hidden_dim": 32, "num_text_layers": 3, "text_num_attention_heads": 2}
    words |= {"text_num_key_value_heads": 2, "text_intermediate_size": 48}
    model = cls(**HEADS, **sizes, **words, num_layers=3, axes_dims_rope=(4, 4, 8))
    fixed = {"encoder_hidden_states": draw(BATCH, TEXT, 3, 32), "encoder_attention_mask": mask(torch.bool)}
    fixed["position_ids"] = torch.cat([torch.zeros(TEXT, 3), grid(1, 4, 4)])
    return model, Feed(packed(draw), fixed, clock=1.0)


# One list of blocks over videos.

WAN = {"text_dim": 24, "freq_dim": 32, "ffn_dim": 48, "rope_max_seq_len": 16}
SEEN = {"image_dim": 20, "added_kv_proj_dim": 32}
SOUND = {"audio_in_channels": 5, "audio_out_channels": 5, "audio_num_attention_heads": 2}
SOUND |= {"audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}


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
    model = cls(**sizes, num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 4, 8))
    fixed = {"pooled_projections": draw(BATCH, 20), "text_rope_pos": torch.arange(TEXT)}
    fixed |= {"visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)]}
    return model, Feed({"hidden_states": draw(BATCH, 2, 8, 8, 4)}, {**text(draw), **fixed})


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


@recipe("JoyImageEdit", "JoyImageEditTransformer3DModel")
def _joy_image_edit(cls: Any, draw: Draw) -> Built:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 24, "rope_dim_list": [4, 4, 8]}
    model = cls(**LATENT, **sizes, num_layers=3)
    return model, Feed({"hidden_states": draw(BATCH, 2, 4, 1, 8, 8)}, text(draw))


@recipe("JoyImageEditPlus", "JoyImageEditPlusTransformer3DModel")
def _joy_image_edit_plus(cls: Any, draw: Draw) -> Built:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 24, "rope_dim_list": [4, 4, 8]}
    model = cls(**LATENT, **sizes, num_layers=3)
    fixed = {"encoder_hidden_states_mask": mask(), "shape_list": [[(1, 4, 4), (1, 4, 4)], [(1, 4, 4)]]}
    return model, Feed({"hidden_states": draw(BATCH, 32, 4, 1, 2, 2)}, {**text(draw), **fixed})


# One list of blocks over sound.


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


# Packed sequences and other shapes of call.


@recipe("Ideogram4", "Ideogram4Transformer2DModel")
def _ideogram4(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 8, "intermediate_size": 48, "adaln_dim": 24, "llm_features_dim": 24}
    model = cls(**HEADS, **sizes, num_layers=3, mrope_section=(4, 2, 2))
    length = TEXT + 16
    words = torch.arange(length) < TEXT
    fixed = {
        "indicator": torch.where(words, 3, 2).expand(BATCH, -1),
        "segment_ids": torch.zeros(BATCH, length),
    }
    fixed["position_ids"] = torch.cat([grid(TEXT, columns=3), grid(1, 4, 4)]).long().expand(BATCH, -1, -1)
    moving = {"hidden_states": draw(BATCH, length, 8)}
    return model, Feed(moving, {**text(draw, length=length), **fixed}, clock=1.0)


@recipe("QwenImage21", "QwenImage21Transformer2DModel")
def _qwen_image21(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 8, "out_channels": 8, "context_in_dim": 24, "axes_dims_rope": (4, 4, 8)}
    model = cls(**HEADS, **sizes, num_layers=3)
    slots = (torch.arange(TEXT + 4) >= TEXT).expand(BATCH, -1)
    fixed = {"img_shapes": [[(1, 4, 4)]] * BATCH, "img_mask": slots, "encoder_hidden_states_mask": mask()}
    return model, Feed(packed(draw), {**text(draw), **fixed}, clock=1.0)


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


INDICES = ("text_indices", "video_indices", "audio_indices")


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


@recipe("Prior", "PriorTransformer")
def _prior(cls: Any, draw: Draw) -> Built:
    model = cls(**HEADS, num_layers=3, embedding_dim=24, num_embeddings=TEXT, additional_embeddings=4)
    fixed = {"proj_embedding": draw(BATCH, 24), "attention_mask": mask(torch.bool)}
    return model, Feed({"hidden_states": draw(BATCH, 24)}, {**text(draw), **fixed})


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
