"""Extrapolate with Newton's divided differences on the steps that were computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import cachekit_kernels as kernels
import torch
from torch import Tensor

from cachekit.forecasters._forecaster import Clock, Forecaster, check_order


class NewtonState(NamedTuple):
    """State of `newton`."""

    differences: tuple[Tensor, ...]  # `memory` times [...]: divided differences that end at the last value
    nodes: Tensor  # [memory] float32, the last computed steps, latest first
    filled: Tensor  # [] float32, how many updates there were
    like: Tensor  # [0], carries the dtype of the values


torch.serialization.add_safe_globals([NewtonState])


def newton(order: int = 1, *, repay: bool = False, dtype: torch.dtype | None = None) -> Forecaster:
    """The polynomial through the last `order + 1` computed values, on whatever steps they fell.

    Unlike `taylor` it reproduces every polynomial of degree <= order exactly, on any spacing. Until enough
    values have been seen it uses the polynomial through those there are. Order 0 is `hold`.

    A sampler adds up what it is given, and the forecasts of a gap err to the same side. Once the step after a gap has
    computed, the gap lies between values that are known, and what its forecasts were off can be told: with `repay` the
    next forecast has that on top, if the very next step is one. For values of degree <= order + 1 it is all that the
    gap was off. This is meant for the output of a model, `sites="output"`, and not for very few computed steps: what is
    owed after long gaps is itself a guess.

    Args:
        order: degree, >= 0; order + 1 tensors of state a site, one more with `repay`.
        repay: make up for what the last gap was off, as if all steps of the sampler were equally long.
        dtype: storage type of the differences, None for that of the value. The arithmetic is float32 or wider.

    Raises:
        ArgumentError: `order` is negative or no int.

    Example:
        >>> import torch, cachekit as ck
        >>> trace = ck.Trace.of([torch.tensor([step**2.0]) for step in range(10)], 10)
        >>> for repay in (False, True):
        ...     forecaster = ck.forecasters.newton(1, repay=repay)
        ...     policy = ck.step_mask([True, False] * 5, forecaster=forecaster, sites="output")
        ...     print(f"{ck.replay(trace, policy).error:.3f}")
        0.021
        0.011

    Source: error feedback, as arXiv 1901.09847 describes it for gradients that are sent rounded.
    """
    check_order(order, dtype)
    memory = order + 2 if repay else order + 1

    def init(value: Tensor) -> NewtonState:
        nodes = torch.zeros(memory, dtype=torch.float32, device=value.device)
        differences = tuple(torch.zeros_like(value, dtype=dtype or value.dtype) for _ in range(memory))
        return NewtonState(differences=differences, nodes=nodes, filled=nodes.new_zeros(()), like=value.new_empty(0))

    def update(state: NewtonState, value: Tensor, now: Clock, *, donate: bool = False) -> NewtonState:
        known = state.filled > torch.arange(memory - 1, device=value.device)
        spacings = torch.where(known, now.step - state.nodes[:-1], 0.0)
        return NewtonState(
            differences=tuple(kernels.newton_update(state.differences, value, spacings, donate=donate)),
            nodes=torch.cat((now.step.to(torch.float32).reshape(1), state.nodes[:-1])),
            filled=state.filled + 1,
            like=state.like,
        )

    def predict(state: NewtonState, now: Clock) -> Tensor:
        offsets = now.step - state.nodes
        if repay:
            offsets = _repaying(offsets, state.nodes, state.filled)
        return kernels.newton_predict(state.differences, offsets, dtype=state.like.dtype)

    def weights(nodes: Tensor, step: Tensor, steps: int) -> Tensor:
        near = nodes[..., -order - 1 :]  # Lagrange's form of the polynomial through these
        same = torch.eye(near.shape[-1], dtype=torch.bool)
        ahead, apart = step[..., None, None] - near[..., None, :], near[..., :, None] - near[..., None, :]
        made = torch.where(same, 1.0, ahead / apart).prod(-1)
        return torch.nn.functional.pad(made, (nodes.shape[-1] - made.shape[-1], 0))

    def repaid(nodes: Tensor, step: Tensor, steps: int) -> Tensor:
        near = nodes[..., -memory:]
        before, last, count = near[..., :-1], near[..., -1], near.shape[-1]
        if count == 1:
            return torch.zeros_like(nodes)
        inside = before[..., -1:] + torch.arange(1, steps)  # and beyond, which the mask leaves out
        # As `_owed`, which a graph can do: here the steps are known, and adding them up is quicker.
        owed = ((inside[..., None] - before[..., None, :]).prod(-1) * (inside < last[..., None])).sum(-1)
        owed = owed * (step == last + 1)
        apart = near[..., :, None] - near[..., None, :] + torch.eye(count, dtype=nodes.dtype)
        return torch.nn.functional.pad(owed[..., None] / apart.prod(-1), (nodes.shape[-1] - count, 0))

    return Forecaster(
        name=f"newton {order} repaid" if repay else f"newton {order}",
        init=init,
        update=update,
        predict=predict,
        timed=True,
        overwrite=functools.partial(update, donate=True),
        memory=memory,
        weights=weights,
        repaid=repaid if repay else None,
    )


def _repaying(offsets: Tensor, nodes: Tensor, filled: Tensor) -> Tensor:
    """Offsets of a polynomial that has what is owed on top: of as many differences one less is forecast with."""
    last = len(offsets) - 1
    factors, made = [torch.ones_like(filled)], []
    for i in range(1, last + 1):
        factor = factors[-1] * offsets[i - 1] if i < last else torch.zeros_like(filled)
        # The highest difference that is known is the one that the last gap was forecast without.
        highest = filled == i + 1 if i < last else filled > last
        owes = highest & (offsets[0] == 1)
        factors.append(factor + torch.where(owes, _owed(nodes[: i + 1].unbind()), 0.0))
        made.append(torch.where(factors[-2] == 0, 0.0, factors[-1] / factors[-2]))
    return torch.stack((*made, offsets[-1]))


def _owed(nodes: Sequence[Tensor]) -> Tensor:
    """How much of the difference over `nodes`, latest first, the gap after the last but one was forecast without.

    The sum of `(step - nodes[1]) (step - nodes[2]) ...` over the steps between `nodes[1]` and `nodes[0]`.
    """
    gap = nodes[0] - nodes[1]
    factors = [torch.ones_like(gap)]  # of the powers of `step - nodes[1]`
    for node in nodes[1:]:
        before, zero = nodes[1] - node, torch.zeros_like(gap)
        factors = [before * a + b for a, b in zip((*factors, zero), (zero, *factors), strict=True)]
    sums: list[Tensor] = []  # of the powers of 0, 1, ... below the gap, each from those below it
    for power in range(len(factors)):
        lower = sum((math.comb(power + 1, i) * total for i, total in enumerate(sums)), torch.zeros_like(gap))
        sums.append((gap ** (power + 1) - lower) / (power + 1))
    return torch.stack([factor * total for factor, total in zip(factors[1:], sums[1:], strict=True)]).sum()
