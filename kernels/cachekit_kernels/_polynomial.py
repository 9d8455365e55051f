"""Divided differences and the polynomials through them: what `taylor` and `newton` keep and add up.

Both are one recurrence. Taylor divides every difference by the steps since the last computed one, Newton the i-th by
those since the i-th last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cachekit_kernels import reference as plain
from cachekit_kernels._choice import DTYPES, kernels_for, same

MOST = 3  # highest order with a kernel: a kernel has as many arguments as tensors


def taylor_update(factors: Sequence[Tensor], value: Tensor, spacing: Tensor, *, donate: bool = False) -> list[Tensor]:
    """The value and its derivatives after one more computed step: all orders in one pass over memory.

    `f_0 = value` and `f_{i+1} = (f_i - f_i before) / spacing`, in float32, kept in the dtype of the factors.

    Args:
        factors: order + 1 tensors [...], those before.
        value: [...], just computed.
        spacing: [] or [order] float32 on the device of the value: steps since the last update. Where it is 0 there is
            no such derivative yet, and the factor of a finite value is 0.
        donate: write over `factors` and return them.

    Returns:
        order + 1 tensors like `factors`.

    Raises:
        ValueError: shapes or devices differ.

    Example:
        >>> import torch
        >>> before = [torch.tensor([1.0]), torch.tensor([0.0])]
        >>> [f.item() for f in taylor_update(before, torch.tensor([7.0]), torch.tensor(3.0))]
        [7.0, 2.0]

    Source: TaylorSeer, arXiv 2503.06923, equation 6.
    """
    same("update", value=value, **{f"factors[{i}]": factor for i, factor in enumerate(factors)})
    _enough("spacing", spacing, len(factors) - 1)
    alike = all(factor.is_contiguous() and factor.dtype == factors[0].dtype for factor in factors)
    kernels = kernels_for(value, *factors, fusible=True)
    if kernels is None or len(factors) > MOST + 1 or not alike:
        made = plain.taylor_update(factors, value, spacing)
        if not donate:
            return made
        for old, new in zip(factors, made, strict=True):
            old.copy_(new)
    elif donate:
        kernels.differences_(list(factors), value, spacing)
    else:
        return kernels.differences(list(factors), value, spacing)
    return list(factors)


def newton_update(
    differences: Sequence[Tensor], value: Tensor, spacing: Tensor, *, donate: bool = False
) -> list[Tensor]:
    """The divided differences that end at a new value.

    As `taylor_update`, with `spacing` [order]: steps since the last update, the one before it, and so on.
    """
    return taylor_update(differences, value, spacing, donate=donate)


def taylor_predict(factors: Sequence[Tensor], offset: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """`sum_i f_i offset^i / i!`: all orders in one pass over memory, added in float32.

    Args:
        factors: order + 1 tensors [...].
        offset: [] float32 on their device: steps since the last update.
        dtype: of the result, None for that of the factors.

    Example:
        >>> import torch
        >>> taylor_predict([torch.tensor([7.0]), torch.tensor([2.0])], torch.tensor(3.0))
        tensor([13.])

    Source: TaylorSeer, arXiv 2503.06923, equation 5.
    """
    kernels = _kernels_for(factors, offset, 0, dtype)
    if kernels is None:
        return plain.taylor_predict(factors, offset, dtype=dtype)
    return kernels.polynomial(list(factors), offset, dtype or factors[0].dtype, True)


def newton_predict(differences: Sequence[Tensor], offsets: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """`sum_i d_i offsets_0 ... offsets_{i-1}`.

    As `taylor_predict`, with `offsets` [order] or more: steps since the last update, the one before it, and so on.
    """
    kernels = _kernels_for(differences, offsets, 1, dtype)
    if kernels is None:
        return plain.newton_predict(differences, offsets, dtype=dtype)
    return kernels.polynomial(list(differences), offsets, dtype or differences[0].dtype, False)


def _enough(name: str, steps: Tensor, order: int) -> None:
    """A kernel does not see where its arguments end."""
    if steps.ndim and (steps.ndim > 1 or len(steps) < order):
        raise ValueError(f"`{name}` is {list(steps.shape)}, and there are {order} of them to know: give [{order}].")


def _kernels_for(factors: Sequence[Tensor], offset: Tensor, ndim: int, dtype: torch.dtype | None) -> Any:
    same("predict", **{f"factors[{i}]": factor for i, factor in enumerate(factors)})
    _enough("offsets", offset, len(factors) - 1)
    fits = offset.ndim == ndim and offset.device == factors[0].device and len(factors) <= MOST + 1
    return kernels_for(*factors, fusible=True) if fits and dtype in (None, *DTYPES) else None
