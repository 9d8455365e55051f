"""What stands in for what was left out."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cachekit_kernels._triton._operator import launch_each, loaded, operator, rounded


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
