"""Both ways of a decision inside one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit.running.arguments import at_place, put
from cachekit.structure.layout import Place, Span


def either(decided: Tensor, compute: Callable[[], Any], reuse: Callable[[], Any]) -> Any:
    """What `compute` or `reuse` returns, a pytree of tensors: fresh ones, with equal strides in both branches.

    A branch must not return what comes from outside, nor an alias of it.
    """
    return torch.cond(decided, lambda: pytree.tree_map(_fresh, compute()), lambda: pytree.tree_map(_fresh, reuse()), ())


def _fresh(value: Tensor) -> Tensor:
    return value.contiguous().clone(memory_format=torch.contiguous_format)


def apart(value: Tensor) -> Tensor:
    """A copy that the compiler takes for another tensor than `value`.

    Inductor (2.11 to 2.13) drops both of two clones that a branch returns of one tensor. They are one memory then, into
    which it writes when the one is used up, and the other is lost.
    """
    return (value * 1).to(value.dtype)


def unaliased(
    aliases: Sequence[Sequence[Place]], calls: list[tuple[tuple, dict[str, Any]]]
) -> list[tuple[Any, dict[str, Any]]]:
    """The arguments without shared memory, which a branch of `torch.cond` refuses."""
    free = [(list(args), dict(kwargs)) for args, kwargs in calls]
    for places in aliases:
        fresh = at_place(places[0], calls).clone()
        for place in places:
            put(free[place.member], place.key, place.leaf, fresh)
    return free


def own(span: Span, calls: list[tuple[Any, dict[str, Any]]]) -> list[tuple[Any, dict[str, Any]]]:
    """The arguments with copies where a block writes: a branch must not write to what comes from outside."""
    if not span.writes:
        return calls
    free: list[tuple[Any, dict[str, Any]]] = [(list(args), dict(kwargs)) for args, kwargs in calls]
    copies: list[tuple[Tensor, Tensor]] = []
    for place in span.writes:
        value = at_place(place, calls)
        known = [copy for given, copy in copies if given is value]
        copies.append((value, known[0] if known else value.clone()))
        put(free[place.member], place.key, place.leaf, copies[-1][1])
    return free
