"""Blocks compiled whole, with the sites that stand inside them: one program a kind of block and action.

A block that is compiled by itself must not know which of many it is, or each would be compiled. So its sites go by
their names inside the block, and what they remember comes in and goes out under those names.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from cachekit.running.frames import EAGER, Frame, call_frames
from cachekit.running.programs import compiled_with, fresh, in_own_words
from cachekit.running.shadow import HOOKS
from cachekit.structure.layout import NOTHING, Layout, Output
from cachekit.structure.modules import named, unwrap

Parts = Mapping[str, tuple[Output, ...]]


class Inside(NamedTuple):
    """What stands inside a block, in one call of it."""

    layout: Layout  # of the model; kept so that its identity stays its own
    kind: int  # blocks with equal sites inside are of one kind
    parts: Parts  # name inside the block -> what each of its calls returns, under names inside the block
    names: dict[str, str]  # of the sites: inside the block -> in the state


class Regions:
    """The compiled blocks of a model."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._kinds: list[Parts] = []
        self._inside: dict[Any, Inside] = {}
        self._told = False

    def block(self, path: str, block: Callable[..., Any], original: nn.Module, *, sites: bool) -> Callable[..., Any]:
        """What to call in the place of a block.

        Args:
            path: its name.
            block: what runs it, a shell where sites stand inside.
            original: the block of the model.
            sites: whether there are any.
        """
        block = unwrap(block) if isinstance(block, nn.Module) else block
        attributes = [vars(unwrap(module)) for _, module in named(original)]
        hooks = [held[name] for held in attributes for name in HOOKS]
        compiled = functools.partial(self._call, path, block) if sites else compiled_with(block, self._options)

        def call(*args, **kwargs):
            # The compiler looks at hooks once, when it compiles the first block of a kind.
            if any(hooks) or any("forward" in held and _patched(held["forward"]) for held in attributes):
                self._tell(path, "hook" if any(hooks) else "patched forward")
                return block(*args, **kwargs)
            return compiled(*args, **kwargs)

        return call

    def _tell(self, path: str, what: str) -> None:
        if self._told or torch.compiler.is_compiling():
            return
        self._told = True
        warnings.warn(
            f"The block {path} runs as it is, not compiled: a {what} is on it or in it, and a compiler looks at the "
            "first block of a kind only. So does every other block with one. Remove it, or leave out regional=True.",
            stacklevel=2,
        )

    def _call(self, path: str, block: Callable[..., Any], /, *args, **kwargs) -> Any:
        frame = call_frames.stack[-1]
        if frame["mode"] != EAGER:
            return block(*args, **kwargs)
        inside = self._look(frame, path)
        states = {name: frame["sites"][outer] for name, outer in inside.names.items()}
        key = (inside.kind, type(block), tuple(frame["compute"].items()), frame["full"])
        if key not in self._programs:
            self._programs[key] = compiled_with(fresh(_region(frame, inside.parts)), self._options)
        with in_own_words(lambda: block(*args, **kwargs)):
            out, updated, passed = self._programs[key](block, states, frame["now"], args, kwargs)
        for name, state in updated.items():
            frame["updated"][inside.names[name]] = state
        for name, count in passed.items():
            part = f"{path}.{name}"
            frame["passed"][part] = frame["passed"].get(part, 0) + count
        return out

    def _look(self, frame: Frame, path: str) -> Inside:
        layout, prefix = frame["layout"], f"{path}."
        before = tuple(count for part, count in frame["passed"].items() if part.startswith(prefix))
        key = (id(layout), path, before)
        if key not in self._inside:
            parts, names = {}, {}
            for part, calls in layout.parts.items():
                if part.startswith(prefix):
                    name, done = part[len(prefix) :], frame["passed"].get(part, 0)
                    left = calls[done:]
                    parts[name] = tuple(call._replace(name=f"{name} {n}") for n, call in enumerate(left))
                    names.update({f"{name} {n}": call.name for n, call in enumerate(left)})
            if parts not in self._kinds:
                self._kinds.append(parts)
            kind = self._kinds.index(parts)
            self._inside[key] = Inside(layout, kind, self._kinds[kind], names)
        return self._inside[key]


def _patched(forward: Any) -> bool:
    """Whether this is not the forward of its module's own class. Hooks that are gone leave that one on the module."""
    module = getattr(forward, "__self__", None)
    return getattr(forward, "__func__", None) is not type(module).forward if isinstance(module, nn.Module) else True


def _region(frame: Frame, parts: Parts) -> Callable[..., Any]:
    """A block as a function of what its sites remember."""
    constant = {name: frame[name] for name in ("mode", "forecaster", "arithmetic", "guidance", "full", "donate")}
    constant |= {"compute": {**frame["compute"]}, "layout": NOTHING._replace(parts={**parts}), "local": True}

    def region(block, states, now, args, kwargs):
        inner = {**constant, "sites": states, "now": now, "updated": {}, "passed": {}}
        stack = call_frames.stack
        stack.append(inner)
        try:
            out = block(*args, **kwargs)
        finally:
            stack.pop()
        return out, inner["updated"], inner["passed"]

    return region
