"""Extrapolate with Newton's divided differences on the steps that were computed."""

from __future__ import annotations

import functools
from typing import NamedTuple

import cachekit_kernels as kernels
import torch
from torch import Tensor

from cachekit.forecasters._forecaster import Clock, Forecaster, check_order


class NewtonState(NamedTuple):
    """State of `newton`."""

    differences: tuple[Tensor, ...]  # order + 1 times [...]: divided differences that end at the last value
    nodes: Tensor  # [order + 1] float32, the last computed steps, latest first
    filled: Tensor  # [] float32, how many updates there were
    like: Tensor  # [0], carries the dtype of the values


torch.serialization.add_safe_globals([NewtonState])


def newton(order: int = 1, *, dtype: torch.dtype | None = None) -> Forecaster:
    """The polynomial through the last `order + 1` computed values, on whatever steps they fell.

    Unlike `taylor` it reproduces every polynomial of degree <= order exactly, on any spacing. Until enough
    values have been seen it uses the polynomial through those there are. Order 0 is `hold`.

    Args:
        order: degree, >= 0; order + 1 tensors of state a site.
        dtype: storage type of the differences, None for that of the value. The arithmetic is float32 or wider.

    Raises:
        ArgumentError: `order` is negative or no int.
    """
    check_order(order, dtype)

    def init(value: Tensor) -> NewtonState:
        nodes = torch.zeros(order + 1, dtype=torch.float32, device=value.device)
        differences = tuple(torch.zeros_like(value, dtype=dtype or value.dtype) for _ in range(order + 1))
        return NewtonState(differences=differences, nodes=nodes, filled=nodes.new_zeros(()), like=value.new_empty(0))

    def update(state: NewtonState, value: Tensor, now: Clock, *, donate: bool = False) -> NewtonState:
        known = state.filled > torch.arange(order, device=value.device)
        spacings = torch.where(known, now.step - state.nodes[:-1], 0.0)
        return NewtonState(
            differences=tuple(kernels.newton_update(state.differences, value, spacings, donate=donate)),
            nodes=torch.cat((now.step.to(torch.float32).reshape(1), state.nodes[:-1])),
            filled=state.filled + 1,
            like=state.like,
        )

    def predict(state: NewtonState, now: Clock) -> Tensor:
        return kernels.newton_predict(state.differences, now.step - state.nodes, dtype=state.like.dtype)

    def weights(nodes: Tensor, step: Tensor, steps: int) -> Tensor:
        near = nodes[..., -order - 1 :]  # Lagrange's form of the polynomial through these
        same = torch.eye(near.shape[-1], dtype=torch.bool)
        ahead, apart = step[..., None, None] - near[..., None, :], near[..., :, None] - near[..., None, :]
        made = torch.where(same, 1.0, ahead / apart).prod(-1)
        return torch.nn.functional.pad(made, (nodes.shape[-1] - made.shape[-1], 0))

    return Forecaster(
        name=f"newton {order}",
        init=init,
        update=update,
        predict=predict,
        timed=True,
        overwrite=functools.partial(update, donate=True),
        memory=order + 1,
        weights=weights,
    )
