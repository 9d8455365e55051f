"""What a policy would have done to a recorded run, and how far off it would have been."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from cachekit import signals
from cachekit.deciders import Moment, Sums
from cachekit.deciders import plan as plan_of
from cachekit.deciders._decider import ratio
from cachekit.errors import ArgumentError, ArgumentTypeError, TraceWarning
from cachekit.forecasters import Forecaster
from cachekit.planning.trace import Trace, check_trace
from cachekit.plans import pattern
from cachekit.policy import Policy
from cachekit.structure.layout import ALL

CLIFF = 10.0
"""How much more error makes a cliff of a step from one setting to the next."""
NEAR = 0.02
"""How close two settings are, relative to each other, that a cliff lies between."""


class Replay(NamedTuple):
    """A policy, held against a trace."""

    policy: str  # its name
    site: str  # where it forecasts: "output", "chain" or "rest"
    computed: dict[str, tuple[int, ...]]  # stream -> the steps that compute
    signal: dict[str, tuple[float, ...]]  # stream -> what the decider saw at every step, NaN where it saw nothing
    errors: tuple[float, ...]  # a step: norm of forecast minus value over the norm of the value; 0 where computed
    error: float  # of the whole run: see `cachekit.replay`
    steps: int  # T

    @property
    def computed_steps(self) -> float:
        """How many steps compute, as a mean of the streams."""
        return sum(map(len, self.computed.values())) / len(self.computed)

    def __str__(self) -> str:
        rows = [f"{self.policy}: {self.computed_steps:g} of {self.steps} steps computed, error {self.error:.3g}"]
        width = max(map(len, self.computed))
        for stream, nodes in self.computed.items():
            shown = pattern([step in nodes for step in range(self.steps)])
            rows.append(f"  {stream:<{width}}  {shown}" if width else f"  {shown}")
        return "\n".join(rows)


@overload
def replay(trace: Trace, policy: Policy) -> Replay: ...
@overload
def replay(trace: Trace, policy: Iterable[Policy]) -> list[Replay]: ...
def replay(trace: Trace, policy: Policy | Iterable[Policy]) -> Replay | list[Replay]:
    """What a policy would have done to the recorded run, without the model.

    Its decider is shown what it would have been shown; its forecasts are held against what was computed. Between two
    computed steps the errors add up, each times the step size of the sampler, and as far as `Trace.carried` says; the
    errors of several gaps, which point anywhere, add up by their squares. What a forecaster repays after a gap counts
    for that gap. `error` is the root of that over the norm of the way that the sampler goes in all: 0.01 is a hundredth
    of the way. The run itself is taken as it was: that a step which was left out leads to other values later is not in
    it.

    Args:
        trace: of an uncached run.
        policy: one, or several, for a table. Its sites must have been recorded: the output, or chains; with a signal,
            the probe.

    Raises:
        ArgumentError: the policy looks at what is not in the trace: modules inside the blocks, a signal of your own, a
            forecaster without weights.

    Warns:
        TraceWarning: a policy never leaves out a step.

    Example:
        >>> import torch, cachekit as ck
        >>> trace = ck.Trace.of([torch.tensor([1.0, step]) for step in range(6)], 6)
        >>> print(ck.replay(trace, ck.step_mask([1, 0, 0, 1, 0, 0], sites="output")))
        step_mask(2 of 6, hold, output): 2 of 6 steps computed, error 0.263
          #..#..
    """
    check_trace(trace)
    if isinstance(policy, Policy) or not isinstance(policy, Iterable):
        return _replay(trace, policy)
    return [_replay(trace, each) for each in policy]


def _replay(trace: Trace, policy: Policy) -> Replay:
    if not isinstance(policy, Policy):
        raise ArgumentTypeError(f"`policy` must be a Policy or several, got {type(policy).__name__}.")
    site = site_of(policy)
    if site not in trace.sites:
        raise ArgumentError(
            f"{policy.name} forecasts {site!r}, which is not in the trace, only {', '.join(map(repr, trace.sites))}. "
            "Record it with cachekit.recording(sites=...)."
        )
    steps = len(trace)
    if policy.static:
        verdicts = plan_of(policy.deciders[ALL], trace.timesteps)
        nodes = tuple(step for step, computes in enumerate(verdicts) if computes)
        computed, signal = dict.fromkeys(trace.streams, nodes), dict.fromkeys(trace.streams, (math.nan,) * steps)
    else:
        both = {stream: _decisions(trace, stream, policy) for stream in trace.streams}
        computed = {stream: nodes for stream, (nodes, _) in both.items()}
        signal = {stream: seen for stream, (_, seen) in both.items()}
    if all(len(nodes) == steps for nodes in computed.values()) and steps > 1:
        warnings.warn(
            TraceWarning(
                f"{policy.name} leaves out no step of this trace{_least(signal)}. Raise its threshold or budget."
            ),
            stacklevel=3,
        )
    errors, error = errors_of(trace, site, computed, policy.forecaster)
    return Replay(policy.name, site, computed, signal, errors, error, steps)


def _least(signal: dict[str, tuple[float, ...]]) -> str:
    seen = [value for values in signal.values() for value in values[1:] if math.isfinite(value)]
    return f": the signal is never below {min(seen):.3g}" if seen else ""


def site_of(policy: Policy) -> str:
    """Where a policy forecasts, as a trace names it."""
    if policy.guidance is not None or policy.sites not in ("output", "chain"):
        raise ArgumentError(
            f"{policy.name} leaves out modules inside the blocks, or half of the batch, which a trace does not hold. "
            "Replay policies with sites 'output' or 'chain'."
        )
    if policy.front > 1 or (policy.front and policy.signal is not signals.change):
        raise ArgumentError(
            f"{policy.name} looks at a signal that a trace does not hold: it has that of one front block, "
            "cachekit.signals.change."
        )
    if policy.recorded:
        raise ArgumentError(f"{policy.name} is a recording. Replay what is to be compared with it.")
    return "rest" if policy.front and policy.sites == "chain" else str(policy.sites)


def _decisions(trace: Trace, stream: str, policy: Policy) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The steps that compute, and the signal at every step."""
    if "probe" not in trace.sites:
        raise ArgumentError(f'{policy.name} looks at the probe. Record it: cachekit.recording(sites=(..., "probe")).')
    decider, steps = policy.deciders[ALL], len(trace)
    state, sums = decider.init(trace.timesteps), trace.sums(stream)
    nodes, seen, last = [0], [math.nan], 0
    # Against nothing: before step 0 the reference is zero.
    first = Moment(0, trace.times[0], steps, Sums(sums[0][0].denominator, 0.0))
    state = decider.update(state, first, True)
    for step in range(1, steps):
        now = Moment(step, trace.times[step], steps, sums[step][last])
        computes = bool(decider.decide(state, now))
        state = decider.update(state, now, computes)
        seen.append(float(ratio(now.signal)))
        if computes:
            nodes.append(step)
            last = step
    return tuple(nodes), tuple(seen)


