"""What stands in for what was left out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachekit_kernels._triton._operator import ELEMENTS, WARPS, cdiv, launch, launch_each, loaded, operator, rounded


def _fake_apply(bases: list[Tensor], residuals: list[Tensor]) -> list[Tensor]:
    kinds = [torch.promote_types(base.dtype, residual.dtype) for base, residual in zip(bases, residuals, strict=True)]
    return [base.new_empty(base.shape, dtype=kind) for base, kind in zip(bases, kinds, strict=True)]


@operator("apply_residual", _fake_apply)
def apply_residual(bases: list[Tensor], residuals: list[Tensor]) -> list[Tensor]:
    sums = _fake_apply(bases, residuals)
    streams = [
        (base.contiguous(), residual.contiguous(), total)
        for base, residual, total in zip(bases, residuals, sums, strict=True)
        if total.numel()
    ]
    if len(streams) % 2:
        # A kernel has arguments for two. Nothing is written to by two names: who traces copies each, and back.
        base, residual, total = streams[-1]
        streams.append((base, residual, total.new_empty(0)))
    for one, other in zip(streams[::2], streams[1::2], strict=True):
        blocks, more = cdiv(one[2].numel(), ELEMENTS), cdiv(other[2].numel(), ELEMENTS)
        launch(
            _apply_kernel,
            (blocks + more,),
            *one,
            one[2].numel(),
            *other,
            other[2].numel(),
            blocks,
            BLOCK=ELEMENTS,
            num_warps=WARPS,
        )
    return sums


@triton.jit
def _apply_kernel(
    base_ptr,
    residual_ptr,
    total_ptr,
    size,
    other_base_ptr,
    other_residual_ptr,
    other_total_ptr,
    other_size,
    blocks,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    if block < blocks:
        _add(base_ptr, residual_ptr, total_ptr, size, block, BLOCK)
    else:
        _add(other_base_ptr, other_residual_ptr, other_total_ptr, other_size, block - blocks, BLOCK)


@triton.jit
def _add(base_ptr, residual_ptr, total_ptr, size, block, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = at < size
    base = loaded(base_ptr, at, kept)
    residual = loaded(residual_ptr, at, kept)
    tl.store(total_ptr + at, rounded(base + residual, total_ptr), mask=kept)


def _fake_delta(cond: Tensor, low: Tensor, high: Tensor, weights: Tensor, cond_first: bool) -> Tensor:
    return cond.new_empty((2 * cond.shape[0], *cond.shape[1:]))


@operator("guidance_delta", _fake_delta)
def guidance_delta(cond: Tensor, low: Tensor, high: Tensor, weights: Tensor, cond_first: bool) -> Tensor:
    both = cond.new_empty((2 * cond.shape[0], *cond.shape[1:]))
    launch_each(
        _delta_kernel,
        cond.numel(),
        cond.contiguous(),
        low.contiguous(),
        high.contiguous(),
        weights.contiguous(),
        both,
        COND_FIRST=cond_first,
    )
    return both


@triton.jit
def _delta_kernel(
    cond_ptr,
    low_ptr,
    high_ptr,
    weights_ptr,
    both_ptr,
    size,
    COND_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = at < size
    cond = tl.load(cond_ptr + at, mask=kept, other=0.0)
    low = loaded(low_ptr, at, kept)
    high = loaded(high_ptr, at, kept)
    uncond = cond.to(tl.float32) + tl.load(weights_ptr) * low + tl.load(weights_ptr + 1) * high
    half = size + tl.zeros((), tl.int64)
    tl.store(both_ptr + at + (half if COND_FIRST else 0), rounded(uncond, both_ptr), mask=kept)
    tl.store(both_ptr + at + (0 if COND_FIRST else half), cond, mask=kept)
