"""A step as a few compiled programs: one an action, each a full graph, picked on the host.

What counts and decides (the step, the log, the plan) stays on the host and never enters a program, so a program
is free of host reads and can be captured as a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import re
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit.deciders import Moment
from cachekit.errors import CacheError, StructureError
from cachekit.running import eager
from cachekit.running.frames import ACTION, PROBE, check_reached
from cachekit.running.outputs import unconditional
from cachekit.running.sites import run_framed
from cachekit.running.waiting import arrived, cutting, may_wait
from cachekit.signals import numbers
from cachekit.state import State
from cachekit.structure.layout import ALL, Layout

if TYPE_CHECKING:
    from cachekit.transform import CachedStep


class Programs:
    """The programs of one step.

    Attributes:
        replayed: whether they are CUDA graphs, which write their results where they wrote those of the last step.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = _lean(arguments)
        self.replayed = captures(self._arguments)
        self._compiled: dict[tuple, Callable[..., Any]] = {}
        self._standing: Any = None  # the modules that were compiled

    def _program(self, action: tuple, function: Callable[..., Any]) -> Callable[..., Any]:
        if action not in self._compiled:
            arguments = _cutting(self._arguments) if function is _probe else self._arguments
            self._compiled[action] = compiled_with(fresh(function), arguments)
        return self._compiled[action]

    def run(
        self, step: CachedStep, state: State, moment: Moment, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Any, State]:
        """One step: probe where the policy needs it, decide on the host, then compute or reuse."""
        self._begin(step)
        names = tuple(state.sites)
        written = step.layout(names).written
        if step.policy.front and written is not None:
            raise StructureError(
                f"The model's forward writes to its {written} in place, and a compiled step with a probe runs the "
                "forward twice. Use torch.compile(step, fullgraph=True), or let the forward write to a copy."
            )
        now, residual, carried, seen = step.clock(state), None, (), moment
        with in_own_words(lambda: eager.run(step, step.layout(names), state, seen, args, kwargs)):
            if step.policy.front:
                sums, residual, *carried = self._program((PROBE,), _probe)(step, names, state.reference, args, kwargs)
                moment = Moment(moment.step, moment.timestep, moment.steps, numbers(sums))
            verdicts = step.planned(state, moment.step) if step.policy.static else {ALL: step.verdict(state, moment)}
            program = self._program(tuple(verdicts.values()), _action)
            out, updated, observed = program(step, names, verdicts, state.sites, carried, now, args, kwargs)
        if observed is not None:
            moment = moment._replace(signal=numbers(observed))
        computed = all(verdicts.values())
        if self.replayed:
            out, updated = _carried_out(step, state, out, updated)
            residual = residual.clone() if residual is not None and computed and not step.donate else residual
        return out, step.advance(state, moment, computed, updated, residual)

    def uncond(
        self, step: CachedStep, layout: Layout, state: State, full: dict[str, bool], now, args: tuple, kwargs: dict
    ) -> tuple[Any, dict[str, Any]]:
        """The unconditional call of a step."""
        self._begin(step)
        with in_own_words(lambda: eager.uncond(step, layout, state, full, now, args, kwargs)):
            program = self._program(("uncond", *full.values()), _uncond)
            out, updated = program(step, tuple(state.sites), full, state.sites, now, args, kwargs)
        return _carried_out(step, state, out, updated) if self.replayed else (out, updated)

    def _begin(self, step: CachedStep) -> None:
        standing = step.opened.standing()
        if self._standing != standing:
            self._standing = standing
            self._compiled.clear()
        if self.replayed:
            # The programs of one step may hand results on to one another; those of the step before are done with.
            torch.compiler.cudagraph_mark_step_begin()


def captures(arguments: dict[str, Any]) -> bool:
    """Whether these arguments for torch.compile ask for CUDA graphs."""
    from torch._inductor import config

    given = arguments.get("options") or {}
    if arguments.get("mode") is not None:
        given = {**torch._inductor.list_mode_options(arguments["mode"]), **given}
    asked = given.get("triton.cudagraphs", config.triton.cudagraphs)
    return bool(asked) or arguments.get("backend") == "cudagraphs"


