"""Where a pipeline is in the timesteps of its scheduler."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


class Schedule:
    """The timesteps of one call of a pipeline, as its scheduler has them.

    Attributes:
        times: all of them; empty while the scheduler has none.
    """

    def __init__(self, pipe: Any) -> None:
        self.times: tuple[float, ...] = ()
        self._pipe = pipe
        self._source: Any = None

    def look(self, timestep: Any) -> int | None:
        """The place in `times` of the step that the pipeline is about to take; None where nothing tells.

        Args:
            timestep: what the transformer is given as such, for pipelines and schedulers that say nothing.
        """
        scheduler = getattr(self._pipe, "scheduler", None)
        source = getattr(scheduler, "timesteps", None)
        if source is not self._source:
            self._source = source
            self.times = () if source is None else tuple(float(time) for time in source)
        # Schedulers count their steps, second-order ones the repeated timesteps too; before the first one they know
        # where they begin, if the pipeline has said so. Some do neither. Reading a timestep may wait for the device.
        for index in (getattr(scheduler, "step_index", None), getattr(scheduler, "begin_index", None)):
            if index is not None:
                return index if 0 <= index < len(self.times) else None
        current = getattr(self._pipe, "current_timestep", None)
        return self._search(timestep if current is None else current)

    def alike(self, index: int, before: int) -> bool:
        """Whether a call found at `index` may belong to the step `before`."""
        return index == before or (index < before and self.times[index] == self.times[before])

    def repeats(self, index: int) -> bool:
        """Whether the next timestep is the same one again."""
        return index + 1 < len(self.times) and self.times[index + 1] == self.times[index]

    def ahead(self, index: int, component: str) -> tuple[float, ...]:
        """The timesteps from this place on, as far as they are this transformer's."""
        ahead = self.times[index:]
        boundary = self._boundary()
        if boundary is None or not ahead:
            return ahead
        early = ahead[0] >= boundary
        return tuple(itertools.takewhile(lambda time: (time >= boundary) == early, ahead))

    def _boundary(self) -> float | None:
        """Below which timestep another transformer takes over."""
        pipe = self._pipe
        ratio = pipe.config.get("boundary_ratio")
        if ratio is None or getattr(pipe, "transformer", None) is None or getattr(pipe, "transformer_2", None) is None:
            return None
        return ratio * pipe.scheduler.config.num_train_timesteps

    def _search(self, timestep: Any) -> int | None:
        """The first place of a timestep, given as it is or as a fraction of 1000."""
        if timestep is None or not self.times:
            return None
        time = torch.as_tensor(timestep).detach().reshape(-1)[:1].cpu()
        times = torch.tensor(self.times, dtype=torch.float64)
        # Rounded as the pipeline has rounded.
        for scaled in (times.to(time.dtype), times.to(time.dtype) / 1000, (times / 1000).to(time.dtype)):
            places = (scaled == time).nonzero()
            if len(places):
                return int(places[0])
        return None


def timestep_of(args: tuple, kwargs: dict[str, Any]) -> Tensor | float | None:
    """What a transformer is given as the timestep."""
    given = [kwargs[name] for name in ("timestep", "timesteps", "t") if name in kwargs]
    return next((value for value in given if isinstance(value, (Tensor, float, int))), None)
