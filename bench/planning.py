"""What planning takes, and what it gives: `python bench/planning.py`; see README.md beside it.

Two parts. `speed`: the search, and the replay of one policy, at 50 and 100 steps. `quality`: plans from one recording
of the digits model, as they are, and chosen and refined by runs of the recorded digits, run on other digits and other
noise, beside every method of the guide at its own numbers of computed steps, TaylorSeer at all of them; how well
predicted errors rank real runs; and what a plan from a recording of another length costs.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from records import record, write
from torch import Tensor
from tqdm import tqdm

import cachekit as ck
from cachekit.demo import runs
from cachekit.demo.metrics import psnr
from cachekit.demo.runs import run
from cachekit.demo.settings import FEWER, UNCACHED, Setting
from cachekit.diffusers import digits

STEPS = 50
BUDGETS = range(8, 31)
FEW = (8, 13, 19, 26, 28)
"""Budgets of methods that leave out a small part of a step."""
REFINE = 20
"""Runs that are spent on a chosen plan."""
RESULTS = Path(__file__).with_name("results")


def main() -> None:
    parser = argparse.ArgumentParser(description="What planning takes, and what it gives.")
    parser.add_argument("parts", nargs="*", help="speed, quality; both if not given")
    parser.add_argument("--seeds", type=int, default=5, help="runs of every setting, each of other digits and noise")
    parser.add_argument("--digits", type=int, default=20, help="samples of a run")
    parser.add_argument(
        "--plans", type=int, default=30, help="random plans whose predicted errors are held against runs"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of the runs, a thread each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of planning.json")
    args = parser.parse_args()
    made = record("cpu", args.seeds)
    if not args.parts or "speed" in args.parts:
        made["rows"] = speed()
    if not args.parts or "quality" in args.parts:
        made["quality"] = quality(args.seeds, args.digits, args.plans, args.jobs)
    write(made, args.out, "planning")


# Speed --------------------------------------------------------------------------------------------------------------


def walk(steps: int) -> ck.Trace:
    """A trace of values that drift, with a probe."""
    generator = torch.Generator().manual_seed(0)
    values = list(torch.randn(steps, 64, generator=generator).cumsum(0))
    times = [1000 * (1 - step / steps) for step in range(steps)]
    output, probe = ck.Trace.of(values, times), ck.Trace.of(values, times, site="probe")
    streams = {"": {**output.streams[""], **probe.streams[""], "rest": output.streams[""]["output"]}}
    return ck.Trace(streams, output.timesteps, output.step_sizes)


def speed() -> list[dict[str, Any]]:
    """Seconds of a search for all budgets, and of one replay: medians."""
    rows = []
    for steps in (50, 100):
        trace = walk(steps)
        for order, repay in ((0, False), (1, False), (1, True), (2, False)):
            forecaster = ck.forecasters.newton(order, repay=repay)
            seconds = [_timed(lambda: ck.frontier(trace, forecaster=forecaster)) for _ in range(3)]  # noqa: B023
            rows.append({"what": f"plan, {forecaster.name}", "steps": steps, "seconds": statistics.median(seconds)})
        every = [step % 4 == 0 for step in range(steps)]
        for policy in (mask(every), ck.first_block_cache(0.3)):
            ck.replay(trace, policy)
            seconds = [_timed(lambda: ck.replay(trace, policy)) for _ in range(100)]  # noqa: B023
            name = policy.name.partition("(")[0]
            rows.append({"what": f"replay, {name}", "steps": steps, "seconds": statistics.median(seconds)})
    for row in rows:
        print(f"{row['what']:<28} {row['steps']:>4} steps {1000 * row['seconds']:>10.2f} ms")
    return rows


def _timed(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# Quality ------------------------------------------------------------------------------------------------------------


def methods(trace: ck.Trace) -> Iterator[Setting]:
    """Every method of the guide at several settings."""
    for threshold in (0.06, 0.08, 0.1, 0.16, 0.2):
        yield Setting("first_block_cache", f"{threshold:g}", STEPS, ck.first_block_cache(threshold))
    for budget, skips in ((0.03, 2), (0.06, 2), (0.06, 3), (0.12, 4), (0.2, 6)):
        policy = ck.mag_cache(trace.mag_ratios(), threshold=budget, max_skips=skips, retention=0.0)
        yield Setting("mag_cache", f"{budget:g} ({skips})", STEPS, policy)
    for warmup in (2, 3):
        for interval in (2, 3, 4, 5, 6, 7):
            output = ck.taylorseer(interval, warmup=warmup, sites="output")
            yield Setting("taylorseer, output", f"{interval} ({warmup})", STEPS, output)
            if warmup == 2:
                yield Setting("taylorseer", f"{interval} ({warmup})", STEPS, ck.taylorseer(interval, warmup=warmup))
    # Even intervals that end in computed steps, as many as the number of them leaves.
    for budget in BUDGETS:
        shortest = math.ceil(STEPS / budget)
        for name, sites, interval, order, warmup in (
            ("taylorseer, output", "output", shortest, 1, 1),
            ("taylorseer, output", "output", shortest + 1, 1, 1),
            ("taylorseer 2, output", "output", shortest, 2, 1),
            ("taylorseer 3, output", "output", shortest, 3, 3),
            ("taylorseer", "attention+mlp", shortest, 1, 1),
            *(
                ((f"taylorseer, {kind}", kind, shortest, 1, 1) for kind in ("attention", "mlp"))
                if budget in FEW
                else ()
            ),
        ):
            for after in range(STEPS + 1):
                policy = ck.taylorseer(interval, order=order, warmup=warmup, cooldown_after=after, sites=sites)
                if sum(ck.deciders.plan(policy.deciders["all"], STEPS)) == budget:
                    yield Setting(name, f"{interval} ({warmup}, {after})", STEPS, policy)
                    break
    for spatial, cross in ((2, None), (2, 4), (3, 6)):
        policy = ck.pyramid_attention_broadcast(spatial, cross=cross)
        yield Setting("pyramid_attention_broadcast", f"{spatial} ({cross})", STEPS, policy)
    for cross in (2, 4, 7):
        policy = ck.pyramid_attention_broadcast(None, cross=cross, cross_range=(-1, 1001))
        yield Setting("pyramid_attention_broadcast", f"None ({cross})", STEPS, policy)
    yield Setting("faster_cache", "2 (5)", STEPS, ck.faster_cache(cfg="separate", layout="BCFHW"))


def mask(computed: list[bool]) -> ck.Policy:
    """With the forecaster and site of the plans."""
    return ck.step_mask(computed, forecaster=ck.forecasters.newton(1, repay=True), sites="output")


def quality(seeds: int, count: int, plans: int, jobs: int) -> dict[str, Any]:
    """PSNR of plans and methods over seeds, and how predicted errors rank runs."""
    model = digits.load()
    trace = runs.record(model, STEPS, seed=1)
    found = ck.frontier(trace, most=max(BUDGETS))
    bare = ck.frontier(trace, most=max(BUDGETS), forecaster=ck.forecasters.newton(1))
    plans_by = {
        "planned, not repaid": {f"{budget}": bare[budget - 1] for budget in BUDGETS},
        "planned": {f"{budget}": found[budget - 1] for budget in BUDGETS},
        **choices(model, trace, jobs),
    }
    settings = [
        Setting(group, budget, STEPS, ck.planned(plan))
        for group, by_budget in plans_by.items()
        for budget, plan in by_budget.items()
    ]
    settings += methods(trace)
    settings += [Setting(FEWER, f"{steps}", steps) for steps in (10, 13, 19, 25, 30)]
    generator = torch.Generator().manual_seed(0)
    random = [_random(generator) for _ in range(plans)]
    masks = [
        Setting("random", f"{n}", STEPS, mask([step in nodes for step in range(STEPS)]))
        for n, nodes in enumerate(random)
    ]
    trials = [(setting, seed) for seed in range(10, 10 + seeds) for setting in settings]
    trials += [(setting, 10) for setting in masks]

    @functools.cache
    def uncached(seed: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(digits.CLASSES, (count,), generator=torch.Generator().manual_seed(seed))
        return labels, run(model, Setting(UNCACHED, "", STEPS), labels, seed).samples

    def tried(trial: tuple[Setting, int]) -> tuple[float, float, float]:
        """PSNR, computed steps, and work in full steps."""
        setting, seed = trial
        labels, reference = uncached(seed)
        made = run(model, setting, labels, seed)
        computed = [sum(stream) for stream in made.computed.values()]
        return psnr(made.samples, reference).mean().item(), sum(computed) / len(computed), made.work

    keys = [(setting.label, seed) for setting, seed in trials]
    scores = dict(zip(keys, in_processes(tried, trials, jobs, "run"), strict=True))
    rows = [
        {
            "group": setting.group,
            "detail": setting.detail,
            "partial": setting.partial,
            "computed": statistics.mean(computed for _, computed, _ in scored),
            "work": statistics.mean(work for *_, work in scored),
            "psnr": statistics.mean(distances),
            "spread": statistics.stdev(distances) if seeds > 1 else None,
            "predicted": plan.error if plan else None,
            "plan": list(plan.steps) if plan else None,
        }
        for setting in settings
        for plan in [plans_by.get(setting.group, {}).get(setting.detail)]
        for scored in [[scores[setting.label, seed] for seed in range(10, 10 + seeds)]]
        for distances in [[distance for distance, *_ in scored]]
    ]
    measured = [scores[setting.label, 10][0] for setting in masks]
    predicted = [ck.replay(trace, setting.policy).error for setting in masks if setting.policy]
    rank = spearman([-error for error in predicted], measured) if random else None
    print(f"{'':<36} {'computed':>8} {'work':>6} {'PSNR':>6} {'spread':>6} {'chosen, no more work':>24}")
    for row in rows:
        row["chosen"] = best = _chosen_at(row["work"], rows)
        versus = "" if row["group"] == "chosen" or best is None else f"{best:.1f} ({best - row['psnr']:+.1f})"
        name, spread = f"{row['group']} {row['detail']}", row["spread"] or 0
        print(f"{name:<36} {row['computed']:>8.1f} {row['work']:>6.1f} {row['psnr']:>6.1f} {spread:>6.2f} {versus:>24}")
    if rank is not None:
        print(f"Spearman of predicted error and measured PSNR over {len(random)} random plans: {rank:.3f}")
    return {
        "digits": count,
        "seeds": seeds,
        "rows": rows,
        "spearman": rank,
        "random": [
            {"plan": sorted(nodes), "predicted": error, "psnr": value}
            for nodes, error, value in zip(random, predicted, measured, strict=True)
        ],
        "resampled": resampled(model, trace, count),
    }


def choices(model: torch.nn.Module, trace: ck.Trace, jobs: int) -> dict[str, dict[str, ck.Plan]]:
    """For every budget the plan that does best on the digits and the noise of the recording, without and with moves."""

    def chosen(budget: int) -> tuple[ck.Plan, ck.Plan]:
        plain, refined = (runs.choose(model, trace, [budget], 1, refine)[budget] for refine in (0, REFINE))
        return plain, refined

    made = in_processes(chosen, BUDGETS, jobs, "budget")
    return {
        name: {f"{budget}": plans[n] for budget, plans in zip(BUDGETS, made, strict=True)}
        for n, name in enumerate(("chosen", "refined"))
    }


WORK: list[Any] = []
"""What the processes of `in_processes` do: forked with it, for settings hold functions, which cannot be sent."""


def _work(n: int) -> Any:
    function, items = WORK
    return function(items[n])


def in_processes(function: Callable[[Any], Any], items: Sequence[Any], jobs: int, unit: str) -> list[Any]:
    """`function` of every item, in as many processes, of one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    WORK[:] = [function, items]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        made = list(tqdm(pool.imap(_work, range(len(items))), total=len(items), unit=unit, dynamic_ncols=True))
    torch.set_num_threads(threads)
    return made


