"""A cached step as a package that runs without cachekit, and without Python if need be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cachekit.errors import ArgumentError
from cachekit.releases import PACKAGE
from cachekit.state import State

if TYPE_CHECKING:
    from cachekit.transform import CachedStep

VERSION = 1


def export(step: CachedStep, path: str | Path, state: State, args: tuple, kwargs: dict[str, Any]) -> None:
    """Package a step with AOTInductor: the decision, the blocks and the forecast in one graph.

    Three files are written. `path` is the package. Beside it, `path + ".json"` says what goes in and out, and
    `path + ".state.pt"` holds the flat list of state leaves to begin with (`torch.load`). The package takes
    `(leaves, *args, **kwargs)` and returns `(out, leaves)`: plain tensors, tuples and lists, so that it loads
    where cachekit is not installed. An output class of the model's own comes out as a tuple of its tensors.

    Args:
        step: the step.
        path: of the package, ending in `.pt2`.
        state: a state from `step.init`; it goes into the package's first state as it is.
        args, kwargs: the arguments of one call of the model. Tensors are inputs of the package; everything else
            is fixed in it.

    Raises:
        ArgumentError: `path` does not end in `.pt2`.
        StateError: the state is not of this step.

    Example:
        Loading takes torch alone::

            import json, torch
            run = torch._inductor.aoti_load_package("step.pt2")
            leaves = torch.load("step.pt2.state.pt")
            for t in timesteps:
                out, leaves = run(leaves, x, t)
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ArgumentError(f"`path` must end in '.pt2', got {str(path)!r}. AOTInductor packages are named so.")
    step.check_state(state)
    leaves, treespec = pytree.tree_flatten(state)
    # A package has one memory layout: what was marked dynamic for just-in-time compilation is as long as it is.
    leaves = [leaf.clone() for leaf in leaves]
    given = {n: arg for n, arg in enumerate(args) if _tensors(arg)}
    named = {name: arg for name, arg in kwargs.items() if _tensors(arg)}
    with torch.no_grad():
        flat = _Flat(step, treespec, args, kwargs)
        program = torch.export.export(flat, (leaves, *given.values()), named, strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=PACKAGE)
    torch.save(leaves, f"{path}.state.pt")
    names = [pytree.keystr(key) for key, _ in pytree.tree_flatten_with_path(state)[0]]
    record = {
        "version": VERSION,
        "policy": step.policy.name,
        "steps": len(state.timesteps),
        "state": [
            {"name": name.lstrip("."), "shape": list(leaf.shape), "dtype": str(leaf.dtype), "device": str(leaf.device)}
            for name, leaf in zip(names, leaves, strict=True)
        ],
        "arguments": [f"args[{n}]" for n in given] + list(named),
        "fixed": {str(name): repr(arg) for name, arg in _fixed(args, kwargs).items()},
    }
    Path(f"{path}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _fixed(args: tuple, kwargs: dict[str, Any]) -> dict[int | str, Any]:
    given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    return {name: arg for name, arg in given.items() if not _tensors(arg)}


class _Flat(nn.Module):
    """The step with its state as a flat list, plain containers out, and all but tensors fixed."""

    def __init__(self, step: CachedStep, treespec: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.step = step
        self.treespec = treespec
        self.count = len(args)
        self.fixed = _fixed(args, kwargs)

    def forward(self, leaves: list[Tensor], *args, **kwargs):
        state = pytree.tree_unflatten(leaves, self.treespec)
        given = iter(args)
        positional = [self.fixed[n] if n in self.fixed else next(given) for n in range(self.count)]
        named = {name: value for name, value in self.fixed.items() if isinstance(name, str)}
        out, state = self.step(state, *positional, **named, **kwargs)
        if not isinstance(out, Tensor) and type(out) not in (tuple, list, dict):
            out = tuple(pytree.tree_leaves(out))
        return out, pytree.tree_leaves(state)
