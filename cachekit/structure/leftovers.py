"""Nothing of a recorded forward stays outside of the model.

A forward may keep what it computes: in a `functools.lru_cache`, a class, a global, an object that code names. What a
forward on fake tensors keeps there is a tensor without numbers, and would be handed to the model afterwards. So what
its code can write to is noted before, and given back after; what is alive even then is looked for, and taken out of
whatever holds it.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from cachekit.errors import StructureError
from cachekit.structure.reach import CACHE, CALLED, Reach

DEPTH = 3
"""How many containers may lie around a tensor that code keeps."""


class Surroundings:
    """What the code of a model can reach outside of it, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self._reach = Reach(CALLED)
        self._reach.see(model)
        self._reach.follow()

    def restore(self) -> None:
        """Give back what holds fake tensors now."""
        self._reach.take_out(_holds_fakes)


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
