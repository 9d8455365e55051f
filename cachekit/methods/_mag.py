"""MagCache: a calibrated curve of residual magnitudes says how far reuse can go.

Source: MagCache, arXiv 2506.09045 (https://github.com/Zehong-Ma/MagCache), and the hooks of diffusers.

Departures: every chain of blocks holds its own residual, so a model whose blocks are interleaved with other
computation is answered correctly, where one residual over the whole span counts that computation twice. The FLUX
script of the authors never reuses interpolated step 11; no reason is given and it is not done here. Both semantics
have the rule `error <= threshold`; the authors' Wan script has `<`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachekit import deciders, forecasters, signals
from cachekit.errors import ArgumentError, ArgumentTypeError, StateError, check_version
from cachekit.forecasters import Forecaster
from cachekit.methods._first_block import check_forecaster, check_semantics
from cachekit.policy import Policy
from cachekit.state import State, summary

FORMAT = 1
FLUX = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359),
    0.89062,
)


@dataclass(frozen=True)
class MagRatios:
    """Calibrated magnitude ratios of one checkpoint under one scheduler.

    Attributes:
        ratios: `gamma_s`, one a step of the calibration run; the first is 1.
        model: name of the checkpoint, for people.
        scheduler: what the ratios were calibrated under, for people.

    Example:
        >>> import cachekit as ck
        >>> ck.MagRatios.flux().steps
        28
    """

    ratios: tuple[float, ...]
    model: str = ""
    scheduler: str = ""

    @property
    def steps(self) -> int:
        """How many steps the calibration run had."""
        return len(self.ratios)

    @classmethod
    def flux(cls) -> MagRatios:
        """The published ratios of FLUX.1 at 28 steps (MagCache README)."""
        return cls(ratios=FLUX, model="FLUX.1-dev", scheduler="flow matching Euler, 28 steps")

    @classmethod
    def from_state(cls, state: State, *, model: str = "", scheduler: str = "") -> MagRatios:
        """The ratios that a run under `mag_calibration` has logged.

        Raises:
            StateError: the trajectory is not finished, or was not run under `mag_calibration`.
        """
        log = summary(state)
        if log.steps < len(log.timesteps):
            raise StateError(
                f"`state` has done {log.steps} of {len(log.timesteps)} steps. Calibrate over the whole trajectory."
            )
        if not all(log.computed) or any(signal != signal for signal in log.signal):
            raise StateError("`state` holds no magnitude ratios. Run the trajectory under mag_calibration().")
        return cls(ratios=(1.0, *log.signal[1:]), model=model, scheduler=scheduler)

    def save(self, path: str | Path) -> None:
        """Write JSON: ratios, steps, model, scheduler, version."""
        record = {
            "version": FORMAT,
            "model": self.model,
            "scheduler": self.scheduler,
            "steps": self.steps,
            "ratios": list(self.ratios),
        }
        Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> MagRatios:
        """Read what `save` wrote.

        Raises:
            ArgumentError: the file is no record of ratios, or of a version this release does not know.
        """
        try:
            record: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            version, ratios = record["version"], record["ratios"]
            if not isinstance(ratios, list) or any(isinstance(ratio, (bool, str)) for ratio in ratios):
                raise TypeError("`ratios` is no list of numbers")
            checked = deciders.check_ratios(ratios)
            steps = record.get("steps", len(ratios))
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(
                f"`path` {str(path)!r} holds no magnitude ratios ({error!r}). Save them again."
            ) from error
        check_version(path, version, FORMAT)
        if steps != len(ratios):
            raise ArgumentError(f"`path` {str(path)!r} has {len(ratios)} ratios for {steps} steps. Save them again.")
        model, scheduler = str(record.get("model", "")), str(record.get("scheduler", ""))
        return cls(ratios=tuple(checked.tolist()), model=model, scheduler=scheduler)


def mag_cache(
    ratios: MagRatios | Sequence[float] | Tensor,
    *,
    threshold: float = 0.06,
    max_skips: int = 3,
    retention: float = 0.2,
    interpolation: str = "nearest",
    forecaster: Forecaster | None = None,
    semantics: str = "paper",
) -> Policy:
    """Reuse whole chains of blocks while the calibrated error budget lasts. The plan is known before the loop.

    A reused step runs no block: every chain returns its input plus the forecast residual.

    Args:
        ratios: calibrated ratios, from `MagRatios.from_state`, `MagRatios.load` or `MagRatios.flux`, or numbers.
        threshold: error budget; 0.06 is diffusers' default, the authors use 0.24 on FLUX and 0.12 on Wan.
        max_skips: reused steps in a row at most (K); 0 never reuses.
        retention: share of the trajectory that computes at the start.
        interpolation: `"nearest"` or `"log"`, for another number of steps than calibrated.
        forecaster: what to return instead; None repeats the last residual.
        semantics: `"diffusers"` accumulates in float32, as its hooks do; `"paper"` in float64.

    Raises:
        ArgumentError, ArgumentTypeError: a value is out of range, or `ratios` is empty, negative or NaN.

    Example:
        >>> import cachekit as ck
        >>> policy = ck.mag_cache(ck.MagRatios.flux(), threshold=0.24, max_skips=5, retention=0.1)
        >>> sum(ck.deciders.plan(policy.decider, 28))
        8
    """
    check_semantics(semantics)
    check_forecaster(forecaster)
    if isinstance(ratios, (str, bytes, Path)):
        raise ArgumentTypeError(f"`ratios` must be MagRatios or numbers, got {ratios!r}. Use MagRatios.load(path).")
    decider = deciders.magnitude_budget(
        ratios.ratios if isinstance(ratios, MagRatios) else ratios,
        threshold=threshold,
        max_skips=max_skips,
        retention=retention,
        interpolation=interpolation,
        dtype=torch.float32 if semantics == "diffusers" else torch.float64,
    )
    name = f"{threshold:g}, max_skips={max_skips}" + (f", {forecaster.name}" if forecaster else "")
    return Policy(name=f"mag_cache({name})", decider=decider, forecaster=forecaster or forecasters.hold())


def mag_calibration() -> Policy:
    """Never reuse; log the ratio of each step's residual norm to the step before, mean over tokens.

    With several chains the mean goes over the tokens of all of them. Read the ratios with
    `MagRatios.from_state(state)` after the last step.

    Source: MagCache, arXiv 2506.09045, equation 3.
    """
    return Policy(
        name="mag_calibration()",
        decider=deciders.always(),
        forecaster=forecasters.hold(),
        signal=signals.norm_ratio,
    )
