"""Two runs of a benchmark, row by row: what became slower.

    python bench/compare.py before.json after.json [--threshold 1.1]

Compares ratios to a row of the same run, which are comparable between machines, and efficiency and memory, which are so
on one kind of device. Exits with 1 where a figure is worse by more than the threshold, or is gone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

NAMES = ("model", "kernel", "method", "way", "action", "shape", "batch", "what", "steps")
LESS = ("ratio", "over_compiled", "state_bytes", "peak_bytes", "reserved_bytes")
MORE = ("efficiency", "of_copy")
"""Figures of which less is better, and those of which more is."""


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What row it is."""
    return tuple(str(row[name]) for name in NAMES if name in row)


def figures(row: dict[str, Any]) -> dict[str, float]:
    """The figures of a row; none of one that is only right or wrong."""
    return {name: row[name] for name in (*LESS, *MORE) if row.get(name) is not None}


def compare(before: dict[str, Any], after: dict[str, Any], threshold: float) -> tuple[list[str], bool]:
    """A line a figure, and whether all is well."""
    old, new = ({key(row): row for row in made["rows"]} for made in (before, after))
    lines, well = [], True
    for name, row in old.items():
        label = ", ".join(name)
        if name not in new:
            lines.append(f"{label:<80} {'':>10} gone")
            well = False
            continue
        found = figures(new[name])
        for kind, was in figures(row).items():
            if kind not in found:
                lines.append(f"{label:<80} {kind:>14} no figure any more")
                well = False
                continue
            now = found[kind]
            ratio = now / was if was else float("inf") if now else 1.0
            worse = not (ratio <= threshold if kind in LESS else ratio >= 1 / threshold)  # a NaN is worse
            well = well and not worse
            shown = f"{was:>12.6g} {now:>12.6g} {ratio:>8.3f}{'  WORSE' if worse else ''}"
            lines.append(f"{label:<80} {kind:>14} {shown}")
    lines += [f"{', '.join(name):<80} {'':>10} new" for name in new if name not in old]
    return lines, well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=1.1, help="how much worse a row may become")
    options = parser.parse_args()
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (options.before, options.after))
    devices: dict[Path, str] = {}
    for made, path in ((before, options.before), (after, options.after)):
        device = devices[path] = made.get("device", made["processor"])
        print(f"{path}: {made['date']}, commit {made['commit']}, torch {made['torch']}, {device}")
    if len(set(devices.values())) > 1:
        print("Not the same device: memory and efficiency are of each its own.")
    lines, well = compare(before, after, options.threshold)
    print("\n".join(lines))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
