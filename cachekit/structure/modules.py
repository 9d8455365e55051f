"""The modules of a model by their names: through compiled wrappers, and with the methods that stand for modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

NATIVE = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""PyTorch's own modules that in eval mode, without gradients, run as one operator and never call their children."""

METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.TransformerEncoderLayer: ("_ff_block",),
    nn.TransformerDecoderLayer: ("_ff_block",),
}
"""Methods of PyTorch's own layers that do what other models have a module for: a feed-forward network."""

FUSED = "activation_relu_or_gelu"
"""Where this attribute of an nn.TransformerEncoderLayer is 0, the layer calls its children (torch 2.11 to 2.15)."""


class Method(nn.Module):
    """A method of a layer, as a module. The layer is no child of it.

    Args:
        layer: it.
        name: of the method.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, name=name)

    def forward(self, *args, **kwargs) -> Any:
        """What the method returns."""
        layer: Any = self.__dict__["layer"]
        return getattr(type(layer), self.__dict__["name"])(layer, *args, **kwargs)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, or the module."""
    inside = model._modules.get("_orig_mod")
    return model if inside is None else inside


def callable_module(module: nn.Module) -> bool:
    """Whether it has a forward: a list has none."""
    return type(unwrap(module)).forward is not nn.Module.forward


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module of this name, `""` for the model. Names are those of the model before anything in it was compiled.

    Raises:
        AttributeError: there is none.
    """
    module = model
    for name in path.split(".") if path else ():
        inside = unwrap(module)
        found = inside._modules.get(name)
        if found is None and name in methods_of(inside):
            found = Method(inside, name)
        if found is None:
            raise AttributeError(f"{type(inside).__name__} has no module {name!r}")
        module = found
    return module


def named(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """It and the modules in it, each once, with names as `module_at` takes them; a compiled one as its wrapper."""
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield path, module
        for name, child in unwrap(module)._modules.items():
            if child is not None:
                yield from visit(child, f"{path}.{name}" if path else name)

    return visit(module, prefix)


def methods_of(module: nn.Module) -> tuple[str, ...]:
    """The methods of a layer that stand for modules."""
    return next((names for layer, names in METHODS.items() if isinstance(module, layer)), ())


def call_children(module: nn.Module) -> None:
    """Let one of PyTorch's own layers call its children, wherever it would run as one operator."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.__dict__[FUSED] = 0


class _Unfused(TorchFunctionMode):
    """Under any such mode PyTorch's own layers call their children (torch 2.11 to 2.15)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def in_two_minds(model: nn.Module, device: Any, *, inside: bool) -> str | None:
    """Why PyTorch's own layers in a model do one thing as one operator, as they run now, and another as children.

    Args:
        model: it.
        device: where it runs.
        inside: whether something inside the layers is a site.
    """
    if not torch.backends.mha.get_fastpath_enabled():
        return None
    encoder = nn.TransformerEncoderLayer
    for path, layer in named(model):
        layer = unwrap(layer)
        if not isinstance(layer, encoder) or layer.training or not getattr(layer, FUSED):
            continue
        own = [name for name in ("_sa_block", "_ff_block") if getattr(type(layer), name) is not getattr(encoder, name)]
        if inside and own and type(layer).forward is encoder.forward:
            return (
                f"{path} ({type(layer).__name__}) has a {own[0]} of its own, and in eval mode PyTorch does not call it"
            )
        if torch.device(device).type == "cpu" and torch.is_autocast_enabled("cpu"):
            return (
                f"{path} ({type(layer).__name__}) runs in eval mode as one operator, for which autocast does not hold"
            )
    return None


def unfused(model: nn.Module) -> Any:
    """Meanwhile, and in this thread, PyTorch's own layers in a model call their children.

    On fake tensors their operators return other things than on real ones: weights of attention that nobody asked for.
    """
    return _Unfused() if any(isinstance(module, NATIVE) for module in model.modules()) else nullcontext()
