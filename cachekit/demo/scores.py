"""What came of the runs: the rows of the table, and whether their seconds can be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from cachekit.demo.data import recognised
from cachekit.demo.metrics import psnr, ssim
from cachekit.demo.runs import Trial
from cachekit.demo.settings import FEWER, UNCACHED

PACE = 1.25
"""A run whose computed forwards take this many times the usual, or as many times less, was not alone or was lucky."""


class Row(NamedTuple):
    """The scores of a trial; its fields are those of results.json, where an infinite PSNR is null."""

    group: str
    detail: str
    series: str  # as `Setting.series`
    policy: str  # as cachekit names it, "" without a cache
    forecast: bool
    partial: bool  # whether the steps that are not computed still run a part of the model's blocks
    steps: int  # Euler steps
    computed: dict[str, tuple[bool, ...]]  # stream -> one a step
    computed_steps: float  # mean of the streams
    work: float  # multiplications, in those of a full step: of the uncached run as many as it has steps
    speedup_by_work: float  # speed-up against the uncached run by work, the same on every machine
    seconds: float
    pace: float  # mean seconds of a computed forward, which is the same work in every row
    busy: bool  # whether the machine did something else meanwhile, so that the seconds mean little
    speedup_by_time: float | None  # speed-up by seconds; unknown where the machine was busy during either run
    psnr: float  # dB against the uncached samples, mean of the images; infinite where they are identical
    worst: float  # PSNR of the image that is furthest off
    ssim: float
    recognised: float  # share of the digits

    @property
    def label(self) -> str:
        """Method and parameters."""
        return f"{self.group} {self.detail}"

    @property
    def cached(self) -> bool:
        """Whether a cache was at work."""
        return self.group not in (UNCACHED, FEWER)


def timed(rows: Sequence[Row]) -> bool:
    """Whether the seconds of a table can be trusted: then speed-ups are shown by time, otherwise by work.

    One run that was disturbed is enough to distrust them all: a chart has one axis, and whoever compares two rows must
    not have to ask which of them was measured how.
    """
    return not any(row.busy for row in rows)


def score(trials: Sequence[Trial], labels: Tensor) -> list[Row]:
    """The rows of the table. The first trial is the uncached one, which the others are held against."""
    reference, rows = trials[0], []
    usual = statistics.median(trial.pace for trial in trials)
    busy = [not usual / PACE < trial.pace < usual * PACE for trial in trials]
    for trial, disturbed in zip(trials, busy, strict=True):
        distances = psnr(trial.samples, reference.samples)
        rows.append(
            Row(
                group=trial.setting.group,
                detail=trial.setting.detail,
                series=trial.setting.series,
                policy=trial.setting.policy.name if trial.setting.policy else "",
                forecast=trial.setting.forecast,
                partial=trial.setting.partial,
                steps=trial.setting.steps,
                computed=trial.computed,
                computed_steps=sum(sum(stream) for stream in trial.computed.values()) / len(trial.computed),
                work=trial.work,
                speedup_by_work=reference.work / trial.work,
                seconds=trial.seconds,
                pace=trial.pace,
                busy=disturbed,
                speedup_by_time=None if disturbed or busy[0] else reference.seconds / trial.seconds,
                psnr=distances.mean().item(),
                worst=distances.min().item(),
                ssim=ssim(trial.samples, reference.samples),
                recognised=recognised(trial.samples, labels),
            )
        )
    return rows
