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


def entering(
    calls: list[tuple[Any, dict[str, Any]]], aliases: Sequence[Sequence[Place]] = ()
) -> list[tuple[Any, dict[str, Any]]]:
    """The arguments of calls as a branch of `torch.cond` takes them.

    It refuses shared memory, so what shares it is copied.
    """
    entered: list[tuple[Tensor, Tensor]] = []

    def enter(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = [inside for given, inside in entered if given is value]  # two views of one tensor would share memory
        if not known:
            entered.append((value, steady(value)))
        return known[0] if known else entered[-1][1]

    free = [pytree.tree_map(enter, (list(args), dict(kwargs))) for args, kwargs in calls]
    for places in aliases:
        fresh = at_place(places[0], calls).clone(memory_format=torch.contiguous_format)
        for place in places:
            put(free[place.member], place.key, fresh)
    return free


def steady(value: Tensor) -> Tensor:
    """The same values, with strides that a compiler keeps.

    Inductor (2.11 to 2.13) lays out what a graph computes as it likes, and compiles a branch for the strides that the
    traced tensor had. Of what is read through `as_strided` it keeps them.
    """
    value = value.contiguous()
    return value.as_strided(value.shape, value.stride())


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
        put(free[place.member], place.key, copies[-1][1])
    return free
