"""How parts that users write are asked: what goes wrong in them is said with the part, the function and the fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from torch.utils import _pytree as pytree

from cachekit.errors import ArgumentError, ArgumentTypeError, CacheError

BEYOND = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""What is raised where a function is asked on tensors without values, and needs a value."""

FIXES = {
    ZeroDivisionError: "At step 0, and wherever nothing moves, the denominator is 0: divide with "
    "cachekit.deciders.ratio, which gives inf or NaN there.",
    RecursionError: "It calls itself.",
}


def ask(part: str, name: str, function: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)`, for a function of a part.

    Raises:
        ArgumentError: it failed; errors of cachekit's own pass through.
    """
    try:
        return call(*arguments)
    except (CacheError, *BEYOND):
        raise
    except Exception as error:
        fix = FIXES.get(type(error), "cachekit.testing.check tries a part by itself.")
        said = " ".join(str(error).split())[:300]
        raise ArgumentError(
            f"`{part}` {name!r} fails in `{function}`: {type(error).__name__}: {said}. {fix}"
        ) from error


def form(tree: Any) -> tuple[Any, list[Any]]:
    """The tree of a state, and the shape, dtype and device of every leaf; the type of what is no tensor."""
    leaves, treespec = pytree.tree_flatten(tree)
    return treespec, [_of_leaf(leaf) for leaf in leaves]


def _of_leaf(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf)


def shown(value: Any) -> str:
    """A value in an error: of a tensor its shape and dtype."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_state(part: str, name: str, state: Any) -> None:
    """Refuse a state that holds anything but tensors."""
    for leaf in pytree.tree_leaves(state):
        if not isinstance(leaf, Tensor):
            raise ArgumentTypeError(
                f"`{part}` {name!r}: its state holds {shown(leaf)}. Every leaf of a state is a tensor, e.g. "
                "torch.zeros((), dtype=torch.float64), and () is the state of a part that remembers nothing."
            )


def check_same_form(part: str, name: str, function: str, before: Any, after: Any) -> None:
    """Refuse a state that is no longer of the form that `init` gave it."""
    if form(before) == form(after):
        return
    old, new = pytree.tree_leaves(before), pytree.tree_leaves(after)
    pairs = [(a, b) for a, b in zip(old, new, strict=False) if _of_leaf(a) != _of_leaf(b)]
    was, now = map(shown, pairs[0]) if pairs else (f"{len(old)} leaves", f"{len(new)} leaves, or in another tree")
    raise ArgumentTypeError(
        f"`{part}` {name!r}: `{function}` makes {now} of what was {was}. The tree of a state, and the shape, dtype and "
        "device of every leaf, stay as `init` made them: use e.g. torch.where, and .to(before.dtype)."
    )


def versions(tree: Any) -> list[int]:
    """How often each tensor of a tree was written to."""
    return [leaf._version for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def check_unwritten(part: str, name: str, function: str, tree: Any, before: list[int]) -> None:
    """Refuse a function that has written to what it was given."""
    if versions(tree) != before:
        raise ArgumentError(
            f"`{part}` {name!r}: `{function}` writes to a tensor that it is given. States are values, which others may "
            "hold, too: return a new tensor, e.g. state + x for state.add_(x)."
        )
