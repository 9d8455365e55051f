"""One paper a file: a signal, a decider, a forecaster, the defaults and the departures."""

from cachekit.methods._by_hand import by_hand, decide
from cachekit.methods._faster_cache import faster_cache
from cachekit.methods._first_block import first_block_cache
from cachekit.methods._mag import MagRatios, mag_cache, mag_calibration
from cachekit.methods._planned import planned
from cachekit.methods._pyramid import pyramid_attention_broadcast
from cachekit.methods._step_mask import step_mask
from cachekit.methods._taylorseer import taylorseer

__all__ = [
    "MagRatios",
    "by_hand",
    "decide",
    "faster_cache",
    "first_block_cache",
    "mag_cache",
    "mag_calibration",
    "planned",
    "pyramid_attention_broadcast",
    "step_mask",
    "taylorseer",
]
