"""Extrapolate with finite-difference derivatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cachekit.forecasters._forecaster import Clock, Forecaster, check_order


class TaylorState(NamedTuple):
    """State of `taylor`."""

    factors: tuple[Tensor, ...]  # order + 1 times [...]: the value and its derivatives by step
    last: Tensor  # [] float32, step of the last update
    filled: Tensor  # [] float32, how many updates there were
    like: Tensor  # [0], carries the dtype of the values


torch.serialization.add_safe_globals([TaylorState])


def taylor(order: int = 1, *, dtype: torch.dtype | None = None) -> Forecaster:
    """The Taylor sum `sum_i f_i k^i / i!`, k steps after the last computed one.

    On a computed step `f_0 = x` and `f_{i+1} = (f_i - f_i_before) / (steps since the last computed one)`. A
    derivative that has not been seen yet contributes nothing. Order 0 is `hold`.

    Args:
        order: highest derivative, >= 0; order + 1 tensors of state a site.
        dtype: storage type of the factors, None for that of the value. The arithmetic is float32 or wider.

    Raises:
        ArgumentError: `order` is negative or no int.

    Source: TaylorSeer, arXiv 2503.06923, equations 4 to 6.
    """
    check_order(order, dtype)

    def init(value: Tensor) -> TaylorState:
        zero = torch.zeros((), dtype=torch.float32, device=value.device)
        factors = tuple(torch.zeros_like(value, dtype=dtype or value.dtype) for _ in range(order + 1))
        return TaylorState(factors=factors, last=zero, filled=zero.clone(), like=value.new_empty(0))

    def update(state: TaylorState, value: Tensor, now: Clock) -> TaylorState:
        wide = torch.promote_types(value.dtype, torch.float32)
        spacing = now.step - state.last
        factor, factors = value.to(wide), []
        for i, before in enumerate(state.factors):
            factors.append(factor.to(before.dtype))
            # Of i + 1 differences the last needs i + 1 updates before this one; until then it is no derivative.
            known = state.filled > i
            factor = torch.where(known, (factor - before.to(wide)) / torch.where(known, spacing, 1.0), 0.0)
        return TaylorState(
            factors=tuple(factors),
            last=now.step.to(torch.float32, copy=True),
            filled=state.filled + 1,
            like=state.like,
        )

    def predict(state: TaylorState, now: Clock) -> Tensor:
        first = state.factors[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        offset = (now.step - state.last).to(wide)
        total, power = first.to(wide), 1.0
        for i, factor in enumerate(state.factors[1:], 1):
            power = power * offset / i
            total = total + factor.to(wide) * power
        return total.to(state.like.dtype)

    return Forecaster(name=f"taylor {order}", init=init, update=update, predict=predict, timed=True)
