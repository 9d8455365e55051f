"""Tiny random models of diffusers' transformer classes, and of others, with the inputs of each denoising step.

A specimen has the structure of the real class (block lists, glue, streams) at a width of 64 or less. It also
behaves like a trained model where a cache cares: no block is the identity, the output depends on the
timestep, and from one step to the next latents and residuals change by some per cent.

A new class is one more recipe, in `images.py`, `videos.py` or `sound.py`; a model that is not in diffusers has its
class and its recipe in `foreign`.
"""

from cachekit.diffusers.inputs import Draw, schedule
from cachekit.diffusers.zoo import images, sound, videos  # noqa: F401  (their recipes)
from cachekit.diffusers.zoo.foreign import SHAPES
from cachekit.diffusers.zoo.specimen import BUILDERS, TEXT, Specimen, specimen, wake

FOREIGN: tuple[str, ...] = tuple(SHAPES)
"""Those that are not in diffusers."""

NAMES: tuple[str, ...] = tuple(name for name in BUILDERS if name not in SHAPES)
"""All that the installed diffusers has."""

__all__ = ["BUILDERS", "FOREIGN", "NAMES", "SHAPES", "TEXT", "Draw", "Specimen", "schedule", "specimen", "wake"]
