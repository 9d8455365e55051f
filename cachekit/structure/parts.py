"""What a module inside a block does, seen from the operators that run in it: an attention, a feed-forward network."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from cachekit.structure.modules import callable_module, methods_of, module_at, named, unwrap
from cachekit.structure.numbering import leaves_of
from cachekit.structure.record import KINDS, Name

ADDITIONS = {"add", "add_", "sub", "sub_", "addcmul", "addcmul_"}
VIEWS = {
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "cat"),
    *("clone", "_to_copy", "contiguous", "split", "split_with_sizes", "expand", "alias", "detach", "stack", "unbind"),
    *("clamp", "clip", "where"),  # e.g. a clip of float16 overflow at the end of a block
}
# The operands of a product of matrices, by operator: their places among its arguments.
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
# Query and value of an attention that is one operator.
FUSED = re.compile(r"scaled_dot_product|(^|_)(attn|attention|sdpa|fmha|mha)(_|\d|$)|flash_?attn|sageattn")
# What is linear in a tensor, beside a product with a weight.
LINEAR = {"mul", "mul_", "div", "div_", "native_dropout", "neg", "sum", "mean"}
NATIVE = ("aten", "prims", "prim")
TEMPORAL = re.compile(r"(^|[._])(temporal|temp|time|motion)")

Origin = tuple[int, Name]


PARTS = {"attention": KINDS[:3], "mlp": KINDS[3:], "attention+mlp": KINDS}
"""What is left out inside the blocks, and the kinds of modules that this means."""

Sites: TypeAlias = str | tuple[str, ...] | Mapping[str, tuple[str, ...]]
"""A name of what is left out, patterns of names, or such patterns by kind."""


PRODUCT, BENT = "product", "bent"
"""Instead of the key of an argument: what has met a weight, and what has been through a function that bends since."""


class Activity:
    """What happened while one module ran.

    Args:
        number: of the call.
        first: the key of its first argument that is a tensor.
    """

    def __init__(self, number: int, first: Name | None) -> None:
        self.number = number
        self.first = first
        self.pairs: list[tuple[frozenset[Origin], frozenset[Origin]]] = []  # query, and key and value; or factors
        self.fused = False
        self.weighted = False  # activations met weights, here or in a module inside
        self.serial = False  # a product, something that is not linear, and a product: on the way of the first argument
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

    @property
    def core(self) -> bool:
        """Whether it does nothing but attend: what it is given has been projected outside, where attention is known."""
        return self.attends and not self.weighted

    def passed(self, origins: frozenset[Origin], *, product: bool, linear: bool) -> frozenset[Origin]:
        """What is to be said of the result of an operator, besides where it comes from."""
        multiplied, bent = (self.number, PRODUCT), (self.number, BENT)
        if product:
            self.serial |= bent in origins
            return frozenset({multiplied}) if (self.number, self.first) in origins else frozenset()
        return frozenset({bent}) if multiplied in origins and not linear else frozenset()


class Watch:
    """Follows which arguments of the modules that run reach which operators."""

    def __init__(self) -> None:
        self.running: list[Activity] = []
        self._origins = WeakIdKeyDictionary()
        self._count = 0

    def enter(self, given: Mapping[Name, Any]) -> Activity:
        """A module is called with these arguments."""
        self._count += 1
        first = next((key for key, value in given.items() if isinstance(value, Tensor)), None)
        self.running.append(Activity(self._count, first))
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
        if not self.running:
            return
        around = self.running[-1]
        if inner.core:  # it is the one around that attends
            around.pairs += inner.pairs
            around.fused |= inner.fused
        else:
            around.attended |= inner.attends
        around.weighted |= inner.weighted
        around.attended |= inner.attended

    def operator(
        self, func: Any, args: Sequence[Any], outputs: Sequence[Tensor], computed: Callable[[Tensor], Any], known: bool
    ) -> None:
        """An operator ran.

        Args:
            func: it.
            args: its arguments.
            outputs: the tensors that it returned.
            computed: tells a tensor that depends on the model's arguments from a weight.
            known: whether torch counts it as a product.
        """
        name = name_of(func)
        tensors = [leaf for leaf in leaves_of(*args) if isinstance(leaf, Tensor)]
        origins = frozenset().union(*(self._of(tensor) for tensor in tensors))
        here, alive, weights = self.running[-1], [each for each in tensors if computed(each)], False
        if attends(func, alive, outputs):
            here.fused = True
            operands = [self._of(arg) if isinstance(arg, Tensor) else frozenset() for arg in args[:3]]
            here.pairs.append((operands[0], frozenset().union(*operands[1:])))
            here.weighted |= any(isinstance(tensor, nn.Parameter) for tensor in tensors)
        elif name in PRODUCTS and self._meet([args[place] for place in PRODUCTS[name]], computed):
            left, right = (args[place] for place in PRODUCTS[name])
            here.pairs.append((self._of(left), self._of(right)))
        else:
            weights = known or multiplies(func, alive, tensors, outputs)
            # An activation bends one tensor, and a gate another one with it: what takes more may well be an attention.
            here.attended |= not (weights or native(func)) and len(alive) > 2
        here.weighted |= weights
        linear = name in VIEWS or name in ADDITIONS or (name in LINEAR and len(alive) <= 1)
        said = (each.passed(origins, product=weights, linear=linear) for each in self.running)
        origins = origins.union(*said)
        for output in outputs:
            self._origins[output] = origins

    def _meet(self, operands: Sequence[Tensor], computed: Callable[[Tensor], Any]) -> bool:
        """Whether both are activations. Learned queries are, too: a module has been given them."""
        left, right = operands
        return bool(computed(right) and (computed(left) or self._of(left)))

    def _of(self, tensor: Tensor) -> frozenset[Origin]:
        return self._origins.get(tensor) or frozenset()


def kind_of(activity: Activity, path: str, given: Mapping[Name, Any], out: Any, frames: Sequence[int]) -> str:
    """The kind of a module, "" where it is none of `cachekit.structure.record.KINDS`.

    Args:
        activity: what happened in it.
        path: its name.
        given: its arguments.
        out: its result.
        frames: batch, then what may be the number of frames, of a video model's first argument; else empty.
    """
    first = next((value for value in given.values() if isinstance(value, Tensor)), None)
    if activity.core:
        return ""
    if activity.attends:
        if activity.crossed:
            return "cross"
        return "temporal" if TEMPORAL.search(path) or _in_time(first, frames) else "spatial"
    alike = isinstance(out, Tensor) and first is not None and first.ndim >= 3 and out.shape == first.shape
    return "mlp" if alike and activity.serial and not activity.attended else ""


def name_of(func: Any) -> str:
    """Of an operator, without its namespace."""
    return func._schema.name.rpartition("::")[2] if isinstance(func, OpOverload) else func.name()


def attends(func: Any, computed: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether an operator is a whole attention: by its name, or by what it takes and returns where nobody knows it.

    Args:
        func: the operator.
        computed: its arguments that are no weights.
        outputs: the tensors that it returned.
    """
    if FUSED.search(name_of(func)):
        return True
    if native(func) or len(computed) < 3 or not outputs:
        return False
    query, key, value = computed[:3]
    heads = query.ndim == key.ndim == value.ndim == 4
    return heads and key.shape[:-1] == value.shape[:-1] and outputs[0].shape[:-1] == query.shape[:-1]