def _carried_out(step: CachedStep, state: State, out: Any, updated: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What outlives a step, out of the memory that the next replay writes to: into that of a state given away, or new.

    A state given away is written to here, and not in the program: one that writes to what it is given is not captured.
    """

    def leave(new: Any, old: Any = None) -> Any:
        if not isinstance(new, Tensor) or new is old:
            return new
        return old.copy_(new) if step.donate and isinstance(old, Tensor) else new.clone()

    kept = {name: pytree.tree_map(leave, fresh, state.sites[name]) for name, fresh in updated.items()}
    return pytree.tree_map(leave, out), kept


@contextlib.contextmanager
def in_own_words(without_compiler: Callable[[], Any]) -> Iterator[None]:
    """A compiler wraps what goes wrong while it traces. Without one the step says it in its own words."""
    try:
        yield
    except Exception as error:
        try:
            without_compiler()
        except CacheError as named:
            raise named from error
        raise


def _uncond(step, names, full, sites, now, args, kwargs):
    frame = step.frame(ACTION, step.layout(names), sites, None, now)
    frame["compute"] = full
    return unconditional(frame, step.opened.original, args, kwargs), frame["updated"]


def _probe(step, names, reference, args, kwargs):
    layout = step.layout(names)
    frame = step.frame(PROBE, layout, {}, reference, None)
    run_framed(frame, step.shadow, args, kwargs)
    check_reached(frame)
    return torch.stack(frame["sums"]), frame["residual"], [*map(may_wait, frame["carried"])], frame["early"]


def _action(step, names, verdicts, sites, carried, now, args, kwargs):
    layout = step.layout(names)
    frame = step.frame(ACTION, layout, sites, None, now, *carried)
    if carried:
        frame["carried"] = arrived(frame["carried"])
    frame["compute"] = verdicts
    out = run_framed(frame, step.shadow, args, kwargs)
    check_reached(frame)
    return out, frame["updated"], torch.stack(frame["sums"]) if frame["observe"] and frame["sums"] else None


def compiled_with(function: Any, arguments: dict[str, Any]) -> Callable[..., Any]:
    """`torch.compile(function, **arguments)`, which takes what it understands out of the options that it is given."""
    given: dict[str, Any] = {key: {**value} if isinstance(value, dict) else value for key, value in arguments.items()}
    return torch.compile(function, **given)


def fresh(function: Any) -> Callable[..., Any]:
    """The function with a code object of its own: compiled code is kept, and its recompiles counted, by code."""
    code = function.__code__.replace(co_name=function.__code__.co_name)
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


# Of the standard library, torch, and what this package itself keeps and never changes.
SETTLED = re.compile(
    r"^G\['(__builtins|__import_(builtins|collections|einops|functools|inspect|math|torch|types|typing)\b|torch\b)"
    r"|G\['(__import_cachekit(_dot_\w+)?|call_frames)'\]|type\(step\)|(^|\()step\.(?!opened\.(blocks\[|original)|shadow|_modules)"
)
# Which module stands where: the step looks after that itself, before every program.
STRUCTURE = {
    "TYPE_MATCH": re.compile(r"(^|\()step\..*(\b_modules('\])?(\['[^']*'\])?|\b_(parameters|buffers)('\])?)$"),
    "DICT_KEYS_MATCH": re.compile(r"(^|\()step\..*\b_modules('\])?$"),
    "DICT_CONTAINS": re.compile(r"(^|\()step\..*\b_modules('\])?$"),
}


def _lean(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for torch.compile without checks that cannot fail here: on small models they are what a step costs.

    Guards on the library's own constants are dropped, and those on which module stands where: `Opened.follow` has
    looked, and programs are not kept when it has changed. So is Inductor's check of the strides of every input: the
    guards have made sure of them.
    """
    arguments = dict(arguments)
    options = dict(arguments.pop("options", None) or {})
    mode = arguments.pop("mode", None)
    if mode is not None:
        options = {**torch._inductor.list_mode_options(mode, arguments.get("dynamic")), **options}
    if arguments.get("backend", "inductor") == "inductor":
        options = {"size_asserts": False, "alignment_asserts": False, **options}
    wanted = options.get("guard_filter_fn", lambda entries: [True] * len(entries))

    def needed(entries: Any) -> list[bool]:
        return [keep and not _checked(entry) for entry, keep in zip(entries, wanted(entries), strict=True)]

    return {**arguments, "options": {**options, "guard_filter_fn": needed}}


def _cutting(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for torch.compile by which the same backend compiles a probe without what may wait."""
    arguments, options = dict(arguments), dict(arguments["options"])
    filtering = {"guard_filter_fn": options.pop("guard_filter_fn")}
    backend = arguments.get("backend", "inductor")
    if backend == "inductor":
        given = {"config_patches": {name.replace("-", "_"): value for name, value in options.items()}}
    else:
        given = {"options": options} if options else {}
    compile_graph = functools.partial(torch._dynamo.lookup_backend(backend), **given)
    return {**arguments, "backend": cutting(compile_graph), "options": filtering}


def _checked(entry: Any) -> bool:
    if SETTLED.search(entry.name) is not None:
        return True
    structure = STRUCTURE.get(entry.guard_type)
    return structure is not None and structure.search(entry.name) is not None
