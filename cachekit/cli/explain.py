"""`cachekit explain`."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import typer
from tqdm import tqdm

import cachekit as ck
from cachekit.cli import options

EXAMPLES = """\b
Examples:
  cachekit explain FluxTransformer2DModel
  cachekit explain ./my-pipeline --method taylorseer --set interval=4 --steps 50
  cachekit explain WanTransformer3DModel --config config.json --height 480 --width 832 --json
"""


def explain(
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
    json_: options.Json = False,
) -> None:
    """What a method would do to a model: sites, bytes of state, plan. Nothing is computed, no weights are loaded."""
    from cachekit.cli.models import subjects

    with options.refusals(), torch.no_grad():
        chosen = options.policies(method, settings, ratios)
        size = (batch, frames, height, width)
        models = subjects(model, config, tiny, size, dtype, "meta")
        times, record = options.timesteps(steps), []
        pairs = [(subject, name) for subject in models for name in chosen]
        with tqdm(pairs, unit="method", dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty()) as bar:
            for subject, name in bar:
                bar.set_description(f"{name:<28}")
                entry: dict[str, Any] = {"component": subject.name, "method": name}
                try:
                    said = str(found := ck.cache(subject.model, chosen[name]).explain(times, **subject.inputs(0)))
                    entry |= found.to_dict()
                except ck.CacheError as error:
                    said = f"{subject.name} under {chosen[name].name}\nrefused: {error}"
                    entry |= {"policy": chosen[name].name, "refused": str(error)}
                record.append(entry)
                if name == "mag_cache" and ratios is None and "refused" not in entry:
                    said += "\nplanned with the ratios of FLUX.1; calibrate yours with mag_calibration()"
                if not json_:
                    tqdm.write(f"{said}\n")
    if json_:
        typer.echo(json.dumps(record, indent=1))
    if all("refused" in entry for entry in record):
        raise typer.Exit(1)
