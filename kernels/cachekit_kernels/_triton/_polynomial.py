"""Divided differences and the polynomials through them."""

# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachekit_kernels._polynomial import MOST
from cachekit_kernels._triton._operator import launch_each, loaded, operator, rounded


def _fake_differences(factors: list[Tensor], value: Tensor, spacing: Tensor) -> list[Tensor]:
    return [torch.empty_like(factor) for factor in factors]


@operator("differences", _fake_differences)
def differences(factors: list[Tensor], value: Tensor, spacing: Tensor) -> list[Tensor]:
    made = [torch.empty_like(factor) for factor in factors]
    _update(factors, made, value, spacing)
    return made


def _fake_differences_(factors: list[Tensor], value: Tensor, spacing: Tensor) -> None:
    return None


@operator("differences_", _fake_differences_, mutates=["factors"])
def differences_(factors: list[Tensor], value: Tensor, spacing: Tensor) -> None:
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


@triton.jit
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


@triton.jit
def _difference(factor, before, spacing):
    return (factor - before) / tl.where(spacing != 0, spacing, float("inf"))


def _fake_polynomial(factors: list[Tensor], offsets: Tensor, dtype: torch.dtype, factorial: bool) -> Tensor:
    return torch.empty_like(factors[0], dtype=dtype, memory_format=torch.contiguous_format)


@operator("polynomial", _fake_polynomial)
def polynomial(factors: list[Tensor], offsets: Tensor, dtype: torch.dtype, factorial: bool) -> Tensor:
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


@triton.jit
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