def resampled(model: torch.nn.Module, trace: ck.Trace, count: int) -> list[dict[str, Any]]:
    """Plans for 28 steps from the recording of 50, beside plans from a recording of 28."""
    steps, seed = 28, 10
    own = runs.record(model, steps, seed=1)
    labels = torch.randint(digits.CLASSES, (count,), generator=torch.Generator().manual_seed(seed))
    reference = run(model, Setting(UNCACHED, "", steps), labels, seed).samples
    rows = []
    for computed in (8, 12, 16):
        plans = {
            "own": ck.plan(own, computed=computed),
            "resampled": ck.plan(trace, computed=computed, timesteps=own.timesteps, resample=True),
        }
        row: dict[str, Any] = {"steps": steps, "computed": computed}
        for name, plan in plans.items():
            trial = run(model, Setting("planned", name, steps, ck.planned(plan)), labels, seed)
            row[name] = psnr(trial.samples, reference).mean().item()
        rows.append(row)
        print(
            f"28 steps, {computed} computed: {row['own']:.1f} dB, from the recording of 50: {row['resampled']:.1f} dB"
        )
    return rows


def _random(generator: torch.Generator) -> set[int]:
    """Between 8 and 30 computed steps, anywhere."""
    count = int(torch.randint(8, 31, (), generator=generator))
    return {0, *(1 + torch.randperm(STEPS - 1, generator=generator)[: count - 1]).tolist()}


def _chosen_at(work: float, rows: list[dict[str, Any]]) -> float | None:
    """PSNR of the chosen plan that multiplies the most of those that do no more than this."""
    fitting = [row for row in rows if row["group"] == "chosen" and row["work"] <= work + 1e-6]
    return max(fitting, key=lambda row: row["work"])["psnr"] if fitting else None


def spearman(first: list[float], second: list[float]) -> float:
    """Correlation of ranks."""

    def ranks(values: list[float]) -> Tensor:
        order = torch.tensor(values, dtype=torch.float64).argsort().argsort().double()
        return order - order.mean()

    a, b = ranks(first), ranks(second)
    return float((a @ b) / math.sqrt(float((a @ a) * (b @ b))))


if __name__ == "__main__":
    main()
