"""The pictures of the documents, drawn from runs of the digits model: `python docs/pictures.py`, or `make docs`.

The last one shows what the demo measured. Its rows are kept in docs/demo.json, so that drawing needs no demo run;
`python docs/pictures.py --demo demo_output/results.json` takes them from a new one.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import cachekit as ck
from cachekit.demo.pictures import COLOURS, speed
from cachekit.demo.runs import record
from cachekit.demo.sample import timesteps
from cachekit.demo.scores import Row
from cachekit.diffusers import digits
from cachekit.drawing import INK, TRACK, plain
from cachekit.planning import pictures as planning
from cachekit.planning.replay import deviations, way

HERE = Path(__file__).parent
Facts = dict[str, Any]
"""What a picture shows, by row: a pattern, or numbers. It is written into the file, so that a test can compare."""
STEPS, THRESHOLD = 50, 0.12
KEPT = ("group", "detail", "series", "forecast", "partial", "computed_steps", "work", "busy", "psnr", "worst")
KEPT += ("speedup_by_work", "speedup_by_time")
"""Of a row of the demo."""
SHORT = {"pyramid_attention_broadcast": "pyramid attention"}

# Text stays text: small files, and readable for whoever cannot see. No date and no chance in the file.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cachekit", "font.family": "sans-serif"})


class Loop:
    """One digit of each class, by Euler steps without guidance."""

    def __init__(self, steps: int = STEPS) -> None:
        self.model: nn.Module = digits.load()
        self.labels = torch.arange(digits.CLASSES)
        self.times = timesteps(steps)
        shape = (digits.CLASSES, 1, 1, digits.SIZE, digits.SIZE)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run(self, policy: ck.Policy) -> list[ck.State]:
        """The states after every step."""
        step, x, states = ck.cache(self.model, policy), self.noise, []
        state = step.init(1000 * self.times[:-1], **digits.inputs(x, self.times[0], self.labels))
        for now, after in pairwise(self.times):
            (velocity,), state = step(state, **digits.inputs(x, now, self.labels))
            states.append(state)
            x = x + (after - now) * velocity
        return states

    @torch.no_grad()
    def plan(self, policy: ck.Policy) -> ck.Plan | None:
        """The plan, where there is one, of the kinds of modules that the model has."""
        step = ck.cache(self.model, policy)
        step.init(1000 * self.times[:-1], **digits.inputs(self.noise, self.times[0], self.labels))
        return step.plan(1000 * self.times[:-1])


def residuals(loop: Loop) -> list[Tensor]:
    """What all blocks together add, at every step of an uncached run: a state holds it."""
    states = loop.run(ck.step_mask([True] * (len(loop.times) - 1)))
    return [next(iter(state.sites.values()))[0].value for state in states]


def gap(value: Tensor, reference: Tensor) -> float:
    """The relative L1 distance, as signals have it."""
    return ((value - reference).abs().sum() / reference.abs().sum()).item()


# One picture a function ---------------------------------------------------------------------------------------------


def patterns(loop: Loop) -> tuple[Figure, Facts]:
    """The signal of first_block_cache against its threshold, and the pattern of every method below."""
    ratios = ck.MagRatios.from_state(loop.run(ck.mag_calibration())[-1])
    log = ck.summary(loop.run(ck.first_block_cache(THRESHOLD))[-1])
    rows: list[tuple[str, str, Sequence[bool]]] = [
        ("first_block_cache", f"first_block_cache({THRESHOLD})", log.computed)
    ]
    static = {
        "mag_cache": ck.mag_cache(ratios, max_skips=2),
        "taylorseer": ck.taylorseer(5),
        "pyramid_attention_broadcast": ck.pyramid_attention_broadcast(2, cross=4),
        "faster_cache": ck.faster_cache(cfg="separate"),
        "step_mask": ck.step_mask([step % 5 == 0 for step in range(len(loop.times) - 1)]),
    }
    for group, policy in static.items():
        plan = loop.plan(policy)
        assert plan is not None
        for kind, computed in (plan.kinds or {"": plan.computed}).items():
            rows.append((group, f"{SHORT.get(group, group)}{', ' if kind else ''}{kind}", computed))

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.2, 1))
    signal = [min(value, 0.2) for value in log.signal]
    for computed, label in ((True, "over it: computed"), (False, "under it: reused")):
        at = [step for step, each in enumerate(log.computed) if each == computed and step]
        colour = COLOURS["first_block_cache"] if computed else "white"
        above.scatter(at, [signal[step] for step in at], s=26, color=colour, edgecolor=COLOURS["first_block_cache"])
        above.scatter([], [], s=26, color=colour, edgecolor=COLOURS["first_block_cache"], label=label)
    above.axhline(THRESHOLD, color=COLOURS["mag_cache"], linewidth=1.2, label=f"threshold {THRESHOLD}")
    above.set_ylim(0, 0.2)
    above.set_ylabel("change of the first\nblock's residual", fontsize=9, color=INK)
    above.legend(loc="lower right", ncols=3, frameon=False, fontsize=9)
    for y, (group, _, computed) in enumerate(rows):
        below.barh(y, len(computed), left=-0.5, height=0.7, color=TRACK)
        at = [step - 0.42 for step, each in enumerate(computed) if each]
        below.barh([y] * len(at), 0.84, left=at, height=0.7, color=COLOURS[group])
    below.set_yticks(range(len(rows)), [label for _, label, _ in rows], fontsize=9)
    below.invert_yaxis()
    below.set_xlabel("step; filled: computed", fontsize=9, color=INK)
    for axes in (above, below):
        plain(axes)
    below.spines[:].set_visible(False)
    facts = {label: "".join("#" if each else "." for each in computed) for _, label, computed in rows}
    return figure, {**facts, "signal": _rounded(log.signal[1:])}


def drift(found: Sequence[Tensor], loop: Loop) -> tuple[Figure, Facts]:
    """How far what the blocks add moves from step to step, and the first block's part of it."""
    log = ck.summary(loop.run(ck.first_block_cache(0))[-1])
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(found))
    for distance, style in ((1, "-"), (2, "--"), (4, ":")):
        moved = [gap(found[step], found[step - distance]) for step in steps if step >= distance]
        at = [step for step in steps if step >= distance]
        axes.plot(
            at, moved, style, color=COLOURS["mag_cache"], label=f"all blocks, {distance} step{'s' * (distance > 1)}"
        )
    axes.plot(steps, log.signal[1:], color=COLOURS["first_block_cache"], label="the first block, 1 step")
    return figure, _finished(axes, "step", "relative change\nof the residual", columns=2)


