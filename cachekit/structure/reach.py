"""What code can get at beside its arguments: globals, classes, closures, and what these hold.

Every container on the way is noted with what it holds, so that it can be told later whether all is as it was, and what
has been put there meanwhile can be taken out again.
"""

from __future__ import annotations

import collections
import dis
import functools
import gc
import importlib.util
import operator
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._device import DeviceContext

from cachekit.structure.forms import BOUND, PLAIN, Forming, Same, attributes_only, fixed, view

SETTLED = {"torch", "cachekit", "cachekit_kernels", *sys.stdlib_module_names} - {"__main__"}
"""Packages that keep nothing of what a model computes, and whose globals do not decide what it does, beside the modes
of the thread."""

CALLED = ("forward", "__call__")
"""What is asked of a model and of what is inside it."""

LIMIT = 50_000
"""How many values are looked at before it is said that they cannot all be."""

UNSEEN = {"globals", "locals", "vars", "eval", "exec", "__import__"}
"""Built-in functions by which code gets at names that it does not contain."""

CACHE = type(functools.lru_cache(len))
MODULE = vars(nn.Module()).keys()
"""What every module holds. Most of it is empty."""

IMPLIED = (
    "bool len getitem iter next contains enter exit get getattr getattribute eq ne lt le gt ge hash index int float"
)
IMPLIED += " add radd iadd sub rsub mul rmul matmul truediv rtruediv floordiv mod pow neg and or xor invert"
IMPLIED = frozenset(f"__{name}__" for name in IMPLIED.split())
"""Methods that an operator or a statement asks for without naming them."""

NOTED = {"__dict__", "__weakref__", "__slotnames__", "__annotations__", "__annotations_cache__", "_abc_impl"}
"""What Python notes on a class: some of it when somebody asks."""

LINK = "_lru_list_elem"
"""What `functools.lru_cache` strings its values on."""

MISSING: Any = object()


class Held(NamedTuple):
    """A container, and what it held when it was seen."""

    before: Mapping[Any, Any]
    now: Callable[[], Mapping[Any, Any]]
    put: Callable[[Any, Any], Any]  # give a key its value back
    drop: Callable[[Any], Any]  # remove a key that was not there

    def same(self) -> bool:
        """Whether it holds the very same, in the same order."""
        now, before = self.now(), self.before
        return (
            len(now) == len(before)
            and all(map(operator.is_, now.values(), before.values()))
            and all(
                one is other or (type(one) in PLAIN and one == other) for one, other in zip(now, before, strict=True)
            )
        )

    def take_out(self, unwanted: Callable[[Any], bool]) -> None:
        """Give back the values of before in the place of those that are not wanted there."""
        for key, value in [*self.now().items()]:
            was = self.before.get(key, MISSING)
            if value is was or not unwanted(value):
                continue
            if was is MISSING:
                self.drop(key)
            else:
                self.put(key, was)


