"""The runs of the demo: sampling under a setting, timed and counted; the recording; plans that are chosen by runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import cachekit as ck
from cachekit.demo.sample import GUIDANCE, Stream, sample, timesteps
from cachekit.demo.settings import CHOSEN, Setting
from cachekit.demo.work import multiplications
from cachekit.diffusers import digits

STREAMS: tuple[Stream, ...] = ("cond", "uncond")


class Trial(NamedTuple):
    """One sampling run."""

    setting: Setting
    samples: Tensor  # [B, 1, 1, 16, 16]
    computed: dict[str, tuple[bool, ...]]  # stream -> one a step
    seconds: float  # of the sampling loop alone
    pace: float  # mean seconds of a computed forward
    work: float  # multiplications, in those of a full step


class Call(NamedTuple):
    """One forward of a run, which can be made again: a state is a value, and an old one is as good as a new one."""

    stream: Stream
    state: ck.State | None  # None without a cache
    arguments: dict[str, Any]


class Sampler:
    """The velocity under a setting: the model itself, or one cached step with a state for each stream."""

    def __init__(
        self, model: nn.Module, setting: Setting, labels: Tensor, tick: Callable[[], object], compiled: bool = False
    ) -> None:
        self.tick = tick
        self.clock: dict[Stream, list[float]] = {stream: [] for stream in STREAMS}  # seconds of every forward
        self.actions: list[Hashable] = []  # what was left out, of every forward
        self.calls: dict[Hashable, Call] = {}  # the first forward of every action
        self.model = model
        self.step: ck.CachedStep | None = None
        self.guided = False
        self.states: dict[Stream, ck.State] = {}
        if setting.policy is not None:
            self.step = ck.cache(model, setting.policy)
            noise = torch.zeros(len(labels), 1, 1, digits.SIZE, digits.SIZE)
            times = timesteps(setting.steps)[:-1]
            with torch.no_grad():
                state = self.step.init(1000 * times, **digits.inputs(noise, times[0], labels))
            self.guided = self.step.policy.guidance is not None
            self.states = {stream: self.step.init_like(state) for stream in (STREAMS[:1] if self.guided else STREAMS)}
        self.fast: nn.Module = self.step or model  # what samples
        if compiled:
            self.fast = self.step.compile() if self.step else torch.compile(model, fullgraph=True)  # type: ignore[assignment]

    def restart(self) -> None:
        """Forget the trajectory."""
        self.clock = {stream: [] for stream in STREAMS}
        self.actions, self.calls = [], {}
        if self.step is not None:
            self.states = {stream: self.step.init_like(state) for stream, state in self.states.items()}

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, stream: Stream) -> Tensor:
        """The velocity of one stream; see `cachekit.demo.sample.Velocity`."""
        if stream == STREAMS[-1]:
            self.tick()
        start = time.perf_counter()
        # With the guidance of a policy one state is for both calls: the unconditional one is answered from the other.
        owner = STREAMS[0] if self.guided else stream
        call = Call(stream, self.states.get(owner), digits.inputs(x, t, labels))
        out, state = self._made(call, self.fast)
        if state is not None:
            self.states[owner] = state
        self.clock[stream].append(time.perf_counter() - start)
        action = self._action(call, state)
        self.actions.append(action)
        self.calls.setdefault(action, call)
        return out[0]

    def work(self) -> float:
        """Multiplications so far, in those of a full step, which is the model as it is for both streams.

        What a forward multiplies depends on what it leaves out alone, so one forward of every action is counted.
        """
        made = {
            action: multiplications(self._made, call, self.step or self.model) for action, call in self.calls.items()
        }
        some = next(iter(self.calls.values()))
        full = len(STREAMS) * multiplications(self.model, **some.arguments)
        return sum(made[action] for action in self.actions) / full

    def _made(self, call: Call, module: nn.Module) -> tuple[Any, ck.State | None]:
        """What a forward returns, and the next state; of the step or the model as it is, or compiled."""
        if call.state is None:
            return module(**call.arguments), None
        if self.guided and call.stream == STREAMS[1]:
            return module.uncond(call.state, **call.arguments)  # type: ignore[operator]
        return module(call.state, **call.arguments)

    def _action(self, call: Call, after: ck.State | None) -> Hashable:
        """What decides the work of a forward that was just made."""
        if self.step is None or call.state is None or after is None:
            return ()
        index = len(self.clock[call.stream]) - 1
        if self.step.policy.static:
            return call.stream, *self.step.planned(call.state, index).values()
        return bool(after.computed[index])


def run(
    model: nn.Module,
    setting: Setting,
    labels: Tensor,
    seed: int,
    tick: Callable[[], object] = lambda: None,
    compiled: bool = False,
) -> Trial:
    """Sample under a setting, timed; `tick` is called at every Euler step.

    Its work is counted after the clock has stopped. A compiled run samples twice and times the second: the first one
    compiles.
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
    return Trial(setting, samples, computed, seconds, sum(paces) / len(paces), sampler.work())


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

    def sampled(policy: ck.Policy | None) -> Tensor:
        sampler = Sampler(model, Setting(CHOSEN, "", steps, policy), labels, tick)
        return sample(sampler, labels, steps, GUIDANCE, seed)

    uncached = sampled(None)

    def tried(policy: ck.Policy | None) -> Tensor:
        return uncached if policy is None else sampled(policy)

    return {count: ck.choose(trace, tried, computed=count, refine=refine, peak=2.0).plan for count in counts}
