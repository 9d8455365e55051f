"""What of diffusers stands in the way of a cached step."""

from __future__ import annotations

from torch import nn

from cachekit.errors import StructureError


def refuse(model: nn.Module) -> None:
    """Raise where a feature of diffusers cannot work with a cached step, and say why.

    Raises:
        StructureError: the model is group-offloaded. Its hooks load the blocks in the order of the first forward
            and count on every block to run; a reused step leaves blocks out.
    """
    for path, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in getattr(registry, "hooks", {}):
            if "group_offloading" in name:
                raise StructureError(
                    f"`model` is group-offloaded ({path or 'the model'} has the hook {name!r}), which loads blocks in "
                    "a fixed order and counts on every one to run. Use model or sequential offload instead, or none."
                )


def refuse_hooks(name: str, model: nn.Module) -> None:
    """Raise where one of diffusers' own caches is enabled on a transformer.

    Raises:
        StructureError: both would leave things out, and neither know of the other.
    """
    for path, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook_name, hook in getattr(registry, "hooks", {}).items():
            if "cache" in type(hook).__module__.rpartition(".")[2] or "pyramid" in hook_name:
                raise StructureError(
                    f"`{name}` has a cache of diffusers enabled ({path or 'the model'} has the hook {hook_name!r}). "
                    f"Switch it off with pipe.{name}.disable_cache(), or pass its config to cachekit.diffusers instead."
                )
