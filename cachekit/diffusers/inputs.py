"""What a sampler would pass to a transformer of diffusers, from its configuration alone.

For looking at a model without its pipeline, text encoders or weights: `cachekit explain` and `cachekit bench`, and the
tiny models of the zoo. A class that is not here works as well, with inputs of your own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cachekit.errors import ArgumentError


class Size(NamedTuple):
    """Of what is denoised, in cells of the latent."""

    batch: int = 1
    frames: int = 1
    height: int = 128
    width: int = 128
    text: int = 256  # tokens


class Feed(NamedTuple):
    """The arguments of a forward."""

    moving: dict[str, Any]  # the denoised arguments at step 0: tensors, or lists of tensors
    fixed: dict[str, Any]  # the same at every step
    clock: float = 1000.0  # the timestep of step 0
    dtype: torch.dtype = torch.float32  # of the timestep
    shape: tuple[int, ...] | None = None  # of the timestep, None for one number a sample
    time: str = "timestep"


class Draw:
    """A seeded source of random tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high)."""
        return torch.randint(high, shape, generator=self.generator)


class Kind(NamedTuple):
    """A class of transformers whose inputs are known."""

    feed: Callable[[Any, Size, Draw], Feed]  # of a configuration
    pixels: int  # along a side of a cell of the latent
    frames: int  # of a video in a frame of the latent, but for the first; 0 for images
    text: int  # tokens that its pipeline pads a prompt to


KINDS: dict[str, Kind] = {}


def feed(model: nn.Module, size: Size, draw: Draw | None = None) -> Feed:
    """Arguments for one call of `model`.

    Args:
        model: a transformer of diffusers; only its class and configuration are looked at.
        size: of what is denoised.
        draw: where the random numbers come from.

    Raises:
        ArgumentError: the inputs of this class are not known.

    Example:
        >>> from diffusers import PixArtTransformer2DModel
        >>> model = PixArtTransformer2DModel(num_layers=1, attention_head_dim=8, cross_attention_dim=128)
        >>> sorted(feed(model, Size(height=16, width=16, text=4)).fixed)
        ['added_cond_kwargs', 'encoder_attention_mask', 'encoder_hidden_states']
    """
    return kind(type(model).__name__).feed(model.config, size, draw or Draw(0))


def schedule(step: int) -> float:
    """The timestep of a step, on the scale 0..1000: falling for ever, never zero."""
    return round(1000 * 0.94**step, 3)


def trajectory(feed: Feed, seed: int = 0) -> Callable[[int], dict[str, Any]]:
    """The arguments of every step: what moves turns slowly towards fresh noise, so that its variance stays."""
    draw = Draw(seed)
    noise = tree_map(lambda value: draw(*value.shape), feed.moving)
    shape = feed.shape if feed.shape is not None else (len(next(iter(feed.moving.values()))),)

    def inputs(step: int) -> dict[str, Any]:
        near, far = math.cos(0.05 * step), math.sin(0.05 * step)
        moving = tree_map(lambda a, b: near * a + far * b, feed.moving, noise)
        fixed = tree_map(lambda value: value, feed.fixed)  # fresh containers: a forward may pop from its own
        time = torch.full(shape, schedule(step) * feed.clock / 1000).to(feed.dtype)
        return {**moving, **fixed, feed.time: time}

    return inputs


def moved(arguments: dict[str, Any], device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments on a device; what the blocks compute with in `dtype`, positions and times as they are."""

    def move(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        positions = name.endswith(("_ids", "_pos", "rotary_emb", "timestep"))
        return value.to(device, dtype if value.is_floating_point() and not positions else None)

    return {name: tree_map(lambda value, name=name: move(name, value), value) for name, value in arguments.items()}


def kind(name: str) -> Kind:
    """What is known of the inputs of a class.

    Raises:
        ArgumentError: nothing.
    """
    if name not in KINDS:
        raise ArgumentError(
            f"The inputs of {name} are not known without its pipeline, only those of {', '.join(sorted(KINDS))}. "
            "Call step.explain(timesteps, **inputs) in Python, with what your pipeline passes to the model."
        )
    return KINDS[name]


def _inputs(name: str, *, pixels: int = 8, frames: int = 0, text: int = 256):
    def register(function: Callable[[Any, Size, Draw], Feed]) -> Callable[[Any, Size, Draw], Feed]:
        KINDS[name] = Kind(function, pixels, frames, text)
        return function

    return register


def grid(*sizes: int, columns: int | None = None) -> Tensor:
    """Position ids of a grid's cells, padded with zero columns on the left."""
    ids = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).float().reshape(-1, len(sizes))
    return nn.functional.pad(ids, ((columns or len(sizes)) - len(sizes), 0))


