"""What caching costs and saves on one GPU, at the sizes of real models.

    python bench/gpu.py [kernels|flux|wan|graphs|all] [--rounds 3] [--minutes 7] [--out DIR]
    python bench/gpu.py all --dry-run    # tiny, on the CPU: to try the script

kernels  every kernel against its reference in float64 on the device, in every dtype, beyond 2^31 elements too; then
         bench/kernels.py.
flux     a transformer of the shape of FLUX.1-dev at 1024x1024, bfloat16, random weights: a loop of 28 steps for every
         method, eager and regional, two of them as programs too, and the same pattern under the hooks of diffusers and
         under cache-dit in the same run.
wan      the same for the shape of Wan2.1 1.3B, 33 frames at 480p.
graphs   step.compile(mode="reduce-overhead") over 50 steps against eager, with the memory that it takes.

Efficiency is the time that the computed and the skipped steps need by themselves (the model as it is; the model with
what is skipped taken out by hand) over that of the loop. A gap is what of a step's time no kernel was running. Every
output is checked before it is timed; what is not installed, fails, or is beyond the minutes, is said. A short table
comes last.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import importlib.util
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from correctness import correct, off
from peers import cache_dit, hooks
from records import record, write
from torch.utils import _pytree as pytree
from workloads import STEPS, TIMES, Workload, flux, wan

import cachekit as ck

kernel_bench = importlib.import_module("kernels")  # kernels.py beside this script

PARTS = ("kernels", "graphs", "flux", "wan")
PEERS = (hooks, cache_dit)
PROGRAMS = ("mag_cache", "first_block_cache")  # one static, one that looks at the data
TOLERANCE = 3
"""How many times as far from the eager output something may be as that is from the output in float32: two orders of the
sums in bfloat16 are apart by both their errors."""


class Bench(NamedTuple):
    """How to measure."""

    device: torch.device
    tiny: bool
    rounds: int
    until: float  # time.perf_counter() after which no more rows are begun
    left_out: list[str]

    @property
    def compiler(self) -> dict[str, Any]:
        """Which backend compiles: Inductor, but where the script alone is tried, for it takes minutes."""
        return {"backend": "eager"} if self.tiny else {}

    def seconds(self, call: Callable[[], Any], *, warm: bool = False) -> float:
        """The median time of a call, from an idle device to an idle device; the first is not counted, unless it ran."""
        found = []
        for _ in range(self.rounds + (not warm)):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found[-self.rounds :])

    def busy(self, call: Callable[[], Any]) -> float | None:
        """Seconds of a call in which a kernel was running."""
        if self.device.type != "cuda":
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            self.wait()
        return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def fresh(self) -> None:
        """Nothing compiled, nothing held, and the peak of memory begun anew."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Bytes of device memory that were taken at most."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def reaches(self, what: str, needs: float = 0) -> bool:
        """Whether there is time for it, of which it needs so many seconds; noted where not."""
        if time.perf_counter() + needs < self.until:
            return True
        self.left_out.append(f"{what}: out of time")
        return False


def rounding(work: Workload) -> float:
    """The relative error of the model in its dtype against itself in float32."""
    given = work.inputs(STEPS - 1)
    found = work.model(**given)[0]
    wide = copy.deepcopy(work.model).float()
    wanted = wide(**pytree.tree_map(_wide, given))[0]
    return off(found, wanted)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def refuse_wrong(what: str, found: torch.Tensor, wanted: torch.Tensor, error: float) -> None:
    """What is wrong is not timed. `error` is what rounding makes of the model."""
    if not found.isfinite().all() or not off(found, wanted) < TOLERANCE * error:
        raise SystemExit(
            f"{what}: off by {off(found, wanted):.1e} where rounding makes {error:.1e}. Wrong, so it is not timed."
        )


# Loops -------------------------------------------------------------------------------------------------------


def policies(threshold: float) -> dict[str, ck.Policy]:
    """Every method of the guide, at work in this trajectory, with the semantics that the hooks have too."""
    return {
        "first_block_cache": ck.first_block_cache(threshold),
        "mag_cache": ck.mag_cache([1.0] * STEPS, threshold=0.06, max_skips=2, semantics="diffusers"),
        "taylorseer": ck.taylorseer(5, sites="attention+mlp", semantics="diffusers"),
        "pyramid_attention_broadcast": ck.pyramid_attention_broadcast(2, semantics="diffusers"),
        "faster_cache": ck.faster_cache(2, cfg=None, semantics="diffusers"),
    }


