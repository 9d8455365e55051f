"""A run of calls as a span: what its blocks take from one another, and the streams that run through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cachekit.structure.layout import Link, Place, Span, Stream
from cachekit.structure.record import DENOISED, Call, Const, Key, Leaf, Record, TensorSpec, leaves_of, made_by


def _links(call: Call, members: Sequence[Call]) -> tuple[Link, ...]:
    """What a block takes from earlier blocks of its span."""
    made = {
        out.token: (m, i)
        for m, member in enumerate(members)
        for i, out in enumerate(member.outs)
        if isinstance(out, Leaf) and out.token in made_by(member)
    }
    return tuple(Link(key, *made[arg.token]) for key, arg in leaves_of(call) if arg.token in made)


def span_of(
    record: Record, maps, positions: Sequence[int], *, front: bool, prefer: int | None = None
) -> tuple[Span, tuple] | None:
    """A run of calls as a span with its residuals, or None where no stream runs through it."""
    members = [record.calls[k] for k in positions]
    links = tuple(_links(call, members[:n]) for n, call in enumerate(members))
    inside = set(positions)
    outside = record.read | {
        arg.token for k, call in enumerate(record.calls) if k not in inside for _, arg in leaves_of(call)
    }
    read = outside & set().union(*map(made_by, members))  # what is handed through is there anyway
    found = []
    for i, out in enumerate(members[-1].outs):
        if isinstance(out, Leaf) and out.token in read:
            key = _origin(len(members) - 1, i, members, [maps[k] for k in positions], links)
            if key is None and not front:
                return None
            base = out if key is None else members[0].args[key]
            written = key in members[0].mutated and out.storage == base.storage
            stream = Stream(leaf=i, key=key, dtype=out.spec.dtype, base=base.spec.dtype, written=written)
            found.append((stream, TensorSpec(out.spec.shape, stream.residual, out.spec.device)))
    if all(stream.key is None for stream, _ in found):
        return None
    order = [*members[0].args, None]
    found.sort(key=lambda pair: order.index(pair[0].key))
    span = Span(
        name=name_of(members),
        paths=tuple(call.path for call in members),
        links=links,
        release=_release(links),
        passing=tuple(_passing(record.calls[k], maps[k]) for k in positions),
        treespecs=tuple(call.treespec for call in members),
        streams=tuple(stream for stream, _ in found),
        main=_main([stream for stream, _ in found], members[0], prefer),
        writes=tuple(
            Place(n, key)
            for n, call in enumerate(members)
            for key in call.mutated
            if not any(link.key == key for link in links[n])
        ),
        aliases=aliases_of(members, links),
        front=front,
    )
    return span, tuple(residual for _, residual in found)


def _passing(call: Call, streams: Mapping[int, Key]) -> tuple[Key | Const | None, ...]:
    """What a block that was left out returns: its arguments; nobody looks at their values."""
    passing: list[Key | Const | None] = []
    for i, out in enumerate(call.outs):
        if isinstance(out, Const):
            passing.append(out)
        else:
            passing.append(streams.get(i, _handed_through(call, i)))
    return tuple(passing)


def _release(links: Sequence[Sequence[Link]]) -> tuple[tuple[int, ...], ...]:
    last_use = {link.member: n for n, taken in enumerate(links) for link in taken}
    return tuple(
        tuple(member for member in range(n) if last_use.get(member, member + 1) == n) for n in range(len(links))
    )


def aliases_of(members: Sequence[Call], links: Sequence[Sequence[Link]]) -> tuple[tuple[Place, ...], ...]:
    """The tensors from outside that share memory with one another, each with its places."""
    places: dict[int, list[Place]] = {}
    sharing: dict[int, set[int]] = {}
    for n, call in enumerate(members):
        taken = {link.key for link in links[n]}
        for key, arg in leaves_of(call):
            if key not in taken:
                places.setdefault(arg.token, []).append(Place(n, key))
                sharing.setdefault(arg.storage, set()).add(arg.token)
    shared = set().union(*(tokens for tokens in sharing.values() if len(tokens) > 1))
    return tuple(tuple(found) for token, found in places.items() if token in shared)


def name_of(members: Sequence[Call]) -> str:
    """The first and the last block."""
    first, last = members[0], members[-1]
    name = first.path if len(members) == 1 else f"{first.path}..{last.path}"
    return name if not first.nth else f"{name}#{first.nth}"


def _origin(member: int, leaf: int, members, maps, links) -> Key | None:
    """Follow a result back through the span to the argument of the first block it continues."""
    while True:
        key = maps[member].get(leaf, _handed_through(members[member], leaf))
        if key is None or member == 0:
            return key
        source = next((link for link in links[member] if link.key == key), None)
        if source is None:
            return None
        member, leaf = source.member, source.out


def _handed_through(call: Call, leaf: int) -> Key | None:
    token = call.outs[leaf].token
    kind = type(call.outs[leaf])
    return next((key for key, arg in call.args.items() if type(arg) is kind and arg.token == token), None)


def _main(streams: Sequence[Stream], head: Call, prefer: int | None) -> int:
    """The stream of the denoised tokens: as stated, or the first argument that was computed from them."""
    for i, stream in enumerate(streams):
        if stream.leaf == prefer and stream.key is not None:
            return i
    for i, stream in enumerate(streams):
        if stream.key is not None and DENOISED in head.args[stream.key].labels:
            return i
    return 0
