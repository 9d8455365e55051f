"""The state of a trajectory: an explicit pytree of tensors, and how to read it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit.errors import ArgumentTypeError


class State(NamedTuple):
    """Everything a trajectory remembers. Two prompts, two guidance branches, two requests are two states.

    The tree, and the shape, dtype and device of every leaf, are the same at every step. What decides lives on the
    CPU, so that reading it never waits for a device; what is cached lives where the model runs.
    """

    step: Tensor  # [] int64, steps done
    timesteps: Tensor  # [T] float64, NaN where only their number is known
    plan: Any  # [T] bool, the verdicts of a static decider; () for one that looks at a signal
    decider: Any  # state of the decider; () for a static one
    reference: Any  # [...] front residual of the last computed step; () without front blocks
    sites: dict[str, tuple[Any, ...]]  # site -> one forecaster state a stream
    computed: Tensor  # [T] bool, log: whether the step computed; True for steps to come
    signal: Tensor  # [T] float64, log: the signal, NaN where none was measured


# A saved state is read by torch.load as it is, without weights_only=False.
torch.serialization.add_safe_globals([State])


class Summary(NamedTuple):
    """What a trajectory did so far; `str` is a table."""

    computed: tuple[bool, ...]  # one a step done
    signal: tuple[float, ...]  # one a step done, NaN where none was measured
    steps: int  # steps done
    timesteps: tuple[float, ...]  # of the whole trajectory
    state_bytes: int  # bytes of all leaves

    def __str__(self) -> str:
        share = f"{sum(self.computed)} of {self.steps} steps computed"
        pattern = "".join("#" if computed else "." for computed in self.computed)
        rows = [f"{share} of {len(self.timesteps)} planned, state {human_bytes(self.state_bytes)}", pattern]
        rows.append(f"{'step':>5} {'timestep':>10} {'action':<8} {'signal':>10}")
        for step, (computed, signal) in enumerate(zip(self.computed, self.signal, strict=True)):
            timestep = self.timesteps[step]
            rows.append(
                f"{step:>5} {'-' if math.isnan(timestep) else format(timestep, '.2f'):>10} "
                f"{'compute' if computed else 'reuse':<8} {'-' if math.isnan(signal) else format(signal, '.4g'):>10}"
            )
        return "\n".join(rows)


def summary(state: State) -> Summary:
    """Read the log of a state.

    Example:
        >>> import torch, cachekit as ck
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x):
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x
        >>> step = ck.cache(Model(), ck.step_mask([1, 0, 1]))
        >>> with torch.no_grad():
        ...     state = step.init(3, torch.ones(1, 2, 4))
        ...     for _ in range(3):
        ...         out, state = step(state, torch.ones(1, 2, 4))
        >>> ck.summary(state).computed
        (True, False, True)
    """
    if not isinstance(state, State):
        raise ArgumentTypeError(f"`state` must be a cachekit State, got {type(state).__name__}. step.init makes one.")
    done = int(state.step)
    return Summary(
        computed=tuple(state.computed.tolist()[:done]),
        signal=tuple(state.signal.tolist()[:done]),
        steps=done,
        timesteps=tuple(state.timesteps.tolist()),
        state_bytes=state_bytes(state),
    )


def state_bytes(tree: Any) -> int:
    """Bytes of all tensors of a pytree."""
    leaves = (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def human_bytes(count: int) -> str:
    """`1536` as `1.5 KiB`."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def fresh_log(steps: int) -> tuple[Tensor, Tensor]:
    """An empty log: nothing left out, nothing measured."""
    return torch.ones(steps, dtype=torch.bool), torch.full((steps,), math.nan, dtype=torch.float64)