def multiplies(func: Any, computed: Sequence[Tensor], tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether an operator that torch does not count is a product with a weight.

    Args:
        func: the operator.
        computed: its arguments that are no weights.
        tensors: all of them.
        outputs: the tensors that it returned.
    """
    if not computed or not outputs or (native(func) and "mm" not in name_of(func)):
        return False
    given, out = computed[0], outputs[0]
    if given.ndim < 2 or out.ndim < 2:
        return False
    # Packed as they may be, a weight holds at least 4 bits for each pair of numbers.
    least = given.shape[-1] * out.shape[-1] / 2
    weights = [each for each in tensors if all(each is not one for one in computed)]
    return any(each.numel() * each.element_size() >= least for each in weights) and given.shape[:-1] == out.shape[:-1]


def uncounted(
    func: Any, tensors: Sequence[Tensor], outputs: Sequence[Tensor], computed: Callable[[Tensor], Any]
) -> int:
    """The floating-point operations of an operator that torch does not count, as far as shapes tell: 0 of what is no
    product. Up to 2.14 torch's registry lacks attention on a CPU, and it holds no operator of others.

    Args:
        func: the operator.
        tensors: its arguments.
        outputs: the tensors that it returned.
        computed: tells a tensor that depends on the model's arguments from a weight.
    """
    if native(func) and "mm" not in name_of(func) and not FUSED.search(name_of(func)):
        return 0  # most are none, and need not be looked at any further
    alive = [each for each in tensors if computed(each)]
    if alive and attends(func, alive, outputs):
        query, key, value = (alive * 3)[:3]
        # Others put the heads before the sequence or after it, and there are fewer of them.
        length = key.shape[-2] if native(func) else max(key.shape[1:-1], default=key.shape[0])
        return 2 * length * query.numel() // query.shape[-1] * (query.shape[-1] + value.shape[-1])
    return 2 * alive[0].numel() * outputs[0].shape[-1] if multiplies(func, alive, tensors, outputs) else 0


def native(func: Any) -> bool:
    """Whether an operator is one of torch's own."""
    return not isinstance(func, OpOverload) or func.namespace in NATIVE


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
    """Names of the modules that could be sites besides the blocks: the blocks themselves, where they are an attention
    or a feed-forward network, those inside the blocks, and those that are named. Of a model without blocks all are.

    A module without modules inside (a norm, a projection, the bare product of an attention) is part of one that is
    worth leaving out, unless it is named.
    """
    found = []
    if not isinstance(sites, str):
        found = [name for name, _ in named(model) if name and matches(name, patterns_of(sites))]
    for block in [*blocks] or [""]:
        for name, module in named(module_at(model, block), block):
            if name and unwrap(module)._modules and callable_module(module):
                found.append(name)
            found += [f"{name}.{method}" for method in methods_of(unwrap(module))]
    return list(dict.fromkeys(found))
