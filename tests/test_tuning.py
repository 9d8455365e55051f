"""Record, replay, plan and choose where users do it: on pipelines, from the command line, in pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from piping import NO_TEXT, STEPS, autoencoder, image, piped
from test_cli import call, read

import cachekit as ck
import cachekit.diffusers as ckd
from cachekit import ArgumentError, StateError
from cachekit.diffusers import zoo
from cachekit.drawing import png
from cachekit.planning import pictures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FLUX = ["--dtype", "float32", "--set", "height=16", "--set", "width=16"]


# Pipelines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "streams"), [("flux", ["cond"]), ("wan", ["cond", "uncond"]), ("ltx", ["cond_uncond"])]
)
def test_a_pipeline_is_recorded_and_its_plan_runs(name, streams):
    made, plain = piped(name), image(piped(name))
    with ckd.cached(made.pipe, ck.recording()) as run:
        assert torch.equal(image(made), plain)
    trace = run.trace()
    assert len(trace) == STEPS and trace.sites == ("output", "chain", "probe", "rest")
    assert list(trace.streams) == streams
    assert trace.notes["model"] == type(made.pipe).__name__
    scale = made.pipe.guidance_scale
    assert trace.weights == ({"cond": scale, "uncond": 1 - scale} if name == "wan" else {})
    plan = ck.plan(trace, computed=4)
    with ckd.cached(made.pipe, ck.planned(plan)) as run:
        changed = image(made)
    assert all(stream.computed == plan.computed for stream in run.summary().streams.values())
    assert not torch.equal(changed, plain)
    # It is a good one: as many steps in a row at the start are worse.
    front = ck.step_mask([1] * 4 + [0] * (STEPS - 4), forecaster=ck.forecasters.newton(1), sites="output")
    with ckd.cached(made.pipe, front):
        assert (changed - plain).norm() < (image(made) - plain).norm()


def test_what_a_pipeline_recorded_is_its_own():
    made = piped("flux")
    with ckd.cached(made.pipe, ck.recording("output")) as run:
        with pytest.raises(ArgumentError, match="no call yet"):
            run.trace()
        image(made)
        first = run.trace()
        image(made, seed=1)
        assert not torch.equal(run.trace().gram("output"), first.gram("output"))
        with pytest.raises(ArgumentError, match="transformer_2"):
            run.trace("transformer_2")
    with ckd.cached(made.pipe, ck.first_block_cache(0.1)) as run:
        image(made)
    with pytest.raises(StateError, match="recording"):
        run.trace()


def test_a_plan_asks_the_pipeline_for_scheduler_and_guidance():
    made = piped("flux")
    with ckd.cached(made.pipe, ck.recording("output")) as run:
        image(made, guidance_scale=3.0)
    trace = run.trace()
    assert trace.notes["guidance"] == "3.0" and "FlowMatchEuler" in trace.notes["scheduler"]
    policy = ck.planned(ck.plan(trace, computed=4))
    with ckd.cached(made.pipe, policy):
        image(made, guidance_scale=3.0)
        with pytest.raises(ArgumentError, match=r"`guidance` is 5\.0"):
            image(made, guidance_scale=5.0)
        with pytest.raises(ArgumentError, match="8 steps"):
            image(made, guidance_scale=3.0, num_inference_steps=STEPS - 1)
        made.pipe.scheduler = type("HeunScheduler", (type(made.pipe.scheduler),), {}).from_config(
            made.pipe.scheduler.config
        )
        with pytest.raises(ArgumentError, match="`scheduler` is 'HeunScheduler'"):
            image(made, guidance_scale=3.0)


def test_each_of_two_transformers_is_recorded_with_its_own():
    made = piped("wan_two")
    with ckd.cached(made.pipe, ck.recording("output")) as run:
        image(made)
        first, second = run.trace("transformer"), run.trace("transformer_2")
        ahead = float(second.timesteps[0])
    # The last step of the first goes to where the second begins, not to the end.
    assert float(first.step_sizes[-1]) == pytest.approx(float(first.timesteps[-1]) - ahead)
    assert float(second.step_sizes.sum()) == pytest.approx(ahead)
    guidance = made.pipe.guidance_scale
    assert first.weights == {"cond": guidance, "uncond": 1 - guidance} and guidance != 2.0
    assert second.weights == {"cond": 2.0, "uncond": -1.0}
    policy = ck.planned(ck.plan(second, computed=2))
    with ckd.cached(made.pipe, {"transformer_2": policy}):
        image(made)
        with pytest.raises(ArgumentError, match=r"`guidance` is 9\.0"):
            image(made, guidance_scale_2=9.0)


def test_a_scale_of_guidance_with_a_name_of_its_own_is_compared():
    made = piped("qwen")
    with ckd.cached(made.pipe, ck.recording("output")) as run:
        image(made)
    trace = run.trace()
    assert trace.notes["true_cfg_scale"] == "3.0" and trace.weights == {"cond": 3.0, "uncond": -2.0}
    with ckd.cached(made.pipe, ck.planned(ck.plan(trace, computed=4))):
        image(made)
        with pytest.raises(ArgumentError, match=r"`true_cfg_scale` is 9\.0"):
            image(made, true_cfg_scale=9.0)


def test_what_is_guided_and_what_is_not_are_told_apart():
    made, off = piped("qwen"), {"negative_prompt_embeds": None, "negative_prompt_embeds_mask": None}
    plans = {}
    for name, changed in (("guided", {}), ("plain", off)):
        with ckd.cached(made.pipe, ck.recording("output")) as run:
            image(made, **changed)
        trace = run.trace()
        plans[name] = ck.planned(ck.plan(trace, computed=4))
        assert ("true_cfg_scale" in trace.notes) == (name == "guided") == bool(trace.weights)
        assert trace.notes["streams"] == ("cond, uncond" if name == "guided" else "cond")
    with ckd.cached(made.pipe, plans["plain"]):
        image(made, true_cfg_scale=9.0, **off)  # a scale that scales nothing
        with pytest.raises(ArgumentError, match="`streams` is 'cond, uncond'"):
            image(made)
    with ckd.cached(made.pipe, plans["guided"]):
        image(made)
        with pytest.raises(ArgumentError, match="`streams` is 'cond'"):
            image(made, **off)
    # One branch is recorded, the other runs without a cache, or with one: both have been there.
    for other in (None, ck.step_mask([1, 0] * STEPS)):
        with ckd.cached(made.pipe, {"cond": ck.recording("output"), **({"uncond": other} if other else {})}) as run:
            image(made, num_inference_steps=2 * STEPS)
        trace = run.trace()
        assert list(trace.streams) == ["cond"] and trace.notes["streams"] == "cond, uncond"
        with ckd.cached(made.pipe, {"cond": ck.planned(ck.plan(trace, computed=4))}):
            image(made, num_inference_steps=2 * STEPS)


def test_guidance_that_changes_on_the_way_is_that_of_the_start():
    made = piped("flux")

    def stronger(pipe, step, timestep, values):
        pipe._guidance_scale += 1.0
        return values

    with ckd.cached(made.pipe, ck.recording("output")) as run:
        image(made, guidance_scale=3.0, callback_on_step_end=stronger)
    trace = run.trace()
    assert trace.notes["guidance"] == "3.0"
    with ckd.cached(made.pipe, ck.planned(ck.plan(trace, computed=4))):
        image(made, guidance_scale=3.0, callback_on_step_end=stronger)
        with pytest.raises(ArgumentError, match=r"`guidance` is 4\.0"):
            image(made, guidance_scale=4.0)


def test_guidance_that_ends_on_the_way_is_guidance():
    made = piped("wan")

    def stop(pipe, step, timestep, values):
        pipe._guidance_scale = 0.0 if step >= 3 else pipe._guidance_scale
        return values

    with ckd.cached(made.pipe, {"cond": ck.recording("output")}) as run:
        image(made, callback_on_step_end=stop)
    assert run.trace().notes["streams"] == "cond, uncond"
    with ckd.cached(made.pipe, {"cond": ck.planned(ck.plan(run.trace(), computed=4))}):
        image(made, callback_on_step_end=stop)
    with ckd.cached(made.pipe, ck.recording("output")) as run:
        image(made, callback_on_step_end=stop)
    with pytest.raises(StateError, match=f"'uncond' has done 4 of {STEPS}"):
        run.trace()


def test_a_call_that_changes_its_arguments_on_the_way_is_no_recording():
    made, inputs = piped("sd3"), ["latents", "prompt_embeds", "pooled_prompt_embeds"]

    def halve(pipe, step, timestep, values):
        if step == 3:
            pipe._guidance_scale = 0.0
            values |= {name: values[name][-1:] for name in inputs[1:]}
        return values

    with ckd.cached(made.pipe, ck.recording("output")) as run:
        image(made, callback_on_step_end=halve, callback_on_step_end_tensor_inputs=inputs)
    with pytest.raises(StateError, match=f"began anew after 4 of {STEPS} steps"):
        run.trace()


def test_guidance_that_only_the_call_knows_is_compared():
    import diffusers

    draw, model = zoo.Draw(7), zoo.specimen("PixArt").model
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=model, scheduler=diffusers.DDIMScheduler(), vae=autoencoder(), **NO_TEXT
    )
    pipe.set_progress_bar_config(disable=True)
    text, mask = (draw(1, zoo.TEXT, model.config.caption_channels) for _ in range(2)), torch.ones(1, zoo.TEXT)
    given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), text, strict=True))
    given |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
    given |= {"height": 64, "width": 64, "use_resolution_binning": False, "output_type": "latent"}

    def sample(scale: float) -> None:
        pipe(**given, num_inference_steps=4, guidance_scale=scale, generator=torch.Generator().manual_seed(0))

    with ckd.cached(pipe, ck.recording("output")) as run:
        sample(4.5)
    assert run.trace().notes["guidance"] == "4.5"
    with ckd.cached(pipe, ck.planned(ck.plan(run.trace(), computed=2))):
        sample(4.5)
        with pytest.raises(ArgumentError, match=r"`guidance` is 1\.0"):
            sample(1.0)


def test_a_call_can_be_asked_for_its_trace_before_it_ends():
    made, asked = piped("flux"), []

    def ask(pipe, step, timestep, values):
        if step == STEPS - 1:
            asked.append(run.trace())
        else:
            with pytest.raises(StateError, match=f"{step + 1} of {STEPS} steps"):
                run.trace()
        return values

    with ckd.cached(made.pipe, ck.recording("output")) as run:
        image(made, callback_on_step_end=ask)
    (early,) = asked
    assert torch.equal(early.gram("output"), run.trace().gram("output")) and early.notes == run.trace().notes
    assert torch.equal(early.step_sizes, run.trace().step_sizes)


# The command line ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `record` wrote of the digits."""
    path = tmp_path_factory.mktemp("trace") / "digits.trace.safetensors"
    said = call("record", "digits", "--prompt", "3", "--steps", "10", "--out", str(path))
    assert "10 steps, streams: cond, uncond; sites: output, chain, probe, rest" in said
    return path


