"""Diffusers' own cache configs as policies."""

from __future__ import annotations

import builtins
import dataclasses
import dis
import math
import types
from collections.abc import Callable
from numbers import Real
from typing import Any

from diffusers.hooks.faster_cache import FasterCacheConfig
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from torch import nn

from cachekit import forecasters
from cachekit.errors import ArgumentError, ArgumentTypeError
from cachekit.methods import (
    faster_cache,
    first_block_cache,
    mag_cache,
    mag_calibration,
    pyramid_attention_broadcast,
    taylorseer,
)
from cachekit.methods._pyramid import broadcast
from cachekit.policy import Policy

EVERYWHERE = (-math.inf, math.inf)
KINDS = ("spatial", "temporal", "cross")


def from_config(config: Any) -> Policy:
    """The policy that one of diffusers' cache configs stands for, with the semantics of diffusers' hooks.

    `current_timestep_callback` is not asked: the timesteps of a trajectory are known. `num_inference_steps` neither:
    the ratios of `MagCacheConfig` are stretched to the number of steps that a call has. A callback is called once: a
    number that it reads from around it counts as it is now. A `FasterCacheConfig` with
    guidance becomes `cfg="batched"`; in `cached` and `enable` the way the pipeline calls its transformer decides.

    Args:
        config: a FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig, PyramidAttentionBroadcastConfig or
            FasterCacheConfig. It is not changed.

    Raises:
        ArgumentTypeError: `config` is none of these.
        ArgumentError: a field cannot be expressed: a callback that is more than a constant, say.

    Example:
        >>> from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
        >>> import cachekit.diffusers as ckd
        >>> ckd.from_config(FirstBlockCacheConfig(threshold=0.2)).name
        'first_block_cache(0.2)'
        >>> config = PyramidAttentionBroadcastConfig(
        ...     spatial_attention_block_skip_range=2,
        ...     cross_attention_block_skip_range=4,
        ...     current_timestep_callback=lambda: 0,
        ... )
        >>> ckd.from_config(config).name
        'pyramid_attention_broadcast(spatial 2, cross 4)'
    """
    for known, make in _MAKERS.items():
        if isinstance(config, known):
            return make(config)
    raise ArgumentTypeError(
        f"`config` must be one of {', '.join(known.__name__ for known in _MAKERS)}, got {type(config).__name__}. "
        "Give one of these, or a policy, e.g. cachekit.first_block_cache(0.1)."
    )


def is_config(value: Any) -> bool:
    """Whether `from_config` knows it."""
    return isinstance(value, tuple(_MAKERS))


def _first_block(config: FirstBlockCacheConfig) -> Policy:
    return first_block_cache(config.threshold, semantics="diffusers")


def _mag(config: MagCacheConfig) -> Policy:
    if config.calibrate:
        return mag_calibration()
    if config.mag_ratios is None:
        raise ArgumentError(
            "`mag_ratios` is None and `calibrate` is False. Give the ratios, or calibrate=True to measure them."
        )
    return mag_cache(
        config.mag_ratios,
        threshold=config.threshold,
        max_skips=config.max_skip_steps,
        retention=config.retention_ratio,
        semantics="diffusers",
    )


def _taylorseer(config: TaylorSeerCacheConfig) -> Policy:
    if config.skip_predict_identifiers and not config.use_lite_mode:
        raise ArgumentError(
            f"`skip_predict_identifiers` {config.skip_predict_identifiers!r} makes modules return zeros, which no site "
            "does here. Use use_lite_mode=True, which extrapolates what the model returns, or cache_identifiers alone."
        )
    identifiers = config.cache_identifiers
    # One pattern: a name among several that no module has is no error for the hooks.
    named = ("|".join(f"(?:{identifier})" for identifier in identifiers),) if identifiers else None
    sites = "output" if config.use_lite_mode else named
    dtype = config.taylor_factors_dtype
    policy = taylorseer(
        config.cache_interval,
        warmup=config.disable_cache_before_step,
        cooldown_after=config.disable_cache_after_step,
        order=config.max_order,
        dtype=dtype,
        sites=sites,
        semantics="diffusers",
    )
    # Without a type of their own the hooks store what the modules return as it is; `taylorseer` takes bfloat16 then.
    return policy if dtype is not None else dataclasses.replace(policy, forecaster=forecasters.taylor(config.max_order))


def _pyramid(config: PyramidAttentionBroadcastConfig) -> Policy:
    given: dict[str, Any] = {kind: getattr(config, f"{kind}_attention_block_skip_range") for kind in KINDS}
    if all(every is None for every in given.values()):
        given["spatial"] = 2  # as the hooks have it
    used = [kind for kind, every in given.items() if every is not None]
    ranges: dict[str, Any] = {kind: getattr(config, f"{kind}_attention_timestep_skip_range") for kind in KINDS}
    # In a range with nothing in it nothing is left out.
    intervals: dict[str, Any] = {
        kind: every if every is None or _some(ranges[kind]) else 1 for kind, every in given.items()
    }
    where: dict[str, Any] = {f"{kind}_range": each if _some(each) else EVERYWHERE for kind, each in ranges.items()}
    policy = pyramid_attention_broadcast(**intervals, **where, semantics="diffusers")
    fields = [f"{kind}_attention_block_identifiers" for kind in used]
    changed = [name for name in fields if tuple(getattr(config, name)) != tuple(_default(config, name))]
    if changed and len(used) > 1:
        raise ArgumentError(
            f"`{changed[0]}` {getattr(config, changed[0])!r} is given beside other kinds of attention, and names alone "
            "do not tell kinds apart. Use cachekit.pyramid_attention_broadcast(..., patterns={...}), one a kind."
        )
    # Kinds are found by what they do, among the modules that are named.
    deciders = {used[0]: policy.deciders[used[0]]} if changed else policy.decider
    return dataclasses.replace(policy, decider=deciders, sites=_searched(config, *fields))


