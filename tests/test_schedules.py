"""Where a pipeline is is told by its calls and its scheduler, on any scale, and however often it goes through."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import cachekit as ck
import cachekit.diffusers as ckd
from cachekit.coverage import schedulers as samplers
from cachekit.coverage.schedulers import STEPS, WIDTH, Tiny
from cachekit.diffusers import schedules, zoo

# Of diffusers' own, where a scheduler makes its timesteps.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MASK = (1, 0, 0, 1, 0, 1, 0, 0)


class Loop(samplers.Loop):
    """One that gives timesteps on any scale, is guided, goes through them again, or leaves some out."""

    def __init__(self, transformer: nn.Module, **schedulers: Any) -> None:
        super().__init__(transformer, **schedulers)
        self.given: Callable[[Tensor], Tensor] = lambda t: t
        self.guided, self.last, self.rounds = False, None, 1

    def __call__(self, counts: Sequence[int] = (STEPS,)) -> Tensor:
        """Stages, each of so many steps and twice as many tokens as the one before."""
        scheduler = getattr(self, self.name)
        self.calls = []
        x = torch.randn(1, 2, WIDTH, generator=torch.Generator().manual_seed(0))
        for stage, count in enumerate(counts):
            x = torch.cat([x, x], 1) if stage else x
            scheduler.set_timesteps(count)
            for _ in range(self.rounds):
                for t in scheduler.timesteps[: self.last]:
                    x = self.step(scheduler, scheduler.scale_model_input(x, t) if self.scales(scheduler) else x, t, x)
        return x

    def scales(self, scheduler: Any) -> bool:
        return hasattr(scheduler, "scale_model_input")

    def step(self, scheduler: Any, given: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """One step of the sampler."""
        out = self.ask(given, t)
        if self.guided:
            out = out + 0.5 * (out - self.ask(given, t, -1.0))
        return scheduler.step(0.1 * out, t, x, return_dict=False)[0]

    def ask(self, x: Tensor, t: Tensor, text: float = 1.0) -> Tensor:
        self.calls.append(float(t))
        words = torch.full((1, 1, WIDTH), text)
        return self.transformer(x, timestep=self.given(t).expand(1), encoder_hidden_states=words)


def euler(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def loop(scheduler: Any = None, **how: Any) -> Loop:
    """A pipeline."""
    made = Loop(Tiny().eval(), scheduler=euler() if scheduler is None else scheduler)
    for name, value in how.items():
        setattr(made, name, value)
    return made


def under(pipe: Loop, policy: Any, *given: Any) -> tuple[Tensor, ckd.Run]:
    """What a call returns, and its run."""
    with torch.no_grad(), ckd.cached(pipe, policy) as run:
        return pipe(*given), run


def patterns(run: ckd.Run) -> list[tuple[bool, ...]]:
    return [stream.computed for stream in run.summary().streams.values()]


@torch.no_grad()
@pytest.mark.parametrize("counts", [(4, 8, 8), (8, 4, 4), (8, 8), (1, 1, 1), (5,)])
@pytest.mark.parametrize("scheduler", [euler, diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler])
def test_stages_of_other_lengths_are_trajectories_of_one_stream(scheduler, counts):
    pipe = loop(scheduler())
    plain = pipe(counts)
    same, run = under(pipe, ck.first_block_cache(0.0), counts)
    assert torch.equal(same, plain)
    assert [len(computed) for computed in patterns(run)] == [sum(counts)]
    _, run = under(pipe, ck.taylorseer(2, warmup=1, sites="chain"), counts)
    wanted = [ck.cache(pipe.transformer, ck.taylorseer(2, warmup=1, sites="chain")).plan(n).computed for n in counts]
    assert patterns(run) == [sum(wanted, ())]


def test_a_recording_is_of_one_trajectory_and_says_so():
    _, run = under(loop(), ck.recording(), (4, 4))
    with pytest.raises(ck.StateError, match="went through its schedule 2 times in one call"):
        run.trace()


@pytest.mark.parametrize("again", [2, 3])
@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.DDPMScheduler])
def test_a_schedule_that_is_gone_through_again_is_another_trajectory(scheduler, again):
    pipe = loop(scheduler(), rounds=again)
    _, run = under(pipe, ck.step_mask(MASK))
    assert patterns(run) == [tuple(map(bool, MASK)) * again]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "given",
    [lambda t: t, lambda t: t / 1000, lambda t: 1000 - t, lambda t: (1000 - t) / 1000, lambda t: t.bfloat16()],
    ids=["as it is", "to 1", "mirrored", "mirrored to 1", "rounded"],
)
@pytest.mark.parametrize(
    "scheduler", [euler, diffusers.DDIMScheduler, diffusers.PNDMScheduler, diffusers.HeunDiscreteScheduler]
)
def test_the_steps_are_the_calls_however_a_timestep_is_given(scheduler, given, guided):
    pipe = loop(scheduler(), given=given, guided=guided)
    with torch.no_grad():
        pipe()
    calls = len(pipe.calls) // (1 + guided)
    mask = ([1] + [0, 1] * calls)[:calls]
    _, run = under(pipe, ck.step_mask(mask))
    assert patterns(run) == [tuple(map(bool, mask))] * (1 + guided)
    assert {len(state.timesteps) for state in run.states.values()} == {calls}


class Elsewhere(Loop):
    """Its schedulers have other names."""

    def __init__(self, transformer: nn.Module, one_scheduler: Any, other_scheduler: Any) -> None:
        super().__init__(transformer, one_scheduler=one_scheduler, other_scheduler=other_scheduler)


def test_a_scheduler_of_another_name():
    pipe = Elsewhere(Tiny().eval(), euler(), diffusers.DDIMScheduler())
    _, run = under(pipe, ck.step_mask(MASK))
    assert patterns(run) == [tuple(map(bool, MASK))]
    _, run = under(pipe, ck.recording())
    assert len(run.trace()) == STEPS


@pytest.mark.parametrize("tells", [True, False])
def test_one_timestep_more_than_calls(tells):
    pipe = loop(last=-1)
    if tells:
        pipe.num_timesteps = STEPS - 1
    else:
        with pytest.warns(UserWarning, match=r"has called its transformer 7 times, and its .*Euler.* has 8 timesteps"):
            under(pipe, ck.recording())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = ckd.enable(pipe, ck.recording())
        with torch.no_grad():
            if not tells:
                with pytest.warns(UserWarning, match="called its transformer 7 times"):
                    pipe()
            pipe()
    assert len(run.trace()) == STEPS - 1


def test_the_last_timestep_of_some_schedulers_is_never_called():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=4,
        patch_size=1,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    ).eval()
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipe = diffusers.SanaSprintPipeline(transformer=model, scheduler=diffusers.SCMScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": torch.randn(1, 6, 12), "prompt_attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    given |= {"height": 128, "width": 128, "output_type": "latent", "use_resolution_binning": False}
    with torch.no_grad(), ckd.cached(pipe, ck.mag_calibration()) as run:
        pipe(num_inference_steps=2, **given)
    (state,) = run.states.values()
    assert ck.MagRatios.from_state(state).steps == 2


@pytest.mark.filterwarnings("ignore:`LoraLoaderMixin` is deprecated:FutureWarning")
def test_a_first_timestep_that_reads_like_the_last_is_the_first():
    pipe = diffusers.PRXPipeline(
        transformer=zoo.specimen("PRX").model, scheduler=euler(), text_encoder=None, tokenizer=None, vae=None
    )
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": torch.randn(1, 6, 24), "prompt_attention_mask": torch.ones(1, 6, dtype=torch.bool)}
    given |= {"height": 64, "width": 64, "output_type": "latent", "use_resolution_binning": False}
    given |= {"guidance_scale": 1.0, "latents": torch.randn(1, 4, 8, 8)}
    with torch.no_grad(), ckd.cached(pipe, ck.step_mask(MASK)) as run:
        pipe(num_inference_steps=STEPS, **given)
    assert patterns(run) == [tuple(map(bool, MASK))]


@pytest.mark.parametrize("ar_step", [0, 2])
def test_frames_at_timesteps_of_their_own(ar_step):
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    model = zoo.specimen("SkyReelsV2").model
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(transformer=model, scheduler=scheduler, **parts)
    pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 8
    pipe.set_progress_bar_config(disable=True)
    words = torch.randn(1, 6, 24)
    given = {
        "prompt": None,
        "prompt_embeds": words,
        "negative_prompt_embeds": words,
        "guidance_scale": 1.0,
        "height": 64,
        "width": 64,
    }
    given |= {"num_frames": 13, "base_num_frames": 13, "ar_step": ar_step, "output_type": "latent"}
    given |= {"causal_block_size": 1} if ar_step else {}
    with torch.no_grad(), ckd.cached(pipe, ck.recording()) as run:
        pipe(num_inference_steps=STEPS, **given)
    (stream,) = run.summary().streams.values()
    assert len(stream.computed) >= STEPS and len(run.trace()) == len(stream.computed)
    with torch.no_grad(), ckd.cached(pipe, ck.taylorseer(3, warmup=1)) as run:
        pipe(num_inference_steps=STEPS, **given)
    assert patterns(run)[0].count(False) > 0


def test_a_scheduler_is_itself_while_a_pipeline_is_called():
    pipe, seen = loop(), []
    real = pipe.scheduler

    class Watching(Tiny):
        def forward(self, hidden_states, timestep, encoder_hidden_states):
            """Looks at the scheduler meanwhile."""
            if not isinstance(hidden_states, FakeTensor):
                seen.append((type(pipe.scheduler), copy.deepcopy(pipe.scheduler), pipe.scheduler.timesteps))
            return super().forward(hidden_states, timestep, encoder_hidden_states)

    pipe.transformer = Watching().eval()
    under(pipe, ck.step_mask([1] * STEPS))
    assert pipe.scheduler is real and len(seen) == STEPS
    for kind, twin, times in seen:
        assert issubclass(kind, type(real)) and kind.__name__ == type(real).__name__
        assert type(twin) is type(real) and torch.equal(twin.timesteps, times)


# Ranges ------------------------------------------------------------------------------------------------------


def made(name: str) -> Any:
    """A scheduler of diffusers with its timesteps set, or None where it needs more than their number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scheduler = getattr(diffusers, name)()
            scheduler.set_timesteps(STEPS)
            return scheduler if len(scheduler.timesteps) > 1 else None
        except (TypeError, ValueError, KeyError, AttributeError, ImportError, NotImplementedError):
            return None


