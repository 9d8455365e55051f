"""Tiny pipelines of diffusers' classes around the transformers of the zoo, and what they are called with.

The prompt is given as embeddings and the result taken as latents: all that lies between is the pipeline's own loop.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffusers
import specimens
import torch
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

import cachekit.diffusers as ckd
from cachekit.diffusers import zoo

STEPS = 8


class Piped(NamedTuple):
    """A pipeline and the arguments of a call."""

    pipe: Any
    given: dict[str, Any]


Built = tuple[str, dict[str, Any], dict[str, Any]]
MAKERS: dict[str, Callable[[zoo.Draw, int], Built]] = {}


def maker(function: Callable[[zoo.Draw, int], Built]) -> Callable[[zoo.Draw, int], Built]:
    """Register what is called `_name`."""
    MAKERS[function.__name__[1:]] = function
    return function


def new(name: str, seed: int) -> nn.Module:
    """A transformer of the zoo."""
    return zoo.specimen(name, seed).model


def shared(name: str, seed: int) -> nn.Module:
    """The same one at every call, for tests that change nothing about it."""
    return specimens.shared(name, seed).model


def piped(
    name: str,
    *,
    batch: int = 1,
    models: dict[str, nn.Module] | None = None,
    transformer: Callable[[str, int], nn.Module] = shared,
    **changed: Any,
) -> Piped:
    """A pipeline; equal names give equal weights and inputs.

    Args:
        name: of the maker.
        batch: of the prompts.
        models: transformers by the part of the pipeline.
        transformer: makes the others from a name of the zoo and a seed; `new` where the test changes something about
            them.
        **changed: arguments of the call, beside those that it needs.
    """
    kind, components, given = MAKERS[name](zoo.Draw(7), batch)
    for part, of in components.items():
        if isinstance(of, str):
            components[part] = (models or {}).get(part) or transformer(of, 1 if part[-1] == "2" else 0)
    pipe = getattr(diffusers, kind)(**components)
    pipe.set_progress_bar_config(disable=True)
    return Piped(
        pipe, {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, **given, **changed}
    )


def image(piped: Piped, seed: int = 0, **changed: Any) -> Tensor:
    """What a call returns."""
    return piped.pipe(**{**piped.given, **changed}, generator=torch.Generator().manual_seed(seed))[0]


def plain(name: str, **how: Any) -> Tensor:
    """What a call returns without any cache."""
    return image(piped(name, **how))


def cached(name: str, policy: Any, **how: Any) -> tuple[Tensor, ckd.Run]:
    """The same under ours."""
    made = piped(name, **how)
    with ckd.cached(made.pipe, policy) as run:
        return image(made), run


def hooked(name: str, config: Any, **how: Any) -> Tensor:
    """The same under diffusers' own hooks."""
    made = piped(name, transformer=new, **how)
    clock(config, made.pipe)
    with hooks(made.pipe, config):
        return image(made)


def clock(config: Any, pipe: Any) -> None:
    """Give a config the timestep that its hooks ask for; some pipelines do not tell it."""
    if hasattr(config, "current_timestep_callback") and config.current_timestep_callback is None:
        config.current_timestep_callback = lambda: pipe.current_timestep


@contextlib.contextmanager
def hooks(pipe: Any, config: Any) -> Iterator[None]:
    """Diffusers' own caches on all transformers."""
    models = [model for name, model in pipe.components.items() if name.startswith("transformer") and model is not None]
    for model in models:
        CacheMixin.enable_cache(model, config)  # a function: SD3 is no CacheMixin
    yield


class Routed(nn.Module):
    """A transformer whose every stream is a copy of its own: what hooks answer when streams cannot mix."""

    def __init__(self, model: nn.Module, apply: Callable[[nn.Module], None], streams: int = 2) -> None:
        super().__init__()
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.copies = nn.ModuleList(copy.deepcopy(model) for _ in range(streams))
        self.calls = 0
        for each in self.copies:
            apply(each)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Streams take turns: every pipeline here calls one after the other."""
        chosen = self.copies[self.calls % len(self.copies)]
        self.calls += 1
        with CacheMixin.cache_context(chosen, "one"):
            return chosen(*args, **kwargs)

    @contextlib.contextmanager
    def cache_context(self, name: str, **more: Any) -> Iterator[None]:
        yield


def routed(name: str, config: Any, **how: Any) -> Tensor:
    """The same under diffusers' own hooks, every stream by itself."""
    made = piped(name, **how)
    clock(config, made.pipe)
    made.pipe.transformer = Routed(made.pipe.transformer, lambda model: CacheMixin.enable_cache(model, config))
    return image(made)


