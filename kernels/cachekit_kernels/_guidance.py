"""What stands in for what was left out."""

from __future__ import annotations

from torch import Tensor

from cachekit_kernels import reference as plain
from cachekit_kernels._choice import kernels_for, same


def guidance_delta(cond: Tensor, low: Tensor, high: Tensor, weights: Tensor, *, cond_first: bool = False) -> Tensor:
    """`u = cond + weights_0 low + weights_1 high` and `cond`, written as one batch.

    Args:
        cond: [B, ...], the conditional half.
        low: [B, ...] float32, low frequencies of what the unconditional half adds to it.
        high: [B, ...] float32, the high ones.
        weights: [2] float32 on the same device.
        cond_first: whether the batch is `[cond, u]`; else `[u, cond]`.

    Returns:
        [2 B, ...] in the dtype of `cond`.

    Raises:
        ValueError: shapes or devices differ.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 2)
        >>> guidance_delta(one, one, one, torch.tensor([0.5, 0.25]))
        tensor([[1.7500, 1.7500],
                [1.0000, 1.0000]])

    Source: FasterCache, arXiv 2410.19355, section 3.3.
    """
    same("guidance_delta", cond=cond, low=low, high=high)
    if tuple(weights.shape) != (2,):
        raise ValueError(f"guidance_delta: `weights` is {list(weights.shape)}. Give the two of them: [2].")
    kernels = kernels_for(cond, low, high, fusible=True)
    if kernels is None or not cond.ndim:
        return plain.guidance_delta(cond, low, high, weights, cond_first=cond_first)
    return kernels.guidance_delta(cond, low, high, weights, cond_first)
