"""A call of a pipeline begins anew whatever happened before, alone in its thread, and leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import piping
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TextKVCacheConfig, apply_first_block_cache
from torch import Tensor, nn

import cachekit as ck
import cachekit.diffusers as ckd
from cachekit.diffusers import zoo
from cachekit.diffusers.schedules import Schedule

POLICIES: dict[str, Callable[[], ck.Policy]] = {
    "first_block_cache": lambda: ck.first_block_cache(0.1),
    "taylorseer": lambda: ck.taylorseer(3, warmup=1),
    "pyramid_attention_broadcast": lambda: ck.pyramid_attention_broadcast(3, spatial_range=(100, 950)),
}


def fresh(name: str, policy: ck.Policy, **how: Any) -> Tensor:
    """What a pipeline that was never used returns."""
    return piping.cached(name, policy, **how)[0]


# Whatever happened before ---------------------------------------------------------------------------------------


def broken(made: piping.Piped) -> None:
    """An exception in the midst of the loop."""

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise ZeroDivisionError("by the user")
        return given

    with pytest.raises(ZeroDivisionError):
        piping.image(made, seed=1, callback_on_step_end=callback)


def interrupted(made: piping.Piped) -> None:
    """The loop runs empty from a step on."""

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 4
        return given

    piping.image(made, seed=1, callback_on_step_end=callback)


def rescheduled(made: piping.Piped) -> None:
    """Another scheduler, then the first one again."""
    before = made.pipe.scheduler
    made.pipe.scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    piping.image(made, seed=1)
    made.pipe.scheduler = before


EVENTS: dict[str, Callable[[piping.Piped], Any]] = {
    "a call": lambda made: piping.image(made, seed=1),
    "an exception": broken,
    "an interruption": interrupted,
    "another number of steps": lambda made: piping.image(made, seed=1, num_inference_steps=5),
    "another resolution": lambda made: piping.image(made, seed=1, height=96),
    "several images": lambda made: piping.image(made, seed=1, num_videos_per_prompt=2),
    "another prompt length": lambda made: piping.image(
        made, seed=1, prompt_embeds=torch.randn(1, 9, 24), negative_prompt_embeds=torch.randn(1, 3, 24)
    ),
    "another scheduler": rescheduled,
    "no guidance": lambda made: piping.image(made, seed=1, guidance_scale=1.0),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("event", EVENTS)
def test_the_next_image_is_that_of_a_fresh_pipeline(event, policy):
    made = piping.piped("wan")
    with ckd.cached(made.pipe, POLICIES[policy]()) as run:
        EVENTS[event](made)
        assert torch.equal(piping.image(made), fresh("wan", POLICIES[policy]()))
        assert all(len(set(stream.computed)) == 2 for stream in run.summary().streams.values())


@pytest.mark.parametrize(
    "how",
    [
        {"num_inference_steps": 5},
        {"batch": 2},
        {"height": 96},
        {"prompt_embeds": torch.ones(1, 9, 24).cumsum(1).sin()},
        {"num_inference_steps": 11},
    ],
    ids=lambda how: ", ".join(how),
)
def test_a_call_of_another_kind_is_that_of_a_fresh_pipeline(how):
    made = piping.piped("wan")
    with ckd.cached(made.pipe, ck.first_block_cache(0.1)):
        piping.image(made)
        other = piping.piped("wan", **how).given
        assert torch.equal(piping.image(made, **other), fresh("wan", ck.first_block_cache(0.1), **how))


def test_all_states_are_of_the_call():
    made, seen = piping.piped("wan"), []

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append({name: (int(state.step), bool(state.sites)) for name, state in run.states.items()})
        return given

    with ckd.cached(made.pipe, ck.first_block_cache(0.1)) as run:
        assert run.states == {} and str(run.summary()) == "no call of the pipeline yet"
        piping.image(made, callback_on_step_end=callback)
    assert seen == [dict.fromkeys(run.states, (step, True)) for step in range(1, piping.STEPS + 1)]
    assert list(run.states) == ["transformer/cond", "transformer/uncond"]
    for state in run.states.values():
        # What was cached is freed, what was logged is not.
        assert not state.sites and ck.summary(state).steps == piping.STEPS


def test_more_steps_than_are_known_begin_another_trajectory(monkeypatch):
    """Where the schedule is shorter than the loop."""
    monkeypatch.setattr(Schedule, "_called", lambda self: (900.0, 500.0, 100.0))
    _, run = piping.cached("wan", ck.step_mask([1, 0, 0]))
    computed = (True, False, False, True, False, False, True, False)
    assert [stream.computed for stream in run.summary().streams.values()] == [computed] * 2


# Parts of a schedule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "steps"), [("flux_image", 5), ("cogvideox_video", 4)])
def test_image_to_image_has_the_steps_that_are_left(name, steps):
    policy = POLICIES["pyramid_attention_broadcast"]()
    made = piping.piped(name)
    with ckd.cached(made.pipe, policy) as run:
        piping.image(made, seed=1, num_inference_steps=6)
        ours = piping.image(made)
    assert torch.equal(ours, fresh(name, policy))
    (state,) = run.states.values()
    assert state.timesteps.tolist() == made.pipe.scheduler.timesteps[-steps:].tolist()
    assert int(state.step) == steps
    if name == "flux_image":
        return  # it does not tell its timestep, which the hooks ask for
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3, spatial_attention_timestep_skip_range=(100, 950)
    )
    assert piping.gap(ours, piping.hooked(name, config)) < 1e-5


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of that scheduler
def test_a_scheduler_that_repeats_timesteps():
    made = piping.piped("latte_heun")
    with ckd.cached(made.pipe, ck.step_mask([1, 0, 0] * 5)) as run:
        piping.image(made)
    (state,) = run.states.values()
    assert state.timesteps.tolist() == made.pipe.scheduler.timesteps.tolist()
    assert int(state.step) == 2 * piping.STEPS - 1
    assert run.summary().streams["transformer/call"].computed == tuple(ck.summary(state).computed)


@pytest.mark.parametrize(("start", "calls"), [(0.2, (2, 5)), (-1.0, (0, 5))])
def test_a_third_call_in_some_steps_is_a_stream_of_its_own(start, calls):
    """Skip-layer guidance, of half the batch, also in the first step, where two calls could be two halves."""
    how = {"skip_guidance_layers": [1], "skip_layer_guidance_start": start, "skip_layer_guidance_stop": 0.6}
    policy = ck.faster_cache(layout="BCHW", uncond=2, uncond_range=(-1, 1001), attention_range=(-1, 1001))
    made = piping.piped("sd3", **how)
    with ckd.cached(made.pipe, policy) as run:
        piping.image(made)
    streams = run.summary().streams
    assert [len(stream.computed) for stream in streams.values()] == [piping.STEPS, calls[1] - calls[0]]
    assert streams["transformer/call 2"].policy == f"{streams['transformer/call'].policy} without guidance"
    third = run.states["transformer/call 2"].timesteps.tolist()
    assert third == made.pipe.scheduler.timesteps[calls[0] :].tolist()


def test_a_stream_that_missed_steps_begins_anew():
    made = piping.piped("wan")

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0 if 2 <= step < 5 else 3.0
        return given

    with ckd.cached(made.pipe, ck.step_mask([1] + [0] * 7)) as run:
        piping.image(made, callback_on_step_end=callback)
    patterns = {name: stream.computed for name, stream in run.summary().streams.items()}
    assert patterns["transformer/cond"] == (True, *(False,) * 7)
    assert patterns["transformer/uncond"] == (True, False, False, True, False)  # steps 0, 1, 2, 6, 7
    assert run.states["transformer/uncond"].timesteps.tolist() == made.pipe.scheduler.timesteps[6:].tolist()


def test_another_shape_in_the_midst_of_a_call_begins_anew():
    made, longer = piping.piped("wan"), torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(5))

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": longer} if step == 3 else {}

    with ckd.cached(made.pipe, ck.step_mask([1] + [0] * 7)) as run:
        piping.image(made, callback_on_step_end=callback)
    patterns = {name: stream.computed for name, stream in run.summary().streams.items()}
    assert patterns["transformer/cond"] == (True, False, False, False) * 2
    assert patterns["transformer/uncond"] == (True, *(False,) * 7)


def test_guidance_in_two_calls_of_which_one_never_comes():
    policy = ck.faster_cache(uncond=2, uncond_range=(-1, 1001), attention_range=(-1, 1001))
    with pytest.warns(UserWarning, match="leaves the unconditional half of guidance out"):
        ours, run = piping.cached("wan", policy, guidance_scale=1.0)
    assert piping.gap(ours, piping.plain("wan", guidance_scale=1.0)) < 0.05
    assert [stream.computed for stream in run.summary().streams.values()] == [(True, False) * 4]


def test_guidance_in_two_calls_that_looks_like_one_batch():
    """Two prompts are an even batch: at the second call of the first step it is clear that they are no halves."""
    policy = ck.faster_cache(uncond=2, uncond_range=(-1, 1001), attention_range=(-1, 1001), layout="BFCHW")
    stated = ck.faster_cache(
        uncond=2, uncond_range=(-1, 1001), attention_range=(-1, 1001), layout="BFCHW", cfg="separate"
    )
    made = piping.piped("kandinsky", batch=2, num_frames=9)
    type(made.pipe).do_classifier_free_guidance = property(lambda self: True)
    try:
        for each in (policy, stated):
            with ckd.cached(made.pipe, each) as run:
                images = [piping.image(made), piping.image(made)]
            assert torch.equal(*images)
            assert list(run.states) == ["transformer/call"]
            assert [len(stream.computed) for stream in run.summary().streams.values()] == [piping.STEPS] * 2
            if each is policy:
                first = images[0]
        assert torch.equal(first, images[0])
    finally:
        del type(made.pipe).do_classifier_free_guidance


def test_without_guidance_a_batch_has_no_halves():
    policy = ck.faster_cache(uncond=2, uncond_range=(-1, 1001), attention_range=(-1, 1001), layout="BFCHW")
    alone = ck.faster_cache(attention_range=(-1, 1001), cfg=None)
    how: dict[str, Any] = {"batch": 2, "guidance_scale": 1.0, "negative_prompt_embeds": None}
    with pytest.warns(UserWarning, match="leaves the unconditional half of guidance out"):
        ours = fresh("cogvideox", policy, **how)
    assert torch.equal(ours, fresh("cogvideox", alone, **how))


# Shared transformers ---------------------------------------------------------------------------------------------


def test_two_pipelines_share_a_transformer():
    first = piping.piped("flux")
    second = piping.piped("flux_image", models={"transformer": first.pipe.transformer})
    alone = piping.image(first), piping.image(second)
    policies = ck.first_block_cache(0.1), ck.step_mask([1, 0] * 4)
    with ckd.cached(first.pipe, policies[0]):
        assert torch.equal(piping.image(second), alone[1])  # one of them is not cached
        with ckd.cached(second.pipe, policies[1]):
            images = [piping.image(made) for made in (first, second, first, second)]
    for n, name in enumerate(("flux", "flux_image", "flux", "flux_image")):
        assert torch.equal(images[n], fresh(name, policies[n % 2]))
        assert not torch.equal(images[n], alone[n % 2])


def test_two_threads_share_a_transformer():
    first = piping.piped("wan")
    second = piping.piped("wan", models={"transformer": first.pipe.transformer}, guidance_scale=5.0)
    policies = ck.first_block_cache(0.1), ck.pyramid_attention_broadcast(2)
    expected = fresh("wan", policies[0]), fresh("wan", policies[1], guidance_scale=5.0)
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    start = threading.Barrier(2)

    def work(n: int, made: piping.Piped) -> None:
        start.wait()
        for _ in range(6):
            found[n].append(piping.image(made))

    with ckd.cached(first.pipe, policies[0]), ckd.cached(second.pipe, policies[1]):
        threads = [threading.Thread(target=work, args=(n, made)) for n, made in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for n in range(2):
        assert len(found[n]) == 6 and all(torch.equal(image, expected[n]) for image in found[n])


# Calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("wan", 2), ("wan_two", 4), ("flux", 1)])
def test_mag_cache_in_two_steps(name, count, tmp_path):
    made = piping.piped(name)
    plain = piping.image(made)
    with ckd.cached(made.pipe, MagCacheConfig(calibrate=True)) as run:
        assert torch.equal(piping.image(made), plain)
    assert len(run.states) == count
    for stream, state in run.states.items():
        ck.MagRatios.from_state(state).save(tmp_path / f"{stream.replace('/', '-')}.json")
    ratios = {stream: ck.MagRatios.load(tmp_path / f"{stream.replace('/', '-')}.json") for stream in run.states}
    assert len({each.ratios for each in ratios.values()}) == count  # no two alike
    policies = {stream: ck.mag_cache(each, threshold=0.2) for stream, each in ratios.items()}
    with ckd.cached(made.pipe, policies) as run:
        ours = piping.image(made)
    assert not torch.equal(ours, plain) and piping.gap(ours, plain) < 0.1
    for stream, report in run.summary().streams.items():
        steps = len(report.computed)
        assert report.computed == ck.deciders.plan(policies[stream].decider, steps)
        assert len(set(report.computed)) == 2


def test_a_stream_without_a_policy_is_not_cached():
    made = piping.piped("wan_two")
    everywhere = ck.step_mask([1, 0, 0] * 4)
    named = {"transformer_2/cond": ck.step_mask([1, 0, 1, 1]), "transformer_2": everywhere, "c": everywhere}
    with (
        ckd.cached(made.pipe, named) as run,
        pytest.warns(UserWarning, match="`policy` names 'c', and no call is that: there are transf") as said,
    ):
        piping.image(made)
        piping.image(made)
    assert len(said) == 1
    report = run.summary()
    assert {name: (stream.computed, stream.policy) for name, stream in report.streams.items()} == {
        "transformer/cond": ((True,) * 4, "not cached"),
        "transformer/uncond": ((True,) * 4, "not cached"),
        "transformer_2/cond": ((True, False, True, True), named["transformer_2/cond"].name),
        "transformer_2/uncond": ((True, False, False, True), everywhere.name),
    }
    assert report.unused == ("c",)
    assert "policies for streams that were not called: c" in str(report)


def test_the_summary_is_a_table():
    _, run = piping.cached("wan", ck.step_mask([1, 0] * 4))
    head, *rows = str(run.summary()).splitlines()
    assert head.split() == ["stream", "computed", "skipped", "seconds", "setup", "state", "pattern"]
    assert [row.split()[0] for row in rows] == ["transformer/cond", "transformer/uncond"]
    assert all("#.#.#.#." in row and " 4 " in row for row in rows)
    report = run.summary().streams["transformer/cond"]
    assert report.skipped == 4 and report.seconds > 0 and report.state_bytes > 1000


# Nothing is left -------------------------------------------------------------------------------------------------


def traces(made: piping.Piped) -> Any:
    """All that a pipeline and its transformers hold, by identity."""
    models = [model for model in made.pipe.components.values() if isinstance(model, nn.Module)]
    held = [vars(module) for model in models for module in model.modules()]
    return (
        type(made.pipe),
        {name: id(value) for name, value in vars(made.pipe).items() if not name.startswith("_")},
        set(vars(made.pipe)),
        [{name: id(value) for name, value in each.items()} for each in held],
        [{name: id(value) for name, value in each["_modules"].items()} for each in held],
        {name: id(component) for name, component in made.pipe.components.items()},
    )


@pytest.mark.parametrize("name", ["flux", "wan_two", "latte"])
@pytest.mark.parametrize("how", ["a block", "an exception", "disable"])
def test_nothing_is_left(name, how):
    made = piping.piped(name)
    plain = piping.image(made)
    before = traces(made)
    if how == "disable":
        run = ckd.enable(made.pipe, ck.step_mask([1, 0] * 4))
        assert isinstance(run, ckd.Run)
        assert not torch.equal(piping.image(made), plain)
        run.disable()
        run.disable()
    elif how == "a block":
        with ckd.cached(made.pipe, ck.step_mask([1, 0] * 4)):
            assert not torch.equal(piping.image(made), plain)
            assert made.pipe.transformer is made.pipe.components["transformer"]
            assert type(made.pipe.transformer).__call__ is nn.Module.__call__
    else:
        with pytest.raises(ZeroDivisionError), ckd.cached(made.pipe, ck.step_mask([1, 0] * 4)):
            broken(made) if name != "latte" else piping.image(made)
            raise ZeroDivisionError
    assert traces(made) == before
    assert torch.equal(piping.image(made), plain)


def test_inside_a_call_the_transformer_is_itself_but_for_being_called():
    made, seen = piping.piped("wan"), []
    real = made.pipe.transformer

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        inside = pipe.transformer
        seen.append(inside is not real and isinstance(inside, type(real)) and inside.config is real.config)
        seen.append(pipe.components["transformer"] is real and pipe.device == real.device)
        seen.append(next(inside.parameters()) is next(real.parameters()))
        pipe.transformer = pipe.transformer.to(torch.float32)
        return given

    with ckd.cached(made.pipe, ck.first_block_cache(0.1)):
        piping.image(made, callback_on_step_end=callback)
        assert made.pipe.transformer is real
    assert len(seen) == 3 * piping.STEPS and all(seen)


def test_other_threads_see_the_pipeline_as_it_is():
    made, seen = piping.piped("wan"), []
    real = made.pipe.transformer

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        thread = threading.Thread(target=lambda: seen.append(pipe.transformer is real))
        thread.start()
        thread.join()
        return given

    with ckd.cached(made.pipe, ck.first_block_cache(0.1)):
        piping.image(made, callback_on_step_end=callback)
    assert seen == [True] * piping.STEPS


def test_a_pipeline_with_a_cache_is_saved_and_turned_into_another(tmp_path):
    made = piping.piped("flux_image")
    with ckd.cached(made.pipe, ck.first_block_cache(0.1)):
        made.pipe.save_pretrained(tmp_path)
        other = diffusers.FluxPipeline.from_pipe(made.pipe)
    assert diffusers.DiffusionPipeline.load_config(tmp_path)["_class_name"] == "FluxImg2ImgPipeline"
    assert type(other) is diffusers.FluxPipeline and other.transformer is made.pipe.transformer


def test_another_transformer_is_taken_up_by_the_next_call():
    made, other = piping.piped("wan"), piping.zoo.specimen("Wan", 5).model
    with ckd.cached(made.pipe, ck.first_block_cache(0.1)):
        piping.image(made)
        made.pipe.transformer = other
        ours = piping.image(made)
    assert torch.equal(ours, fresh("wan", ck.first_block_cache(0.1), models={"transformer": other}))


# Errors ----------------------------------------------------------------------------------------------------------


def test_what_is_no_pipeline_or_no_policy_is_named():
    made = piping.piped("flux")
    with pytest.raises(
        ck.ArgumentTypeError,
        match=r"`pipe` must be a DiffusionPipeline or a ModularPipeline, got Flux.*cachekit\.cache",
    ):
        ckd.enable(made.pipe.transformer, ck.first_block_cache(0.1))
    with pytest.raises(ck.ArgumentTypeError, match=r"`policy` must be a Policy, a cache config .* got float"):
        ckd.enable(made.pipe, 0.1)
    with pytest.raises(ck.ArgumentTypeError, match="got TextKVCacheConfig"):
        ckd.enable(made.pipe, TextKVCacheConfig())
    with pytest.raises(ck.ArgumentTypeError, match=r"`policy\['cond'\]` must be .* got int"):
        ckd.enable(made.pipe, {"cond": 3})
    with pytest.raises(ck.ArgumentTypeError, match="`policy` has the key 3"):
        ckd.enable(made.pipe, {3: ck.first_block_cache(0.1)})
    with pytest.raises(ck.ArgumentError, match="empty mapping"):
        ckd.enable(made.pipe, {})
    with pytest.raises(ck.ArgumentError, match="names 'transformer_2/cond'; the transformers of FluxPipeline are"):
        ckd.enable(made.pipe, {"transformer_2/cond": ck.first_block_cache(0.1)})
    assert type(made.pipe) is diffusers.FluxPipeline


def test_a_pipeline_is_enabled_once():
    made = piping.piped("flux")
    run = ckd.enable(made.pipe, ck.first_block_cache(0.1))
    with pytest.raises(ck.ArgumentError, match=r"enabled already.*disable\(\)"):
        ckd.enable(made.pipe, ck.first_block_cache(0.1))
    run.disable()
    with ckd.cached(made.pipe, ck.first_block_cache(0.1)):
        pass


def test_a_pipeline_without_a_transformer():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(block_out_channels=(8, 8), norm_num_groups=2, sample_size=8, **blocks)
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(ck.StructureError, match="DDPMPipeline has no transformer; its models are unet"):
        ckd.enable(pipe, ck.first_block_cache(0.1))


@pytest.mark.parametrize("late", [False, True])
def test_hooks_of_diffusers_own_caches(late):
    made = piping.piped("flux", transformer=piping.new)
    if late:
        run = ckd.enable(made.pipe, ck.first_block_cache(0.1))
    apply_first_block_cache(made.pipe.transformer, FirstBlockCacheConfig())
    with pytest.raises(ck.StructureError, match=r"`transformer` has a cache of diffusers.*disable_cache\(\)"):
        run = piping.image(made) if late else ckd.enable(made.pipe, ck.first_block_cache(0.1))
    if late:
        run.disable()


# What is made of a pipeline meanwhile -----------------------------------------------------------------------------


def pickled(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize(
    "make",
    [
        copy.copy,
        copy.deepcopy,
        pickled,
        lambda pipe: type(pipe)(**pipe.components),
        lambda pipe: type(pipe).from_pipe(pipe),
    ],
    ids=["copy", "deepcopy", "pickle", "its class", "from_pipe"],
)
def test_a_copy_of_a_pipeline_is_not_cached_and_runs_its_own_transformer(make):
    made, another = piping.piped("wan"), zoo.specimen("Wan", 5).model
    plain = piping.plain("wan", models={"transformer": another})
    with ckd.cached(made.pipe, ck.first_block_cache(0.1)) as run:
        cached = piping.image(made)
        other = made._replace(pipe=make(made.pipe))
        other.pipe.transformer = another
        assert torch.equal(piping.image(other), plain)
        assert torch.equal(piping.image(made), cached)
        before = run.summary()
        with ckd.cached(other.pipe, ck.step_mask([1, 0] * 4)) as second:
            piping.image(other)
        assert run.summary() == before
        assert [sum(stream.computed) for stream in second.summary().streams.values()] == [4, 4]
    assert torch.equal(piping.image(other), plain)
    assert type(made.pipe) is type(other.pipe) is diffusers.WanPipeline


def test_a_transformer_is_copied_and_pickled_during_a_call():
    made, seen = piping.piped("wan"), []

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.extend((pickled(pipe.transformer), copy.deepcopy(pipe.transformer)))
        return given

    with ckd.cached(made.pipe, ck.first_block_cache(0.1)):
        piping.image(made, callback_on_step_end=callback, num_inference_steps=2)
    real = made.pipe.transformer
    for each in seen:
        assert type(each) is type(real)
        assert all(torch.equal(a, b) for a, b in zip(each.parameters(), real.parameters(), strict=True))


def test_a_transformer_that_is_left_alone_may_be_group_offloaded():
    made = piping.piped("wan_two", transformer=piping.new)
    many = {"offload_type": "block_level", "num_blocks_per_group": 2}
    made.pipe.transformer_2.enable_group_offload(torch.device("cpu"), **many)
    with pytest.raises(ck.StructureError, match="group-offloaded"):
        ckd.enable(made.pipe, ck.step_mask([1, 0] * 4))
    with ckd.cached(made.pipe, {"transformer": ck.step_mask([1, 0] * 4)}) as run:
        piping.image(made)
    assert run.summary().streams["transformer_2/cond"].policy == "not cached"


def test_a_scheduler_that_repeats_a_timestep_without_a_word_goes_on():
    made = piping.piped("latte_pndm")
    with ckd.cached(made.pipe, ck.step_mask([1, 0, 0] * 3)) as run:
        piping.image(made)
    times = made.pipe.scheduler.timesteps
    assert len(times) == piping.STEPS + 1 and times[1] == times[2]
    (stream,) = run.summary().streams.values()
    assert stream.computed == (True, False, False) * 3
    with ckd.cached(made.pipe, ck.mag_calibration()) as run:
        piping.image(made)
    (state,) = run.states.values()
    assert ck.MagRatios.from_state(state).steps == len(times)


def test_a_pipeline_that_is_deleted_is_gone_whatever_is_kept_of_its_run():
    made = piping.piped("flux", transformer=piping.new)
    with ckd.cached(made.pipe, ck.first_block_cache(0.1)) as run:
        piping.image(made)
    kept = ckd.enable(made.pipe, ck.first_block_cache(0.1))
    piping.image(made)
    first = weakref.ref(made.pipe.transformer)
    made.pipe.transformer = piping.new("Flux", 3)
    piping.image(made)
    gc.collect()
    assert first() is None, "a transformer that was replaced is let go"
    second = weakref.ref(made.pipe.transformer)
    del made
    gc.collect()
    assert second() is None
    assert run.summary().streams and kept.summary().streams


def test_a_cache_is_switched_off_without_its_run():
    made = piping.piped("flux")
    plain = piping.image(made)
    ckd.enable(made.pipe, ck.step_mask([1, 0] * 4))
    assert not torch.equal(piping.image(made), plain)
    for _ in range(2):
        ckd.disable(made.pipe)
        assert torch.equal(piping.image(made), plain)
