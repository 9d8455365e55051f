"""A caching method as a value: what is measured, when to compute, what to return instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cachekit.deciders import Decider, Sums, any_of
from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.forecasters import Forecaster
from cachekit.guidance import GUIDANCE, Guidance
from cachekit.structure.layout import ALL
from cachekit.structure.parts import PARTS, Sites, patterns_of
from cachekit.structure.record import KINDS

SITES = ("chain", "output", *PARTS)
RECORDED = ("output", "chain", "probe")


@dataclass(frozen=True)
class Policy:
    """One row of the table of methods: a signal, a decider and a forecaster on the chain of blocks.

    Attributes:
        name: of the method, for tables.
        decider: when to compute. Or, for modules inside the blocks, one static decider for each kind among "spatial",
            "temporal", "cross" and "mlp"; kinds that are not named always run.
        forecaster: what to return instead. On a chain it sees the residual, output minus input, of every stream that
            is read after the chain; elsewhere the tensors that are returned.
        signal: `signal(value, reference) -> Sums`, or None to measure nothing. With `front` blocks, `value` is
            their residual on the denoised tokens and `reference` that of the last computed step, and the decider
            sees the outcome of this step. Without, `value` is the residual of a whole chain and `reference` its
            forecast, and the outcome is only logged.
        front: how many blocks of the leading chain always run, as a probe.
        sites: what is left out and forecast. "chain": the residual of every chain of blocks, the rest of the model
            runs. "output": what the model returns, and on a reuse nothing of it runs but the front blocks and what
            they need. "attention", "mlp", "attention+mlp": what these modules inside the blocks return, found by what
            they do. Or a tuple of regular expressions: what modules return whose whole name matches one; or such a
            tuple for each kind.
        guidance: how the unconditional half of the batch is left out, where it is. The modules inside the blocks
            then compute on every full step, and remember the conditional half.
        recorded: for a policy that leaves nothing out, what is written down of every step: any of "output", "chain",
            "probe". Its forecaster is the recorder. See `cachekit.recording`.
        made_for: what a plan was recorded with, "scheduler" and "guidance", where that is to be compared.
        sketch: of what is recorded, how many numbers of a value are kept; None for a default.
        deciders: the deciders by group of sites: by kind, or one for "all".
        static: whether all is known before the first step.

    Raises:
        ArgumentError, ArgumentTypeError: the parts do not fit together.

    Example:
        >>> import cachekit as ck
        >>> ck.Policy(
        ...     name="first block, quadratic forecast",
        ...     decider=ck.deciders.warmup(3, ck.deciders.drift(0.1)),
        ...     forecaster=ck.forecasters.newton(2),
        ...     signal=ck.signals.change,
        ...     front=1,
        ... ).name
        'first block, quadratic forecast'
    """

    name: str
    decider: Decider | Mapping[str, Decider]
    forecaster: Forecaster
    signal: Callable[[Tensor, Tensor], Sums] | None = None
    front: int = 0
    sites: Sites = "chain"
    guidance: Guidance | None = None
    recorded: tuple[str, ...] = ()
    sketch: int | None = None
    made_for: Mapping[str, str] = field(default_factory=dict)
    deciders: dict[str, Decider] = field(init=False, repr=False, compare=False)
    static: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_sites(self.sites)
        given = dict(self.decider) if isinstance(self.decider, Mapping) else {ALL: self.decider}
        if self.guidance is not None:
            if not self.grouped or self.front:
                raise ArgumentError("`guidance` goes with deciders by kind of module, and front=0.")
            given = {group: any_of(self.guidance.decider, decider) for group, decider in given.items()}
            given[GUIDANCE] = self.guidance.decider
        # Worked out once: a step on the host asks for them.
        object.__setattr__(self, "deciders", given)
        object.__setattr__(self, "static", all(getattr(decider, "static", True) for decider in given.values()))
        for group, decider in self.deciders.items():
            if not isinstance(decider, Decider):
                raise ArgumentTypeError(
                    f"`decider` must be a Decider, got {type(decider).__name__}. Use a factory of cachekit.deciders."
                )
            if self.grouped and group not in (*KINDS, GUIDANCE):
                raise ArgumentError(f"`decider` has the kind {group!r}. The kinds are {', '.join(map(repr, KINDS))}.")
            if self.grouped and not decider.static:
                raise ArgumentError(
                    f"`decider` {decider.name!r} for {group!r} looks at a signal. Deciders by kind must be static; "
                    "or give one decider for all."
                )
        if self.grouped and (not self.deciders or self.sites in ("chain", "output")):
            raise ArgumentError(
                f"`decider` is given by kind with sites={self.sites!r}. Kinds are those of modules inside the blocks: "
                'name at least one, with sites="attention+mlp" or patterns.'
            )
        if not isinstance(self.forecaster, Forecaster):
            raise ArgumentTypeError(
                f"`forecaster` must be a Forecaster, got {type(self.forecaster).__name__}. "
                "Use a factory of cachekit.forecasters, e.g. cachekit.forecasters.hold()."
            )
        if isinstance(self.front, bool) or not isinstance(self.front, int) or self.front < 0:
            raise ArgumentError(f"`front` must be an int >= 0, got {self.front!r}. It counts blocks.")
        if self.sites != "chain" and self.signal is not None and not self.front:
            raise ArgumentError(
                f"`signal` is measured on chains; with sites={self.sites!r} and front=0 give signal=None."
            )
        if self.recorded and (not set(self.recorded) <= set(RECORDED) or self.front or not self.static):
            raise ArgumentError(
                f"`recorded` is {self.recorded!r}: it names some of {', '.join(map(repr, RECORDED))}, of a policy that "
                "leaves nothing out. Use cachekit.recording()."
            )
        if self.front and self.signal is None:
            raise ArgumentError(
                f"`signal` is None with front={self.front}. Give a signal, e.g. cachekit.signals.change."
            )
        if not self.front and not self.static:
            raise ArgumentError(
                f"`decider` {self.deciders[ALL].name!r} looks at a signal, and with front=0 none is measured before "
                "the decision. Use front=1."
            )

    @property
    def grouped(self) -> bool:
        """Whether every kind of module has a decider of its own."""
        return isinstance(self.decider, Mapping)

    @property
    def groups(self) -> tuple[str, ...]:
        """The kinds of modules that have a decider of their own."""
        return tuple(group for group in self.deciders if group in KINDS)


def _check_sites(sites: Any) -> None:
    if isinstance(sites, str) and sites in SITES:
        return
    patterns = patterns_of(sites) if isinstance(sites, (tuple, dict)) else ()
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentError(
            f"`sites` must be one of {', '.join(map(repr, SITES))}, a tuple of regular expressions, or a dict of such "
            f"tuples by kind, got {sites!r}."
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ArgumentError(
                f"`sites` has the pattern {pattern!r}, which is no regular expression: {error}."
            ) from error
