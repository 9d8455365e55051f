"""What happens in a span: its blocks run, or a forecast stands in for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit.errors import StructureError
from cachekit.running.arguments import argument, assemble, has, put, result
from cachekit.running.branches import either, entering, own
from cachekit.running.frames import (
    ACTION,
    GRAPH,
    PROBE,
    REPLAY,
    Frame,
    check_like,
    computes,
    example,
    misfit,
    remember,
    updated,
)
from cachekit.structure.layout import ALL, Span, Stream
from cachekit.structure.record import Const, Key


def at_block(frame: Frame, path: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a block returns, or what stands in for it."""
    roles = frame["layout"].roles.get(path)
    if roles is None:
        return frame["blocks"][path](*args, **kwargs)
    nth = frame["counts"].get(path, 0)
    frame["counts"][path] = nth + 1
    if nth >= len(roles):
        raise StructureError(f"{path} is called more often than at init. Make a new state with step.init.")
    index, member = roles[nth]
    if index < 0:
        return frame["blocks"][path](*args, **kwargs)
    span = frame["layout"].spans[index]
    calls = frame["calls"].setdefault(index, [])
    if len(calls) != member:
        raise StructureError(
            f"{path} is called before {span.paths[len(calls)]}, unlike at init. Make a new state with step.init."
        )
    handed = frame["handed"].setdefault(index, [])
    _check_call(span, member, args, kwargs, handed)
    calls.append((args, kwargs, _containers(args, kwargs)))
    found = {}
    if member == len(span.paths) - 1:
        calls = [_as_it_was(*call) for call in calls]
        output, values = _front(frame, span, calls) if span.front else _site(frame, span, calls)
        if output is not None:
            return output
        found = {stream.leaf: value for stream, value in zip(span.streams, values, strict=True)}
    # Until the last block is called each hands on what it was given. Nobody looks at the values.
    leaves = [found[i] if i in found else _passed(key, args, kwargs) for i, key in enumerate(span.passing[member])]
    handed.append(leaves)
    return assemble(span.treespecs[member], leaves)


def _containers(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple[int | str, Any, Any], ...]:
    """The lists and dicts among the arguments of a block, each with its name and a copy: the model may write to it
    before the block runs, as the next block is given another value in the same dict.
    """
    given = (*enumerate(args), *kwargs.items())
    return tuple((key, value, value.copy()) for key, value in given if type(value) in (dict, list))


def _as_it_was(
    args: tuple, kwargs: dict[str, Any], containers: tuple[tuple[int | str, Any, Any], ...]
) -> tuple[tuple, dict[str, Any]]:
    """A call with what its lists and dicts held then, where they hold something else now."""
    changed = {key: before for key, value, before in containers if not _holds(value, before)}
    if not changed:  # the block gets the very one: it may write to it
        return args, kwargs
    given = tuple(changed.get(place, value) for place, value in enumerate(args))
    return given, {name: changed.get(name, value) for name, value in kwargs.items()}


def _holds(value: Any, before: Any) -> bool:
    """Whether a list or a dict holds the very things that it held before."""
    if len(value) != len(before):
        return False
    if isinstance(value, dict):
        return all(key in value and value[key] is held for key, held in before.items())
    return all(now is held for now, held in zip(value, before, strict=True))


