"""Chains of blocks, found in the record of one forward or stated by hand. Pure functions over plain data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachekit.errors import ArgumentError, ArgumentTypeError, StructureError
from cachekit.structure.record import (
    DENOISED,
    Call,
    Key,
    Leaf,
    Opaque,
    Record,
    instead,
    known,
    leaves_of,
    list_name,
    lists_of,
    made_by,
    opaque,
)


@dataclass(frozen=True)
class Chain:
    """A chain stated by hand, where discovery cannot see it.

    Attributes:
        blocks: name of a list of blocks, or the names of the blocks in the order they are called.
        streams: output position of a block -> the argument of the same block that it continues (position, or
            name where it is passed by keyword), e.g. `{0: "x"}`; of an argument that is a list or a dict one tensor,
            e.g. `{0: ("tokens", 0), 1: ("tokens", 1)}`. The first is the stream a probe looks at.

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
        listed = isinstance(self.blocks, (str, list, tuple)) and len(self.blocks) > 0
        if not listed or not all(isinstance(name, str) for name in self.blocks):
            raise ArgumentTypeError(f"`blocks` must be names of blocks, got {self.blocks!r}.")
        if not isinstance(self.streams, Mapping) or not self.streams:
            raise ArgumentTypeError(
                f"`streams` must map output positions to arguments, got {self.streams!r}. Use {{0: 0}} for blocks "
                "that take and return one tensor."
            )
        for leaf in self.streams:
            if isinstance(leaf, bool) or not isinstance(leaf, int) or leaf < 0:
                raise ArgumentTypeError(
                    f"`streams` must map output positions to arguments, got {leaf!r} for one. Use 0 for the first."
                )

    def paths(self, candidates: Iterable[str]) -> list[str]:
        """The blocks it names, among those there are."""
        there = list(candidates)
        if isinstance(self.blocks, str):
            found = [path for path in there if path.rpartition(".")[0] == self.blocks or path == self.blocks]
            found = list(dict.fromkeys(found))
            if not found:
                raise ArgumentError(f"`blocks` {self.blocks!r} names no list of blocks. There are: {lists_of(there)}.")
            return found
        for name in self.blocks:
            if name not in there:
                raise ArgumentError(f"`blocks` names {name!r}, which is no block. There are: {', '.join(there)}.")
        return list(self.blocks)


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
            if isinstance(out, Leaf) and out.token in place and out.token in made_by(call):
                learned.setdefault(call.kind, {}).setdefault(i, place[out.token])
    by_hand = {path: chain for chain in stated for path in chain.paths(c.path for c in record.calls)}
    maps = []
    for call in record.calls:
        if call.path in by_hand:
            maps.append(_stated_map(call, by_hand[call.path]))
            continue
        streams = {}
        for i, out in enumerate(call.outs):
            if not isinstance(out, Leaf) or out.token not in made_by(call):
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
            raise ArgumentError(f"`streams` names output {leaf} of {call.path}, which returns {len(call.outs)} values.")
        arg, out = call.args.get(key), call.outs[leaf]
        if isinstance(arg, Leaf) and isinstance(out, Leaf) and arg.spec.shape != out.spec.shape:
            raise ArgumentError(
                f"`streams` says that output {leaf} of {call.path}, {out.spec}, continues its argument {key!r}, "
                f"{arg.spec}. A stream keeps its shape: name another argument."
            )
        if not isinstance(arg, Leaf):
            raise ArgumentError(
                f"`streams` names argument {key!r} of {call.path}, which is no tensor there. Its arguments are: "
                f"{', '.join(repr(name) for name in call.args)}. Of a container name one tensor: (argument, which one)."
            )
    return {leaf: key for leaf, key in chain.streams.items() if isinstance(call.outs[leaf], Leaf)}