def noise_of(scheduler: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The timesteps of a scheduler, and the noise there."""
    schedule = schedules.Schedule(loop(scheduler), "scheduler")
    place = schedule.look(scheduler.timesteps[0])
    return tuple(map(float, scheduler.timesteps)), schedule.noise(place, len(scheduler.timesteps))


def test_the_noise_falls_from_1000_under_every_scheduler():
    tried = 0
    for name in samplers.names():
        scheduler = made(name)
        if scheduler is None:
            continue
        tried += 1
        times, noise = noise_of(scheduler)
        assert 0 < len(noise) <= len(times), name
        assert all(0 <= level <= 1000 for level in noise), (name, noise)
        assert all(after <= before for before, after in itertools.pairwise(noise)), (name, noise)
        assert noise[0] > 700 > noise[-1], (name, noise)
        if 500 < times[0] <= 1000 and sorted(times, reverse=True) == [*times]:
            assert noise == times[: len(noise)], name
    assert tried > 25


def test_what_noise_is():
    """Shares by hand: of flows 1000 sigma; of others the share of sigma beside the data, of which the size is 0.5."""
    inverted = euler(invert_sigmas=True)
    inverted.set_timesteps(4)
    assert noise_of(inverted)[1] == pytest.approx([1000 * float(1 - sigma) for sigma in inverted.sigmas[:4]])
    edm = diffusers.EDMEulerScheduler()
    edm.set_timesteps(4)
    assert noise_of(edm)[1] == pytest.approx([1000 * float(sigma / (sigma + 0.5)) for sigma in edm.sigmas[:4]])
    angles = diffusers.SCMScheduler()
    angles.set_timesteps(4, intermediate_timesteps=None)
    assert noise_of(angles)[1] == pytest.approx([1000, 750, 500, 250])


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "SCMScheduler", "IPNDMScheduler"])
def test_ranges_hold_on_other_scales(name):
    pipe = loop(made(name))
    middle = ck.Policy("the middle", ck.deciders.within(100, 800, ck.deciders.mask([0] * 20)), ck.forecasters.hold())
    _, run = under(pipe, middle, (12,))
    (stream,) = run.summary().streams.values()
    (state,) = run.states.values()
    noise = state.timesteps.tolist()
    assert list(stream.computed) == [not 100 < level < 800 or at == 0 for at, level in enumerate(noise)]
    assert 0 < stream.skipped < len(stream.computed)


@pytest.mark.parametrize("times", [torch.linspace(1, 0.1, 6), torch.linspace(1.57, 0, 6), torch.linspace(1, -1.5, 6)])
def test_a_range_on_another_scale_than_the_timesteps_is_refused(times):
    model = Tiny().eval()
    given = (torch.zeros(1, 2, WIDTH), torch.zeros(1), torch.zeros(1, 1, WIDTH))
    for policy in (
        ck.Policy("range", ck.deciders.within(100, 800, ck.deciders.mask([0] * 6)), ck.forecasters.hold()),
        ck.Policy("range", ck.deciders.within(-1, 681, ck.deciders.mask([0] * 6)), ck.forecasters.hold()),
    ):
        step = ck.cache(model, policy)
        with pytest.raises(ck.ArgumentError, match=r"is one of 0\.\.1000, where 1000 is noise"):
            step.init(times, *given)
        step.init(1000 * times.clamp(0, 1), *given)
    own = ck.Policy("range", ck.deciders.within(0.2, 0.9, ck.deciders.mask([0] * 6)), ck.forecasters.hold())
    assert False in (ck.cache(model, own).plan(times) or ck.Plan((True,))).computed


# Every scheduler ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "schedulers.md"


@pytest.mark.parametrize("name", samplers.names())
def test_every_scheduler_is_on_the_page_and_goes_well(name):
    page = PAGE.read_text(encoding="utf-8")
    for row in map(samplers.cover, itertools.repeat(name), samplers.variants(name)):
        assert not row.flaw, row
        shown = f"- {name}" if row.reason else samplers.line(row)
        assert f"\n{shown}" in page, shown


def test_the_page_is_of_the_schedulers_of_today():
    page = PAGE.read_text(encoding="utf-8")
    pinned = re.search(r"^diffusers==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and f"diffusers {pinned[1]}, " in page  # an older Python has an older one
    if diffusers.__version__ == pinned[1]:
        for name in samplers.OTHERS:  # by the name of one that is gone nobody is excused
            assert name in samplers.names(), name


def test_a_wrong_number_of_steps_is_a_flaw(monkeypatch):
    monkeypatch.setattr(schedules.Schedule, "ahead", lambda self, place, component: (900.0, 500.0, 100.0))
    assert samplers.cover("DDIMScheduler", {}).flaw.endswith("steps were believed, 8 were made")


def test_a_last_call_that_counts_for_nothing_is_found():
    """What the last call returns, ten times as much of it, is in the sample of DDIM, and not in that of PNDM."""
    ddim, pndm = (samplers.cover(name, {}) for name in ("DDIMScheduler", "PNDMScheduler"))
    assert (ddim.thrown_away, pndm.thrown_away) == (False, True)