def test_record_writes_a_small_file(recorded):
    trace = ck.Trace.load(recorded)
    assert len(trace) == 10 and trace.notes["guidance"] == "2.0"
    assert recorded.stat().st_size < 30_000


def test_record_says_what_it_wrote(tmp_path):
    options = ["--prompt", "1", "--steps", "4", "--out", str(tmp_path / "t"), "--site", "output", "--sketch", "31"]
    said = read("record", "digits", *options, "--picture", str(tmp_path / "gram.png"))
    assert said["steps"] == 4 and said["sites"] == ["output"] and said["bytes"] == (tmp_path / "t").stat().st_size
    assert (tmp_path / "gram.png").read_bytes().startswith(b"\x89PNG")


def test_replay_is_what_the_library_says(recorded, tmp_path):
    given = ["--method", "first_block_cache", "--at", "0.2", "--at", "0.4"]
    said = read("replay", str(recorded), *given, "--picture", str(tmp_path / "front.png"))
    trace = ck.Trace.load(recorded)
    for row, setting in zip(said["rows"], (0.2, 0.4), strict=True):
        wanted = ck.replay(trace, ck.first_block_cache(setting))
        assert row["setting"] == setting and row["error"] == wanted.error
        assert {name: tuple(nodes) for name, nodes in row["computed"].items()} == wanted.computed
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    table = call("replay", str(recorded))
    assert all(name in table for name in ("first_block_cache", "mag_cache", "taylorseer"))
    never = read("replay", str(recorded), "--method", "first_block_cache", "--at", "1e-9")
    assert "leaves out no step" in never["warnings"][0]


