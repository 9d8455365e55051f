"""Where a policy stands in a model: spans of its chains, outputs, and what runs through them."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from cachekit.structure.record import Const, Key, TensorSpec

ALL = "all"
"""The group of every site, where one decision governs all."""


class Link(NamedTuple):
    """A tensor among a block's arguments that is a result of an earlier block of the span."""

    key: Key
    member: int
    out: int  # leaf of the result of that member


class Place(NamedTuple):
    """Where a tensor stands among the arguments of a span."""

    member: int
    key: Key


class Stream(NamedTuple):
    """A tensor that runs through a span and is read after it."""

    leaf: int  # among the results of the last block
    key: Key | None  # argument of the first block it continues; None of what the first of a probe makes itself
    dtype: torch.dtype  # of the result
    base: torch.dtype  # of the argument
    written: bool  # whether the result is the argument itself, written to in place

    @property
    def residual(self) -> torch.dtype:
        """Of result minus argument."""
        return torch.promote_types(self.dtype, self.base)


class Span(NamedTuple):
    """Blocks that hand a stream on to one another, to be run, or left out, in one piece when the last is called.

    It holds no shapes: another resolution is the same span.
    """

    name: str
    paths: tuple[str, ...]
    links: tuple[tuple[Link, ...], ...]  # for every block, what it takes from earlier ones
    release: tuple[tuple[int, ...], ...]  # after every block, the earlier ones whose results nobody needs any more
    passing: tuple[tuple[Key | Const | None, ...], ...]  # a block's result leaf -> its argument of the same stream
    treespecs: tuple[Any, ...]  # of the blocks' results
    streams: tuple[Stream, ...]
    main: int  # which stream carries the denoised tokens
    writes: tuple[Place, ...]  # tensors from outside that a block writes to
    aliases: tuple[tuple[Place, ...], ...]  # tensors that share memory with another one, each with all its places
    front: bool  # always run, as the probe

    @property
    def mutated(self) -> bool:
        """Whether a block writes to what the span was given."""
        return bool(self.writes)


class Like(NamedTuple):
    """An argument by which another batch or resolution is noticed where nothing is computed."""

    key: Key
    whole: bool  # whether it has the shape of the result, or only its batch


class Output(NamedTuple):
    """What a module returns, as a site: on a reuse nothing of the module runs."""

    name: str
    treespec: Any
    leaves: tuple[Any, ...]  # Const, None where a tensor stands, Opaque where nothing is left out
    dtypes: tuple[torch.dtype, ...]  # of the tensors
    like: tuple[Like | None, ...]  # for every tensor; None where no argument is
    group: str = ALL  # whose decision it follows
    aliases: tuple[tuple[Place, ...], ...] = ()  # of its arguments, as in a span
    copied: bool = True  # whether what is remembered is a copy: others may write to what is returned


class Tap(NamedTuple):
    """Where a recording looks into a span: after its first blocks."""

    span: str  # name of the leading span
    front: Span  # the first blocks of it, which a probe would be
    rest: str  # name of what is recorded of the others


class Layout(NamedTuple):
    """Where a policy stands in a model."""

    spans: tuple[Span, ...]  # with an output or parts, those but the first are not remembered
    output: Output | None  # of the model
    guided: Output | None  # of the model, where guidance is a site
    parts: dict[str, tuple[Output, ...]]  # module inside a block -> what each of its calls returns
    early: tuple[str, ...]  # modules whose results, computed with the probe, need not be computed again after it
    written: str | None  # an argument or buffer of the model that its forward writes to
    roles: dict[str, tuple[tuple[int, int], ...]]  # block -> (span, member) of each of its calls; (-1, -1) for none
    recorded: bool = False  # whether all runs, and output and spans are both remembered
    tap: Tap | None = None  # of a recording

    @property
    def sites(self) -> tuple[Span | Output, ...]:
        """What can be left out, and is remembered."""
        if self.recorded:
            outputs = (self.output,) if self.output is not None else ()
            taps = (self.tap.front, self.tap.front._replace(name=self.tap.rest)) if self.tap is not None else ()
            return (*outputs, *self.spans, *taps)
        if self.output is not None:
            return (self.output,)
        if self.parts:
            parts = tuple(itertools.chain.from_iterable(self.parts.values()))
            return (*parts, self.guided) if self.guided is not None else parts
        return tuple(span for span in self.spans if not span.front)

    def renamed(self, suffix: str) -> Layout:
        """The same under other names."""
        spans = tuple(span._replace(name=span.name + suffix) for span in self.spans)
        output, guided = (site and site._replace(name=site.name + suffix) for site in (self.output, self.guided))
        parts = {
            path: tuple(part._replace(name=part.name + suffix) for part in calls) for path, calls in self.parts.items()
        }
        tap = self.tap and Tap(
            self.tap.span + suffix,
            self.tap.front._replace(name=self.tap.front.name + suffix),
            self.tap.rest + suffix,
        )
        return self._replace(spans=spans, output=output, guided=guided, parts=parts, tap=tap)


NOTHING = Layout(spans=(), output=None, guided=None, parts={}, early=(), written=None, roles={})
"""Of a policy that stands nowhere."""


class Found(NamedTuple):
    """A layout, and what else discovery has to tell."""

    layout: Layout
    specs: tuple[tuple[TensorSpec, ...], ...]  # what every site remembers: residuals of its streams, or its tensors
    reference: TensorSpec | None  # residual of the probe
    kinds: dict[str, tuple[str, ...]]  # kind -> names of the parts that are sites
    chains: tuple[str, ...]  # all of them, in the order they run
    leader: str
    reason: str  # why this chain leads
    left: tuple[str, ...]  # chains that always run, with the reason
    real: str | None
