"""Tiny image transformers, one recipe a class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cachekit.diffusers.inputs import Draw, Feed, grid, rotary
from cachekit.diffusers.zoo.specimen import (
    BATCH,
    BOTH,
    HEADS,
    IDS,
    LATENT,
    PACKED,
    TEXT,
    Built,
    image,
    mask,
    packed,
    recipe,
    text,
)


@recipe("Flux", "FluxTransformer2DModel")
def _flux(cls: Any, draw: Draw) -> Built:
    sizes = {
        "in_channels": 8,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 4, 8),
    }
    return cls(**HEADS, **sizes, num_layers=3, num_single_layers=3, guidance_embeds=True)


@recipe("Flux2", "Flux2Transformer2DModel")
def _flux2(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 8, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4)}
    return cls(**HEADS, **sizes, num_layers=3, num_single_layers=3, timestep_guidance_channels=32)


@recipe("SD3", "SD3Transformer2DModel")
def _sd3(cls: Any, draw: Draw) -> Built:
    sizes = {
        "sample_size": 8,
        "pos_embed_max_size": 8,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
    }
    extras = {"pooled_projection_dim": 20, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    return cls(**HEADS, **LATENT, **sizes, **extras, num_layers=4)


@recipe("QwenImage", "QwenImageTransformer2DModel")
def _qwen_image(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 8, "out_channels": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 8)}
    return cls(**HEADS, **sizes, num_layers=3)


@recipe("PixArt", "PixArtTransformer2DModel")
def _pixart(cls: Any, draw: Draw) -> Built:
    sizes = {"in_channels": 4, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 24}
    return cls(**HEADS, **sizes, sample_size=8, num_layers=3, use_additional_conditions=False)


@recipe("AuraFlow", "AuraFlowTransformer2DModel")
def _aura_flow(cls: Any, draw: Draw) -> Built:
    sizes = {
        "sample_size": 8,
        "pos_embed_max_size": 16,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
    }
    return cls(**HEADS, **LATENT, **sizes, num_mmdit_layers=3, num_single_dit_layers=3)


@recipe("Lumina2", "Lumina2Transformer2DModel")
def _lumina2(cls: Any, draw: Draw) -> Built:
    sizes = {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "cap_feat_dim": 24, "multiple_of": 8}
    heads = {
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "axes_dim_rope": (4, 4, 8),
        "axes_lens": (32, 16, 16),
    }
    return cls(**sizes, **heads, num_layers=3, num_refiner_layers=2)


@recipe("Chroma", "ChromaTransformer2DModel")
def _chroma(cls: Any, draw: Draw) -> Built:
    approximator = {"approximator_num_channels": 64, "approximator_hidden_dim": 32, "approximator_layers": 2}
    return cls(**HEADS, **PACKED, **BOTH, **approximator)


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
    return cls(**HEADS, **LATENT, **sizes, num_layers=3, sample_size=8)


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
    return cls(**HEADS, **LATENT, **cross, caption_channels=24, num_layers=3, sample_size=8, patch_size=2)


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


@recipe("Prior", "PriorTransformer")
def _prior(cls: Any, draw: Draw) -> Built:
    model = cls(**HEADS, num_layers=3, embedding_dim=24, num_embeddings=TEXT, additional_embeddings=4)
    fixed = {"proj_embedding": draw(BATCH, 24), "attention_mask": mask(torch.bool)}
    return model, Feed({"hidden_states": draw(BATCH, 24)}, {**text(draw), **fixed})
