"""What the suites of laws share: random deciders as descriptions, their rules in plain Python, rollouts.

A description ("spec") is a tuple: the name of a factory, its arguments, the wrapped specs. `build` makes the decider,
`rules` flattens the tree: every wrapper only ever adds reasons to compute, so a composition computes iff any rule in
it does, and a rule needs to know no more than the steps that were computed so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit import deciders
from cachekit.deciders import Decider, Moment, Sums

LENGTH = 12  # of the longest random trajectory
DTYPES = {"float32": torch.float32, "float64": torch.float64}
Spec = tuple


class Run(NamedTuple):
    """A trajectory and what would be measured on it."""

    times: tuple[float, ...]
    signals: tuple[tuple[float, float], ...]

    def prefix(self, steps: int) -> Run:
        """The first steps."""
        return Run(self.times[:steps], self.signals[:steps])


class Trace(NamedTuple):
    """What a decider did."""

    wanted: list[bool]  # the verdict of `decide`
    computed: list[bool]  # the verdict of the engine, which computes step 0 whatever the decider says
    states: list[Any]  # before every step, and after the last


def build(spec: Spec) -> Decider:
    """The decider of a description."""
    match spec:
        case ("magnitude", ratios, threshold, most, retention, interpolation, dtype):
            return deciders.magnitude_budget(
                ratios,
                threshold=threshold,
                max_skips=most,
                retention=retention,
                interpolation=interpolation,
                dtype=DTYPES[dtype],
            )
        case ("drift", threshold, inclusive):
            return deciders.drift(threshold, inclusive=inclusive)
        case ("interval", every, first, offset, end):
            return deciders.interval(every, warmup=first, offset=offset, cooldown_after=end)
        case (name, *arguments):
            parts = (build(part) if _is_spec(part) else part for part in arguments)
            return getattr(deciders, name)(*parts)


def rules(spec: Spec) -> Iterator[Spec]:
    """The rules of a description, without the nesting."""
    yield tuple(part for part in spec if not _is_spec(part))
    for part in spec:
        if _is_spec(part):
            yield from rules(part)


def expected(spec: Spec, run: Run) -> list[bool]:
    """The verdicts, from the rules alone."""
    trail: list[bool] = []
    for step in range(len(run.times)):
        trail.append(step == 0 or any(computes(rule, run, trail) for rule in rules(spec)))
    return trail


def computes(rule: Spec, run: Run, trail: list[bool]) -> bool:
    """Whether a rule demands to compute the step after `trail`, the verdicts so far."""
    step, steps = len(trail), len(run.times)
    skipped = trail[::-1].index(True) if True in trail else step
    match rule:
        case ("always",):
            return True
        case ("any_of",):
            return False
        case ("mask", entries):
            return entries[step]
        case ("warmup", first):
            return step < first
        case ("interval", every, first, offset, end):
            regular = step in {first + offset + turn * every for turn in range(-LENGTH, LENGTH + 1)}
            return step < first or regular or (end is not None and step >= end)
        case ("max_skips", most):
            return skipped >= most
        case ("within", low, high):
            return not low < run.times[step] < high
        case ("drift", threshold, inclusive):
            change, reference = run.signals[step]
            if not math.isfinite(change) or not math.isfinite(reference) or reference == 0 or threshold == 0:
                return True
            return not (change / reference < threshold or (inclusive and change / reference == threshold))
        case ("magnitude", ratios, threshold, most, retention, interpolation, dtype):
            if step < int(retention * steps + 0.5) or skipped + 1 > most:
                return True
            gamma = stretched(ratios, steps, interpolation)
            return not spent(gamma[step - skipped : step + 1], dtype) <= threshold
    raise AssertionError(rule)


def stretched(ratios: tuple[float, ...], steps: int, interpolation: str) -> np.ndarray:
    """Calibrated ratios for another number of steps, as SEMANTICS of MagCache has it."""
    gamma, last = np.asarray(ratios, dtype=np.float64), len(ratios) - 1
    if steps == len(gamma) or (steps == 1 and interpolation == "nearest"):
        return gamma[-steps:]
    if interpolation == "nearest":
        return gamma[np.rint(np.arange(steps, dtype=np.float32) * np.float32(last / (steps - 1))).astype(int)]
    at = np.linspace(0, last, steps) if steps > 1 else [last]
    curve = np.interp(at, np.arange(len(gamma)), np.cumsum(np.log(gamma)))
    with np.errstate(over="ignore"):
        return np.exp(np.diff(curve, prepend=0.0))


def spent(gamma: np.ndarray, dtype: str) -> Any:
    """The error of MagCache after steps of these ratios."""
    kind = np.dtype(dtype).type
    ratio, error = kind(1), kind(0)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for factor in gamma.astype(kind):
            ratio = ratio * factor
            error = error + abs(kind(1) - ratio)
    return error


def plain(run: Run, step: int) -> Moment:
    """What the host shows a decider: Python numbers."""
    return Moment(step, run.times[step], len(run.times), Sums(*run.signals[step]))


def table(run: Run) -> Tensor:
    """A run as one tensor [T, 3] float64: timestep, change, reference."""
    rows = [(time, *signal) for time, signal in zip(run.times, run.signals, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def tensors(rows: Tensor, step: Tensor) -> Moment:
    """What a graph shows a decider: 0-d tensors, made inside the graph.

    Not its inputs: a graph guards that a 0-d float64 input is not NaN, and compiles again when it is.
    """
    time, change, reference = rows.index_select(0, step.reshape(1)).squeeze(0).unbind()
    return Moment(step, time, torch.full((), rows.shape[0], dtype=torch.int64), Sums(change, reference))


def on_host(decider: Decider) -> Callable[[Any, Run, int], tuple[Any, Any, Any]]:
    """One step as the host takes it: the verdict becomes a bool."""

    def step(state, run, index):
        now = plain(run, index)
        wanted = bool(decider.decide(state, now))
        computed = now.step == 0 or wanted
        return wanted, computed, decider.update(state, now, computed)

    return step


def in_graph(decider: Decider) -> Callable[[Any, Tensor, Tensor], tuple[Any, Any, Any]]:
    """One step as a graph takes it: the verdict stays a tensor."""

    def step(state, rows, index):
        now = tensors(rows, index)
        wanted = decider.decide(state, now)
        computed = (now.step == 0) | wanted
        return wanted, computed, decider.update(state, now, computed)

    return step


def rollout(spec: Spec, run: Run, *, graph: bool = False, compiled: Callable | None = None) -> Trace:
    """Take every step of a run. With `graph` on tensors, with `compiled` through that step function."""
    decider, rows = build(spec), table(run)
    step: Callable[..., tuple[Any, Any, Any]] = compiled or (in_graph if graph else on_host)(decider)
    state = decider.init(torch.tensor(run.times, dtype=torch.float64))
    trace = Trace([], [], [state])
    for index in range(len(run.times)):
        now = (rows, torch.tensor(index)) if graph or compiled else (run, index)
        wanted, computed, state = step(state, *now)
        trace.wanted.append(bool(wanted))
        trace.computed.append(bool(computed))
        trace.states.append(state)
    return trace


def longest_reuse(computed: list[bool]) -> int:
    """The most reused steps in a row."""
    return max(len(streak) for streak in "".join(".#"[entry] for entry in computed).split("#"))


def layout(tree: Any) -> tuple:
    """The tree of a state, and the shape, dtype and device of every leaf; the type of what is no tensor."""
    leaves, treespec = pytree.tree_flatten(tree)
    facts = [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
    return treespec, facts


def copied(tree: Any) -> Any:
    """The same values in tensors of their own."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def assert_same(actual: Any, wanted: Any) -> None:
    """Equal to the last bit, NaN at the same places."""
    torch.testing.assert_close(pytree.tree_leaves(actual), pytree.tree_leaves(wanted), rtol=0, atol=0, equal_nan=True)


