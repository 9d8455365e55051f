"""What a module returns, as a site: computed and remembered, or forecast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit.errors import StateError, StructureError
from cachekit.running.arguments import argument, assemble, has
from cachekit.running.branches import apart, either, entering, steady
from cachekit.running.frames import (
    ACTION,
    GRAPH,
    PROBE,
    REPLAY,
    Frame,
    check_like,
    computes,
    example,
    remember,
    updated,
)
from cachekit.structure.layout import Output


def whole(frame: Frame, model, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The model, or a forecast of what it returns."""
    output, probed = frame["layout"].output, bool(frame["layout"].spans)
    if frame["mode"] == PROBE:
        return model(*args, **kwargs)
    if not probed and frame["layout"].recorded:
        frame["entered"] = False
        check_given(frame, output, args, kwargs)
    elif not probed or (frame["mode"] == ACTION and not computes(frame)):
        frame["entered"] = False
        check_given(frame, output, args, kwargs)
        return at_output(frame, output, lambda: model(*args, **kwargs))
    out = model(*args, **kwargs)  # it has decided on the way
    values = _tensors_of(frame, output, out)
    recorded = frame["layout"].recorded
    if frame["mode"] == GRAPH and not recorded:
        return _assembled(output, _chosen(frame, output, values))
    if recorded or computes(frame):
        _remember(frame, output, values)
        return out
    return _assembled(output, _foreseen(frame, output))


