"""Methods on modules inside the blocks against the live hooks of diffusers: equal modules run, equal outputs.

And where the hooks look in vain: attention that their names do not match.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from diffusers.models.cache_utils import CacheMixin
from specimens import shared
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cachekit as ck
from cachekit.diffusers import zoo

STEPS = 12
TOLERANCE = 1e-5  # of the norm, float32
TIMES = [zoo.schedule(step) for step in range(STEPS)]
ATTENTION = (Attention, MochiAttention, AttentionModuleMixin)

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning"),
]


class Sampled(NamedTuple):
    """What a trajectory did."""

    outputs: list[list[Tensor]]  # [step][tensor]
    ran: list[frozenset[str]]  # of every step, the attention modules that really ran


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """What diffusers' classes say is attention, in the lists where its hooks look."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ATTENTION) and re.search("blocks|layers", name)
    }


def watch(model: nn.Module) -> set[str]:
    """Which attention modules ran: hooks and sites leave the inside of a module alone."""
    now: set[str] = set()
    for name, module in attentions(model).items():
        inside = next(layer for layer in module.modules() if isinstance(layer, nn.Linear))
        inside.register_forward_hook(lambda layer, args, out, name=name: now.add(name))
    return now


@functools.cache
def watched(name: str) -> tuple[zoo.Specimen, set[str]]:
    """A specimen that no hook of diffusers touches, the same at every call, and what ran of it."""
    specimen = zoo.specimen(name)
    return specimen, watch(specimen.model)


def sample(call: Callable[[int], Any], now: set[str]) -> Sampled:
    """Call once a step and see which attention modules ran."""
    sampled = Sampled([], [])
    for step in range(STEPS):
        now.clear()
        out = call(step)
        plain = out.to_tuple() if hasattr(out, "to_tuple") else out
        sampled.outputs.append([leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor)])
        sampled.ran.append(frozenset(now))
    now.clear()  # what a hook has noted is a change of the model
    return sampled


def hooked(
    name: str, apply: Callable[[nn.Module, Any], Any], config: Any, wrap: Callable = lambda specimen: specimen
) -> Sampled:
    """The model under the hooks of diffusers."""
    specimen, now = wrap(zoo.specimen(name)), [0.0]
    if hasattr(config, "current_timestep_callback"):
        config.current_timestep_callback = lambda: now[0]
    apply(specimen.model, config)

    def call(step: int) -> Any:
        now[0] = TIMES[step]
        with CacheMixin.cache_context(specimen.model, "cond"):
            return specimen.model(**specimen.inputs(step))

    return sample(call, watch(specimen.model))


def cached(name: str, policy: ck.Policy, wrap: Callable = lambda specimen: specimen) -> Sampled:
    """The model under ours."""
    specimen, now = watched(name)
    specimen = wrap(specimen)
    step = ck.cache(specimen.model, policy)
    state = step.init(TIMES, **specimen.inputs(0))

    def call(at: int) -> Any:
        nonlocal state
        out, state = step(state, **specimen.inputs(at))
        return out

    return sample(call, now)


def assert_alike(ours: Sampled, theirs: Sampled) -> None:
    """The same modules in every step, and outputs within the tolerance; some modules are left out."""
    assert ours.ran == theirs.ran
    assert len(set(theirs.ran)) > 1
    for step, (mine, other) in enumerate(zip(ours.outputs, theirs.outputs, strict=True)):
        for a, b in zip(mine, other, strict=True):
            assert ((a - b).norm() / b.norm()).item() <= TOLERANCE, step


def pyramid(spatial: Any = None, temporal: Any = None, cross: Any = None, **more: Any) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=spatial,
        temporal_attention_block_skip_range=temporal,
        cross_attention_block_skip_range=cross,
        **more,
    )


