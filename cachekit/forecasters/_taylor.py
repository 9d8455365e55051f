"""Extrapolate with finite-difference derivatives."""

from __future__ import annotations

import functools
from typing import NamedTuple

import cachekit_kernels as kernels
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

    def update(state: TaylorState, value: Tensor, now: Clock, *, donate: bool = False) -> TaylorState:
        # Of i + 1 differences the last needs i + 1 updates before this one; until then it is no derivative.
        known = state.filled > torch.arange(order, device=value.device)
        spacing = torch.where(known, now.step - state.last, 0.0)
        return TaylorState(
            factors=tuple(kernels.taylor_update(state.factors, value, spacing, donate=donate)),
            last=now.step.to(torch.float32, copy=True),
            filled=state.filled + 1,
            like=state.like,
        )

    def predict(state: TaylorState, now: Clock) -> Tensor:
        return kernels.taylor_predict(state.factors, now.step - state.last, dtype=state.like.dtype)

    def weights(nodes: Tensor, step: Tensor, steps: int) -> Tensor:
        near = nodes[..., -order - 1 :]
        count = near.shape[-1]
        # Every derivative at every node, in terms of the values at all of them.
        rows = torch.eye(count, dtype=nodes.dtype).expand(*torch.broadcast_shapes(near.shape[:-1], step.shape), -1, -1)
        made, scale = rows[..., -1, :], torch.ones_like(step)
        for i in range(1, count):
            rows = (rows[..., 1:, :] - rows[..., :-1, :]) / (near[..., i:] - near[..., i - 1 : -1])[..., None]
            scale = scale * (step - near[..., -1]) / i
            made = made + scale[..., None] * rows[..., -1, :]
        return torch.nn.functional.pad(made, (nodes.shape[-1] - count, 0))

    return Forecaster(
        name=f"taylor {order}",
        init=init,
        update=update,
        predict=predict,
        timed=True,
        overwrite=functools.partial(update, donate=True),
        memory=order + 1,
        weights=weights,
    )
