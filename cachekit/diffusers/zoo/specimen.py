"""What a specimen is, how a recipe is registered, and what recipes share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.models import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map

BATCH = 2
TEXT = 6  # text tokens; unlike any number of image tokens, so that no two streams have the same shape
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


class Feed(NamedTuple):
    """What a builder says about the forward's arguments."""

    moving: dict[str, Any]  # the denoised arguments at step 0: tensors, or lists of tensors
    fixed: dict[str, Any]  # the same at every step
    clock: float = 1000.0  # the timestep of step 0
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (BATCH,)
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


Built = tuple[nn.Module, Feed]
Builder = Callable[[Any, Draw], Built]
BUILDERS: dict[str, tuple[type[nn.Module], Builder]] = {}


def recipe(name: str, model_class: str) -> Callable[[Builder], Builder]:
    """Register a builder `(class, draw) -> (model, feed)`, unless this diffusers lacks the class."""

    def register(builder: Builder) -> Builder:
        if hasattr(transformers, model_class):
            BUILDERS[name] = (getattr(transformers, model_class), builder)
        return builder

    return register


def schedule(step: int) -> float:
    """The timestep of a step, on the scale 0..1000: falling for ever, never zero."""
    return round(1000 * 0.94**step, 3)


def specimen(name: str, seed: int = 0) -> Specimen:
    """Build one specimen; equal seeds give equal weights and inputs."""
    if name not in BUILDERS:
        raise ValueError(f"`name` must be one of {', '.join(BUILDERS)}, got {name!r}.")
    model_class, builder = BUILDERS[name]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # moved classes, uncompiled flex attention: none of a test's business
        torch.manual_seed(seed)
        model, feed = builder(model_class, Draw(seed + 1))
        model.eval().float()
        wake(model, Draw(seed + 2))
        inputs = trajectory(feed, Draw(seed + 3))
        smooth(model, inputs)
    return Specimen(name, model, inputs, tuple(schedule(step) for step in range(12)))


def trajectory(feed: Feed, draw: Draw) -> Callable[[int], dict[str, Any]]:
    """The inputs of every step: what moves turns slowly towards fresh noise, so that its variance stays."""
    noise = tree_map(lambda value: draw(*value.shape), feed.moving)

    def inputs(step: int) -> dict[str, Any]:
        near, far = math.cos(0.05 * step), math.sin(0.05 * step)
        moving = tree_map(lambda a, b: near * a + far * b, feed.moving, noise)
        fixed = tree_map(lambda value: value, feed.fixed)  # fresh containers: a forward may pop from its own
        time = torch.full(feed.shape, schedule(step) * feed.clock / 1000).to(feed.dtype)
        return {**moving, **fixed, feed.time: time}

    return inputs


@torch.no_grad()
def wake(model: nn.Module, draw: Draw) -> None:
    """Add noise to every constant parameter: no zero gate, no zero projection is left."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter += draw(*parameter.shape) / math.sqrt(fan_in)


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
    keep = torch.ones(BATCH, length, dtype=dtype)
    keep[1:, -1] = 0
    return keep


def grid(*sizes: int, columns: int | None = None) -> Tensor:
    """Position ids of a grid's cells, padded with zero columns on the left."""
    ids = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).float().reshape(-1, len(sizes))
    return nn.functional.pad(ids, ((columns or len(sizes)) - len(sizes), 0))


def rotary(draw: Draw, length: int, width: int = 16) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each given twice in a row, as a pipeline computes them."""
    angles = draw(length, width // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


IDS = {"img_ids": grid(4, 4, columns=3), "txt_ids": torch.zeros(TEXT, 3)}
