"""Blocks that are proven to do the same need not each be looked at.

A block does what another did where all that its code can see is the same: class, attributes and modules (its *form*),
the arguments, the modes of the thread, and what lies outside, the globals and classes of the code that ran. So of what
a recorded block did an *account* is kept if it is a function of these alone: it read nothing but its arguments, its own
tensors and what it made, wrote to none of the former, and left all that its code sees as it was. An account is told
again of every block that is alike; any other block is looked at in full.

A step is held against the model with these accounts in the place of the blocks, and with every block run where that
does not agree.
"""

from __future__ import annotations

import gc
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from cachekit.running.shadow import HOOKS
from cachekit.structure.forms import PLAIN, Forming, form
from cachekit.structure.numbering import address, version_of
from cachekit.structure.reach import Reach, modes
from cachekit.structure.record import Call, Const, Leaf, Part, list_name


class Sight(NamedTuple):
    """All that decides what a call of a block does, but for what lies outside of it."""

    block: Any  # its form, and which modules in it are looked at
    arguments: Any  # theirs
    modes: tuple[Any, ...]
    place: str  # the list it stands in


class Result(NamedTuple):
    """A tensor that a block returned: its argument, or a view of memory that it made."""

    argument: int  # -1 where it was made
    memory: int  # which of `Account.memories`
    view: tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides, offset
    reached: frozenset[int]  # the arguments that it was computed from
    added: frozenset[Any]  # keys of the arguments that it reaches by additions alone


class Account(NamedTuple):
    """What a call of a block did."""

    path: str
    sight: Sight
    outside: Reach  # what its code sees beside it
    results: tuple[Result | Any, ...]  # of every leaf; as it is where it is no tensor
    treespec: Any
    memories: tuple[tuple[int, torch.dtype, torch.device], ...]  # elements, dtype, device
    flops: int
    parts: tuple[Part, ...]
    overwritten: frozenset[int]  # which of them it wrote to the results of
    tokens: dict[int, tuple[str, int]]  # of tensors -> which argument, result or parameter of the block each is
    storages: dict[int, tuple[str, int]]

    def make(self, tensors: Sequence[Tensor]) -> list[Any]:
        """What it returned, for these tensors among the arguments."""
        views: list[list[Any]] = [[] for _ in self.memories]
        for result in self.results:
            if isinstance(result, Result) and result.argument < 0:
                views[result.memory].append(result.view)
        made = [_memory(*kind, seen) for kind, seen in zip(self.memories, views, strict=True)]

        def leaf(result: Result | Any) -> Any:
            if not isinstance(result, Result):
                return result
            if result.argument >= 0:
                return tensors[result.argument]
            memory = made[result.memory]
            return memory if len(views[result.memory]) == 1 else torch.as_strided(memory, *result.view)

        return [*map(leaf, self.results)]


def _memory(size: int, dtype: torch.dtype, device: torch.device, views: Sequence[tuple[Any, Any, int]]) -> Tensor:
    """New memory: as the one view of it, or for several views of it to be made."""
    if len(views) > 1:
        return torch.empty(size, dtype=dtype, device=device)
    [(shape, strides, offset)] = views
    if offset == 0 and math.prod(shape) == size:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return torch.as_strided(torch.empty(size, dtype=dtype, device=device), shape, strides, offset)


class Accounts:
    """The accounts of one recorded forward.

    Args:
        parts: names of the modules, inside the blocks or blocks themselves, that are looked at one by one.

    Attributes:
        whole: whether every call of a block has one, its own or another's.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        self.whole = True
        self._parts = parts
        self._of: dict[type, list[Account]] = {}
        self._forms: dict[int, tuple[Any, Callable[[], bool]]] = {}
        self._reaches: dict[type, Reach] = {}  # of the code of each class of blocks

    def sight(self, block: nn.Module, path: str, args: tuple, kwargs: Mapping[str, Any]) -> Sight | None:
        """What a block and its arguments look like, or None where that does not say all."""
        if "forward" in vars(block) or any(vars(block)[name] for name in HOOKS):
            return None
        arguments, others = _arguments(block, args, kwargs), modes()
        if arguments is None or others is None:
            return None
        known = self._forms.get(id(block))
        if known is None or not known[1]():
            forming = Forming()
            parts = [part[len(path) :] for part in self._parts if part == path or part.startswith(f"{path}.")]
            like = forming.of(block)
            if forming.closed:
                return None
            known = self._forms[id(block)] = (like, parts), forming.unchanged()
        grads = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return Sight(known[0], arguments, (*grads, *others), list_name(path))

    def find(self, block: nn.Module, sight: Sight | None) -> Account | None:
        """The account of another call that is known to do the same as this one."""
        for account in reversed(self._of.get(type(block), ())) if sight is not None else ():
            if account.sight == sight and account.outside.same():
                return account
        return None

    def keep(self, block: nn.Module, account: Account) -> None:
        """Of what a call of this block did."""
        self._of.setdefault(type(block), []).append(account)

    @contextmanager
    def watching(self, block: nn.Module, run: nn.Module, given: Sequence[Tensor]) -> Iterator[Watched]:
        """While a block runs: what its code sees outside, and whether it keeps to itself.

        Args:
            block: the block.
            run: what runs in its place.
            given: the tensors among its arguments.
        """
        watched, kind = Watched([*given, *own_tensors(block)]), type(block)
        forming, untouched = Forming(), unwritten(given)
        like = forming.of(run)
        if kind not in self._reaches or not self._reaches[kind].same():
            self._reaches[kind] = Reach()
        watched.outside = reach = self._reaches[kind]
        reach.see(*forming.beyond())
        with _traced(reach) as seen:
            yield watched
        watched.alone &= seen and not reach.closed and reach.same() and untouched() and form(run) == like
        if reach.closed:  # what it has seen is not to be kept
            del self._reaches[kind]
            self._of[kind] = [account for account in self._of.get(kind, ()) if account.outside is not reach]


@contextmanager
def _traced(reach: Reach) -> Iterator[bool]:
    """Meanwhile the names in all code are seen before it runs; False where that cannot be."""
    if sys.gettrace() is not None:  # the place of a debugger is not to be taken
        yield False
        return

    def called(frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call" and not reach.knows(frame.f_code):
            reach.code(frame.f_code, frame.f_globals)

    collects = gc.isenabled()
    gc.disable()  # what a collection calls is nothing that the block runs
    sys.settrace(called)
    try:
        yield True
    finally:
        sys.settrace(None)
        if collects:
            gc.enable()


def _arguments(block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What the arguments look like, or None where they are not tensors and plain values alone."""
    leaves, treespec = pytree.tree_flatten((args, dict(kwargs)))
    if not all(type(leaf) in PLAIN or isinstance(leaf, Tensor) for leaf in leaves):
        return None
    own = {address(tensor) for tensor in own_tensors(block)}
    if any(isinstance(leaf, Tensor) and address(leaf) in own for leaf in leaves):
        return None
    forming = Forming()
    views = [(leaf.storage_offset(), leaf.is_conj(), leaf.is_neg()) for leaf in leaves if isinstance(leaf, Tensor)]
    return treespec, [*map(forming.of, leaves)], views


