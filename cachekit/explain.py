"""What a step would do, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from cachekit.guidance import GUIDANCE
from cachekit.plans import Plan
from cachekit.state import State, human_bytes, state_bytes
from cachekit.structure.layout import Found, Layout
from cachekit.structure.record import alike

if TYPE_CHECKING:
    from cachekit.transform import CachedStep


class SiteRow(NamedTuple):
    """A site, or those that differ by their number alone."""

    name: str
    modules: int | None  # None for the model as a whole
    tensors: int  # remembered of each call
    state_bytes: int


class Explanation(NamedTuple):
    """Chains, sites, bytes of state and the plan; `str` is a table."""

    model: str  # name of its class
    policy: str
    real: str | None  # why it was found by a real forward, or None where one on fake tensors was enough
    chains: int
    leader: str | None  # the chain that decides, and why it does
    left: tuple[str, ...]  # what always runs
    sites: tuple[SiteRow, ...]
    state_bytes: int
    plan: Plan | None  # None where it is decided step by step
    decider: str
    programs: int | None  # of `step.compile()`, where they are known

    @property
    def faked(self) -> bool:
        """Whether it was found by a forward on fake tensors, not by a real one."""
        return self.real is None

    def __str__(self) -> str:
        rows = [f"{self.model} under {self.policy}"]
        how = "a forward on fake tensors" if self.faked else f"one real forward ({self.real})"
        rows.append(f"found by {how}" + (f": {self.chains} chains" if self.chains else ""))
        if self.leader:
            rows.append(f"leading chain: {self.leader}")
        rows += [f"always runs: {entry}" for entry in self.left]
        rows.append(f"{'site':<58} {'modules':>7} {'tensors':>7} {'state':>10}")
        for row in self.sites:
            modules = "-" if row.modules is None else row.modules
            rows.append(f"{row.name:<58} {modules:>7} {row.tensors:>7} {human_bytes(row.state_bytes):>10}")
        rows.append(f"total state: {human_bytes(self.state_bytes)} ({self.state_bytes} bytes)")
        if self.plan is None:
            rows.append(f"plan: none, decided step by step ({self.decider})")
        else:
            rows.append(f"plan: {self.plan}")
            rows.append(f"programs of step.compile(): {self.programs}")
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        plan = self.plan and {"computed": list(self.plan.computed), "kinds": {**self.plan.kinds}}
        return {**self._asdict(), "faked": self.faked, "sites": [row._asdict() for row in self.sites], "plan": plan}


def explanation(step: CachedStep, found: Found, state: State, plan: Plan | None) -> Explanation:
    """What `CachedStep.explain` returns."""
    programs = None
    if plan is not None:
        guidance = step.policy.guidance
        calls = len(set(plan.kinds[GUIDANCE])) if guidance is not None and guidance.separate else 0
        programs = plan.actions + (step.policy.front > 0) + calls
    return Explanation(
        model=type(step.opened.original).__name__,
        policy=step.policy.name,
        real=found.real,
        chains=len(found.chains),
        leader=f"{found.leader} ({found.reason})" if found.chains else None,
        left=tuple(found.left),
        sites=tuple(_sites(found, state)),
        state_bytes=state_bytes(state),
        plan=plan,
        decider=", ".join(decider.name for decider in step.policy.deciders.values()),
        programs=programs,
    )


def _sites(found: Found, state: State) -> Iterator[SiteRow]:
    layout: Layout = found.layout
    for span in layout.spans:
        if span.front:
            yield SiteRow(f"{span.name} (probe, always runs)", len(span.paths), 1, state_bytes(state.reference))
        elif span.name in state.sites:
            yield SiteRow(span.name, len(span.paths), len(span.streams), state_bytes(state.sites[span.name]))
    if layout.tap is not None:
        for name in (layout.tap.front.name, layout.tap.rest):
            yield SiteRow(name, None, len(state.sites[name]), state_bytes(state.sites[name]))
    if layout.output is not None:
        held = state_bytes(state.sites[layout.output.name])
        yield SiteRow(layout.output.name, None, len(layout.output.dtypes), held)
    if layout.guided is not None:
        held = state_bytes(state.sites[layout.guided.name])
        yield SiteRow(f"{layout.guided.name} (the unconditional half)", None, 2, held)
    for kind, names in found.kinds.items():
        for pattern, members in alike(names).items():
            each = [state.sites[name] for name in members]
            yield SiteRow(f"{kind}: {pattern}", len(members), len(each[0]), state_bytes(each))
