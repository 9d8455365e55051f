"""Sums over a residual: what a decider is shown."""

from __future__ import annotations

from torch import Tensor

from cachekit_kernels import reference as plain
from cachekit_kernels._choice import kernels_for, same


def residual_norm(
    output: Tensor, base: Tensor, reference: Tensor, *, rows: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual of a block, and how it differs from a reference: one pass over memory.

    Args:
        output: [B, ...], what the block returned.
        base: [B, ...], what it was given.
        reference: [B, ...], an earlier residual.
        rows: sum over every row of the batch by itself.

    Returns:
        `r = output - base` in their dtype; `sum |r - reference|` and `sum |reference|`, float32, [] or [B].
        Deterministic; a NaN in any input is one in the sums that it belongs to.

    Raises:
        ValueError: shapes or devices differ.

    Example:
        >>> import torch
        >>> _, change, size = residual_norm(torch.ones(2, 3) * 3, torch.ones(2, 3), torch.ones(2, 3), rows=True)
        >>> (change / size).tolist()
        [1.0, 1.0]

    Source: the decision of FirstBlockCache, in ParaAttention.
    """
    same("residual_norm", output=output, base=base, reference=reference)
    kernels = kernels_for(output, base, reference)
    if kernels is None or output.dtype != base.dtype:
        return plain.residual_norm(output, base, reference, rows=rows)
    residual, sums = kernels.residual_norm(output, base, reference, rows)
    return residual, *_both(sums, output, rows)


def residual_change(residual: Tensor, reference: Tensor, *, rows: bool = False) -> tuple[Tensor, Tensor]:
    """The sums of `residual_norm` for a residual that is there already. Shapes [B, ...] alike."""
    same("residual_change", residual=residual, reference=reference)
    kernels = kernels_for(residual, reference, fusible=True)
    if kernels is None:
        return plain.residual_change(residual, reference, rows=rows)
    return _both(kernels.residual_change(residual, reference, rows), residual, rows)


def norm_ratio(residual: Tensor, reference: Tensor) -> Tensor:
    """`sum over tokens of ||residual|| / ||reference||`, float32 []: for the calibration of MagCache.

    Shapes [..., D] alike. A token whose reference is zero counts as 1.

    Source: MagCache, arXiv 2506.09045, equation 3.
    """
    same("norm_ratio", residual=residual, reference=reference)
    kernels = kernels_for(residual, reference, fusible=True)
    if kernels is None or not residual.ndim:
        return plain.norm_ratio(residual, reference)
    return kernels.norm_ratio(residual, reference)


def _both(sums: Tensor, tensor: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    change, size = sums.reshape(2, *(tensor.shape[:1] if rows else ()))
    return change, size