class Reach:
    """What has been seen so far, each value once.

    Args:
        asked: the names that code may ask of classes; all of them by default.

    Attributes:
        closed: what was met whose contents cannot be seen.
    """

    def __init__(self, asked: Iterable[str] | None = None) -> None:
        self._asked = None if asked is None else {*asked}
        self._classes: list[type] = []
        self.closed: list[Any] = []
        self._functions: dict[int, types.FunctionType] = {}  # by the id of their code: equal code may run elsewhere
        self._modules: dict[int, types.ModuleType] = {}  # that a value is, and no name of code
        self._names_of: set[str] = set()  # by which code asks, and `getattr` may
        self._held: list[Held] = []
        self._caches: list[Held] = []
        self._seen: dict[int, Any] = {}  # kept, so that an id stays one object's
        self._codes: dict[int, types.CodeType] = {}  # by id: to hash one reads all of it, and every call asks

    def same(self, *, caches: bool = True) -> bool:
        """Whether everything that was seen holds what it held then.

        Args:
            caches: those of `functools.lru_cache`, too. What they hold decides nothing, unless somebody writes to it.
        """
        return all(held.same() for held in (*self._held, *(self._caches if caches else ())))

    def form(self) -> Any:
        """What was seen, as a value that keeps nothing alive."""

        def of(value: Any) -> Any:
            if isinstance(value, PLAIN):
                return type(value), value
            if isinstance(value, tuple):
                return type(value), *map(of, value)
            one = Same(value)
            return one if one == one else type(value).__name__  # what it holds is in here, too

        return tuple(tuple((of(key), of(value)) for key, value in held.before.items()) for held in self._held)

    def take_out(self, unwanted: Callable[[Any], bool]) -> None:
        """Give back what was there in the place of what is not wanted there."""
        for held in (*self._held, *self._caches):
            held.take_out(unwanted)

    def knows(self, code: types.CodeType) -> bool:
        """Whether what a function names has been seen."""
        return id(code) in self._codes

    def code(self, code: types.CodeType, names: dict[str, Any]) -> None:
        """See what a function names.

        Args:
            code: its code.
            names: the globals that it is run with.
        """
        self._codes[id(code)] = code
        if settled(str(names.get("__name__"))):
            return
        asked = names_in(code)
        own = free_variables(code)
        if own and id(code) not in self._functions and not any(code in each.co_consts for each in self._codes.values()):
            self.closed.append(code)  # whose variables it sees is not known
        if (UNSEEN & asked.names) - names.keys():
            self.closed.append(code)
        if asked.names & {"environ", "getenv"}:
            self.see(os.environ)
        attributes = asked.names | asked.texts
        unheard = attributes - self._names_of
        self._names_of |= attributes
        imports: set[str] = set()
        for level, name in asked.imports:
            with suppress(ImportError):  # it leads nowhere, and so does the import
                imports.add(importlib.util.resolve_name("." * level + name, names.get("__package__") or ""))
        for known, inside in ((names, asked.names), (sys.modules, imports)):
            self._names(known, inside)
            for value in [known[name] for name in inside if name in known]:
                if isinstance(value, types.ModuleType):
                    self._module(value, attributes, set())
                else:
                    self.see(value)
        for module in [*self._modules.values()] if unheard else []:
            self._module(module, unheard, set())

    def follow(self) -> None:
        """See what the functions that are found ask for, of classes and beside them, until it is nothing new."""
        followed = (0, 0, 0)
        while followed != (len(self._classes), len(self._functions), len(self._modules)):
            followed = len(self._classes), len(self._functions), len(self._modules)
            for function in [*self._functions.values()]:
                code = function.__code__
                if not self.knows(code):
                    self.code(code, function.__globals__)
                    self._asked = self._asked and self._asked | names_in(code).names
            for kind in [*self._classes]:
                self.see(*(value for name, value in vars(kind).items() if self._asks(name)))

    def _asks(self, name: str) -> bool:
        """Whether code may ask a class for it."""
        return self._asked is None or name in self._asked or name in IMPLIED

    def _module(self, module: types.ModuleType, attributes: Iterable[str], walked: set[int]) -> None:
        """See these attributes of a module of Python, and of the modules among them."""
        if settled(module.__name__) or id(module) in walked:
            return
        walked.add(id(module))
        self._names(vars(module), attributes)
        for value in [vars(module)[name] for name in attributes if name in vars(module)]:
            if isinstance(value, types.ModuleType):
                self._module(value, attributes, walked)
            else:
                self.see(value)

    def _names(self, names: dict[str, Any], asked: Iterable[str]) -> None:
        def now() -> dict[str, Any]:
            return {name: names[name] for name in asked if name in names}

        self._held.append(Held(now(), now, names.__setitem__, names.__delitem__))

    def see(self, *values: Any) -> None:
        """See these, and what they hold."""
        waiting = [*values]
        while waiting:
            value = waiting.pop()
            if type(value) in PLAIN or id(value) in self._seen:
                continue
            if len(self._seen) > LIMIT:
                self.closed.append(LIMIT)
                return
            self._seen[id(value)] = value
            try:
                waiting += self._inside(value)
            except Exception:  # whatever an object does that stands for another one, which is not there
                self.closed.append(value)

    def _inside(self, value: Any) -> Iterable[Any]:
        """What a value holds; that it holds it is noted."""
        kind = type(value)
        if isinstance(value, type):
            return () if settled(value.__module__) else self._class(value)
        if isinstance(value, types.ModuleType):
            self._modules[id(value)] = value
            self._module(value, {*self._names_of}, set())
            return ()
        if isinstance(value, weakref.ref):
            return (value(),)
        if isinstance(value, functools.partialmethod):
            return value.func, value.args, value.keywords
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, (staticmethod, classmethod)):
            return (value.__func__,)
        if isinstance(value, types.MethodType):
            return value.__func__, value.__self__
        if isinstance(value, property):
            return value.fget, value.fset, value.fdel
        if isinstance(value, functools.cached_property):
            return (value.func,)
        if isinstance(value, BOUND):
            return (value.__self__,)
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords, *self._attributes(value)
        if isinstance(value, CACHE):
            return self._cache(value)
        if isinstance(value, (dict, collections.OrderedDict)):
            # Modules of Python in a dict are a registry, as sys.modules is: it would lead everywhere.
            items = [each for each in self._mapping(value) if not isinstance(each, types.ModuleType)]
            return *items, *value.keys(), *self._attributes(value)
        if isinstance(value, (list, collections.deque)):
            return *self._list(value), *self._attributes(value)
        if isinstance(value, set):
            return *self._set(value), *self._attributes(value)
        if isinstance(value, (tuple, frozenset, types.MappingProxyType)):
            items = value.values() if isinstance(value, types.MappingProxyType) else value
            return *items, *self._attributes(value)
        if isinstance(value, FakeTensor):  # it is not to be kept
            self.closed.append(kind)
            return ()
        if isinstance(value, Tensor):  # what code reads of its numbers is seen by the operators
            self._tensor(value)
            return self._attributes(value) if kind in (Tensor, nn.Parameter) and vars(value) else ()
        if isinstance(value, nn.Module):
            self._mapping(vars(value))
            empty = (name for name in MODULE & vars(value).keys() if not vars(value)[name])
            return kind, *(vars(value)[name] for name in vars(value).keys() - {*empty})
        if fixed(value):
            return ()
        if not attributes_only(kind):
            self.closed.append(value)
        return self._attributes(value)

    def _attributes(self, value: Any) -> Iterable[Any]:
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            return (type(value),)
        self._note({"": type(value)}, lambda: {"": type(value)})
        return type(value), *self._mapping(attributes)

    def _tensor(self, tensor: Tensor) -> None:
        before = {"": view(tensor)}
        self._note(before, lambda: before if view(tensor) == before[""] else {})

    def _note(self, before: Mapping[Any, Any], now: Callable[[], Mapping[Any, Any]]) -> None:
        """What holds no tensor of a forward is told apart, and never put back."""
        self._held.append(Held(before, now, lambda *_: None, lambda *_: None))

    def _class(self, kind: type) -> Iterable[Any]:
        def now() -> dict[str, Any]:
            return {name: value for name, value in vars(kind).items() if name not in NOTED}

        def put(name: str, value: Any) -> None:
            type.__setattr__(kind, name, value)

        before = now()
        self._held.append(Held(before, now, put, lambda name: type.__delattr__(kind, name)))
        self._classes.append(kind)
        inside = (value for name, value in before.items() if self._asks(name) or isinstance(value, (dict, list)))
        return *kind.__mro__[1:], *inside

    def _function(self, function: types.FunctionType) -> Iterable[Any]:
        self._functions[id(function.__code__)] = function

        def now() -> dict[str, Any]:
            return {name: getattr(function, name) for name in ("__code__", "__defaults__", "__kwdefaults__")}

        before = now()
        self._note(before, now)
        inside = [*before.values(), *self._mapping(function.__dict__)]
        for cell in function.__closure__ or ():
            inside += self._cell(cell)
        return inside

    def _cell(self, cell: types.CellType) -> Iterable[Any]:
        def now() -> dict[str, Any]:
            try:
                return {"": cell.cell_contents}
            except ValueError:  # empty
                return {}

        def put(_: str, value: Any) -> None:
            cell.cell_contents = value

        def drop(_: str) -> None:
            del cell.cell_contents

        before = now()
        self._held.append(Held(before, now, put, drop))
        return before.values()

    def _mapping(self, mapping: MutableMapping[Any, Any]) -> Iterable[Any]:
        before = dict(mapping)
        self._held.append(Held(before, lambda: mapping, mapping.__setitem__, mapping.__delitem__))
        return before.values()

    def _list(self, values: list[Any] | collections.deque[Any]) -> Iterable[Any]:
        before = [*values]

        def put(*_: Any) -> None:
            values.clear()
            values.extend(before)

        self._held.append(Held(dict(enumerate(before)), lambda: dict(enumerate(values)), put, put))
        return before

    def _set(self, values: set[Any]) -> Iterable[Any]:
        def now() -> dict[int, Any]:
            return {id(each): each for each in values}

        def put(*_: Any) -> None:
            values.clear()
            values.update(before.values())

        before = now()
        self._held.append(Held(before, now, put, put))
        return before.values()

    def _cache(self, cache: Any) -> Iterable[Any]:
        def now() -> dict[int, Any]:
            held = gc.get_referents(cache)
            # One is of its keys, with its values or with links to them.
            dicts = [each for each in held if isinstance(each, dict)]
            held += [value for each in dicts for value in each.values()]
            keys = {id(key) for each in dicts for key in each}
            return {
                id(each): each
                for each in held
                if id(each) not in keys and not isinstance(each, (dict, *PLAIN)) and type(each).__name__ != LINK
            }

        def clear(*_: Any) -> None:
            cache.cache_clear()

        before = now()
        self._caches.append(Held(before, now, clear, clear))
        return before.values()


