"""What a run costs on any machine: its multiplications."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def multiplications(function: Callable[..., object], /, *args: object, **kwargs: object) -> int:
    """The multiplications of matrix products, convolutions and attention in `function(*args, **kwargs)`, eager.

    What is done element by element (norms, activations, forecasts, the transforms of `faster_cache`) is not counted:
    of the digits model it is less than a hundredth. Neither are integer products, nor what runs compiled.

    Example:
        >>> import torch
        >>> multiplications(torch.nn.Linear(8, 16), torch.ones(5, 8))
        640
    """
    # Attention in its plain form, as two matrix products: of the fused ones torch counts some in one release and
    # none in another (2.13 takes attention on a CPU for free).
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops() // 2  # a multiplication and an addition are two operations
