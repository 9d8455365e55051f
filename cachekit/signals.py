"""What a decider is shown: sums over tensors, which it divides itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import cachekit_kernels as kernels
import torch
from torch import Tensor

from cachekit.deciders import Sums


def change(value: Tensor, reference: Tensor) -> Sums:
    """`sum |value - reference|` over `sum |reference|`, float32: the relative L1 change.

    Shapes [...] alike, any floating dtype; two 0-d float32 sums.

    Source: FirstBlockCache in ParaAttention; TeaCache, arXiv 2411.19108, equation 4.
    """
    return Sums(*kernels.residual_change(value, reference))


def norm_ratio(value: Tensor, reference: Tensor) -> Sums:
    """`sum over tokens of ||value|| / ||reference||` over the number of tokens, float32.

    Shapes [..., D] alike. A token whose reference is zero counts as 1, so the first step of a trajectory gives
    1.

    Source: MagCache, arXiv 2506.09045, equation 3.
    """
    tokens = math.prod(value.shape[:-1])
    return Sums(kernels.norm_ratio(value, reference), torch.full((), tokens, dtype=torch.float32, device=value.device))


def of_residual(
    signal: Callable[[Tensor, Tensor], Sums], output: Tensor, base: Tensor, reference: Tensor
) -> tuple[Tensor, Sums]:
    """`output - base`, and what a signal makes of it: in one pass over memory for `change`.

    Shapes [...] alike.
    """
    if signal is change:
        residual, *sums = kernels.residual_norm(output, base, reference)
        return residual, Sums(*sums)
    residual = output - base
    return residual, signal(residual, reference)


def numbers(sums: Tensor) -> Sums:
    """The one host read of a step: both sums, [2], as Python numbers."""
    return Sums(*sums.tolist())
