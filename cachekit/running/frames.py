"""What a call of a step carries to the places where something is left out.

A *frame* is a dict that exists during one call only and lies on a stack of the calling thread: a site has no state of
its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit.errors import StateError, StructureError
from cachekit.structure.layout import ALL

# How a frame is run.
RECORD = "record"  # write the structure down
REPLAY = "replay"  # run everything as a step runs it, and remember nothing
EAGER = "eager"  # decide on the way, on the host
GRAPH = "graph"  # decide on the way, inside the graph
PROBE = "probe"  # run the front blocks and nothing after them
ACTION = "action"  # run what is after the front blocks, as decided beforehand

Frame: TypeAlias = dict[str, Any]


class Frames(threading.local):
    """The frames of the calling thread."""

    def __init__(self) -> None:
        self.stack: list[Frame] = []


call_frames = Frames()


@contextlib.contextmanager
def framed(frame: Frame) -> Iterator[Frame]:
    """Run with `frame` in place."""
    call_frames.stack.append(frame)
    try:
        yield frame
    finally:
        call_frames.stack.pop()


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
    for path, calls in frame["layout"].parts.items():
        if frame["passed"].get(path, 0) != len(calls) and frame["mode"] != PROBE:
            raise StructureError(
                f"{path} was called {frame['passed'].get(path, 0)} times, at init {len(calls)} times. The forward took "
                "another way. Make a new state with step.init."
            )


def check_like(kept: Tensor, now: Tensor, dtype: torch.dtype, site: str) -> None:
    """Refuse a state that was made for other tensors, naming the site, both and the fix."""
    if kept.shape != now.shape or now.dtype != dtype or kept.device != now.device:
        raise misfit(kept, dtype, now, site)


def misfit(kept: Tensor, dtype: torch.dtype, now: Tensor, site: str) -> StateError:
    """The error of a state that was made for other tensors."""

    def show(tensor: Tensor, dtype: torch.dtype) -> str:
        return f"{list(tensor.shape)} {str(dtype).removeprefix('torch.')} on {tensor.device}"

    return StateError(
        f"At {site} the state holds {show(kept, dtype)}, the call brings {show(now, now.dtype)}. "
        "Batch, resolution, dtype or device changed: make a new state with step.init."
    )


def computes(frame: Frame, group: str = ALL) -> bool:
    """Whether the sites of a group compute in this call, once that is decided."""
    return frame["compute"][group]


def updated(frame: Frame, values: list[Tensor], states: tuple[Any, ...]) -> tuple[Any, ...]:
    """The states of the forecasters after these values."""
    arithmetic = frame["arithmetic"]
    # A branch of one graph must not write to what comes from outside.
    update = arithmetic.overwrite if frame["donate"] and frame["mode"] != GRAPH else arithmetic.update
    return update(states, [value.detach().contiguous() for value in values], frame["now"])


def remember(frame: Frame, name: str, fresh: tuple[Any, ...]) -> None:
    """Let these be what a site remembers, in the memory of what it remembered before where that was given away."""
    if frame["donate"]:
        fresh = pytree.tree_map(_moved, frame["sites"][name], fresh)
    frame["updated"][name] = fresh


def _moved(old: Any, new: Any) -> Any:
    return old.copy_(new) if isinstance(old, Tensor) and old is not new else new


def example(state: Any) -> Tensor:
    """The first leaf of a forecaster's state has the shape and device of the values."""
    return pytree.tree_leaves(state)[0]
