"""What a call of a pipeline did, as values and as a table."""

from __future__ import annotations

import math
from typing import NamedTuple

from cachekit.deciders._decider import Moment, Sums
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
