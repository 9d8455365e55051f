"""cachekit: caching for diffusion transformers as a functional transform."""

from cachekit import deciders, forecasters, signals
from cachekit.errors import ArgumentError, ArgumentTypeError, CacheError, StateError, StructureError
from cachekit.explain import Explanation
from cachekit.guidance import Tokens
from cachekit.methods import (
    MagRatios,
    faster_cache,
    first_block_cache,
    mag_cache,
    mag_calibration,
    pyramid_attention_broadcast,
    step_mask,
    taylorseer,
)
from cachekit.plan import Plan
from cachekit.policy import Policy
from cachekit.state import State, Summary, summary
from cachekit.structure.chains import Chain
from cachekit.transform import CachedStep, cache

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CacheError",
    "CachedStep",
    "Chain",
    "Explanation",
    "MagRatios",
    "Plan",
    "Policy",
    "State",
    "StateError",
    "StructureError",
    "Summary",
    "Tokens",
    "cache",
    "deciders",
    "faster_cache",
    "first_block_cache",
    "forecasters",
    "mag_cache",
    "mag_calibration",
    "pyramid_attention_broadcast",
    "signals",
    "step_mask",
    "summary",
    "taylorseer",
]
