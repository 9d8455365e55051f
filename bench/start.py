"""What it costs to begin: importing cachekit and asking its command line for help, beside importing torch.

Every row is a process of its own; all take turns, and the first round, which writes bytecode and fills the disk's
cache, does not count. A figure is the median over rounds of the ratio to `import torch` of the same round, in CPU time
spent in user mode: on a machine that others use, too, it says more than a clock does.

    python bench/start.py [--rounds 15] [--out DIR]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from records import record, write


class Start(NamedTuple):
    """Something that a process does and ends."""

    what: str
    arguments: tuple[str, ...]  # of Python
    target: float | None = None  # ratio to the first that is not to be exceeded


IMPORTS = (
    Start("import torch", ("-c", "import torch")),
    Start("import cachekit", ("-c", "import cachekit"), 1.2),
    Start("cachekit --help", ("-c", "from cachekit.cli import main; main()", "--help"), 1.5),
)


def user_seconds(start: Start) -> float:
    """User CPU time of one process, of those that it waits for included."""
    child = subprocess.Popen([sys.executable, *start.arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{start.what} failed with code {child.returncode}. What fails is not timed.")
    return used.ru_utime


def measure(starts: tuple[Start, ...], rounds: int) -> list[list[float]]:
    """Seconds of every one, in turn."""
    samples = [[user_seconds(start) for start in starts] for _ in range(rounds + 1)]
    return [list(found) for found in zip(*samples[1:], strict=True)]


def rows(starts: tuple[Start, ...], samples: list[list[float]]) -> list[dict[str, Any]]:
    """A row each, as ratios to the first."""
    made = []
    for start, found in zip(starts, samples, strict=True):
        low, middle, high = statistics.quantiles([a / b for a, b in zip(found, samples[0], strict=True)], n=4)
        seconds = statistics.median(found)
        made.append(
            {"what": start.what, "ratio": middle, "p25": low, "p75": high, "target": start.target, "seconds": seconds}
        )
    return made


def show(found: list[dict[str, Any]]) -> None:
    """Print a table."""
    print(f"{'what':<24} {'x first':>8} {'p25':>7} {'p75':>7} {'target':>7} {'user s':>8}")
    for row in found:
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        print(f"{row['what']:<24} {row['ratio']:>8.3f} {row['p25']:>7.3f} {row['p75']:>7.3f} {target:>7} ", end="")
        print(f"{row['seconds']:>8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="processes a row")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    options = parser.parse_args()
    made = record("cpu", options.rounds)
    made["rows"] = rows(IMPORTS, measure(IMPORTS, options.rounds))
    show(made["rows"])
    write(made, options.out, "start")


if __name__ == "__main__":
    main()
