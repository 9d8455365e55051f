"""`cachekit bench`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table

import cachekit as ck
from cachekit.cli import options
from cachekit.state import human_bytes

if TYPE_CHECKING:
    from cachekit.cli.models import Subject


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
    from cachekit.cli.models import subjects
    from cachekit.cli.timing import measure

    options.runs_on(device)
    with options.refusals(), torch.no_grad():
        chosen = options.policies(method, settings, ratios)
        size = (batch, frames, height, width)
        if not tiny:
            _fits(subjects(model, config, tiny, size, dtype, "meta"), device)
        rows = []
        for subject in subjects(model, config, tiny, size, dtype, device):
            rows += measure(subject, chosen, steps, rounds, device, compiled)
    about = {"device": _device_name(device), "torch": torch.__version__, "steps": steps, "rounds": rounds}
    if json_:
        typer.echo(json.dumps({**about, "compiled": compiled, "rows": rows}, indent=1))
    else:
        _show(rows, about)


def _fits(subjects: list[Subject], device: str) -> None:
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
