"""`semantics="diffusers"` against the live hooks of diffusers: the same steps computed, the same outputs.

Also where the two part on purpose: a NaN in the probe, control hints added twice, one state for all streams.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, apply_first_block_cache, apply_mag_cache
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.cache_utils import CacheMixin
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cachekit as ck
from cachekit.diffusers import zoo

STEPS = 12
TOLERANCE = 1e-5  # of the norm, float32; where the arithmetic is the same it is 0
# Where the hooks look for blocks.
LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers", "visual_transformer_blocks")

# Thresholds between the changes that a class shows, so that the patterns are not regular.
FIRST_BLOCK = {
    "Flux": (0.05, 0.1),
    "QwenImage": (0.055, 0.1),
    "Wan": (0.027, 0.05),
    "CogVideoX": (0.05, 0.1),
    "LTX": (0.0235, 0.05),
    "Mochi": (0.067, 0.1),
    "HunyuanVideo": (0.046, 0.1),
    "PixArt": (0.02, 0.05),
}
FIRST_BLOCK_ALSO = {  # beyond the required classes
    "HunyuanImage": 0.06,
    "HunyuanVideoI2V": 0.045,
    "HunyuanVideoFramepack": 0.05,
    "CogView4": 0.053,
    "DiT": 0.05,
    "WanI2V": 0.05,
    "Prior": 0.02,
}
FIRST_BLOCK_FAILS: dict[str, tuple[type[Exception], str]] = {
    "Flux2": (TypeError, "unsupported operand"),  # its single blocks return no pair
    "SD3": (TypeError, "NoneType"),  # its last block returns no text
    "Latte": (RuntimeError, "must match the size"),  # one residual over blocks of two layouts
    "AuraFlow": (ValueError, "not registered"),
    "Lumina2": (ValueError, "not registered"),
}
MAG = ("Flux", "Flux2", "SD3", "QwenImage", "Wan", "CogVideoX", "LTX", "Mochi", "HunyuanVideo", "PixArt")
MAG_ALSO = (
    "HunyuanImage",
    "HunyuanVideoI2V",
    "HunyuanVideoFramepack",
    "CogView4",
    "DiT",
    "WanI2V",
    "Kandinsky5",
    "Prior",
)
MAG_FAILS: dict[str, tuple[type[Exception], str]] = {
    "Latte": (RuntimeError, "must match the size"),
    "AuraFlow": (ValueError, "not registered"),
    "Lumina2": (ValueError, "not registered"),
}
if importlib.metadata.version("diffusers") < "0.42":  # the last on Python 3.10 knows less of Flux2
    MAG = tuple(name for name in MAG if name != "Flux2")
    FIRST_BLOCK_FAILS["Flux2"] = MAG_FAILS["Flux2"] = (ValueError, "not registered")
MAG_SETTINGS = ((0.06, 3, 0.2), (0.24, 5, 0.1))  # threshold, K, retention: diffusers' defaults, the authors' for FLUX

# What Mochi says of itself on a CPU, cached or not.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning")

Inputs = Callable[[int], dict[str, Any]]


class Sampled(NamedTuple):
    """What a trajectory did."""

    outputs: list[list[Tensor]]  # [step][tensor]
    computed: list[bool]  # whether a middle block ran


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """At this size a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tensors(out: Any) -> list[Tensor]:
    """The tensors that a model returns, in order."""
    plain = out.to_tuple() if hasattr(out, "to_tuple") else out
    return [leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor)]


def gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The relative difference of two steps, infinite where one of them is not finite."""
    assert len(ours) == len(theirs) > 0
    found = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]
    return max(math.inf if math.isnan(value) else value for value in found)


def gaps(ours: Sampled, theirs: Sampled) -> list[float]:
    """`gap` of every step."""
    return [gap(a, b) for a, b in zip(ours.outputs, theirs.outputs, strict=True)]


def watch(model: nn.Module) -> list[int]:
    """A list that grows whenever a block in the middle really runs: hooks and sites leave its inside alone."""
    blocks = [block for name in LISTS for block in getattr(model, name, ())]
    inside = next(module for module in blocks[len(blocks) // 2].modules() if isinstance(module, nn.Linear))
    ran: list[int] = []
    inside.register_forward_hook(lambda module, args, out: ran.append(1))
    return ran


def sample(call: Callable[[int], Any], ran: list[int], steps: int) -> Sampled:
    """Call once a step, and see whether the watched block ran."""
    sampled = Sampled([], [])
    for step in range(steps):
        ran.clear()
        sampled.outputs.append(tensors(call(step)))
        assert len(ran) <= 1
        sampled.computed.append(bool(ran))
    ran.clear()  # what a hook has noted is a change of the model
    return sampled


@functools.cache
def watched(name: str) -> tuple[zoo.Specimen, list[int]]:
    """A specimen that no hook of diffusers touches, the same at every call, and whether its watched block ran."""
    specimen = zoo.specimen(name)
    return specimen, watch(specimen.model)


def uncached(name: str, steps: int = STEPS, inputs: Inputs | None = None) -> Sampled:
    """The model itself."""
    specimen, ran = watched(name)
    inputs = inputs or specimen.inputs
    return sample(lambda step: specimen.model(**inputs(step)), ran, steps)


def hooked(name: str, config: Any, steps: int = STEPS, inputs: Inputs | None = None) -> Sampled:
    """The model under the hooks of diffusers."""
    specimen = zoo.specimen(name)
    inputs = inputs or specimen.inputs
    ran = watch(specimen.model)
    hook(specimen.model, config)

    def call(step: int) -> Any:
        with CacheMixin.cache_context(specimen.model, "cond"):  # a function: SD3 and PixArt are no CacheMixin
            return specimen.model(**inputs(step))

    return sample(call, ran, steps)


def hook(model: nn.Module, config: Any) -> None:
    """Apply the hooks that a config belongs to."""
    (apply_mag_cache if isinstance(config, MagCacheConfig) else apply_first_block_cache)(model, config)


def cached(
    name: str, policy: ck.Policy, steps: int = STEPS, inputs: Inputs | None = None
) -> tuple[Sampled, ck.Summary]:
    """The model under ours."""
    specimen, ran = watched(name)
    inputs = inputs or specimen.inputs
    step = ck.cache(specimen.model, policy)
    state = step.init(steps, **inputs(0))

    def call(at: int) -> Any:
        nonlocal state
        out, state = step(state, **inputs(at))
        return out

    sampled, log = sample(call, ran, steps), ck.summary(state)
    assert list(log.computed) == sampled.computed
    return sampled, log


def mag_config(threshold: float, max_skips: int, retention: float, steps: int, ratios: Any = FLUX_MAG_RATIOS) -> Any:
    return MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_skips,
        retention_ratio=retention,
        num_inference_steps=steps,
        mag_ratios=ratios,
    )


def mag_policy(threshold: float, max_skips: int, retention: float, ratios: Any = None) -> ck.Policy:
    return ck.mag_cache(
        ck.MagRatios.flux() if ratios is None else ratios,
        threshold=threshold,
        max_skips=max_skips,
        retention=retention,
        semantics="diffusers",
    )


def first_block(threshold: float, semantics: str = "diffusers") -> ck.Policy:
    return ck.first_block_cache(threshold, semantics=semantics)


def mixed(computed: list[bool]) -> bool:
    """Whether, after step 0, some steps are computed and some are not."""
    return len(set(computed[1:])) == 2


# The same pattern and the same outputs -----------------------------------------------------------------------

REQUIRED = {
    *("Flux", "Flux2", "SD3", "QwenImage", "Wan", "CogVideoX", "LTX", "Mochi"),
    *("HunyuanVideo", "Latte", "PixArt", "AuraFlow", "Lumina2"),
}
REQUIRED_THRESHOLDS = [(name, threshold) for name, thresholds in FIRST_BLOCK.items() for threshold in thresholds]


@pytest.mark.parametrize(("name", "threshold"), [*REQUIRED_THRESHOLDS, *FIRST_BLOCK_ALSO.items()])
def test_first_block_cache_is_that_of_diffusers(name: str, threshold: float):
    theirs = hooked(name, FirstBlockCacheConfig(threshold=threshold))
    ours, log = cached(name, first_block(threshold))
    # Sums are added up in another order here: a change this close to the threshold could fall on either side.
    assert min(abs(change - threshold) for change in log.signal[1:]) > 1e-5 * threshold
    assert mixed(theirs.computed)
    assert ours.computed == theirs.computed
    assert max(gaps(ours, theirs)) <= TOLERANCE


@pytest.mark.parametrize("setting", MAG_SETTINGS)
@pytest.mark.parametrize("name", MAG)
def test_mag_cache_is_that_of_diffusers(name: str, setting: tuple[float, int, float]):
    _mag_parity(name, setting, STEPS)


@pytest.mark.parametrize("name", MAG_ALSO)
def test_mag_cache_is_that_of_diffusers_on_classes_beyond_the_required(name: str):
    _mag_parity(name, MAG_SETTINGS[0], STEPS)


@pytest.mark.parametrize("steps", [7, 28, 50])
@pytest.mark.parametrize("setting", [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.12, 1, 0.0), (0.5, 8, 0.4)])
def test_mag_cache_stretches_its_ratios_as_diffusers_does(setting: tuple[float, int, float], steps: int):
    _mag_parity("PixArt", setting, steps)


def _mag_parity(name: str, setting: tuple[float, int, float], steps: int) -> None:
    theirs = hooked(name, mag_config(*setting, steps), steps)
    ours, _ = cached(name, mag_policy(*setting), steps)
    assert mixed(theirs.computed)
    assert ours.computed == theirs.computed
    assert max(gaps(ours, theirs)) <= TOLERANCE


# The lists of classes above are complete ---------------------------------------------------------------------


def test_every_required_class_either_matches_the_hooks_or_fails_in_them():
    assert set(FIRST_BLOCK) | set(FIRST_BLOCK_FAILS) == REQUIRED == set(MAG) | set(MAG_FAILS)
    assert not set(FIRST_BLOCK) & set(FIRST_BLOCK_FAILS) and not set(MAG) & set(MAG_FAILS)


@pytest.mark.parametrize("name", FIRST_BLOCK_FAILS)
def test_first_block_cache_runs_where_the_hooks_fail(name: str):
    error, reason = FIRST_BLOCK_FAILS[name]
    with pytest.raises(error, match=reason):
        hooked(name, FirstBlockCacheConfig(threshold=0.05))
    sampled, _ = cached(name, first_block(0.1))
    assert mixed(sampled.computed) and max(gaps(sampled, uncached(name))) < 0.2


@pytest.mark.parametrize("name", MAG_FAILS)
def test_mag_cache_runs_where_the_hooks_fail(name: str):
    error, reason = MAG_FAILS[name]
    with pytest.raises(error, match=reason):
        hooked(name, mag_config(*MAG_SETTINGS[0], STEPS))
    sampled, _ = cached(name, mag_policy(*MAG_SETTINGS[0]))
    assert mixed(sampled.computed) and max(gaps(sampled, uncached(name))) < 0.3


# Every decision, on blocks that cost nothing -----------------------------------------------------------------


class Times(nn.Module):
    """A block that multiplies, so that its residual is exact; it counts its runs."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.runs = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.runs += 1
        return hidden_states * self.factor


