"""What `MODEL` of `cachekit explain` and `bench` names, built."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import typer
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from cachekit.cli.options import described, dtype_of
from cachekit.diffusers import inputs, zoo


class _Config(ConfigMixin):
    """The file that a model of any class keeps its configuration in."""

    config_name = "config.json"


class Subject(NamedTuple):
    """A model to look at."""

    name: str  # of the component, or of the class
    model: nn.Module
    inputs: Callable[[int], dict[str, Any]]  # step -> keyword arguments of the forward


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
    except Exception as error:
        raise typer.BadParameter(
            f"{model!r} is no folder here, and the hub gave no pipeline of that name: {described(error)}",
            param_hint="MODEL",
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
        except Exception as error:  # whatever a class makes of numbers that it cannot be built with
            reason = f"{class_name} refuses its configuration: {described(error)}"
            raise typer.BadParameter(reason, param_hint="MODEL") from error
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
