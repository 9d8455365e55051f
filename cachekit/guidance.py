"""Guidance as a site: the unconditional half of a batch, answered from the conditional one.

On a full step both halves run, and what the unconditional one adds is split into low and high frequencies. On the
others only the conditional half runs, and the two parts are added back, each by a weight. The Fourier transform is
linear, so the split is made once, on the full step, and a reuse has no transform.

Source: FasterCache, arXiv 2410.19355, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cachekit_kernels as kernels
import torch
from einops import rearrange
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit.deciders import Decider
from cachekit.errors import ArgumentError, ArgumentTypeError, StateError

GUIDANCE = "guidance"
"""Name of the site, and of its group."""

LAYOUTS = ("BCHW", "BCFHW", "BFCHW")
TOKENS, PLANES = "b (f h w) c", "b c f h w"


class Tokens(NamedTuple):
    """The layout [B, S, C] of what a model returns, with S = frames * height * width tokens in this order."""

    frames: int
    height: int
    width: int


class GuidanceState(NamedTuple):
    """What is remembered of the last full step."""

    low: Tensor  # [...] float32, low frequencies of unconditional minus conditional
    high: Tensor  # [...] float32, the rest of it
    weights: Tensor  # [T, 2] float32, of low and high at every step
    cond: Tensor  # [...] of the conditional call of this step, where the other one is a call of its own; else [0]


class Answered(NamedTuple):
    """What has become of the unconditional calls, where they are calls of their own: 0-d int64 on the host."""

    last: Tensor  # step of the last one, -1 before
    full: Tensor  # step of the last one that the model has answered, -1 before


torch.serialization.add_safe_globals([GuidanceState, Answered])


def unanswered() -> Answered:
    """Before the first call."""
    return Answered(torch.full((), -1), torch.full((), -1))


@dataclass(frozen=True)
class Guidance:
    """How the unconditional half is left out.

    Attributes:
        decider: when both halves run; static.
        weigh: `weigh(timesteps, computed) -> [T, 2]`: the weights of low and high at every step.
        layout: of what the model returns: "BCHW", "BCFHW", "BFCHW" or `Tokens`; None for frames in its last two
            dimensions, whatever the order of those before.
        cond_first: whether the batch is [cond, uncond]; else [uncond, cond].
        separate: whether the unconditional half is a call of its own, `step.uncond`.
    """

    decider: Decider
    weigh: Callable[[Sequence[float], Sequence[bool]], list[tuple[float, float]]]
    layout: str | Tokens | None = None
    cond_first: bool = False
    separate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.layout, Tokens) and self.layout not in (*LAYOUTS, None):
            raise ArgumentError(
                f"`layout` must be one of {', '.join(map(repr, LAYOUTS))} or cachekit.Tokens(frames, height, width), "
                f"got {self.layout!r}."
            )
        if isinstance(self.layout, Tokens) and any(
            isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.layout
        ):
            raise ArgumentError(f"`layout` must count at least one frame, row and column, got {self.layout!r}.")
        if not isinstance(self.decider, Decider) or not self.decider.static:
            raise ArgumentTypeError(
                "`decider` of Guidance must be a static Decider, e.g. cachekit.deciders.interval(5)."
            )

    def halves(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, tuple]:
        """The arguments of the unconditional and of the conditional half, each as (args, kwargs)."""
        leaves, treespec = pytree.tree_flatten((args, dict(kwargs)))
        batch = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 1), 0)
        if not batch or batch % 2:
            raise StateError(
                f"The batch is {batch}. With batched guidance it holds as many unconditional entries as conditional "
                "ones: pass both in one call, or use cfg=None for a model without them."
            )
        halves = [
            leaf.chunk(2) if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch else (leaf, leaf)
            for leaf in leaves
        ]
        first, second = (pytree.tree_unflatten([pair[n] for pair in halves], treespec) for n in range(2))
        return (second, first) if self.cond_first else (first, second)

    def split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The unconditional and the conditional half of what the model returned."""
        first, second = both.chunk(2)
        return (second, first) if self.cond_first else (first, second)

    def join(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """Both halves in the order of the batch."""
        return torch.cat((cond, uncond) if self.cond_first else (uncond, cond))

    def init(self, cond: Tensor, times: Sequence[float], computed: Sequence[bool]) -> GuidanceState:
        """A state for outputs like `cond`."""
        self._check(cond)
        weights = torch.tensor(self.weigh(times, computed), dtype=torch.float32, device=cond.device)
        zeros = torch.zeros_like(cond, dtype=torch.float32)
        kept = torch.zeros_like(cond) if self.separate else cond.new_empty(0)
        return GuidanceState(low=zeros, high=zeros.clone(), weights=weights, cond=kept)

    def update(self, state: GuidanceState, uncond: Tensor, cond: Tensor) -> GuidanceState:
        """The state after a full step."""
        added = uncond.detach().float() - cond.detach().float()
        low = self._low(added)
        # No _replace here and below: torch 2.11 makes an empty tuple of it where a graph returns it.
        return GuidanceState(low.contiguous(), (added - low).contiguous(), state.weights, state.cond)

    def keep(self, state: GuidanceState, cond: Tensor) -> GuidanceState:
        """The state after a conditional call, which the unconditional one is answered from."""
        return GuidanceState(state.low, state.high, state.weights, cond.detach().clone())

    def answer(self, state: GuidanceState, cond: Tensor, step: Tensor) -> Tensor:
        """Both halves at a step, the unconditional one from the conditional one, in the order of the batch."""
        weights = state.weights.index_select(0, step.long().reshape(1)).squeeze(0)
        return kernels.guidance_delta(cond, state.low, state.high, weights, cond_first=self.cond_first)

    def predict(self, state: GuidanceState, cond: Tensor, step: Tensor) -> Tensor:
        """The unconditional half at a step."""
        return self.split(self.answer(state, cond, step))[0]

    def _low(self, added: Tensor) -> Tensor:
        """The frequencies within a disc around zero, in the plane of every frame."""
        frames = added
        if isinstance(self.layout, Tokens):
            frames = rearrange(added, f"{TOKENS} -> {PLANES}", f=self.layout.frames, h=self.layout.height)
        rows, columns = (_distance(size, added.device) for size in frames.shape[-2:])
        radius = min(frames.shape[-2:]) // 5
        disc = rows[:, None] ** 2 + columns**2 <= radius**2
        low = torch.fft.ifft2(torch.fft.fft2(frames) * disc).real
        return rearrange(low, f"{PLANES} -> {TOKENS}") if isinstance(self.layout, Tokens) else low

    def _check(self, cond: Tensor) -> None:
        if self.layout is None:
            if cond.ndim < 4:
                raise ArgumentError(
                    f"`layout` is not known: the model returns {list(cond.shape)}, and nothing tells which of it are "
                    "rows and columns. Give layout=cachekit.Tokens(frames, height, width)."
                )
            return
        if isinstance(self.layout, Tokens):
            fits = cond.ndim == 3 and cond.shape[1] == math.prod(self.layout)
        else:
            fits = cond.ndim == len(self.layout)
        if not fits:
            raise ArgumentError(
                f"`layout` {self.layout!r} does not fit what the model returns, {list(cond.shape)}. Give the layout of "
                f"its frames: {', '.join(map(repr, LAYOUTS))} or cachekit.Tokens(frames, height, width)."
            )


def _distance(size: int, device: torch.device) -> Tensor:
    """How far every frequency of a transform is from zero: 0, 1, 2, ..., 2, 1."""
    index = torch.arange(size, device=device)
    return torch.minimum(index, size - index)