def test_replay_leaves_out_what_was_not_recorded(tmp_path):
    out = str(tmp_path / "t")
    call("record", "digits", "--prompt", "1", "--steps", "6", "--out", out, "--site", "output")
    said = read("replay", out, "--picture", str(tmp_path / "front.png"))
    assert not said["rows"] and len(said["warnings"]) == 3
    assert all("is left out" in each and "recording(sites=" in each for each in said["warnings"])
    assert "not in the trace" in call("replay", out, "--method", "first_block_cache", code=1)


def test_plan_is_what_the_library_says(recorded, tmp_path):
    out, picture = tmp_path / "plan.json", tmp_path / "errors.png"
    said = read("plan", str(recorded), "--computed", "4", "--out", str(out), "--picture", str(picture))
    wanted = ck.plan(ck.Trace.load(recorded), computed=4)
    assert ck.Plan.load(out) == wanted and said["computed"] == list(wanted.steps) and said["error"] == wanted.error
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert call("plan", str(recorded), "--computed", "4").strip() == str(wanted)
    held = read("plan", str(recorded), "--speedup", "2", "--costs", "1,0.2", "--forecaster", "hold", "--site", "chain")
    assert held["forecaster"] == "hold" and held["site"] == "chain" and len(held["computed"]) == 3
    assert len(read("plan", str(recorded), "--error", "0")["computed"]) == 10


def test_choose_runs_until_it_is_enough(recorded, tmp_path):
    out = tmp_path / "plan.json"
    said = read("choose", str(recorded), "digits", "--prompt", "5", "--at-least", "30 dB", "--out", str(out))
    assert max(each["psnr"] for each in said["measured"] if each["computed"] == len(said["computed"])) >= 30
    assert ck.Plan.load(out).steps == tuple(said["computed"])