def _faster(config: FasterCacheConfig) -> Policy:
    spatially = config.spatial_attention_block_skip_range or 1  # None leaves nothing out
    low, alpha_low = _weight(config, "low")
    high, alpha_high = _weight(config, "high")
    policy = faster_cache(
        spatially,
        attention_range=config.spatial_attention_timestep_skip_range,
        weight=0.5 if _unset(config.attention_weight_callback) else _constant(config, "attention_weight_callback"),
        uncond=config.unconditional_batch_skip_range,
        uncond_range=config.unconditional_batch_timestep_skip_range,
        low_range=low,
        high_range=high,
        alpha_low=alpha_low,
        alpha_high=alpha_high,
        layout=config.tensor_format,
        cfg=None if config.is_guidance_distilled else "batched",
        semantics="diffusers",
    )
    spatial = "spatial_attention_block_identifiers"
    every = config.temporal_attention_block_skip_range
    if every is not None:
        if any(
            tuple(getattr(config, name)) != tuple(_default(config, name))
            for name in (spatial, "temporal_attention_block_identifiers")
        ):
            raise ArgumentError(
                f"`{spatial}` and `temporal_attention_block_identifiers` cannot be changed where temporal attention "
                "has an interval too. Leave them as they are: kinds of attention are found by what they do."
            )
        temporal = broadcast("temporal", every, config.temporal_attention_timestep_skip_range)
        given = {"spatial": broadcast("attention", spatially, _spatial_range(config))}
        sites = _searched(config, spatial, "temporal_attention_block_identifiers")
        return dataclasses.replace(policy, decider={**given, "temporal": temporal}, sites=sites)
    return dataclasses.replace(policy, sites=_searched(config, spatial))


def _some(given: tuple[float, float]) -> bool:
    return given[0] < given[1]


def _spatial_range(config: FasterCacheConfig) -> tuple[float, float]:
    return config.spatial_attention_timestep_skip_range


def _weight(config: FasterCacheConfig, part: str) -> tuple[tuple[float, float], float]:
    """Where a weight of the frequencies changes, and the factor."""
    name = f"{part}_frequency_weight_callback"
    if _unset(getattr(config, name)):
        return getattr(config, f"{part}_frequency_weight_update_timestep_range"), getattr(
            config, f"alpha_{part}_frequency"
        )
    return EVERYWHERE, _constant(config, name)


def _unset(callback: Callable[..., Any] | None) -> bool:
    """Whether a callback is the default: none yet, or that which diffusers' hooks write into a config they use."""
    return callback is None or getattr(callback, "__module__", "") == FasterCacheConfig.__module__


def _constant(config: Any, name: str) -> float:
    """What a callback returns whenever it is called, or an error where that may depend on the time of the call."""
    callback = getattr(config, name)
    value = callback(nn.Identity()) if isinstance(callback, types.FunctionType) and _fixed(callback) else None
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    raise ArgumentError(
        f"`{name}` {callback!r} is not a function that returns the same number always, e.g. lambda module: 0.3. "
        'A weight that changes is a schedule: cachekit.faster_cache(weight=...), a number, "ramp" or a function of '
        "(step, steps); alpha_low and low_range, alpha_high and high_range for the frequencies."
    )


def _fixed(function: types.FunctionType) -> bool:
    """Whether a function reads nothing but numbers from around it, and changes none of them."""
    kept = {"STORE_GLOBAL", "STORE_DEREF", "DELETE_GLOBAL", "DELETE_DEREF"}
    if any(step.opname in kept for step in dis.get_instructions(function)):
        return False
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if not all(value is None or isinstance(value, (Real, str)) for value in defaults):
        return False
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    held = [cell.cell_contents for cell in cells.values()]
    for name in function.__code__.co_names:
        if name in function.__globals__:
            held.append(function.__globals__[name])
        elif name not in ("float", "int", "abs", "min", "max") or not hasattr(builtins, name):
            return False  # an attribute, or a function that may return anything
    return all(isinstance(value, Real) for value in held)


def _searched(config: Any, *fields: str) -> tuple[str, ...]:
    """One pattern for the whole names of parts of blocks in which an identifier of these fields is found."""
    identifiers = dict.fromkeys(each for field in fields for each in getattr(config, field))
    found = "|".join(f"(?:{identifier})" for identifier in identifiers)
    return (rf"(?=.*\.\d+\.).*(?:{found}).*",)


def _default(config: Any, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(config) if field.name == name)


_MAKERS: dict[type, Callable[[Any], Policy]] = {
    FirstBlockCacheConfig: _first_block,
    MagCacheConfig: _mag,
    TaylorSeerCacheConfig: _taylorseer,
    PyramidAttentionBroadcastConfig: _pyramid,
    FasterCacheConfig: _faster,
}
