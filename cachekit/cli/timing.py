"""What `cachekit bench` measures."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import cachekit as ck
from cachekit.cli.models import Subject
from cachekit.cli.options import timesteps
from cachekit.coverage.trial import tensors
from cachekit.diffusers.inputs import Draw
from cachekit.diffusers.zoo.specimen import wake


class Loop(NamedTuple):
    """One way through all steps."""

    name: str
    run: Callable[[], list[torch.Tensor]]  # the outputs of the first step
    computed: int  # of all steps; a step that leaves something out is not
    state_bytes: int


def measure(
    subject: Subject, policies: dict[str, ck.Policy], steps: int, rounds: int, device: str, compiled: bool
) -> list[dict[str, Any]]:
    """Time a model with random weights, uncached and under every policy: a row of figures each."""
    wake(subject.model, Draw(0))  # no gate stays zero
    subject.model.to(device)
    given = [subject.inputs(step) for step in range(steps)]
    loops, refused = [_uncached(subject.model, given, compiled)], []
    for name, policy in policies.items():
        try:
            loops.append(_cached(name, subject.model, policy, given, compiled))
        except ck.CacheError as error:
            refused.append({"component": subject.name, "method": name, "refused": str(error)})
    seconds: list[list[float]] = [[] for _ in loops]
    first: list[float] = []
    with tqdm(total=len(loops) * (rounds + 1), unit="loop", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        outputs = []
        for loop in loops:
            bar.set_description(f"{loop.name:<28} first")
            took, out = _timed(loop.run, device)
            first.append(took)
            outputs.append(out)
            bar.update()
        for loop, out in zip(loops, outputs, strict=True):
            _check(loop.name, out, outputs[0])
        for _ in range(rounds):
            for loop, found in zip(loops, seconds, strict=True):
                bar.set_description(f"{loop.name:<28}")
                found.append(_timed(loop.run, device)[0])
                bar.update()
    rows = []
    for loop, found, took in zip(loops, seconds, first, strict=True):
        shares = [a / b for a, b in zip(found, seconds[0], strict=True)]
        rows.append(
            {
                "component": subject.name,
                "method": loop.name,
                "steps": steps,
                "computed": loop.computed,
                "ratio": statistics.median(shares),
                "low": min(shares),
                "high": max(shares),
                "seconds": statistics.median(found),
                "first_seconds": took,
                "state_bytes": loop.state_bytes,
            }
        )
    return rows + refused


def _uncached(model: nn.Module, given: list[dict[str, Any]], compiled: bool) -> Loop:
    call = torch.compile(model) if compiled else model

    def run() -> list[torch.Tensor]:
        outputs = [tensors(call(**kwargs)) for kwargs in given]
        return outputs[0]

    return Loop("uncached", run, len(given), 0)


def _cached(name: str, model: nn.Module, policy: ck.Policy, given: list[dict[str, Any]], compiled: bool) -> Loop:
    step = ck.cache(model, policy)
    call = step.compile() if compiled else step
    times = timesteps(len(given))

    def run() -> tuple[list[torch.Tensor], ck.State]:
        state, first = call.init(times, **given[0]), []
        for index, kwargs in enumerate(given):
            out, state = call(state, **kwargs)
            if index == 0:
                first = [tensor.clone() for tensor in tensors(out)]
        return first, state

    log = ck.summary(run()[1])
    return Loop(name, lambda: run()[0], sum(log.computed), log.state_bytes)


def _check(name: str, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """A wrong result is not timed: the first step computes everything, so it must be the uncached one."""
    for one, other in zip(ours, theirs, strict=True):
        error = (one.float() - other.float()).norm() / other.float().norm()
        if not error < 0.02:
            raise ck.StateError(f"{name}: the first step is off by {error:.1e} relative. A wrong result is not timed.")


def _timed(run: Callable[[], list[torch.Tensor]], device: str) -> tuple[float, list[torch.Tensor]]:
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    out = run()
    wait()
    return time.perf_counter() - start, out
