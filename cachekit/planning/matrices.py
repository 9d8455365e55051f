"""The matrices of a trace: what the values of a site come to, step by step, and what combinations of them would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cachekit.signals import change


class Recorded(NamedTuple):
    """Of one site of one stream. Every matrix is float64."""

    gram: Tensor  # [T, T], inner products <V_i, V_j> of the values of steps i and j
    distances: Tensor  # [T, T], sum |V_i - V_j|; of the denoised stream where it is a residual; [0, 0] of large sites
    magnitudes: Tensor  # [T], sum |V_j|, likewise
    ratios: Tensor  # [T], mean over tokens of ||V_i|| / ||V_{i-1}||, 1 at step 0


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return torch.stack(list(tensors)).sum(0)


def of_rows(rows: Sequence[Tensor], looked_at: Tensor | None, norms: Sequence[Tensor]) -> Recorded:
    """From the values [T, n] of every stream of a site; the one that deciders look at; and token norms [T, tokens]."""
    wide = [each.double() for each in rows]
    gram = sum_of([each @ each.T for each in wide]).cpu()
    distances, magnitudes = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    if looked_at is not None:
        distances, magnitudes = _distances(looked_at)
    return Recorded(gram, distances, magnitudes, _ratios(norms, len(gram)))


def _distances(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What `signals.change` measures between any two of the values [T, n]: [T, T] and [T], on the CPU."""
    steps = len(rows)
    sums = [[change(rows[i], rows[j]) for j in range(i + 1)] for i in range(steps)]
    flat = torch.stack([pair.numerator for row in sums for pair in row]).double().cpu()
    i, j = torch.tril_indices(steps, steps)
    distances = torch.zeros(steps, steps, dtype=torch.float64)
    distances[i, j] = flat
    distances[j, i] = flat
    return distances, torch.stack([row[-1].denominator for row in sums]).double().cpu()


def _ratios(norms: Sequence[Tensor], steps: int) -> Tensor:
    """The mean over all tokens of the norm over that of the step before, 1 where that was zero: [T]."""
    if not norms:
        return torch.ones(steps, dtype=torch.float64)
    tokens = torch.cat([each.double() for each in norms], dim=1).cpu()
    ratios = torch.where(
        tokens[:-1] != 0, tokens[1:] / tokens[:-1], torch.where(tokens[1:].isfinite(), 1.0, tokens[1:])
    )
    return torch.cat((torch.ones(1, dtype=torch.float64), ratios.mean(1)))


def between(old: Tensor, new: Tensor) -> Tensor:
    """[new T, old T]: the value at a new timestep as a combination of those at the old ones, which fall."""
    if len(old) == 1:
        return torch.ones(len(new), 1, dtype=torch.float64)
    right = torch.searchsorted(-old, -new).clamp(1, len(old) - 1)
    share = ((old[right - 1] - new) / (old[right - 1] - old[right])).clamp(0, 1)
    weights = torch.zeros(len(new), len(old), dtype=torch.float64)
    rows = torch.arange(len(new))
    weights[rows, right - 1] = 1 - share
    weights[rows, right] = share
    return weights


def mixed(recorded: Recorded, weights: Tensor) -> Recorded:
    """Of combinations of the values."""
    gram = weights @ recorded.gram @ weights.T
    distances, magnitudes = recorded.distances, recorded.magnitudes
    if len(distances):
        # How far two values are apart is known of their norms alone; of what |.| makes of that, from the steps nearby.
        def apart(gram: Tensor) -> Tensor:
            size = gram.diagonal()
            return (size[:, None] + size - 2 * gram).clamp(min=0).sqrt()

        old = apart(recorded.gram)
        known = ~torch.eye(len(old), dtype=torch.bool) & (old > 0)
        typical = (distances[known] / old[known]).mean() if bool(known.any()) else torch.tensor(0.0)
        distances = (weights @ torch.where(known, distances / old, typical) @ weights.T) * apart(gram)
        magnitudes = weights @ magnitudes
    # A ratio is a change over one step: over another distance in time it goes on in the same way.
    size = torch.cat((recorded.ratios.new_zeros(1), recorded.ratios[1:].clamp(min=1e-12).log())).cumsum(0)
    logs = weights @ size
    ratios = torch.cat((logs.new_zeros(1), logs.diff())).exp()
    return Recorded(gram, distances, magnitudes, ratios)
