"""What a specimen is, how a recipe is registered, and what recipes share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.models import transformers
from torch import Tensor, nn

from cachekit.diffusers import inputs
from cachekit.diffusers.inputs import Draw, Feed, Size, grid, schedule, trajectory

TINY = Size(batch=2, frames=2, height=8, width=8, text=6)
"""Of text tokens there are unlike any number of image tokens, so that no two streams have the same shape."""
BATCH, TEXT = TINY.batch, TINY.text
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENT = {"in_channels": 4, "out_channels": 4}
PACKED = {"in_channels": 8, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 8)}
BOTH = {"num_layers": 3, "num_single_layers": 3}
TIME_EMBEDDERS = (
    "TimestepEmbedding",
    "TimestepEmbedder",
    "TimeEmbeddings",
    "MLPEmbedder",
    "EmbedScalar",
    "Approximator",
)


class Specimen(NamedTuple):
    """A model and what a sampler would pass to it."""

    name: str
    model: nn.Module  # eval mode, float32, CPU
    inputs: Callable[[int], dict[str, Any]]  # step -> keyword arguments of the forward
    timesteps: tuple[float, ...]  # 12 steps, on the scale 0..1000


Built = nn.Module | tuple[nn.Module, Feed]
Builder = Callable[[Any, Draw], Built]
BUILDERS: dict[str, tuple[type[nn.Module], Builder]] = {}


def recipe(name: str, model_class: str | type[nn.Module]) -> Callable[[Builder], Builder]:
    """Register a builder `(class, draw) -> (model, feed)` of a class, by its name unless this diffusers lacks it.

    A builder that gives the model alone leaves its inputs to `cachekit.diffusers.inputs`.
    """
    found = getattr(transformers, model_class, None) if isinstance(model_class, str) else model_class

    def register(builder: Builder) -> Builder:
        if found is not None:
            BUILDERS[name] = (found, builder)
        return builder

    return register


def specimen(name: str, seed: int = 0) -> Specimen:
    """Build one specimen; equal seeds give equal weights and inputs."""
    if name not in BUILDERS:
        raise ValueError(f"`name` must be one of {', '.join(BUILDERS)}, got {name!r}.")
    model_class, builder = BUILDERS[name]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # moved classes, uncompiled flex attention: none of a test's business
        torch.manual_seed(seed)
        draw = Draw(seed + 1)
        built = builder(model_class, draw)
        model, feed = built if isinstance(built, tuple) else (built, _feed(built, draw))
        model.eval().float()
        wake(model, Draw(seed + 2))
        moves = trajectory(feed, seed + 3)
        smooth(model, moves)
    return Specimen(name, model, moves, tuple(schedule(step) for step in range(12)))


def _feed(model: nn.Module, draw: Draw) -> Feed:
    video = inputs.kind(type(model).__name__).frames > 0
    return inputs.feed(model, TINY if video else TINY._replace(frames=1), draw)


@torch.no_grad()
def wake(model: nn.Module, draw: Draw) -> nn.Module:
    """Add noise to every constant parameter: no zero gate, no zero projection is left. The same model."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter += draw(*parameter.shape) / math.sqrt(fan_in)
    return model


@torch.no_grad()
def smooth(model: nn.Module, inputs: Callable[[int], dict[str, Any]]) -> None:
    """Make every time embedding smooth in time and of order 1, as training would.

    A sinusoid that turns by more than a few hundredths in these steps is damped: else no two steps are alike.
    """
    fed: dict[Any, list[Any]] = {}  # what the first layer of each embedder is given
    given: dict[Any, list[Any]] = {}  # what the last layer of each gives
    for name, module in model.named_modules():
        linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
        plain = isinstance(module, nn.Sequential) and "time" in name.rpartition(".")[2]
        if len(linears) > 1 and (plain or type(module).__name__.endswith(TIME_EMBEDDERS)):
            fed[linears[0]], given[linears[-1]] = [], []
    handles = [m.register_forward_pre_hook(lambda m, x: fed[m].append(x[0].flatten(0, -2))) for m in fed]
    handles += [m.register_forward_hook(lambda m, x, y: given[m].append(y)) for m in given]
    for step in range(4):
        model(**inputs(step))
    for linear, calls in fed.items():
        if calls:  # some uses leave an embedder out
            rows = torch.cat(calls)
            linear.weight *= 0.02 / (rows.amax(0) - rows.amin(0)).clamp(min=0.02)
    for outputs in given.values():
        outputs.clear()
    model(**inputs(0))
    for linear, outputs in given.items():
        if outputs:
            linear.weight /= outputs[0].std()
    for handle in handles:
        handle.remove()


def image(draw: Draw, channels: int = 4) -> dict[str, Tensor]:
    """A latent image, 4 x 4 tokens at patch size 2."""
    return {"hidden_states": draw(BATCH, channels, 8, 8)}


def video(draw: Draw, frames: int = 2, channels: int = 4) -> dict[str, Tensor]:
    """A latent video, 4 x 4 tokens a frame at patch size 2."""
    return {"hidden_states": draw(BATCH, channels, frames, 8, 8)}


def packed(draw: Draw, frames: int = 1, channels: int = 8) -> dict[str, Tensor]:
    """A latent already cut into 4 x 4 tokens a frame."""
    return {"hidden_states": draw(BATCH, 16 * frames, channels)}


def text(draw: Draw, width: int = 24, length: int = TEXT) -> dict[str, Any]:
    """A text condition."""
    return {"encoder_hidden_states": draw(BATCH, length, width)}


def mask(dtype: torch.dtype = torch.float32, length: int = TEXT) -> Tensor:
    """A text mask; the second sample's text ends a token early."""
    return inputs.mask(TINY._replace(text=length), dtype)


IDS = {"img_ids": grid(4, 4, columns=3), "txt_ids": torch.zeros(TEXT, 3)}