def gap(a: Tensor, b: Tensor) -> float:
    """The relative difference; infinite where one is not finite."""
    value = ((a - b).norm() / b.norm()).item()
    return value if value == value else float("inf")


def text(draw: zoo.Draw, batch: int, width: int = 24, length: int = zoo.TEXT) -> Tensor:
    """The embedding of a prompt."""
    return draw(1, length, width).expand(batch, -1, -1) + 0.5 * draw(batch, length, width)


def flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXT_2 = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
SIZE = {"height": 64, "width": 64}


@maker
def _flux(draw: zoo.Draw, batch: int) -> Built:
    given = {"prompt_embeds": text(draw, batch), "pooled_prompt_embeds": draw(batch, 20), **SIZE}
    return "FluxPipeline", {"scheduler": flow(), "vae": None, "transformer": "Flux", **NO_TEXT_2}, given


@maker
def _flux_guided(draw: zoo.Draw, batch: int) -> Built:
    kind, components, given = _flux(draw, batch)
    negative = {"negative_prompt_embeds": text(draw, batch), "negative_pooled_prompt_embeds": draw(batch, 20)}
    return kind, components, {**given, **negative, "true_cfg_scale": 3.0}


@maker
def _cogvideox(draw: zoo.Draw, batch: int) -> Built:
    components = {"scheduler": diffusers.CogVideoXDDIMScheduler(), "vae": None, "transformer": "CogVideoX", **NO_TEXT}
    given = {"prompt_embeds": text(draw, batch), "negative_prompt_embeds": 0.3 * text(draw, batch)}
    return "CogVideoXPipeline", components, {**given, **SIZE, "num_frames": 5, "guidance_scale": 3.0}


@maker
def _qwen(draw: zoo.Draw, batch: int) -> Built:
    components = {"scheduler": flow(), "vae": None, "transformer": "QwenImage", **NO_TEXT}
    mask = torch.ones(batch, zoo.TEXT, dtype=torch.int64)
    given = {"prompt_embeds": text(draw, batch), "prompt_embeds_mask": mask, "true_cfg_scale": 3.0}
    given |= {"negative_prompt_embeds": text(draw, batch, length=4), "negative_prompt_embeds_mask": mask[:, :4]}
    return "QwenImagePipeline", components, {**given, **SIZE}


@maker
def _wan(draw: zoo.Draw, batch: int) -> Built:
    components = {"scheduler": flow(shift=3.0), "vae": None, "transformer": "Wan", **NO_TEXT}
    given = {"prompt_embeds": text(draw, batch), "negative_prompt_embeds": text(draw, batch), "guidance_scale": 3.0}
    return "WanPipeline", components, {**given, **SIZE, "num_frames": 5}


@maker
def _wan_two(draw: zoo.Draw, batch: int) -> Built:
    kind, components, given = _wan(draw, batch)
    return kind, {**components, "transformer_2": "Wan", "boundary_ratio": 0.8}, {**given, "guidance_scale_2": 2.0}


@maker
def _sd3(draw: zoo.Draw, batch: int) -> Built:
    third = {"text_encoder_3": None, "tokenizer_3": None}
    components = {"scheduler": flow(), "vae": None, "transformer": "SD3", **NO_TEXT_2, **third}
    given = {"prompt_embeds": text(draw, batch), "negative_prompt_embeds": text(draw, batch), "guidance_scale": 3.0}
    given |= {"pooled_prompt_embeds": draw(batch, 20), "negative_pooled_prompt_embeds": draw(batch, 20)}
    return "StableDiffusion3Pipeline", components, {**given, **SIZE}


@maker
def _ltx(draw: zoo.Draw, batch: int) -> Built:
    components = {"scheduler": flow(), "vae": None, "transformer": "LTX", **NO_TEXT}
    mask = torch.ones(batch, zoo.TEXT)
    given = {"prompt_embeds": text(draw, batch), "negative_prompt_embeds": text(draw, batch), "guidance_scale": 3.0}
    given |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return "LTXPipeline", components, {**given, "height": 128, "width": 128, "num_frames": 9}


@maker
def _hunyuan(draw: zoo.Draw, batch: int) -> Built:
    components = {"scheduler": flow(shift=7.0), "vae": None, "transformer": "HunyuanVideo", **NO_TEXT_2}
    mask = torch.ones(batch, zoo.TEXT, dtype=torch.int64)
    given = {"prompt_embeds": text(draw, batch), "pooled_prompt_embeds": draw(batch, 20), "prompt_attention_mask": mask}
    return "HunyuanVideoPipeline", components, {**given, **SIZE, "num_frames": 5}


