"""Every kernel against its reference in float64, on the device, in every dtype, beyond 2^31 elements too."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import cachekit_kernels as kernels
import torch
from torch.utils import _pytree as pytree

kernel_bench = importlib.import_module("kernels")  # kernels.py beside this script

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def correct(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Every kernel against its reference in float64."""
    noise = torch.Generator(device).manual_seed(0)
    shapes = [(1,), (3, 1013), (2, 257, 96)] if tiny else [(1,), (3, 1013), (2, 4608, 3072), (1, 32760, 1536)]
    for case in kernel_bench.CASES:
        worst = 0.0
        for dtype in DTYPES:
            for shape in shapes:

                def draw(kind: torch.dtype | None = None, shape=shape, dtype=dtype) -> torch.Tensor:
                    return torch.randn(shape, generator=noise, device=device, dtype=kind or dtype)

                given = case.arguments(draw, torch.tensor([0.7, 1.3], device=device))
                wide = pytree.tree_map(
                    lambda value: value.double() if isinstance(value, torch.Tensor) else value, given
                )
                results, rights = (pytree.tree_leaves(made) for made in (case.ours(*given), case.plain(*wide)))
                # Of two sums one may be next to nothing: they count beside the larger.
                size = max([right.abs() for right in rights if not right.ndim], default=torch.zeros(()))
                for found, wanted in zip(results, rights, strict=True):
                    error = off(found, wanted) if wanted.ndim else ((found - wanted).abs() / size).item()
                    if not error < (1e-5 if dtype == torch.float32 else 1e-2):
                        raise SystemExit(f"{case.name}, {dtype}, {shape}: off by {error:.1e} relative.")
                    worst = max(worst, error)
        yield {"part": "kernels", "kernel": case.name, "worst_relative_error": worst}
    if not tiny:
        yield beyond(device)


def beyond(device: torch.device) -> dict[str, Any]:
    """More elements than an index of 32 bits can count."""
    size = 2**31 + 4099
    one, other = (torch.full((size,), value, device=device, dtype=torch.bfloat16) for value in (3.0, 1.0))
    one[-1], other[-1] = 64.0, 32.0
    residual, change, scale = kernels.residual_norm(one, other, other)
    found = [residual[-1].item(), change.item() / (size - 1), scale.item() / (size - 1)]
    del residual
    updated = kernels.taylor_update([one, other], other, torch.tensor(2.0, device=device))
    found += [value[-1].item() for value in updated]
    del updated
    found.append(kernels.taylor_predict([one, other], torch.tensor(2.0, device=device))[-1].item())
    wanted = [32.0, 1.0, 1.0, 32.0, -16.0, 128.0]
    if any(abs(a - b) > 1e-3 * abs(b) for a, b in zip(found, wanted, strict=True)):
        raise SystemExit(f"Beyond 2^31 elements: found {found}, wanted {wanted}.")
    return {"part": "kernels", "kernel": "beyond 2^31 elements", "worst_relative_error": 0.0}


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error; a NaN is one."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12)).item()
