"""What a step computes beside the model: in one place, and a whole site at a time, so that it can be fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from cachekit.running.programs import compiled_with, fresh
from cachekit.signals import of_residual

if TYPE_CHECKING:
    from cachekit.policy import Policy


class Arithmetic(NamedTuple):
    """Of one policy. `states` are those of a site, one a tensor that it returns; `now` is what forecasters look at."""

    measure: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Sequence[Tensor]]]
    """`(output, base, reference) -> (output - base, signal)`: of the probe."""
    observe: Callable[[Tensor, Any, Any], Sequence[Tensor]]
    """`(value, state, now) -> signal` against the forecast, for a policy that only logs."""
    update: Callable[[tuple[Any, ...], list[Tensor], Any], tuple[Any, ...]]
    """`(states, values, now) -> states`."""
    overwrite: Callable[[tuple[Any, ...], list[Tensor], Any], tuple[Any, ...]]
    """The same, for states that were given away."""
    predict: Callable[[tuple[Any, ...], Any], list[Tensor]]
    """`(states, now) -> values`."""
    add: Callable[[list[Tensor], tuple[Any, ...], Any], list[Tensor]]
    """`(bases, states, now) -> bases + values`."""

    def compiled(self, options: dict[str, Any]) -> Arithmetic:
        """The same, each function compiled for every kind of site that it meets."""
        # Not `fullgraph`: past the compiler's limit of kinds (numbers of tensors, ranks, grad modes) it runs as it is.
        options = {**options, "fullgraph": False}
        return Arithmetic(*(compiled_with(fresh(function), options) for function in self))


def arithmetic(policy: Policy) -> Arithmetic:
    """What this policy computes."""
    forecaster = policy.forecaster
    signal: Any = policy.signal  # asked only where there is one

    def measure(output, base, reference):
        return of_residual(signal, output, base, reference)

    def observe(value, state, now):
        return tuple(signal(value, forecaster.predict(state, now)))

    def update(states, values, now):
        return tuple(forecaster.update(state, value, now) for state, value in zip(states, values, strict=True))

    def overwrite(states, values, now):
        write = forecaster.overwrite or forecaster.update
        return tuple(write(state, value, now) for state, value in zip(states, values, strict=True))

    def predict(states, now):
        return [forecaster.predict(state, now) for state in states]

    def add(bases, states, now):
        # One addition is one pass over memory whoever does it.
        return [base + value for base, value in zip(bases, predict(states, now), strict=True)]

    return Arithmetic(measure, observe, update, overwrite, predict, add)
