"""What a call of a pipeline did, as values and as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cachekit.deciders._decider import Moment, Sums
from cachekit.diffusers.calls import Stream
from cachekit.guidance import GUIDANCE
from cachekit.plans import pattern
from cachekit.policy import Policy
from cachekit.state import State, human_bytes


class StreamReport(NamedTuple):
    """What one stream did."""

    policy: str  # its name
    computed: tuple[bool, ...]  # one a call of the transformer
    seconds: float  # that the host spent in these calls; it does not wait for a GPU
    setup_seconds: float  # before, to look at the model (once for each shape of inputs) and to make states
    state_bytes: int  # remembered from step to step

    @property
    def skipped(self) -> int:
        """How many calls left something out."""
        return len(self.computed) - sum(self.computed)


class Report(NamedTuple):
    """What the last call did; `str` is a table."""

    streams: dict[str, StreamReport]  # by transformer and stream
    unused: tuple[str, ...]  # keys of the mapping of policies that no stream has

    def __str__(self) -> str:
        if not self.streams:
            return "no call of the pipeline yet"
        width = max(map(len, self.streams))
        rows = [
            f"{'stream':<{width}} {'computed':>8} {'skipped':>7} {'seconds':>8} {'setup':>8} {'state':>10}  pattern"
        ]
        for name, stream in self.streams.items():
            counts = f"{name:<{width}} {sum(stream.computed):>8} {stream.skipped:>7}"
            times = f"{stream.seconds:>8.3f} {stream.setup_seconds:>8.3f} {human_bytes(stream.state_bytes):>10}"
            rows.append(f"{counts} {times}  {pattern(stream.computed)}  {stream.policy}")
        if self.unused:
            rows.append(f"policies for streams that were not called: {', '.join(self.unused)}")
        return "\n".join(rows)


def notes(
    streams: Mapping[tuple[str, str], Stream],
    policy_of: Callable[[str, str], Policy | None],
    unused: Sequence[str],
) -> Iterator[tuple[Any, str]]:
    """What a whole call shows of policies that do less than they seem to, each with a key by which it is said once.

    Args:
        streams: of the call, by transformer and name.
        policy_of: transformer, name -> the policy as it was given.
        unused: keys of the mapping of policies that no stream has.
    """
    if streams:
        there = ", ".join("/".join(key) for key in streams)
        for key in unused:
            yield (
                key,
                f"`policy` names {key!r}, and no call is that: there are {there}. What has no name is not cached.",
            )
    of_policy: dict[int, dict[str, Stream]] = {}
    given: dict[int, Policy] = {}
    for (component, name), stream in streams.items():
        policy = policy_of(component, name)
        if policy is not None and not stream.recorded and not _calibrates(policy):
            given[id(policy)] = policy
            of_policy.setdefault(id(policy), {})[f"{component}/{name}"] = stream
    for key, of in of_policy.items():
        calls = [computed for stream in of.values() for computed in stream.computed]
        states = {name: stream.state for name, stream in of.items() if stream.state is not None}
        if given[key].guidance is not None and not any(map(_guided, of.values())):
            yield (
                (key, GUIDANCE),
                f"`policy` {given[key].name!r} leaves the unconditional half of guidance out, and {', '.join(of)} had "
                "none in this call: attention alone was left out. Call the pipeline with guidance (a scale above 1, a "
                "negative prompt where it has true_cfg_scale), or give the policy cfg=None.",
            )
        alone = all(len(stream.computed) == 1 for stream in of.values())  # of one step none can be skipped
        if all(calls) and not alone and states:
            policy = of[next(iter(states))].policy
            assert policy is not None
            idle = f"`policy` {policy.name!r} has skipped nothing in {len(calls)} calls of {', '.join(of)}. "
            yield key, idle + why_idle(policy, states)


def _guided(stream: Stream) -> bool:
    """Whether there was an unconditional half: in the batch, or answered from a conditional call."""
    guidance = None if stream.policy is None else stream.policy.guidance
    return guidance is not None and (not guidance.separate or stream.state is None)


def _calibrates(policy: Policy) -> bool:
    """Whether it computes every step to measure something: what it measures decides nothing."""
    return policy.static and policy.signal is not None


def why_idle(policy: Policy, states: dict[str, State]) -> str:
    """Why a policy has skipped nothing in these trajectories, by stream, with the number that would have changed it.

    Args:
        policy: that of the states.
        states: after a run whose steps were all computed.
    """
    names = ", ".join(dict.fromkeys(decider.name for decider in policy.deciders.values()))
    if policy.static:
        return f"Its plan ({names}) computes every one of them: the run is shorter or elsewhere than what it skips."
    lowest = [(*least, name) for name, state in states.items() if (least := _least_signal(policy, state)) is not None]
    if not lowest:
        return f"No signal would have changed that: {names} computes all of these steps whatever is measured."
    signal, step, stream = min(lowest)
    return (
        f"Its decider is {names}; the smallest signal at a step that it may skip was {signal:.4g}, at step {step} of "
        f"{stream}. A threshold above that skips it."
    )


def _least_signal(policy: Policy, state: State) -> tuple[float, int] | None:
    """The smallest signal of a run that skipped nothing, and its step, among the steps that no signal would skip less.

    These are the steps that the decider skips where nothing has moved at all, after all before them were computed.
    """
    (decider,) = policy.deciders.values()  # a policy with several has none that looks at a signal
    memory, least = decider.init(state.timesteps), None
    times = state.timesteps.tolist()
    for step, signal in enumerate(state.signal[: int(state.step)].tolist()):
        now = Moment(step, times[step], len(times), Sums(signal, 1.0))
        still = now._replace(signal=Sums(0.0, 1.0))
        if step > 0 and math.isfinite(signal) and not bool(decider.decide(memory, still)):
            least = min(least or (signal, step), (signal, step))
        memory = decider.update(memory, now, True)
    return least
