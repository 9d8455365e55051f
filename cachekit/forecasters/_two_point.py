"""Extrapolate from the two last values by a weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cachekit_kernels as kernels
import torch
from torch import Tensor

from cachekit.errors import ArgumentError
from cachekit.forecasters._forecaster import Clock, Forecaster


class TwoPointState(NamedTuple):
    """State of `two_point`."""

    value: Tensor  # [...], as last computed
    change: Tensor  # [...], to it from the one before; 0 until there are two
    last: Tensor  # [] float32, step of the last update
    filled: Tensor  # [] float32, how many updates there were


torch.serialization.add_safe_globals([TwoPointState])


def two_point(
    weight: float | str | Callable[[Tensor, Tensor], Any] = 0.5, *, feedback: bool = False, name: str | None = None
) -> Forecaster:
    """`x1 + weight * (x1 - x2)` from the last two computed values, however far they lie apart.

    Args:
        weight: a number; "ramp" for 0 at the first step, rising to 1 at the last; or a function of step and number
            of steps, both 0-d float32 tensors.
        feedback: take what was returned in between for the value before: x2 is then the last forecast, and
            forecasts in a row go on from each other. The weight must be a number.
        name: for tables.

    Raises:
        ArgumentError: `weight` is none of these.

    Source: FasterCache, arXiv 2410.19355, section 3.2; `feedback` as in the hooks of diffusers.
    """
    numeric = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not numeric and weight != "ramp" and not callable(weight):
        raise ArgumentError(f'`weight` must be a number, "ramp" or a function of (step, steps), got {weight!r}.')
    if numeric and not math.isfinite(weight):  # type: ignore[arg-type]
        raise ArgumentError(f"`weight` must be finite, got {weight!r}. 0 repeats the last value.")
    if feedback and not numeric:
        raise ArgumentError(f"`weight` must be a number with feedback=True, got {weight!r}.")

    def factor(now: Clock, skips: Tensor, wide: torch.dtype) -> Tensor:
        if weight == "ramp":
            return now.step / (now.steps - 1).clamp(min=1)
        given: Any = weight(now.step, now.steps) if callable(weight) else weight
        share = given if isinstance(given, Tensor) else torch.full_like(skips, given, dtype=wide)
        if not feedback:
            return share
        # Of forecasts that go on from each other each adds `weight` times what the one before added.
        return torch.where(share == 1, skips, share * (1 - share**skips) / torch.where(share == 1, 1.0, 1 - share))

    def forecast(state: TwoPointState, skips: Tensor, now: Clock) -> Tensor:
        wide = torch.promote_types(state.value.dtype, torch.float32)
        return kernels.taylor_predict((state.value, state.change), factor(now, skips, wide))

    def init(value: Tensor) -> TwoPointState:
        zero = torch.zeros((), dtype=torch.float32, device=value.device)
        return TwoPointState(torch.zeros_like(value), torch.zeros_like(value), zero, zero.clone())

    def update(state: TwoPointState, value: Tensor, now: Clock, *, donate: bool = False) -> TwoPointState:
        # At the first value there was no forecast before: 0 ** -1 would be infinite.
        before = forecast(state, (now.step - state.last - 1).clamp(min=0), now) if feedback else state.value
        known = torch.where(state.filled > 0, 1.0, 0.0)
        if donate and feedback:
            before = state.value.copy_(before)
        latest, change = kernels.taylor_update((before, state.change), value, known, donate=donate)
        return TwoPointState(latest, change, now.step.to(torch.float32, copy=True), state.filled + 1)

    def predict(state: TwoPointState, now: Clock) -> Tensor:
        return forecast(state, now.step - state.last, now)

    def weights(nodes: Tensor, step: Tensor, steps: int) -> Tensor:
        # What update and predict do, to the factors of the values instead of to a value.
        same = torch.eye(nodes.shape[-1], dtype=nodes.dtype)
        before = change = torch.zeros_like(nodes)
        for n in range(nodes.shape[-1]):
            if feedback and n:
                before = before + _each(nodes[..., n], nodes[..., n] - nodes[..., n - 1] - 1, steps) * change
            change = same[n] - before if n else change
            before = same[n].expand_as(nodes)
        return before + _each(step, step - nodes[..., -1], steps) * change

    def _each(step: Tensor, skips: Tensor, steps: int) -> Tensor:
        total = torch.tensor(float(steps), dtype=step.dtype)
        if callable(weight):  # it knows single steps only
            shares = {
                now: float(weight(torch.tensor(now), torch.tensor(float(steps))))
                for now in set(step.flatten().tolist())
            }
            made = torch.tensor([shares[now] for now in step.flatten().tolist()], dtype=step.dtype).reshape(step.shape)
        else:
            made = factor(Clock(step, total), skips, step.dtype)
        return made[..., None]

    shown = weight if isinstance(weight, str) else "of the step" if callable(weight) else _short(weight)

    return Forecaster(
        name=name or f"two-point {shown}",
        init=init,
        update=update,
        predict=predict,
        timed=True,
        overwrite=functools.partial(update, donate=True),
        memory=None if feedback else 2,
        weights=weights,
    )


def _short(number: float) -> str:
    short = f"{number:g}"
    return short if float(short) == number else repr(number)
