"""Sums over a residual."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachekit_kernels._triton._operator import cdiv, launch, loaded, operator, rounded

# A heuristic, not a search. 4096 elements over 8 warps are 16 a thread: two loads of 16 bytes of bfloat16, four of
# float32, for every input, which is enough in flight to reach the bandwidth of memory. So many programs that every
# multiprocessor of a large GPU has several, and a number of its own: the order of a sum must not depend on the device.
BLOCK, PROGRAMS = 4096, 1056
TOKENS, CHANNELS = 4, 1024


def _row_count(tensor: Tensor, rows: bool) -> int:
    return tensor.shape[0] if rows and tensor.ndim else 1


def _fake_sums(residual: Tensor, reference: Tensor, rows: bool) -> Tensor:
    return residual.new_empty((2, _row_count(residual, rows)), dtype=torch.float32)


def _fake_norm(output: Tensor, base: Tensor, reference: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output, memory_format=torch.contiguous_format), _fake_sums(output, reference, rows)


@operator("residual_norm", _fake_norm)
def residual_norm(output: Tensor, base: Tensor, reference: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    residual = torch.empty_like(output, memory_format=torch.contiguous_format)
    return residual, _sums(residual, reference, rows, output.contiguous(), base.contiguous())


@operator("residual_change", _fake_sums)
def residual_change(residual: Tensor, reference: Tensor, rows: bool) -> Tensor:
    return _sums(residual.contiguous(), reference, rows)


def _sums(residual: Tensor, reference: Tensor, rows: bool, output: Tensor | None = None, base=None) -> Tensor:
    count = _row_count(residual, rows)
    size = residual.numel() // count if count else 0
    if size == 0:
        return residual.new_zeros((2, count), dtype=torch.float32)
    blocks = cdiv(size, BLOCK)
    programs = min(blocks, PROGRAMS)
    partial = residual.new_empty((2, count, programs), dtype=torch.float32)
    launch(
        _sums_kernel,
        (count, programs),  # there may be more rows than the second axis of a grid can count
        residual,
        reference.contiguous(),
        residual if output is None else output,
        residual if base is None else base,
        partial,
        size,
        blocks,
        programs,
        SUBTRACT=output is not None,
        BLOCK=BLOCK,
    )
    return partial.sum(-1)


@triton.jit
def _sums_kernel(
    residual_ptr,
    reference_ptr,
    output_ptr,
    base_ptr,
    partial_ptr,
    size,
    blocks,
    programs,
    SUBTRACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    program = tl.program_id(1)
    start = row.to(tl.int64) * size
    lanes = tl.arange(0, BLOCK)
    change = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(program, blocks, programs):
        inside = (block + tl.zeros((), tl.int64)) * BLOCK + lanes
        kept = inside < size
        at = start + inside
        if SUBTRACT:
            output = loaded(output_ptr, at, kept)
            base = loaded(base_ptr, at, kept)
            stored = rounded(output - base, residual_ptr)
            tl.store(residual_ptr + at, stored, mask=kept)
            residual = stored.to(tl.float32)  # as it is kept, so that it does not matter when it is looked at
        else:
            residual = loaded(residual_ptr, at, kept)
        reference = loaded(reference_ptr, at, kept)
        change += tl.abs(residual - reference)
        total += tl.abs(reference)
    to = row.to(tl.int64) * programs + program
    tl.store(partial_ptr + to, tl.sum(change, 0))
    tl.store(partial_ptr + tl.num_programs(0) * programs + to, tl.sum(total, 0))


def _fake_ratio(residual: Tensor, reference: Tensor) -> Tensor:
    return residual.new_empty((), dtype=torch.float32)


@operator("norm_ratio", _fake_ratio)
def norm_ratio(residual: Tensor, reference: Tensor) -> Tensor:
    width = residual.shape[-1]
    tokens = math.prod(residual.shape[:-1])
    if not residual.numel():  # without channels every norm is zero, and every token counts as 1
        return residual.new_full((), tokens, dtype=torch.float32)
    tiles = cdiv(tokens, TOKENS)
    programs = min(tiles, PROGRAMS)
    partial = residual.new_empty((programs,), dtype=torch.float32)
    launch(
        _ratio_kernel,
        (programs,),
        residual.contiguous(),
        reference.contiguous(),
        partial,
        tokens,
        width,
        tiles,
        programs,
        TOKENS=TOKENS,
        CHANNELS=CHANNELS,
    )
    return partial.sum()


@triton.jit
def _ratio_kernel(
    residual_ptr,
    reference_ptr,
    partial_ptr,
    tokens,
    width,
    tiles,
    programs,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    total = tl.zeros((TOKENS,), tl.float32)
    for tile in range(program, tiles, programs):
        token = (tile + tl.zeros((), tl.int64)) * TOKENS + tl.arange(0, TOKENS)
        norm = tl.zeros((TOKENS, CHANNELS), tl.float32)
        before = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for first in range(0, width, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            kept = (token < tokens)[:, None] & (channel < width)[None, :]
            at = token[:, None] * width + channel[None, :]
            residual = loaded(residual_ptr, at, kept)
            reference = loaded(reference_ptr, at, kept)
            norm += residual * residual
            before += reference * reference
        squared = tl.sum(before, 1)
        known = squared != 0
        size = tl.sqrt(tl.sum(norm, 1))
        ratio = size / tl.sqrt(tl.where(known, squared, 1.0))
        total += tl.where(token < tokens, tl.where(known, ratio, tl.where(size < float("inf"), 1.0, size)), 0.0)
    tl.store(partial_ptr + program, tl.sum(total, 0))
