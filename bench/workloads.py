"""Models at the sizes that people run, with random weights, and inputs that change slowly from step to step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

STEPS = 28
TIMES = [1000.0 * (1 - i / STEPS) for i in range(STEPS)]


class Workload(NamedTuple):
    """A model and a trajectory of its inputs."""

    name: str
    model: nn.Module
    inputs: Callable[[int], dict[str, Any]]  # of a step
    lists: tuple[str, ...]  # the nn.ModuleLists of its blocks, in order
    attention: tuple[str, ...]  # modules of a block that are self-attention
    feed_forward: tuple[str, ...]  # and those that are cross-attention or feed-forward networks

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in order."""
        return [block for name in self.lists for block in getattr(self.model, name)]

    def without(self, method: str) -> nn.Module:
        """The model with what a skipped step leaves out taken out by hand; the rest is shared."""
        cut = _shell(self.model)
        gone = {"taylorseer": self.attention + self.feed_forward}.get(method, self.attention)
        for n, name in enumerate(self.lists):
            blocks = list(getattr(self.model, name))
            if method in ("first_block_cache", "mag_cache"):
                blocks = blocks[:1] if method == "first_block_cache" and n == 0 else []
            else:
                blocks = [_shell(block) for block in blocks]
                for block in blocks:
                    block._modules.update({name: Gone() for name in gone if name in block._modules})
            cut._modules[name] = nn.ModuleList(blocks)
        return cut


class Gone(nn.Module):
    """What stands where a module was taken out."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any) -> Any:
        """What came in: both streams where there are two."""
        if encoder_hidden_states is None or encoder_hidden_states.shape[-1] != hidden_states.shape[-1]:
            return hidden_states
        return hidden_states, encoder_hidden_states


def _shell(module: nn.Module) -> nn.Module:
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


def flux(device: torch.device, tiny: bool = False, dtype: torch.dtype = torch.bfloat16) -> Workload:
    """FLUX.1-dev at 1024x1024: 19 + 38 blocks of width 3072, 4096 + 512 tokens. `tiny` has 2 + 3 of width 64."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    side, words = (4, 5) if tiny else (64, 512)
    size: dict[str, Any] = {"guidance_embeds": True}
    if tiny:
        size |= {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2}
        size |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12)}
    model = _built(lambda: FluxTransformer2DModel(**size), device, dtype)
    draw, config = _source(device, dtype), model.config
    x, drift = draw(1, side * side, config.in_channels), draw(1, side * side, config.in_channels)
    ids = torch.zeros(side * side, 3, device=device, dtype=dtype)
    ids[:, 1], ids[:, 2] = torch.arange(side * side) // side, torch.arange(side * side) % side
    fixed = {
        "encoder_hidden_states": draw(1, words, config.joint_attention_dim),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": ids,
        "txt_ids": torch.zeros(words, 3, device=device, dtype=dtype),
        "return_dict": False,
    }

    def inputs(i: int) -> dict[str, Any]:
        now = torch.full((1,), TIMES[i] / 1000, device=device, dtype=dtype)
        return {"hidden_states": x + 0.02 * i * drift, "timestep": now, **fixed}

    lists = ("transformer_blocks", "single_transformer_blocks")
    return Workload("flux", model, inputs, lists, ("attn",), ("ff", "ff_context"))


def wan(device: torch.device, tiny: bool = False, dtype: torch.dtype = torch.bfloat16) -> Workload:
    """Wan2.1 1.3B, 33 frames at 480x832: 30 blocks of width 1536, 14040 tokens. `tiny` has 2 of width 32."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    size: dict[str, Any] = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
    if tiny:
        size = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 64, "text_dim": 48}
        size |= {"in_channels": 4, "out_channels": 4, "freq_dim": 32}
    model = _built(lambda: WanTransformer3DModel(**size), device, dtype)
    draw, config = _source(device, dtype), model.config
    shape = (1, config.in_channels, *((2, 4, 4) if tiny else (9, 60, 104)))
    x, drift, text = draw(*shape), draw(*shape), draw(1, 5 if tiny else 512, config.text_dim)

    def inputs(i: int) -> dict[str, Any]:
        return {
            "hidden_states": x + 0.02 * i * drift,
            "timestep": torch.full((1,), TIMES[i], device=device),
            "encoder_hidden_states": text,
            "return_dict": False,
        }

    return Workload("wan", model, inputs, ("blocks",), ("attn1",), ("attn2", "ffn"))


def _built(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that the weights are never there in float32
    try:
        with torch.device(device):
            model = make().eval()
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if "scale_shift_table" not in name and parameter.ndim > 1 and not parameter.any():
            raise SystemExit(f"{name} is zero: a closed gate makes every cache look perfect.")
    return model.to(dtype)


def _source(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    noise = torch.Generator(device).manual_seed(1)
    return lambda *shape: torch.randn(shape, generator=noise, device=device, dtype=dtype)
