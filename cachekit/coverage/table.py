"""The table of all classes and methods: made, printed, saved, compared with an earlier one."""

from __future__ import annotations

import inspect
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import typer
from diffusers.models import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from cachekit.coverage.trial import METHODS, Finding, cover
from cachekit.diffusers import zoo

COMPILES = ", and `torch.compile(step, fullgraph=True)` makes one graph wherever it makes one of the uncached model"
MARKS = {"works": "✓", "refused": "–", "fails": "✗"}
OTHERS = {
    "Transformer2DModel": "a part of UNets",
    "DualTransformer2DModel": "a part of UNets",
    "TransformerTemporalModel": "a part of UNets",
    "DreamLiteTransformer2DModel": "a part of a UNet",
    "T5FilmDecoder": "predicts all at once, in no denoising loop of its own",
    "MiniMaxMusic3RVQDepthDecoder": "decodes, in no denoising loop",
    "RFD4ProteinaTransformer": "no tiny configuration of a protein is known here",
}
"""Classes among diffusers' transformers that are not tried, and why."""


def specimens(classes: Iterable[str] | None) -> tuple[str, ...]:
    """Names in the zoo of these classes, or of all."""
    if not classes:
        return zoo.NAMES
    chosen: list[str] = []
    for wanted in classes:
        found = [name for name, (cls, _) in zoo.BUILDERS.items() if wanted in (name, cls.__name__)]
        if not found:
            reason = OTHERS.get(wanted, "diffusers has no such transformer, or no tiny configuration of it is known")
            raise typer.BadParameter(f"{wanted}: {reason}", param_hint="CLASS")
        chosen += found
    return tuple(dict.fromkeys(chosen))


def untried() -> dict[str, str]:
    """Transformer classes of the installed diffusers that the zoo has no specimen of -> why."""
    tried = {cls for cls, _ in zoo.BUILDERS.values()}
    found = (value for value in vars(transformers).values() if inspect.isclass(value))
    left = {value.__name__ for value in found if issubclass(value, torch.nn.Module) and value not in tried}
    return {name: OTHERS.get(name, "no tiny configuration is known yet") for name in sorted(left)}