def threshold_for(work: Workload) -> float:
    """A threshold between the drifts of one step and of two, so that every other step computes."""
    probe = ck.Policy("probe", ck.deciders.interval(2), ck.forecasters.hold(), signal=ck.signals.change, front=1)
    step = ck.cache(work.model, probe)
    state = step.init(TIMES, **work.inputs(0))
    for i in range(STEPS):
        _, state = step(state, **work.inputs(i))
    signal = ck.summary(state).signal
    reused, computed = statistics.median(signal[1::2]), statistics.median(signal[2::2])
    return (reused + computed) / 2


def loops(bench: Bench, work: Workload) -> Iterator[dict[str, Any]]:
    """A row for every method and way, beside the model without a cache, fewer steps, and peers."""
    given = [work.inputs(i) for i in range(STEPS)]
    label = {"part": work.name, "model": work.name, "steps": STEPS}
    full: dict[str, float] = {}
    uncached = None
    error = rounding(work)
    for way in ("eager", "regional"):
        bench.fresh()
        with regional(bench, work.blocks, way == "regional"):
            out = work.model(**given[-1])[0]
            uncached = out if uncached is None else uncached
            refuse_wrong(f"{work.name}, none, {way}", out, uncached, error)
            plain = bench.seconds(lambda: [work.model(**each) for each in given])
        full[way] = plain / STEPS
        about = {"seconds": plain, "ratio": 1.0, "peak_bytes": bench.peak(), "rounding": error}
        yield label | {"method": "none", "way": way, **about}
    threshold = threshold_for(work)
    chosen, outputs = policies(threshold), {}
    # What the page is about comes first: the two methods with programs, compiled as a whole, which takes minutes.
    for method in (*PROGRAMS, *(each for each in chosen if each not in PROGRAMS)):
        wanted = None
        for way in ("eager", "regional"):
            if bench.reaches(f"{work.name}, {method}, {way}"):
                found, out = loop(bench, work, method, chosen[method], way, full[way], wanted, error)
                wanted = out if wanted is None else wanted
                yield label | found
        if wanted is None:
            continue
        outputs[method] = wanted
        yield from (label | row for row in peers(bench, work, method, threshold, wanted, error, "eager", full["eager"]))
        if method == PROGRAMS[-1]:
            yield from (label | row for row in compiled_whole(bench, work, chosen, outputs, error))
    # The hooks of the other methods are compiled anew at every step until the compiler gives up.
    for method in PROGRAMS:
        if method in outputs:
            ours = outputs[method]
            yield from (
                label | row for row in peers(bench, work, method, threshold, ours, error, "regional", full["regional"])
            )


def compiled_whole(
    bench: Bench, work: Workload, chosen: dict[str, ck.Policy], outputs: dict[str, torch.Tensor], error: float
) -> Iterator[dict[str, Any]]:
    """The model compiled as a whole, and the programs of some methods beside it."""
    given = [work.inputs(i) for i in range(STEPS)]
    needs = 0.0 if bench.tiny else 90.0
    if not bench.reaches(f"{work.name}, programs", 2 * needs):
        return
    bench.fresh()
    whole = torch.compile(lambda each: work.model(**each), fullgraph=True, **bench.compiler)
    refuse_wrong(f"{work.name}, none, torch.compile", whole(given[-1])[0], work.model(**given[-1])[0], error)
    plain = bench.seconds(lambda: [whole(each) for each in given])
    yield {"method": "none", "way": "torch.compile", "seconds": plain, "ratio": 1.0}
    for method in PROGRAMS:
        if method in outputs and bench.reaches(f"{work.name}, {method}, programs", needs):
            found, _ = loop(bench, work, method, chosen[method], "programs", plain / STEPS, outputs[method], error)
            yield found


def peers(
    bench: Bench, work: Workload, method: str, threshold: float, ours: torch.Tensor, error: float, way: str, full: float
) -> Iterator[dict[str, Any]]:
    """The same pattern as others do it."""
    given = [work.inputs(i) for i in range(STEPS)]
    for peer in PEERS:
        name = f"{peer.__name__}, {way}"
        if not bench.reaches(f"{work.name}, {method}, {name}"):
            continue
        bench.fresh()
        try:
            with peer(work, method, threshold) as run, regional(bench, work.blocks, way == "regional", fullgraph=False):
                if run is None:
                    continue
                out = run(given)
                difference = off(out, ours)
                if not difference < TOLERANCE * error:
                    bench.left_out.append(f"{work.name}, {method}, {name}: off by {difference:.1e}, so it is not timed")
                    continue
                seconds = bench.seconds(functools.partial(run, given), warm=True)
        except Exception as failure:  # of another project's: it must not cost us our own rows
            bench.left_out.append(f"{work.name}, {method}, {name}: {type(failure).__name__}: {str(failure)[:200]}")
            continue
        row = {"method": method, "way": name, "seconds": seconds, "ratio": seconds / (full * STEPS)}
        yield row | {"difference_to_ours": difference, "peak_bytes": bench.peak()}


