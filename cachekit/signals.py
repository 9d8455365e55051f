"""What a decider is shown: sums over tensors, which it divides itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cachekit_kernels as kernels
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cachekit.asking import BEYOND, ask, shown
from cachekit.deciders import Sums
from cachekit.errors import ArgumentError, ArgumentTypeError


def change(value: Tensor, reference: Tensor) -> Sums:
    """`sum |value - reference|` over `sum |reference|`, float32: the relative L1 change.

    Shapes [...] alike, any floating dtype; two 0-d float32 sums.

    Source: FirstBlockCache in ParaAttention; TeaCache, arXiv 2411.19108, equation 4.
    """
    return Sums(*kernels.residual_change(value, reference))


def norm_ratio(value: Tensor, reference: Tensor) -> Sums:
    """`sum over tokens of ||value|| / ||reference||` over the number of tokens, float32.

    Shapes [..., D] alike. A token whose reference is zero counts as 1, so the first step of a trajectory gives
    1.

    Source: MagCache, arXiv 2506.09045, equation 3.
    """
    tokens = math.prod(value.shape[:-1])
    return Sums(kernels.norm_ratio(value, reference), torch.full((), tokens, dtype=torch.float32, device=value.device))


def check_signal(
    signal: Callable[[Tensor, Tensor], Sums], shape: Sequence[int], dtype: torch.dtype, device: Any
) -> None:
    """Try a signal on values of this kind. Nothing is computed: forms alone count.

    Raises:
        ArgumentError, ArgumentTypeError: it returns anything but two sums, or fails.
    """
    name = getattr(signal, "__name__", repr(signal))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        value, reference = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        try:
            sums = ask("signal", name, "signal", signal, value, reference)
        except BEYOND as error:
            raise ArgumentError(
                f"`signal` {name!r} reads the value of a tensor (.item(), float, `if`), which waits for the device and "
                "can be in no graph. Return cachekit.deciders.Sums of two 0-d tensors; the decider divides them."
            ) from error
    if (
        not isinstance(sums, tuple)
        or len(sums) != 2
        or not all(isinstance(each, Tensor) and each.ndim == 0 and each.is_floating_point() for each in sums)
    ):
        got = ", ".join(map(shown, sums)) if isinstance(sums, tuple) else shown(sums)
        raise ArgumentTypeError(
            f"`signal` {name!r} returns {got}. Return cachekit.deciders.Sums(numerator, denominator), two 0-d floating "
            "point tensors, e.g. of .abs().sum()."
        )


def of_residual(
    signal: Callable[[Tensor, Tensor], Sums], output: Tensor, base: Tensor, reference: Tensor
) -> tuple[Tensor, Sums]:
    """`output - base`, and what a signal makes of it: in one pass over memory for `change`.

    Shapes [...] alike.
    """
    if signal is change:
        residual, *sums = kernels.residual_norm(output, base, reference)
        return residual, Sums(*sums)
    residual = output - base
    return residual, signal(residual, reference)


def numbers(sums: Tensor) -> Sums:
    """The one host read of a step: both sums, [2], as Python numbers."""
    return Sums(*sums.tolist())