def guided(frame: Frame, model, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The model on both halves of a guided batch, or on the conditional half, from which the other is answered."""
    guidance, output, now = frame["guidance"], frame["layout"].guided, frame["now"]
    (state,) = frame["sites"][output.name]
    if guidance.separate:
        out = model(*args, **kwargs)
        cond = _only(out)
        check_like(state.low, cond, output.dtypes[0], output.name)
        remember(frame, output.name, (guidance.keep(state, cond),))
        return out
    without, prompted = guidance.halves(args, kwargs)
    if frame["mode"] == GRAPH:
        # Branches of one graph have equal shapes: the conditional half always runs by itself.
        cond = steady(_only(model(*prompted[0], **prompted[1])))

        def compute():
            uncond = _only(frame["original"](*without[0], **without[1]))
            return guidance.join(uncond, cond), guidance.update(state, uncond, cond)

        def reuse():
            return guidance.answer(state, cond, now.step), state

        both, fresh = either(frame["compute"][output.group], compute, reuse)
        remember(frame, output.name, (fresh,))
    elif computes(frame, output.group):
        frame["full"] = True
        both = _only(model(*args, **kwargs))
        uncond, cond = guidance.split(both)
        remember(frame, output.name, (guidance.update(state, uncond, cond),))
    else:
        cond = _only(model(*prompted[0], **prompted[1]))
        both = guidance.answer(state, cond, now.step)
    check_like(state.low, cond, output.dtypes[0], output.name)
    return _assembled(output, [both])


def unconditional(frame: Frame, model, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The unconditional call of a step whose conditional one is done: the model itself, or the answer from that."""
    guidance, output, now = frame["guidance"], frame["layout"].guided, frame["now"]
    (state,) = frame["sites"][output.name]
    check_given(frame, output, args, kwargs)

    def compute():
        uncond = _only(model(*args, **kwargs))
        check_like(state.low, uncond, output.dtypes[0], output.name)
        return uncond, guidance.update(state, uncond, state.cond)

    def reuse():
        return guidance.predict(state, state.cond, now.step), state

    if frame["mode"] == GRAPH:
        uncond, fresh = either(frame["compute"][output.group], compute, reuse)
    else:
        uncond, fresh = compute() if computes(frame, output.group) else reuse()
    remember(frame, output.name, (fresh,))
    return _assembled(output, [uncond])


def _only(out: Any) -> Tensor:
    """The one tensor that a guided model returns."""
    (value,) = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    return value


def check_given(frame: Frame, output: Output, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of another batch or resolution than the state was made for, also where nothing is computed."""
    if frame["full"]:
        return  # both halves of a guided batch, of which one is remembered
    for state, like in zip(frame["sites"][output.name], output.like, strict=False):
        if like is None or not has(like.key, args, kwargs):
            continue
        kept, given = example(state).shape, argument(like.key, args, kwargs)
        if isinstance(given, Tensor) and (given.shape != kept if like.whole else given.shape[:1] != kept[:1]):
            raise StateError(
                f"At {output.name} the state holds {list(kept)}, the call brings {list(given.shape)} as {like.key!r}. "
                "Batch or resolution changed: make a new state with step.init."
            )


def at_part(frame: Frame, path: str, module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """A module inside a block, or a forecast of what it returns."""
    calls = frame["layout"].parts.get(path)
    if calls is None or frame["mode"] == PROBE:
        return module(*args, **kwargs)
    if frame["mode"] == REPLAY:
        frame["passed"][path] = len(calls)
        return module(*args, **kwargs)
    nth = frame["passed"].get(path, 0)
    frame["passed"][path] = nth + 1
    if nth >= len(calls):
        raise StructureError(f"{path} is called more often than at init. Make a new state with step.init.")
    check_given(frame, calls[nth], args, kwargs)
    if frame["mode"] == GRAPH:
        ((args, kwargs),) = entering([(args, dict(kwargs))], calls[nth].aliases)
    return at_output(frame, calls[nth], lambda: module(*args, **kwargs))


def at_output(frame: Frame, output: Output, run: Callable[[], Any]) -> Any:
    """What `run` returns, or a forecast of it, where the decision is known."""
    if frame["mode"] == GRAPH:
        return _assembled(output, _either(frame, output, run))
    if computes(frame, output.group):
        out = run()
        _remember(frame, output, _tensors_of(frame, output, out))
        return out
    return _assembled(output, _foreseen(frame, output))


def _either(frame: Frame, output: Output, run: Callable[[], Any]) -> list[Tensor]:
    states = frame["sites"][output.name]

    def compute():
        values = _tensors_of(frame, output, run())
        return values, updated(frame, [apart(value) for value in values], states)

    def reuse():
        return _foreseen(frame, output), states

    values, fresh = either(frame["compute"][output.group], compute, reuse)
    remember(frame, output.name, fresh)
    return values


def _chosen(frame: Frame, output: Output, values: list[Tensor]) -> list[Tensor]:
    """Of what was computed and what is forecast, one: for a decision that is made in the midst of the model."""
    decided: Tensor = frame["compute"][output.group]

    def choose(computed: Tensor, other: Tensor) -> Tensor:
        return torch.where(decided.to(other.device), computed, other)

    states = frame["sites"][output.name]
    chosen = [choose(*pair) for pair in zip(values, _foreseen(frame, output), strict=True)]
    remember(frame, output.name, pytree.tree_map(choose, updated(frame, values, states), states))
    return chosen


def _remember(frame: Frame, output: Output, values: list[Tensor]) -> None:
    # Half of a guided batch lies in the memory of both.
    kept = [value.clone() for value in values] if output.copied or frame["full"] else values
    remember(frame, output.name, updated(frame, kept, frame["sites"][output.name]))


def _tensors_of(frame: Frame, output: Output, out: Any) -> list[Tensor]:
    """What is remembered of what a module returned: of both halves of a guided batch the conditional one."""
    states = frame["sites"][output.name]
    values = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    if len(values) != len(states):
        raise StructureError(
            f"At {output.name} come {len(values)} tensors, at init {len(states)}. Make a new state with step.init and "
            "these arguments."
        )
    if frame["full"]:
        values = [frame["guidance"].split(value)[1] for value in values]
    for value, state, dtype in zip(values, states, output.dtypes, strict=True):
        check_like(example(state), value, dtype, output.name)
    return values


def _foreseen(frame: Frame, output: Output) -> list[Tensor]:
    states, timed = frame["sites"][output.name], frame["forecaster"].timed
    values = frame["arithmetic"].predict(states, frame["now"])
    values = [value.to(dtype) for value, dtype in zip(values, output.dtypes, strict=True)]
    # What is remembered must not be what is returned: an extrapolation of order 0 is, as what is held.
    held = pytree.tree_leaves(states) if output.copied else []
    return [value.clone() if held and (not timed or any(value is leaf for leaf in held)) else value for value in values]


def _assembled(output: Output, values: list[Tensor]) -> Any:
    remaining = iter(values)
    leaves = [next(remaining) if leaf is None else leaf.value for leaf in output.leaves]
    return assemble(output.treespec, leaves)
