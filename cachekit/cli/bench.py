"""`cachekit bench`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table
from torch import nn
from tqdm import tqdm

import cachekit as ck
from cachekit.cli import options
from cachekit.coverage.trial import tensors
from cachekit.diffusers.inputs import Draw
from cachekit.diffusers.zoo.specimen import wake
from cachekit.state import human_bytes


class Loop(NamedTuple):
    """One way through all steps."""

    name: str
    run: Callable[[], list[torch.Tensor]]  # the outputs of the first step
    computed: int  # of all steps; a step that leaves something out is not
    state_bytes: int


EXAMPLES = """\b
Examples:
  cachekit bench FluxTransformer2DModel --tiny --rounds 3
  cachekit bench FluxTransformer2DModel --compile --method taylorseer --set interval=4
  cachekit bench ./my-pipeline --height 480 --width 832 --json
"""


def bench(
    model: options.Model,
    config: options.Config = None,
    tiny: options.Tiny = False,
    method: options.Methods = None,
    settings: options.Settings = None,
    ratios: options.Ratios = None,
    steps: options.Steps = 28,
    height: options.Height = 1024,
    width: options.Width = 1024,
    frames: options.Frames = 81,
    batch: options.Batch = 1,
    dtype: options.Dtype = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile both sides: the model, and step.compile().")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Loops of each way, in turn.")] = 5,
    json_: options.Json = False,
) -> None:
    """Time a denoising loop of a model with and without every method, on this machine.

    Random weights: the times are those of the real model, the images are not, and how often a method with a threshold
    skips depends on them. All ways take turns; a figure is the median over rounds of the ratio to the uncached loop of
    the same round. The first loop of each, with what it compiles, is not in it.
    """
    options.runs_on(device)
    with options.refusals(), torch.no_grad():
        chosen = options.policies(method, settings, ratios)
        size = (batch, frames, height, width)
        if not tiny:
            _fits(options.subjects(model, config, tiny, size, dtype, "meta"), device)
        rows = []
        for subject in options.subjects(model, config, tiny, size, dtype, device):
            wake(subject.model, Draw(0))  # no gate stays zero
            subject.model.to(device)
            rows += _measure(subject, chosen, steps, rounds, device, compiled)
    about = {"device": _device_name(device), "torch": torch.__version__, "steps": steps, "rounds": rounds}
    if json_:
        typer.echo(json.dumps({**about, "compiled": compiled, "rows": rows}, indent=1))
    else:
        _show(rows, about)


def _fits(subjects: list[options.Subject], device: str) -> None:
    """Refuse what would only end in the machine's running out of memory."""
    for subject in subjects:
        needed = sum(each.numel() * each.element_size() for each in subject.model.parameters())
        free = _free(device)
        if needed > free:
            raise ck.ArgumentError(
                f"The weights of {subject.name} take {human_bytes(needed)}, {device} has {human_bytes(free)} free. "
                "Use a narrower --dtype, a --config with fewer layers, or --tiny."
            )


def _free(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _measure(
    subject: options.Subject, policies: dict[str, ck.Policy], steps: int, rounds: int, device: str, compiled: bool
) -> list[dict[str, Any]]:
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
    times = options.timesteps(len(given))

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


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def _show(rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    table = Table(box=None)
    for column in ("model", "method"):
        table.add_column(column)
    for column in ("computed", "x uncached", "range", "speed-up", "s a loop", "first s", "state"):
        table.add_column(column, justify="right")
    for row in rows:
        if "refused" in row:
            table.add_row(row["component"], row["method"], "refused")
            continue
        table.add_row(
            row["component"],
            row["method"],
            f"{row['computed']} of {row['steps']}",
            f"{row['ratio']:.3f}",
            f"{row['low']:.2f}..{row['high']:.2f}",
            f"{1 / row['ratio']:.2f}",
            f"{row['seconds']:.3f}",
            f"{row['first_seconds']:.1f}",
            human_bytes(row["state_bytes"]),
        )
    console = options.console()
    console.print(table)
    console.print(f"{about['device']}, torch {about['torch']}, {about['rounds']} rounds; first s: with compilation")
    if any(row.get("high", 1) > 1.2 * row.get("low", 1) for row in rows):
        console.print("Rounds differ by more than a fifth: the machine is busy, or the loop too short to time.")
    for row in rows:
        if "refused" in row:
            console.print(f"{row['method']}: {row['refused']}", markup=False, highlight=False)