class regional:  # noqa: N801
    """With the blocks compiled one by one in place, and as they were afterwards."""

    def __init__(self, bench: Bench, blocks: list[torch.nn.Module], on: bool, fullgraph: bool = True) -> None:
        self.blocks, self.options = blocks if on else [], {"fullgraph": fullgraph, **bench.compiler}

    def __enter__(self) -> None:
        for block in self.blocks:
            block.compile(**self.options)

    def __exit__(self, *_: object) -> None:
        for block in self.blocks:
            block._compiled_call_impl = None


def loop(
    bench: Bench,
    work: Workload,
    method: str,
    policy: ck.Policy,
    way: str,
    full: float,
    wanted: torch.Tensor | None,
    error: float,
) -> tuple[dict[str, Any], torch.Tensor]:
    """A trajectory of one step, its efficiency, and its last output."""
    bench.fresh()
    step = ck.cache(work.model, policy)
    step = step if way == "eager" else step.compile(regional=way == "regional", **bench.compiler)
    given = [work.inputs(i) for i in range(STEPS)]
    made = step.init(TIMES, **given[0])

    def run() -> tuple[torch.Tensor, ck.State]:
        state, out = step.init_like(made), torch.empty(0)
        for each in given:
            (out, *_), state = step(state, **each)
        return out, state

    start = time.perf_counter()
    out, state = run()
    bench.wait()
    first = time.perf_counter() - start
    refuse_wrong(f"{work.name}, {method}, {way}", out, out if wanted is None else wanted, error)
    seconds, busy, peak = bench.seconds(run, warm=True), bench.busy(run), bench.peak()
    summary = ck.summary(state)
    computed = sum(summary.computed)
    cut = work.without(method)
    blocks = [block for name in work.lists for block in getattr(cut, name)]
    run_cut: Any = torch.compile(cut, fullgraph=True, **bench.compiler) if way == "programs" else cut
    with regional(bench, blocks, way == "regional"):
        alone = bench.seconds(lambda: [run_cut(**each) for each in given]) / STEPS
    found = {
        "method": method,
        "way": way,
        "seconds": seconds,
        "computed": computed,
        "speed_up": full * STEPS / seconds,
        "ratio": seconds / (full * STEPS),
        "efficiency": (computed * full + (STEPS - computed) * alone) / seconds,
        "gap_seconds_per_step": None if busy is None else (seconds - busy) / STEPS,
        "first_loop_seconds": first,
        "state_bytes": summary.state_bytes,
        "peak_bytes": peak,
    }
    return found, out


# CUDA graphs -------------------------------------------------------------------------------------------------


def graphs(bench: Bench) -> Iterator[dict[str, Any]]:
    """Programs replayed as CUDA graphs, with the state carried from replay to replay."""
    work, count = flux(bench.device, tiny=True, dtype=torch.float32), 50
    given = [work.inputs(i % STEPS) for i in range(count)]
    for method, policy in {
        "mag_cache": ck.mag_cache([1.0] * count, max_skips=2),
        "first_block_cache": ck.first_block_cache(threshold_for(work)),
        "taylorseer": ck.taylorseer(4),
    }.items():
        if not bench.reaches(f"graphs, {method}", 0 if bench.tiny else 60):
            continue
        results: dict[str, Any] = {}
        for way, options in {
            "eager": None,
            "programs": {},
            "CUDA graphs": {"mode": "default" if bench.tiny else "reduce-overhead"},
            "CUDA graphs, donate": {"mode": "default" if bench.tiny else "reduce-overhead"},
        }.items():
            bench.fresh()
            before = torch.cuda.memory_reserved() if bench.device.type == "cuda" else 0
            step = ck.cache(work.model, policy, donate="donate" in way)
            step = step if options is None else step.compile(**options)

            def run(step=step) -> tuple[torch.Tensor, ck.State]:
                state, outs = step.init(count, **given[0]), []
                for each in given:
                    (out, *_), state = step(state, **each)
                    outs.append(out)
                return torch.stack(outs), state

            for _ in range(2):  # warmed up, captured
                run()
            outs, state = run()
            decided = ck.summary(state).computed
            taken = torch.cuda.memory_reserved() - before if bench.device.type == "cuda" else 0
            seconds = bench.seconds(run, warm=True)
            results[way] = (outs, decided, seconds)
            error = off(outs, results["eager"][0])
            if decided != results["eager"][1] or not error < 1e-3:
                raise SystemExit(f"graphs, {method}, {way}: off by {error:.1e}, or decided otherwise. Not timed.")
            yield {
                "part": "graphs",
                "model": "flux, tiny",
                "method": method,
                "way": way,
                "computed": sum(decided),
                "seconds": seconds,
                "ratio": seconds / results["eager"][2],
                "reserved_bytes": taken,
                "worst_relative_error": error,
            }


