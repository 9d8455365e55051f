"""Tiny models in the shape of denoisers that are not in diffusers, written for this from what is known of them."""

from cachekit.diffusers.zoo.foreign import alphafold, decoder, expert, f5, hyper, ltx2, xtransformers  # noqa: F401  (recipes)

SHAPES: dict[str, str] = {
    "F5UNetT": "E2-TTS and F5-TTS: a transformer with long skips, its layers lists of a skip, norms and networks",
    "F5DiT": "F5-TTS: AdaLN-zero blocks on noise, reference and letters side by side",
    "XTransformers": "x-transformers: lists of norms, a block and a residual, under a wrapper of continuous tokens",
    "HyperConnections": "hyper-connections: several residual streams, mixed around every branch",
    "LTX2Own": "LTX-2's own code: blocks that take and return frozen dataclasses of video and of sound",
    "TokenTransformer": "AlphaFold 3 and its kin: attention with pair bias under a conditioning of every token",
    "ActionExpert": "pi0: a Gemma-like decoder of actions, over keys and values of a prefix",
    "ActionDecoder": "Diffusion Policy: PyTorch's own encoder of observations and decoder of actions",
}
"""Name of a specimen -> what real model it has the shape of."""
