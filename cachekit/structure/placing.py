"""From the record of a forward to the layout of a policy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cachekit.errors import ArgumentError, StructureError
from cachekit.guidance import GUIDANCE
from cachekit.structure.chains import Chain, chains_of, lead, stream_maps
from cachekit.structure.layout import ALL, NOTHING, Found, Layout, Like, Output, Span, Stream, Tap
from cachekit.structure.parts import PARTS, Sites, matches, patterns_of
from cachekit.structure.record import (
    KINDS,
    Key,
    Leaf,
    Opaque,
    Part,
    Record,
    TensorSpec,
    alike,
    instead,
    known,
    leaves_of,
    made_by,
    opaque,
)
from cachekit.structure.spans import aliases_of, name_of, span_of


def lay_out(
    record: Record,
    front: int,
    stated: Sequence[Chain] = (),
    sites: Sites = "chain",
    groups: Sequence[str] = (),
    guided: bool = False,
    recorded: Sequence[str] = (),
) -> Found:
    """Where a policy with `front` probe blocks stands: its spans, and what is left to run always.

    Args:
        record: of the model's forward.
        front: how many blocks of the leading chain always run.
        stated: chains by hand.
        sites: "chain", "output", one of `PARTS`, or patterns of names.
        groups: kinds of parts, where each has a decision of its own; the others always run then.
        guided: whether guidance is a site too. The record is that of the conditional half then.
        recorded: what a policy records instead of leaving it out: "output", "chain", "probe".

    Raises:
        StructureError: there is no chain, or nothing to skip in it.
    """
    output = _output(record.outs, record.treespec, "output", record.given)
    if sites == "chain" or front:
        found = _with_chains(record, front, stated, remembered=sites == "chain")
    else:
        found = Found(NOTHING, (), None, {}, (), "none", "none is needed", (), record.real)
    if recorded:
        return _recorded(found, record, stated, output if "output" in recorded else None, tapped="probe" in recorded)
    if sites == "output":
        if not output.dtypes:
            raise StructureError(
                "The model returns no tensor that could be forecast, or keeps it in a class that torch.utils._pytree "
                'does not know. Return a tensor, a tuple or a dict, or use sites="chain".'
            )
        _check_answer(record)
        return found._replace(layout=found.layout._replace(output=output), specs=(_specs(record.outs),))
    if sites == "chain":
        return found
    found = _with_parts(found, record, sites, groups)
    if not guided:
        return found
    if len(output.dtypes) != 1:
        raise StructureError(
            f"The model returns {len(output.dtypes)} tensors. Where the unconditional half is answered from the other "
            "one, it must return one. Use cfg=None: both halves are then computed, and what is inside of the blocks is "
            "left out all the same."
        )
    _check_answer(record)
    layout = found.layout._replace(guided=output._replace(name=GUIDANCE, group=GUIDANCE))
    return found._replace(layout=layout, specs=(*found.specs, _specs(record.outs)))


def _check_answer(record: Record) -> None:
    """Refuse what a model returns beside tensors where something has to stand for it."""
    kind = opaque(record.outs)
    if kind is not None:
        raise StructureError(
            f"The model returns an object of class {kind} beside its tensors, and where the model is left out nothing "
            'can stand for it. Let it return tensors and plain values, or use sites="chain", where the model itself '
            "makes what it returns."
        )


def _recorded(found: Found, record: Record, stated: Sequence[Chain], output: Output | None, *, tapped: bool) -> Found:
    """With all that a recording looks at as a site."""
    layout, specs = found.layout._replace(recorded=True, output=output), found.specs
    if output is not None:
        specs = (_specs(record.outs), *specs)
    if tapped:
        # The same chain with a probe: what would be measured before a decision, and what would be left out after it.
        front = next(span for span in _with_chains(record, 1, stated, remembered=False).layout.spans if span.front)
        lead = next(span for span in layout.spans if span.paths[: len(front.paths)] == front.paths)
        whole = specs[len(specs) - len(layout.spans) + layout.spans.index(lead)]
        keys = [stream.key for stream in lead.streams]
        main = front.streams[front.main]
        if main.key not in keys:
            raise StructureError(
                f"What {front.name} hands on as {main.key!r} does not run through {lead.name}, so there is no probe to "
                'record. Leave "probe" out of `sites`.'
            )
        probe = front._replace(name=f"{lead.name} (probe)")
        layout = layout._replace(tap=Tap(lead.name, probe, f"{lead.name} (rest)"))
        specs = (*specs, (whole[keys.index(main.key)],), whole)
    return found._replace(layout=layout, specs=specs)


def _with_parts(found: Found, record: Record, sites: Sites, groups: Sequence[str]) -> Found:
    """With sites at the modules inside the blocks."""
    for pattern in () if isinstance(sites, str) else patterns_of(sites):
        if not any(matches(part.call.path, (pattern,)) for part in record.parts):
            raise StructureError(_no_part(record, f"The pattern {pattern!r} of `sites`", ()))
    wanted = [part for part in _named(record.parts, sites) if not groups or part.kind in groups]
    front = [path for span in found.layout.spans if span.front for path in span.paths]
    skippable = set(found.layout.roles) - set(front)
    paths = {part.call.path for part in wanted}
    parts: dict[str, tuple[Output, ...]] = {}
    specs: dict[str, tuple[TensorSpec, ...]] = {}
    kinds: dict[str, tuple[str, ...]] = {}
    left = list(found.left)
    returned = {out.storage for out in record.outs if isinstance(out, Leaf)}  # to the caller, who may write to it
    for part in wanted:
        call = part.call
        if front and (part.block < 0 or record.calls[part.block].path not in skippable):
            continue  # what the probe needs, or what comes before it, always runs
        if any(call.path.startswith(f"{other}.") for other in paths):
            continue  # of what is left out with an outer part nothing is remembered
        reason = _unfit(part)
        if reason is not None:
            left.append(f"{call.path}: {reason}")
            continue
        name = call.path if not call.nth else f"{call.path}#{call.nth}"
        group = part.kind if groups else ALL
        output = _output(call.outs, call.treespec, name, call.args)._replace(
            group=group,
            aliases=aliases_of([call], [()]),
            copied=part.written or any(isinstance(out, Leaf) and out.storage in returned for out in call.outs),
        )
        parts[call.path] = (*parts.get(call.path, ()), output)
        specs[name] = _specs(call.outs)
        kind = part.kind or "by name"
        kinds[kind] = (*kinds.get(kind, ()), name)
    if not parts:
        what = f"sites={sites!r}" + (f" of kind {', '.join(groups)}" if groups else "")
        raise StructureError(_no_part(record, what, left, _strange(record, sites)))
    left += _strange(record, sites)
    layout = found.layout._replace(parts=parts)
    ordered = tuple(specs[site.name] for site in layout.sites)
    return found._replace(layout=layout, specs=ordered, kinds=kinds, left=tuple(left))


def _named(parts: Iterable[Part], sites: Sites) -> Iterator[Part]:
    """The parts that are meant by their kind, or by their name, which may also state their kind."""
    for part in parts:
        if isinstance(sites, str):
            if part.kind in PARTS[sites]:
                yield part
        elif isinstance(sites, Mapping):
            kinds = [kind for kind, patterns in sites.items() if matches(part.call.path, patterns)]
            if kinds:
                yield part._replace(kind=kinds[0])
        elif matches(part.call.path, sites):
            yield part


def _strange(record: Record, sites: Sites) -> list[str]:
    """What is not found in blocks that run operators of others, which may do just that."""
    if not isinstance(sites, str):
        return []
    said = []
    for kind, operators in record.strange.items():
        calls = [k for k, call in enumerate(record.calls) if call.kind == kind]
        found = {part.kind for part in record.parts if (part.block in calls if kind else part.block < 0)}
        for what, kinds in {"attention": KINDS[:3], "feed-forward network": KINDS[3:]}.items():
            if {*kinds} <= {*PARTS[sites]} and not found & {*kinds}:
                name = ", ".join(alike(dict.fromkeys(record.calls[k].path for k in calls))) or "beside the blocks"
                said.append(
                    f"{name}: no {what} is seen, but {', '.join(operators)}, of which nothing is known. If it is one, "
                    "name the module around it with a pattern in `sites`"
                )
    return said


def _unfit(part: Part) -> str | None:
    """Why the result of a part cannot stand for it."""
    call = part.call
    if call.mutated:
        return f"it writes to its argument {next(iter(call.mutated))!r}"
    if call.attributes:
        return f"it leaves {next(iter(call.attributes))!r} behind"
    if not _specs(call.outs):
        return "it returns no tensor"
    kind = opaque(call.outs)
    return None if kind is None else f"it returns an object of class {kind}, for which nothing can stand{known(kind)}"


def _no_part(record: Record, what: str, left: Sequence[str], strange: Sequence[str] = ()) -> str:
    candidates: dict[str, list[str]] = {}
    for part in record.parts:
        if part.kind:
            candidates.setdefault(part.kind, []).append(part.call.path)
    shown = "; ".join(f"{kind}: {', '.join(alike(dict.fromkeys(names)))}" for kind, names in candidates.items())
    why: dict[str, list[str]] = {}
    for name, _, reason in (each.partition(": ") for each in left):
        why.setdefault(reason, []).append(name)
    listed = "; ".join(f"{', '.join(alike(names))}: {reason}" for reason, names in why.items())
    skipped = f" Left to run: {listed}." if left else ""
    # A module that is found and cannot be left out is none the more so by its name.
    advice = (
        ' sites="output" leaves out the model as a whole.'
        if left
        else " Name modules with a tuple of patterns, each of which must match a whole name, e.g. "
        'sites=(r".*\\.attn",).'
    )
    return (
        f"{what} matches no module of the model that can be left out.{skipped} Found inside its blocks: "
        f"{shown or 'no attention and no feed-forward network'}.{''.join(f' {each}.' for each in strange)}{advice}"
    )


def _output(outs: Sequence[Any], treespec: Any, name: str, given: Mapping[Key, Any]) -> Output:
    leaves = tuple(
        None if isinstance(out, Leaf) else out._replace(token=0) if isinstance(out, Opaque) else out for out in outs
    )
    specs = _specs(outs)
    like = tuple(_like(spec, given) for spec in specs)
    return Output(name, treespec, leaves, tuple(spec.dtype for spec in specs), like)


def _like(spec: TensorSpec, given: Mapping[Key, Any]) -> Like | None:
    tensors = {key: arg.spec.shape for key, arg in given.items() if isinstance(arg, Leaf) and arg.spec.shape}
    for whole in (True, False):
        for key, shape in tensors.items():
            if shape == spec.shape or (not whole and shape[:1] == spec.shape[:1]):
                return Like(key, whole)
    return None


def _specs(outs: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(out.spec for out in outs if isinstance(out, Leaf))


def _with_chains(record: Record, front: int, stated: Sequence[Chain], *, remembered: bool) -> Found:
    if not record.calls:
        raise StructureError(
            "No block of the model ran: the forward calls their parts instead of them, calls none of them, or a "
            "patched forward holds on to the original model by other means than a closure, a bound method or a "
            f"partial, which would have to be undone. Other blocks can be named with cachekit.Chain.{instead(record)}"
        )
    maps = stream_maps(record, stated)
    if stated:
        chains, leader, reason = _by_hand(record, stated), 0, "it is stated first"
    else:
        chains = chains_of(record, maps)
        leader, reason = lead(record, maps, chains)
    spans: list[tuple[Span, tuple, Sequence[int]]] = []
    left = []
    names = [name_of([record.calls[k] for k in chain]) for chain in chains]
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
            prefer = next(iter(stated[i].streams)) if stated else None
            found = span_of(record, maps, piece, front=piece is probe, prefer=prefer)
            spoiled = _spoils(record, piece, found[0].streams) if found is not None else None
            if found is not None and spoiled is None:
                spans.append((*found, piece))
            elif i == leader or stated:
                raise StructureError(spoiled or _no_stream(record, piece, maps, by_hand=bool(stated)))
            else:
                left.append(f"{names[i]}: {spoiled or 'no argument is known that its result continues'}")
    if all(span.front for span, _, _ in spans):
        whole = span_of(record, maps, chains[leader], front=False) is not None
        without = " Use a policy without front blocks, e.g. mag_cache or step_mask." if whole else ""
        raise StructureError(
            f"Nothing to skip: {names[leader]} is the only chain, and after its {front} front block(s) no block is "
            f"left.{' '.join(['', *left])}{without}{instead(record)}"
        )
    home = {k: (s, m) for s, (_, _, piece) in enumerate(spans) for m, k in enumerate(piece)}
    roles: dict[str, list[tuple[int, int]]] = {path: [] for span, _, _ in spans for path in span.paths}
    for k, call in enumerate(record.calls):
        if call.path in roles:
            roles[call.path].append(home.get(k, (-1, -1)))
    layout = Layout(
        spans=tuple(span for span, _, _ in spans),
        output=None,
        guided=None,
        parts={},
        early=_early(record, spans[0][2]) if spans[0][0].front else (),
        written=record.written,
        roles={path: tuple(role) for path, role in roles.items()},
    )
    return Found(
        layout=layout,
        specs=tuple(residuals for span, residuals, _ in spans if remembered and not span.front),
        reference=next((residuals[span.main] for span, residuals, _ in spans if span.front), None),
        kinds={},
        chains=tuple(names),
        leader=names[leader],
        reason=reason,
        left=tuple(left),
        real=record.real,
    )


def _by_hand(record: Record, stated: Sequence[Chain]) -> list[tuple[int, ...]]:
    chains: list[tuple[int, ...]] = []
    for chain in stated:
        named = chain.paths(call.path for call in record.calls)
        calls = [k for k, call in enumerate(record.calls) if call.path in set(named)]
        order = list(dict.fromkeys(record.calls[k].path for k in calls))
        if order != named:
            raise ArgumentError(
                f"`blocks` names {', '.join(named)}, but they are called in the order {', '.join(order)}."
            )
        if twice := [record.calls[k].path for k in calls if any(k in other for other in chains)]:
            raise ArgumentError(f"`structure` states {twice[0]} in two chains. A block belongs to one.")
        chains.append(tuple(calls))
    return chains


def _early(record: Record, probe: Sequence[int]) -> tuple[str, ...]:
    """The modules called once, before the probe, whose results anything but the probe reads."""
    others = (call for k, call in enumerate(record.calls) if k not in probe)
    read = record.read | {arg.token for call in others for _, arg in leaves_of(call)}
    paths = [early.path for early in record.early]
    return tuple(
        early.path
        for early in record.early
        if early.before <= probe[0] and early.pure and early.outs & read and paths.count(early.path) == 1
    )


def _spoils(record: Record, positions: Sequence[int], streams: Sequence[Stream]) -> str | None:
    """Why a span cannot be left out: a block writes to what is read later and is no result, or returns an object."""
    later = [call for k, call in enumerate(record.calls) if k not in positions]
    read = record.read | {arg.token for call in later for _, arg in leaves_of(call)}
    ends = {record.calls[positions[-1]].outs[stream.leaf].token for stream in streams}
    for k in positions:
        call = record.calls[k]
        kind = opaque(out for out in call.outs if out not in call.args.values())  # what is handed through is there
        if kind is not None:
            return (
                f"{call.path} ({call.kind}) returns an object of class {kind} beside its tensors, and where the block "
                f"is left out nothing can stand for it. Let the block return tensors and plain values.{instead(record)}"
            )
        written = [(f"argument {key!r}", token) for key, token in call.mutated.items()]
        written += [(f"attribute {name!r}", token) for name, token in call.attributes.items()]
        for what, token in written:
            if token in read and token not in ends:
                return (
                    f"{call.path} ({call.kind}) writes to its {what}, which is read later, so a step that leaves the "
                    f"block out would go wrong. Let it write to a copy.{instead(record)}"
                )
    return None


def _no_stream(record: Record, positions: Sequence[int], maps: Sequence[Mapping[int, Key]], by_hand: bool) -> str:
    calls = [record.calls[k] for k in positions]
    if by_hand:
        for n, (before, call) in enumerate(itertools.pairwise(calls)):
            made = set().union(*(made_by(earlier) for earlier in calls[: n + 1]))
            strange = [key for key in maps[positions[n + 1]].values() if call.args[key].token not in made]
            if strange:
                return (
                    f"`structure` states {before.path} and {call.path} as one chain, but argument {strange[0]!r} of "
                    f"{call.path} is not what {before.path} returned: something else happens in between. State two "
                    "chains."
                )
        unnamed = [i for i, out in enumerate(calls[-1].outs) if isinstance(out, Leaf) and i not in maps[positions[-1]]]
        if unnamed:
            return (
                f"`streams` does not name output {unnamed[0]} of {calls[-1].path}, which is read after the chain. Name "
                f"the argument it continues: {{{unnamed[0]}: ...}}."
            )
    call = calls[0]
    arguments = ", ".join(f"{key!r} {arg.spec}" for key, arg in leaves_of(call))
    results = ", ".join(str(out.spec) for out in call.outs if isinstance(out, Leaf))
    return (
        f"Which argument does the result of {call.path} ({call.kind}) continue? Results: {results or 'no tensor'}; "
        f"arguments: {arguments or 'no tensor'}. Where every result that is read later continues an argument, state "
        f"it with cachekit.Chain.{instead(record)}"
    )