# ---------------------------------------------------------------------------------------------------------------


def rows(part: str, bench: Bench) -> Iterator[dict[str, Any]]:
    """The rows of a part."""
    if part == "kernels":
        yield from correct(bench.device, bench.tiny)
        shapes = ["tiny"] if bench.tiny else ["flux", "wan", "hunyuan"]
        for row in kernel_bench.rows(shapes, [1], 2 if bench.tiny else 30, bench.device):
            yield {"part": "kernels", **row}
            if not bench.reaches(f"kernels, after {row['kernel']} {row['shape']} {row['batch']}"):
                return
    elif part == "graphs":
        yield from graphs(bench)
    else:
        yield from loops(bench, {"flux": flux, "wan": wan}[part](bench.device, bench.tiny))


SHOWN = {
    "seconds": "{:.4g} s",
    "computed": "{} computed",
    "speed_up": "{:.2f}x",
    "efficiency": "efficiency {:.3f}",
    "gap_seconds_per_step": "gap {:.2g} s a step",
    "difference_to_ours": "differs by {:.1e}",
    "of_copy": "{:.1%} of copy",
    "over_compiled": "{:.3f} over compiled",
    "host_seconds": "host {:.2g} s",
    "worst_relative_error": "off by {:.1e}",
    "peak_bytes": "peak {:.3g} bytes",
}


def short(row: dict[str, Any]) -> str:
    """A row in a line."""
    names = ("part", "kernel", "method", "way", "shape", "batch")
    label = " ".join(str(row[name]) for name in names if name in row)
    return (
        f"{label:<58} {', '.join(form.format(row[name]) for name, form in SHOWN.items() if row.get(name) is not None)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=(*PARTS, "all"))
    parser.add_argument("--rounds", type=int, default=3, help="loops that are timed, a row")
    parser.add_argument("--minutes", type=float, default=7, help="after which a part begins no more rows")
    parser.add_argument("--in-all", type=float, default=22, help="minutes after which no part does")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: to try the script")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON files")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit(
            "No GPU here, and nothing but a GPU's time would mean anything. Use --dry-run to try the script."
        )
    warnings.filterwarnings("ignore")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    device = torch.device("cpu" if options.dry_run else "cuda")
    left_out, lines, suffix = [], [], "-dry-run" if options.dry_run else ""
    for name in ("diffusers", "cache_dit"):
        if importlib.util.find_spec(name) is None:
            left_out.append(f"{name}: not installed")
    end, failed = time.perf_counter() + 60 * options.in_all, False
    for part in PARTS if options.part == "all" else (options.part,):
        if part != "kernels" and "diffusers: not installed" in left_out:
            left_out.append(f"{part}: needs diffusers, whose model classes it runs")
            continue
        start = time.perf_counter()
        until = min(start + 60 * options.minutes, end)
        made = record(device, options.rounds)
        bench = Bench(device, options.dry_run, 1 if options.dry_run else options.rounds, until, left_out)
        try:
            with torch.no_grad():
                for row in rows(part, bench):
                    made["rows"].append(row)
                    print(short(row), flush=True)
                    write(made, options.out, f"gpu-{part}{suffix}", quiet=True)  # kept, whatever comes
        except SystemExit as error:  # a wrong result ends its part, not the others
            failed = True
            left_out.append(f"{part}, WRONG: {error}")
        except Exception as error:  # nor does what fails: out of memory, a compiler
            failed = True
            traceback.print_exc()
            left_out.append(f"{part}, FAILED: {type(error).__name__}: {str(error)[:200]}")
        lines += [short(row) for row in made["rows"]] + [f"{part}: {time.perf_counter() - start:.0f} s"]
        bench.fresh()
    print("\n".join(["", *lines, *(f"left out: {what}" for what in left_out)]))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
