"""The best steps to compute, found on a trace by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cachekit.deciders._decider import trajectory
from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.forecasters import Forecaster, newton
from cachekit.planning.replay import errors_of, way
from cachekit.planning.trace import Trace, check_trace
from cachekit.plans import Plan

MEMORY = 3
"""Of how many computed values a forecast may be made: the search looks at every such group of steps."""

STANDARD = newton(1, repay=True)
"""What is planned with where nothing is said."""


def plan(
    trace: Trace,
    *,
    computed: int | None = None,
    speedup: float | None = None,
    error: float | None = None,
    costs: tuple[float, float] = (1.0, 0.0),
    forecaster: Forecaster | None = None,
    site: str = "output",
    max_gap: int | None = None,
    always: Sequence[int] = (0,),
    timesteps: Sequence[float] | Tensor | None = None,
    resample: bool = False,
) -> Plan:
    """The steps to compute that make the least of the error: of all plans the best, for the error of `cachekit.replay`.

    Give one of `computed`, `speedup` and `error`. For `trace.carried(0.5)` early errors count less: whether that does
    more for a model `cachekit.choose` finds out.

    Args:
        trace: of an uncached run.
        computed: how many steps compute, step 0 among them.
        speedup: how many times faster all steps together are to be, by `costs`.
        error: predicted error that is not to be exceeded, with as few computed steps as that takes.
        costs: of a computed step and of one that is not, in any unit: what you measured. A step whose output is
            forecast costs next to nothing, one whose chains are forecast what the rest of the model takes.
        forecaster: what stands in, of the last three computed values at most; None for `newton(1, repay=True)`. Whether
            another one does better real runs tell: predicted errors rank plans of one forecaster, not forecasters.
        site: "output" or "chain": what is forecast.
        max_gap: steps in a row at most that are not computed.
        always: steps that compute in any case; step 0 always does.
        timesteps: of the trajectory that the plan is for; None for that of the trace.
        resample: allow another trajectory than that of the trace, by `Trace.resample`.

    Returns:
        The plan: `print` it, `save` it, run it with `cachekit.planned`.

    Raises:
        ArgumentError: a value is out of range, no plan fits, or the trajectory is another one.

    Example:
        >>> import torch, cachekit as ck
        >>> values = [torch.tensor([float(step**3)]) for step in range(8)]
        >>> print(ck.plan(ck.Trace.of(values, 8), computed=5))
        5 of 8 steps computed  #..##.##
        newton 1 repaid of the output in between, predicted error 0.0327
    """
    check_trace(trace)
    if timesteps is not None:
        trace = _fitted(trace, timesteps, resample)
    steps = len(trace)
    given = {"computed": computed, "speedup": speedup, "error": error}
    if sum(value is not None for value in given.values()) != 1:
        raise ArgumentError("Give one of `computed`, `speedup` and `error`: what the plan is to reach.")
    forced = _forced(steps, always)
    if speedup is not None:
        computed = _afforded(steps, speedup, costs)
        if computed < len(forced):
            raise ArgumentError(
                f"`speedup` {speedup!r} lets {computed} steps compute, and `always` has {len(forced)}. Ask for less."
            )
    if computed is not None and (
        isinstance(computed, bool) or not isinstance(computed, int) or not len(forced) <= computed <= steps
    ):
        raise ArgumentError(f"`computed` must be an int from {len(forced)} to {steps}, got {computed!r}.")
    found = frontier(trace, most=computed, forecaster=forecaster, site=site, max_gap=max_gap, always=always)
    if computed is not None:
        fitting = [each for each in found if len(each.steps) == computed]
        if not fitting:
            raise ArgumentError(
                f"No {computed} of {steps} steps{'' if speedup is None else f', as `speedup={speedup}` wants,'} fit "
                f"`max_gap={max_gap}` and `always={sorted(forced)}`. Compute more, or allow longer gaps."
            )
        return fitting[0]
    assert error is not None
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not error >= 0:
        raise ArgumentError(f"`error` must be >= 0, got {error!r}. 0.01 is a hundredth of the way.")
    return next(each for each in found if each.error is not None and each.error <= error)


def frontier(
    trace: Trace,
    *,
    most: int | None = None,
    forecaster: Forecaster | None = None,
    site: str = "output",
    max_gap: int | None = None,
    always: Sequence[int] = (0,),
) -> tuple[Plan, ...]:
    """The best plan for every number of computed steps: all that `plan` could return, from one search.

    Args:
        trace: of an uncached run.
        most: computed steps at most; None for all.
        forecaster, site, max_gap, always: as for `plan`.

    Example:
        >>> import torch, cachekit as ck
        >>> trace = ck.Trace.of([torch.tensor([1.0, step**2 / 9]) for step in range(6)], 6)
        >>> [f"{each.error:.3f}" for each in ck.frontier(trace, most=3)]
        ['0.714', '0.145', '0.041']
    """
    check_trace(trace)
    forecaster = forecaster or STANDARD
    if not isinstance(forecaster, Forecaster):
        raise ArgumentTypeError(
            f"`forecaster` must be a Forecaster, got {type(forecaster).__name__}. cachekit.forecasters.named makes one."
        )
    if site not in ("output", "chain"):
        raise ArgumentError(f'`site` must be "output" or "chain", got {site!r}.')
    if forecaster.weights is None or forecaster.memory is None or forecaster.memory > MEMORY:
        raise ArgumentError(
            f"`forecaster` {forecaster.name!r} cannot be planned with: it is no fixed combination of the last {MEMORY} "
            "computed values or fewer. Use hold(), newton(k) or taylor(k) up to order 2, newton(k, repay=True) up "
            "to order 1, or two_point(w)."
        )
    if max_gap is not None and (isinstance(max_gap, bool) or not isinstance(max_gap, int) or max_gap < 0):
        raise ArgumentError(f"`max_gap` must be an int >= 0 or None, got {max_gap!r}.")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ArgumentError(f"`most` must be an int >= 1 or None, got {most!r}.")
    steps = len(trace)
    forced = _forced(steps, always)
    trace.gram(site)  # or an error that says what was recorded
    search = _Search(trace, forecaster, site, steps if max_gap is None else max_gap, sorted(forced))
    whole = way(trace, site)
    return tuple(
        _plan(trace, nodes, math.sqrt(cost) / whole, forecaster, site)
        for cost, nodes in search.best(steps if most is None else most)
    )


def computing(trace: Trace, nodes: Sequence[int], *, forecaster: Forecaster | None, site: str) -> Plan:
    """The plan that computes these steps, with its predicted error."""
    forecaster = forecaster or STANDARD
    _, error = errors_of(trace, site, dict.fromkeys(trace.streams, tuple(nodes)), forecaster)
    return _plan(trace, nodes, error, forecaster, site)


def _plan(trace: Trace, nodes: Sequence[int], error: float, forecaster: Forecaster, site: str) -> Plan:
    mask = tuple(step in nodes for step in range(len(trace)))
    times = () if bool(trace.timesteps.isnan().any()) else trace.times
    return Plan(mask, forecaster=forecaster.name, site=site, error=error, timesteps=times, notes={**trace.notes})


class _Search:
    """Of all ways from step 0 to the end, with a given number of computed steps, the one that costs least.

    What a gap costs hangs on the step after it and on the last computed steps that a forecast looks at. Those are the
    state of the search, and one more computed step is one more round. A state (..., b, c) is kept at [c, ..., b + 1]:
    in place of a step that there is not yet stands 0.
    """

    def __init__(self, trace: Trace, forecaster: Forecaster, site: str, longest: int, forced: Sequence[int]) -> None:
        assert forecaster.memory is not None and forecaster.weights is not None
        self._steps, self._weights, self._repaid = len(trace), forecaster.weights, forecaster.repaid
        # A forecast from one value is one from two, of which it looks at the last.
        self._memory = max(forecaster.memory, 2)
        self._longest, self._forced = longest, forced
        self._gram, self._sizes = trace.gram(site), trace.reach
        # What the sampler has gone up to a step, as it is carried: its inner products with the values, and with itself.
        onward = torch.cumsum(self._sizes[:, None] * self._gram, 0)
        self._path_value = torch.cat((onward.new_zeros(1, self._steps), onward))  # [T + 1, T]
        both = torch.cumsum(self._path_value * self._sizes, 1)
        self._path_path = torch.cat((both.new_zeros(self._steps + 1, 1), both), 1)  # [T + 1, T + 1]
        self._gaps = [self._after(c) for c in range(self._steps)]

    def best(self, most: int) -> list[tuple[float, tuple[int, ...]]]:
        """Cost and steps of the best plan for every number of computed steps from 1 to `most`, where one fits."""
        steps = self._steps
        shape = (steps, *(steps + 1,) * (self._memory - 1))
        costs = torch.full(shape, math.inf, dtype=torch.float64)
        costs[(0,) * self._memory] = 0.0
        origins: list[Tensor] = []  # of every round: the step that the state before had and this one has not
        found = []
        for count in range(1, most + 1):
            cost, state = self._end(costs)
            if cost < math.inf:
                found.append((cost, self._path(origins, state)))
            if count < most:
                costs, origin = self._round(costs)
                origins.append(origin)
        return found

    def _round(self, costs: Tensor) -> tuple[Tensor, Tensor]:
        """With one more computed step."""
        following = torch.full_like(costs, math.inf)
        origins = torch.zeros_like(costs, dtype=torch.int16)
        for c in range(self._steps - 1):
            total = self._held(costs, c)[..., None] + self._gaps[c][..., :-1]
            least, origin = total.min(0)
            for into, made in ((following, least), (origins, origin)):
                # [d, ..., c + 1] from [..., d - c - 1]
                into[(slice(c + 1, None), *(slice(c + 1),) * (self._memory - 2), c + 1)] = made.movedim(-1, 0).to(into)
        return following, origins

    def _end(self, costs: Tensor) -> tuple[float, tuple[int, ...]]:
        """The least cost of all, and the state that it ends in."""
        best, state = math.inf, (0,) * self._memory
        for c in range(self._steps):
            total = self._held(costs, c) + self._gaps[c][..., -1]
            least = float(total.min())
            if least < best:
                place = torch.unravel_index(total.argmin(), total.shape)
                best, state = least, (*(int(index) for index in place), c + 1)
        return best, state

    def _held(self, costs: Tensor, c: int) -> Tensor:
        return costs[(c, *(slice(c + 1),) * (self._memory - 1))]

    def _path(self, origins: Sequence[Tensor], state: tuple[int, ...]) -> tuple[int, ...]:
        nodes = [state[-1] - 1]
        for origin in reversed(origins):
            state = (int(origin[(state[-1] - 1, *state[:-1])]), *state[:-1])
            nodes.append(state[-1] - 1)
        return tuple(reversed(nodes))

    def _after(self, c: int) -> Tensor:
        """What it costs to compute nothing after c, up to every later step and to the end: [c + 1, ..., T - c]."""
        gaps = torch.full((*(c + 1,) * (self._memory - 1), self._steps - c), math.inf, dtype=torch.float64)
        gaps[(0,) * (self._memory - 1)] = self._cost(torch.tensor([[c]]))[0]
        if c:
            earlier = torch.arange(c)
            pairs = torch.stack((earlier, torch.full_like(earlier, c)), -1)
            gaps[(0,) * (self._memory - 2)][1:] = self._cost(pairs)
        if c > 1 and self._memory > 2:
            a, b = torch.triu_indices(c, c, 1)
            gaps[a + 1, b + 1] = self._cost(torch.stack((a, b, torch.full_like(a, c)), -1))
        # A step that is forced is not passed over, nor more of them than are allowed.
        last = min([c + self._longest + 1, *(step for step in self._forced if step > c)])
        gaps[..., max(last - c, 0) :] = math.inf
        return gaps

    def _cost(self, nodes: Tensor) -> Tensor:
        """Of groups of nodes [n, m] with one last step: what it costs to compute nothing after it, [n, T - last].

        A gap that is repaid costs what is left of it, which is known one computed step later, and hangs on whether the
        step after that one is forecast. The last gap is not repaid.
        """
        if self._repaid is None:
            return self._after_nodes(nodes)
        last = int(nodes[0, -1])
        bare, left = self._before_last(nodes)
        cost = left[:, None].repeat(1, self._steps - last)
        cost[:, 0] = bare
        cost[:, -1] += self._after_nodes(nodes)[:, -1]
        return cost

    def _before_last(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Of groups of nodes [n, m] with one last step: squared norms of the errors before it, bare and repaid: [n]."""
        assert self._repaid is not None
        last, earlier = int(nodes[0, -1]), nodes[:, :-1]
        errors = torch.zeros(len(nodes), self._steps, dtype=torch.float64)
        if earlier.shape[1]:
            inside = torch.arange(last)
            sizes = self._sizes[:last] * (inside > earlier[:, -1:])
            errors[:, :last] = -sizes
            errors.scatter_add_(
                1,
                earlier,
                (self._weights(earlier[:, None].double(), inside.double(), self._steps) * sizes[..., None]).sum(1),
            )
        bare = ((errors @ self._gram) * errors).sum(-1).clamp(min=0)
        if last + 1 < self._steps:
            first = torch.tensor(last + 1.0, dtype=torch.float64)
            errors.scatter_add_(1, nodes, self._repaid(nodes.double(), first, self._steps) * self._sizes[last + 1])
        return bare, ((errors @ self._gram) * errors).sum(-1).clamp(min=0)

    def _after_nodes(self, nodes: Tensor) -> Tensor:
        """Of groups of nodes [n, m] with one last step: squared norms of all errors after it, [n, T - last]."""
        last = int(nodes[0, -1])
        inside = torch.arange(last + 1, self._steps)
        factors = self._weights(nodes[:, None].double(), inside.double(), self._steps)
        factors = factors.expand(len(nodes), len(inside), nodes.shape[1])
        summed = torch.cumsum(factors * self._sizes[last + 1 :, None], 1)
        summed = torch.cat((summed.new_zeros(len(nodes), 1, nodes.shape[1]), summed), 1)  # [n, T - last, m]
        start, ends = last + 1, torch.arange(last + 1, self._steps + 1)
        own = self._path_path[ends, ends] - 2 * self._path_path[ends, start] + self._path_path[start, start]
        mixed = (self._path_value[ends] - self._path_value[start])[:, nodes].movedim(0, 1)  # [n, T - last, m]
        gram = self._gram[nodes[:, :, None], nodes[:, None, :]]  # [n, m, m]
        return (own - 2 * (summed * mixed).sum(-1) + ((summed @ gram) * summed).sum(-1)).clamp(min=0)


