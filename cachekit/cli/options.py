"""What several commands ask, and what they make of the answers."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import diffusers
import torch
import typer
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from rich.console import Console
from torch import nn

import cachekit as ck
from cachekit.diffusers import inputs, zoo
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
Steps = Annotated[int, typer.Option(min=2, help="Denoising steps.")]
Height = Annotated[int, typer.Option(min=16, help="In pixels.")]
Width = Annotated[int, typer.Option(min=16, help="In pixels.")]
Frames = Annotated[int, typer.Option(min=1, help="Of a video.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples in one call of the model.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class _Config(ConfigMixin):
    """The file that a model of any class keeps its configuration in."""

    config_name = "config.json"


class Subject(NamedTuple):
    """A model to look at."""

    name: str  # of the component, or of the class
    model: nn.Module
    inputs: Callable[[int], dict[str, Any]]  # step -> keyword arguments of the forward


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


def subjects(
    model: str, config: Path | None, tiny: bool, size: tuple[int, int, int, int], dtype: str, device: str
) -> list[Subject]:
    """Build what `MODEL` names, with random weights on `device`, and its inputs.

    Args:
        model, config, tiny, dtype: as the options of the same names.
        size: batch, frames, height and width, in frames and pixels.
        device: "meta" for a look at it that costs no memory.
    """
    kind = dtype_of(dtype)
    if tiny:
        return [_specimen(model)]
    return [_built(name, found, size, kind, device) for name, found in _configs(model, config)]


def _specimen(model: str) -> Subject:
    for name, (cls, _) in zoo.BUILDERS.items():
        if model in (name, cls.__name__):
            specimen = zoo.specimen(name)
            return Subject(cls.__name__, specimen.model, specimen.inputs)
    known = ", ".join(sorted({cls.__name__ for cls, _ in zoo.BUILDERS.values()}))
    raise typer.BadParameter(f"no tiny configuration of {model!r} is known, only of {known}", param_hint="--tiny")


def _configs(model: str, config: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """Name and configuration of every transformer that MODEL names."""
    path = Path(model)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return [(path.stem, _read(path))]
    if "/" not in model:
        found = _read(config) if config else {}
        return [(model, {**found, "_class_name": model})]
    try:
        index: Any = DiffusionPipeline.load_config(model)
        parts = [name for name, entry in index.items() if _is_transformer(name, entry)]
        configs: dict[str, Any] = {name: _Config.load_config(model, subfolder=name) for name in parts}
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise typer.BadParameter(
            f"{model!r} is no folder here, and the hub gave no pipeline of that name: {first}", param_hint="MODEL"
        ) from error
    if not configs:
        raise typer.BadParameter(f"the pipeline {model} has no transformer", param_hint="MODEL")
    return list(configs.items())


def _of_folder(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if (path / "model_index.json").is_file():
        index = _read(path / "model_index.json")
        found = [name for name, entry in index.items() if _is_transformer(name, entry)]
        if not found:
            raise typer.BadParameter(f"the pipeline in {path} has no transformer", param_hint="MODEL")
        return [(name, _read(path / name / "config.json")) for name in found]
    if (path / "config.json").is_file():
        return [(path.name, _read(path / "config.json"))]
    raise typer.BadParameter(f"{path} holds neither model_index.json nor config.json", param_hint="MODEL")


def _is_transformer(name: str, entry: Any) -> bool:
    return name.startswith("transformer") and isinstance(entry, (list, tuple)) and entry[0] == "diffusers"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} cannot be read as a configuration: {error}", param_hint="MODEL") from error


def _built(
    name: str, config: dict[str, Any], size: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> Subject:
    class_name = config.get("_class_name")
    if not isinstance(class_name, str) or not isinstance(getattr(diffusers, class_name, None), type):
        raise typer.BadParameter(f"diffusers has no class {class_name!r}", param_hint="MODEL")
    cls = getattr(diffusers, class_name)
    if not (issubclass(cls, nn.Module) and issubclass(cls, ConfigMixin)):
        raise typer.BadParameter(f"{class_name} is no model", param_hint="MODEL")
    kind = inputs.kind(class_name)
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    with warnings.catch_warnings(), torch.device(device), _default(dtype):
        warnings.simplefilter("ignore")
        try:
            model: Any = cls.from_config(settings)
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(f"{class_name} refuses its configuration: {error}", param_hint="MODEL") from error
    batch, frames, height, width = size
    for side, pixels in (("height", height), ("width", width)):
        if pixels % (2 * kind.pixels):
            raise typer.BadParameter(f"{pixels} is no multiple of {2 * kind.pixels}", param_hint=f"--{side}")
    cells = inputs.Size(
        batch=batch,
        frames=(frames - 1) // kind.frames + 1 if kind.frames else 1,
        height=height // kind.pixels,
        width=width // kind.pixels,
        text=kind.text,
    )
    moves = inputs.trajectory(inputs.feed(model.eval(), cells))
    place = "cpu" if device == "meta" else device  # a step is planned for where its arguments are
    return Subject(name, model, lambda step: inputs.moved(moves(step), place, dtype))


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
