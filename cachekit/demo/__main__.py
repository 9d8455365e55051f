"""Sample digits with and without caches and report what is gained and lost: `python -m cachekit.demo`."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import cachekit as ck
from cachekit.demo import pictures, report
from cachekit.demo.runs import Trial, choose, record, run
from cachekit.demo.sample import GUIDANCE
from cachekit.demo.scores import Row, score, timed
from cachekit.demo.settings import UNCACHED, Setting, counts_of, settings
from cachekit.demo.verdict import gain, headline, measure
from cachekit.diffusers import digits
from cachekit.drawing import png

PACKAGES = ("torch", "diffusers", "scikit-learn", "matplotlib")


def main(argv: Sequence[str] | None = None, prog: str = "python -m cachekit.demo") -> None:
    """Run everything and write the report."""
    args = arguments(argv, prog)
    torch.set_num_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out {args.out} cannot be made: {error.strerror}")
    started = time.perf_counter()
    labels = torch.arange(digits.CLASSES).repeat(args.digits_per_class)
    model = digits.load(args.weights)

    trace, trials = trials_of(model, labels, args)
    trace.save(args.out / "digits.trace.safetensors")
    rows = score(trials, labels)
    sentences = headline(rows)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    sampled = (
        f"{len(labels)} digits, {args.steps} Euler steps of flow matching, guidance {GUIDANCE:g}, seed {args.seed}"
    )
    paces = f"{min(row.pace for row in rows):.3f} to {max(row.pace for row in rows):.3f} s, as means of the runs"
    system = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    facts = {
        "Model": f"a transformer of {size:.2f} M parameters, trained on scikit-learn's handwritten digits",
        "Sampling": f"{sampled}, float32, {'compiled' if args.compile else 'eager'}",
        "Timing": f"the sampling loop alone, after a warm-up, {args.threads} threads, all runs in one process",
        "Noise of the timing": f"a computed forward of the {len(labels)} digits took {paces}",
        "mag_cache, planned": "from one uncached run of 20 digits in other noise: digits.trace.safetensors",
        "chosen": "by runs of those digits: the best of three plans and two even intervals, where that is not planned",
        "Machine": system,
        "Versions": ", ".join([f"cachekit {ck.__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]),
    }

    written = write(args.out, rows, trials, trace, sentences, facts, args)
    if args.json:
        print(written)
        return
    print("\n".join([report.table(rows), *report.legend(rows), "", measure(rows), "", *sentences]))
    print(f"\nWrote {args.out / 'report.html'} after {time.perf_counter() - started:.0f} s.")


def arguments(argv: Sequence[str] | None, prog: str = "python -m cachekit.demo") -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Sample digits with and without caches; print a table and write a report.",
        epilog=f"For example: {prog} --short --out demo_output/short",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder of the report")
    parser.add_argument("--digits-per-class", type=int, help="samples of each digit (default: 4, short: 1)")
    parser.add_argument("--steps", type=int, help="Euler steps of the uncached run (default: 50, short: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--short", action="store_true", help="fewer digits, steps and settings: half a minute at most")
    parser.add_argument("--compile", action="store_true", help="compile every step first; takes many minutes more")
    parser.add_argument("--json", action="store_true", help="print what results.json holds instead of the table")
    parser.add_argument("--weights", type=Path, default=digits.WEIGHTS, help="of the digits model")
    args = parser.parse_args(argv)
    if args.digits_per_class is None:
        args.digits_per_class = 1 if args.short else 4
    if args.steps is None:
        args.steps = 20 if args.short else 50
    for name, least in (("digits_per_class", 1), ("steps", 10), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    return args


def trials_of(model: torch.nn.Module, labels: torch.Tensor, args: argparse.Namespace) -> tuple[ck.Trace, list[Trial]]:
    """The recording, and one trial of every setting."""
    with tqdm(unit="step", total=args.steps, mininterval=0.2, dynamic_ncols=True) as progress:
        progress.set_description("recording")
        # Noise of its own: recorded on what is judged, ratios and plans would know the answer.
        trace = record(model, args.steps, args.seed + 1, progress.update)
        progress.set_description("choosing")
        counts = counts_of(args.steps, args.short)
        progress.total += (1 + 5 * len(counts)) * args.steps  # at most
        chosen = choose(model, trace, counts, args.seed + 1, tick=progress.update)
        planned = settings(args.steps, trace, chosen, args.short)
        progress.total = progress.n + (2 if args.compile else 1) * sum(setting.steps for setting in planned)
        run(model, Setting(UNCACHED, "warm-up", 2), labels, args.seed)
        trials = []
        for setting in planned:
            progress.set_description(f"{setting.label:<38}")
            trials.append(run(model, setting, labels, args.seed, progress.update, args.compile))
    return trace, trials


def write(
    out: Path,
    rows: Sequence[Row],
    trials: Sequence[Trial],
    trace: ck.Trace,
    sentences: Sequence[str],
    facts: dict[str, str],
    args: argparse.Namespace,
) -> str:
    """Write report.html, its pictures as files, and results.json; what that holds."""
    reference = trials[0].samples
    policies = {trial.setting.label: trial.setting.policy for trial in trials if trial.setting.policy is not None}
    charts = {
        "pattern": pictures.pattern(rows),
        "speed": pictures.speed(rows),
        "front": pictures.front(rows, trace, policies),
    }
    images = {name: png(chart) for name, chart in charts.items()}
    for n, trial in enumerate(trials):
        images[f"samples/{n:02d}"] = pictures.samples(trial.samples, digits.CLASSES)
        images[f"differences/{n:02d}"] = pictures.differences(trial.samples, reference, digits.CLASSES)
    for name, image in images.items():
        path = out / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
    page = report.html(rows, sentences, measure(rows), facts, images, len(reference))
    (out / "report.html").write_text(page, encoding="utf-8")

    made: dict[str, Any] = {
        "seed": args.seed,
        "digits_per_class": args.digits_per_class,
        "steps": args.steps,
        "guidance": GUIDANCE,
        "threads": args.threads,
        "compiled": args.compile,
        "short": args.short,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "cachekit": ck.__version__,
            **{name: version(name) for name in PACKAGES},
        },
        "verdict": list(sentences),
        "speedups": "time" if timed(rows) else "work",
        "rows": [
            {
                "label": row.label,
                **row._asdict(),
                # JSON knows no infinity.
                "psnr": row.psnr if math.isfinite(row.psnr) else None,
                "worst": row.worst if math.isfinite(row.worst) else None,
                **gain(row, rows)._asdict(),
            }
            for row in rows
        ],
    }
    text = json.dumps(made, indent=1, allow_nan=False)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    return text


if __name__ == "__main__":
    main()
