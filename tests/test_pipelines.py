"""Pipelines under `cachekit.diffusers.cached` against diffusers' own hooks, config by config and class by class.

Where the hooks are right the results are equal. Where they are wrong a test shows both: what they do, and that ours is
what they would do if streams could not mix, if names matched, or if both halves came in one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import piping
import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

import cachekit as ck
import cachekit.diffusers as ckd

STEPS = 12
TOLERANCE = 1e-5
HALVES = {"cogvideox": "BFCHW", "latte": "BCFHW", "sd3": "BCHW"}  # guidance in one batch, and the layout
DISTILLED = ("flux", "hunyuan")

pytestmark = [
    # What diffusers' hooks for FasterCache call.
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
]


def first_block() -> Any:
    return FirstBlockCacheConfig(threshold=0.1)


def mag(steps: int = STEPS, ratios: Tensor = FLUX_MAG_RATIOS) -> Any:
    return MagCacheConfig(mag_ratios=ratios, num_inference_steps=steps)


def taylor(**more: Any) -> Any:
    return TaylorSeerCacheConfig(cache_interval=4, disable_cache_before_step=2, **more)


def lite() -> Any:
    return taylor(use_lite_mode=True, max_order=2)


def pyramid(**more: Any) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800), **more
    )


def faster(name: str, **more: Any) -> Any:
    return FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 681),
        attention_weight_callback=lambda _: 0.3,
        unconditional_batch_timestep_skip_range=(-1, 781),
        tensor_format=HALVES.get(name, "BCFHW"),
        is_guidance_distilled=name in DISTILLED,
        **more,
    )


def patterns(run: ckd.Run) -> list[tuple[bool, ...]]:
    return [stream.computed for stream in run.summary().streams.values()]


def check_alike(name: str, make: Callable[[], Any], theirs: Tensor | None = None, steps: int = STEPS) -> ckd.Run:
    """The same result as the hooks', some of it left out."""
    if theirs is None:
        theirs = piping.hooked(name, make(), num_inference_steps=steps)
    ours, run = piping.cached(name, make(), num_inference_steps=steps)
    assert piping.gap(ours, theirs) <= TOLERANCE
    assert all(len(set(pattern)) == 2 for pattern in patterns(run))
    assert piping.gap(ours, piping.plain(name, num_inference_steps=steps)) > TOLERANCE
    return run


# The examples of diffusers' caching guide, their configs as they are ----------------------------------------

GUIDE: dict[str, tuple[str, int, Callable[[Any], Any]]] = {
    "pyramid_attention_broadcast": (
        "cogvideox",
        20,
        lambda pipe: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
    ),
    "faster_cache": (
        "cogvideox",
        20,
        lambda pipe: FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 681),
            current_timestep_callback=lambda: pipe.current_timestep,
            attention_weight_callback=lambda _: 0.3,
            unconditional_batch_skip_range=5,
            unconditional_batch_timestep_skip_range=(-1, 781),
            tensor_format="BFCHW",
        ),
    ),
    "first_block_cache": ("qwen", 20, lambda pipe: FirstBlockCacheConfig(threshold=0.2)),
    "taylorseer": (
        "flux",
        28,
        lambda pipe: TaylorSeerCacheConfig(
            cache_interval=5, max_order=1, disable_cache_before_step=10, taylor_factors_dtype=torch.bfloat16
        ),
    ),
    "mag_cache": (
        "flux",
        28,
        lambda pipe: MagCacheConfig(mag_ratios=FLUX_MAG_RATIOS, num_inference_steps=28),
    ),
}


@pytest.mark.parametrize("example", GUIDE)
def test_the_examples_of_the_guide(example):
    name, steps, make = GUIDE[example]
    made = piping.piped(name, transformer=piping.new, num_inference_steps=steps)
    with ckd.cached(made.pipe, make(made.pipe)) as run:
        ours = piping.image(made)
    plain = piping.image(made)
    with piping.hooks(made.pipe, make(made.pipe)):
        theirs = piping.image(made)
    assert piping.gap(ours, theirs) <= TOLERANCE < piping.gap(ours, plain)
    assert all(len(set(pattern)) == 2 for pattern in patterns(run))


# Where the hooks are right --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "flux_guided", "cogvideox", "qwen", "wan", "wan_two", "ltx", "hunyuan"])
def test_first_block_cache(name):
    check_alike(name, first_block)


