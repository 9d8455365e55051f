"""Compute where a given mask says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cachekit.deciders._decider import Decider, take
from cachekit.errors import ArgumentError, ArgumentTypeError


class MaskState(NamedTuple):
    """State of `mask`."""

    computed: Tensor  # [T] bool


torch.serialization.add_safe_globals([MaskState])


def mask(computed: Sequence[bool] | Tensor) -> Decider:
    """Compute at step s iff `computed[s]`.

    Args:
        computed: one bool (or 0 / 1) a step. A mask longer than the trajectory serves with its prefix.

    Raises:
        ArgumentError: the mask is empty, or, at `init`, shorter than the trajectory.
        ArgumentTypeError: the mask holds something else than bools.

    Example:
        >>> import cachekit as ck
        >>> ck.deciders.plan(ck.deciders.mask([1, 0, 0, 1]), 4)
        (True, False, False, True)
    """
    if isinstance(computed, (str, bytes)) or not isinstance(computed, (Sequence, Tensor)):
        raise ArgumentTypeError(
            f"`mask` must be a sequence of bools or a 1-D tensor, got {type(computed).__name__}. "
            "Pass one entry a step, True to compute."
        )
    entries = computed.tolist() if isinstance(computed, Tensor) else list(computed)
    if not isinstance(entries, list) or not entries:
        raise ArgumentError(f"`mask` must have an entry a step, got {computed!r}. Pass e.g. [1, 0, 0, 1].")
    for index, entry in enumerate(entries):
        scalar = not isinstance(entry, (list, tuple, dict)) and (not isinstance(entry, Tensor) or entry.numel() == 1)
        if not scalar or entry not in (0, 1):
            raise ArgumentTypeError(f"`mask` must hold bools, got {entry!r} at step {index}. True computes.")
    verdicts = torch.tensor([bool(entry) for entry in entries])

    def init(timesteps: Tensor) -> MaskState:
        if len(timesteps) > len(verdicts):
            raise ArgumentError(
                f"`mask` has {len(verdicts)} entries, the trajectory {len(timesteps)} steps. "
                "Give the mask an entry for every step."
            )
        return MaskState(computed=verdicts[: len(timesteps)].clone())

    return Decider(
        name=f"mask of {len(verdicts)} steps",
        init=init,
        decide=lambda state, now: take(state.computed, now.step),
        update=lambda state, now, computed: state,
        static=True,
    )
