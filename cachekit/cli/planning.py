"""`cachekit record`, `replay`, `plan` and `choose`: tune a model on one recording."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from tqdm import tqdm

import cachekit as ck
from cachekit.cli import options

RECORD = """\b
Examples:
  cachekit record digits --steps 50 --out digits.trace.safetensors
  cachekit record ./my-pipeline --prompt "a cat" --steps 28 --set guidance_scale=3.5 --out cat.trace.safetensors
"""
REPLAY = """\b
Examples:
  cachekit replay digits.trace.safetensors
  cachekit replay digits.trace.safetensors --method first_block_cache --at 0.05 --at 0.1 --at 0.2
  cachekit replay digits.trace.safetensors --picture front.png
"""
PLAN = """\b
Examples:
  cachekit plan digits.trace.safetensors --computed 13 --out digits-13.plan.json
  cachekit plan digits.trace.safetensors --speedup 2.5 --costs 1.0,0.05
  cachekit plan digits.trace.safetensors --error 0.01
"""
CHOOSE = """\b
Examples:
  cachekit choose digits.trace.safetensors digits --at-least "40 dB" --out digits.plan.json
  cachekit choose cat.trace.safetensors ./my-pipeline --prompt "a dog" --set guidance_scale=3.5 --at-least 30
  cachekit choose digits.trace.safetensors digits --computed 9 --refine 20