class Standing:
    """A model, and what its code can get at, as it is now.

    Attributes:
        form: equal to that of another time where nothing has changed that decides what the model does. Where there is
            something that cannot be seen, it is equal to nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        forming, self._reach = Forming(), Reach(CALLED)
        inside = forming.of(model)
        self._reach.see(*forming.beyond())
        self._reach.follow()
        self._closed = forming.closed or bool(self._reach.closed)
        self._unchanged = forming.unchanged()
        self.form: Any = object() if self._closed else (inside, self._reach.form())

    def same(self) -> bool:
        """Whether that is so now."""
        return not self._closed and self._unchanged() and self._reach.same(caches=False)


def modes() -> tuple[Any, ...] | None:
    """The modes of the thread, but for those of autograd, or None where one may do anything."""
    functions = torch.overrides._get_current_function_mode_stack()
    if not all(type(mode) is DeviceContext for mode in functions) or nn.modules.module._has_any_global_hook():
        return None
    casts = [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda", "xpu", "mps")
        if torch.amp.is_autocast_available(kind)
    ]
    kernels = [
        getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math", "cudnn")
    ]
    settings = torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    return *settings, tuple(mode.device for mode in functions), tuple(casts), tuple(kernels)


class Asked(NamedTuple):
    """What a function, or one inside it, names."""

    names: frozenset[str]
    texts: frozenset[str]  # by which `getattr` may ask
    imports: frozenset[tuple[int, str]]  # modules of Python, and how many packages above


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> Asked:
    """What the code of a function names."""
    inside = [names_in(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    steps = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
    return Asked(
        frozenset(code.co_names).union(*(each.names for each in inside)),
        frozenset(each for each in code.co_consts if isinstance(each, str)).union(*(each.texts for each in inside)),
        frozenset(
            (steps[place - 2].argval, each.argval)  # the level is loaded before the names, and these before it imports
            for place, each in enumerate(steps)
            if each.opname == "IMPORT_NAME" and (steps[place - 2].argval or not settled(each.argval))
        ),
    )


def free_variables(code: types.CodeType) -> set[str]:
    """Variables of functions around it that a function sees."""
    return {*code.co_freevars} - {"__class__"}


def settled(module: str) -> bool:
    """Whether a package is one of `SETTLED`."""
    return module.partition(".")[0] in SETTLED
