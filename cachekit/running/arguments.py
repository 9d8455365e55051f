"""The arguments and results of calls: how to get at one, and how to put another in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils import _pytree as pytree

from cachekit.structure.layout import Place
from cachekit.structure.record import Key


def argument(key: Key, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The argument of a call under this key."""
    return args[key] if isinstance(key, int) else kwargs[key]


def has(key: Key, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has an argument under this key."""
    return key < len(args) if isinstance(key, int) else key in kwargs


def put(call: tuple[list, dict], key: Key, leaf: int, value: Any) -> None:
    """Let a call have this value as an argument, or as a leaf of it; `leaf` is -1 for the argument itself."""
    holder: Any = call[0] if isinstance(key, int) else call[1]
    if leaf >= 0:
        leaves, treespec = pytree.tree_flatten(holder[key])
        leaves[leaf] = value
        value = pytree.tree_unflatten(leaves, treespec)
    holder[key] = value


def at_place(place: Place, calls: list[tuple[Any, dict[str, Any]]]) -> Any:
    """The tensor at this place among the arguments of several calls."""
    value = argument(place.key, *calls[place.member])
    return value if place.leaf < 0 else pytree.tree_leaves(value)[place.leaf]


def result(output: Any, treespec: Any, leaf: int) -> Any:
    """A leaf of what a call returned."""
    if treespec.is_leaf():
        return output
    if treespec.type in (tuple, list) and treespec.num_leaves == treespec.num_children:
        return output[leaf]
    return pytree.tree_leaves(output)[leaf]


def assemble(treespec: Any, leaves: list[Any]) -> Any:
    """What a call returns, made of its leaves."""
    if treespec.is_leaf():
        return leaves[0]
    if treespec.type is tuple and treespec.num_leaves == treespec.num_children:
        return tuple(leaves)
    return pytree.tree_unflatten(leaves, treespec)
