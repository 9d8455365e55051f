"""What every kernel computes, in plain PyTorch: for tests, for the benchmarks, and where there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def residual_norm(
    output: Tensor, base: Tensor, reference: Tensor, *, rows: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`r = output - base`, `sum |r - reference|`, `sum |reference|`."""
    residual = output - base
    return residual, *residual_change(residual, reference, rows=rows)


def residual_change(residual: Tensor, reference: Tensor, *, rows: bool = False) -> tuple[Tensor, Tensor]:
    """The two sums of `residual_norm` for a residual that is there already."""
    dims = tuple(range(1, residual.ndim)) if rows else tuple(range(residual.ndim))
    residual, reference = residual.float(), reference.float()
    change, size = (residual - reference).abs(), reference.abs()
    return (change.sum(dims), size.sum(dims)) if dims else (change, size)


def norm_ratio(residual: Tensor, reference: Tensor) -> Tensor:
    """`sum over tokens of ||residual|| / ||reference||`; a finite token whose reference is zero counts as 1."""
    norm = torch.linalg.vector_norm(residual.float(), dim=-1)
    before = torch.linalg.vector_norm(reference.float(), dim=-1)
    known = before != 0
    return torch.where(known, norm / torch.where(known, before, 1.0), torch.where(norm < torch.inf, 1.0, norm)).sum()


def taylor_update(factors: Sequence[Tensor], value: Tensor, spacing: Tensor) -> list[Tensor]:
    """`f_0 = value`, `f_{i+1} = (f_i - f_i before) / spacing_i`, and 0 where that spacing is 0."""
    spacings = spacing.expand(len(factors)) if spacing.ndim == 0 else spacing
    wide = torch.promote_types(value.dtype, torch.float32)
    factor, made = value.to(wide), []
    for i, before in enumerate(factors):
        made.append(factor.to(before.dtype))
        if i + 1 < len(factors):
            # Without a spacing there is no difference: dividing by infinity says so in no pass of its own.
            factor = (factor - before.to(wide)) / torch.where(spacings[i] != 0, spacings[i], torch.inf)
    return made


newton_update = taylor_update


def taylor_predict(factors: Sequence[Tensor], offset: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """`sum_i f_i offset^i / i!`."""
    wide = torch.promote_types(factors[0].dtype, torch.float32)
    total, power = factors[0].to(wide), 1.0
    for i, factor in enumerate(factors[1:], 1):
        power = power * offset.to(wide) / i
        total = torch.addcmul(total, factor.to(wide), power)
    return total.to(dtype or factors[0].dtype)


def newton_predict(differences: Sequence[Tensor], offsets: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """`sum_i d_i offsets_0 ... offsets_{i-1}`."""
    wide = torch.promote_types(differences[0].dtype, torch.float32)
    total, product = differences[0].to(wide), 1.0
    for i, difference in enumerate(differences[1:]):
        product = product * offsets[i].to(wide)
        total = torch.addcmul(total, difference.to(wide), product)
    return total.to(dtype or differences[0].dtype)


def guidance_delta(cond: Tensor, low: Tensor, high: Tensor, weights: Tensor, *, cond_first: bool = False) -> Tensor:
    """`u = cond + weights_0 low + weights_1 high`, as the batch `[u, cond]` or `[cond, u]`."""
    uncond = (cond.float() + weights[0] * low + weights[1] * high).to(cond.dtype)
    return torch.cat((cond, uncond) if cond_first else (uncond, cond))