def forecasts(found: Sequence[Tensor]) -> tuple[Figure, Facts]:
    """How wrong every forecaster is, so many steps after the last computed one: the mean over starting points."""
    forecasters = {
        "hold": (ck.forecasters.hold(), "first_block_cache"),
        "two_point(0.5)": (ck.forecasters.two_point(0.5), "faster_cache"),
        "taylor(1)": (ck.forecasters.taylor(1), "taylorseer"),
        "newton(2)": (ck.forecasters.newton(2), "step_mask"),
    }
    spacing, most = 3, 6
    starts = range(3 * spacing, len(found) - most, 2)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, (forecaster, colour) in forecasters.items():
        wrong = torch.zeros(most)
        for start in starts:
            state = forecaster.init(found[0])
            for step in range(start - 3 * spacing, start + 1, spacing):  # the computed steps
                state = forecaster.update(state, found[step], _clock(step, len(found)))
            for ahead in range(1, most + 1):
                guess = forecaster.predict(state, _clock(start + ahead, len(found)))
                wrong[ahead - 1] += gap(guess, found[start + ahead]) / len(starts)
        axes.plot(range(1, most + 1), wrong.tolist(), marker="o", markersize=4, color=COLOURS[colour], label=name)
    below = "steps since the last computed one; the ones before were 3 apart"
    return figure, _finished(axes, below, "relative error\nof the residual")


def pareto(kept: Sequence[dict[str, Any]]) -> tuple[Figure, Facts]:
    """PSNR against computed steps and against speed-up, as the demo measured them: its own chart."""
    nothing = dict.fromkeys(Row._fields)
    # Infinite in the demo, which JSON cannot say.
    rows = [Row(**{**nothing, **row, "psnr": math.inf if row["psnr"] is None else row["psnr"]}) for row in kept]
    return speed(rows), {row.label: row.psnr if math.isfinite(row.psnr) else "the reference" for row in rows}


