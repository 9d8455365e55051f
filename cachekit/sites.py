"""What happens at a site: the blocks of a span run, or a forecast stands in for them.

A site has no state. During one call of a step it finds all it needs in a *frame*, a dict that exists for that call
only and lies on a stack of the calling thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit.errors import StateError, StructureError
from cachekit.layout import Output, Place, Span, Stream
from cachekit.record import Const, Key

# How a frame is run.
RECORD = "record"  # write the structure down
EAGER = "eager"  # decide on the way, on the host
GRAPH = "graph"  # decide on the way, inside the graph
PROBE = "probe"  # run the front blocks and nothing after them
COMPUTE = "compute"  # run every block after the front ones
REUSE = "reuse"  # run no block after the front ones

Frame: TypeAlias = dict[str, Any]


class _Frames(threading.local):
    def __init__(self) -> None:
        self.stack: list[Frame] = []


_frames = _Frames()


@contextlib.contextmanager
def framed(frame: Frame) -> Iterator[Frame]:
    """Run with `frame` in place."""
    _frames.stack.append(frame)
    try:
        yield frame
    finally:
        _frames.stack.pop()


def run_framed(frame: Frame, module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """`module(*args, **kwargs)` with `frame` in place, in a form that traces."""
    stack = _frames.stack
    stack.append(frame)
    try:
        return module(*args, **kwargs) if frame["layout"].output is None else _whole(frame, module, args, kwargs)
    finally:
        stack.pop()


def check_reached(frame: Frame) -> None:
    """Refuse a forward that went around a site: its answer would be stale, or uncached in silence."""
    counts = frame["counts"]
    if not frame["entered"]:
        return
    for path, roles in frame["layout"].roles.items():
        if counts.get(path, 0) != len(roles):
            raise StructureError(
                f"{path} was called {counts.get(path, 0)} times, at init {len(roles)} times. The forward took another "
                "way, or a patched forward holds on to the original module. Make a new state with step.init."
            )


class BlockSite:
    """Stands where a block stood. Mixed into the class of the block, so that it passes for one."""

    _path: str
    _block: Any

    def forward(self, *args, **kwargs):
        """What the block would return, or what stands in for it."""
        stack = _frames.stack
        if not stack:
            return self._block(*args, **kwargs)
        frame = stack[-1]
        if frame["mode"] == RECORD:
            return frame["recorder"].call(self, args, kwargs)
        return _at(frame, self._path, args, kwargs)


class EarlySite:
    """Stands where a module stood that is called beside the blocks.

    What the probe has computed in it, the program after the probe need not compute again.
    """

    _path: str
    _block: Any

    def forward(self, *args, **kwargs):
        """What the module returns."""
        stack = _frames.stack
        frame: Frame = stack[-1] if stack else {"mode": EAGER}
        mode = frame["mode"]
        if mode == RECORD:
            return frame["recorder"].beside(self, args, kwargs)
        if mode in (COMPUTE, REUSE) and self._path in frame["early"]:
            return frame["early"][self._path]
        out = self._block(*args, **kwargs)
        if mode == PROBE and self._path in frame["layout"].early:
            frame["early"][self._path] = out
        return out


def _at(frame: Frame, path: str, args: tuple, kwargs: dict[str, Any]) -> Any:
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
    calls.append((args, kwargs))
    found = {}
    if member == len(span.paths) - 1:
        output, values = _front(frame, span, calls) if span.front else _site(frame, span, calls)
        if output is not None:
            return output
        found = {stream.leaf: value for stream, value in zip(span.streams, values, strict=True)}
    # Until the last block is called each hands on what it was given. Nobody looks at the values.
    leaves = [found[i] if i in found else _passed(key, args, kwargs) for i, key in enumerate(span.passing[member])]
    handed.append(leaves)
    return _assemble(span.treespecs[member], leaves)


def _passed(key: Key | Const | None, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    if key is None or isinstance(key, Const):
        return key.value if key is not None else None
    return _argument(key, args, kwargs)


def _argument(key: Key, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return args[key] if isinstance(key, int) else kwargs[key]


def _has(key: Key, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    return key < len(args) if isinstance(key, int) else key in kwargs


def _check_call(span: Span, member: int, args: tuple, kwargs: Mapping[str, Any], handed: list[list[Any]]) -> None:
    """Refuse other arguments than at init, and a stream that something else has happened to since an earlier block."""
    for key in span.passing[member]:
        if isinstance(key, (int, str)) and not _has(key, args, kwargs):
            raise StructureError(
                f"{span.paths[member]} was called without the argument {key!r}, by position or name, that it had at "
                "init. Gradient checkpointing passes arguments otherwise: run under torch.no_grad(), or switch it off."
            )
    for link in span.links[member]:
        given = _argument(link.key, args, kwargs) if _has(link.key, args, kwargs) else None
        if link.leaf >= 0:
            given = pytree.tree_leaves(given)[link.leaf]
        if given is not handed[link.member][link.out]:
            raise StructureError(
                f"Argument {link.key!r} of {span.paths[member]} is not what {span.paths[link.member]} returned, as it "
                "was at init: the forward took another way. Make a new state with step.init and these arguments."
            )


def _assemble(treespec: Any, leaves: list[Any]) -> Any:
    if treespec.is_leaf():
        return leaves[0]
    if treespec.type is tuple and treespec.num_leaves == treespec.num_children:
        return tuple(leaves)
    return pytree.tree_unflatten(leaves, treespec)


def _leaf(output: Any, treespec: Any, leaf: int) -> Any:
    if treespec.is_leaf():
        return output
    if treespec.type in (tuple, list) and treespec.num_leaves == treespec.num_children:
        return output[leaf]
    return pytree.tree_leaves(output)[leaf]


def _run(frame: Frame, span: Span, calls: list[tuple[tuple, dict[str, Any]]]) -> Any:
    """Run the blocks of a span, each on its own arguments and the results of those before."""
    outputs: list[Any] = []
    for member, (args, kwargs) in enumerate(calls):
        if span.links[member]:
            args, kwargs = _linked(span, member, args, kwargs, outputs)
        for earlier in span.release[member]:
            outputs[earlier] = None
        outputs.append(frame["blocks"][span.paths[member]](*args, **kwargs))
        del args, kwargs
    return outputs[-1]


def _unaliased(span: Span, calls: list[tuple[tuple, dict[str, Any]]]) -> list[tuple[Any, dict[str, Any]]]:
    """The arguments without shared memory, which a branch of `torch.cond` refuses."""
    free = [(list(args), dict(kwargs)) for args, kwargs in calls]
    for places in span.aliases:
        fresh = _at_place(places[0], calls).clone()
        for place in places:
            _put(free[place.member], place.key, place.leaf, fresh)
    return free


def _at_place(place: Place, calls: list[tuple[Any, dict[str, Any]]]) -> Any:
    value = _argument(place.key, *calls[place.member])
    return value if place.leaf < 0 else pytree.tree_leaves(value)[place.leaf]


def _own(span: Span, calls: list[tuple[Any, dict[str, Any]]]) -> list[tuple[Any, dict[str, Any]]]:
    """The arguments with copies where a block writes: a branch must not write to what comes from outside."""
    if not span.writes:
        return calls
    free: list[tuple[Any, dict[str, Any]]] = [(list(args), dict(kwargs)) for args, kwargs in calls]
    copies: list[tuple[Tensor, Tensor]] = []
    for place in span.writes:
        value = _at_place(place, calls)
        known = [copy for given, copy in copies if given is value]
        copies.append((value, known[0] if known else value.clone()))
        _put(free[place.member], place.key, place.leaf, copies[-1][1])
    return free


def _put(call: tuple[list, dict], key: Key, leaf: int, value: Any) -> None:
    holder: Any = call[0] if isinstance(key, int) else call[1]
    if leaf >= 0:
        leaves, treespec = pytree.tree_flatten(holder[key])
        leaves[leaf] = value
        value = pytree.tree_unflatten(leaves, treespec)
    holder[key] = value


def _linked(span: Span, member: int, args: tuple, kwargs: Mapping[str, Any], outputs: list[Any]) -> tuple[list, dict]:
    call = list(args), dict(kwargs)
    for link in span.links[member]:
        value = _leaf(outputs[link.member], span.treespecs[link.member], link.out)
        _put(call, link.key, link.leaf, value)
    return call


def _bases(span: Span, calls: list[tuple[tuple, dict[str, Any]]]) -> list[Tensor]:
    args, kwargs = calls[0]
    bases = [_argument(stream.key, args, kwargs) for stream in span.streams]
    return [base.clone() for base in bases] if span.mutated else bases


def _values(span: Span, output: Any) -> list[Tensor]:
    return [_leaf(output, span.treespecs[-1], stream.leaf) for stream in span.streams]


def _front(frame: Frame, span: Span, calls) -> tuple[Any, list[Tensor]]:
    """The probe: its blocks run, and their residual is measured against that of the last computed step."""
    if frame["mode"] in (COMPUTE, REUSE) and frame["carried"] is not None:
        return None, _written(span, calls, list(frame["carried"]))
    bases = _bases(span, calls)
    output = _run(frame, span, calls)
    values = _values(span, output)
    residual = (values[span.main] - bases[span.main]).detach().contiguous()
    check_like(frame["reference"], residual, frame["reference"].dtype, span.paths[0])
    frame["residual"] = residual
    sums = tuple(frame["signal"](residual, frame["reference"]))
    frame["sums"] = sums
    if frame["mode"] == PROBE:
        frame["carried"] = tuple(values)
    elif frame["compute"] is None:  # a plan has not decided yet
        frame["compute"] = frame["decide"](sums)
    return output, values


def _site(frame: Frame, span: Span, calls) -> tuple[Any, list[Tensor]]:
    """Run the blocks and remember their residual, or add its forecast to what came in."""
    mode = frame["mode"]
    bases = _bases(span, calls)
    if mode == PROBE:
        return None, bases
    if frame["layout"].output is not None:
        return _in_vain(frame, span, calls, bases)
    states = frame["sites"][span.name]
    if mode == GRAPH:
        return None, _written(span, calls, _branch(frame, span, calls, states, bases))
    if mode == COMPUTE or (mode == EAGER and frame["compute"]):
        output = _run(frame, span, calls)
        values = _values(span, output)
        residuals = _residuals(span, values, bases, states)
        if frame["observe"]:
            frame["sums"] = _add(frame["sums"], _observed(frame, span, residuals, states))
        frame["updated"][span.name] = _updated(frame, residuals, states)
        return output, values
    return None, _written(span, calls, _forecast(frame, span, bases, states))


def _in_vain(frame: Frame, span: Span, calls, bases: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """A span before a site that is the output: its blocks run, or nobody looks at what comes out."""
    if frame["mode"] == GRAPH:
        calls = _unaliased(span, calls)

        def compute():
            return tuple(_fresh(value) for value in _values(span, _run(frame, span, _own(span, calls))))

        def reuse():
            kinds = zip(span.streams, bases, strict=True)
            return tuple(_fresh(base.to(stream.dtype)) for stream, base in kinds)

        return None, _written(span, calls, list(torch.cond(frame["compute"], compute, reuse, ())))
    if frame["mode"] == COMPUTE or frame["compute"]:
        output = _run(frame, span, calls)
        return output, _values(span, output)
    return None, [base.to(stream.dtype) for stream, base in zip(span.streams, bases, strict=True)]


def _whole(frame: Frame, module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The model, or a forecast of what it returns."""
    mode, output = frame["mode"], frame["layout"].output
    if mode == PROBE:
        return module(*args, **kwargs)
    states = frame["sites"][output.name]
    if mode == REUSE or (mode == EAGER and not frame["layout"].spans and not frame["compute"]):
        frame["entered"] = False
        return _returned(output, _foreseen(frame, output, states))
    if mode == GRAPH and not frame["layout"].spans:
        frame["entered"] = False
        return _returned(output, _either(frame, module, args, kwargs, states))
    values = _tensors_of(output, module(*args, **kwargs), states)
    if mode == GRAPH:
        decided: Tensor = frame["compute"]

        def choose(computed: Tensor, other: Tensor) -> Tensor:
            return torch.where(decided.to(other.device), computed, other)

        fresh = _updated(frame, [value.detach() for value in values], states)
        frame["updated"][output.name] = pytree.tree_map(choose, fresh, states)
        values = [choose(*pair) for pair in zip(values, _foreseen(frame, output, states), strict=True)]
    elif mode == COMPUTE or frame["compute"]:
        frame["updated"][output.name] = _updated(frame, [value.detach().contiguous() for value in values], states)
    else:
        values = _foreseen(frame, output, states)
    return _returned(output, values)


