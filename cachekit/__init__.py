"""cachekit: caching for diffusion transformers as a functional transform."""

from cachekit import deciders, forecasters, signals, testing
from cachekit.errors import ArgumentError, ArgumentTypeError, CacheError, StateError, StructureError, TraceWarning
from cachekit.explain import Explanation
from cachekit.guidance import Tokens
from cachekit.methods import (
    MagRatios,
    by_hand,
    decide,
    faster_cache,
    first_block_cache,
    mag_cache,
    mag_calibration,
    planned,
    pyramid_attention_broadcast,
    step_mask,
    taylorseer,
)
from cachekit.planning.choosing import Choice, choose
from cachekit.planning.planner import frontier, plan
from cachekit.planning.recording import recording
from cachekit.planning.replay import Replay, Sweep, replay, sweep
from cachekit.planning.trace import Trace
from cachekit.plans import Plan
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
    "Choice",
    "Explanation",
    "MagRatios",
    "Plan",
    "Policy",
    "Replay",
    "State",
    "StateError",
    "StructureError",
    "Summary",
    "Sweep",
    "Tokens",
    "Trace",
    "TraceWarning",
    "by_hand",
    "cache",
    "choose",
    "decide",
    "deciders",
    "faster_cache",
    "first_block_cache",
    "forecasters",
    "frontier",
    "mag_cache",
    "mag_calibration",
    "plan",
    "planned",
    "pyramid_attention_broadcast",
    "recording",
    "replay",
    "signals",
    "step_mask",
    "summary",
    "sweep",
    "taylorseer",
    "testing",
]