def _forced(steps: int, always: Sequence[int]) -> set[int]:
    if not isinstance(always, Sequence):
        raise ArgumentTypeError(f"`always` must be a list of steps, got {type(always).__name__}.")
    if any(isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < steps for step in always):
        raise ArgumentError(f"`always` must hold steps from 0 to {steps - 1}, got {list(always)}.")
    return {0, *always}


def _afforded(steps: int, speedup: float, costs: tuple[float, float]) -> int:
    """How many steps may compute for a speed-up."""
    if not isinstance(costs, Sequence) or len(costs) != 2 or not all(map(_number, (*costs, speedup))):
        raise ArgumentTypeError(f"`speedup` must be a number and `costs` two, got {speedup!r} and {costs!r}.")
    if not 1 <= speedup < math.inf:
        raise ArgumentError(f"`speedup` must be at least 1, where every step computes, and finite, got {speedup!r}.")
    computing, skipping = costs
    if not computing > skipping >= 0:
        raise ArgumentError(f"`costs` must be of a computed step and, less, of one that is not, got {costs!r}.")
    most = steps * (computing / speedup - skipping) / (computing - skipping)
    if not most + 1e-9 >= 1:
        raise ArgumentError(
            f"`speedup` {speedup!r} is out of reach: with one step computed and costs {costs!r} it is "
            f"{steps * computing / (computing + (steps - 1) * skipping):.3g}."
        )
    return math.floor(most + 1e-9)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fitted(trace: Trace, timesteps: Sequence[float] | Tensor, resample: bool) -> Trace:
    """The trace of this trajectory."""
    times = trajectory(timesteps)
    if len(times) == len(trace) and torch.allclose(times, trace.timesteps, rtol=1e-4, atol=1e-4, equal_nan=True):
        return trace
    if not resample:
        raise ArgumentError(
            f"`timesteps` are {len(times)} steps, and the trace has {len(trace)}, or others. Record that trajectory; "
            "or resample=True interpolates between the steps of the trace."
        )
    return trace.resample(times)
