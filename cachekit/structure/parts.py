"""What a module inside a block does, seen from the operators that run in it: an attention, a feed-forward network."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from cachekit.structure.record import KINDS, Key

# The operands of a product of matrices, by operator: their places among its arguments.
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
# Query and value of an attention that is one operator.
FUSED = re.compile(r"scaled_dot_product|multi_head_attention|flex_attention|flash_attn|flash_attention")
TEMPORAL = re.compile(r"(^|[._])(temporal|temp|time|motion)")

Origin = tuple[int, Key]


PARTS = {"attention": KINDS[:3], "mlp": KINDS[3:], "attention+mlp": KINDS}
"""What is left out inside the blocks, and the kinds of modules that this means."""

Sites: TypeAlias = str | tuple[str, ...] | Mapping[str, tuple[str, ...]]
"""A name of what is left out, patterns of names, or such patterns by kind."""


class Activity:
    """What happened while one module ran."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pairs: list[tuple[frozenset[Origin], frozenset[Origin]]] = []  # query, and key and value; or factors
        self.fused = False
        self.products = 0  # with weights or without, those of modules inside included
        self.attended = False  # here or in a module inside

    @property
    def attends(self) -> bool:
        """Whether activations met activations right here: in one operator, or in two products."""
        return self.fused or len(self.pairs) >= 2

    @property
    def crossed(self) -> bool:
        """Whether keys and values come from other arguments than the queries."""
        query = frozenset(origin for origin in self.pairs[0][0] if origin[0] == self.number)
        others = frozenset(origin for origin in self.pairs[0][1] | self.pairs[-1][1] if origin[0] == self.number)
        return bool(query and others) and not query & others


class Watch:
    """Follows which arguments of the modules that run reach which operators."""

    def __init__(self) -> None:
        self.running: list[Activity] = []
        self._origins = WeakIdKeyDictionary()
        self._count = 0

    def enter(self, given: Mapping[Key, Any]) -> Activity:
        """A module is called with these arguments."""
        self._count += 1
        self.running.append(Activity(self._count))
        live = {activity.number for activity in self.running}
        for key, value in given.items():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor):
                    before = frozenset(origin for origin in self._of(leaf) if origin[0] in live)
                    self._origins[leaf] = before | {(self._count, key)}
        return self.running[-1]

    def leave(self) -> None:
        """The innermost module returns, or fails."""
        inner = self.running.pop()
        if self.running:
            self.running[-1].products += inner.products
            self.running[-1].attended |= inner.attended or inner.attends

    def operator(self, name: str, args: Sequence[Any], outputs: Iterable[Tensor], computed, product: bool) -> None:
        """An operator ran; `computed` tells a tensor that depends on the model's arguments from a weight."""
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        origins = frozenset().union(*(self._of(tensor) for tensor in tensors))
        for output in outputs:
            self._origins[output] = origins
        here = self.running[-1]
        here.products += product
        if FUSED.search(name):
            here.fused = True
            operands = [self._of(arg) if isinstance(arg, Tensor) else frozenset() for arg in args[:3]]
            here.pairs.append((operands[0], frozenset().union(*operands[1:])))
        elif name in PRODUCTS:
            left, right = (args[place] for place in PRODUCTS[name])
            if computed(left) and computed(right):
                here.pairs.append((self._of(left), self._of(right)))

    def _of(self, tensor: Tensor) -> frozenset[Origin]:
        return self._origins.get(tensor) or frozenset()


def kind_of(activity: Activity, path: str, given: Mapping[Key, Any], out: Any, frames: Sequence[int]) -> str:
    """The kind of a module, "" where it is none of `cachekit.structure.record.KINDS`.

    Args:
        activity: what happened in it.
        path: its name.
        given: its arguments.
        out: its result.
        frames: batch, then what may be the number of frames, of a video model's first argument; else empty.
    """
    first = next((value for value in given.values() if isinstance(value, Tensor)), None)
    if activity.attends:
        if activity.crossed:
            return "cross"
        return "temporal" if TEMPORAL.search(path) or _in_time(first, frames) else "spatial"
    alike = isinstance(out, Tensor) and first is not None and first.ndim >= 3 and out.shape == first.shape
    return "mlp" if alike and activity.products >= 2 and not activity.attended else ""


def patterns_of(sites: tuple[str, ...] | Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """All patterns, of whatever kind."""
    return tuple(itertools.chain.from_iterable(sites.values())) if isinstance(sites, Mapping) else sites


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a whole name is matched by one of the patterns."""
    return any(re.fullmatch(pattern, name) is not None for pattern in patterns)


def _in_time(tokens: Tensor | None, frames: Sequence[int]) -> bool:
    """Whether the sequence runs over the frames: its length is their number, and space has become batch."""
    if tokens is None or tokens.ndim != 3 or not frames:
        return False
    batch, length, _ = tokens.shape
    return length in frames[1:] and batch > frames[0] and batch % frames[0] == 0


def part_paths(model: nn.Module, blocks: Iterable[str], sites: Any) -> list[str]:
    """Names of the modules that could be sites besides the blocks: those inside the blocks, and those that are named.

    A module without modules inside (a norm, a projection, the bare product of an attention) is part of one that is
    worth leaving out, unless it is named.
    """
    found = []
    if not isinstance(sites, str):
        found = [name for name, _ in model.named_modules() if name and matches(name, patterns_of(sites))]
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if name != block and module._modules and type(module).forward is not nn.Module.forward:
                found.append(name)
    return list(dict.fromkeys(found))
