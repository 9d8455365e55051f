"""What a decider is shown: sums over tensors, which it divides itself."""

from __future__ import annotations

import torch
from torch import Tensor

from cachekit.deciders import Sums


def change(value: Tensor, reference: Tensor) -> Sums:
    """`sum |value - reference|` over `sum |reference|`, float32: the relative L1 change.

    Shapes [...] alike, any floating dtype; two 0-d float32 sums.

    Source: FirstBlockCache in ParaAttention; TeaCache, arXiv 2411.19108, equation 4.
    """
    value, reference = value.float(), reference.float()
    return Sums((value - reference).abs().sum(), reference.abs().sum())


def norm_ratio(value: Tensor, reference: Tensor) -> Sums:
    """`sum over tokens of ||value|| / ||reference||` over the number of tokens, float32.

    Shapes [..., D] alike. A token whose reference is zero counts as 1, so the first step of a trajectory gives
    1.

    Source: MagCache, arXiv 2506.09045, equation 3.
    """
    norm = torch.linalg.vector_norm(value.float(), dim=-1)
    before = torch.linalg.vector_norm(reference.float(), dim=-1)
    known = before != 0  # a NaN stays one
    ratios = torch.where(known, norm / torch.where(known, before, 1.0), 1.0)
    return Sums(ratios.sum(), torch.ones_like(ratios).sum())


def numbers(sums: Tensor) -> Sums:
    """The one host read of a step: both sums, [2], as Python numbers."""
    return Sums(*sums.tolist())