def rotary(draw: Draw, length: int, width: int = 16) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each given twice in a row, as a pipeline computes them."""
    angles = draw(length, width // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def mask(size: Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """A text mask; of several samples the text of all but the first ends a token early."""
    keep = torch.ones(size.batch, size.text, dtype=dtype)
    keep[1:, -1] = 0
    return keep


def _image(size: Size, draw: Draw, channels: int) -> dict[str, Tensor]:
    return {"hidden_states": draw(size.batch, channels, size.height, size.width)}


def _video(size: Size, draw: Draw, channels: int) -> dict[str, Tensor]:
    return {"hidden_states": draw(size.batch, channels, size.frames, size.height, size.width)}


def _tokens(size: Size, draw: Draw, channels: int, patch: int = 2) -> dict[str, Tensor]:
    count = size.frames * (size.height // patch) * (size.width // patch)
    return {"hidden_states": draw(size.batch, count, channels)}


def _text(size: Size, draw: Draw, width: int) -> dict[str, Any]:
    return {"encoder_hidden_states": draw(size.batch, size.text, width)}


@_inputs("FluxTransformer2DModel", text=512)
def _flux(config: Any, size: Size, draw: Draw) -> Feed:
    moving = _tokens(size, draw, config.in_channels)
    fixed = {
        **_text(size, draw, config.joint_attention_dim),
        "pooled_projections": draw(size.batch, config.pooled_projection_dim),
        "img_ids": grid(size.height // 2, size.width // 2, columns=3),
        "txt_ids": torch.zeros(size.text, 3),
    }
    if config.guidance_embeds:
        fixed["guidance"] = torch.full((size.batch,), 3.5)
    return Feed(moving, fixed, clock=1.0)


@_inputs("Flux2Transformer2DModel", text=512)
def _flux2(config: Any, size: Size, draw: Draw) -> Feed:
    moving = _tokens(size, draw, config.in_channels)
    fixed = {
        **_text(size, draw, config.joint_attention_dim),
        "img_ids": grid(1, size.height // 2, size.width // 2, 1),
        "txt_ids": grid(1, 1, 1, size.text),
        "guidance": torch.full((size.batch,), 4.0),
    }
    return Feed(moving, fixed, clock=1.0)


@_inputs("ChromaTransformer2DModel", text=512)
def _chroma(config: Any, size: Size, draw: Draw) -> Feed:
    ids = {
        "img_ids": grid(size.height // 2, size.width // 2, columns=3),
        "txt_ids": torch.zeros(size.text, 3),
    }
    moving = _tokens(size, draw, config.in_channels)
    return Feed(moving, {**_text(size, draw, config.joint_attention_dim), **ids}, clock=1.0)


@_inputs("SD3Transformer2DModel", text=333)
def _sd3(config: Any, size: Size, draw: Draw) -> Feed:
    moving, fixed = _image(size, draw, config.in_channels), _text(size, draw, config.joint_attention_dim)
    fixed["pooled_projections"] = draw(size.batch, config.pooled_projection_dim)
    return Feed(moving, fixed)


@_inputs("QwenImageTransformer2DModel", text=512)
def _qwen_image(config: Any, size: Size, draw: Draw) -> Feed:
    moving = _tokens(size, draw, config.in_channels)
    fixed = {
        **_text(size, draw, config.joint_attention_dim),
        "encoder_hidden_states_mask": mask(size, torch.bool),
        "img_shapes": [[(size.frames, size.height // 2, size.width // 2)]] * size.batch,
    }
    return Feed(moving, fixed, clock=1.0)


@_inputs("PixArtTransformer2DModel", text=300)
def _pixart(config: Any, size: Size, draw: Draw) -> Feed:
    nothing = {"resolution": None, "aspect_ratio": None}
    if config.use_additional_conditions or (config.use_additional_conditions is None and config.sample_size == 128):
        nothing = {"resolution": torch.full((size.batch, 2), 1024.0), "aspect_ratio": torch.ones(size.batch, 1)}
    fixed = {"added_cond_kwargs": nothing, "encoder_attention_mask": mask(size)}
    moving = _image(size, draw, config.in_channels)
    text = _text(size, draw, config.caption_channels or config.cross_attention_dim)
    return Feed(moving, {**text, **fixed})


@_inputs("AuraFlowTransformer2DModel")
def _aura_flow(config: Any, size: Size, draw: Draw) -> Feed:
    return Feed(_image(size, draw, config.in_channels), _text(size, draw, config.joint_attention_dim), clock=1.0)


@_inputs("Lumina2Transformer2DModel")
def _lumina2(config: Any, size: Size, draw: Draw) -> Feed:
    moving, fixed = _image(size, draw, config.in_channels), _text(size, draw, config.cap_feat_dim)
    return Feed(moving, {**fixed, "encoder_attention_mask": mask(size, torch.bool)}, clock=1.0)


@_inputs("SanaTransformer2DModel", pixels=32, text=300)
def _sana(config: Any, size: Size, draw: Draw) -> Feed:
    moving, fixed = _image(size, draw, config.in_channels), _text(size, draw, config.caption_channels)
    return Feed(moving, {**fixed, "encoder_attention_mask": mask(size)})


@_inputs("CogView4Transformer2DModel")
def _cogview4(config: Any, size: Size, draw: Draw) -> Feed:
    side = torch.tensor([[8.0 * size.height, 8.0 * size.width]]).repeat(size.batch, 1)
    fixed = {"original_size": side, "target_size": side, "crop_coords": torch.zeros(size.batch, 2)}
    fixed["attention_mask"] = mask(size, torch.int64)
    return Feed(_image(size, draw, config.in_channels), {**_text(size, draw, config.text_embed_dim), **fixed})


@_inputs("WanTransformer3DModel", frames=4, text=512)
def _wan(config: Any, size: Size, draw: Draw) -> Feed:
    moving, fixed = _video(size, draw, config.in_channels), _text(size, draw, config.text_dim)
    if config.image_dim is not None:
        fixed["encoder_hidden_states_image"] = draw(size.batch, 257, config.image_dim)
    return Feed(moving, fixed)


@_inputs("CogVideoXTransformer3DModel", frames=4, text=226)
def _cogvideox(config: Any, size: Size, draw: Draw) -> Feed:
    moving = {"hidden_states": draw(size.batch, size.frames, config.in_channels, size.height, size.width)}
    fixed = _text(size, draw, config.text_embed_dim)
    patch, frames = config.patch_size, size.frames // (config.patch_size_t or 1)
    if config.use_rotary_positional_embeddings:
        count = frames * (size.height // patch) * (size.width // patch)
        fixed["image_rotary_emb"] = rotary(draw, count, config.attention_head_dim)
    return Feed(moving, fixed, dtype=torch.int64)


@_inputs("LTXVideoTransformer3DModel", pixels=32, frames=8, text=128)
def _ltx(config: Any, size: Size, draw: Draw) -> Feed:
    shape = {"num_frames": size.frames, "height": size.height, "width": size.width}
    moving = _tokens(size, draw, config.in_channels, patch=1)
    return Feed(moving, {**_text(size, draw, config.caption_channels), "encoder_attention_mask": mask(size), **shape})


@_inputs("MochiTransformer3DModel", frames=6)
def _mochi(config: Any, size: Size, draw: Draw) -> Feed:
    moving, fixed = _video(size, draw, config.in_channels), _text(size, draw, config.text_embed_dim)
    return Feed(moving, {**fixed, "encoder_attention_mask": mask(size, torch.bool)})


@_inputs("HunyuanVideoTransformer3DModel", frames=4)
def _hunyuan_video(config: Any, size: Size, draw: Draw) -> Feed:
    fixed = {
        "pooled_projections": draw(size.batch, config.pooled_projection_dim),
        "encoder_attention_mask": mask(size, torch.int64),
    }
    if config.guidance_embeds:
        fixed["guidance"] = torch.full((size.batch,), 6000.0)
    moving = _video(size, draw, config.in_channels)
    return Feed(moving, {**_text(size, draw, config.text_embed_dim), **fixed})


@_inputs("LatteTransformer3DModel", frames=1, text=120)
def _latte(config: Any, size: Size, draw: Draw) -> Feed:
    size = size._replace(frames=config.video_length)  # it has as many positions
    return Feed(_video(size, draw, config.in_channels), _text(size, draw, config.caption_channels))


@_inputs("Kandinsky5Transformer3DModel", frames=4)
def _kandinsky5(config: Any, size: Size, draw: Draw) -> Feed:
    spans = (size.frames, size.height // 2, size.width // 2)
    fixed = {
        "pooled_projections": draw(size.batch, config.in_text_dim2),
        "text_rope_pos": torch.arange(size.text),
        "visual_rope_pos": [torch.arange(span) for span in spans],
    }
    channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
    moving = {"hidden_states": draw(size.batch, size.frames, size.height, size.width, channels)}
    return Feed(moving, {**_text(size, draw, config.in_text_dim), **fixed})