def test_choose_takes_the_best_of_so_many_steps(recorded):
    said = read("choose", str(recorded), "digits", "--prompt", "5", "--computed", "4")
    assert len(said["computed"]) == 4 and {each["computed"] for each in said["measured"]} == {4}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["record", "digits", "--prompt", "cat", "--out", "t"], "no digits"),
        (["record", "digits", "--prompt", "12", "--out", "t"], "no digits"),
        (["record", "digits", "--site", "attention", "--out", "t"], "sites"),
        (["record", "./nowhere", "--out", "t"], "nowhere"),
        (["record", "digits", "--out", "t", "--set", "height=8"], "digits takes none"),
        (["record", "digits", "--out", "t", "--dtype", "bfloat16"], "digits takes none"),
        (["choose", "TRACE", "digits", "--at-least", "30", "--set", "guidance_scale=3"], "digits takes none"),
        (["replay", "TRACE", "--method", "nothing"], "nothing"),
        (["replay", "TRACE", "--at", "0.1"], "--method"),
        (["plan", "TRACE"], "Give one of"),
        (["plan", "TRACE", "--computed", "11"], "computed"),
        (["plan", "TRACE", "--speedup", "2", "--costs", "cheap"], "no pair"),
        (["plan", "TRACE", "--computed", "4", "--forecaster", "spline"], "spline"),
        (["choose", "TRACE", "digits"], "Give one of"),
        (["replay", "TRACE", "--method", "taylorseer", "--at", "2.5"], "whole"),
        (["choose", "TRACE", "digits", "--at-least", "good"], "at_least"),
        (["choose", "TRACE", "digits", "--at-least", "-45 dB"], "at_least"),
        (["choose", "TRACE", "digits", "--at-least", "0"], "at_least"),
        (["plan", "TRACE", "--speedup", "0.5"], "speedup"),
        (["plan", "TRACE", "--speedup", "nan"], "speedup"),
        (["plan", "TRACE", "--speedup", "1000", "--costs", "1,0.5"], "out of reach"),
    ],
)
def test_what_cannot_be_is_refused(words, named, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [str(recorded) if word == "TRACE" else word for word in words]
    refused = ("sites", "Give one of", "computed", "at_least", "speedup", "out of reach")
    code = 1 if named in refused else 2
    assert named in call(*words, code=code)


def test_a_broken_trace_is_refused(tmp_path):
    (tmp_path / "broken").write_bytes(b"nothing")
    for words in (["replay"], ["plan", "--computed", "4"], ["choose", "--computed", "4"]):
        name, *more = words
        given = [str(tmp_path / "broken"), *(["digits"] if name == "choose" else []), *more]
        assert "holds no trace" in call(name, *given, code=1)


def test_a_pipeline_from_a_folder(tmp_path):
    """A pipeline that can be saved whole, and is called without a prompt: its embeddings are its own."""
    from diffusers import DDIMScheduler, DiTPipeline

    dit = pytest.importorskip("diffusers").DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=2,
    )
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = pytest.importorskip("diffusers").AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(4,),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
    )
    DiTPipeline(dit, vae, DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    out = tmp_path / "t"
    given = ["--steps", "6", "--set", "class_labels=[1]", "--dtype", "float32", "--out", str(out)]
    said = read("record", str(tmp_path / "pipe"), *given)
    assert said["steps"] == 6 and said["notes"]["scheduler"] == "DDIMScheduler"
    chosen = read("choose", str(out), str(tmp_path / "pipe"), *given[2:6], "--at-least", "10")
    assert chosen["measured"]


# Pictures -----------------------------------------------------------------------------------------------------------


def test_pictures_show_what_they_are_given(recorded):
    trace = ck.Trace.load(recorded)
    heat = pictures.similarity(trace)
    shown = heat.axes[0].get_images()[0].get_array()
    assert shown.shape == (10, 10) and shown.max() == pytest.approx(1.0)
    plans = ck.frontier(trace)
    replays = {"first_block_cache": [ck.replay(trace, ck.first_block_cache(at)) for at in (0.2, 0.3)]}
    drawn = pictures.front(plans, replays)
    line, points = drawn.axes[0].get_lines()
    assert list(line.get_ydata()) == [plan.error for plan in plans if plan.error]
    assert sorted(points.get_xdata()) == sorted(each.computed_steps for each in replays["first_block_cache"])
    errors = pictures.errors(trace, {"planned": ck.planned(plans[3])})
    values = list(errors.axes[0].get_lines()[0].get_ydata())
    assert [step for step, value in enumerate(values) if value != value] == list(plans[3].steps)
    assert png(errors).startswith(b"\x89PNG")
    assert json.dumps({"plan": plans[3].steps})
