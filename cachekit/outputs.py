"""What a module returns, as a site: computed and remembered, or forecast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit.arguments import assemble
from cachekit.branches import either
from cachekit.errors import StructureError
from cachekit.frames import GRAPH, PROBE, REUSE, Frame, check_like, computes, example, updated
from cachekit.layout import Output


def whole(frame: Frame, model, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The model, or a forecast of what it returns."""
    output, probed = frame["layout"].output, bool(frame["layout"].spans)
    if frame["mode"] == PROBE:
        return model(*args, **kwargs)
    if not probed or frame["mode"] == REUSE:
        frame["entered"] = False
        return at_output(frame, output, lambda: model(*args, **kwargs))
    values = _tensors_of(output, model(*args, **kwargs), frame["sites"][output.name])  # it has decided on the way
    if frame["mode"] == GRAPH:
        return _assembled(output, _chosen(frame, output, values))
    if computes(frame):
        return _assembled(output, _remembered(frame, output, values))
    return _assembled(output, _foreseen(frame, output))


def at_output(frame: Frame, output: Output, run: Callable[[], Any]) -> Any:
    """What `run` returns, or a forecast of it, where the decision is known."""
    if frame["mode"] == GRAPH:
        return _assembled(output, _either(frame, output, run))
    if computes(frame):
        return _assembled(output, _remembered(frame, output, _tensors_of(output, run(), frame["sites"][output.name])))
    return _assembled(output, _foreseen(frame, output))


def _either(frame: Frame, output: Output, run: Callable[[], Any]) -> list[Tensor]:
    states = frame["sites"][output.name]

    def compute():
        values = _tensors_of(output, run(), states)
        return values, updated(frame, values, states)

    def reuse():
        return _foreseen(frame, output), states

    values, frame["updated"][output.name] = either(frame["compute"], compute, reuse)
    return values


def _chosen(frame: Frame, output: Output, values: list[Tensor]) -> list[Tensor]:
    """Of what was computed and what is forecast, one: for a decision that is made in the midst of the model."""
    decided: Tensor = frame["compute"]

    def choose(computed: Tensor, other: Tensor) -> Tensor:
        return torch.where(decided.to(other.device), computed, other)

    states = frame["sites"][output.name]
    frame["updated"][output.name] = pytree.tree_map(choose, updated(frame, values, states), states)
    return [choose(*pair) for pair in zip(values, _foreseen(frame, output), strict=True)]


def _remembered(frame: Frame, output: Output, values: list[Tensor]) -> list[Tensor]:
    frame["updated"][output.name] = updated(frame, values, frame["sites"][output.name])
    return values


def _tensors_of(output: Output, out: Any, states: tuple[Any, ...]) -> list[Tensor]:
    values = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    if len(values) != len(states):
        raise StructureError(
            f"The model returns {len(values)} tensors, at init {len(states)}. Make a new state with step.init "
            "and these arguments."
        )
    for value, state, dtype in zip(values, states, output.dtypes, strict=True):
        check_like(example(state), value, dtype, output.name)
    return values


def _foreseen(frame: Frame, output: Output) -> list[Tensor]:
    predict, now, states = frame["forecaster"].predict, frame["now"], frame["sites"][output.name]
    return [predict(state, now).to(dtype) for state, dtype in zip(states, output.dtypes, strict=True)]


def _assembled(output: Output, values: list[Tensor]) -> Any:
    remaining = iter(values)
    leaves = [next(remaining) if leaf is None else leaf.value for leaf in output.leaves]
    return assemble(output.treespec, leaves)
