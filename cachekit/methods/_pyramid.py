"""Pyramid Attention Broadcast: attention changes little in the middle of a run, in time less than in space.

Source: Pyramid Attention Broadcast, arXiv 2408.12588 (https://github.com/NUS-HPC-AI-Lab/VideoSys), and the hooks of
diffusers.

Departures: attention and its kind are found by what it does, where the hooks of diffusers go by class, name and an
attribute that not every class has. Every stream of guidance has a state of its own, where one state for all
of them lets the unconditional call reuse conditional attention.
"""

from __future__ import annotations

from collections.abc import Mapping

from cachekit import deciders, forecasters
from cachekit.deciders import Decider
from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.methods._first_block import check_semantics
from cachekit.policy import Policy
from cachekit.structure.record import KINDS

Range = tuple[float, float]


def pyramid_attention_broadcast(
    spatial: int | None = 2,
    temporal: int | None = None,
    cross: int | None = None,
    *,
    spatial_range: Range = (100, 800),
    temporal_range: Range = (100, 800),
    cross_range: Range = (100, 800),
    mlp: int | None = None,
    patterns: Mapping[str, str | tuple[str, ...]] | None = None,
    semantics: str = "paper",
) -> Policy:
    """Compute attention every few steps, and return what it last returned in between.

    Needs the values of the timesteps at `init`, on the scale 0..1000. In a pipeline those of schedulers on other scales
    are converted.

    Args:
        spatial, temporal, cross: compute this kind of attention every n-th step, n >= 1; None computes it always.
        spatial_range, temporal_range, cross_range: reuse only while `low < t < high`.
        mlp: the same for feed-forward networks, within `spatial_range`. Little is gained by it.
        patterns: kind -> regular expression, or several, that whole names of modules must match; None finds them.
        semantics: "paper", or "diffusers", whose hooks treat temporal attention as spatial where `spatial` is given.

    Raises:
        ArgumentError, ArgumentTypeError: a value is out of range, or nothing is left out.

    Example:
        >>> import cachekit as ck
        >>> policy = ck.pyramid_attention_broadcast(2, cross=3, spatial_range=(100, 850))
        >>> policy.name
        'pyramid_attention_broadcast(spatial 2, cross 3)'
        >>> ck.deciders.plan(policy.deciders["spatial"], [900, 800, 700, 600, 500, 50])
        (True, False, True, False, True, True)
    """
    check_semantics(semantics)
    intervals = {"spatial": spatial, "temporal": temporal, "cross": cross, "mlp": mlp}
    ranges = {
        "spatial": spatial_range,
        "temporal": temporal_range,
        "cross": cross_range,
        "mlp": spatial_range,
    }
    given: dict[str, Decider] = {
        kind: broadcast(kind, every, ranges[kind]) for kind, every in intervals.items() if every is not None
    }
    if not given:
        raise ArgumentError("`spatial`, `temporal`, `cross` and `mlp` are all None. Give at least one an interval.")
    if semantics == "diffusers" and "spatial" in given and patterns is None:
        given["temporal"] = given["spatial"]
    name = ", ".join(f"{kind} {every}" for kind, every in intervals.items() if every is not None)
    return Policy(
        name=f"pyramid_attention_broadcast({name})",
        decider=given,
        forecaster=forecasters.hold(),
        sites="attention+mlp" if patterns is None else _patterns(patterns, given),
    )


def broadcast(name: str, every: int, within: Range) -> Decider:
    """Compute every `every`-th step, and whenever the timestep is not inside the open range."""
    if not isinstance(within, (tuple, list)) or len(within) != 2:
        raise ArgumentTypeError(f"`{name}_range` must be a pair (low, high), got {within!r}.")
    low, high = within
    for end in within:
        deciders.check_number(f"{name}_range", end)
    if not low < high:
        raise ArgumentError(f"`{name}_range` must be (low, high) with low < high, got {within!r}. Swap them.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ArgumentError(f"`{name}` must be an int >= 1, got {every!r}. 1 computes every step.")
    return deciders.within(low, high, deciders.interval(every))


def _patterns(
    patterns: Mapping[str, str | tuple[str, ...]], given: Mapping[str, Decider]
) -> dict[str, tuple[str, ...]]:
    if not isinstance(patterns, Mapping):
        raise ArgumentTypeError(f"`patterns` must be a dict from kind to regular expression, got {patterns!r}.")
    for kind, each in patterns.items():
        if kind not in KINDS:
            raise ArgumentError(f"`patterns` has the kind {kind!r}. The kinds are {', '.join(map(repr, KINDS))}.")
        if kind not in given:
            raise ArgumentError(f"`patterns` names {kind!r}, which has no interval. Give `{kind}` one.")
        if not all(isinstance(pattern, str) for pattern in ((each,) if isinstance(each, str) else each or (None,))):
            raise ArgumentTypeError(f"`patterns` has {each!r} for {kind!r}. Give a regular expression, or several.")
    missing = [kind for kind in given if kind not in patterns]
    if missing:
        raise ArgumentError(f"`patterns` does not name {missing[0]!r}, which has an interval. Give it a pattern.")
    return {kind: (each,) if isinstance(each, str) else tuple(each) for kind, each in patterns.items()}
