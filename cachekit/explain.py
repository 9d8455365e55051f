"""What a step would do, as text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cachekit.guidance import GUIDANCE
from cachekit.state import State, human_bytes, state_bytes
from cachekit.structure.layout import ALL, Found, Layout

if TYPE_CHECKING:
    from cachekit.plan import Plan
    from cachekit.transform import CachedStep


def explanation(step: CachedStep, found: Found, state: State, plan: Plan | None) -> str:
    """Chains, sites, bytes of state and the plan: see `CachedStep.explain`."""
    rows = [f"{type(step.opened.original).__name__} under {step.policy.name}"]
    how = "a forward on fake tensors" if found.faked else "one real forward (it branches on data or is patched)"
    rows.append(f"found by {how}" + (f": {len(found.chains)} chains" if found.chains else ""))
    if found.chains:
        rows.append(f"leading chain: {found.leader} ({found.reason})")
    rows += [f"always runs: {entry}" for entry in found.left]
    rows.append(f"{'site':<58} {'modules':>7} {'tensors':>7} {'state':>10}")
    for name, modules, tensors, held in _sites(found, state):
        rows.append(f"{name:<58} {modules:>7} {tensors:>7} {human_bytes(state_bytes(held)):>10}")
    rows.append(f"total state: {human_bytes(state_bytes(state))} ({state_bytes(state)} bytes)")
    if plan is None:
        rows.append(f"plan: none, decided step by step ({step.policy.deciders[ALL].name})")
    else:
        rows.append(f"plan: {plan}")
        guidance = step.policy.guidance
        calls = len(set(plan.kinds[GUIDANCE])) if guidance is not None and guidance.separate else 0
        rows.append(f"programs of step.compile(): {plan.actions + (step.policy.front > 0) + calls}")
    return "\n".join(rows)


def _sites(found: Found, state: State):
    """Name, number of modules, tensors remembered of each call, and what is held."""
    layout: Layout = found.layout
    for span in layout.spans:
        if span.front:
            yield f"{span.name} (probe, always runs)", len(span.paths), 1, state.reference
        elif span.name in state.sites:
            yield span.name, len(span.paths), len(span.streams), state.sites[span.name]
    if layout.output is not None:
        yield layout.output.name, "-", len(layout.output.dtypes), state.sites[layout.output.name]
    if layout.guided is not None:
        yield f"{layout.guided.name} (the unconditional half)", "-", 2, state.sites[layout.guided.name]
    for kind, names in found.kinds.items():
        alike: dict[str, list[str]] = {}
        for name in names:
            alike.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
        for pattern, members in alike.items():
            held = [state.sites[name] for name in members]
            yield f"{kind}: {pattern}", len(members), len(held[0]), held
