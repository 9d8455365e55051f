"""Writing down what a forward does: calls, origins, additions and writes, tensor by tensor."""

from __future__ import annotations

import enum
import operator
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from cachekit.structure.alike import Account, Accounts, Result, Watched, own_tensors, plain_part, renamed, unaltered
from cachekit.structure.forms import PLAIN
from cachekit.structure.numbering import DEVICE, Numbering, Onlooker, address, device_of, leaves_of, version_of, written
from cachekit.structure.parts import ADDITIONS, VIEWS, Watch, kind_of, name_of, native, uncounted
from cachekit.structure.record import (
    DENOISED,
    Call,
    Const,
    Early,
    Key,
    Leaf,
    Name,
    Opaque,
    Part,
    TensorSpec,
)


class Recorder(Onlooker):
    """Follows identity, origin and additions of every tensor through a forward."""

    def __init__(self, inputs: Sequence[Sequence[Tensor]], accounts: Accounts | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.early: list[Early] = []
        self._returned: list[list[tuple[Tensor, int]]] = []  # of every early call, its results and their versions
        self.parts: list[Part] = []
        self._makers: dict[int, set[int]] = {}  # memory -> parts whose results lie in it
        self.overwritten: set[int] = set()  # parts whose results something has written to
        self._watch = Watch()
        self._frames = _frames(inputs)
        self._dirty: dict[int, dict[int, int]] = {}  # memory -> tensors that blocks wrote to -> token after that
        self.read: set[int] = set()
        self.kept: str | None = None
        self.depth = 0
        self.flops = 0
        self._kind = ""  # of the block that runs
        self.strange: dict[
            str, dict[str, None]
        ] = {}  # kind of a block -> operators of others that it runs, but products
        self.accounts = accounts  # None of a forward that is run for real: every block is run then
        self._watched: Watched | None = None  # the block that runs
        self._tokens = WeakIdKeyDictionary()
        self._labels = WeakIdKeyDictionary()
        self._lineage = WeakIdKeyDictionary()
        self._results: set[int] = set()
        self._memories: dict[int, tuple[StorageWeakRef, int]] = {}
        self._written: dict[int, frozenset[int]] = {}  # storage -> labels of what was written into it
        self._count = 0
        self._called: dict[str, int] = {}  # block -> which of its calls was the last
        self._seen: dict[str, int] = {}  # part -> how often it was called
        self._objects: dict[int, Any] = {}  # kept, so that an id stays one object's
        self.closed: weakref.WeakSet[type] = weakref.WeakSet()  # classes of objects into which nothing looks
        for n, tensors in enumerate(inputs):
            for tensor in tensors:
                self._labels[tensor] = _set(self._labels, tensor) | {DENOISED - n}

    def token(self, tensor: Tensor) -> int:
        """The same int for the same object."""
        found = self._tokens.get(tensor)
        if found is None:
            self._count += 1
            found = self._tokens[tensor] = self._count
        return found

    def labels(self, tensor: Tensor) -> frozenset[int]:
        """What a tensor was computed from: calls of blocks, and arguments of the model."""
        return frozenset(label for label in self._marks(tensor) if isinstance(label, int))

    def _marks(self, tensor: Tensor) -> frozenset[Any]:
        """The same, and which arguments of the block that runs."""
        return _set(self._labels, tensor) | self._written.get(address(tensor), frozenset())

    def _memory(self, tensor: Tensor) -> int:
        """The same int for the same memory, also after an address has been used again."""
        place = address(tensor)
        reference, number = self._memories.get(place, (None, 0))
        if reference is None or reference.expired():
            self._count += 1
            number = self._count
            self._memories[place] = (StorageWeakRef(tensor.untyped_storage()), number)
        return number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is DEVICE:
            return device_of(args[0])
        if self._silent:
            return self._ran(func, args, kwargs)[0]
        inputs = [leaf for leaf in leaves_of(*args, *kwargs.values()) if isinstance(leaf, Tensor)]
        out, outputs = self._ran(func, args, kwargs)
        if not self.depth:
            for tensor in inputs:
                token = self._tokens.get(tensor)
                if token in self._results:
                    self.read.add(token)
                if self._dirty:  # seen through another view of the same memory
                    self.read.update(self._dirty.get(self._memory(tensor), {}).values())
        labels = frozenset().union(*(self._marks(tensor) for tensor in inputs))
        lineage = self._carried(func, inputs)
        mutable = isinstance(func, OpOverload) and func._schema.is_mutable
        shared = {address(tensor) for tensor in inputs}
        for tensor in outputs:
            self._labels[tensor] = labels
            storage = address(tensor)
            if storage not in shared:
                self._written.pop(storage, None)  # a new tensor at an old address
            elif mutable:
                # A write through a view is seen by whoever reads the rest.
                self._written[storage] = self._written.get(storage, frozenset()) | labels
                self.overwritten |= self._makers.get(self._memory(tensor), set()) if self._makers else set()
            if lineage:
                self._lineage[tensor] = lineage
            elif tensor in self._lineage:
                del self._lineage[tensor]
        count = flop_registry.get(getattr(func, "_overloadpacket", func))
        if self.depth:
            known = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
            operations = known or uncounted(func, inputs, outputs, self.labels)
            self.flops += operations
            if not operations and not native(func) and labels:
                self.strange.setdefault(self._kind, {})[func.name()] = None
        if self._watched is not None:
            self._watched.operator(inputs, outputs, written(func, args, kwargs))
        if self._watch.running:
            self._watch.operator(func, args, outputs, self.labels, count is not None)
        return out

    def _carried(self, func, inputs) -> frozenset:
        name = name_of(func)
        if name in ADDITIONS:
            sources = inputs[:1] if name.startswith("addcmul") else inputs
        elif name in VIEWS:
            sources = inputs
        else:
            return frozenset()
        return frozenset().union(*(_set(self._lineage, tensor) for tensor in sources))

    def call(self, site, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a block and write down what went in and out."""
        block = site._run
        if self.depth:
            return block(*args, **kwargs)
        given: dict[Name, Any] = {**dict(enumerate(args)), **kwargs}
        flat = by_key(given)
        nodes = {key: self.node(value) for key, value in flat.items()}
        index, before = len(self.calls), self.flops
        tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
        for key, value in tensors.items():
            self._lineage[value] = frozenset({(index, key)})
        versions = {key: version_of(value) for key, value in tensors.items()}
        changed = self._changes(given, nodes)
        held, parts = dict(vars(block)), len(self.parts)
        self._kind = f"{type(site._block).__module__}.{type(site._block).__qualname__}"
        sight = self.accounts.sight(site._block, site._path, args, kwargs) if self.accounts is not None else None
        account = self.accounts.find(site._block, sight) if self.accounts is not None else None
        if account is not None:
            out = self._told(account, site._block, site._path, args, kwargs)
        else:
            out = self._looked_at(site, sight, changed, args, kwargs)
        attributes = {name: value for name, value in vars(block).items() if held.get(name) is not value}
        site.__dict__.update(attributes)
        left = {name: self.token(value) for name, value in attributes.items() if isinstance(value, Tensor)}
        self._results.update(left.values())
        mutated = {}
        for key, value in tensors.items():
            if version_of(value) != versions[key]:
                self._count += 1
                mutated[key] = self._tokens[value] = self._count
                self._results.add(self._count)
                self._dirty.setdefault(self._memory(value), {})[id(value)] = self._count
        for key in changed():  # what an object or a list is given nobody forecasts
            self._count += 1
            mutated[key] = self._count
            self.read.add(self._count)
            if self.kept is None and not isinstance(given[key], (Tensor, list, dict, deque)):
                self.kept = f"{site._path} writes to its argument {key!r} ({type(given[key]).__name__})"
        leaves, treespec = pytree.tree_flatten(out)
        lineage = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self._labels[leaf] = self.labels(leaf) | {index}
                self._results.add(self.token(leaf))
                lineage[i] = frozenset(key for n, key in _set(self._lineage, leaf) if n == index)
        path = site._path
        nth = self._called[path] = self._called.get(path, -1) + 1
        if any(lineage.values()):  # a block that adds to what it was given is no part of one
            for n, part in enumerate(self.parts[parts:], parts):
                if part.call.path == path:
                    self.parts[n] = part._replace(kind="")
        self.calls.append(
            Call(
                path=path,
                nth=nth,
                kind=self._kind,
                args=nodes,
                treespec=treespec,
                outs=tuple(self.node(leaf) for leaf in leaves),
                lineage=lineage,
                mutated=mutated,
                attributes=left,
                flops=self.flops - before,
                weights=sum(tensor.numel() for tensor in own_tensors(site._block)),
            )
        )
        return out

    def _looked_at(self, site, sight: Any, changed: Callable[[], Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a block, and keep an account of what it did where that holds for others too."""
        block, index = site._run, len(self.calls)
        self.depth += 1
        try:
            if self.accounts is None:
                return block(*args, **kwargs)
            if sight is None:
                self.accounts.whole = False
                return block(*args, **kwargs)
            tensors = _tensors(args, kwargs)
            for place, tensor in enumerate(tensors):
                self._labels[tensor] = _set(self._labels, tensor) | {(index, place)}
            before, first = self.flops, len(self.parts)
            numbering = Numbering([*tensors, *own_tensors(site._block)])
            with self.accounts.watching(site._block, block, tensors) as self._watched, numbering:
                watched = self._watched
                try:
                    out = block(*args, **kwargs)
                finally:
                    self._watched = None
        finally:
            self.depth -= 1

        def reached(tensor: Tensor) -> frozenset[int]:
            marks = (mark for mark in self._marks(tensor) if not isinstance(mark, int))
            return frozenset(place for n, place in marks if n == index)

        def added(tensor: Tensor) -> frozenset[Key]:
            return frozenset(key for n, key in _set(self._lineage, tensor) if n == index)

        leaves, treespec = pytree.tree_flatten(out)
        made = watched.results(tensors, leaves, reached, added)
        parts = tuple(self.parts[first:])
        if (
            made is not None
            and not changed()  # a list that it appends to is another one in its next run
            and all(map(plain_part, parts))
            and self._as_the_block(site, args, kwargs, leaves, numbering)
        ):
            ends = [("argument", *pair) for pair in enumerate(tensors)]
            ends += [("result", *pair) for pair in enumerate(leaves) if isinstance(pair[1], Tensor)]
            ends += [("own", *pair) for pair in enumerate(own_tensors(site._block)) if pair[1] in self._tokens]
            account = Account(
                path=site._path,
                sight=sight,
                outside=watched.outside,
                results=made[0],
                treespec=treespec,
                memories=made[1],
                flops=self.flops - before,
                parts=parts,
                overwritten=frozenset(n - first for n in self.overwritten if n >= first),
                tokens={self.token(tensor): (what, place) for what, place, tensor in reversed(ends)},
                storages={self._memory(tensor): (what, place) for what, place, tensor in reversed(ends)},
            )
            self.accounts.keep(site._block, account)
        else:
            self.accounts.whole = False
        return out

    def _as_the_block(self, site, args: tuple, kwargs: dict[str, Any], leaves: list[Any], numbering: Numbering) -> bool:
        """Whether a block runs the operators that have run in its place, where sites stand inside."""
        if site._run is site._block:
            return True
        found = [*map(numbering.number, leaves)]
        numbering.restart()
        with self.unseen(), numbering:
            again = pytree.tree_leaves(site._block(*args, **kwargs))
        return found == [*map(numbering.number, again)]

    def _told(self, account: Account, block: nn.Module, path: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a block returns that does what another one did; it is written down as if it had been looked at."""
        index, tensors = len(self.calls), _tensors(args, kwargs)
        with self.unseen():
            leaves = account.make(tensors)
        for result, leaf in zip(account.results, leaves, strict=True):
            if isinstance(result, Result) and result.argument < 0:
                self._written.pop(address(leaf), None)
                self._labels[leaf] = frozenset().union(*(self.labels(tensors[place]) for place in result.reached))
                if result.added:
                    self._lineage[leaf] = frozenset((index, key) for key in result.added)
        ends = {"argument": tensors, "result": leaves, "own": own_tensors(block)}
        tokens = {old: self.token(ends[what][place]) for old, (what, place) in account.tokens.items()}
        storages = {old: self._memory(ends[what][place]) for old, (what, place) in account.storages.items()}
        for n, part in enumerate(account.parts):
            name = path + part.call.path[len(account.path) :]
            call = renamed(part.call, lambda old: self._renewed(tokens, old), lambda old: self._renewed(storages, old))
            self._keep_part(
                Part(call._replace(path=name, nth=self._seen.get(name, 0)), part.kind, index, written=False)
            )
            if n in account.overwritten:
                self.overwritten.add(len(self.parts) - 1)
        self.flops += account.flops
        return pytree.tree_unflatten(leaves, account.treespec)

    def _renewed(self, known: dict[int, int], old: int) -> int:
        """The number that stands for another block's."""
        if old not in known:
            self._count += 1
            known[old] = self._count
        return known[old]

    def _keep_part(self, part: Part) -> None:
        self._seen[part.call.path] = part.call.nth + 1
        for leaf in part.call.outs:
            if isinstance(leaf, Leaf):
                self._makers.setdefault(leaf.storage, set()).add(len(self.parts))
        self.parts.append(part)

    def part(self, site, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a module inside a block and write down what it does."""
        module, path = site._run, site._path
        given: dict[Name, Any] = {**dict(enumerate(args)), **kwargs}
        flat = by_key(given)
        nodes = {key: self.node(value, labelled=False) for key, value in flat.items()}
        versions = {key: version_of(value) for key, value in flat.items() if isinstance(value, Tensor)}
        changed = self._changes(given, nodes)
        held, block = dict(vars(module)), len(self.calls) if self.depth else -1
        activity = self._watch.enter(given)
        try:
            out = module(*args, **kwargs)
        finally:
            self._watch.leave()
        attributes = {name: value for name, value in vars(module).items() if held.get(name) is not value}
        site.__dict__.update(attributes)
        rewritten = [key for key, version in versions.items() if version_of(flat[key]) != version]
        leaves, treespec = pytree.tree_flatten(out)
        call = Call(
            path=path,
            nth=self._seen.get(path, 0),
            kind=f"{type(module).__module__}.{type(module).__qualname__}",
            args=nodes,
            treespec=treespec,
            outs=tuple(self.node(leaf, labelled=False) for leaf in leaves),
            lineage={},
            mutated=dict.fromkeys([*changed(), *rewritten], 0),
            attributes=dict.fromkeys(attributes, 0),
            flops=0,
            weights=0,
        )
        self._keep_part(Part(call, kind_of(activity, path, given, out, self._frames), block, written=False))
        return out

    def beside(self, site, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a module that is no block and write down what came out."""
        if self.depth:
            return site._run(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [version_of(tensor) for tensor in given]
        out = site._run(*args, **kwargs)
        results = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        old = {address(tensor) for tensor in (*given, *site._block.parameters(), *site._block.buffers())}
        fresh = not any(address(tensor) in old for tensor in results)
        pure = fresh and _plain(out) and versions == [version_of(tensor) for tensor in given]
        tokens = frozenset(self.token(tensor) for tensor in results)
        self._results |= tokens
        self.early.append(Early(site._path, len(self.calls), tokens, pure))
        self._returned.append([(tensor, version_of(tensor)) for tensor in results])
        return out

    def untouched(self) -> list[bool]:
        """For every early call, whether it is pure and its results have not been written to since."""
        same = [all(version_of(tensor) == version for tensor, version in results) for results in self._returned]
        return [call.pure and kept for call, kept in zip(self.early, same, strict=True)]

    def _changes(self, given: Mapping[Name, Any], nodes: Mapping[Key, Any]) -> Callable[[], list[Name]]:
        """A function that names the objects and containers among the arguments that have changed since."""
        opaque = {key[0] if isinstance(key, tuple) else key for key, node in nodes.items() if isinstance(node, Opaque)}
        kept = {
            name: unaltered(value) if name in opaque else _holding(value)
            for name, value in given.items()
            if name in opaque or not isinstance(value, (Tensor, *PLAIN))
        }
        return lambda: [name for name, same in kept.items() if not same()]

    def node(self, value: Any, *, labelled: bool = True) -> Any:
        """A value among the arguments or results as data."""
        if isinstance(value, Tensor):
            spec = TensorSpec(tuple(value.shape), value.dtype, value.device)
            labels = self.labels(value) if labelled else frozenset()
            return Leaf(self.token(value), self._memory(value), spec, labels)
        if isinstance(value, (*PLAIN, enum.Enum, type)):
            return Const(value)
        self._objects.setdefault(id(value), value)
        self.closed.add(type(value))
        return Opaque(type(value).__name__, id(value))


def _holding(value: Any) -> Callable[[], bool]:
    """A function that tells whether a container still holds what it held."""
    leaves, treespec = pytree.tree_flatten(value)

    def same() -> bool:
        now, form_now = pytree.tree_flatten(value)
        return form_now == treespec and all(map(operator.is_, now, leaves))

    return same


def by_key(given: Mapping[Name, Any]) -> dict[Key, Any]:
    """The values among arguments, those in containers one by one."""
    found: dict[Key, Any] = {}
    for name, value in given.items():
        leaves, treespec = pytree.tree_flatten(value)
        found.update({name: value} if treespec.is_leaf() else {(name, n): leaf for n, leaf in enumerate(leaves)})
    return found


def _frames(inputs: Sequence[Sequence[Tensor]]) -> tuple[int, ...]:
    """Batch and what may be the number of frames, where the first argument is a video, [B, C, F, H, W] say."""
    first = inputs[0][0] if inputs and inputs[0] else None
    return tuple(first.shape[:3]) if first is not None and first.ndim == 5 else ()


def _tensors(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _plain(value: Any) -> bool:
    """Whether it is made of tensors, None, tuples and lists alone."""
    if type(value) in (tuple, list):
        return all(map(_plain, value))
    return value is None or isinstance(value, Tensor)


def _set(sets: WeakIdKeyDictionary, tensor: Tensor) -> frozenset:
    return sets.get(tensor) or frozenset()
