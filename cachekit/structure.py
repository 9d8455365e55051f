"""What a model looks like to a cache: chains of blocks, found in the record of one forward.

Everything here is a pure function over plain data. A tensor of the recorded forward is a *token*, an int that two
values share exactly when they were the same object; see `discovery` for how a record is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from cachekit.errors import ArgumentError, ArgumentTypeError, StructureError

Key: TypeAlias = int | str
"""An argument of a block: its position, or its name where it was passed by keyword."""

DENOISED = -1
"""The label of whatever was computed from the first argument of the model's forward; the others count down."""


class TensorSpec(NamedTuple):
    """Shape, dtype and device of a tensor that need not exist."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class Leaf(NamedTuple):
    """A tensor among the arguments or results of a block."""

    token: int
    storage: int  # equal for tensors that share memory
    spec: TensorSpec
    labels: frozenset[int]  # what it was computed from: calls (>= 0) and arguments of the model (< 0)


class Tree(NamedTuple):
    """A container among the arguments: the same object as another argument where the tokens are equal."""

    token: int
    treespec: Any
    leaves: tuple[Any, ...]  # Leaf or Const


class Const(NamedTuple):
    """Anything else."""

    value: Any


class Call(NamedTuple):
    """One call of one block in the recorded forward."""

    path: str  # qualified name of the block
    nth: int  # how many calls of this block came before
    kind: str  # class of the block
    args: dict[Key, Any]  # Leaf, Tree or Const
    treespec: Any  # of the result
    outs: tuple[Any, ...]  # Leaf or Const, flat
    lineage: dict[int, frozenset[Key]]  # output leaf -> arguments it reaches by additions alone
    mutated: frozenset[Key]  # arguments it wrote to
    flops: int


class Record(NamedTuple):
    """One forward: the calls in order, and which block outputs anything but a block has read."""

    calls: tuple[Call, ...]
    read: frozenset[int]  # tokens
    faked: bool  # False where the forward had to be run for real


@dataclass(frozen=True)
class Chain:
    """A chain stated by hand, where discovery cannot see it.

    Attributes:
        blocks: name of a list of blocks, or the names of the blocks in the order they are called.
        streams: output position of a block -> the argument of the same block that it continues (position, or
            name where it is passed by keyword), e.g. `{0: "x"}`. The first is the stream a probe looks at.

    Raises:
        ArgumentError, ArgumentTypeError: no blocks, or no streams.

    Example:
        >>> import cachekit as ck
        >>> ck.Chain("layers", streams={0: 0})
        Chain(blocks='layers', streams={0: 0})
    """

    blocks: str | Sequence[str]
    streams: Mapping[int, Key]

    def __post_init__(self) -> None:
        if not self.blocks or not all(isinstance(name, str) for name in self.blocks):
            raise ArgumentTypeError(f"`blocks` must be names of blocks, got {self.blocks!r}.")
        if not isinstance(self.streams, Mapping) or not self.streams:
            raise ArgumentTypeError(
                f"`streams` must map output positions to arguments, got {self.streams!r}. Use {{0: 0}} for blocks "
                "that take and return one tensor."
            )

    def paths(self, candidates: Iterable[str]) -> list[str]:
        """The blocks it names, among those there are."""
        there = list(candidates)
        if isinstance(self.blocks, str):
            found = [path for path in there if path.rpartition(".")[0] == self.blocks or path == self.blocks]
            if not found:
                raise ArgumentError(f"`blocks` {self.blocks!r} names no list of blocks. There are: {_lists(there)}.")
            return found
        for name in self.blocks:
            if name not in there:
                raise ArgumentError(f"`blocks` names {name!r}, which is no block. There are: {', '.join(there)}.")
        return list(self.blocks)


class Link(NamedTuple):
    """A tensor among a block's arguments that is a result of an earlier block of the span."""

    key: Key
    leaf: int  # of the argument, -1 where it is the tensor itself
    member: int
    out: int  # leaf of the result of that member


class Place(NamedTuple):
    """Where a tensor stands among the arguments of a span."""

    member: int
    key: Key
    leaf: int  # -1 where the argument is the tensor itself