@maker
def _latte(draw: zoo.Draw, batch: int) -> Built:
    components = {"scheduler": diffusers.DDIMScheduler(), "vae": None, "transformer": "Latte", **NO_TEXT}
    given = {"prompt_embeds": text(draw, batch), "negative_prompt_embeds": 0.3 * text(draw, batch), **SIZE}
    more = {"prompt": None, "negative_prompt": None, "video_length": 3, "guidance_scale": 3.0, "clean_caption": False}
    return "LattePipeline", components, {**given, **more}


@maker
def _kandinsky(draw: zoo.Draw, batch: int) -> Built:
    components = {"scheduler": flow(shift=5.0), "vae": None, "transformer": "Kandinsky5", **NO_TEXT_2}
    given = {"prompt_embeds_qwen": text(draw, batch), "prompt_embeds_clip": draw(batch, 20), "guidance_scale": 3.0}
    given |= {
        "negative_prompt_embeds_qwen": text(draw, batch, length=4),
        "negative_prompt_embeds_clip": draw(batch, 20),
    }
    ends = torch.arange(batch + 1, dtype=torch.int32)
    given |= {"prompt_cu_seqlens": zoo.TEXT * ends, "negative_prompt_cu_seqlens": 4 * ends}
    return "Kandinsky5T2VPipeline", components, {**given, **SIZE, "num_frames": 5}


@maker
def _flux_image(draw: zoo.Draw, batch: int) -> Built:
    _, components, given = _flux(draw, batch)
    start = torch.rand(1, 3, 64, 64, generator=draw.generator)
    return "FluxImg2ImgPipeline", {**components, "vae": autoencoder()}, {**given, "image": start, "strength": 0.6}


@maker
def _flux_control(draw: zoo.Draw, batch: int) -> Built:
    _, components, given = _flux(draw, batch)
    torch.manual_seed(4)
    sizes = {name: zoo.specimen("Flux").model.config[name] for name in ("in_channels", "joint_attention_dim")}
    sizes |= {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)}
    sizes |= {"pooled_projection_dim": 20, "guidance_embeds": True, "num_layers": 2, "num_single_layers": 1}
    control = zoo.wake(diffusers.FluxControlNetModel(**sizes).eval(), draw)
    components |= {"vae": autoencoder(), "controlnet": control}
    hint = torch.rand(1, 3, 64, 64, generator=draw.generator)
    return "FluxControlNetPipeline", components, {**given, "control_image": hint}


@maker
def _flux_adapted(draw: zoo.Draw, batch: int) -> Built:
    kind, components, given = _flux(draw, batch)
    made = zoo.specimen("Flux").model
    # Of a picture come 4 tokens, each as wide as one of the text; every double-stream block looks at them.
    weights = {"image_proj": {"proj.weight": draw(4 * 24, 12), "proj.bias": draw(4 * 24)}, "ip_adapter": {}}
    weights["image_proj"] |= {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
    for n, part in itertools.product(range(3), ("k", "v")):
        weights["ip_adapter"] |= {f"{n}.to_{part}_ip.weight": draw(32, 24), f"{n}.to_{part}_ip.bias": draw(32)}
    made._load_ip_adapter_weights([weights])
    shown = {f"{sign}ip_adapter_image_embeds": [draw(batch, 1, 12)] for sign in ("", "negative_")}
    return kind, {**components, "transformer": made}, {**given, **shown}


@maker
def _cogvideox_video(draw: zoo.Draw, batch: int) -> Built:
    _, components, given = _cogvideox(draw, batch)
    del given["num_frames"]
    return "CogVideoXVideoToVideoPipeline", components, {**given, "latents": draw(batch, 2, 4, 8, 8), "strength": 0.6}


@maker
def _latte_heun(draw: zoo.Draw, batch: int) -> Built:
    kind, components, given = _latte(draw, batch)
    return kind, {**components, "scheduler": diffusers.HeunDiscreteScheduler()}, given


@maker
def _latte_pndm(draw: zoo.Draw, batch: int) -> Built:
    kind, components, given = _latte(draw, batch)
    return kind, {**components, "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True)}, given


def autoencoder() -> nn.Module:
    """An image autoencoder with two latent channels, eight times smaller each way."""
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "latent_channels": 2, "shift_factor": 0.1}
    return diffusers.AutoencoderKL(**blocks, **sizes, use_quant_conv=False, use_post_quant_conv=False).eval()