class Toy(nn.Module):
    """Three blocks, of which the hooks of diffusers know the class."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Times(factor) for factor in (2.0, 1.5, 1.25))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def toy_hooks(config: Any, sizes: list[float]) -> list[bool]:
    """The steps that the hooks compute when every element of the input is `sizes[step]`."""
    TransformerBlockRegistry.register(Times, TransformerBlockMetadata(return_hidden_states_index=0))
    model, computed = Toy(), []
    hook(model, config)
    with CacheMixin.cache_context(model, "cond"):
        for size in sizes:
            before = model.transformer_blocks[1].runs
            model(torch.full((1, 2, 4), size))
            computed.append(model.transformer_blocks[1].runs > before)
    return computed


def toy_step(policy: ck.Policy, sizes: list[float]) -> list[bool]:
    """The steps that ours computes."""
    step = ck.cache(Toy(), policy)
    state = step.init(len(sizes), torch.full((1, 2, 4), sizes[0]))
    for size in sizes:
        _, state = step(state, torch.full((1, 2, 4), size))
    return list(ck.summary(state).computed)


@st.composite
def mag_settings(draw: st.DrawFn) -> tuple[float, int, float, int, list[float]]:
    """Any setting; the threshold may be an error that occurs, to the bit, or right beside one."""
    ratios = draw(st.lists(st.floats(0.5, 1.5, width=32), min_size=1, max_size=30))
    steps = draw(st.integers(1, 30))
    retention = draw(st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.2, 0.5]))
    products = torch.tensor(ratios).cumprod(0)
    errors = (1 - products).abs().cumsum(0).tolist()
    threshold = draw(st.floats(0, 1) | st.sampled_from([0.0, *errors]))
    return threshold, draw(st.integers(0, 6)), retention, steps, ratios


@given(setting=mag_settings())
def test_the_plan_of_mag_cache_is_that_of_diffusers_at_any_setting(setting):
    threshold, max_skips, retention, steps, ratios = setting
    theirs = toy_hooks(mag_config(threshold, max_skips, retention, steps, ratios), [1.0] * steps)
    plan = ck.deciders.plan(mag_policy(threshold, max_skips, retention, ratios).decider, steps)
    assert list(plan) == theirs


def test_a_change_equal_to_the_threshold_is_reused_as_diffusers_does():
    sizes = [1.0, 1.5, 1.625, 0.5]  # changes of 0.5, 0.625 and 0.5 or 0.69
    assert toy_hooks(FirstBlockCacheConfig(threshold=0.5), sizes) == [True, False, True, True]
    assert toy_step(first_block(0.5), sizes) == [True, False, True, True]
    assert toy_step(first_block(0.5, "paper"), sizes) == [True, True, False, True]


def test_a_threshold_of_0_never_reuses_where_diffusers_does():
    """A departure: an unchanged input is reused there, and 0 does not switch the cache off."""
    assert toy_hooks(FirstBlockCacheConfig(threshold=0.0), [1.0] * 4) == [True, False, False, False]
    assert toy_step(first_block(0.0), [1.0] * 4) == [True] * 4


# Where the two part ------------------------------------------------------------------------------------------


def poisoned(inputs: Inputs, at: int) -> Inputs:
    """The same inputs, with a latent of NaN at one step."""

    def changed(step: int) -> dict[str, Any]:
        given = inputs(step)
        return given | {"hidden_states": given["hidden_states"] * (torch.nan if step == at else 1.0)}

    return changed


def finite(sampled: Sampled) -> list[bool]:
    """Whether each step is."""
    return [all(bool(torch.isfinite(tensor).all()) for tensor in step) for step in sampled.outputs]


def test_a_nan_at_step_0_stays_for_ever_in_diffusers_and_for_one_step_here():
    inputs = poisoned(zoo.specimen("Wan").inputs, at=0)
    theirs = hooked("Wan", FirstBlockCacheConfig(threshold=0.05), inputs=inputs)
    ours, _ = cached("Wan", first_block(0.05), inputs=inputs)
    assert theirs.computed == [True] + [False] * (STEPS - 1)
    assert finite(theirs) == [False] * STEPS
    assert ours.computed[:2] == [True, True] and mixed(ours.computed[1:])
    assert finite(ours) == [False] + [True] * (STEPS - 1)


@pytest.mark.parametrize("semantics", ["paper", "diffusers"])
def test_a_nan_in_the_probe_is_reused_by_diffusers_and_computed_here(semantics: str):
    inputs = poisoned(zoo.specimen("Wan").inputs, at=4)
    theirs = hooked("Wan", FirstBlockCacheConfig(threshold=0.05), inputs=inputs)
    ours, log = cached("Wan", first_block(0.05, semantics), inputs=inputs)
    assert not theirs.computed[4] and ours.computed[4]
    assert log.signal[4] != log.signal[4]
    # The reference is NaN now, so one more step computes; then all is as before.
    assert ours.computed[5] and mixed(ours.computed[6:])
    assert finite(ours) == [step != 4 for step in range(STEPS)]


@pytest.mark.parametrize(
    ("config", "policy"),
    [
        (mag_config(*MAG_SETTINGS[0], STEPS), mag_policy(*MAG_SETTINGS[0])),
        (FirstBlockCacheConfig(threshold=0.05), first_block(0.05)),
    ],
    ids=["mag_cache", "first_block_cache"],
)
def test_control_hints_are_added_twice_by_diffusers_and_once_here(config: Any, policy: ck.Policy):
    """WanVACE adds hints between the blocks: one residual over all of them holds the hints already."""
    truth = uncached("WanVACE")
    theirs = hooked("WanVACE", config)
    ours, _ = cached("WanVACE", policy)
    assert ours.computed == theirs.computed and mixed(ours.computed)
    skipped = [step for step, computed in enumerate(ours.computed) if not computed]
    wrong, right = gaps(theirs, truth), gaps(ours, truth)
    assert min(wrong[step] for step in skipped) > 0.1
    assert max(right[step] for step in skipped) < 0.05
    assert all(right[step] < 0.2 * wrong[step] for step in skipped)
    assert all(right[step] == wrong[step] == 0 for step in range(STEPS) if step not in skipped)


def other_stream(inputs: Inputs) -> Inputs:
    """Another branch of the same trajectory: a shorter prompt, other latents."""

    def changed(step: int) -> dict[str, Any]:
        given, later = inputs(step), inputs(step + 10)
        text = -given["encoder_hidden_states"][:, :4]
        return given | {"hidden_states": later["hidden_states"], "encoder_hidden_states": text}

    return changed


def test_two_streams_on_one_step_do_not_touch_each_other():
    specimen = zoo.specimen("Wan")
    streams = {"cond": specimen.inputs, "uncond": other_stream(specimen.inputs)}
    alone = {name: cached("Wan", first_block(0.027), inputs=inputs) for name, inputs in streams.items()}
    step = ck.cache(specimen.model, first_block(0.027))
    states = {name: step.init(STEPS, **inputs(0)) for name, inputs in streams.items()}
    for at in range(STEPS):
        for name, inputs in streams.items():
            out, states[name] = step(states[name], **inputs(at))
            assert gap(tensors(out), alone[name][0].outputs[at]) == 0
    for name in streams:
        assert ck.summary(states[name]).computed == alone[name][1].computed
    assert alone["cond"][1].computed != alone["uncond"][1].computed


def test_two_states_are_the_two_contexts_of_diffusers_and_one_context_mixes_them():
    streams = {"cond": zoo.specimen("Wan").inputs, "uncond": other_stream(zoo.specimen("Wan").inputs)}
    alone = {name: cached("Wan", first_block(0.05), inputs=inputs)[0].outputs for name, inputs in streams.items()}

    def worst(context: dict[str, str]) -> float:
        model = zoo.specimen("Wan").model
        hook(model, FirstBlockCacheConfig(threshold=0.05))
        found = []
        for at in range(STEPS):
            for name, inputs in streams.items():
                with CacheMixin.cache_context(model, context[name]):
                    found.append(gap(tensors(model(**inputs(at))), alone[name][at]))
        return max(found)

    assert worst({"cond": "cond", "uncond": "uncond"}) <= TOLERANCE
    assert worst({"cond": "one", "uncond": "one"}) > 1e-3