def _either(frame: Frame, module, args: tuple, kwargs: Mapping[str, Any], states: tuple[Any, ...]) -> list[Tensor]:
    output = frame["layout"].output
    leaves, treespec = pytree.tree_flatten(states)

    def compute():
        values = _tensors_of(output, module(*args, **kwargs), states)
        updated = pytree.tree_leaves(_updated(frame, [value.detach().contiguous() for value in values], states))
        return (*(_fresh(value) for value in values), *(leaf.clone() for leaf in updated))

    def reuse():
        return (*(_fresh(value) for value in _foreseen(frame, output, states)), *(leaf.clone() for leaf in leaves))

    flat = torch.cond(frame["compute"], compute, reuse, ())
    count = len(output.dtypes)
    frame["updated"][output.name] = pytree.tree_unflatten(list(flat[count:]), treespec)
    return list(flat[:count])


def _tensors_of(output: Output, out: Any, states: tuple[Any, ...]) -> list[Tensor]:
    values = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    if len(values) != len(states):
        raise StructureError(
            f"The model returns {len(values)} tensors, at init {len(states)}. Make a new state with step.init "
            "and these arguments."
        )
    for value, state, dtype in zip(values, states, output.dtypes, strict=True):
        check_like(_example(state), value, dtype, output.name)
    return values


