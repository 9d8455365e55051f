"""The arguments and results of calls: how to get at one, and how to put another in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils import _pytree as pytree

from cachekit.structure.layout import Place
from cachekit.structure.record import Key


def argument(key: Key, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument of a call under this key, or the leaf of one."""
    if isinstance(key, tuple):
        return pytree.tree_leaves(argument(key[0], args, kwargs))[key[1]]
    return args[key] if isinstance(key, int) else kwargs[key]


def has(key: Key, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has an argument under this key, or such a leaf."""
    if isinstance(key, tuple):
        return has(key[0], args, kwargs) and key[1] < len(pytree.tree_leaves(argument(key[0], args, kwargs)))
    return key < len(args) if isinstance(key, int) else key in kwargs


def put(call: tuple[list, dict], key: Key, value: Any) -> None:
    """Let a call have this value as an argument, or as a leaf of one."""
    if isinstance(key, tuple):
        key, leaf = key
        leaves, treespec = pytree.tree_flatten(argument(key, *call))
        leaves[leaf] = value
        value = pytree.tree_unflatten(leaves, treespec)
    holder: Any = call[0] if isinstance(key, int) else call[1]
    holder[key] = value


def at_place(place: Place, calls: list[tuple[Any, dict[str, Any]]]) -> Any:
    """The tensor at this place among the arguments of several calls."""
    return argument(place.key, *calls[place.member])


def result(output: Any, treespec: Any, leaf: int) -> Any:
    """A leaf of what a call returned."""
    if treespec.is_leaf():
        return output
    if treespec.type in (tuple, list) and _flat(treespec):
        return output[leaf]
    return pytree.tree_leaves(output)[leaf]


def _flat(treespec: Any) -> bool:
    """Whether it is a container of leaves alone."""
    return treespec.num_nodes == treespec.num_leaves + 1


def assemble(treespec: Any, leaves: list[Any]) -> Any:
    """What a call returns, made of its leaves."""
    if treespec.is_leaf():
        return leaves[0]
    if treespec.type is tuple and _flat(treespec):
        return tuple(leaves)
    return pytree.tree_unflatten(leaves, treespec)