@pytest.mark.parametrize("name", ["flux", "flux_guided", "cogvideox", "qwen", "wan", "ltx", "hunyuan"])
def test_mag_cache(name):
    check_alike(name, mag)


@pytest.mark.parametrize("name", ["flux", "flux_guided", "qwen", "hunyuan"])
def test_taylorseer(name):
    check_alike(name, taylor)


@pytest.mark.parametrize("name", ["flux", "flux_guided", "cogvideox", "qwen", "wan", "wan_two", "ltx", "hunyuan"])
def test_taylorseer_lite(name):
    check_alike(name, lite)


@pytest.mark.parametrize("name", ["flux", "cogvideox", "hunyuan", "latte"])
def test_pyramid_attention_broadcast(name):
    check_alike(name, pyramid)


@pytest.mark.parametrize("name", ["flux", "cogvideox", "hunyuan", "latte"])
def test_faster_cache(name):
    check_alike(name, lambda: faster(name))


# Two transformers -----------------------------------------------------------------------------------------------


def test_every_transformer_has_the_part_of_the_trajectory_that_it_runs():
    """The hooks are told of all steps, and stretch the ratios over more than a transformer has."""
    made = piping.piped("wan_two", num_inference_steps=STEPS)
    with ckd.cached(made.pipe, mag()) as run:
        ours = piping.image(made)
    lengths = [len(state.timesteps) for state in run.states.values()]
    assert lengths == [int(state.step) for state in run.states.values()]
    assert lengths[:2] == lengths[0:1] * 2 and sum(lengths[1:3]) == STEPS
    assert piping.gap(piping.hooked("wan_two", mag(), num_inference_steps=STEPS), ours) > TOLERANCE
    made = piping.piped("wan_two", transformer=piping.new, num_inference_steps=STEPS)
    for part, steps in (("transformer", lengths[0]), ("transformer_2", lengths[2])):
        CacheMixin.enable_cache(getattr(made.pipe, part), mag(steps, mag().mag_ratios))
    assert piping.gap(ours, piping.image(made)) <= TOLERANCE


# Where the hooks are wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux_guided", "wan"])
def test_pyramid_attention_broadcast_mixes_streams_there(name):
    theirs = piping.hooked(name, pyramid(), num_inference_steps=STEPS)
    right = piping.routed(name, pyramid(), num_inference_steps=STEPS)
    assert piping.gap(theirs, right) > 10 * TOLERANCE
    check_alike(name, pyramid, right)


def test_pyramid_attention_broadcast_fails_there_on_prompts_of_unequal_length():
    with pytest.raises(RuntimeError, match="must match the size"):
        piping.hooked("qwen", pyramid(), num_inference_steps=STEPS)
    check_alike("qwen", pyramid, piping.routed("qwen", pyramid(), num_inference_steps=STEPS))


def test_pyramid_attention_broadcast_takes_cross_attention_for_spatial_there():
    """Theirs leaves out cross-attention, too, where a class does not say that it is one."""
    theirs = piping.hooked("ltx", pyramid(), num_inference_steps=STEPS)
    ours, _ = piping.cached("ltx", pyramid(), num_inference_steps=STEPS)
    assert piping.gap(ours, theirs) > TOLERANCE
    both = ck.pyramid_attention_broadcast(2, cross=2, semantics="diffusers")
    assert piping.gap(piping.cached("ltx", both, num_inference_steps=STEPS)[0], theirs) <= TOLERANCE


@pytest.mark.parametrize("name", ["wan", "cogvideox", "ltx"])
def test_taylorseer_finds_nothing_there(name):
    plain = piping.plain(name, num_inference_steps=STEPS)
    assert torch.equal(piping.hooked(name, taylor(), num_inference_steps=STEPS), plain)
    named = taylor(cache_identifiers=[r"(transformer_|)blocks\.\d+\.attn\d"])
    check_alike(name, taylor, piping.hooked(name, named, num_inference_steps=STEPS))


class Halves(torch.nn.Module):
    """A transformer that is called for one half of guidance and runs both in a batch, as FasterCache's hooks want."""

    def __init__(self, model: torch.nn.Module, negative: Tensor) -> None:
        super().__init__()
        self.model, self.negative = model, negative
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.uncond: Tensor | None = None

    def forward(self, **given: Any) -> tuple[Tensor]:
        if self.uncond is not None:
            answer, self.uncond = self.uncond, None
            return (answer,)
        both = {name: torch.cat((value, value)) for name, value in given.items() if isinstance(value, Tensor)}
        both["encoder_hidden_states"] = torch.cat((self.negative, given["encoder_hidden_states"]))
        self.uncond, cond = self.model(**{**given, **both})[0].chunk(2)
        return (cond,)

    cache_context = piping.Routed.cache_context