def _foreseen(frame: Frame, output: Output, states: tuple[Any, ...]) -> list[Tensor]:
    predict, now = frame["forecaster"].predict, frame["now"]
    return [predict(state, now).to(dtype) for state, dtype in zip(states, output.dtypes, strict=True)]


def _returned(output: Output, values: list[Tensor]) -> Any:
    remaining = iter(values)
    leaves = [next(remaining) if leaf is None else leaf.value for leaf in output.leaves]
    return _assemble(output.treespec, leaves)


def _written(span: Span, calls, values: list[Tensor]) -> list[Tensor]:
    """The values, written to the arguments that the blocks would have written to."""
    if not span.mutated:
        return values
    args, kwargs = calls[0]
    made = []
    for stream, value in zip(span.streams, values, strict=True):
        made.append(_argument(stream.key, args, kwargs).copy_(value) if stream.written else value)
    return made


def _residuals(span: Span, values, bases, states) -> list[Tensor]:
    residuals = []
    for stream, value, base, state in zip(span.streams, values, bases, states, strict=True):
        residual = (value - base).detach().contiguous()
        _check_base(span, stream, base, state)
        check_like(_example(state), residual, stream.residual, f"{span.name} ({stream.key})")
        residuals.append(residual)
    return residuals


def _check_base(span: Span, stream: Stream, base: Tensor, state: Any) -> None:
    if base.dtype != stream.base or base.shape != _example(state).shape:
        raise _misfit(_example(state), stream.base, base, f"{span.name} ({stream.key})")