def errors_of(
    trace: Trace, site: str, computed: dict[str, tuple[int, ...]], forecaster: Forecaster
) -> tuple[tuple[float, ...], float]:
    """Relative errors of every step, and of the whole run."""
    sizes, steps = trace.reach, len(trace)
    square, gaps = torch.zeros(steps, dtype=torch.float64), 0.0
    known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for stream, nodes in computed.items():
        if nodes not in known:
            known[nodes] = deviations(steps, nodes, forecaster)
        (off, back), gram = known[nodes], trace.share(stream) * trace.streams[stream][site].gram
        whole = off + back
        square += ((whole @ gram) * whole).sum(-1).clamp(min=0)
        starts = torch.zeros(steps, dtype=torch.long)
        starts[list(nodes)] = 1
        gap = starts.cumsum(0) - 1
        summed = torch.zeros(len(nodes), steps, dtype=torch.float64)
        summed.index_add_(0, gap, off * sizes[:, None])
        # What is repaid is of the gap before.
        summed.index_add_(0, (gap - 1).clamp(min=0), back * sizes[:, None])
        gaps += float(((summed @ gram) * summed).sum().clamp(min=0))
    size = trace.gram(site).diagonal()
    relative = torch.where(square > 0, (square / size).sqrt(), square)
    return tuple(relative.tolist()), math.sqrt(gaps) / way(trace, site)


def way(trace: Trace, site: str) -> float:
    """The norm of all that the sampler goes."""
    return float(trace.norm(site, trace.step_sizes)) or 1.0


def deviations(steps: int, nodes: Sequence[int], forecaster: Forecaster) -> tuple[Tensor, Tensor]:
    """Forecast minus value at every step, and what is added to repay, as factors of the values: each [T, T] float64.

    Rows of zeros where computed.
    """
    if forecaster.weights is None:
        raise ArgumentError(
            f"`forecaster` {forecaster.name!r} has no weights: only forecasts that are fixed linear combinations of "
            "computed values can be replayed. Give Forecaster(weights=...)."
        )
    if not nodes or nodes[0] != 0 or nodes[-1] >= steps or any(a >= b for a, b in itertools.pairwise(nodes)):
        raise ArgumentError(f"`computed` must hold step 0 and ascending steps below {steps}, got {list(nodes)}.")
    off, back = torch.zeros(2, steps, steps, dtype=torch.float64)
    ends = [*nodes[1:], steps]
    memory = len(nodes) if forecaster.memory is None else forecaster.memory
    # Gaps after as many computed steps as a forecast looks at are one call; the first ones have fewer, each its own.
    groups: dict[int, list[int]] = {}
    for n, (node, end) in enumerate(zip(nodes, ends, strict=True)):
        if end - node > 1:
            groups.setdefault(min(n + 1, memory), []).append(n)
    for seen, members in groups.items():
        inside = [step for n in members for step in range(nodes[n] + 1, ends[n])]
        near = [nodes[n + 1 - seen : n + 1] for n in members for _ in range(nodes[n] + 1, ends[n])]
        at, known = torch.tensor(inside), torch.tensor(near)
        off[at[:, None], known] = forecaster.weights(known.double(), at.double(), steps)
        off[at, at] = -1.0
        if forecaster.repaid is not None:
            back[at[:, None], known] = forecaster.repaid(known.double(), at.double(), steps)
    return off, back


