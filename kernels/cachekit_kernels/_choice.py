"""When a kernel is used, and what it can be used on."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Whether kernels run on the CPU, as Python. Triton reads the variable so, but later: when a kernel is first needed."""


def runs_on(*tensors: Tensor, fusible: bool = False) -> bool:
    """Whether these tensors go through a Triton kernel: on a GPU, in float32, bfloat16 or float16, without a gradient.

    Args:
        *tensors: all that is read.
        fusible: whether the reference is worked out element by element. A compiler fuses it with what comes before and
            after, which a kernel would keep apart, so inside a graph the reference stands.
    """
    return kernels_for(*tensors, fusible=fusible) is not None


def kernels_for(*tensors: Tensor, fusible: bool = False) -> Any:
    """The module of the kernels where these tensors go through one, None where the reference runs: see `runs_on`."""
    if fusible and torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    if not tensors or not all(
        tensor.dtype in DTYPES and (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu"))
        for tensor in tensors
    ):
        return None
    # Not before a kernel is needed: with Triton, Dynamo and Inductor it takes longer to load than torch does. Where a
    # compiler traces this, it does the same.
    from cachekit_kernels import _triton

    return _triton if _triton.HERE else None


def same(name: str, **tensors: Tensor) -> None:
    """Refuse tensors of different shapes or devices, naming both."""
    (first, expected), *others = tensors.items()
    for other, tensor in others:
        if tensor.shape != expected.shape or tensor.device != expected.device:
            raise ValueError(
                f"{name}: `{other}` is {list(tensor.shape)} on {tensor.device}, `{first}` is {list(expected.shape)} on "
                f"{expected.device}. Give tensors of one shape on one device."
            )
