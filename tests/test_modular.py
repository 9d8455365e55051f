"""Modular pipelines of diffusers are cached as classic ones are."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import piping
import pytest
import specimens
import torch
from torch import Tensor

import cachekit as ck
import cachekit.diffusers as ckd
from cachekit.diffusers import zoo

STEPS = piping.STEPS
ALWAYS = (-1, 1001)


class Modular(NamedTuple):
    """A pipeline of the blocks that denoise, and the arguments of a call."""

    pipe: Any
    given: Callable[[], dict[str, Any]]


def made(blocks: str, given: Callable[[], dict[str, Any]], guider: Any = None, **transformers: str) -> Modular:
    """A pipeline of these blocks around transformers of the zoo."""
    where, _, name = blocks.rpartition(".")
    pipe = getattr(importlib.import_module(f"diffusers.modular_pipelines.{where}"), name)().init_pipeline()
    models = {part: specimens.shared(of, int(part[-1] == "2")).model for part, of in transformers.items()}
    pipe.update_components(scheduler=piping.flow(shift=3.0), **models)
    if guider is not None:
        pipe.update_components(guider=guider)
    for block in (pipe.blocks, *pipe.blocks.sub_blocks.values()):
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
    return Modular(pipe, lambda: {"num_inference_steps": STEPS, "height": 64, "width": 64, **given()})


def words(**more: Any) -> dict[str, Any]:
    draws = {
        name: piping.text(zoo.Draw(seed), 1) for seed, name in ((7, "prompt_embeds"), (8, "negative_prompt_embeds"))
    }
    return {**draws, **more}


def flux() -> Modular:
    given = {"prompt_embeds": piping.text(zoo.Draw(7), 1), "pooled_prompt_embeds": zoo.Draw(8)(1, 20)}
    return made(
        "flux.modular_blocks_flux.FluxCoreDenoiseStep",
        lambda: {**given, "generator": torch.Generator().manual_seed(0)},
        transformer="Flux",
    )


def wan(guider: Any = None) -> Modular:
    latents = zoo.Draw(9)(1, 4, 2, 8, 8)
    return made(
        "wan.modular_blocks_wan.WanCoreDenoiseStep",
        lambda: words(num_frames=5, latents=latents.clone()),
        guider,
        transformer="Wan",
    )


def wan_two() -> Modular:
    latents = zoo.Draw(9)(1, 4, 2, 8, 8)
    return made(
        "wan.modular_blocks_wan22.Wan22CoreDenoiseStep",
        lambda: words(num_frames=5, latents=latents.clone()),
        transformer="Wan",
        transformer_2="Wan",
    )


def qwen() -> Modular:
    masks = {f"{sign}prompt_embeds_mask": torch.ones(1, zoo.TEXT, dtype=torch.int64) for sign in ("", "negative_")}
    return made(
        "qwenimage.modular_blocks_qwenimage.QwenImageCoreDenoiseStep",
        lambda: words(**masks, generator=torch.Generator().manual_seed(0)),
        transformer="QwenImage",
    )


PIPELINES = {"flux": flux, "wan": wan, "wan_two": wan_two, "qwen": qwen}


@torch.no_grad()
def sample(modular: Modular) -> Tensor:
    """What a call returns."""
    return modular.pipe(**modular.given(), output="latents")


def under(modular: Modular, policy: Any, **how: Any) -> tuple[Tensor, dict[str, tuple[bool, ...]], ckd.Run]:
    """What a call returns under a cache, what every stream computed, and the run."""
    with ckd.cached(modular.pipe, policy, **how) as run:
        out = sample(modular)
    return out, {name: stream.computed for name, stream in run.summary().streams.items()}, run


@pytest.mark.parametrize("name", PIPELINES)
def test_it_is_cached_as_a_classic_one(name):
    modular = PIPELINES[name]()
    kind, plain = type(modular.pipe), sample(modular)
    exact, streams, _ = under(modular, ck.first_block_cache(0.0, max_skips=0))
    assert torch.equal(exact, plain)
    steps = [len(computed) for computed in streams.values()]
    assert sum(steps) == (STEPS if name == "flux" else 2 * STEPS)
    mask = [place % 2 == 0 for place in range(STEPS)]
    if name == "wan_two":
        policy: Any = {part: ck.taylorseer(2, warmup=1, sites="chain") for part in ("transformer", "transformer_2")}
    else:
        policy = ck.step_mask(mask)
    out, streams, _ = under(modular, policy)
    assert 0 < piping.gap(out, plain) < 0.3
    for computed in streams.values():
        assert computed == tuple(mask[: len(computed)])
    assert type(modular.pipe) is kind and torch.equal(sample(modular), plain)


GUIDERS = {
    "CFG": (lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0), STEPS),
    "CFG that begins late": (lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0, start=0.3), 6),
    "CFG that stops": (lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5), 4),
    "APG": (lambda: diffusers.AdaptiveProjectedGuidance(guidance_scale=3.0), STEPS),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_the_unconditional_half_is_left_out_whatever_the_guider(name):
    guider, guided = GUIDERS[name]
    modular = wan(guider())
    plain = sample(modular)
    out, streams, _ = under(modular, ck.faster_cache(1, uncond=2, uncond_range=ALWAYS))
    assert 0 < piping.gap(out, plain) < 0.3
    assert len(streams["transformer/call 2"]) == guided
    assert streams["transformer/call 2"].count(False) == guided // 2


def test_a_recording_knows_its_scale_and_its_plan_runs():
    modular = wan(diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    _, _, run = under(modular, ck.recording())
    trace = run.trace()
    assert len(trace) == STEPS and trace.notes["guidance"] == "3.0" and trace.notes["model"] == "WanModularPipeline"
    plan = ck.plan(trace, computed=4)
    _, streams, _ = under(modular, ck.planned(plan))
    assert {computed.count(True) for computed in streams.values()} == {4}


@pytest.mark.compiles
def test_it_is_compiled():
    modular = flux()
    wanted, plain, _ = under(modular, ck.step_mask([1, 0] * 4))
    out, streams, _ = under(modular, ck.step_mask([1, 0] * 4), compile={"backend": "eager"})
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert streams == plain


def test_what_is_no_pipeline_is_named():
    for value in (specimens.shared("Flux").model, 3, None):
        for function in (ckd.disable, lambda pipe: ckd.enable(pipe, ck.step_mask([1, 0]))):
            with pytest.raises(ck.ArgumentTypeError, match="must be a DiffusionPipeline or a ModularPipeline, got"):
                function(value)


def test_nothing_is_said_where_nothing_is_wrong():
    modular = wan()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        under(modular, ck.step_mask([1, 0] * 4))
    assert [str(each.message) for each in said if "policy" in str(each.message)] == []
