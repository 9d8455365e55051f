"""The table of all classes and methods: made, printed, saved, compared with an earlier one."""

from __future__ import annotations

import inspect
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import typer
from diffusers.models import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from cachekit.coverage import trial, weights
from cachekit.coverage.trial import METHODS, Finding
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
    """Names in the zoo of these classes, or of all, those that are not in diffusers last."""
    if not classes:
        return (*zoo.NAMES, *zoo.FOREIGN)
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
    """`trial.cover` of every specimen, with a progress bar; in the order of `names`."""
    return _each(partial(trial.cover, methods=methods, compiled=compiled), names, jobs, "class")


def cover_weights(jobs: int = 1) -> list[Finding]:
    """`weights.cover` of all weights whose packages are installed, with a progress bar."""
    return _each(weights.cover, tuple(filter(weights.installed, weights.WEIGHTS)), jobs, "weights")


def _each(cover: Callable[[str], list[Finding]], names: tuple[str, ...], jobs: int, unit: str) -> list[Finding]:
    found: dict[str, list[Finding]] = {}
    with tqdm(total=len(names), unit=unit, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for name, findings in _in_turn(cover, names, jobs):
            found[name] = findings
            bar.set_description(f"{name:<24}")
            bar.update()
    return [finding for name in names for finding in found[name]]


def _in_turn(
    cover: Callable[[str], list[Finding]], names: tuple[str, ...], jobs: int
) -> Iterator[tuple[str, list[Finding]]]:
    covered = partial(_covered, cover)
    if len(names) == 1:
        yield covered(names[0])
        return
    # A process each: what one class leaves behind another one may share. Spawned: a fork of one that has run torch may
    # hang.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(covered, names)


def _covered(cover: Callable[[str], list[Finding]], name: str) -> tuple[str, list[Finding]]:
    return name, cover(name)


def record(findings: Iterable[Finding], *, compiled: bool, weighed: Sequence[Finding] = ()) -> dict[str, Any]:
    """All that was found, as plain values.

    Args:
        findings: of `cover_all`.
        compiled: whether the compiler was tried.
        weighed: of `cover_weights`.

    Returns:
        `rows`: specimen -> class and method -> finding; `weights`: weights -> package and way to run -> finding.
    """
    versions = {name: version(name) for name in ("torch", "diffusers")}
    found = {"versions": versions, "compiled": compiled, "rows": _rows(findings), "untried": untried()}
    return {**found, "weights": _rows(weighed), "missing": _missing()} if weighed else found


def _rows(findings: Iterable[Finding]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for finding in findings:
        row = rows.setdefault(finding.specimen, {"class": finding.class_name, "methods": {}})
        row["methods"][finding.method] = {
            "verdict": finding.verdict,
            "reason": finding.reason,
            "pattern": finding.pattern,
        }
    return rows


def _missing() -> dict[str, str]:
    """Weights that were not tried -> the package that makes them."""
    return {name: kind.package for name, kind in weights.WEIGHTS.items() if not weights.installed(name)}


def totals(record: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Method -> on how many classes of diffusers it works, of how many; of a class with several specimens, on all."""
    return _counts({name: row for name, row in record["rows"].items() if name not in zoo.SHAPES})


def _counts(rows: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    verdicts: dict[str, dict[str, bool]] = {}
    for row in rows.values():
        for method, finding in row["methods"].items():
            by_class = verdicts.setdefault(method, {})
            by_class[row["class"]] = by_class.get(row["class"], True) and finding["verdict"] == "works"
    return {method: (sum(by_class.values()), len(by_class)) for method, by_class in verdicts.items()}


def lost(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What worked before and does not now; passed over is what cannot be tried: a class that this diffusers lacks, a
    package that is not installed.
    """
    found = []
    for part in ("rows", "weights"):
        for name, row in before.get(part, {}).items():
            there = name in zoo.BUILDERS if part == "rows" else part in now and name not in now["missing"]
            for method, finding in row["methods"].items() if there else ():
                if finding["verdict"] != "works":
                    continue
                latest = now[part].get(name, {}).get("methods", {}).get(method)
                if latest is None:
                    found.append(f"{row['class']} ({name}), {method}: not tried")
                elif latest["verdict"] != "works":
                    found.append(f"{row['class']} ({name}), {method}: {latest['verdict']}, {latest['reason']}")
    return found


class _Section(NamedTuple):
    """One table."""

    title: str
    head: str  # of its first column
    labels: dict[str, str]  # name of a row -> what it is called
    rows: Mapping[str, Any]
    about: str


def _sections(record: Mapping[str, Any]) -> list[_Section]:
    known = {name: row for name, row in record["rows"].items() if name not in zoo.SHAPES}
    classes = [row["class"] for row in known.values()]
    labels = {
        name: row["class"] if classes.count(row["class"]) == 1 else f"{row['class']} ({name})"
        for name, row in known.items()
    }
    foreign = {name: row for name, row in record["rows"].items() if name in zoo.SHAPES}
    weighed = record.get("weights", {})
    shapes = "In the shape of " + "; ".join(f"{zoo.SHAPES[name]} (`{name}`)" for name in foreign) + "."
    compared = (
        f"`first_block_cache` and `taylorseer`, compiled with the backend `{weights.BACKEND}` (GGUF: Inductor). A way "
        "to run works where computed steps are those of the same model uncached, to the bit (GGUF, compiled: to "
        f"{weights.TOLERANCE:g}), and skipped ones are finite and other ones."
    )
    found = [
        _Section("Classes of diffusers", "class", labels, known, ""),
        _Section("Models that are not in diffusers", "model", {name: name for name in foreign}, foreign, shapes),
        _Section(
            "Weights, and ways to run",
            "weights",
            {name: row["class"] for name, row in weighed.items()},
            weighed,
            compared,
        ),
    ]
    return [section for section in found if section.rows]


def show(record: Mapping[str, Any], console: Console) -> None:
    """Print the tables, the totals, and every reason."""
    for section in _sections(record):
        counts = _counts(section.rows)
        table = Table(box=None, title=section.title)
        table.add_column(section.head)
        for method in counts:
            table.add_column(method, justify="center", overflow="fold", max_width=16)
        for name, label in section.labels.items():
            table.add_row(label, *_marks(section.rows[name], counts))
        table.add_row("[bold]works on[/bold]", *(f"{works} of {count}" for works, count in counts.values()))
        console.print(table)
    for line in reasons(record):
        console.print(line, markup=False, highlight=False)
    for name, package in record.get("missing", {}).items():
        console.print(f"{name} not tried: {package} is not installed.", markup=False, highlight=False)


def _marks(row: Mapping[str, Any], methods: Iterable[str]) -> list[str]:
    return [MARKS[row["methods"][method]["verdict"]] if method in row["methods"] else "" for method in methods]


def reasons(record: Mapping[str, Any]) -> list[str]:
    """A line for every finding that is not simply "works"."""
    lines = []
    for section in _sections(record):
        for name, label in section.labels.items():
            said: dict[str, list[str]] = {}
            findings = section.rows[name]["methods"]
            for column, finding in findings.items():
                if finding["reason"]:
                    said.setdefault(f"{finding['verdict']}: {finding['reason']}", []).append(column)
            for reason, columns in said.items():
                every = len(columns) == len(findings) > 1
                lines.append(f"{label}, {'everything' if every else '; '.join(columns)} {reason}")
    return lines


def markdown(record: Mapping[str, Any]) -> str:
    """The tables as a page."""
    versions = record["versions"]
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
        "✓ works, – refused with a reason, ✗ fails.",
        "",
    ]
    for section in _sections(record):
        counts = _counts(section.rows)
        lines += [f"## {section.title}", ""] + ([section.about, ""] if section.about else [])
        lines += [f"| {section.head} | {' | '.join(counts)} |", f"|---|{':-:|' * len(counts)}"]
        for name, label in section.labels.items():
            lines.append(f"| {_code(label, section.head)} | {' | '.join(_marks(section.rows[name], counts))} |")
        counted = (f"**{works} of {count}**" for works, count in counts.values())
        lines += [f"| **works on** | {' | '.join(counted)} |", ""]
    lines += ["## Reasons", "", *(f"- {_escaped(line)}" for line in reasons(record)), ""]
    lines += ["## Not tried", "", *(f"- `{name}`: {why}" for name, why in record["untried"].items())]
    lines += [f"- {name}: {package} was not installed" for name, package in record.get("missing", {}).items()]
    return "\n".join([*lines, ""])


def _code(label: str, head: str) -> str:
    """A name of a class as code, with what stands behind it."""
    name, parenthesis, rest = label.partition(" (")
    return label if head == "weights" else f"`{name}`{parenthesis}{rest}"


def _escaped(line: str) -> str:
    return line.replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")
