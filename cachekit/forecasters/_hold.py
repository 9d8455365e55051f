"""Repeat the last computed value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cachekit.forecasters._forecaster import Forecaster


class HoldState(NamedTuple):
    """State of `hold`."""

    value: Tensor  # [...], as last computed


torch.serialization.add_safe_globals([HoldState])


def hold() -> Forecaster:
    """The last computed value, unchanged: one tensor of state a site."""
    return Forecaster(
        name="hold",
        init=lambda value: HoldState(value=torch.zeros_like(value)),
        update=lambda state, value, now: HoldState(value=value),
        predict=lambda state, now: state.value,
        timed=False,
        memory=1,
        weights=lambda nodes, step, steps: torch.eye(nodes.shape[-1], dtype=nodes.dtype)[-1].expand_as(nodes),
    )
