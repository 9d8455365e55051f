"""What others do, set to the pattern of a policy of ours: run beside it, in the same process.

The `threshold` is that of the first block; all other settings are those of `gpu.policies`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from workloads import STEPS, TIMES, Workload

Run = Callable[[list[dict[str, Any]]], torch.Tensor]
"""All steps of one image on these inputs; the last output."""


@contextlib.contextmanager
def hooks(work: Workload, method: str, threshold: float) -> Iterator[Run | None]:
    """The hooks of diffusers."""
    theirs: Any = importlib.import_module("diffusers.hooks")
    step = [0]

    def now() -> float:
        return TIMES[step[0]]

    inside = "|".join(work.attention + work.feed_forward)
    config: Any = {
        "first_block_cache": lambda: theirs.FirstBlockCacheConfig(threshold=threshold),
        "mag_cache": lambda: theirs.MagCacheConfig(
            threshold=0.06, max_skip_steps=2, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
        ),
        "taylorseer": lambda: theirs.TaylorSeerCacheConfig(
            cache_interval=5, disable_cache_before_step=3, cache_identifiers=[rf".*\.({inside})"]
        ),
        "pyramid_attention_broadcast": lambda: theirs.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=now
        ),
        "faster_cache": lambda: theirs.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            attention_weight_callback=lambda _: 0.5,
            is_guidance_distilled=True,
            current_timestep_callback=now,
        ),
    }[method]()
    model: Any = work.model

    def run(given: list[dict[str, Any]]) -> torch.Tensor:
        model._reset_stateful_cache()
        out = torch.empty(0)
        with model.cache_context("bench"):
            for step[0], each in enumerate(given):
                (out, *_) = model(**each)
        return out

    model.enable_cache(config)
    try:
        yield run
    finally:
        model.disable_cache()


@contextlib.contextmanager
def cache_dit(work: Workload, method: str, threshold: float) -> Iterator[Run | None]:
    """cache-dit: its DBCache with one front block is the pattern of `first_block_cache`; nothing for other methods."""
    if method != "first_block_cache" or importlib.util.find_spec("cache_dit") is None:
        yield None
        return
    import cache_dit as theirs  # pyright: ignore[reportMissingImports]

    model: Any = work.model
    theirs.enable_cache(
        model,
        cache_config=theirs.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=0,
            residual_diff_threshold=threshold,
            num_inference_steps=STEPS,
        ),
    )

    def run(given: list[dict[str, Any]]) -> torch.Tensor:
        out = torch.empty(0)
        for each in given:
            (out, *_) = model(**each)
        return out

    try:
        yield run
    finally:
        theirs.disable_cache(model)
