"""Tiny random models of diffusers' transformer classes, with the inputs of each denoising step.

A specimen has the structure of the real class (block lists, glue, streams) at a width of 64 or less. It also
behaves like a trained model where a cache cares: no block is the identity, the output depends on the
timestep, and from one step to the next latents and residuals change by some per cent.

A new class is one more recipe, in `images.py`, `videos.py` or `sound.py`.
"""

from cachekit.diffusers.inputs import Draw, schedule
from cachekit.diffusers.zoo import images, sound, videos  # noqa: F401  (their recipes)
from cachekit.diffusers.zoo.specimen import BUILDERS, TEXT, Specimen, specimen, wake

NAMES: tuple[str, ...] = tuple(BUILDERS)
"""All that the installed diffusers has."""

__all__ = ["BUILDERS", "NAMES", "TEXT", "Draw", "Specimen", "schedule", "specimen", "wake"]
