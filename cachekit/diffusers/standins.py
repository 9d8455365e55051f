"""What stands in for a pipeline, its transformers and its scheduler while a run is enabled. None of them is changed.

A pipeline gets a class of its own, made from its class, in which a call opens a scope and, inside of it, the attributes
that hold the transformers give others out. A transformer that is given out has a class of its own too, and shares
everything it holds with the real one: its attributes are those of the real one, to read and to write. Only being called
differs.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

MARK = "_cachekit_run"


class Scope(Protocol):
    """What the classes made here ask."""

    def owns(self, pipe: Any) -> bool:
        """Whether it is enabled on this pipeline, and not on one that was made of its class meanwhile."""
        ...

    def opened(self, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """A call of the pipeline, with these arguments."""
        ...

    def given(self, name: str) -> Any:
        """What stands in for a transformer, or for the scheduler, in this thread now; None outside a call."""
        ...

    def shows_progress(self, steps: int) -> None:
        """The pipeline shows progress of so many steps."""
        ...


class _Slot:
    """An attribute of a pipeline: what it holds, or what stands in for it."""

    def __init__(self, scope: Scope, name: str) -> None:
        self._scope = scope
        self._name = name

    def __get__(self, pipe: Any, owner: type | None = None) -> Any:
        if pipe is None:
            return self
        given = self._scope.given(self._name) if self._scope.owns(pipe) else None
        return pipe.__dict__[self._name] if given is None else given

    def __set__(self, pipe: Any, value: Any) -> None:
        # Code that says `self.transformer = self.transformer.to(...)` means the real one.
        if value is None or value is not self._scope.given(self._name):
            pipe.__dict__[self._name] = value


def pipeline_class(base: type, scope: Scope, names: Iterable[str]) -> type:
    """The class of a pipeline while a run is enabled on it."""
    names = tuple(names)

    @functools.wraps(base.__call__)
    def call(self, *args, **kwargs):
        if not scope.owns(self):
            return base.__call__(self, *args, **kwargs)
        with scope.opened(args, kwargs):
            return base.__call__(self, *args, **kwargs)

    def reduce(self, protocol):
        # A copy, and what is read from a file, is a pipeline of the class that it had.
        made = object.__new__(base)
        made.__dict__.update(self.__dict__)
        return reduced(made, protocol)

    def components(self) -> dict[str, Any]:
        # Offloading hangs hooks on what it finds here: on the real ones.
        found = base.components.fget(self)  # type: ignore[attr-defined]
        return {name: self.__dict__[name] if name in names else value for name, value in found.items()}

    def progress_bar(self, *args, **kwargs):
        given = dict(zip(("iterable", "total"), args, strict=False)) | kwargs
        steps = given.get("total")
        if steps is None and hasattr(given.get("iterable"), "__len__"):
            steps = len(given["iterable"])
        if steps is not None and scope.owns(self):
            scope.shows_progress(int(steps))
        return base.progress_bar(self, *args, **kwargs)

    members: dict[str, Any] = {name: _Slot(scope, name) for name in names}
    if hasattr(base, "progress_bar"):  # of a modular pipeline its blocks have one
        members["progress_bar"] = functools.wraps(base.progress_bar)(progress_bar)
    made = {"__call__": call, "__reduce_ex__": reduce, "components": property(components), MARK: scope, **members}
    about = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), {**about, **made})


def stand_in(
    model: nn.Module, call: Callable[..., Any], context: Callable[..., AbstractContextManager[None]]
) -> nn.Module:
    """A module that is `model` in everything but being called.

    Args:
        model: a transformer of diffusers, compiled or not.
        call: what to do instead.
        context: what its `cache_context(name)` does. That of diffusers would tell its hooks, of which there are none,
            and leave a registry of them on the model.
    """
    members = {
        "__call__": lambda self, *args, **kwargs: call(*args, **kwargs),
        "cache_context": lambda self, name, **kwargs: context(name),
    }
    return _but_for(model, members)


def watched(scheduler: Any, is_set: Callable[[], None], stepped: Callable[[], None]) -> Any:
    """A scheduler that is `scheduler` in everything, and tells what it is asked for.

    Args:
        scheduler: of diffusers, or any object with `set_timesteps` and `step`.
        is_set: called after its timesteps were set.
        stepped: called after a step, whatever the method is called that takes it: `step`, `step_pred`.
    """
    base, depth = type(scheduler), [0]  # a step may take others

    def telling(method: Callable[..., Any], tell: Callable[[], None]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self, *args, **kwargs):
            depth[0] += 1
            try:
                found = method(self, *args, **kwargs)
            finally:
                depth[0] -= 1
            if not depth[0]:
                tell()
            return found

        return call

    names = [name for name in dir(base) if name == "step" or name.startswith("step_")]
    steps = {name: getattr(base, name) for name in names if inspect.isfunction(getattr(base, name))}
    members = {name: telling(method, stepped) for name, method in steps.items()}
    return _but_for(scheduler, {"set_timesteps": telling(base.set_timesteps, is_set), **members})


def _but_for(value: Any, members: dict[str, Any]) -> Any:
    """An object that is `value`, and shares what it holds, but for these members of its class."""
    base = type(value)
    about = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": lambda self, protocol: reduced(value, protocol),
    }
    made = object.__new__(type(base.__name__, (base,), {**about, **members}))
    object.__setattr__(made, "__dict__", vars(value))
    return made


def reduced(value: Any, protocol: Any) -> tuple:
    """How to make a copy of a value, for something else to hand out as how to copy itself."""
    make, given, *rest = value.__reduce_ex__(protocol)
    # Pickle refuses its own way of making an object where the class is not that of what it was asked to copy.
    return (blank, given, *rest) if make is copyreg.__newobj__ else (make, given, *rest)  # type: ignore[attr-defined]


def blank(cls: type, *given: Any) -> Any:
    """An object without its attributes."""
    return cls.__new__(cls, *given)