class Stream(NamedTuple):
    """A tensor that runs through a span and is read after it."""

    leaf: int  # among the results of the last block
    key: Key  # argument of the first block it continues
    dtype: torch.dtype  # of the result
    base: torch.dtype  # of the argument

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
    mutated: bool  # whether a block writes to its arguments
    aliases: tuple[tuple[Place, ...], ...]  # tensors that share memory with another one, each with all its places
    front: bool  # always run, as the probe


class Layout(NamedTuple):
    """Where a policy stands in a model."""

    spans: tuple[Span, ...]
    roles: dict[str, tuple[tuple[int, int], ...]]  # block -> (span, member) of each of its calls; (-1, -1) for none

    @property
    def sites(self) -> tuple[Span, ...]:
        """The spans that can be left out."""
        return tuple(span for span in self.spans if not span.front)


class Found(NamedTuple):
    """A layout, and what else discovery has to tell."""

    layout: Layout
    residuals: tuple[tuple[TensorSpec, ...], ...]  # of every span, one a stream
    chains: tuple[str, ...]  # all of them, in the order they run
    leader: str
    reason: str  # why this chain leads
    left: tuple[str, ...]  # chains that always run, with the reason
    faked: bool


def list_name(path: str) -> str:
    """`blocks` of `blocks.3`."""
    return path.rpartition(".")[0] or path


def _lists(paths: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(list_name(path) for path in paths)) or "none"


def _leaves(call: Call) -> list[tuple[Key, int, Leaf]]:
    """Every tensor among the arguments, with its place."""
    found = []
    for key, arg in call.args.items():
        if isinstance(arg, Leaf):
            found.append((key, -1, arg))
        elif isinstance(arg, Tree):
            found += [(key, i, leaf) for i, leaf in enumerate(arg.leaves) if isinstance(leaf, Leaf)]
    return found


def _made(call: Call) -> set[int]:
    """The results that are not arguments handed through."""
    given = {arg.token for _, _, arg in _leaves(call)}
    return {out.token for out in call.outs if isinstance(out, Leaf)} - given


def stream_maps(record: Record, stated: Sequence[Chain] = ()) -> list[dict[int, Key]]:
    """For each call: result leaf -> the argument it continues.

    A call whose result is the next call's argument of the same class teaches the map for the class. What remains
    (the last of a chain, a chain of one) is read off the block's own arithmetic: the argument that reaches the
    result by additions alone. Shape decides nothing where two would fit.
    """
    learned: dict[str, dict[int, Key]] = {}
    for call, following in zip(record.calls, record.calls[1:], strict=False):
        if call.kind != following.kind:
            continue
        place = {arg.token: key for key, arg in following.args.items() if isinstance(arg, Leaf)}
        for i, out in enumerate(call.outs):
            if isinstance(out, Leaf) and out.token in place and out.token in _made(call):
                learned.setdefault(call.kind, {}).setdefault(i, place[out.token])
    by_hand = {path: chain for chain in stated for path in chain.paths(c.path for c in record.calls)}
    maps = []
    for call in record.calls:
        if call.path in by_hand:
            maps.append(_stated_map(call, by_hand[call.path]))
            continue
        streams = {}
        for i, out in enumerate(call.outs):
            if not isinstance(out, Leaf) or out.token not in _made(call):
                continue
            key = learned.get(call.kind, {}).get(i)
            for candidates in ([key] if key is not None else [], sorted(call.lineage.get(i, ()), key=str)):
                fitting = [name for name in candidates if _fits(call.args.get(name), out)]
                if len(fitting) == 1:
                    streams[i] = fitting[0]
                    break
        maps.append(streams)
    return maps


def _fits(arg: Any, out: Leaf) -> bool:
    return isinstance(arg, Leaf) and arg.spec.shape == out.spec.shape


