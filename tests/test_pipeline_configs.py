"""Diffusers' cache configs as policies: every field counts, and what cannot be expressed is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import piping
import pytest
import specimens
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    apply_pyramid_attention_broadcast,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from torch import nn

import cachekit as ck
import cachekit.diffusers as ckd
from cachekit.diffusers import zoo

STEPS = 12
SHARE, WILD = 0.4, 40.0
"""A weight as people use it, and one whose effect on a tiny model is far above the tolerance."""

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # what FasterCache's hooks call


def pyramid(**fields: Any) -> Any:
    return PyramidAttentionBroadcastConfig(**fields)


def faster(**fields: Any) -> Any:
    fields = {"spatial_attention_timestep_skip_range": (-1, 801), **fields}
    return FasterCacheConfig(unconditional_batch_timestep_skip_range=(-1, 901), **fields)


def taylor(**fields: Any) -> Any:
    return TaylorSeerCacheConfig(**{"cache_interval": 3, "disable_cache_before_step": 2, **fields})


# Each beside its hooks, with fields that are not the defaults.
FIELDS: dict[str, tuple[str, Callable[[], Any]]] = {
    "threshold": ("flux", lambda: FirstBlockCacheConfig(threshold=0.07)),
    "mag": (
        "flux",
        lambda: MagCacheConfig(0.2, 2, 0.4, num_inference_steps=STEPS, mag_ratios=FLUX_MAG_RATIOS),
    ),
    "ratios as a list": (
        "flux",
        lambda: MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0, 1.2, 1.02, 0.99, 1.01]),
    ),
    "order 2": ("flux", lambda: taylor(max_order=2, taylor_factors_dtype=torch.float32)),
    "no type": ("flux", lambda: taylor(taylor_factors_dtype=torch.float32, disable_cache_after_step=9)),
    "cache_identifiers": ("wan", lambda: taylor(cache_identifiers=[r"blocks\.\d+\.attn1", "nothing"])),
    "lite": ("flux", lambda: taylor(use_lite_mode=True, max_order=3)),
    "no interval": ("flux", lambda: pyramid()),
    "identifiers": (
        "flux",
        lambda: pyramid(
            spatial_attention_block_skip_range=3,
            spatial_attention_block_identifiers=("^single_transformer_blocks", "nothing"),
            spatial_attention_timestep_skip_range=(50, 970),
        ),
    ),
    "temporal": (
        "latte",
        lambda: pyramid(temporal_attention_block_skip_range=3, temporal_attention_timestep_skip_range=(50, 970)),
    ),
    "cross": (
        "latte",
        lambda: pyramid(cross_attention_block_skip_range=3, cross_attention_timestep_skip_range=(50, 970)),
    ),
    "faster": (
        "flux",
        lambda: faster(is_guidance_distilled=True, spatial_attention_block_skip_range=3),
    ),
    "faster, identifiers": (
        "flux",
        lambda: faster(is_guidance_distilled=True, spatial_attention_block_identifiers=("^single_transformer_blocks",)),
    ),
    "faster, temporal": (
        "latte",
        lambda: faster(temporal_attention_block_skip_range=3, temporal_attention_timestep_skip_range=(-1, 701)),
    ),
    "faster, weights": (
        "cogvideox",
        lambda: faster(
            tensor_format="BFCHW",
            unconditional_batch_skip_range=4,
            alpha_low_frequency=1.3,
            alpha_high_frequency=0.8,
            low_frequency_weight_update_timestep_range=(300, 801),
            high_frequency_weight_update_timestep_range=(100, 501),
        ),
    ),
    "no attention": ("cogvideox", lambda: faster(tensor_format="BFCHW", spatial_attention_block_skip_range=None)),
    "temporal alone": (
        "latte",
        lambda: faster(
            tensor_format="BCFHW",
            spatial_attention_block_skip_range=None,
            temporal_attention_block_skip_range=2,
            temporal_attention_timestep_skip_range=(-1, 801),
        ),
    ),
    "faster, callbacks": (
        "cogvideox",
        lambda: faster(
            tensor_format="BFCHW",
            attention_weight_callback=lambda module: WILD,
            low_frequency_weight_callback=lambda module: 1.2,
            high_frequency_weight_callback=lambda module: 0.9,
        ),
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_every_field_is_that_of_the_hooks(case):
    name, make = FIELDS[case]
    ours, run = piping.cached(name, make(), num_inference_steps=STEPS)
    assert piping.gap(ours, piping.hooked(name, make(), num_inference_steps=STEPS)) <= 2e-5
    assert all(len(set(stream.computed)) == 2 for stream in run.summary().streams.values())


def test_a_range_with_nothing_in_it_leaves_nothing_out():
    config = pyramid(spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(800, 100))
    ours, run = piping.cached("cogvideox", config, num_inference_steps=STEPS)
    plain = piping.plain("cogvideox", num_inference_steps=STEPS)
    assert torch.equal(ours, plain) and torch.equal(
        piping.hooked("cogvideox", config, num_inference_steps=STEPS), plain
    )
    assert all(all(stream.computed) for stream in run.summary().streams.values())


def test_a_config_is_not_changed_and_may_have_been_used_by_hooks():
    for make in (lambda: faster(tensor_format="BFCHW"), pyramid):
        config = make()
        before = copy.copy(vars(config))
        ours = piping.cached("cogvideox", config, num_inference_steps=STEPS)[0]
        assert vars(config) == before
        theirs = piping.hooked("cogvideox", config, num_inference_steps=STEPS)
        assert vars(config) != before  # they write their defaults into it
        assert piping.gap(ours, theirs) <= 1e-5
        assert torch.equal(piping.cached("cogvideox", config, num_inference_steps=STEPS)[0], ours)


def test_factors_without_a_type_are_kept_as_they_are():
    policy = ckd.from_config(taylor(taylor_factors_dtype=None))
    (state,) = (policy.forecaster.init(torch.zeros(3, dtype=torch.float64)),)
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(state) if leaf.shape[-1:] == (3,)]
    assert tensors and {leaf.dtype for leaf in tensors} == {torch.float64}
    assert policy.name == ckd.from_config(taylor()).name


def test_calibration():
    assert ckd.from_config(MagCacheConfig(calibrate=True)).name == "mag_calibration()"


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no config": (lambda: 3, ck.ArgumentTypeError, "`config` must be one of FirstBlockCacheConfig, .* got int"),
    "another cache": (TextKVCacheConfig, ck.ArgumentTypeError, "got TextKVCacheConfig"),
    "zeros": (
        lambda: taylor(skip_predict_identifiers=["blocks.*"], cache_identifiers=["proj_out"]),
        ck.ArgumentError,
        "`skip_predict_identifiers` .* use_lite_mode",
    ),
    "kinds by name": (
        lambda: pyramid(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=2,
            cross_attention_block_identifiers=("attn2",),
        ),
        ck.ArgumentError,
        "`cross_attention_block_identifiers` .*patterns=",
    ),
    "kinds by name, faster": (
        lambda: faster(temporal_attention_block_skip_range=2, spatial_attention_block_identifiers=("attn1",)),
        ck.ArgumentError,
        "`spatial_attention_block_identifiers` and `temporal_attention_block_identifiers`",
    ),
    "format": (lambda: faster(tensor_format="BSC"), ck.ArgumentError, "`layout` must be one of .* got 'BSC'"),
    "threshold": (lambda: FirstBlockCacheConfig(threshold=-1), ck.ArgumentError, "threshold"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_names_the_field(case):
    make, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        ckd.from_config(make())


class Clock:
    def __call__(self, module: Any) -> float:
        return 0.3


NOW = {"t": 3}
CALLS = 0.0


def count(module: Any) -> float:
    global CALLS
    CALLS += 0.1
    return CALLS


def counting() -> Callable[[Any], float]:
    calls = 0.0

    def more(module: Any) -> float:
        nonlocal calls
        calls += 0.1
        return calls

    return more


@pytest.mark.parametrize("name", ["attention", "low_frequency", "high_frequency"])
@pytest.mark.parametrize(
    "callback",
    [
        lambda module: NOW["t"] / 1000,  # depends on what changes
        lambda module: 0.3 if module.training else 0.5,  # on the module
        lambda module: "much",  # no number
        lambda module: True,
        Clock(),  # on what it holds, perhaps
        count,  # on how often it was called
        counting(),
        lambda module, seen=[0.3]: seen[0],
    ],
)
def test_a_callback_that_is_no_constant_is_refused(name, callback):
    with pytest.raises(ck.ArgumentError, match=rf"`{name}_weight_callback` .* is not a function .* alpha_low"):
        ckd.from_config(faster(**{f"{name}_weight_callback": callback}))


@pytest.mark.parametrize("value", [0.25, 1])
def test_a_callback_may_read_numbers_around_it(value):
    config = faster(attention_weight_callback=lambda module: max(value, SHARE), is_guidance_distilled=True)
    expected = ck.faster_cache(cfg=None, weight=max(value, SHARE), semantics="diffusers")
    assert ckd.from_config(config).forecaster.name == expected.forecaster.name


# Where they are -----------------------------------------------------------------------------------------------

EVERYWHERE = {f"{kind}_attention_timestep_skip_range": (-1, 1001) for kind in ("spatial", "cross")}


def hooked(model: nn.Module, apply: Callable[[nn.Module, Any], None], config: Any, name: str) -> set[str]:
    """The modules that the hooks of a config take."""
    apply(model, config)
    return {
        path
        for path, module in model.named_modules()
        if any(hook.startswith(name) for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", ()))
    }


@pytest.mark.filterwarnings("ignore:.*decides about cross")  # which some of them have not
@pytest.mark.parametrize("name", ["Flux", "SD3", "Wan", "Latte", "PixArt", "Lumina2", "ZImage", "HunyuanVideo", "Sana"])
@pytest.mark.parametrize("kinds", [("spatial",), ("spatial", "cross")])
def test_attention_is_left_out_where_the_hooks_leave_it_out(name, kinds):
    """Within the lists that a config names: refiners beside them run."""
    config = pyramid(**{f"{kind}_attention_block_skip_range": 2 for kind in kinds}, **EVERYWHERE)
    config.current_timestep_callback = lambda: 500
    theirs = hooked(zoo.specimen(name).model, apply_pyramid_attention_broadcast, config, "pyramid")
    specimen = specimens.shared(name)
    step = ck.cache(specimen.model, ckd.from_config(config))
    with torch.no_grad():
        step.init([900.0, 800.0], **specimen.inputs(0))
    (layout,) = step.opened.layouts.values()
    assert {*layout.parts} == theirs
