"""What it costs to begin: importing, and finding out what a model looks like.

Of the first table every row is a process of its own; all take turns, and the first round, which writes bytecode and
fills the disk's cache, does not count. A figure is the median over rounds of the ratio to `import torch` of the same
round, in CPU time spent in user mode: on a machine that others use, too, it says more than a clock does.

The second is of one process and one thread: a model of the shape of FLUX.1-dev on the meta device, a new one every
round, beside one plain forward of it on meta; and the tiny one of the zoo, beside five of its steps. What the process
imports at its first `init` is imported before.

    python bench/start.py [--rounds 15] [--out DIR]
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from records import record, write
from torch import nn

import cachekit as ck
from cachekit.diffusers import zoo


class Start(NamedTuple):
    """Something that a process does and ends."""

    what: str
    arguments: tuple[str, ...]  # of Python
    target: float | None = None  # ratio to the first that is not to be exceeded


IMPORTS = (
    Start("import torch", ("-c", "import torch")),
    Start("import cachekit / torch", ("-c", "import cachekit"), 1.2),
    Start("cachekit --help / torch", ("-c", "from cachekit.cli import main; main()", "--help"), 1.5),
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


def flux() -> tuple[nn.Module, Callable[[int], dict[str, Any]]]:
    """A model of the shape of FLUX.1-dev, and its arguments for so many tokens of image: all on meta."""
    kind = torch.bfloat16
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel(guidance_embeds=True).eval()
    model.to(kind)

    def arguments(tokens: int) -> dict[str, Any]:
        shapes = {
            "hidden_states": (1, tokens, 64),
            "encoder_hidden_states": (1, 512, 4096),
            "pooled_projections": (1, 768),
            "timestep": (1,),
            "guidance": (1,),
            "img_ids": (tokens, 3),
            "txt_ids": (512, 3),
        }
        return {name: torch.empty(shape, dtype=kind, device="meta") for name, shape in shapes.items()}

    return model, arguments


def cpu_seconds(run: Callable[[], Any]) -> float:
    """CPU time of this process."""
    gc.collect()  # the rubbish of what was measured before is not on this one's account
    began = time.process_time()
    run()
    return time.process_time() - began


def begun() -> dict[str, tuple[float, float]]:
    """One round: what -> its seconds, and those of what it is compared with."""
    model, arguments = flux()
    here, larger = arguments(1024), arguments(4096)
    plain = cpu_seconds(lambda: model(**here))
    step = ck.cache(model, ck.first_block_cache(0.1))
    first = cpu_seconds(lambda: step.init(28, **here))
    other = ck.cache(model, ck.taylorseer())
    another = cpu_seconds(lambda: other.init(28, **here))
    programs = step.compile()
    compiled = cpu_seconds(lambda: programs.init(28, **here))
    resolution = cpu_seconds(lambda: step.init(28, **larger))
    tiny = zoo.specimen("Flux")
    steps = cpu_seconds(lambda: [tiny.model(**tiny.inputs(index)) for index in range(5)])
    small = cpu_seconds(lambda: ck.cache(tiny.model, ck.first_block_cache(0.1)).init(12, **tiny.inputs(0)))
    return {
        "first init / a forward": (first, plain),
        "another policy / first init": (another, first),
        "compile() / first init": (compiled, first),
        "another size / first init": (resolution, first),
        "first init, tiny / 5 steps": (small, steps),
    }


TARGETS = {
    "first init / a forward": 2.5,
    "another policy / first init": 0.1,
    "compile() / first init": 0.02,
    "another size / first init": 1.2,
}


@torch.no_grad()
def discovery(rounds: int) -> list[dict[str, Any]]:
    """A row for each thing that is found out."""
    torch.set_num_threads(1)
    begun()  # imports
    samples = [begun() for _ in range(rounds)]
    made = []
    for what in samples[0]:
        low, middle, high = statistics.quantiles([seconds / of for seconds, of in (s[what] for s in samples)], n=4)
        seconds = statistics.median(sample[what][0] for sample in samples)
        target = TARGETS.get(what)
        made.append({"what": what, "ratio": middle, "p25": low, "p75": high, "target": target, "seconds": seconds})
    return made


def show(found: list[dict[str, Any]]) -> None:
    """Print a table."""
    print(f"{'what':<28} {'ratio':>8} {'p25':>7} {'p75':>7} {'target':>7} {'CPU s':>8}")
    for row in found:
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        print(f"{row['what']:<28} {row['ratio']:>8.3f} {row['p25']:>7.3f} {row['p75']:>7.3f} {target:>7} ", end="")
        print(f"{row['seconds']:>8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="processes a row")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    options = parser.parse_args()
    made = record("cpu", options.rounds)
    made["rows"] = rows(IMPORTS, measure(IMPORTS, options.rounds)) + discovery(max(3, options.rounds // 3))
    show(made["rows"])
    write(made, options.out, "start")


if __name__ == "__main__":
    main()