"""

Sampled = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder that diffusers has saved a pipeline in, the id of one on the hub, or `digits`, the small model "
        "that comes with cachekit.",
    ),
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="What to sample; can be given more than once. Digits: 0 to 9.")
]
Call = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Argument of the pipeline's call: --set guidance_scale=3.5"),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; the GPU where there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="Of a pipeline's weights: float32, bfloat16 or float16; bfloat16 if not.")
]
Recording = Annotated[Path, typer.Argument(metavar="TRACE", exists=True, dir_okay=False, help="What `record` wrote.")]
Forecaster = Annotated[
    str, typer.Option(help='What stands in between: "hold", "newton K", "newton K repaid", "taylor K", "two-point W".')
]
Site = Annotated[str, typer.Option(help='What is forecast: "output" or "chain".')]
Gap = Annotated[int | None, typer.Option(min=0, help="Steps in a row at most that are not computed.")]
Picture = Annotated[Path | None, typer.Option(dir_okay=False, help="Draw it into this PNG file; needs matplotlib.")]
PlanOut = Annotated[Path | None, typer.Option("--out", dir_okay=False, help="Write the plan to this JSON file.")]

SWEEPS: dict[str, tuple[float, ...]] = {
    "first_block_cache": (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.5),
    "mag_cache": (0.01, 0.02, 0.04, 0.06, 0.09, 0.12, 0.18, 0.24),
    "taylorseer": (2, 3, 4, 5, 6),
}
"""Settings that `replay` goes through: thresholds, budgets, intervals."""


def record(
    model: Sampled,
    out: Annotated[Path, typer.Option(dir_okay=False, help="File to write, e.g. flux.trace.safetensors.")],
    steps: options.Steps = 50,
    prompt: Prompts = None,
    given: Call = None,
    seed: Seed = 1,
    site: Annotated[list[str] | None, typer.Option(help='"output", "chain" or "probe"; all if not.')] = None,
    sketch: Annotated[int | None, typer.Option(min=1, help="How many numbers of a value to keep.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    picture: Picture = None,
    json_: options.Json = False,
) -> None:
    """Sample once without a cache, and write down all that replays and plans need: a file of some ten kilobytes."""
    from cachekit.cli.sources import source

    options.writable("--out", out)
    options.writable("--picture", picture)
    with options.refusals(), _progress("record", steps) as tick:
        policy = ck.recording(site or ("output", "chain", "probe"), sketch=sketch)
        trace = source(model, prompt, steps, seed, given, device, dtype, tick).record(policy)
        trace.save(out)
        if picture is not None:
            _draw(picture, lambda pictures: pictures.similarity(trace, trace.sites[0]))
    about = {"file": str(out), "bytes": out.stat().st_size, **_about(trace)}
    if json_:
        typer.echo(json.dumps(about, indent=1))
    else:
        streams = ", ".join(filter(None, trace.streams)) or "one"
        typer.echo(f"{out}: {len(trace)} steps, streams: {streams}; sites: {', '.join(trace.sites)}")


def replay(
    trace: Recording,
    method: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(SWEEPS)}; can be given more than once. All if not.")
    ] = None,
    at: Annotated[list[float] | None, typer.Option(help="Setting of the method; can be given more than once.")] = None,
    forecaster: Forecaster = "newton 1 repaid",
    picture: Picture = None,
    json_: options.Json = False,
) -> None:
    """What methods and their settings would have done to the recorded run, beside the best plans. No model runs.

    Settings are thresholds of first_block_cache, budgets of mag_cache (with the ratios of this recording), and
    intervals of taylorseer, here on whole chains. Settings that do nothing are told, and those next to a cliff.
    """
    for name in method or ():
        if name not in SWEEPS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(SWEEPS)}", param_hint="--method")
    options.writable("--picture", picture)
    if at and len(method or ()) != 1:
        raise typer.BadParameter("settings are of one method: name it with --method", param_hint="--at")
    with options.refusals():
        recorded = ck.Trace.load(trace)
        made = {
            "first_block_cache": ck.first_block_cache,
            "mag_cache": lambda budget: ck.mag_cache(recorded.mag_ratios(), threshold=budget, retention=0.0),
            "taylorseer": lambda interval: ck.taylorseer(_whole(interval), sites="chain"),
        }
        swept, said = {}, []
        for name in method or SWEEPS:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ck.TraceWarning)
                try:
                    swept[name] = ck.sweep(recorded, made[name], at or SWEEPS[name])
                except ck.ArgumentError as error:
                    if method:
                        raise
                    said.append(f"{name} is left out. {error}")
            said += [str(each.message) for each in caught]
        site = "output" if "output" in recorded.sites else "chain"
        plans = ck.frontier(recorded, forecaster=_forecaster(forecaster), site=site)
        if picture is not None:
            replays = {name: each.replays for name, each in swept.items()}
            _draw(picture, lambda pictures: pictures.front(plans, replays))
    rows = [
        {
            "method": name,
            "setting": setting,
            "policy": each.policy,
            "computed": {stream: list(nodes) for stream, nodes in each.computed.items()},
            "computed_steps": each.computed_steps,
            "error": _finite(each.error),
            "planned": plans[min(round(each.computed_steps), len(plans)) - 1].error,
        }
        for name, sweep in swept.items()
        for setting, each in zip(sweep.settings, sweep.replays, strict=True)
    ]
    if json_:
        typer.echo(json.dumps({**_about(recorded), "warnings": said, "rows": rows}, indent=1))
        return
    table = Table("method", "setting", "computed", "predicted error", "planned, as many steps", box=None)
    for row in rows:
        error = "-" if row["error"] is None else f"{row['error']:.3g}"
        planned = f"{row['planned']:.3g}"
        table.add_row(row["method"], f"{row['setting']:g}", f"{row['computed_steps']:g}", error, planned)
    options.console().print(table)
    for each in said:
        typer.secho(f"Note: {each}", err=True)


def plan(
    trace: Recording,
    computed: Annotated[int | None, typer.Option(min=1, help="Steps to compute.")] = None,
    speedup: Annotated[float | None, typer.Option(help="How many times faster all steps together are to be.")] = None,
    error: Annotated[float | None, typer.Option(help="Predicted error not to exceed, as a share of the way.")] = None,
    costs: Annotated[str, typer.Option(help="Of a computed step and of one that is not, for --speedup.")] = "1,0",
    forecaster: Forecaster = "newton 1 repaid",
    site: Site = "output",
    max_gap: Gap = None,
    out: PlanOut = None,
    picture: Picture = None,
    json_: options.Json = False,
) -> None:
    """The best steps to compute for a budget, found on the recording: of all plans the one with the least error."""
    options.writable("--out", out)
    options.writable("--picture", picture)
    with options.refusals():
        recorded = ck.Trace.load(trace)
        found = ck.plan(
            recorded,
            computed=computed,
            speedup=speedup,
            error=error,
            costs=_pair(costs),
            forecaster=_forecaster(forecaster),
            site=site,
            max_gap=max_gap,
        )
        if picture is not None:
            _draw(picture, lambda pictures: pictures.errors(recorded, {"planned": ck.planned(found)}))
    _give(found, out, json_)


def choose(
    trace: Recording,
    model: Sampled,
    at_least: Annotated[
        str | None, typer.Option(help='PSNR against the uncached samples to keep, e.g. "40 dB".')
    ] = None,
    computed: Annotated[int | None, typer.Option(min=1, help="Steps to compute, instead.")] = None,
    refine: Annotated[
        int, typer.Option(min=0, help="More runs, each with one step of the best plan so far moved.")
    ] = 0,
    peak: Annotated[float | None, typer.Option(help="Range of the data; that of the samples if not.")] = None,
    prompt: Prompts = None,
    given: Call = None,
    seed: Seed = 2,
    forecaster: Forecaster = "newton 1 repaid",
    site: Site = "output",
    max_gap: Gap = None,
    device: Device = None,
    dtype: Dtype = None,
    out: PlanOut = None,
    json_: options.Json = False,
) -> None:
    """The plan with the fewest computed steps that keeps a quality, or the best of so many, by a few real runs."""
    from cachekit.cli.sources import source

    options.writable("--out", out)
    with options.refusals():
        recorded = ck.Trace.load(trace)
        runs = 1 + 5 * (1 if computed else len(recorded).bit_length()) + refine  # at most
        with _progress("choose", runs * len(recorded)) as tick:
            subject = source(model, prompt, len(recorded), seed, given, device, dtype, tick)
            choice = ck.choose(
                recorded,
                subject.run,
                at_least,
                computed=computed,
                peak=peak,
                refine=refine,
                forecaster=_forecaster(forecaster),
                site=site,
                max_gap=max_gap,
            )
    measured = [
        {"computed": len(plan.steps), "psnr": _finite(quality), "origin": origin}
        for (plan, quality), origin in zip(choice.measured, choice.origins, strict=True)
    ]
    _give(choice.plan, out, json_, shown=str(choice), measured=measured)


def _give(plan: ck.Plan, out: Path | None, json_: bool, *, shown: str = "", **more: Any) -> None:
    if out is not None:
        plan.save(out)
    if json_:
        about = {"computed": list(plan.steps), "steps": len(plan), "error": plan.error, "forecaster": plan.forecaster}
        typer.echo(json.dumps({**about, "site": plan.site, "file": str(out) if out else None, **more}, indent=1))
    else:
        typer.echo(shown or str(plan))


def _about(trace: ck.Trace) -> dict[str, Any]:
    return {"steps": len(trace), "streams": list(trace.streams), "sites": list(trace.sites), "notes": {**trace.notes}}


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


def _forecaster(name: str) -> ck.forecasters.Forecaster:
    try:
        return ck.forecasters.named(name)
    except ck.ArgumentError as error:
        known = '"hold", "newton K", "newton K repaid", "taylor K", "two-point W"'
        raise typer.BadParameter(f"{name!r} is none of {known}", param_hint="--forecaster") from error


def _whole(number: float) -> int:
    if not float(number).is_integer():
        raise typer.BadParameter(f"an interval of taylorseer is whole, {number:g} is not", param_hint="--at")
    return int(number)


def _pair(text: str) -> tuple[float, float]:
    try:
        computed, skipped = (float(each) for each in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no pair of numbers, e.g. 1.0,0.05", param_hint="--costs") from error
    return computed, skipped


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[], object]]:
    with tqdm(total=total, desc=name, unit="step", mininterval=0.2, dynamic_ncols=True) as progress:
        yield progress.update
        progress.total = progress.n


def _draw(path: Path, draw: Callable[[Any], Any]) -> None:
    try:
        from cachekit.drawing import png
        from cachekit.planning import pictures
    except ModuleNotFoundError as error:
        raise ck.ArgumentError(f"--picture needs {error.name}: pip install 'cachekit[demo]'") from error
    path.write_bytes(png(draw(pictures)))