def tuning(trace: ck.Trace) -> dict[str, tuple[Figure, Facts]]:
    """The pictures of the page on tuning, from one recording."""
    newton, count = ck.forecasters.newton(1, repay=True), round(0.26 * len(trace))
    every = [step % (len(trace) // count + 1) == 0 for step in range(len(trace))]
    plan = ck.plan(trace, computed=count)
    policies = {
        f"planned, {count} computed": ck.planned(plan),
        f"evenly, {sum(every)} computed": ck.step_mask(every, forecaster=newton, sites="output"),
    }
    plans = ck.frontier(trace)
    settings = {"first_block_cache": (0.05, 0.07, 0.1, 0.14, 0.2, 0.3), "mag_cache": (0.02, 0.04, 0.06, 0.09, 0.12)}
    made = {
        "first_block_cache": ck.first_block_cache,
        "mag_cache": lambda budget: ck.mag_cache(trace.mag_ratios(), threshold=budget, retention=0.0),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ck.TraceWarning)
        replays = {name: ck.sweep(trace, made[name], each).replays for name, each in settings.items()}
    points = {name: _rounded([each.error for each in found]) for name, found in replays.items()}
    points |= {f"{name}, computed": [each.computed_steps for each in found] for name, found in replays.items()}
    predicted = {name: round(ck.replay(trace, policy).error, 5) for name, policy in policies.items()}
    return {
        "similarity": (planning.similarity(trace), {"last to first": _rounded([_cosine(trace)])[0]}),
        "errors": (planning.errors(trace, policies), {"plan": list(plan.steps), **predicted}),
        "front": (planning.front(plans, replays), {"planned": [round(each.error or 0, 5) for each in plans], **points}),
    }


def repaid(trace: ck.Trace) -> tuple[Figure, Facts]:
    """How far off a run is by every step, as forecasts are and as they are repaid."""
    nodes = ck.plan(trace, computed=round(0.26 * len(trace))).steps
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, repay, colour in (
        ("newton(1)", False, "taylorseer"),
        ("newton(1, repay=True)", True, "first_block_cache"),
    ):
        off, back = deviations(len(trace), nodes, ck.forecasters.newton(1, repay=repay))
        so_far = ((off + back) * trace.step_sizes[:, None]).cumsum(0)
        wrong = trace.norm("output", so_far) / way(trace, "output")
        axes.plot(range(len(trace)), wrong.tolist(), ".-", color=COLOURS[colour], label=name)
    for node in nodes:
        axes.axvline(node, color=TRACK, zorder=0)
    return figure, _finished(axes, "step; the lines: computed", "error so far,\nof the whole way")


def _cosine(trace: ck.Trace) -> float:
    gram = trace.gram("output")
    return float(gram[-1, 0] / (gram[0, 0] * gram[-1, -1]).sqrt())


def _clock(step: int, steps: int) -> ck.forecasters.Clock:
    return ck.forecasters.Clock(step=torch.tensor(float(step)), steps=torch.tensor(float(steps)))


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _finished(axes: Axes, x: str, y: str, columns: int = 1) -> Facts:
    """With labels, a legend and an axis from zero; and what its lines show."""
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.set_ylim(0)
    axes.legend(frameon=False, fontsize=9, ncols=columns)
    plain(axes)
    drawn = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): _rounded(list(line.get_ydata())) for line in drawn}  # type: ignore[arg-type]


def keep(results: Path) -> None:
    """Take the rows of a run of the demo for the documents."""
    made = json.loads(results.read_text(encoding="utf-8"))
    about = {name: made[name] for name in ("steps", "digits_per_class", "guidance", "seed", "threads", "versions")}
    rows = [json.dumps({name: _short(row[name]) for name in KEPT}) for row in made["rows"]]
    text = json.dumps(about)[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}\n"
    (HERE / "demo.json").write_text(text, encoding="utf-8")


def _short(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def draw(folder: Path, steps: int = STEPS) -> list[Path]:
    """Draw all pictures into a folder."""
    loop = Loop(steps)
    found = residuals(loop)
    figures = {"patterns": patterns(loop), "drift": drift(found, loop), "forecasts": forecasts(found)}
    trace = record(loop.model, steps, seed=1)
    figures |= tuning(trace)
    figures["repaid"] = repaid(trace)
    figures["pareto"] = pareto(json.loads((HERE / "demo.json").read_text(encoding="utf-8"))["rows"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (figure, facts) in figures.items():
        about = {"Date": None, "Description": json.dumps(facts)}
        figure.savefig(folder / f"{name}.svg", facecolor="white", metadata=about)
    return [folder / f"{name}.svg" for name in figures]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw them where the documents look for them."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the documents.")
    parser.add_argument("--demo", type=Path, help="results.json of a run of the demo; default: the rows kept here")
    parser.add_argument("--out", type=Path, default=HERE / "pictures", help="folder of the pictures")
    args = parser.parse_args(argv)
    if args.demo is not None:
        keep(args.demo)
    for path in draw(args.out):
        print(path)


if __name__ == "__main__":
    main()
