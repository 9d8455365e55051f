"""The best steps to compute, found on a trace by dynamic programming."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from cachekit.errors import ArgumentError
from cachekit.forecasters import Forecaster, newton
from cachekit.planning.trace import Trace

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Which steps compute, and what it was planned for."""

    computed: tuple[int, ...]  # ascending, from 0
    steps: int  # of the trajectory
    forecaster: str  # name
    cost: float  # what was minimised, in units of the norm of all that the sampler goes
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps({"version": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")


def plan(
    trace: Trace,
    *,
    computed: int,
    forecaster: Forecaster | None = None,
    max_gap: int | None = None,
    always: Sequence[int] = (0,),
) -> Plan:
    """The `computed` steps that make the least of the forecast errors, summed over gaps.

    Between two computed steps the errors add up, each as far as the sampler goes with it; the norms of these sums are
    added. Of all plans it is the best for that measure.

    Args:
        trace: of an uncached run.
        computed: how many steps compute, step 0 among them.
        forecaster: what stands in; None for `newton(1)`.
        max_gap: steps in a row at most that are not computed.
        always: steps that compute in any case.

    Raises:
        ArgumentError: a value is out of range, or no plan fits.

    Example:
        >>> import torch
        >>> values = [torch.tensor([float(step**3)]) for step in range(8)]
        >>> plan(Trace.of(values, range(8)), computed=5).computed
        (0, 1, 3, 5, 7)
    """
    forecaster = forecaster or newton(1)
    steps = len(trace)
    forced = {0, *always}
    _check(steps, computed, forecaster, max_gap, forced)
    memory = forecaster.memory or 1
    gaps = _Gaps(trace, forecaster, max_gap, forced)
    # best[nodes]: the least cost of all before the last node, for every tuple of last computed nodes.
    best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,): (0.0, (0,))}
    for left in range(computed - 1, 0, -1):
        following: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for nodes, (cost, path) in best.items():
            costs = gaps.after(nodes)
            for after in range(nodes[-1] + 1, min(nodes[-1] + len(costs), steps - left) + 1):
                total = cost + costs[after - nodes[-1] - 1]
                key = (*nodes, after)[-memory:]
                if total < following.get(key, (float("inf"),))[0]:
                    following[key] = total, (*path, after)
        best = following
    ends = []
    for nodes, (cost, path) in best.items():
        costs = gaps.after(nodes)
        if len(costs) >= steps - nodes[-1]:
            ends.append((cost + costs[steps - nodes[-1] - 1], path))
    if not ends or min(ends)[0] == float("inf"):
        raise ArgumentError(
            f"No {computed} of {steps} steps fit `max_gap={max_gap}` and `always={sorted(forced)}`. Compute more, or "
            "allow longer gaps."
        )
    cost, path = min(ends)
    whole = float(trace.error(trace.sizes[None])[0])
    return Plan(path, steps, forecaster.name, cost / whole if whole else cost)


class _Gaps:
    """What it costs to compute nothing between two nodes."""

    def __init__(self, trace: Trace, forecaster: Forecaster, max_gap: int | None, forced: set[int]) -> None:
        self._steps = len(trace)
        self._forecaster = forecaster
        self._longest = self._steps if max_gap is None else max_gap
        self._forced = sorted(forced)
        self._sizes = trace.sizes
        self._gram = trace.gram
        # Inner products with what the sampler has gone up to a step: of the values, and of itself.
        onward = torch.cumsum(trace.sizes[:, None] * trace.gram, 0)
        self._path_value = torch.cat((onward.new_zeros(1, self._steps), onward))  # [T + 1, T]
        both = torch.cumsum(self._path_value * trace.sizes, 1)
        self._path_path = torch.cat((both.new_zeros(self._steps + 1, 1), both), 1)  # [T + 1, T + 1]
        self._known: dict[tuple[int, ...], list[float]] = {}

    def after(self, nodes: tuple[int, ...]) -> list[float]:
        """For every next node, from the one after the last up to the end: the norm of the errors in between."""
        if nodes not in self._known:
            self._known[nodes] = self._costs(nodes)
        return self._known[nodes]

    def _costs(self, nodes: tuple[int, ...]) -> list[float]:
        last = nodes[-1]
        end = min([last + self._longest + 1, self._steps, *(step for step in self._forced if step > last)])
        inside = range(last + 1, end)
        weights = self._forecaster.weights
        assert weights is not None
        factors = [weights(nodes, step, self._steps) for step in inside]
        rows = torch.tensor(factors, dtype=torch.float64).reshape(len(factors), len(nodes))
        summed = torch.cumsum(rows * self._sizes[last + 1 : end, None], 0)
        summed = torch.cat((summed.new_zeros(1, len(nodes)), summed))  # [gaps, nodes]
        ends = torch.arange(last + 1, end + 1)
        start = last + 1
        own = self._path_path[ends, ends] - 2 * self._path_path[ends, start] + self._path_path[start, start]
        mixed = (self._path_value[ends] - self._path_value[start])[:, list(nodes)]
        gram = self._gram[list(nodes)][:, list(nodes)]
        square = own - 2 * (summed * mixed).sum(1) + torch.einsum("gi,ij,gj->g", summed, gram, summed)
        return square.clamp(min=0).sqrt().tolist()


def brute_force(trace: Trace, *, computed: int, forecaster: Forecaster) -> tuple[float, tuple[int, ...]]:
    """The same by trying every plan: for the tests."""
    gaps = _Gaps(trace, forecaster, None, {0})
    memory, steps = forecaster.memory or 1, len(trace)
    found = []
    for rest in itertools.combinations(range(1, steps), computed - 1):
        nodes, cost = (0, *rest), 0.0
        for n, node in enumerate(nodes):
            after = nodes[n + 1] if n + 1 < len(nodes) else steps
            cost += gaps.after(nodes[max(0, n + 1 - memory) : n + 1])[after - node - 1]
        found.append((cost, nodes))
    return min(found)


def _check(steps: int, computed: int, forecaster: Forecaster, max_gap: int | None, forced: set[int]) -> None:
    if isinstance(computed, bool) or not isinstance(computed, int) or not len(forced) <= computed <= steps:
        raise ArgumentError(f"`computed` must be an int from {len(forced)} to {steps}, got {computed!r}.")
    if forecaster.weights is None or forecaster.memory is None:
        raise ArgumentError(
            f"`forecaster` {forecaster.name!r} cannot be planned with: it is no fixed combination of the last few "
            "computed values. Use hold(), taylor(k), newton(k) or two_point(w)."
        )
    if max_gap is not None and (isinstance(max_gap, bool) or not isinstance(max_gap, int) or max_gap < 0):
        raise ArgumentError(f"`max_gap` must be an int >= 0 or None, got {max_gap!r}.")
    if any(isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < steps for step in forced):
        raise ArgumentError(f"`always` must hold steps from 0 to {steps - 1}, got {sorted(forced)}.")


__all__ = ["Plan", "Tensor", "plan"]