def _is_spec(part: Any) -> bool:
    return isinstance(part, tuple) and bool(part) and isinstance(part[0], str)


# Multiples of a number that float32 does not hold: bounds and timesteps often coincide, and only in float64.
TIMES = st.integers(0, 20).map(lambda count: count * 50.1)
RANGES = st.tuples(st.integers(0, 11), st.integers(12, 20)).map(lambda ends: (ends[0] * 50.1, ends[1] * 50.1))
THRESHOLDS = st.sampled_from([0.5, 0.25, 1.0, 0.0, math.inf]) | st.floats(0, 2)
CHANGES = st.sampled_from([0.0, 0.125, 0.25, 0.25, 0.5, 0.5, 1.0, math.nan, math.inf]) | st.floats(0, 1)
REFERENCES = st.sampled_from([1.0, 1.0, 1.0, 2.0, 4.0, 0.0, math.nan, math.inf]) | st.floats(0.5, 4)
RATIOS = st.sampled_from([1.0, 0.75, 1.25]) | st.floats(0.9, 1.1)
EXTREMES = RATIOS | st.floats(1e-300, 1e300)
COUNTS = st.integers(0, 4)

DRIFTS = st.tuples(st.just("drift"), THRESHOLDS, st.booleans())
INTERVALS = st.tuples(
    st.just("interval"), st.integers(1, 6), st.integers(0, 4), st.integers(-2, 2), st.none() | st.integers(0, LENGTH)
)
ENTRIES = st.sampled_from([False, False, False, True])
MASKS = st.tuples(st.just("mask"), st.lists(ENTRIES, min_size=LENGTH, max_size=LENGTH + 3).map(tuple))


