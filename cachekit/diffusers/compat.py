"""What of diffusers stands in the way of a cached step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from cachekit.errors import StructureError


def refuse(model: nn.Module) -> None:
    """Raise where a feature of diffusers cannot work with a cached step, and say why.

    Raises:
        StructureError: the model is group-offloaded with a stream, or several blocks a group. Its hooks load the next
            group ahead, in the order of the first forward, or load a group where its first block runs and put it away
            after its last; a reused step leaves blocks out.
    """
    for where, name, hook in _hooks(model):
        group = getattr(hook, "group", None)
        if "group_offloading" not in name or (group is not None and _alone(group)):
            continue
        raise StructureError(
            f"`model` is group-offloaded ({where} has the hook {name!r}), with a stream or several blocks a group, "
            "which counts on every block to run, in a fixed order. Use num_blocks_per_group=1 and use_stream=False, "
            'offload_type="leaf_level", or model or sequential offload.'
        )


def _alone(group: Any) -> bool:
    """Whether a group of weights is loaded and put away by one module, whichever others run."""
    return group.stream is None and group.onload_leader in (None, group.offload_leader)


def uncompilable(model: nn.Module) -> str | None:
    """Which feature of diffusers cannot be part of a graph, and what can be done; None if there is none.

    Layerwise casting puts new parameters into a layer around every call, and Dynamo follows no parameter that is made
    (torch 2.11 to 2.15), with a cache or without. Group offloading keeps its loading away from the compiler.
    """
    for where, name, _ in _hooks(model):
        if "group_offloading" in name:
            return (
                f"`model` is group-offloaded ({where} has the hook {name!r}), and no graph can hold the loading of "
                "weights. Run the step as it is, or leave offloading out."
            )
        if "layerwise_casting" in name:
            return (
                f"`model` has layerwise casting ({where} has the hook {name!r}), which puts new weights into a layer "
                "around every call, and no graph can hold that. Run the step as it is, or quantise the weights "
                "instead, e.g. with torchao's Float8WeightOnlyConfig, and use step.compile()."
            )
    return None


def refuse_hooks(name: str, model: nn.Module) -> None:
    """Raise where one of diffusers' own caches is enabled on a transformer.

    Raises:
        StructureError: both would leave things out, and neither know of the other.
    """
    for where, hook_name, hook in _hooks(model):
        if "cache" in type(hook).__module__.rpartition(".")[2] or "pyramid" in hook_name:
            raise StructureError(
                f"`{name}` has a cache of diffusers enabled ({where} has the hook {hook_name!r}). Switch it off with "
                f"pipe.{name}.disable_cache(), or pass its config to cachekit.diffusers instead."
            )


def _hooks(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Where, under which name, and what every hook of diffusers in a model is."""
    for path, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name, hook in getattr(registry, "hooks", {}).items():
            yield path or "the model", name, hook