def _stated_map(call: Call, chain: Chain) -> dict[int, Key]:
    for leaf, key in chain.streams.items():
        if leaf >= len(call.outs):
            raise ArgumentError(
                f"`streams` names output {leaf} of {call.path}, which returns {len(call.outs)} values."
            )
        if not isinstance(call.args.get(key), Leaf):
            raise ArgumentError(
                f"`streams` names argument {key!r} of {call.path}, which is no tensor there. "
                f"Its arguments are: {', '.join(repr(name) for name in call.args)}."
            )
    return {leaf: key for leaf, key in chain.streams.items() if isinstance(call.outs[leaf], Leaf)}


def _links(call: Call, members: Sequence[Call]) -> tuple[Link, ...]:
    """What a block takes from earlier blocks of its span."""
    made = {
        out.token: (m, i)
        for m, member in enumerate(members)
        for i, out in enumerate(member.outs)
        if isinstance(out, Leaf) and out.token in _made(member)
    }
    return tuple(
        Link(key, leaf, *made[arg.token]) for key, leaf, arg in _leaves(call) if arg.token in made
    )


def chains_of(record: Record, maps: Sequence[dict[int, Key]]) -> list[tuple[int, ...]]:
    """The calls as chains: runs of blocks in which each continues the streams of the one before.

    A chain is private: between its ends nobody but its own blocks reads its results. So all of it can be run, or
    left out, when its last block is called and the arguments of each are there. Anything else (a concat between
    two lists, a control signal added to the stream, a result that is collected) ends a chain and starts the next.
    """
    calls = record.calls
    produced = {token: k for k, call in enumerate(calls) for token in _made(call)}
    cuts = {produced[token] for token in record.read if token in produced}
    while True:
        chains: list[list[int]] = []
        for k, call in enumerate(calls):
            home = _continued(k, chains, record, maps, cuts)
            if home is None:
                chains.append([k])
            else:
                home.append(k)
        place = {k: i for i, chain in enumerate(chains) for k in chain}
        leaks = set()
        for k, call in enumerate(calls):
            for _, _, arg in _leaves(call):
                source = produced.get(arg.token)
                if source is not None and place[source] != place[k] and chains[place[source]][-1] != source:
                    leaks.add(source)
        if leaks <= cuts:
            return [tuple(chain) for chain in chains]
        cuts |= leaks


def _continued(k, chains, record: Record, maps, cuts) -> list[int] | None:
    """The chain that call `k` continues, if any."""
    call = record.calls[k]
    streams = {call.args[key].token for key in maps[k].values()}
    for chain in reversed(chains):
        members = [record.calls[j] for j in chain]
        made = set().union(*(_made(member) for member in members))
        last = _made(members[-1])
        if streams and streams <= made and streams & last and chain[-1] not in cuts:
            return chain
    return None


def span_of(record: Record, maps, positions: Sequence[int], *, front: bool) -> tuple[Span, tuple] | None:
    """A run of calls as a span with its residuals, or None where no stream runs through it."""
    members = [record.calls[k] for k in positions]
    links = tuple(_links(call, members[:n]) for n, call in enumerate(members))
    inside = set(positions)
    outside = record.read | {
        arg.token for k, call in enumerate(record.calls) if k not in inside for _, _, arg in _leaves(call)
    }
    found = []
    for i, out in enumerate(members[-1].outs):
        if isinstance(out, Leaf) and out.token in outside:
            key = _origin(len(members) - 1, i, members, [maps[k] for k in positions], links)
            if key is None:
                return None
            base = members[0].args[key].spec
            stream = Stream(leaf=i, key=key, dtype=out.spec.dtype, base=base.dtype)
            found.append((stream, TensorSpec(out.spec.shape, stream.residual, out.spec.device)))
    if not found:
        return None
    order = list(members[0].args)
    found.sort(key=lambda pair: order.index(pair[0].key))
    span = Span(
        name=_span_name(members),
        paths=tuple(call.path for call in members),
        links=links,
        release=_release(links),
        passing=tuple(_passing(record.calls[k], maps[k]) for k in positions),
        treespecs=tuple(call.treespec for call in members),
        streams=tuple(stream for stream, _ in found),
        main=_main([stream for stream, _ in found], members[0]),
        mutated=any(call.mutated for call in members),
        aliases=_aliases(members, links),
        front=front,
    )
    return span, tuple(residual for _, residual in found)


