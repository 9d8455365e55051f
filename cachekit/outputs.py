"""What a module returns, as a site: computed and remembered, or forecast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit.arguments import assemble
from cachekit.branches import either, unaliased
from cachekit.errors import StructureError
from cachekit.frames import ACTION, GRAPH, PROBE, Frame, check_like, computes, example, updated
from cachekit.layout import Output


def whole(frame: Frame, model, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The model, or a forecast of what it returns."""
    output, probed = frame["layout"].output, bool(frame["layout"].spans)
    if frame["mode"] == PROBE:
        return model(*args, **kwargs)
    if not probed or (frame["mode"] == ACTION and not computes(frame)):
        frame["entered"] = False
        return at_output(frame, output, lambda: model(*args, **kwargs))
    values = _tensors_of(output, model(*args, **kwargs), frame["sites"][output.name])  # it has decided on the way
    if frame["mode"] == GRAPH:
        return _assembled(output, _chosen(frame, output, values))
    if computes(frame):
        return _assembled(output, _remembered(frame, output, values))
    return _assembled(output, _foreseen(frame, output))


def at_part(frame: Frame, path: str, module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """A module inside a block, or a forecast of what it returns."""
    calls = frame["layout"].parts.get(path)
    if calls is None or frame["mode"] == PROBE:
        return module(*args, **kwargs)
    nth = frame["passed"].get(path, 0)
    frame["passed"][path] = nth + 1
    if nth >= len(calls):
        raise StructureError(f"{path} is called more often than at init. Make a new state with step.init.")
    if frame["mode"] == GRAPH and calls[nth].aliases:
        ((args, kwargs),) = unaliased(calls[nth].aliases, [(args, dict(kwargs))])
    return at_output(frame, calls[nth], lambda: module(*args, **kwargs))


def at_output(frame: Frame, output: Output, run: Callable[[], Any]) -> Any:
    """What `run` returns, or a forecast of it, where the decision is known."""
    if frame["mode"] == GRAPH:
        return _assembled(output, _either(frame, output, run))
    if computes(frame, output.group):
        return _assembled(output, _remembered(frame, output, _tensors_of(output, run(), frame["sites"][output.name])))
    return _assembled(output, _foreseen(frame, output))


def _either(frame: Frame, output: Output, run: Callable[[], Any]) -> list[Tensor]:
    states = frame["sites"][output.name]

    def compute():
        values = _tensors_of(output, run(), states)
        return values, updated(frame, values, states)

    def reuse():
        return _foreseen(frame, output), states

    values, frame["updated"][output.name] = either(frame["compute"][output.group], compute, reuse)
    return values


def _chosen(frame: Frame, output: Output, values: list[Tensor]) -> list[Tensor]:
    """Of what was computed and what is forecast, one: for a decision that is made in the midst of the model."""
    decided: Tensor = frame["compute"][output.group]

    def choose(computed: Tensor, other: Tensor) -> Tensor:
        return torch.where(decided.to(other.device), computed, other)

    states = frame["sites"][output.name]
    frame["updated"][output.name] = pytree.tree_map(choose, updated(frame, values, states), states)
    return [choose(*pair) for pair in zip(values, _foreseen(frame, output), strict=True)]


def _remembered(frame: Frame, output: Output, values: list[Tensor]) -> list[Tensor]:
    kept = [value.clone() for value in values] if output.copied else values
    frame["updated"][output.name] = updated(frame, kept, frame["sites"][output.name])
    return values


def _tensors_of(output: Output, out: Any, states: tuple[Any, ...]) -> list[Tensor]:
    values = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    if len(values) != len(states):
        raise StructureError(
            f"At {output.name} come {len(values)} tensors, at init {len(states)}. Make a new state with step.init and "
            "these arguments."
        )
    for value, state, dtype in zip(values, states, output.dtypes, strict=True):
        check_like(example(state), value, dtype, output.name)
    return values


def _foreseen(frame: Frame, output: Output) -> list[Tensor]:
    predict, now, states = frame["forecaster"].predict, frame["now"], frame["sites"][output.name]
    values = [predict(state, now).to(dtype) for state, dtype in zip(states, output.dtypes, strict=True)]
    return [value.clone() for value in values] if output.copied and not frame["forecaster"].timed else values


def _assembled(output: Output, values: list[Tensor]) -> Any:
    remaining = iter(values)
    leaves = [next(remaining) if leaf is None else leaf.value for leaf in output.leaves]
    return assemble(output.treespec, leaves)