class Watched:
    """What a block that runs reads, writes and makes.

    Attributes:
        alone: whether it has kept to its arguments, its own tensors, and what it made.
        outside: what its code sees beside them, before it runs.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        self.alone = True
        self.outside = Reach()
        self._given = {address(tensor) for tensor in given}
        self._made: set[int] = set()  # memories

    def operator(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """An operator ran in it."""
        given, made = self._given, self._made
        self.alone &= all(place in given or place in made for place in map(address, inputs))
        self.alone &= not any(address(tensor) in given for tensor in written)
        made |= {*map(address, outputs)} - given

    def results(
        self, tensors: Sequence[Tensor], leaves: Sequence[Any], reached: Callable[[Tensor], Any], added: Callable
    ) -> tuple[tuple[Result | Any, ...], tuple[tuple[int, torch.dtype, torch.device], ...]] | None:
        """What it returned, and in which memories, or None where it did more than compute that.

        Args:
            tensors: among its arguments.
            leaves: of what it returned.
            reached: the arguments that a tensor was computed from.
            added: the keys of those that it reaches by additions alone.
        """
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        memories: dict[int, int] = {}
        kinds: list[tuple[int, torch.dtype, torch.device]] = []
        found: list[Any] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                if type(leaf) not in PLAIN:
                    return None
                found.append(leaf)
                continue
            if id(leaf) in places:
                found.append(Result(places[id(leaf)], -1, ((), (), 0), reached(leaf), added(leaf)))
                continue
            place = address(leaf)
            if place not in self._made or type(leaf) is not FakeTensor or leaf.is_conj() or leaf.is_neg():
                return None
            number = memories.setdefault(place, len(memories))
            kind = leaf.untyped_storage().nbytes() // leaf.element_size(), leaf.dtype, leaf.device
            kinds[number:] = kinds[number:] or [kind]
            if kinds[number] != kind:
                return None
            view = tuple(leaf.shape), tuple(leaf.stride()), int(leaf.storage_offset())
            found.append(Result(-1, number, view, reached(leaf), added(leaf)))
        return (tuple(found), tuple(kinds)) if self.alone else None


def own_tensors(block: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a block, in an order that blocks of one form share."""
    return [*block.parameters(), *block.buffers()]


def plain_part(part: Part) -> bool:
    """Whether a part takes and returns tensors and plain values alone."""
    return all(isinstance(node, (Leaf, Const)) for node in (*part.call.args.values(), *part.call.outs))


def renamed(call: Call, token: Callable[[int], int], storage: Callable[[int], int]) -> Call:
    """The same call on other tensors."""

    def rename(node: Any) -> Any:
        if isinstance(node, Leaf):
            return node._replace(token=token(node.token), storage=storage(node.storage))
        return node

    args = {key: rename(node) for key, node in call.args.items()}
    return call._replace(args=args, outs=tuple(map(rename, call.outs)))


def unaltered(value: Any) -> Callable[[], bool]:
    """A function that tells whether an object, and the tensors in it, are as they were."""
    forming = Forming()
    before = forming.of(value)
    same = unwritten(forming.tensors)
    return lambda: same() and form(value) == before


def unwritten(tensors: Iterable[Tensor]) -> Callable[[], bool]:
    """A function that tells whether these have not been written to since."""
    versions = [(tensor, version_of(tensor)) for tensor in tensors]
    return lambda: all(version_of(tensor) == version for tensor, version in versions)