@pytest.mark.parametrize("attention", [2, 3])
def test_faster_cache_fails_there_where_guidance_is_two_calls(attention):
    def make() -> Any:
        return faster("wan", spatial_attention_block_skip_range=attention)

    with pytest.raises(IndexError):
        piping.hooked("wan", make(), num_inference_steps=STEPS)
    made = piping.piped("wan", transformer=piping.new, num_inference_steps=STEPS)
    config = make()
    piping.clock(config, made.pipe)
    CacheMixin.enable_cache(made.pipe.transformer, config)
    made.pipe.transformer = Halves(made.pipe.transformer, made.given["negative_prompt_embeds"])
    run = check_alike("wan", make, piping.image(made))
    assert list(run.states) == ["transformer/cond"]


FAILS = {  # there: no context is set, or a class that is not known
    "sd3": (first_block, mag, taylor, lite),
    "latte": (first_block, mag, lite),
    "kandinsky": (first_block, pyramid, lite),
}


def test_first_block_cache_never_computes_again_there_where_the_signal_is_no_number():
    """A first block that adds nothing: its change is 0 / 0, which is over no threshold."""

    def silent() -> piping.Piped:
        made = piping.piped("flux", transformer=piping.new)
        first = made.pipe.transformer.transformer_blocks[0]
        for parameter in (*first.norm1.linear.parameters(), *first.norm1_context.linear.parameters()):
            torch.nn.init.zeros_(parameter)
        return made

    plain, config = piping.image(silent()), FirstBlockCacheConfig(threshold=0.1)
    theirs = silent()
    theirs.pipe.transformer.enable_cache(config)
    assert piping.gap(piping.image(theirs), plain) > 0.01
    ours = silent()
    with ckd.cached(ours.pipe, config) as run:
        assert torch.equal(piping.image(ours), plain)
    assert all(all(stream.computed) for stream in run.summary().streams.values())


@pytest.mark.parametrize(("name", "make"), [(name, make) for name, makes in FAILS.items() for make in makes])
def test_classes_on_which_the_hooks_fail(name, make):
    with pytest.raises((ValueError, RuntimeError, AttributeError, TypeError, LookupError)):
        piping.hooked(name, make(), num_inference_steps=STEPS)
    ours, run = piping.cached(name, make(), num_inference_steps=STEPS)
    plain = piping.plain(name, num_inference_steps=STEPS)
    assert torch.isfinite(ours).all() and not torch.equal(ours, plain)
    assert all(len(set(pattern)) == 2 for pattern in patterns(run))


@pytest.mark.parametrize("make", [first_block, mag, taylor, pyramid])
@pytest.mark.parametrize("name", ["kandinsky", "latte", "sd3"])
def test_streams_without_names_are_told_apart(name, make):
    """Against the steps by hand: a state a stream."""
    made = piping.piped(name, num_inference_steps=STEPS)
    policy = ckd.from_config(make())
    streams = 2 if name == "kandinsky" else 1
    byhand = ByHand(made.pipe.transformer, policy, lambda: made.pipe.scheduler.timesteps, streams)
    ours = piping.cached(name, make(), num_inference_steps=STEPS)[0]
    made.pipe.transformer = byhand
    assert torch.equal(ours, piping.image(made))


class ByHand(torch.nn.Module):
    """Steps with a state for each stream; streams take turns."""

    def __init__(self, model: torch.nn.Module, policy: ck.Policy, timesteps: Callable[[], Tensor], streams: int):
        super().__init__()
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.visual_cond = getattr(model, "visual_cond", None)
        self.step, self.timesteps, self.calls = ck.cache(model, policy), timesteps, 0
        self.states: list[Any] = [None] * streams

    def forward(self, **given: Any) -> Any:
        stream = self.calls % len(self.states)
        self.calls += 1
        if self.states[stream] is None:
            self.states[stream] = self.step.init(self.timesteps(), **given)
        out, self.states[stream] = self.step(self.states[stream], **given)
        return out
