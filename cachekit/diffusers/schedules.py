"""Where a pipeline is in the timesteps of its scheduler."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

ENDS = {"SCMScheduler": 1, "DDPMWuerstchenScheduler": 1}
"""Schedulers whose last timesteps say where a run ends: so many that no model is called with."""

SCALES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda times: times,
    lambda times: times / 1000,
    lambda times: 1000 - times,
    lambda times: (1000 - times) / 1000,
    lambda times: 1 - times,
)
"""How pipelines give a timestep of their scheduler to a transformer."""


class Place(NamedTuple):
    """The step of a sampler that a call belongs to."""

    part: int  # how many runs through the schedule came before, in this call of the pipeline
    step: int  # in the timesteps


class Schedule:
    """The timesteps of one call of a pipeline, as its scheduler has them.

    A pipeline may go through them several times, and set others in between: in parts.

    Args:
        pipe: the pipeline.
        name: of the part of it that is its scheduler, if it has one.
        extra: how many timesteps of this scheduler earlier calls of the pipeline left over, if that is known.

    Attributes:
        times: all of this part; empty where nobody tells.
    """

    def __init__(self, pipe: Any, name: str | None, extra: int | None = None) -> None:
        self.times: tuple[float, ...] = ()
        self._pipe: Any = pipe
        self._name = name
        self._extra = extra
        self._source: Any = None
        self._set = False  # since the last call of a transformer
        self._steps = 0  # of the scheduler, since then
        self._told = False  # whether the scheduler takes steps where they are seen
        self._place: Place | None = None
        self._shift = 0  # where the scheduler was when the pipeline went through more steps than there are
        self._begun = 0  # where in the timesteps this part began
        self._last: tuple[Any, ...] | None = None  # what the transformer was given last
        self._framed = False  # whether that is one timestep for each frame
        self._expected: int | None = None  # calls, as the pipeline has told its progress bar

    # What the stand-ins tell ----------------------------------------------------------------------------------

    def is_set(self) -> None:
        """The scheduler is given other timesteps, or the same ones again."""
        self._set, self._expected = True, None

    def stepped(self) -> None:
        """The scheduler takes a step."""
        self._steps += 1
        self._told = True

    def expects(self, calls: int) -> None:
        """The pipeline shows progress of so many."""
        self._expected = calls

    def end(self) -> None:
        """The call is over: what was seen stays, and the pipeline is let go."""
        self._pipe = self._source = None

    # What a call asks -----------------------------------------------------------------------------------------

    def look(self, timestep: Any) -> Place:
        """The step that the pipeline is about to take.

        Args:
            timestep: what the transformer is given as such, for pipelines and schedulers that say nothing.
        """
        scheduler = self.scheduler
        source = getattr(scheduler, "timesteps", None)
        anew = self._set or source is not self._source
        if anew:
            times = () if source is None else tuple(float(time) for time in source)
            anew = self._set or times != self.times
            self._source, self.times, self._set = source, times, False
        place = self._place
        if place is None or anew:
            self._shift = 0
            own = self._own(scheduler)
            place = self._begin(place, getattr(scheduler, "begin_index", None) if own is None else own, timestep)
        else:
            place = self._next(place, scheduler, timestep)
        self._place, self._steps = place, 0
        return place

    def ahead(self, place: Place, component: str) -> tuple[float, ...]:
        """The timesteps from a place on, as far as they are this transformer's."""
        ahead = self._called()[place.step :]
        boundary = self._boundary()
        if boundary is None or not ahead:
            return ahead
        early = ahead[0] >= boundary
        return tuple(itertools.takewhile(lambda time: (time >= boundary) == early, ahead))

    def noise(self, place: Place, steps: int) -> tuple[float, ...]:
        """How much noise is there at so many timesteps from a place on, from 1000 down to 0: ranges are given in that.

        Most timesteps are that already. Others (0..1, logarithms, rising ones) are converted by the scheduler's sigmas,
        or, where it has none (angles, numbers of steps), are spread evenly over the schedule.
        """
        return _noise(self._called(), None if self._counted else self.scheduler)[place.step :][:steps]

    @property
    def surprised(self) -> bool:
        """Whether more calls were expected than there were."""
        return self._place is not None and self._place.step + 1 < len(self._called())

    @property
    def left_over(self) -> int:
        """How many timesteps are left after the last call, of the whole schedule."""
        return 0 if self._place is None else len(self.times) - 1 - self._place.step

    @property
    def scheduler(self) -> Any:
        """As it is now; None of a pipeline without one."""
        return self._pipe.__dict__.get(self._name or "")

    # How it is known ------------------------------------------------------------------------------------------

    def _begin(self, before: Place | None, found: int | None, timestep: Any) -> Place:
        self._told, self._last = False, None
        self._framed = isinstance(timestep, Tensor) and timestep.ndim > 1
        if found is None:
            self._moved(timestep)
            found = self._search(timestep, 0)
        self._begun = found or 0
        return Place(0 if before is None else before.part + 1, self._begun)

    def _next(self, place: Place, scheduler: Any, timestep: Any) -> Place:
        own = self._own(scheduler)
        if own is not None:
            index = own
        elif self._steps:
            index = place.step + 1
        elif not self._told and self._moved(timestep):
            found = None if self._counted else self._search(timestep, place.step + 1)
            index = place.step + 1 if found is None else found
        else:
            return place
        if index < place.step:  # it goes through them again
            return self._begin(place, index, timestep)
        if index >= max(1, len(self._called())):
            self._shift += 0 if own is None else own
            found = self._search(timestep, 0)
            return self._begin(place, found if found is not None and found < len(self._called()) else 0, timestep)
        return place._replace(step=index)

    def _own(self, scheduler: Any) -> int | None:
        """Where the scheduler says that it is: second-order ones count repeated timesteps, too."""
        index = getattr(scheduler, "step_index", None)
        return index - self._shift if isinstance(index, int) and 0 <= index < len(self.times) else None

    @property
    def _counted(self) -> bool:
        """Whether calls are all that tells of steps: frames have timesteps of their own, and there are more calls."""
        return self._framed and self._expected is not None and self._expected > len(self.times)

    def _called(self) -> tuple[float, ...]:
        """The timesteps with which a model is called, of the whole schedule."""
        if self._counted:
            ends = (self.times[0], self.times[-1]) if self.times else (1000.0, 0.0)
            return tuple(torch.linspace(*ends, self._expected or 1, dtype=torch.float64).tolist())
        extra = self._extra
        if extra is None:
            extra = ENDS.get(type(self.scheduler).__name__, 0)
            said = getattr(self._pipe, "num_timesteps", None)
            if isinstance(said, int) and said > 0 and len(self.times) - self._begun - said == 1:
                extra = 1  # it loops over all but the last
        return self.times[: len(self.times) - extra]

    def _boundary(self) -> float | None:
        """Below which timestep another transformer takes over."""
        pipe = self._pipe
        ratio = pipe.config.get("boundary_ratio")
        if ratio is None or getattr(pipe, "transformer", None) is None or getattr(pipe, "transformer_2", None) is None:
            return None
        return ratio * self.scheduler.config.num_train_timesteps

    def _moved(self, timestep: Any) -> bool:
        """Whether the timestep is another one than that of the call before. To read it may wait for the device."""
        current = getattr(self._pipe, "current_timestep", None)
        if timestep is None:
            timestep = current
        last = None if timestep is None else tuple(torch.as_tensor(timestep).detach().reshape(-1).tolist())
        moved, self._last = last != self._last, last
        return moved

    def _search(self, timestep: Any, expected: int) -> int | None:
        """The place of a timestep in the schedule, on whatever scale; the one that is expected where it is one."""
        current = getattr(self._pipe, "current_timestep", None)
        given = timestep if current is None else current
        if given is None or not self.times:
            return None
        time = torch.as_tensor(given).detach().reshape(-1)[:1].cpu()
        times = torch.tensor(self.times, dtype=torch.float64)
        places: list[int] = []
        for scale in SCALES:  # rounded as the pipeline has rounded, before or after
            for scaled in (scale(times.to(time.dtype)), scale(times).to(time.dtype)):
                places += (scaled == time).nonzero().flatten().tolist()
        return expected if expected in places else next(iter(places), None)


