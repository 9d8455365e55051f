"""`cachekit coverage`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cachekit.cli import options

EXAMPLES = """\b
Examples:
  cachekit coverage FluxTransformer2DModel WanTransformer3DModel
  cachekit coverage --jobs 2 --save coverage.json --markdown coverage.md
  cachekit coverage --no-compile --against coverage.json
"""


def coverage(
    classes: Annotated[
        list[str] | None, typer.Argument(metavar="[CLASS]...", help="Classes of diffusers; all of them if not.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option("--method", help="A column of the table; all if not.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Try torch.compile too: it takes most of the time.")
    ] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Processes; each runs on one thread.")] = 1,
    markdown: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the table to this file.")] = None,
    save: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the findings to this JSON file.")] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Fail where a method worked in this JSON file and no longer does."
        ),
    ] = None,
    json_: options.Json = False,
) -> None:
    """Try every method on every transformer class of the installed diffusers and on some others, and print what works.

    Tiny configurations with random weights. A method works where its computed steps are the uncached ones to the bit,
    its skipped steps are finite and other ones, and a compiled step is one graph wherever the uncached model is one.
    Where neither a class nor a method is named, quantised weights are tried in every way to run as well, of those
    libraries of the extra `quant` that are installed.
    """
    from cachekit.coverage import table

    names = table.specimens(classes)
    unknown = [name for name in method or () if name not in table.METHODS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(table.METHODS)}", param_hint="--method")
    options.writable("--save", save)
    options.writable("--markdown", markdown)
    before = _read(against) if against is not None else None
    findings = table.cover_all(names, tuple(method or table.METHODS), compiled=compiled, jobs=jobs)
    weighed = [] if classes or method or not compiled else table.cover_weights(jobs)
    record = table.record(findings, compiled=compiled, weighed=weighed)
    if save is not None:
        save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if markdown is not None:
        markdown.write_text(table.markdown(record), encoding="utf-8")
    if json_:
        typer.echo(json.dumps(record, indent=1))
    else:
        table.show(record, options.console())
    lost = table.lost(before, record) if before is not None else []
    for each in lost:
        typer.secho(f"Lost: {each}", fg="red", err=True)
    if lost or any(finding.verdict == "fails" for finding in (*findings, *weighed)):
        raise typer.Exit(1)


def _read(path: Path) -> dict[str, Any]:
    """Findings that were saved."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for row in (*found["rows"].values(), *found.get("weights", {}).values()):
            if not isinstance(row["class"], str) or not row["methods"]:
                raise ValueError("a row is empty")
            if not all(isinstance(finding["verdict"], str) for finding in row["methods"].values()):
                raise ValueError("a finding has no verdict")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise typer.BadParameter(f"{path} holds no findings ({error!r})", param_hint="--against") from error
