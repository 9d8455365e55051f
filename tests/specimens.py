"""Tiny models of diffusers' classes, as tests need them."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from cachekit.diffusers import zoo
from cachekit.diffusers.zoo import specimen as make

_shared: dict[tuple[str, int], tuple[nn.Module, Any]] = {}


@functools.cache
def shared(name: str, seed: int = 0) -> zoo.Specimen:
    """The same model at every call, and so what was recorded of it: for tests that change nothing about it."""
    specimen = make(name, seed)
    _shared[name, seed] = specimen.model, _changes(specimen.model)
    return specimen


def changed() -> list[str]:
    """Which of the shared models have been changed since: other modules, hooks, or a forward of their own."""
    return [name for (name, _), (model, before) in _shared.items() if _changes(model) != before]


def _changes(model: nn.Module) -> Any:
    hooks = {path: getattr(vars(module).get("_diffusers_hook"), "hooks", ()) for path, module in model.named_modules()}
    return [
        (path, type(module), "forward" in vars(module), [*hooks[path]], len(module._forward_hooks))
        for path, module in model.named_modules()
    ]


def shallow(name: str, seed: int = 0) -> zoo.Specimen:
    """With the first and the last block of every list alone: to compile it takes two thirds of the time."""
    specimen = make(name, seed)
    for child in specimen.model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 2:
            del child[1:-1]
    return specimen
