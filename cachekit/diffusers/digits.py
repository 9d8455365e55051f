"""A small class-conditional video transformer, trained to draw handwritten digits.

It is a real model of a real library, small enough to sample on a laptop: six blocks of width 128 over 64 tokens,
in the architecture of Wan. `cachekit.demo` trains it, samples from it and measures caches on it.
"""

from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

CLASSES = 10
NULL = CLASSES
"""The label that stands for "any digit": the unconditional stream of classifier-free guidance."""
TOKENS = 4
SIZE = 16
"""Height and width of an image, in pixels."""
WEIGHTS = Path(__file__).with_name("digits.safetensors")


def build() -> nn.Module:
    """The model with fresh weights, in training mode; seed torch before the call for a repeatable start."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        text_dim=CLASSES + 1 + TOKENS,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
        rope_max_seq_len=32,
    )


def load(weights: Path = WEIGHTS) -> nn.Module:
    """The model with trained float32 `weights`, in evaluation mode, on the CPU."""
    model = build()
    model.load_state_dict(load_file(weights))
    return model.eval()


def inputs(x: Tensor, t: Tensor | float, labels: Tensor) -> dict[str, object]:
    """Keyword arguments of the model's forward, which returns a tuple of one tensor, the velocity, shaped as `x`.

    Args:
        x: [B, 1, 1, 16, 16] float32, noisy images: channel, frame, height, width.
        t: [] or [B], time in [0, 1]; 0 is the image, 1 is the noise.
        labels: [B] int64, the digit 0..9, or `NULL` for any.
    """
    times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
    return {
        "hidden_states": x,
        "timestep": 1000 * times,
        "encoder_hidden_states": _prompt(labels).to(x),
        "return_dict": False,
    }


def _prompt(labels: Tensor) -> Tensor:
    """[B, 4, 15] float32: in every token the one-hot class, then the one-hot place of the token.

    The place keeps the tokens apart: attention over equal tokens would not depend on its query.
    """
    classes = torch.eye(CLASSES + 1, device=labels.device)[labels]
    places = torch.eye(TOKENS, device=labels.device)
    return torch.cat(
        [classes[:, None].expand(-1, TOKENS, -1), places.expand(len(labels), -1, -1)],
        dim=-1,
    )