def _passing(call: Call, streams: Mapping[int, Key]) -> tuple[Key | Const | None, ...]:
    """What a block that was left out returns: its arguments; nobody looks at their values."""
    passing: list[Key | Const | None] = []
    for i, out in enumerate(call.outs):
        if isinstance(out, Leaf):
            passing.append(streams.get(i, _handed_through(call, i)))
        else:
            passing.append(out)
    return tuple(passing)


def _release(links: Sequence[Sequence[Link]]) -> tuple[tuple[int, ...], ...]:
    last_use = {link.member: n for n, taken in enumerate(links) for link in taken}
    return tuple(
        tuple(member for member in range(n) if last_use.get(member, member + 1) == n) for n in range(len(links))
    )


def _aliases(members: Sequence[Call], links: Sequence[Sequence[Link]]) -> tuple[tuple[Place, ...], ...]:
    places: dict[int, list[Place]] = {}
    sharing: dict[int, set[int]] = {}
    for n, call in enumerate(members):
        taken = {(link.key, link.leaf) for link in links[n]}
        for key, leaf, arg in _leaves(call):
            if (key, leaf) not in taken:
                places.setdefault(arg.token, []).append(Place(n, key, leaf))
                sharing.setdefault(arg.storage, set()).add(arg.token)
    shared = set().union(*(tokens for tokens in sharing.values() if len(tokens) > 1))
    return tuple(tuple(found) for token, found in places.items() if token in shared)


def _span_name(members: Sequence[Call]) -> str:
    first, last = members[0], members[-1]
    name = first.path if len(members) == 1 else f"{first.path}..{last.path}"
    return name if not first.nth else f"{name}#{first.nth}"


def _origin(member: int, leaf: int, members, maps, links) -> Key | None:
    """Follow a result back through the span to the argument of the first block it continues."""
    while True:
        key = maps[member].get(leaf, _handed_through(members[member], leaf))
        if key is None or member == 0:
            return key
        source = next((link for link in links[member] if link.key == key and link.leaf < 0), None)
        if source is None:
            return None
        member, leaf = source.member, source.out


def _handed_through(call: Call, leaf: int) -> Key | None:
    token = call.outs[leaf].token
    return next((key for key, arg in call.args.items() if isinstance(arg, Leaf) and arg.token == token), None)


def _main(streams: Sequence[Stream], head: Call) -> int:
    """The stream of the denoised tokens: the first argument that was computed from them."""
    for i, stream in enumerate(streams):
        if DENOISED in head.args[stream.key].labels:
            return i
    return 0


def lead(record: Record, maps, chains: Sequence[tuple[int, ...]]) -> tuple[int, str]:
    """Which chain is probed, and why.

    The first chain on the denoised tokens in the run of lists that holds most of the block cost. A refiner stays
    outside of the run: after it another argument of the model joins the stream.
    """
    calls = record.calls

    def inputs(chain: tuple[int, ...]) -> frozenset[int]:
        head = calls[chain[0]]
        labels = [head.args[key].labels for key in maps[chain[0]].values()]
        return frozenset().union(*labels) if labels else frozenset()

    denoised = [i for i, chain in enumerate(chains) if DENOISED in inputs(chain)]
    if not denoised:
        denoised = [i for i, chain in enumerate(chains) if inputs(chain) or maps[chain[0]]]
    if not denoised:
        raise StructureError(
            "The model has no chain of blocks that a cache could reuse: no block continues one of its arguments. "
            f"Lists of blocks that ran: {_lists(c.path for c in calls)}. State the structure with cachekit.Chain."
        )
    cost: dict[str, int] = {}
    for i in denoised:
        for k in chains[i]:
            cost[list_name(calls[k].path)] = cost.get(list_name(calls[k].path), 0) + calls[k].flops
    main = max(cost, key=lambda name: cost[name])
    leader = next(i for i in denoised if any(list_name(calls[k].path) == main for k in chains[i]))
    reason = f"{main} holds {cost[main] / max(1, sum(cost.values())):.0%} of the block cost"
    while True:
        feeding = inputs(chains[leader])
        before = [i for i in denoised if i < leader and feeding & set(chains[i])]
        if not before:
            return leader, reason
        previous = before[-1]
        name = list_name(calls[chains[previous][0]].path)
        absorbed = {label for k in chains[previous] for _, _, arg in _leaves(calls[k]) for label in arg.labels}
        if any(label < 0 for label in feeding - absorbed):
            return leader, f"{reason}; {name} before it refines one input alone"
        leader = previous
        reason = f"{reason}; whatever enters it passes through {name}"