def chains_of(record: Record, maps: Sequence[dict[int, Key]]) -> list[tuple[int, ...]]:
    """The calls as chains: runs of blocks in which each continues the streams of the one before.

    A chain is private: between its ends nobody but its own blocks reads its results. So all of it can be run, or
    left out, when its last block is called and the arguments of each are there. Anything else (a concat between
    two lists, a control signal added to the stream, a result that is collected) ends a chain and starts the next.
    """
    calls = record.calls
    produced = {token: k for k, call in enumerate(calls) for token in made_by(call)}
    cuts = {produced[token] for token in record.read if token in produced}
    while True:
        chains: list[list[int]] = []
        for k in range(len(calls)):
            home = _continued(k, chains, record, maps, cuts)
            if home is None:
                chains.append([k])
            else:
                home.append(k)
        place = {k: i for i, chain in enumerate(chains) for k in chain}
        leaks = set()
        for k, call in enumerate(calls):
            for _, arg in leaves_of(call):
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
        made = set().union(*(made_by(member) for member in members))
        last = made_by(members[-1])
        if maps[chain[0]] and streams and streams <= made and streams & last and chain[-1] not in cuts:
            return chain
    return None


def _statable(record: Record) -> str:
    """How the chain could be stated by hand, where it can, for messages."""
    kinds = [arg.kind for call in record.calls for arg in call.args.values() if isinstance(arg, Opaque)]
    carried = next((kind for kind in kinds if any(opaque(call.outs) == kind for call in record.calls)), None)
    if carried is not None:
        return f" They take and return an object of class {carried}, into which nothing looks{known(carried)}."
    for call in record.calls:
        for i, out in enumerate(call.outs):
            keys = [key for key, arg in leaves_of(call) if isinstance(out, Leaf) and _fits(arg, out)]
            home = list_name(call.path)
            listed = [other for other in record.calls if other.nth == 0 and list_name(other.path) == home]
            whole = bool(keys) and len(listed) > 1 and _connected(listed, i, keys[0])
            if whole or (keys and not any(part.kind for part in record.parts)):
                chain = f"cachekit.Chain({home if whole else call.path!r}, {{{i}: {keys[0]!r}}})"
                others = "" if whole or len(listed) == 1 else ", and so on for the others"
                return f" If a block's result continues its argument, state it: {chain}{others}."
    return ""


def _connected(calls: Sequence[Call], leaf: int, key: Key) -> bool:
    """Whether each block takes as this argument what the one before it returned as this result."""
    pairs = [(one.outs[leaf : leaf + 1], other.args.get(key)) for one, other in itertools.pairwise(calls)]
    return all(
        isinstance(arg, Leaf) and any(isinstance(out, Leaf) and out.token == arg.token for out in outs)
        for outs, arg in pairs
    )


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
            "The model has no chain of blocks that a cache could reuse: no block is known to continue one of its "
            f"arguments. Blocks that ran: {lists_of(c.path for c in calls)}.{_statable(record)}{instead(record)}"
        )
    weighed = [calls[k] for i in denoised for k in chains[i]]
    unseen = any(not call.flops and (call.kind in record.strange or record.real) for call in weighed)
    cost: dict[str, int] = {}
    for call in weighed:
        cost[list_name(call.path)] = cost.get(list_name(call.path), 0) + (call.weights if unseen else call.flops)
    main = max(cost, key=lambda name: cost[name])
    leader = next(i for i in denoised if any(list_name(calls[k].path) == main for k in chains[i]))
    what = "blocks' parameters (what some of them multiply is not known)" if unseen else "block cost"
    reason = f"{main} holds {cost[main] / max(1, sum(cost.values())):.0%} of the {what}"
    while True:
        feeding = inputs(chains[leader])
        before = [i for i in denoised if i < leader and feeding & set(chains[i])]
        if not before:
            return leader, reason
        previous = before[-1]
        name = list_name(calls[chains[previous][0]].path)
        absorbed = {label for k in chains[previous] for _, arg in leaves_of(calls[k]) for label in arg.labels}
        if any(label < 0 for label in feeding - absorbed):
            return leader, f"{reason}; {name} before it refines one input alone"
        leader = previous
        reason = f"{reason}; whatever enters it passes through {name}"
