"""When to compute: pure deciders over numbers, and the wrappers that compose them."""

from cachekit.deciders._combine import always, any_of, max_skips, warmup, within
from cachekit.deciders._decider import Decider, Moment, Sums, check_number, plan, ratio
from cachekit.deciders._drift import drift
from cachekit.deciders._interval import interval
from cachekit.deciders._magnitude import check_ratios, magnitude_budget
from cachekit.deciders._mask import mask

__all__ = [
    "Decider",
    "Moment",
    "Sums",
    "always",
    "any_of",
    "check_number",
    "check_ratios",
    "drift",
    "interval",
    "magnitude_budget",
    "mask",
    "max_skips",
    "plan",
    "ratio",
    "warmup",
    "within",
]
