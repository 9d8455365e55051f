"""What a module is like, as a value: two modules of one form do the same with the same arguments.

A form holds plain values and descriptions of tensors, and whatever else has no value of its own (a function, a lock)
by identity, weakly: it keeps nothing alive.
"""

from __future__ import annotations

import collections
import enum
import functools
import operator
import types
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = (bool, int, float, complex, str, bytes, type(None))
PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
"""Types of values that nobody can change, and that are compared by value."""

NOTED = {"_is_torch_compile"}
"""What torch notes on a module that somebody compiles: the module does the same as before."""

FIXED = (enum.Enum, range, slice, types.CodeType, types.GenericAlias, types.ModuleType)
FIXED += (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)
FIXED += (types.MethodDescriptorType, types.ClassMethodDescriptorType, type(int | str), type(NotImplemented), type(...))
FIXED += (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch.library.Library, type(functools.lru_cache(len)))
"""Types of objects that nobody can change in a way that shows, beside those above."""

FIXED_IN = {"typing", "logging", "re", "inspect", "_abc", "functools", "dataclasses", "packaging"}
FIXED_IN |= {"pybind11_builtins"}  # what functions of C++ are bound to
"""Packages of which all objects are of that kind."""

BOUND = (types.BuiltinMethodType, types.MethodWrapperType)
"""Types of functions of C, each with the object or the module of Python that it is one of."""

HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code has made


