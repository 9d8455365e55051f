"""A plan: what every step does, where that is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plan:
    """The actions of a whole trajectory, known before it starts."""

    computed: tuple[bool, ...]  # whether a step computes everything
    kinds: dict[str, tuple[bool, ...]] = field(default_factory=dict)  # the same by kind, where each has its own plan

    def __len__(self) -> int:
        return len(self.computed)

    @property
    def actions(self) -> int:
        """How many different ways to run a step there are: `step.compile()` makes one program of each."""
        return len(set(zip(*self.kinds.values(), strict=True))) if self.kinds else len(set(self.computed))

    def __str__(self) -> str:
        width = max(map(len, self.kinds), default=0)
        rows = [f"{sum(self.computed)} of {len(self)} steps computed  {pattern(self.computed)}"]
        rows += [f"  {kind:<{width}}  {pattern(computed)}" for kind, computed in self.kinds.items()]
        return "\n".join(rows)


def pattern(computed: Sequence[bool]) -> str:
    """`#` for a computed step, `.` for a reused one."""
    return "".join("#" if each else "." for each in computed)