def magnitudes(*interpolations: str) -> st.SearchStrategy[Spec]:
    """Descriptions of `magnitude_budget`."""
    sizes = {"min_size": 1, "max_size": LENGTH + 8}
    return st.tuples(
        st.just("magnitude"),
        st.one_of(st.lists(RATIOS, **sizes), st.lists(EXTREMES, **sizes)).map(tuple),
        THRESHOLDS,
        st.integers(0, 6),
        st.sampled_from([0.0, 0.1, 0.2, 1.0]) | st.floats(0, 0.5),
        st.sampled_from(interpolations),
        st.sampled_from(list(DTYPES)),
    )


def _wrapped(inner: st.SearchStrategy[Spec]) -> st.SearchStrategy[Spec]:
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda specs: ("any_of", *specs)),
        st.tuples(st.just("max_skips"), COUNTS, inner),
        st.tuples(st.just("warmup"), COUNTS, inner),
        st.builds(lambda ends, spec: ("within", *ends, spec), RANGES, inner),
    )


def specs(*leaves: st.SearchStrategy[Spec]) -> st.SearchStrategy[Spec]:
    """Compositions over deciders of these kinds, by default over all.

    Not over `always`, which leaves nothing to see of the others, nor over `"log"`: the logarithms of two libraries
    differ in the last bit, so that its ties have no verdict to agree on.
    """
    return st.recursive(st.one_of(*leaves or (DRIFTS, MASKS, INTERVALS, magnitudes("nearest"))), _wrapped, max_leaves=4)


@st.composite
def runs(draw: st.DrawFn, steps: int | None = None) -> Run:
    """A trajectory from noise to data, with signals. Most are long: Hypothesis by itself prefers a single step."""
    steps = steps or draw(st.sampled_from([LENGTH, LENGTH, LENGTH, LENGTH - 1, LENGTH // 2, 2, 1]))
    times = draw(st.lists(TIMES, min_size=steps, max_size=steps))
    signals = draw(st.lists(st.tuples(CHANGES, REFERENCES), min_size=steps, max_size=steps))
    return Run(tuple(sorted(times, reverse=True)), tuple(signals))


def counting(backend: str) -> Any:
    """A backend that counts the graphs it is given."""
    from torch._dynamo.testing import CompileCounterWithBackend  # the whole compiler: seconds, of which few need any

    return CompileCounterWithBackend(backend)
