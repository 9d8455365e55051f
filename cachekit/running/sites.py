"""The modules that stand where modules of the model stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cachekit.errors import StructureError
from cachekit.running.frames import ACTION, EAGER, PROBE, RECORD, Frame, call_frames
from cachekit.running.outputs import at_part, guided, whole
from cachekit.running.spans import at_block


def run_framed(frame: Frame, module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """`module(*args, **kwargs)` with `frame` in place, in a form that traces."""
    stack = call_frames.stack
    stack.append(frame)
    try:
        if frame["layout"].output is not None:
            return whole(frame, module, args, kwargs)
        if frame["layout"].guided is not None:
            return guided(frame, module, args, kwargs)
        return module(*args, **kwargs)
    finally:
        stack.pop()


class Site:
    """Mixed into the class of the module that stood there, so that it passes for one."""

    _path: str  # of the module
    _local: str  # the same, from the block around it
    _block: Any  # the module
    _run: Callable[..., Any]  # what runs in its place: it, or a copy of its shell with sites inside


class BlockSite(Site):
    """Stands where a block stood."""

    def forward(self, *args, **kwargs):
        """What the block would return, or what stands in for it."""
        stack = call_frames.stack
        if not stack:
            return self._run(*args, **kwargs)
        frame = stack[-1]
        if frame["mode"] == RECORD:
            return frame["recorder"].call(self, args, kwargs)
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Tensor) and first.is_nested:
            raise StructureError(
                f"{self._path} is given a nested tensor, which nothing that is remembered fits. nn.TransformerEncoder "
                "makes one of a padding mask in eval mode: set use_nested_tensor = False on it."
            )
        return at_block(frame, self._path, args, kwargs)


class PartSite(Site):
    """Stands where a module inside a block stood: an attention, a feed-forward network."""

    def forward(self, *args, **kwargs):
        """What the module would return, or a forecast of it."""
        stack = call_frames.stack
        if not stack:
            return self._run(*args, **kwargs)
        frame = stack[-1]
        if frame["mode"] == RECORD:
            return frame["recorder"].part(self, args, kwargs)
        return at_part(frame, self._local if frame["local"] else self._path, self._run, args, kwargs)


class EarlySite(Site):
    """Stands where a module stood that is called beside the blocks.

    What the probe has computed in it, the program after the probe need not compute again.
    """

    def forward(self, *args, **kwargs):
        """What the module returns."""
        stack = call_frames.stack
        frame: Frame = stack[-1] if stack else {"mode": EAGER}
        mode = frame["mode"]
        if mode == RECORD:
            return frame["recorder"].beside(self, args, kwargs)
        if mode == ACTION and self._path in frame["early"]:
            return frame["early"][self._path]
        out = self._run(*args, **kwargs)
        if mode == PROBE and self._path in frame["layout"].early:
            frame["early"][self._path] = out
        return out
