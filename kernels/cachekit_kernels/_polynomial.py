"""Divided differences and the polynomials through them: what `taylor` and `newton` keep and add up.

Both are one recurrence. Taylor divides every difference by the steps since the last computed one, Newton the i-th by
those since the i-th last.
"""

# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cachekit_kernels import reference as plain
from cachekit_kernels._operator import DTYPES, jit, launch_each, loaded, operator, rounded, runs_on, same, tl

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
    if not runs_on(value, *factors, fusible=True) or len(factors) > MOST + 1 or not alike:
        made = plain.taylor_update(factors, value, spacing)
        if not donate:
            return made
        for old, new in zip(factors, made, strict=True):
            old.copy_(new)
    elif donate:
        _differences_(list(factors), value, spacing)
    else:
        return _differences(list(factors), value, spacing)
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
    if not _fits(factors, offset, 0, dtype):
        return plain.taylor_predict(factors, offset, dtype=dtype)
    return _polynomial(list(factors), offset, dtype or factors[0].dtype, True)


def newton_predict(differences: Sequence[Tensor], offsets: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """`sum_i d_i offsets_0 ... offsets_{i-1}`.

    As `taylor_predict`, with `offsets` [order] or more: steps since the last update, the one before it, and so on.
    """
    if not _fits(differences, offsets, 1, dtype):
        return plain.newton_predict(differences, offsets, dtype=dtype)
    return _polynomial(list(differences), offsets, dtype or differences[0].dtype, False)


def _enough(name: str, steps: Tensor, order: int) -> None:
    """A kernel does not see where its arguments end."""
    if steps.ndim and (steps.ndim > 1 or len(steps) < order):
        raise ValueError(f"`{name}` is {list(steps.shape)}, and there are {order} of them to know: give [{order}].")


def _fits(factors: Sequence[Tensor], offset: Tensor, ndim: int, dtype: torch.dtype | None) -> bool:
    same("predict", **{f"factors[{i}]": factor for i, factor in enumerate(factors)})
    _enough("offsets", offset, len(factors) - 1)
    if offset.ndim != ndim or offset.device != factors[0].device:
        return False
    return dtype in (None, *DTYPES) and runs_on(*factors, fusible=True) and len(factors) <= MOST + 1


def _fake_differences(factors: list[Tensor], value: Tensor, spacing: Tensor) -> list[Tensor]:
    return [torch.empty_like(factor) for factor in factors]


@operator("differences", _fake_differences)
def _differences(factors: list[Tensor], value: Tensor, spacing: Tensor) -> list[Tensor]:
    made = [torch.empty_like(factor) for factor in factors]
    _update(factors, made, value, spacing)
    return made


def _fake_differences_(factors: list[Tensor], value: Tensor, spacing: Tensor) -> None:
    return None


@operator("differences_", _fake_differences_, mutates=["factors"])
def _differences_(factors: list[Tensor], value: Tensor, spacing: Tensor) -> None:
    _update(factors, factors, value, spacing)


def _update(factors: list[Tensor], made: list[Tensor], value: Tensor, spacing: Tensor) -> None:
    launch_each(
        _update_kernel,
        value.numel(),
        value.contiguous(),
        *_padded(factors),
        *_padded(made),
        spacing.contiguous(),
        ORDER=len(factors) - 1,
        STRIDE=spacing.ndim,
    )


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    """As many as the kernel has arguments for; it does not look at those beyond the order."""
    return tensors + [tensors[0]] * (MOST + 1 - len(tensors))


@jit
def _update_kernel(
    value_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    a3_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    b3_ptr,
    spacing_ptr,
    size,
    ORDER: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = at < size
    # Everything is read before anything is written: a and b may be the same memory.
    factor = loaded(value_ptr, at, kept)
    if ORDER >= 1:
        a0 = loaded(a0_ptr, at, kept)
    if ORDER >= 2:
        a1 = loaded(a1_ptr, at, kept)
    if ORDER >= 3:
        a2 = loaded(a2_ptr, at, kept)
    tl.store(b0_ptr + at, rounded(factor, b0_ptr), mask=kept)
    if ORDER >= 1:
        factor = _difference(factor, a0, tl.load(spacing_ptr))
        tl.store(b1_ptr + at, rounded(factor, b1_ptr), mask=kept)
    if ORDER >= 2:
        factor = _difference(factor, a1, tl.load(spacing_ptr + STRIDE))
        tl.store(b2_ptr + at, rounded(factor, b2_ptr), mask=kept)
    if ORDER >= 3:
        factor = _difference(factor, a2, tl.load(spacing_ptr + 2 * STRIDE))
        tl.store(b3_ptr + at, rounded(factor, b3_ptr), mask=kept)


@jit
def _difference(factor, before, spacing):
    return (factor - before) / tl.where(spacing != 0, spacing, float("inf"))


def _fake_polynomial(factors: list[Tensor], offsets: Tensor, dtype: torch.dtype, factorial: bool) -> Tensor:
    return torch.empty_like(factors[0], dtype=dtype, memory_format=torch.contiguous_format)


@operator("polynomial", _fake_polynomial)
def _polynomial(factors: list[Tensor], offsets: Tensor, dtype: torch.dtype, factorial: bool) -> Tensor:
    total = torch.empty_like(factors[0], dtype=dtype, memory_format=torch.contiguous_format)
    launch_each(
        _predict_kernel,
        total.numel(),
        *_padded([factor.contiguous() for factor in factors]),
        total,
        offsets.contiguous(),
        ORDER=len(factors) - 1,
        STRIDE=offsets.ndim,
        FACTORIAL=factorial,
    )
    return total


@jit
def _predict_kernel(
    a0_ptr,
    a1_ptr,
    a2_ptr,
    a3_ptr,
    total_ptr,
    offset_ptr,
    size,
    ORDER: tl.constexpr,
    STRIDE: tl.constexpr,
    FACTORIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = at < size
    total = loaded(a0_ptr, at, kept)
    if ORDER >= 1:
        power = tl.load(offset_ptr).to(tl.float32)
        total += loaded(a1_ptr, at, kept) * power
    if ORDER >= 2:
        power = power * tl.load(offset_ptr + STRIDE) / (2.0 if FACTORIAL else 1.0)
        total += loaded(a2_ptr, at, kept) * power
    if ORDER >= 3:
        power = power * tl.load(offset_ptr + 2 * STRIDE) / (3.0 if FACTORIAL else 1.0)
        total += loaded(a3_ptr, at, kept) * power
    tl.store(total_ptr + at, rounded(total, total_ptr), mask=kept)