def cover_all(
    names: tuple[str, ...], methods: tuple[str, ...] = tuple(METHODS), *, compiled: bool = True, jobs: int = 1
) -> list[Finding]:
    """`cover` of every specimen, with a progress bar; in the order of `names`."""
    found: dict[str, list[Finding]] = {}
    with tqdm(total=len(names), unit="class", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for name, findings in _each(names, methods, compiled, jobs):
            found[name] = findings
            bar.set_description(f"{name:<24}")
            bar.update()
    return [finding for name in names for finding in found[name]]


def _each(
    names: tuple[str, ...], methods: tuple[str, ...], compiled: bool, jobs: int
) -> Iterator[tuple[str, list[Finding]]]:
    covered = partial(_covered, methods=methods, compiled=compiled)
    if len(names) == 1:
        yield covered(names[0])
        return
    # A process each: what one class leaves behind another one may share. Spawned: a fork of one that has run torch may
    # hang.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(covered, names)


def _covered(name: str, methods: tuple[str, ...], compiled: bool) -> tuple[str, list[Finding]]:
    return name, cover(name, methods, compiled=compiled)


def record(findings: Iterable[Finding], *, compiled: bool) -> dict[str, Any]:
    """All that was found, as plain values: specimen -> class and method -> finding."""
    rows: dict[str, Any] = {}
    for finding in findings:
        row = rows.setdefault(finding.specimen, {"class": finding.class_name, "methods": {}})
        row["methods"][finding.method] = {
            "verdict": finding.verdict,
            "reason": finding.reason,
            "pattern": finding.pattern,
        }
    versions = {name: version(name) for name in ("torch", "diffusers")}
    return {"versions": versions, "compiled": compiled, "rows": rows, "untried": untried()}


def totals(record: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Method -> on how many classes it works, of how many; of a class with several specimens, on all of them."""
    verdicts: dict[str, dict[str, bool]] = {}
    for row in record["rows"].values():
        for method, finding in row["methods"].items():
            by_class = verdicts.setdefault(method, {})
            by_class[row["class"]] = by_class.get(row["class"], True) and finding["verdict"] == "works"
    return {method: (sum(by_class.values()), len(by_class)) for method, by_class in verdicts.items()}


def lost(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What worked before and does not now; what was not tried now is passed over if this diffusers lacks the class."""
    found = []
    for name, row in before["rows"].items():
        for method, finding in row["methods"].items():
            if finding["verdict"] != "works" or name not in zoo.NAMES:
                continue
            latest = now["rows"].get(name, {}).get("methods", {}).get(method)
            if latest is None:
                found.append(f"{row['class']} ({name}), {method}: not tried")
            elif latest["verdict"] != "works":
                found.append(f"{row['class']} ({name}), {method}: {latest['verdict']}, {latest['reason']}")
    return found


def show(record: Mapping[str, Any], console: Console) -> None:
    """Print the table, the totals, and every reason."""
    methods = list(totals(record))
    table = Table(box=None)
    table.add_column("class")
    for method in methods:
        table.add_column(method, justify="center", overflow="fold", max_width=16)
    for name, row in record["rows"].items():
        shown = row["class"] if _only(record, row["class"]) else f"{row['class']} ({name})"
        table.add_row(shown, *(MARKS[row["methods"][method]["verdict"]] for method in methods))
    table.add_row("[bold]classes[/bold]", *(f"{works} of {count}" for works, count in totals(record).values()))
    console.print(table)
    for line in reasons(record):
        console.print(line, markup=False, highlight=False)


def reasons(record: Mapping[str, Any]) -> list[str]:
    """A line for every finding that is not simply "works"."""
    lines = []
    for name, row in record["rows"].items():
        said: dict[str, list[str]] = {}
        for method, finding in row["methods"].items():
            if finding["reason"]:
                said.setdefault(f"{finding['verdict']}: {finding['reason']}", []).append(method)
        alike = len(said) == 1 and len(next(iter(said.values()))) == len(row["methods"])
        for reason, methods in said.items():
            lines.append(f"{row['class']} ({name}), {'every method' if alike else ', '.join(methods)} {reason}")
    return lines


def markdown(record: Mapping[str, Any]) -> str:
    """The table as a page."""
    methods, versions = list(totals(record)), record["versions"]
    checked = "compiled too" if record["compiled"] else "not compiled"
    lines = [
        "# Which method works on which model",
        "",
        "Written by `python -m cachekit.coverage`: tiny configurations with random weights and open gates, "
        f"diffusers {versions['diffusers']}, torch {versions['torch']}, {checked}.",
        "",
        "A method works where its computed steps are the uncached model's to the bit, its skipped steps are finite and "
        "other ones" + (COMPILES if record["compiled"] else "") + ". The last column is the half of FasterCache that "
        "leaves out the unconditional half of a batch.",
        "",
        f"| class | {' | '.join(methods)} |",
        f"|---|{':-:|' * len(methods)}",
    ]
    for name, row in record["rows"].items():
        shown = f"`{row['class']}`" + ("" if _only(record, row["class"]) else f" ({name})")
        lines.append(f"| {shown} | {' | '.join(MARKS[row['methods'][method]['verdict']] for method in methods)} |")
    counted = (f"**{works} of {count}**" for works, count in totals(record).values())
    lines += [f"| **classes** | {' | '.join(counted)} |", "", "✓ works, – refused with a reason, ✗ fails.", ""]
    lines += ["## Reasons", "", *(f"- {_escaped(line)}" for line in reasons(record)), ""]
    lines += ["## Not tried", "", *(f"- `{name}`: {why}" for name, why in record["untried"].items()), ""]
    return "\n".join(lines)


def _only(record: Mapping[str, Any], class_name: str) -> bool:
    return sum(row["class"] == class_name for row in record["rows"].values()) == 1


def _escaped(line: str) -> str:
    return line.replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")