def lay_out(record: Record, front: int, stated: Sequence[Chain] = ()) -> Found:
    """Where a policy with `front` probe blocks stands: its spans, and what is left to run always.

    Raises:
        StructureError: there is no chain, or nothing to skip in it.
    """
    if not record.calls:
        raise StructureError(
            "No block of the model ran: it has no nn.ModuleList of blocks, or the forward did not call them. "
            "State the blocks with cachekit.Chain."
        )
    maps = stream_maps(record, stated)
    if stated:
        chains, leader, reason = _by_hand(record, stated), 0, "it is stated first"
    else:
        chains = chains_of(record, maps)
        leader, reason = lead(record, maps, chains)
    spans: list[tuple[Span, tuple, Sequence[int]]] = []
    left = []
    names = [_span_name([record.calls[k] for k in chain]) for chain in chains]
    for i, chain in enumerate(chains):
        if i < leader:
            left.append(f"{names[i]}: runs before the leading chain")
            continue
        probe = chain[:front] if i == leader else ()
        if len(probe) < front and i == leader:
            raise StructureError(
                f"`front` is {front}, but the leading chain {names[i]} has {len(chain)} blocks. Use a smaller front."
            )
        for piece in (probe, chain[len(probe) :]):
            if not piece:
                continue
            found = span_of(record, maps, piece, front=piece is probe)
            if found is not None:
                spans.append((*found, piece))
            elif i == leader:
                raise StructureError(_no_stream(record.calls[piece[0]]))
            else:
                left.append(f"{names[i]}: no argument is known that its result continues")
    if all(span.front for span, _, _ in spans):
        raise StructureError(
            f"Nothing to skip: {names[leader]} is the only chain, and after its {front} front block(s) no block is "
            "left. Use a policy without front blocks, e.g. mag_cache or step_mask."
        )
    home = {k: (s, m) for s, (_, _, piece) in enumerate(spans) for m, k in enumerate(piece)}
    roles: dict[str, list[tuple[int, int]]] = {path: [] for span, _, _ in spans for path in span.paths}
    for k, call in enumerate(record.calls):
        if call.path in roles:
            roles[call.path].append(home.get(k, (-1, -1)))
    layout = Layout(
        spans=tuple(span for span, _, _ in spans), roles={path: tuple(role) for path, role in roles.items()}
    )
    return Found(
        layout=layout,
        residuals=tuple(residuals for _, residuals, _ in spans),
        chains=tuple(names),
        leader=names[leader],
        reason=reason,
        left=tuple(left),
        faked=record.faked,
    )


def _by_hand(record: Record, stated: Sequence[Chain]) -> list[tuple[int, ...]]:
    chains = []
    for chain in stated:
        paths = set(chain.paths(call.path for call in record.calls))
        chains.append(tuple(k for k, call in enumerate(record.calls) if call.path in paths))
    return chains


def _no_stream(call: Call) -> str:
    arguments = ", ".join(f"{key!r} {arg.spec}" for key, _, arg in _leaves(call))
    results = ", ".join(str(out.spec) for out in call.outs if isinstance(out, Leaf))
    return (
        f"Which argument does the result of {call.path} ({call.kind}) continue? Results: {results or 'no tensor'}; "
        f"arguments: {arguments or 'no tensor'}. State it with cachekit.Chain(blocks=..., streams={{0: argument}})."
    )