def _passed(key: Key | Const | None, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    if key is None or isinstance(key, Const):
        return key.value if key is not None else None
    return argument(key, args, kwargs)


def _check_call(span: Span, member: int, args: tuple, kwargs: Mapping[str, Any], handed: list[list[Any]]) -> None:
    """Refuse other arguments than at init, and a stream that something else has happened to since an earlier block."""
    for key in span.passing[member]:
        if key is not None and not isinstance(key, Const) and not has(key, args, kwargs):
            raise StructureError(
                f"{span.paths[member]} was called without the argument {key!r}, by position or name, that it had at "
                "init. Gradient checkpointing passes arguments otherwise: run under torch.no_grad(), or switch it off."
            )
    for link in span.links[member]:
        given = argument(link.key, args, kwargs) if has(link.key, args, kwargs) else None
        if given is not handed[link.member][link.out]:
            raise StructureError(
                f"Argument {link.key!r} of {span.paths[member]} is not what {span.paths[link.member]} returned, as it "
                "was at init: the forward took another way. Make a new state with step.init and these arguments."
            )


def _run(frame: Frame, span: Span, calls: list[tuple[tuple, dict[str, Any]]]) -> Any:
    """Run the blocks of a span, each on its own arguments and the results of those before."""
    outputs: list[Any] = []
    tap = frame["layout"].tap
    for member, (args, kwargs) in enumerate(calls):
        if span.links[member]:
            args, kwargs = _linked(span, member, args, kwargs, outputs)
        for earlier in span.release[member]:
            outputs[earlier] = None
        outputs.append(frame["blocks"][span.paths[member]](*args, **kwargs))
        if tap is not None and span.name == tap.span and member == len(tap.front.paths) - 1:
            # What later blocks write to in place is looked at now.
            frame["tapped"] = pytree.tree_map_only(Tensor, torch.clone, outputs[-1]) if span.mutated else outputs[-1]
        del args, kwargs
    return outputs[-1]


def _linked(span: Span, member: int, args: tuple, kwargs: Mapping[str, Any], outputs: list[Any]) -> tuple[list, dict]:
    call = list(args), dict(kwargs)
    for link in span.links[member]:
        value = result(outputs[link.member], span.treespecs[link.member], link.out)
        put(call, link.key, value)
    return call


def _bases(span: Span, calls: list[tuple[tuple, dict[str, Any]]]) -> list[Tensor]:
    bases = [_given(span, stream, calls) for stream in span.streams]
    return [base.clone() for base in bases] if span.mutated else bases


def _given(span: Span, stream: Stream, calls: list[tuple[tuple, dict[str, Any]]]) -> Tensor:
    """The argument that a stream continues. Of what a probe makes itself nobody asks: the main one stands for it."""
    key = span.streams[span.main].key if stream.key is None else stream.key
    assert key is not None
    return argument(key, *calls[0])


def _values(span: Span, output: Any) -> list[Tensor]:
    return [result(output, span.treespecs[-1], stream.leaf) for stream in span.streams]


def _front(frame: Frame, span: Span, calls) -> tuple[Any, list[Tensor]]:
    """The probe: its blocks run, and their residual is measured against that of the last computed step."""
    if frame["mode"] == ACTION and frame["carried"] is not None:
        return None, _written(span, calls, list(frame["carried"]))
    bases = _bases(span, calls)
    output = _run(frame, span, calls)
    values = _values(span, output)
    if frame["mode"] == REPLAY:
        return output, values
    value, base, reference = values[span.main].detach(), bases[span.main].detach(), frame["reference"]
    kind = torch.promote_types(value.dtype, base.dtype)  # of their difference
    if reference.shape != value.shape or reference.dtype != kind or reference.device != value.device:
        raise misfit(reference, reference.dtype, value, span.paths[0])
    residual, sums = frame["arithmetic"].measure(value, base, reference)
    frame["residual"], frame["sums"] = residual.contiguous(), tuple(sums)
    if frame["mode"] == PROBE:
        frame["carried"] = tuple(values)
    elif not frame["compute"]:  # a plan has not decided yet
        frame["compute"][ALL] = frame["decide"](frame["sums"])
    return output, values


def _site(frame: Frame, span: Span, calls) -> tuple[Any, list[Tensor]]:
    """Run the blocks and remember their residual, or add its forecast to what came in."""
    mode = frame["mode"]
    bases = _bases(span, calls)
    if mode == PROBE:
        return None, bases
    recorded = frame["layout"].recorded
    if frame["layout"].output is not None and not recorded:
        return _in_vain(frame, span, calls, bases)
    if frame["layout"].parts or mode == REPLAY:
        output = _run(frame, span, calls)
        return output, _values(span, output)
    states = frame["sites"][span.name]
    if mode == GRAPH and not recorded:
        return None, _written(span, calls, _branch(frame, span, calls, states))
    if recorded or computes(frame):
        output = _run(frame, span, calls)
        values = _values(span, output)
        residuals = _residuals(span, values, bases, states)
        if frame["observe"]:
            frame["sums"] = _add(frame["sums"], _observed(frame, span, residuals, states))
        remember(frame, span.name, updated(frame, residuals, states))
        if frame["tapped"] is not None:
            _tap(frame, span, bases, residuals)
        return output, values
    return None, _written(span, calls, _forecast(frame, span, bases, states))


def _tap(frame: Frame, span: Span, bases: list[Tensor], residuals: list[Tensor]) -> None:
    """Record what a probe would have seen of this span, and what would have been left out after it."""
    tap, out = frame["layout"].tap, frame["tapped"]
    frame["tapped"] = None
    base = {stream.key: each for stream, each in zip(span.streams, bases, strict=True)}
    front = {
        stream.key: result(out, tap.front.treespecs[-1], stream.leaf) - base[stream.key]
        for stream in tap.front.streams
        if stream.key in base
    }
    rest = [
        residual - front[stream.key] if stream.key in front else residual
        for stream, residual in zip(span.streams, residuals, strict=True)
    ]
    main = front[tap.front.streams[tap.front.main].key]
    for name, values in ((tap.front.name, [main]), (tap.rest, rest)):
        remember(frame, name, updated(frame, values, frame["sites"][name]))


def _in_vain(frame: Frame, span: Span, calls, bases: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """A span before a site that is the output: its blocks run, or nobody looks at what comes out."""

    def passed() -> list[Tensor]:
        return [base.to(stream.dtype) for stream, base in zip(span.streams, bases, strict=True)]

    if frame["mode"] == GRAPH:
        given = entering(calls, span.aliases)
        bases = _bases(span, given)
        values = either(frame["compute"][ALL], lambda: _values(span, _run(frame, span, own(span, given))), passed)
        return None, _written(span, calls, values)
    if computes(frame):
        output = _run(frame, span, calls)
        return output, _values(span, output)
    return None, passed()


def _written(span: Span, calls, values: list[Tensor]) -> list[Tensor]:
    """The values, written to the arguments that the blocks would have written to."""
    if not span.mutated:
        return values
    made = []
    for stream, value in zip(span.streams, values, strict=True):
        made.append(_given(span, stream, calls).copy_(value) if stream.written else value)
    return made


def _residuals(span: Span, values, bases, states) -> list[Tensor]:
    residuals = []
    for stream, value, base, state in zip(span.streams, values, bases, states, strict=True):
        residual = value - base
        _check_base(span, stream, base, state)
        check_like(example(state), residual, stream.residual, f"{span.name} ({stream.key})")
        residuals.append(residual)
    return residuals


def _check_base(span: Span, stream: Stream, base: Tensor, state: Any) -> None:
    if base.dtype != stream.base or base.shape != example(state).shape:
        raise misfit(example(state), stream.base, base, f"{span.name} ({stream.key})")


def _forecast(frame: Frame, span: Span, bases: list[Tensor], states: tuple[Any, ...]) -> list[Tensor]:
    for stream, base, state in zip(span.streams, bases, states, strict=True):
        _check_base(span, stream, base, state)
    values = frame["arithmetic"].add(bases, states, frame["now"])
    return [value.to(stream.dtype) for stream, value in zip(span.streams, values, strict=True)]


def _observed(frame: Frame, span: Span, residuals: list[Tensor], states: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The signal of a policy that only logs: residual against forecast."""
    return tuple(frame["arithmetic"].observe(residuals[span.main], states[span.main], frame["now"]))


def _add(sums: Any, more: Any) -> Any:
    return more if sums is None else (sums[0] + more[0], sums[1] + more[1])


def _branch(frame: Frame, span: Span, calls, states: tuple[Any, ...]) -> list[Tensor]:
    """Both ways inside one graph."""
    calls = entering(calls, span.aliases)
    bases = _bases(span, calls)
    for stream, base, state in zip(span.streams, bases, states, strict=True):
        _check_base(span, stream, base, state)  # before the branches: not every compiler hands on what they raise

    def compute():
        values = _values(span, _run(frame, span, own(span, calls)))
        residuals = _residuals(span, values, bases, states)
        sums = _observed(frame, span, residuals, states) if frame["observe"] else ()
        return values, updated(frame, residuals, states), tuple(sums)

    def reuse():
        values = _forecast(frame, span, bases, states)
        sums = [torch.full((), torch.nan, device=values[0].device) for _ in range(2)] if frame["observe"] else ()
        return values, states, tuple(sums)

    values, fresh, sums = either(frame["compute"][ALL], compute, reuse)
    remember(frame, span.name, fresh)
    if frame["observe"]:
        frame["sums"] = _add(frame["sums"], sums)
    return values
