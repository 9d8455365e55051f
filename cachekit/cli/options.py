"""What several commands ask, and what they make of the answers.

Neither this file nor that of a command loads diffusers at its top: a command does when it runs, not for its help.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import cachekit as ck
from cachekit.errors import CacheError
from cachekit.running.opening import usable

METHODS: dict[str, Callable[..., ck.Policy]] = {
    "first_block_cache": ck.first_block_cache,
    "mag_cache": ck.mag_cache,
    "taylorseer": ck.taylorseer,
    "pyramid_attention_broadcast": ck.pyramid_attention_broadcast,
    "faster_cache": ck.faster_cache,
}

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder that diffusers has saved (a pipeline or a transformer), the id of one on the hub, or the name "
        "of a transformer class.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="JSON file with the configuration of a class; its defaults if not."),
]
Tiny = Annotated[bool, typer.Option("--tiny", help="A tiny configuration of the class, for trying things out.")]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help=f"One of {', '.join(METHODS)}; can be given more than once. All five if not."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Argument of the methods, as in Python: --set threshold=0.2"),
]
Ratios = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="For mag_cache, what MagRatios.save wrote; FLUX.1's if not."),
]
# Beyond these ends a slip of the finger would only fill the memory.
Steps = Annotated[int, typer.Option(min=2, max=10_000, help="Denoising steps.")]
Height = Annotated[int, typer.Option(min=16, max=32_768, help="In pixels.")]
Width = Annotated[int, typer.Option(min=16, max=32_768, help="In pixels.")]
Frames = Annotated[int, typer.Option(min=1, max=10_000, help="Of a video.")]
Batch = Annotated[int, typer.Option(min=1, max=4_096, help="Samples in one call of the model.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def console() -> Console:
    """As wide as the terminal; wide enough for every column where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=160)


@contextmanager
def refusals() -> Iterator[None]:
    """Errors that say what to do are printed without a traceback; the exit code is 1.

    What models say of themselves meanwhile, with random weights on a device of no substance, is not said.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CacheError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def policies(methods: list[str] | None, settings: list[str] | None, ratios: Path | None) -> dict[str, ck.Policy]:
    """The policies asked for."""
    given = dict(setting(each) for each in settings or ())
    if "ratios" in given:
        raise typer.BadParameter("ratios are in a file: --ratios FILE", param_hint="--set")
    unused, made = set(given), {}
    for name in methods or METHODS:
        if name not in METHODS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(METHODS)}", param_hint="--method")
        known = inspect.signature(METHODS[name]).parameters
        kwargs = {key: value for key, value in given.items() if key in known}
        unused -= set(kwargs)
        if name == "mag_cache":
            kwargs["ratios"] = ck.MagRatios.flux() if ratios is None else ck.MagRatios.load(ratios)
        if name == "faster_cache":
            kwargs.setdefault("cfg", None)  # the batch holds no unconditional half unless one says so
        made[name] = METHODS[name](**kwargs)
    if unused:
        raise typer.BadParameter(f"no method asked for has {', '.join(sorted(unused))}", param_hint="--set")
    return made


def dtype_of(name: str) -> torch.dtype:
    """The type of this name."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--dtype")
    return known[name]


def runs_on(device: str) -> None:
    """Refuse a device that is not here, or computes nothing."""
    try:
        kind = usable(device).type
    except ck.ArgumentError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    if kind == "meta":
        raise typer.BadParameter("nothing is computed on meta", param_hint="--device")


def writable(hint: str, path: Path | None) -> None:
    """Refuse a file that cannot be written before anything has run for it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.absolute().parent}", param_hint=hint)


def described(error: Exception) -> str:
    """The first line of what another library raised, and of which kind it is where that line says too little."""
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    return lines[0] if lines and isinstance(error, (OSError, ValueError)) else f"{kind}: {lines[0]}" if lines else kind


def setting(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` as Python has it."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, {"None": None, "True": True, "False": False}.get(value, value)


def timesteps(steps: int) -> list[float]:
    """Evenly spaced, on the scale 0..1000."""
    return [1000.0 * (1 - step / steps) for step in range(steps)]
