"""What the demo runs: the settings, one sampling run of each, and the scores of the samples."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import cachekit as ck
from cachekit.demo.data import recognised
from cachekit.demo.metrics import psnr, ssim
from cachekit.demo.sample import GUIDANCE, Stream, sample, timesteps
from cachekit.diffusers import digits

UNCACHED = "uncached"
FEWER = "fewer steps"
PLANNED = "planned"
CHOSEN = "chosen"
STREAMS: tuple[Stream, ...] = ("cond", "uncond")
PACE = 1.25
"""A run whose computed forwards take this many times the usual, or as many times less, was not alone or was lucky."""


class Setting(NamedTuple):
    """One line of the table: how to sample."""

    group: str  # the method
    detail: str  # its parameters, for people
    steps: int  # Euler steps
    policy: ck.Policy | None = None  # None runs the model as it is
    forecast: bool = False  # whether reused residuals are extrapolated, not repeated

    @property
    def label(self) -> str:
        """Method and parameters."""
        return f"{self.group} {self.detail}"

    @property
    def partial(self) -> bool:
        """Whether a step that is not computed still runs what is neither attention nor feed-forward network."""
        return self.policy is not None and self.policy.sites not in ("chain", "output")


class Trial(NamedTuple):
    """One sampling run."""

    setting: Setting
    samples: Tensor  # [B, 1, 1, 16, 16]
    computed: dict[str, tuple[bool, ...]]  # stream -> one a step
    seconds: float  # of the sampling loop alone
    pace: float  # mean seconds of a computed forward


class Row(NamedTuple):
    """The scores of a trial; its fields are those of results.json, where an infinite PSNR is null."""

    group: str
    detail: str
    policy: str  # as cachekit names it, "" without a cache
    forecast: bool
    partial: bool  # whether the steps that are not computed still run a part of the model's blocks
    steps: int  # Euler steps
    computed: dict[str, tuple[bool, ...]]  # stream -> one a step
    computed_steps: float  # mean of the streams
    seconds: float
    pace: float  # mean seconds of a computed forward, which is the same work in every row
    busy: bool  # whether the machine did something else meanwhile, so that the seconds mean little
    speedup: float | None  # against the uncached run; unknown where the machine was busy during either
    psnr: float  # dB against the uncached samples, mean of the images; infinite where they are identical
    worst: float  # PSNR of the image that is furthest off
    ssim: float
    recognised: float  # share of the digits

    @property
    def label(self) -> str:
        """Method and parameters."""
        return f"{self.group} {self.detail}"

    @property
    def cached(self) -> bool:
        """Whether a cache was at work."""
        return self.group not in (UNCACHED, FEWER)


def counts_of(steps: int, short: bool = False) -> list[int]:
    """Numbers of computed steps that are planned for."""
    shares = (0.4, 0.2) if short else (0.5, 0.38, 0.26, 0.2)
    return list(dict.fromkeys(round(share * steps) for share in shares))


def settings(steps: int, trace: ck.Trace, chosen: Mapping[int, ck.Plan], short: bool = False) -> list[Setting]:
    """All settings of a run of `steps` steps, in the order of the table; a few of them for a `short` one.

    The ratios of MagCache and the plans are from the trace of another run, `chosen` by number of computed steps.

    The parameters are chosen for the shipped weights at 50 steps: about 3/5, 2/5 and 1/4 of the steps compute.
    """
    newton, taylor = ck.forecasters.newton(1), ck.forecasters.taylor(1)
    ratios, plans = trace.mag_ratios(), ck.frontier(trace)
    # Up to 7/10, so that also the careful settings have a run to be held against.
    shares = (0.7, 0.4, 0.2) if short else (0.7, 0.5, 0.4, 0.3, 0.2)
    thresholds = (0.12,) if short else (0.12, 0.16)
    first = [(threshold, None) for threshold in thresholds] + [(threshold, newton) for threshold in thresholds[-1:]]
    budgets = ((0.06, 2, None), (0.06, 2, taylor))
    if not short:
        budgets = ((0.06, 2, None), (0.12, 4, None), (0.06, 2, taylor))
    intervals = (3,) if short else (3, 5)
    broadcasts = ((2, None),) if short else ((2, 4),)
    # No paper has these: parts of two methods, put together.
    probe = ck.first_block_cache(0.16, forecaster=newton)
    budget = ck.mag_cache(ratios, threshold=0.06, max_skips=2, retention=0, forecaster=newton)
    combinations = (
        ("drift 0.16 + newton 1, attention+mlp", dataclasses.replace(probe, sites="attention+mlp")),
        ("budget 0.06 + newton 1, output", dataclasses.replace(budget, sites="output")),
    )
    return [
        Setting(UNCACHED, f"{steps} steps", steps),
        *(Setting(FEWER, f"{round(share * steps)}", round(share * steps)) for share in shares),
        *(
            Setting(
                "first_block_cache",
                _detail(f"{threshold:g}", forecaster),
                steps,
                ck.first_block_cache(threshold, forecaster=forecaster),
                forecaster is not None,
            )
            for threshold, forecaster in first
        ),
        *(
            Setting(
                "mag_cache",
                _detail(f"{threshold:g} (≤ {skips} skips)", forecaster),
                steps,
                # No retention: to compute all of the start costs more here than it gains.
                ck.mag_cache(ratios, threshold=threshold, max_skips=skips, retention=0, forecaster=forecaster),
                forecaster is not None,
            )
            for threshold, skips, forecaster in budgets
        ),
        *(
            Setting(
                "step_mask",
                _detail(f"every {interval}", forecaster),
                steps,
                ck.step_mask([step % interval == 0 for step in range(steps)], forecaster=forecaster),
                forecaster is not None,
            )
            for interval, forecaster in ((intervals[-1], None), *((interval, taylor) for interval in intervals))
        ),
        *(
            Setting(
                "step_mask",
                _detail(f"every {interval}", taylor) + ", output",
                steps,
                ck.step_mask([step % interval == 0 for step in range(steps)], forecaster=taylor, sites="output"),
                True,
            )
            for interval in intervals[-1:]
        ),
        *(
            Setting("taylorseer", f"every {interval} + taylor 1", steps, ck.taylorseer(interval, warmup=2), True)
            for interval in intervals[-2:]
        ),
        *(
            Setting(
                "pyramid_attention_broadcast",
                f"{spatial}" + (f" (cross {cross})" if cross else ""),
                steps,
                ck.pyramid_attention_broadcast(spatial, cross=cross),
            )
            for spatial, cross in broadcasts
        ),
        Setting("faster_cache", "2 (uncond 5)", steps, ck.faster_cache(cfg="separate", layout="BCFHW"), True),
        *(Setting("combination", detail, steps, policy, True) for detail, policy in combinations),
        *(
            Setting(group, f"{count} + {plan.forecaster}, {plan.site}", steps, ck.planned(plan), True)
            for group, made in ((PLANNED, {n: plans[n - 1] for n in counts_of(steps, short)}), (CHOSEN, chosen))
            for count, plan in made.items()
        ),
    ]


def _detail(parameters: str, forecaster: ck.forecasters.Forecaster | None) -> str:
    return f"{parameters} + {forecaster.name}" if forecaster else parameters


class Sampler:
    """The velocity under a setting: the model itself, or one cached step with a state for each stream."""

    def __init__(
        self, model: nn.Module, setting: Setting, labels: Tensor, tick: Callable[[], object], compiled: bool = False
    ) -> None:
        self.model = torch.compile(model, fullgraph=True) if compiled and setting.policy is None else model
        self.tick = tick
        self.clock: dict[Stream, list[float]] = {stream: [] for stream in STREAMS}  # seconds of every forward
        self.step: ck.CachedStep | None = None
        self.guided = False
        self.states: dict[Stream, ck.State] = {}
        if setting.policy is not None:
            self.step = ck.cache(model, setting.policy)
            if compiled:
                self.step = self.step.compile()
            noise = torch.zeros(len(labels), 1, 1, digits.SIZE, digits.SIZE)
            times = timesteps(setting.steps)[:-1]
            with torch.no_grad():
                state = self.step.init(1000 * times, **digits.inputs(noise, times[0], labels))
            self.guided = self.step.policy.guidance is not None
            self.states = {stream: self.step.init_like(state) for stream in (STREAMS[:1] if self.guided else STREAMS)}

    def restart(self) -> None:
        """Forget the trajectory."""
        self.clock = {stream: [] for stream in STREAMS}
        if self.step is not None:
            self.states = {stream: self.step.init_like(state) for stream, state in self.states.items()}

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, stream: Stream) -> Tensor:
        """The velocity of one stream; see `cachekit.demo.sample.Velocity`."""
        if stream == STREAMS[-1]:
            self.tick()
        start = time.perf_counter()
        arguments = digits.inputs(x, t, labels)
        if self.step is None:
            out = self.model(**arguments)
        elif self.guided and stream == STREAMS[1]:
            # One state for both calls: the unconditional one is answered from the other.
            out, self.states[STREAMS[0]] = self.step.uncond(self.states[STREAMS[0]], **arguments)
        else:
            out, self.states[stream] = self.step(self.states[stream], **arguments)
        self.clock[stream].append(time.perf_counter() - start)
        return out[0]


def run(
    model: nn.Module,
    setting: Setting,
    labels: Tensor,
    seed: int,
    tick: Callable[[], object] = lambda: None,
    compiled: bool = False,
) -> Trial:
    """Sample under a setting, timed; `tick` is called at every Euler step.

    A compiled run samples twice and times the second: the first one compiles.
    """
    sampler = Sampler(model, setting, labels, tick, compiled)
    if compiled:
        sample(sampler, labels, setting.steps, GUIDANCE, seed)
        sampler.restart()
    start = time.perf_counter()
    samples = sample(sampler, labels, setting.steps, GUIDANCE, seed)
    seconds = time.perf_counter() - start
    computed: dict[str, tuple[bool, ...]] = dict.fromkeys(STREAMS, (True,) * setting.steps)
    computed.update({stream: ck.summary(state).computed for stream, state in sampler.states.items()})
    if sampler.guided and sampler.step is not None:
        plan = sampler.step.plan(1000 * timesteps(setting.steps)[:-1])
        assert plan is not None
        computed = {STREAMS[0]: plan.kinds["spatial"], STREAMS[1]: plan.kinds["guidance"]}
    paces = [
        spent for stream in STREAMS for spent, run in zip(sampler.clock[stream], computed[stream], strict=True) if run
    ]
    return Trial(setting, samples, computed, seconds, sum(paces) / len(paces))


def recorded_labels() -> Tensor:
    """[20]: two digits of each class, those of a recording."""
    return torch.arange(digits.CLASSES).repeat(2)


def record(model: nn.Module, steps: int, seed: int, tick: Callable[[], object] = lambda: None) -> ck.Trace:
    """What both streams of one uncached run over `steps` Euler steps have computed, of two digits of each class."""
    labels = recorded_labels()
    sampler = Sampler(model, Setting("recording", "", steps, ck.recording()), labels, tick)
    sample(sampler, labels, steps, GUIDANCE, seed)
    notes = {"model": "cachekit digits", "scheduler": f"flow matching Euler, {steps} steps", "guidance": GUIDANCE}
    return ck.Trace.from_state({**sampler.states}, notes=notes)


def choose(
    model: nn.Module,
    trace: ck.Trace,
    counts: Iterable[int],
    seed: int,
    refine: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> dict[int, ck.Plan]:
    """For every number of computed steps the plan that keeps most of the digits of a recording, in its noise."""
    labels, steps = recorded_labels(), len(trace)
    uncached = run(model, Setting(UNCACHED, "", steps), labels, seed, tick).samples

    def sample(policy: ck.Policy | None) -> Tensor:
        return (
            uncached if policy is None else run(model, Setting(CHOSEN, "", steps, policy), labels, seed, tick).samples
        )

    return {count: ck.choose(trace, sample, computed=count, refine=refine, peak=2.0).plan for count in counts}


def score(trials: Sequence[Trial], labels: Tensor) -> list[Row]:
    """The rows of the table. The first trial is the uncached one, which the others are held against."""
    reference, rows = trials[0], []
    usual = statistics.median(trial.pace for trial in trials)
    busy = [not usual / PACE < trial.pace < usual * PACE for trial in trials]
    for trial, disturbed in zip(trials, busy, strict=True):
        distances = psnr(trial.samples, reference.samples)
        rows.append(
            Row(
                group=trial.setting.group,
                detail=trial.setting.detail,
                policy=trial.setting.policy.name if trial.setting.policy else "",
                forecast=trial.setting.forecast,
                partial=trial.setting.partial,
                steps=trial.setting.steps,
                computed=trial.computed,
                computed_steps=sum(sum(stream) for stream in trial.computed.values()) / len(trial.computed),
                seconds=trial.seconds,
                pace=trial.pace,
                busy=disturbed,
                speedup=None if disturbed or busy[0] else reference.seconds / trial.seconds,
                psnr=distances.mean().item(),
                worst=distances.min().item(),
                ssim=ssim(trial.samples, reference.samples),
                recognised=recognised(trial.samples, labels),
            )
        )
    return rows
