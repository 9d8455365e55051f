"""Pipelines whose transformers are compiled, offloaded, adapted or cast, under `cachekit.diffusers.cached`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import piping
import pytest
import specimens
import torch
from accelerate import cpu_offload
from peft import LoraConfig

import cachekit as ck
import cachekit.diffusers as ckd


def policy() -> ck.Policy:
    return ck.first_block_cache(0.1)


def whole(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def every_weight(pipe: Any) -> None:
    """What enable_sequential_cpu_offload does to each model; on a CPU alone it fails, cached or not, on "cpu:0"."""
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            cpu_offload(model, torch.device("cpu"))


def adapter(pipe: Any) -> None:
    torch.manual_seed(0)
    given = {"target_modules": ["to_q", "to_k", "to_v"], "init_lora_weights": False}
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, **given))


# Whether the image is that of the same pipeline without the feature.
FEATURES: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "compile_repeated_blocks": (
        True,
        lambda pipe: pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager"),
    ),
    "torch.compile": (True, whole),
    "compile": (True, lambda pipe: pipe.transformer.compile(backend="eager")),
    "model offload": (True, lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    "sequential offload": (True, every_weight),
    "layerwise casting": (
        False,
        lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    ),
    "LoRA": (False, adapter),
}


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["wan", "flux_image"])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_pipeline_with(feature, name):
    _, prepare = FEATURES[feature]
    made = piping.piped(name, transformer=piping.new)
    prepare(made.pipe)
    plain, held = piping.image(made), made.pipe.transformer
    compiled = feature in ("torch.compile", "compile")
    with pytest.warns(UserWarning, match="the model is compiled by itself") if compiled else contextlib.nullcontext():
        check(feature, name, made, plain, held)


def check(feature: str, name: str, made: Any, plain: Any, held: Any) -> None:
    """Cached it is what it is without the feature, or near it, and what the feature does is done."""
    alike, _ = FEATURES[feature]
    with ckd.cached(made.pipe, policy()) as run:
        images = [piping.image(made), piping.image(made)]
    assert torch.equal(*images) and 0 < piping.gap(images[0], plain) < 0.1
    assert torch.equal(images[0], piping.cached(name, policy())[0]) == alike
    assert all(len(set(stream.computed)) == 2 for stream in run.summary().streams.values())
    with ckd.cached(made.pipe, ck.step_mask([1] * piping.STEPS)):
        assert torch.equal(piping.image(made), plain)  # all computed: what the feature does is done
    assert made.pipe.transformer is held and torch.equal(piping.image(made), plain)


def test_an_adapter_is_added_between_two_calls():
    made, expected = piping.piped("wan", transformer=piping.new), piping.piped("wan", transformer=piping.new)
    adapter(expected.pipe)
    with ckd.cached(made.pipe, policy()), ckd.cached(expected.pipe, policy()):
        before = piping.image(made)
        adapter(made.pipe)
        assert torch.equal(piping.image(made), piping.image(expected))
        made.pipe.transformer.disable_adapters()
        assert torch.equal(piping.image(made), before)


def test_offloading_is_switched_on_between_two_calls():
    made = piping.piped("wan", transformer=piping.new)
    with ckd.cached(made.pipe, policy()):
        before = piping.image(made)
        made.pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(piping.image(made), before) and torch.equal(piping.image(made), before)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_a_pipeline_with_group_offloading(offload_type):
    plain, _ = piping.cached("flux", policy())
    made = piping.piped("flux", transformer=piping.new)
    how = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    made.pipe.enable_group_offload(torch.device("cpu"), offload_type=offload_type, **how)
    with ckd.cached(made.pipe, policy()):
        assert torch.equal(piping.image(made), plain)


def test_groups_of_several_blocks_are_refused_before_anything_runs():
    made = piping.piped("flux", transformer=piping.new)
    made.pipe.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=2)
    with pytest.raises(ck.StructureError, match="group-offloaded"):
        ckd.enable(made.pipe, policy())


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' ControlNet uses it
@pytest.mark.parametrize("name", ["flux_control", "flux_adapted"])
def test_a_picture_that_steers(name):
    """A ControlNet adds to what comes out of the blocks; an IP-Adapter is a part of their attention."""
    made = piping.piped(name, transformer=piping.new)
    plain = piping.image(made)
    image, run = piping.cached(name, policy())
    assert 0 < piping.gap(image, plain) < 0.2
    assert all(len(set(stream.computed)) == 2 for stream in run.summary().streams.values())
    with ckd.cached(made.pipe, ck.step_mask([1] * piping.STEPS)):
        assert torch.equal(piping.image(made), plain)
    for again in (ck.taylorseer(3, warmup=2), ck.pyramid_attention_broadcast(2), ck.faster_cache(cfg=None)):
        with ckd.cached(made.pipe, again) as run:
            assert 0 < piping.gap(piping.image(made), plain) < 1
        assert all(len(set(stream.computed)) == 2 for stream in run.summary().streams.values())
    other = {"flux_control": "control_image", "flux_adapted": "ip_adapter_image_embeds"}[name]
    value = made.given[other]
    steered = {**made.given, other: [-value[0]] if isinstance(value, list) else 1 - value}
    with ckd.cached(made.pipe, policy()):
        assert not torch.equal(piping.image(made._replace(given=steered)), image)  # it is looked at


COMPILED = {
    "flux": lambda: ck.first_block_cache(0.1),
    "wan": lambda: ck.taylorseer(3, warmup=2),
    "latte": lambda: ck.faster_cache(uncond_range=(-1, 1001), attention_range=(-1, 1001)),
    "wan_two": lambda: ck.pyramid_attention_broadcast(2, spatial_range=(-1, 1001)),
    "hunyuan": lambda: ck.mag_cache([1.0] * piping.STEPS, retention=0.2),
}


@pytest.mark.compiles
@pytest.mark.parametrize(("name", "way"), [*((name, "programs") for name in COMPILED), ("flux", "regional")])
def test_compiled_steps_are_kept_from_call_to_call(name, way):
    made = COMPILED[name]()
    few = functools.cache(lambda of, seed: specimens.shallow(of, seed).model)
    expected, plain = piping.cached(name, made, transformer=few)
    pipe = piping.piped(name, transformer=few)
    with ckd.cached(pipe.pipe, made, compile={"backend": "eager", "regional": way == "regional"}) as run:
        image = piping.image(pipe)
        with torch._dynamo.config.patch(error_on_recompile=True):
            again = piping.image(pipe)
    assert torch.equal(again, image) and piping.gap(image, expected) < 1e-4
    computed = [stream.computed for stream in run.summary().streams.values()]
    assert computed == [stream.computed for stream in plain.summary().streams.values()]
    assert torch.equal(piping.image(pipe), piping.image(piping.piped(name, transformer=few)))


def test_compile_takes_arguments_and_nothing_else():
    with pytest.raises(ck.ArgumentTypeError, match="`compile` must be True, False or the arguments"):
        ckd.enable(piping.piped("flux", transformer=piping.new).pipe, policy(), compile="regional")