def _noise(times: tuple[float, ...], scheduler: Any) -> tuple[float, ...]:
    """The noise at all timesteps of a schedule, 0..1000."""
    count = len(times)
    evenly = tuple(1000 * (1 - at / count) for at in range(count))
    if any(times == tuple(range(least + count - 1, least - 1, -1)) for least in (0, 1)):
        return evenly  # numbers of steps that are left
    if not times or (all(0 <= time <= 1000 for time in times) and times[0] > 2 and _falls(times)):
        return times
    if all(0 <= time <= 1 for time in times) and _falls(times):
        return tuple(1000 * time for time in times)
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or len(sigmas) < count:
        return evenly
    levels = sigmas.detach().to(device="cpu", dtype=torch.float64)[:count]
    if levels.max() > 1:  # clean data and so many times noise: of the sum, noise is this share
        levels = levels / (levels + (getattr(scheduler.config, "sigma_data", None) or 1.0))
    found = tuple((1000 * levels).tolist())
    return found if _falls(found) else tuple(1000 - level for level in found)


def _falls(times: tuple[float, ...]) -> bool:
    return all(after <= before for before, after in itertools.pairwise(times))


def timestep_of(args: tuple, kwargs: dict[str, Any]) -> Tensor | float | None:
    """What a transformer is given as the timestep."""
    given = [kwargs[name] for name in ("timestep", "timesteps", "t") if name in kwargs]
    return next((value for value in given if isinstance(value, (Tensor, float, int))), None)
