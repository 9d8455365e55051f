"""A plan: what every step does, where that is known beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cachekit.errors import ArgumentError, check_version

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """The actions of a whole trajectory, known before it starts.

    Those that `cachekit.plan` has found on a recording also say what stands in for what is not computed, how far that
    is off, and what they were planned for; `cachekit.planned` makes a policy of them.

    Raises:
        ArgumentError: its parts are not of as many steps, or not finite.

    Example:
        >>> import cachekit as ck
        >>> print(ck.Plan((True, False, False, True), forecaster="newton 1"))
        2 of 4 steps computed  #..#
    """

    computed: tuple[bool, ...]  # whether a step computes everything
    kinds: dict[str, tuple[bool, ...]] = field(default_factory=dict)  # the same by kind, where each has its own plan
    forecaster: str = "hold"  # name of what stands in
    site: str = "output"  # where it stands in: "output" or "chain"
    error: float | None = None  # predicted, of all that the sampler goes, as a share of it; carried, if the trace was
    timesteps: tuple[float, ...] = ()  # that it was planned for, empty where they are not known
    notes: dict[str, str] = field(default_factory=dict)  # of what was recorded, for people: model, scheduler, guidance

    def __post_init__(self) -> None:
        steps = len(self.computed)
        if not steps or not isinstance(self.timesteps, tuple):
            raise ArgumentError("A plan is of at least one step, and its timesteps are a tuple.")
        if any(len(each) != steps for each in self.kinds.values()) or len(self.timesteps) not in (0, steps):
            raise ArgumentError(
                f"Not all of the plan is of {steps} steps: it has {len(self.timesteps)} timesteps, and of its kinds "
                f"{ {kind: len(each) for kind, each in self.kinds.items()} }."
            )
        if not all(isinstance(time, (int, float)) and math.isfinite(time) for time in self.timesteps):
            raise ArgumentError(f"`timesteps` must be finite, or none where they are not known, got {self.timesteps}.")
        if self.error is not None and not (isinstance(self.error, (int, float)) and 0 <= self.error < math.inf):
            raise ArgumentError(f"`error` must be finite and >= 0, or None, got {self.error!r}.")

    def __len__(self) -> int:
        return len(self.computed)

    @property
    def actions(self) -> int:
        """How many different ways to run a step there are: `step.compile()` makes one program of each."""
        return len(set(zip(*self.kinds.values(), strict=True))) if self.kinds else len(set(self.computed))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that compute."""
        return tuple(step for step, computed in enumerate(self.computed) if computed)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        record = {"version": FORMAT, **asdict(self), "computed": list(self.steps), "steps": len(self)}
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            ArgumentError: there is no such file, it is no plan, or of a version this release does not know.
        """
        try:
            record: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            version, steps, nodes = record["version"], record["steps"], record["computed"]
            if any(isinstance(each, bool) or not isinstance(each, int) for each in (steps, *nodes)):
                raise TypeError("steps are ints")
            if not set(nodes) <= set(range(steps)) or 0 not in nodes:
                raise ValueError(f"of {steps} steps it computes {nodes}")
            plan = cls(
                computed=tuple(step in nodes for step in range(steps)),
                kinds={kind: tuple(map(bool, each)) for kind, each in record["kinds"].items()},
                forecaster=str(record["forecaster"]),
                site=str(record["site"]),
                error=None if record["error"] is None else float(record["error"]),
                timesteps=tuple(map(float, record["timesteps"])),
                notes={str(key): str(value) for key, value in record["notes"].items()},
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(f"`path` {str(path)!r} holds no plan ({error!r}). Save it again.") from error
        check_version(path, version, FORMAT)
        return plan

    def __str__(self) -> str:
        width = max(map(len, self.kinds), default=0)
        rows = [f"{sum(self.computed)} of {len(self)} steps computed  {pattern(self.computed)}"]
        rows += [f"  {kind:<{width}}  {pattern(computed)}" for kind, computed in self.kinds.items()]
        if self.error is not None:
            rows.append(f"{self.forecaster} of the {self.site} in between, predicted error {self.error:.3g}")
        return "\n".join(rows)


def pattern(computed: Sequence[bool]) -> str:
    """`#` for a computed step, `.` for a reused one."""
    return "".join("#" if each else "." for each in computed)