# The hooks are told of all three kinds whatever the model has, and so is the policy.
@pytest.mark.filterwarnings("ignore:.*decides about .*and no block of:UserWarning")
@pytest.mark.parametrize("intervals", [(2, None, None), (3, None, 4), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("name", ["Flux", "Wan", "CogVideoX", "QwenImage", "Latte", "HunyuanVideo"])
def test_pyramid_attention_broadcast(name, intervals):
    theirs = hooked(name, apply_pyramid_attention_broadcast, pyramid(*intervals))
    ours = cached(name, ck.pyramid_attention_broadcast(*intervals, semantics="diffusers"))
    assert_alike(ours, theirs)


def test_pyramid_attention_broadcast_of_every_kind_its_own_range():
    ranges = {"spatial": (150.0, 900.0), "temporal": (300.0, 970.0), "cross": (-1.0, 2000.0)}
    # Their names for spatial lists match the temporal one as well.
    config = pyramid(
        2,
        4,
        3,
        spatial_attention_block_identifiers=("^transformer_blocks",),
        **{f"{kind}_attention_timestep_skip_range": span for kind, span in ranges.items()},
    )
    theirs = hooked("Latte", apply_pyramid_attention_broadcast, config)
    ours = cached(
        "Latte", ck.pyramid_attention_broadcast(2, 4, 3, **{f"{kind}_range": at for kind, at in ranges.items()})
    )
    assert_alike(ours, theirs)
    assert len(set(ours.ran)) > 3


def test_temporal_attention_counts_as_spatial_only_for_diffusers():
    theirs = hooked("Latte", apply_pyramid_attention_broadcast, pyramid(2, 3))
    paper = cached("Latte", ck.pyramid_attention_broadcast(2, 3))
    assert paper.ran != theirs.ran
    temporal = {name for names in paper.ran for name in names if name.startswith("temporal")}
    assert temporal and all(temporal <= names or not temporal & names for names in paper.ran)


def taylor(**more: Any) -> Any:
    return TaylorSeerCacheConfig(**{"cache_interval": 3, "disable_cache_before_step": 2, **more})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["Flux", "QwenImage", "SD3"])
def test_taylorseer(name, order, dtype):
    theirs = hooked(name, apply_taylorseer_cache, taylor(max_order=order, taylor_factors_dtype=dtype))
    # The second attention of SD3.5's blocks is called attn2, which their names do not match.
    sites = (r".*\.attn",) if name == "SD3" else None
    ours = cached(name, ck.taylorseer(3, warmup=2, order=order, dtype=dtype, sites=sites, semantics="diffusers"))
    assert_alike(ours, theirs)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["Flux", "QwenImage"])
def test_taylorseer_lite(name, order):
    config = taylor(max_order=order, taylor_factors_dtype=torch.float32, use_lite_mode=True)
    theirs = hooked(name, apply_taylorseer_cache, config)
    policy = ck.taylorseer(3, warmup=2, order=order, dtype=torch.float32, sites="output", semantics="diffusers")
    assert_alike(cached(name, policy), theirs)


@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_lite_where_the_last_block_returns_none(order):
    config = taylor(max_order=order, taylor_factors_dtype=torch.float32)
    with pytest.raises(AttributeError, match="NoneType"):
        hooked("SD3", apply_taylorseer_cache, dataclasses.replace(config, use_lite_mode=True))
    # Told to leave the last block alone, they extrapolate the same output.
    config.skip_predict_identifiers, config.cache_identifiers = [r"transformer_blocks\.0"], ["proj_out"]
    theirs = hooked("SD3", apply_taylorseer_cache, config)
    policy = ck.taylorseer(3, warmup=2, order=order, sites="output", dtype=torch.float32, semantics="diffusers")
    ours = cached("SD3", policy)
    assert_alike(ours, theirs._replace(ran=ours.ran))


def test_taylorseer_by_its_defaults_and_with_an_end():
    theirs = hooked("Flux", apply_taylorseer_cache, TaylorSeerCacheConfig(disable_cache_after_step=10))
    assert_alike(cached("Flux", ck.taylorseer(cooldown_after=10, semantics="diffusers")), theirs)


