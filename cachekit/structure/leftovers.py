"""Nothing of a recorded forward stays outside of the model.

A forward may keep what it computes: in a `functools.lru_cache`, a class, a global, an object that code names. What a
forward on fake tensors keeps there is a tensor without numbers, and would be handed to the model afterwards. So what
its code can write to is noted before, and given back after; what is alive even then is looked for, and taken out of
whatever holds it.
"""

from __future__ import annotations

import functools
import gc
import operator
import types
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from cachekit.errors import StructureError
from cachekit.structure.alike import SETTLED
from cachekit.structure.forms import PLAIN

MISSING: Any = object()
DEPTH = 3
"""How many containers may lie around a tensor that code keeps."""

CACHE = type(functools.lru_cache(lambda: None))


class Surroundings:
    """What the code of a model can reach outside of it, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # what was seen, so that an id stays one object's
        self._undo: list[Callable[[], None]] = []
        self._classes: list[type] = []
        self._asked = {"forward", "__call__"}  # the names that code asks of objects, or may
        for module in model.modules():
            self._see(type(module), 0)
            for value in vars(module).values():
                if not isinstance(value, PLAIN):
                    self._see(type(value), 0)
        self._follow()

    def _follow(self) -> None:
        """See what code asks of classes, until it asks for nothing new."""
        followed = (0, 0)
        while followed != (len(self._asked), len(self._classes)):
            followed = len(self._asked), len(self._classes)
            for kind in [*self._classes]:
                for name in self._asked & vars(kind).keys():
                    self._see(vars(kind)[name], 0)

    def restore(self) -> None:
        """Give back what holds fake tensors now."""
        for undo in self._undo:
            undo()

    def _see(self, value: Any, depth: int) -> None:
        if isinstance(value, PLAIN) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._kept.append(value)
        if isinstance(value, type):
            if not _settled(value.__module__):
                self._class(value)
        elif isinstance(value, CACHE):
            self._cache(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            self._see(value.__func__, depth)
        elif isinstance(value, property):
            for each in (value.fget, value.fset):
                self._see(each, depth)
        elif isinstance(value, dict):
            self._mapping(value, depth)
        elif isinstance(value, list):
            self._list(value, depth)
        elif isinstance(value, (types.ModuleType, Tensor, nn.Module)) or _settled(type(value).__module__):
            return  # a module of Python is seen by the names that are asked of it
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._see(type(value), depth)
            self._mapping(vars(value), depth)

    def _class(self, kind: type) -> None:
        for base in kind.__mro__[1:]:
            self._see(base, 0)
        before = dict(vars(kind))
        self._classes.append(kind)

        def undo() -> None:
            for name, now in [*vars(kind).items()]:
                was = before.get(name, MISSING)
                if now is not was and _holds_fakes(now):
                    type.__delattr__(kind, name) if was is MISSING else type.__setattr__(kind, name, was)

        self._undo.append(undo)
        for value in before.values():
            if isinstance(value, (dict, list)):
                self._see(value, 1)

    def _function(self, function: types.FunctionType) -> None:
        names = function.__globals__
        if _settled(str(names.get("__name__"))):
            return
        asked = _names(function.__code__)
        self._asked |= asked
        self._names(names, asked)
        for value in [names[name] for name in asked if name in names]:
            self._see(value, 0)
            if isinstance(value, types.ModuleType) and not _settled(value.__name__):
                inside = {name for name in asked if name in vars(value)}
                self._names(vars(value), inside)
                for name in inside:
                    self._see(vars(value)[name], 0)
        self._mapping(function.__dict__, 0)
        for cell in function.__closure__ or ():
            self._cell(cell)

    def _names(self, names: dict[str, Any], asked: Iterable[str]) -> None:
        before = {name: names.get(name, MISSING) for name in asked}
        self._undo.append(lambda: _put_back(names, before, before))

    def _mapping(self, mapping: dict[Any, Any], depth: int) -> None:
        before = dict(mapping)
        self._undo.append(lambda: _put_back(mapping, before, [*mapping]))
        if depth < DEPTH:
            for value in before.values():
                self._see(value, depth + 1)

    def _list(self, values: list[Any], depth: int) -> None:
        before = [*values]

        def undo() -> None:
            same = len(values) == len(before) and all(map(operator.is_, values, before))
            if not same and _holds_fakes(values):
                values[:] = before

        self._undo.append(undo)
        if depth < DEPTH:
            for value in before:
                self._see(value, depth + 1)

    def _cell(self, cell: types.CellType) -> None:
        try:
            before = cell.cell_contents
        except ValueError:  # empty
            return

        def undo() -> None:
            if cell.cell_contents is not before and _holds_fakes(cell.cell_contents):
                cell.cell_contents = before

        self._undo.append(undo)
        self._see(before, 0)

    def _cache(self, cache: Any) -> None:
        size = cache.cache_info().misses

        def undo() -> None:
            if cache.cache_info().misses != size:  # what it holds it does not tell
                cache.cache_clear()

        self._undo.append(undo)
        self._see(cache.__wrapped__, 0)


def check_gone(made: Sequence[Callable[[], Tensor | None]]) -> None:
    """Take fake tensors that are still alive out of what holds them.

    Args:
        made: all that a forward has made.

    Raises:
        StructureError: something holds one that it cannot be taken out of.
    """
    if _gone(made):
        return
    torch.clear_autocast_cache()  # of weights that autocast has cast
    for generation in range(3):  # what a cycle holds is nobody's, and most of it is young
        gc.collect(generation)
        if _gone(made):
            return
    for each in made:
        _take_out(each, DEPTH)
    if not _gone(made):
        gc.collect()
    for each in made:
        tensor = each()
        if tensor is not None:
            holders = ", ".join(sorted({type(holder).__name__ for holder in _holders([tensor])})) or "nothing in Python"
            raise StructureError(
                f"The forward keeps a tensor {list(tensor.shape)} outside of the model (held by: {holders}), where the "
                "trial of init would leave one without numbers. Call the model once before init, so that it is there "
                "already, or let the forward keep it in a buffer, a class, a dict or a functools.lru_cache."
            )


def _gone(made: Iterable[Callable[[], Tensor | None]]) -> bool:
    return all(each() is None for each in made)


def _take_out(wanted: Callable[[], Any], depth: int) -> None:
    value = wanted()
    if value is None:
        return
    for holder in _holders([value]):
        if isinstance(holder, CACHE):
            holder.cache_clear()
        elif isinstance(holder, dict):
            _drop(holder, value)
        elif isinstance(holder, list):
            holder[:] = [each for each in holder if each is not value]
        elif isinstance(holder, tuple) and depth:
            _take_out(lambda holder=holder: holder, depth - 1)
        elif isinstance(getattr(holder, "__dict__", None), dict):
            _drop(vars(holder), value)


def _drop(mapping: MutableMapping[Any, Any], value: Any) -> None:
    for key in [key for key, each in mapping.items() if each is value]:
        del mapping[key]


def _holders(held: list[Any]) -> list[Any]:
    """What holds a value, but for what runs now."""
    return [
        holder
        for holder in gc.get_referrers(*held)
        if holder is not held and not isinstance(holder, (types.FrameType, types.CellType))
    ]


def _put_back(mapping: dict[Any, Any], before: dict[Any, Any], keys: Iterable[Any]) -> None:
    for key in keys:
        was, now = before.get(key, MISSING), mapping.get(key, MISSING)
        if now is was or not _holds_fakes(now):
            continue
        if was is MISSING:
            del mapping[key]
        else:
            mapping[key] = was


def _holds_fakes(value: Any, depth: int = DEPTH) -> bool:
    if isinstance(value, FakeTensor):
        return True
    if not depth or isinstance(value, (str, bytes, type, types.ModuleType, types.FunctionType, Tensor)):
        return False
    if isinstance(value, dict):
        inside: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = value
    else:
        attributes = getattr(value, "__dict__", None)
        inside = attributes.values() if isinstance(attributes, dict) else ()
    return any(_holds_fakes(each, depth - 1) for each in [*inside])


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """The names in a function and in those inside it."""
    inside = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(code.co_names).union(*inside)


def _settled(module: str) -> bool:
    """Whether a package keeps nothing of what a model computes."""
    return module.partition(".")[0] in SETTLED