class Same:
    """One object, held weakly: equal while it lives, to itself alone. What cannot be held so is equal to nothing."""

    __slots__ = ("_hash", "_of")

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        try:
            self._of: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._of = type(None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and (mine := self._of()) is not None and mine is other._of()

    def __hash__(self) -> int:
        return self._hash


class Forming:
    """Forms of the values of one walk.

    Attributes:
        dicts, lists: the containers that were walked through. While they hold the very same values, so is the form.
        classes: that were met, and those of the modules and objects that were walked through.
        functions: that were met, also bound ones.
        modules: of Python, that were met.
        tensors: that were met.
        closed: whether an object was met whose contents cannot be seen, an array of NumPy or one with `__slots__`: its
            form stays the same whatever happens to it.
    """

    def __init__(self) -> None:
        self.closed = False
        self.tensors: list[Tensor] = []
        self.dicts: list[dict[Any, Any]] = []
        self.lists: list[Any] = []
        self.classes: dict[type, None] = {}
        self.functions: list[types.FunctionType] = []
        self.modules: list[types.ModuleType] = []
        self._holders: list[Any] = []
        self._seen: dict[int, int] = {}
        self._storages: dict[int, int] = {}
        self._kept: list[Any] = []  # what was made on the way, so that an id stays one object's

    def of(self, value: Any) -> Any:
        """The form of a value."""
        kind = type(value)
        if kind in PLAIN:
            return (kind, value) if value or kind is not float else (kind, str(value))  # 0.0 == -0.0
        if isinstance(value, types.FunctionType):
            self.functions.append(value)
            return Same(value)
        if isinstance(value, type):
            self.classes.setdefault(value)
            return Same(value)
        if isinstance(value, types.ModuleType):
            self.modules.append(value)
            return Same(value)
        number = self._seen.get(id(value))
        if number is not None:
            return "again", number
        self._seen[id(value)] = len(self._seen)
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, nn.Module):
            return kind.__name__, Same(kind), self._attributes(value)
        if isinstance(value, dict):
            self.dicts.append(value)
            held = ((self.of(key), self.of(item)) for key, item in value.items())
            return "dict", Same(kind), self._more(value), *held
        if isinstance(value, (list, tuple, collections.deque)):
            self.lists.append(value)
            return "list", Same(kind), self._more(value), *map(self.of, value)
        if isinstance(value, (set, frozenset)):
            self.lists.append(value)
            plain = all(type(item) in PLAIN for item in value)
            return ("set", Same(kind), self._more(value), frozenset(value)) if plain else Same(value)
        if isinstance(value, functools.partial):
            inside = map(self.of, (value.func, value.args, value.keywords))
            return "partial", Same(kind), self._more(value), *inside
        if isinstance(value, types.MethodType):
            return "method", self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, weakref.ref):
            return "weak", self.of(value())
        if isinstance(value, BOUND):
            return "method", value.__name__, self.of(value.__self__)
        if attributes_only(kind):
            return "object", Same(kind), self._attributes(value)
        one = Same(value)
        if fixed(value):
            return one if one == one else (kind.__name__, repr(value))
        self.closed = True
        return one

    def beyond(self) -> tuple[Any, ...]:
        """What was met that leads out of the value: its form says which ones, and not what they can get at."""
        return *self.classes, *self.functions, *self.modules

    def tensor(self, value: Tensor) -> Any:
        """What a tensor is like: everything but its numbers. Of those that share memory it tells which."""
        kind = type(value)
        self.tensors.append(value)
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is not None and kind not in (Tensor, nn.Parameter, nn.Buffer):
            names, context = flatten()
            inner = (self.of(context), *(self.of(self._keep(getattr(value, name))) for name in names))
            return "tensor", Same(kind), view(value), self.of(vars(value)), *inner
        storage = _address(value)
        shared = None if storage is None else self._storages.setdefault(storage, len(self._storages))
        more = self.of(vars(value)) if vars(value) and kind is not FakeTensor else ()
        return "tensor", Same(kind), view(value), shared, more

    def _attributes(self, holder: Any) -> Any:
        attributes = vars(holder)
        self.classes.setdefault(type(holder))
        self._holders.append(holder)
        self.dicts.append(attributes)
        found = []
        for name, value in attributes.items():
            kind = type(value)
            if name in NOTED:
                continue
            if kind in PLAIN:
                found.append((name, kind, value))
            elif isinstance(value, dict) and not value:  # most of what a module has: no hooks
                self.dicts.append(value)
            else:
                found.append((name, self.of(value)))
        return tuple(found)

    def _more(self, value: Any) -> Any:
        """The attributes of a container."""
        return self._attributes(value) if getattr(value, "__dict__", None) else ()

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value

    def unchanged(self) -> Callable[[], bool]:
        """A function that tells whether everything walked through holds the very same values still. It keeps them."""
        dicts, lists = [*self.dicts], [each for each in self.lists if isinstance(each, (list, set, collections.deque))]
        tensors, holders = [*self.tensors], [*self._holders]
        classes = [*map(type, holders)]
        views = [view(each) for each in tensors]

        def now() -> Iterator[Any]:
            return chain.from_iterable((*dicts, *map(dict.values, dicts), *lists))

        before = [*now()]

        def same() -> bool:
            values = [*now()]
            if len(values) != len(before) or not all(map(operator.is_, values, before)):
                return False
            if not all(map(operator.is_, map(type, holders), classes)):
                return False
            return [view(each) for each in tensors] == views  # `.data` is another one in the same tensor

        return same


def form(value: Any) -> Any:
    """What a value is like: see the module."""
    return Forming().of(value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that a value holds, each once, those in objects too."""
    forming = Forming()
    forming.of(value)
    return forming.tensors


def view(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor is like, but for its memory and its numbers."""
    strides = tuple(tensor.stride()) if tensor.layout is torch.strided else ()
    return tuple(tensor.shape), strides, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad


def _address(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a layout or a subclass without memory of its own
        return None


def fixed(value: Any) -> bool:
    """Whether nobody can change an object in a way that shows."""
    kind = type(value)
    if isinstance(value, FIXED) or kind is object or kind.__module__.partition(".")[0] in FIXED_IN:
        return True
    return callable(value) and not kind.__flags__ & HEAP  # a function of C


def attributes_only(kind: type) -> bool:
    """Whether all that an object of this class holds is among its attributes."""
    if issubclass(kind, types.SimpleNamespace):
        return True
    return bool(kind.__dictoffset__) and all(
        each.__flags__ & HEAP and not vars(each).get("__slots__") and not _of_c(each) for each in kind.__mro__[:-1]
    )


def _of_c(kind: type) -> bool:
    """Whether C code has made a class: one of Python directly under `object` has attributes, or says which."""
    return kind.__bases__ == (object,) and not vars(kind).keys() & {"__dict__", "__slots__"}