class Sweep(NamedTuple):
    """Settings of one method on a trace."""

    settings: tuple[Any, ...]
    replays: tuple[Replay, ...]
    cliffs: tuple[tuple[Any, Any], ...]  # pairs of settings next to each other between which the error jumps


def sweep(trace: Trace, make: Callable[[Any], Policy], settings: Iterable[float]) -> Sweep:
    """Replay a method at many settings, and look for cliffs: a small change that makes the error ten times as large.

    Between two settings whose errors are that far apart it looks again, halfway, until they are within 2 %. A cliff is
    also where a small change goes from leaving out nothing to leaving out most steps.

    Args:
        trace: of an uncached run.
        make: from a setting to a policy, e.g. `cachekit.first_block_cache`.
        settings: numbers, e.g. thresholds.

    Warns:
        TraceWarning: there is a cliff; or a setting leaves out no step.

    Example:
        >>> import torch, cachekit as ck
        >>> values = [torch.tensor([1.0, 0.1 * step]) for step in range(8)]
        >>> trace = ck.Trace.of(values, 8, site="output")
        >>> every = lambda interval: ck.step_mask([s % interval == 0 for s in range(8)], sites="output")
        >>> [replayed.computed_steps for replayed in ck.sweep(trace, every, [2, 4]).replays]
        [4.0, 2.0]
    """
    if not callable(make):
        raise ArgumentTypeError(f"`make` must be a function from a setting to a policy, got {type(make).__name__}.")
    ordered = list(settings) if isinstance(settings, Iterable) else []
    if not ordered or not all(isinstance(each, (int, float)) and math.isfinite(each) for each in ordered):
        raise ArgumentError(f"`settings` must hold at least one finite number, e.g. thresholds, got {settings!r}.")
    ordered.sort()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        found = {setting: replay(trace, make(setting)) for setting in ordered}
        cliffs = []
        for low, high in itertools.pairwise(ordered):
            if _apart(found[low], found[high]):
                below, above = _cliff(trace, make, low, high, found)
                if below is not None:
                    cliffs.append((below, above))
    made = tuple(found[setting] for setting in ordered)
    inert = [each.policy for each in made if each.computed_steps == len(trace)]
    if inert and len(trace) > 1:
        whose = f"{inert[0]} leaves" if len(inert) == 1 else f"{inert[0]} to {inert[-1]} leave"
        warnings.warn(TraceWarning(f"{whose} out no step of this trace."), stacklevel=2)
    for below, above in cliffs:
        name = found[below].policy.partition("(")[0]
        if found[below].error:
            text = f"the predicted error of {name} rises more than {CLIFF:g} times. Stay well below {below:g}."
        else:
            text = f"{name} goes from leaving out no step to {found[above].computed_steps:g} computed of {len(trace)}."
        warnings.warn(TraceWarning(f"Between {below:g} and {above:g} {text}"), stacklevel=2)
    return Sweep(tuple(ordered), made, tuple(cliffs))


def _apart(below: Replay, above: Replay) -> bool:
    """Whether a cliff lies between two settings."""
    if below.error == 0:
        return below.computed_steps == below.steps and above.computed_steps < below.steps / 2
    return above.error > CLIFF * below.error


def _cliff(trace: Trace, make: Callable[[Any], Policy], low, high, found: dict[Any, Replay]) -> tuple[Any, Any]:
    """The two settings between which the error jumps, or None where it rises by degrees; `found` has what was tried."""
    below, above = found[low], found[high]
    while high - low > NEAR * abs(high):
        middle = (low + high) / 2
        if isinstance(low, int) and isinstance(high, int):
            middle = (low + high) // 2
            if middle == low:
                break
        between = found[middle] = replay(trace, make(middle))
        lower, upper = _apart(below, between), _apart(between, above)
        if not (lower or upper):
            return None, None
        if upper and not (lower and between.error**2 >= below.error * above.error):  # the steeper half
            low, below = middle, between
        else:
            high, above = middle, between
    return low, high
