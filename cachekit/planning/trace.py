"""What is kept of one uncached run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cachekit.errors import ArgumentError


@dataclass(frozen=True)
class Trace:
    """Inner products of what one uncached run computed at a site, step by step: all that a linear forecast depends on.

    Attributes:
        gram: [T, T] float64, `<V_i, V_j>` of the values of steps i and j, over all streams of the site.
        timesteps: [T] float64, as given to `init`.
        sizes: [T] float64, how far the sampler goes with the value of each step; all 1 where it is not known.
        distances: [T, T] float64, `sum |r_i - r_j|` of the probe's residual; None where no probe was recorded.
        magnitudes: [T] float64, `sum |r_j|` of the same.
        notes: what it was recorded from, for people.

    Raises:
        ArgumentError: the matrices do not fit together.
    """

    gram: Tensor
    timesteps: Tensor
    sizes: Tensor
    distances: Tensor | None = None
    magnitudes: Tensor | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        given = {"gram": self.gram, "distances": self.distances}
        for name, matrix in given.items():
            if matrix is not None and tuple(matrix.shape) != (steps, steps):
                raise ArgumentError(f"`{name}` is {list(matrix.shape)}, and there are {steps} timesteps: give [T, T].")
        for name, row in {"sizes": self.sizes, "magnitudes": self.magnitudes}.items():
            if row is not None and tuple(row.shape) != (steps,):
                raise ArgumentError(f"`{name}` is {list(row.shape)}, and there are {steps} timesteps: give [T].")

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    def of(
        cls, values: Sequence[Tensor], timesteps: Sequence[float] | Tensor, sizes: Sequence[float] | Tensor | None = None
    ) -> Trace:
        """The trace of values that are at hand: one tensor a step, of any shape.

        Example:
            >>> import torch
            >>> Trace.of([torch.ones(2), torch.tensor([1.0, 3.0])], [1000, 500]).gram
            tensor([[ 2.,  4.],
                    [ 4., 10.]], dtype=torch.float64)
        """
        flat = torch.stack([value.detach().flatten().double().cpu() for value in values])
        times = torch.as_tensor(timesteps, dtype=torch.float64)
        given = torch.ones(len(flat)) if sizes is None else torch.as_tensor(sizes)
        return cls(gram=flat @ flat.T, timesteps=times, sizes=given.double())

    def error(self, coefficients: Tensor) -> Tensor:
        """The norms of combinations of the values: coefficients [..., T] float64 -> [...]."""
        return torch.einsum("...i,ij,...j->...", coefficients, self.gram, coefficients).clamp(min=0).sqrt()