def _example(state: Any) -> Tensor:
    """The first leaf of a forecaster's state has the shape and device of the values."""
    return pytree.tree_leaves(state)[0]


def _updated(frame: Frame, residuals: list[Tensor], states: tuple[Any, ...]) -> tuple[Any, ...]:
    update, now = frame["forecaster"].update, frame["now"]
    return tuple(update(state, residual, now) for state, residual in zip(states, residuals, strict=True))


def _forecast(frame: Frame, span: Span, bases: list[Tensor], states: tuple[Any, ...]) -> list[Tensor]:
    predict, now, values = frame["forecaster"].predict, frame["now"], []
    for stream, base, state in zip(span.streams, bases, states, strict=True):
        _check_base(span, stream, base, state)
        values.append((base + predict(state, now)).to(stream.dtype))
    return values


def _observed(frame: Frame, span: Span, residuals: list[Tensor], states: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The signal of a policy that only logs: residual against forecast."""
    forecast = frame["forecaster"].predict(states[span.main], frame["now"])
    return tuple(frame["signal"](residuals[span.main], forecast))


def _add(sums: Any, more: Any) -> Any:
    return more if sums is None else (sums[0] + more[0], sums[1] + more[1])


def _branch(frame: Frame, span: Span, calls, states: tuple[Any, ...], bases: list[Tensor]) -> list[Tensor]:
    """Both ways inside one graph. A branch returns fresh tensors and changes nothing outside."""
    leaves, treespec = pytree.tree_flatten(states)
    streams = len(span.streams)
    if span.aliases or span.mutated:
        calls = _unaliased(span, calls)
        bases = _bases(span, calls)
    for stream, base, state in zip(span.streams, bases, states, strict=True):
        _check_base(span, stream, base, state)  # before the branches: not every compiler hands on what they raise
    observe = frame["observe"]

    def compute():
        values = _values(span, _run(frame, span, _own(span, calls)))
        residuals = _residuals(span, values, bases, states)
        updated = pytree.tree_leaves(_updated(frame, residuals, states))
        sums = _observed(frame, span, residuals, states) if observe else ()
        return (*(_fresh(value) for value in values), *(leaf.clone() for leaf in updated), *sums)

    def reuse():
        values = _forecast(frame, span, bases, states)
        sums = tuple(torch.full((), torch.nan, device=values[0].device) for _ in range(2)) if observe else ()
        return (*(_fresh(value) for value in values), *(leaf.clone() for leaf in leaves), *sums)

    flat = torch.cond(frame["compute"], compute, reuse, ())
    frame["updated"][span.name] = pytree.tree_unflatten(list(flat[streams : streams + len(leaves)]), treespec)
    if observe:
        frame["sums"] = _add(frame["sums"], flat[streams + len(leaves) :])
    return list(flat[:streams])


def _fresh(value: Tensor) -> Tensor:
    # Equal strides in both branches, and never an alias of what went in.
    return value.contiguous().clone(memory_format=torch.contiguous_format)


def check_like(kept: Tensor, now: Tensor, dtype: torch.dtype, site: str) -> None:
    """Refuse a state that was made for other tensors, naming the site, both and the fix."""
    if kept.shape != now.shape or now.dtype != dtype or kept.device != now.device:
        raise _misfit(kept, dtype, now, site)


def _misfit(kept: Tensor, dtype: torch.dtype, now: Tensor, site: str) -> StateError:
    def show(tensor: Tensor, dtype: torch.dtype) -> str:
        return f"{list(tensor.shape)} {str(dtype).removeprefix('torch.')} on {tensor.device}"

    return StateError(
        f"At {site} the state holds {show(kept, dtype)}, the call brings {show(now, now.dtype)}. "
        "Batch, resolution, dtype or device changed: make a new state with step.init."
    )
