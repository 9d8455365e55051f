"""The record of one forward, as plain data.

A tensor of the recorded forward is a *token*, an int that two values share exactly when they were the same object; see
`discovery` for how a record is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import torch

Name: TypeAlias = int | str
"""An argument of a block: its position, or its name where it was passed by keyword."""

Key: TypeAlias = Name | tuple[Name, int]
"""The same, or a value in an argument that is a container: its name, and which leaf of it in torch.utils._pytree."""

KINDS = ("spatial", "temporal", "cross", "mlp")
"""Kinds of modules inside blocks: self-attention in space and in time, cross-attention, feed-forward network."""

DENOISED = -1
"""The label of whatever was computed from the first argument of the model's forward; the others count down."""

NUMBER = re.compile(r"\b(\d+)\b")
"""A number in the name of a module."""


class TensorSpec(NamedTuple):
    """Shape, dtype and device of a tensor that need not exist."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class Leaf(NamedTuple):
    """A tensor among the arguments or results of a block."""

    token: int
    storage: int  # equal for tensors that share memory
    spec: TensorSpec
    labels: frozenset[int]  # what it was computed from: calls (>= 0), arguments of the model (< 0); none in a part


class Const(NamedTuple):
    """A value that nobody can change: a number, a name, a dtype."""

    value: Any


class Opaque(NamedTuple):
    """An object that is none of these, by its class: it may hold tensors, or change. The object itself is not kept."""

    kind: str
    token: int  # equal for one object


class Call(NamedTuple):
    """One call of one block in the recorded forward."""

    path: str  # qualified name of the block
    nth: int  # how many calls of this block came before
    kind: str  # class of the block
    args: dict[Key, Any]  # Leaf, Const or Opaque
    treespec: Any  # of the result
    outs: tuple[Any, ...]  # Leaf, Const or Opaque, flat
    lineage: dict[int, frozenset[Key]]  # output leaf -> arguments it reaches by additions alone
    mutated: dict[Key, int]  # arguments it wrote to, and the token each has after that
    attributes: dict[str, int]  # tensors it left on itself, and the token of each
    flops: int  # 0 where its products are not seen
    weights: int  # how many numbers its parameters and buffers hold


class Early(NamedTuple):
    """One call of a module beside the blocks: an embedding, a rotary table."""

    path: str
    before: int  # how many blocks had been called
    outs: frozenset[int]  # tokens of its results
    pure: bool  # whether nothing shows but new tensors that are never written to


class Part(NamedTuple):
    """One call of a module inside a block, or beside the blocks, that could be a site of its own."""

    call: Call
    kind: str  # one of `KINDS`, or "" for any other module
    block: int  # index of the block's call it was a part of, -1 for none
    written: bool  # whether something writes to its result later


class Record(NamedTuple):
    """One forward: the calls in order, and which results anything but a block has read."""

    calls: tuple[Call, ...]
    parts: tuple[Part, ...]
    given: dict[Key, Any]  # arguments of the model: Leaf, Const or Opaque
    early: tuple[Early, ...]
    outs: tuple[Any, ...]  # of the model: Leaf, Const or Opaque, flat
    treespec: Any  # of what the model returns
    read: frozenset[int]  # tokens
    strange: dict[
        str, tuple[str, ...]
    ]  # class of a block -> operators in it that nobody knows: no torch's, no products
    written: str | None  # an argument or buffer of the model that its forward writes to
    kept: str | None  # which block writes to an object that it is given, if one does
    real: str | None  # why the forward had to be run for real, or None where fake tensors were enough


def list_name(path: str) -> str:
    """`blocks` of `blocks.3`."""
    return path.rpartition(".")[0] or path


def lists_of(paths: Iterable[str]) -> str:
    """The lists that blocks stand in, for messages."""
    return ", ".join(alike(dict.fromkeys(list_name(path) for path in paths))) or "none"


def alike(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in numbers alone -> those names, each group under one with a star where they differ.

    Example:
        >>> list(alike(["blocks.0.ff.1", "blocks.1.ff.1", "head"]))
        ['blocks.*.ff.1', 'head']
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(NUMBER.split(name)[::2]), []).append(name)
    return {"".join(map(_common, zip(*map(NUMBER.split, group), strict=True))): group for group in groups.values()}


def _common(pieces: tuple[str, ...]) -> str:
    return pieces[0] if len({*pieces}) == 1 else "*"


def leaves_of(call: Call) -> list[tuple[Key, Leaf]]:
    """Every tensor among the arguments, with its key."""
    return [(key, arg) for key, arg in call.args.items() if isinstance(arg, Leaf)]


def known(kind: str) -> str:
    """How the tensors in an object of this class are seen, for messages."""
    return f" (if it is a dataclass, make its tensors known with torch.utils._pytree.register_dataclass({kind}))"


def opaque(outs: Iterable[Any]) -> str | None:
    """The class of the first result that nothing can stand for, if there is one."""
    return next((out.kind for out in outs if isinstance(out, Opaque)), None)


def instead(record: Record) -> str:
    """What else a cache can leave out of a model that has no chain, for messages."""
    ways = []
    if any(part.kind for part in record.parts):
        ways.append("attention and feed-forward networks, e.g. with cachekit.taylorseer(4)")
    if any(isinstance(out, Leaf) for out in record.outs) and opaque(record.outs) is None:
        ways.append('the model as a whole, e.g. with cachekit.taylorseer(4, sites="output")')
    return f" Leave out {', or '.join(ways)}." if ways else ""


def made_by(call: Call) -> set[int]:
    """The results that are not arguments handed through."""
    given = {arg.token for _, arg in leaves_of(call)}
    return {out.token for out in call.outs if isinstance(out, Leaf)} - given