@pytest.mark.parametrize("name", ["Wan", "CogVideoX", "LTX", "Mochi"])
def test_attention_that_the_names_of_diffusers_miss_is_found(name):
    theirs = hooked(name, apply_taylorseer_cache, taylor())
    assert all(names == theirs.ran[0] for names in theirs.ran)  # nothing was ever left out
    ours = cached(name, ck.taylorseer(3, warmup=2, semantics="diffusers"))
    assert ours.ran[0] == theirs.ran[0] and ours.ran[2] == frozenset()


def both_halves(specimen: zoo.Specimen) -> zoo.Specimen:
    """With a batch of an unconditional and a conditional half, which differ in the prompt alone."""

    def inputs(step: int) -> dict[str, Any]:
        given, batch = specimen.inputs(step), specimen.inputs(step)["hidden_states"].shape[0]
        made = {}
        for name, value in given.items():
            halved = isinstance(value, Tensor) and value.ndim and value.shape[0] == batch
            other = 0.3 * value if name == "encoder_hidden_states" else value
            made[name] = torch.cat((other, value)) if halved else value
        return made

    return specimen._replace(inputs=inputs)


def swapped(specimen: zoo.Specimen) -> zoo.Specimen:
    """The conditional half first."""

    def inputs(step: int) -> dict[str, Any]:
        given = both_halves(specimen).inputs(step)
        batch = given["hidden_states"].shape[0]
        return {
            name: torch.cat(value.chunk(2)[::-1])
            if isinstance(value, Tensor) and value.shape[:1] == (batch,)
            else value
            for name, value in given.items()
        }

    return specimen._replace(inputs=inputs)


def faster(**more: Any) -> Any:
    return FasterCacheConfig(spatial_attention_timestep_skip_range=(-1, 901), **more)


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("name", ["Flux", "QwenImage", "HunyuanVideo"])
def test_faster_cache_without_guidance(name, every):
    config = faster(is_guidance_distilled=True, spatial_attention_block_skip_range=every)
    theirs = hooked(name, apply_faster_cache, config)
    policy = ck.faster_cache(every, attention_range=(-1, 901), cfg=None, semantics="diffusers")
    assert_alike(cached(name, policy), theirs)


@pytest.mark.parametrize(("attention", "uncond"), [(2, 5), (3, 4), (2, 3)])
@pytest.mark.parametrize(("name", "layout"), [("Wan", "BCFHW"), ("CogVideoX", "BFCHW"), ("Latte", "BCFHW")])
def test_faster_cache_with_both_halves(name, layout, attention, uncond):
    config = faster(
        tensor_format=layout,
        spatial_attention_block_skip_range=attention,
        unconditional_batch_skip_range=uncond,
        unconditional_batch_timestep_skip_range=(-1, 970),
    )
    theirs = hooked(name, apply_faster_cache, config, both_halves)
    more = {"attention_range": (-1, 901), "uncond_range": (-1, 970), "layout": layout, "semantics": "diffusers"}
    assert_alike(cached(name, ck.faster_cache(attention, uncond=uncond, **more), both_halves), theirs)
    # The other order of the batch is the same answer in the other order.
    other = cached(name, ck.faster_cache(attention, uncond=uncond, cfg="batched_cond_first", **more), swapped)
    turned = [[torch.cat(tensor.chunk(2)[::-1]) for tensor in tensors] for tensors in other.outputs]
    assert_alike(other._replace(outputs=turned), theirs)


@pytest.mark.parametrize("name", list(zoo.BUILDERS))
def test_all_attention_that_diffusers_knows_is_found(name):
    specimen = shared(name)
    called: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for path, module in attentions(specimen.model).items():
            hook = module.register_forward_hook(lambda module, args, out, path=path: called.add(path))
            hooks.callback(hook.remove)
        specimen.model(**specimen.inputs(0))
    if not called:
        pytest.skip("no attention of diffusers' classes runs in it")
    step = ck.cache(specimen.model, ck.Policy("all", ck.deciders.mask([1]), ck.forecasters.hold(), sites="attention"))
    state = step.init(1, **specimen.inputs(0))
    assert called <= {path.partition("#")[0] for path in state.sites}
