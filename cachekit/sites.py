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
from cachekit.structure import Const, FromArg, FromOut, Key, Nested, Span, Stream

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
        return module(*args, **kwargs)
    finally:
        stack.pop()


def check_reached(frame: Frame) -> None:
    """Refuse a forward that went around a site: its answer would be stale, or uncached in silence."""
    counts = frame["counts"]
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
    if member == 0:
        frame["heads"][index] = (args, kwargs)
        frame["results"][index] = _front(frame, span, args, kwargs) if span.front else _site(frame, span, args, kwargs)
        frame["handed"][index] = []
    elif index not in frame["heads"]:
        raise StructureError(f"{path} is called before {span.paths[0]}, unlike at init. Make a new state with step.init.")
    else:
        _check_wiring(frame, index, span, member, args, kwargs)
    output, values = frame["results"][index]
    if member == len(span.paths) - 1:
        if output is not None:
            return output
        found = {stream.leaf: value for stream, value in zip(span.streams, values, strict=True)}
    else:
        found = {}
    leaves = [
        found[i] if i in found else _passed(key, args, kwargs) for i, key in enumerate(span.passing[member])
    ]
    frame["handed"][index].append(leaves)
    return _assemble(span.treespecs[member], leaves)


def _passed(key: Key | Const | None, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    if key is None or isinstance(key, Const):
        return key.value if key is not None else None
    return _argument(key, args, kwargs)


def _argument(key: Key, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return args[key] if isinstance(key, int) else kwargs[key]


def _check_wiring(frame: Frame, index: int, span: Span, member: int, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse a block whose arguments are not those that it was run with, or would have been."""
    head_args, head_kwargs = frame["heads"][index]
    wiring = span.wiring[member - 1]
    if len(args) + len(kwargs) != len(wiring):
        raise _changed(span, member, "the number of its arguments")
    for key, source in wiring.items():
        if isinstance(key, int) and key >= len(args) or not isinstance(key, int) and key not in kwargs:
            raise _changed(span, member, f"argument {key!r}")
        given = _argument(key, args, kwargs)
        if not isinstance(given, Tensor):
            continue
        if isinstance(source, FromArg):
            expected = _argument(source.key, head_args, head_kwargs)
            if source.leaf >= 0:
                expected = pytree.tree_leaves(expected)[source.leaf]
        elif isinstance(source, FromOut):
            expected = frame["handed"][index][source.member][source.leaf]
        else:
            continue
        if expected is not None and given is not expected:
            raise _changed(span, member, f"argument {key!r}")


def _changed(span: Span, member: int, what: str) -> StructureError:
    return StructureError(
        f"{what} of {span.paths[member]} is not what it was at init: the forward took another way. "
        "Make a new state with step.init and the arguments of this call."
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


def _run(frame: Frame, span: Span, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Run the blocks of a span on the arguments of the first."""
    blocks = frame["blocks"]
    output = blocks[span.paths[0]](*args, **kwargs)
    outputs: list[Any] = []
    for n, wiring in enumerate(span.wiring):
        outputs.append(output)
        for member in span.release[n]:
            outputs[member] = None
        given = {key: _resolve(source, span, args, kwargs, outputs) for key, source in wiring.items()}
        positional = [value for key, value in given.items() if isinstance(key, int)]
        named = {key: value for key, value in given.items() if not isinstance(key, int)}
        del given
        output = blocks[span.paths[n + 1]](*positional, **named)
    return output


def _resolve(source: Any, span: Span, args: tuple, kwargs: Mapping[str, Any], outputs: list[Any]) -> Any:
    if isinstance(source, FromArg):
        value = _argument(source.key, args, kwargs)
        return value if source.leaf < 0 else pytree.tree_leaves(value)[source.leaf]
    if isinstance(source, FromOut):
        return _leaf(outputs[source.member], span.treespecs[source.member], source.leaf)
    if isinstance(source, Nested):
        leaves = [_resolve(leaf, span, args, kwargs, outputs) for leaf in source.leaves]
        return pytree.tree_unflatten(leaves, source.treespec)
    return source.value


def _bases(span: Span, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    bases = [_argument(stream.key, args, kwargs) for stream in span.streams]
    return [base.clone() for base in bases] if span.mutated else bases


def _values(span: Span, output: Any) -> list[Tensor]:
    return [_leaf(output, span.treespecs[-1], stream.leaf) for stream in span.streams]


def _front(frame: Frame, span: Span, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
    """The probe: its blocks run, and their residual is measured against that of the last computed step."""
    if frame["mode"] in (COMPUTE, REUSE) and frame["carried"] is not None:
        return None, list(frame["carried"])
    bases = _bases(span, args, kwargs)
    output = _run(frame, span, args, kwargs)
    values = _values(span, output)
    residual = (values[span.main] - bases[span.main]).detach().contiguous()
    check_like(frame["reference"], residual, frame["reference"].dtype, span.paths[0])
    frame["residual"] = residual
    sums = tuple(frame["signal"](residual, frame["reference"]))
    frame["sums"] = sums
    if frame["mode"] == PROBE:
        frame["carried"] = tuple(values)
    elif frame["mode"] == EAGER or frame["mode"] == GRAPH:
        frame["compute"] = frame["decide"](sums)
    return output, values


def _site(frame: Frame, span: Span, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
    """Run the blocks and remember their residual, or add its forecast to what came in."""
    mode = frame["mode"]
    bases = _bases(span, args, kwargs)
    if mode == PROBE:
        return None, bases
    states = frame["sites"][span.name]
    if mode == GRAPH:
        return None, _branch(frame, span, args, kwargs, states, bases)
    if mode == COMPUTE or mode == EAGER and frame["compute"]:
        output = _run(frame, span, args, kwargs)
        values = _values(span, output)
        residuals = _residuals(span, values, bases, states)
        if frame["observe"]:
            frame["sums"] = _add(frame["sums"], _observed(frame, span, residuals, states))
        frame["updated"][span.name] = _updated(frame, residuals, states)
        return output, values
    return None, _forecast(frame, span, bases, states)


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


def _branch(frame: Frame, span: Span, args: tuple, kwargs, states: tuple[Any, ...], bases: list[Tensor]) -> list[Tensor]:
    """Both ways inside one graph. A branch returns fresh tensors and changes nothing outside."""
    leaves, treespec = pytree.tree_flatten(states)
    streams = len(span.streams)
    observe = frame["observe"]

    def compute():
        values = _values(span, _run(frame, span, args, kwargs))
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
