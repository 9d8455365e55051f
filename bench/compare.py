"""Two runs of a benchmark, row by row: what became slower.

    python bench/compare.py before.json after.json [--threshold 1.1]

Compares what is comparable between machines: ratios to a row of the same run. Exits with 1 where a row is worse by more
than the threshold, or is gone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

NAMES = ("model", "kernel", "method", "way", "action", "shape", "batch")
FIGURES = ("ratio", "over_compiled")  # less is better; the one that is there


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What row it is."""
    return tuple(str(row[name]) for name in NAMES if name in row)


def figure(row: dict[str, Any]) -> tuple[str, float] | None:
    """The figure of a row, with its name; None for one that is only right or wrong."""
    return next(((name, row[name]) for name in FIGURES if name in row), None)


def compare(before: dict[str, Any], after: dict[str, Any], threshold: float) -> tuple[list[str], bool]:
    """A line a row, and whether all is well."""
    old, new = ({key(row): row for row in made["rows"]} for made in (before, after))
    lines, well = [], True
    for name, row in old.items():
        label = ", ".join(name)
        if name not in new:
            lines.append(f"{label:<80} {'':>10} gone")
            well = False
            continue
        first, second = figure(row), figure(new[name])
        if first is None:
            continue
        if second is None:
            lines.append(f"{label:<80} {'':>10} no figure any more")
            well = False
            continue
        (kind, was), (_, now) = first, second
        ratio = now / was if was else float("inf")
        worse = not ratio <= threshold  # a NaN is worse
        well = well and not worse
        lines.append(f"{label:<80} {kind:>14} {was:>10.4f} {now:>10.4f} {ratio:>8.3f}{'  WORSE' if worse else ''}")
    lines += [f"{', '.join(name):<80} {'':>10} new" for name in new if name not in old]
    return lines, well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=1.1, help="how much worse a row may become")
    options = parser.parse_args()
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (options.before, options.after))
    for made, path in ((before, options.before), (after, options.after)):
        device = made.get("device", made["processor"])
        print(f"{path}: {made['date']}, commit {made['commit']}, torch {made['torch']}, {device}")
    lines, well = compare(before, after, options.threshold)
    print("\n".join(lines))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
