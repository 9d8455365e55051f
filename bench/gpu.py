"""What caching costs and saves on one GPU, at the sizes of real models.

    python bench/gpu.py [kernels|flux|wan|graphs|all] [--out DIR]
    python bench/gpu.py all --dry-run    # tiny, on the CPU: to try the script

kernels: every kernel against its reference on the device, all dtypes, also beyond 2^31 elements; then bench/kernels.py.
flux, wan: a FLUX.1-dev-shaped and a Wan2.1-1.3B-shaped transformer with random weights in bfloat16. A loop of 28 steps
for every method, eager, regional and (one static, one data-dependent method) as programs, beside diffusers' hooks and,
where it is installed, cache-dit. Efficiency is the time that the computed and the skipped steps of the loop need by
themselves, over the time of the loop.
graphs: `step.compile(mode="reduce-overhead")` over 50 steps against eager, with the memory it takes.

What is not installed is said and left out. Every output is checked before it is timed. A short table comes last.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cachekit_kernels as kernels
import torch
from records import record, write

import cachekit as ck
import kernels as kernel_bench

STEPS = 28
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Workload(NamedTuple):
    """A model and a slowly changing trajectory of inputs."""

    name: str
    model: torch.nn.Module
    inputs: Callable[[int], dict[str, Any]]
    times: list[float]
    lists: tuple[str, ...]  # the nn.ModuleLists of its blocks
    parts: dict[str, tuple[str, ...]]  # what a method leaves out -> names of modules in a block


# Kernels -----------------------------------------------------------------------------------------------------


def correct(device: torch.device, dry: bool) -> Iterator[dict[str, Any]]:
    """Every kernel against its reference in float64."""
    noise = torch.Generator(device).manual_seed(0)
    shapes = [(1,), (3, 1013), (2, 257, 96)] if dry else [(1,), (3, 1013), (2, 4608, 3072), (1, 32760, 1536)]
    for case in kernel_bench.CASES:
        worst = 0.0
        for dtype in DTYPES:
            for shape in shapes:

                def draw(kind: torch.dtype | None = None, shape=shape, dtype=dtype) -> torch.Tensor:
                    return torch.randn(shape, generator=noise, device=device, dtype=kind or dtype)

                arguments = case.arguments(draw, torch.tensor([0.7, 1.3], device=device))
                found = tensors(case.ours(*arguments))
                wide = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.double, arguments)  # pyright: ignore
                for one, other in zip(found, tensors(case.plain(*wide)), strict=True):
                    error = ((one.double() - other).norm() / other.norm().clamp_min(1e-12)).item()
                    if not error < (1e-4 if dtype == torch.float32 else 2e-2):
                        raise SystemExit(f"{case.name}, {dtype}, {shape}: off by {error:.1e} relative.")
                    worst = max(worst, error)
        yield {"part": "correct", "kernel": case.name, "worst_relative_error": worst}
    if not dry:
        yield beyond(device)


def beyond(device: torch.device) -> dict[str, Any]:
    """More elements than a 32-bit index can count."""
    size = 2**31 + 4099
    one, other = (torch.full((size,), value, device=device, dtype=torch.bfloat16) for value in (3.0, 1.0))
    one[-1], other[-1] = 64.0, 32.0
    (total,) = kernels.apply_residual([one], [other])
    residual, change, scale = kernels.residual_norm(one, other, other)
    ends = [tensor[-1].item() for tensor in (total, residual)]
    wanted = [(size - 1) * 1.0 + 0.0, (size - 1) + 32.0]
    if ends != [96.0, 32.0] or any(
        abs(a - b) > 1e-4 * b for a, b in zip((change.item(), scale.item()), wanted, strict=True)
    ):
        raise SystemExit(f"beyond 2^31 elements: {ends}, {change.item()}, {scale.item()}, should be {wanted}.")
    return {"part": "correct", "kernel": "beyond 2^31 elements", "worst_relative_error": 0.0}


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]  # pyright: ignore


# Models ------------------------------------------------------------------------------------------------------


def flux(device: torch.device, dry: bool) -> Workload:
    """FLUX.1-dev at 1024x1024."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    torch.manual_seed(0)
    small = {"num_layers": 3, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16}
    small |= {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6), "in_channels": 8}
    side, text = (4, 5) if dry else (64, 512)
    with torch.device(device):
        model = FluxTransformer2DModel(guidance_embeds=True, **(small if dry else {})).eval().to(torch.bfloat16)
    config, dtype = model.config, torch.bfloat16
    x, drift = (torch.randn(1, side * side, config.in_channels, device=device, dtype=dtype) for _ in range(2))
    ids = torch.zeros(side * side, 3, device=device)
    ids[:, 1], ids[:, 2] = torch.arange(side * side) // side, torch.arange(side * side) % side
    given = {
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": ids.to(dtype),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
        "return_dict": False,
    }
    times = [1000.0 * (1 - i / STEPS) for i in range(STEPS)]

    def inputs(i: int) -> dict[str, Any]:
        now = torch.full((1,), times[i % STEPS] / 1000, device=device, dtype=dtype)
        return {"hidden_states": x + 0.02 * (i % STEPS) * drift, "timestep": now, **given}

    parts = {"attention": ("attn",), "attention+mlp": ("attn", "ff", "ff_context", "proj_mlp", "proj_out")}
    return Workload("flux", model, inputs, times, ("transformer_blocks", "single_transformer_blocks"), parts)


def wan(device: torch.device, dry: bool) -> Workload:
    """Wan2.1 1.3B, 33 frames at 480x832."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "ffn_dim": 64, "text_dim": 32}
    size |= {"in_channels": 4, "out_channels": 4, "freq_dim": 32}
    if not dry:
        size = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
    with torch.device(device):
        model = WanTransformer3DModel(**size).eval().to(torch.bfloat16)
    config, dtype = model.config, torch.bfloat16
    shape = (1, config.in_channels, *((2, 4, 4) if dry else (9, 60, 104)))
    x, drift = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    text = torch.randn(1, 5 if dry else 512, config.text_dim, device=device, dtype=dtype)
    times = [1000.0 * (1 - i / STEPS) for i in range(STEPS)]

    def inputs(i: int) -> dict[str, Any]:
        return {
            "hidden_states": x + 0.02 * (i % STEPS) * drift,
            "timestep": torch.full((1,), times[i % STEPS], device=device),
            "encoder_hidden_states": text,
            "return_dict": False,
        }

    parts = {"attention": ("attn1", "attn2"), "attention+mlp": ("attn1", "attn2", "ffn")}
    return Workload("wan", model, inputs, times, ("blocks",), parts)


def policies(work: Workload) -> dict[str, ck.Policy]:
    """Every method of the guide, set to be at work in this trajectory."""
    ratios = [1.0] * STEPS
    return {
        "first_block_cache": ck.first_block_cache(threshold_for(work)),
        "mag_cache": ck.mag_cache(ratios, threshold=0.06, max_skips=2, retention=0.2),
        "taylorseer": ck.taylorseer(5, warmup=3),
        "pyramid_attention_broadcast": ck.pyramid_attention_broadcast(2, cross=2 if work.name == "wan" else None),
        "faster_cache": ck.faster_cache(2, cfg=None),
    }


def threshold_for(work: Workload) -> float:
    """A threshold between the drifts of one step and of two, so that about every other step computes."""
    step = ck.cache(work.model, ck.first_block_cache(0.0))
    state = step.init(work.times, **work.inputs(0))
    for i in range(6):
        _, state = step(state, **work.inputs(i))
    return 1.5 * statistics.median(ck.summary(state).signal[1:6])


# Loops -------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The median time of a call, from an idle device to an idle device."""
    call()
    found = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


class Gone(torch.nn.Module):
    """What stands where a module was taken out."""

    def forward(self, hidden_states, encoder_hidden_states=None, *_, **__):
        """What came in; both streams where there are two."""
        return hidden_states


def alone(work: Workload, method: str, device: torch.device, rounds: int, compiled: bool) -> float | None:
    """Seconds of a step that runs nothing but what a skipped step of a chain method cannot leave out."""
    if method not in ("first_block_cache", "mag_cache"):
        return None
    cut = copy.copy(work.model)
    cut._modules = dict(work.model._modules)
    for n, name in enumerate(work.lists):
        kept = list(getattr(work.model, name))[:1] if method == "first_block_cache" and n == 0 else []
        cut._modules[name] = torch.nn.ModuleList(kept)
    run = torch.compile(lambda given: cut(**given), fullgraph=True) if compiled else lambda given: cut(**given)
    return seconds_of(lambda: run(work.inputs(1)), device, rounds)


def trajectory(step, work: Workload) -> Callable[[], tuple[torch.Tensor, Any]]:
    """All steps of one image, from a fresh state that is made once."""
    made = step.init(work.times, **work.inputs(0))
    given = [work.inputs(i) for i in range(STEPS)]

    def run() -> tuple[torch.Tensor, Any]:
        state = step.init_like(made)
        out = None
        for each in given:
            (out, *_), state = step(state, **each)
        assert out is not None
        return out, state

    return run


def loops(work: Workload, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every method and way, beside the model without a cache."""

    def plain(run) -> float:
        given = work.inputs(1)
        return seconds_of(lambda: run(given), device, rounds)

    blocks = [block for name in work.lists for block in getattr(work.model, name)]
    eager = plain(lambda given: work.model(**given))
    for block in blocks:
        block.compile(fullgraph=True)
    regional = plain(lambda given: work.model(**given))
    for block in blocks:
        block._compiled_call_impl = None
    full = {"eager": eager, "regional": regional, "programs": regional}
    for way, found in (("eager", eager), ("regional", regional)):
        yield {
            "model": work.name,
            "method": "none",
            "way": way,
            "action": "loop",
            "seconds": found * STEPS,
            "steps": STEPS,
        }
    for method, policy in policies(work).items():
        outputs: dict[str, torch.Tensor] = {}
        for way in ("eager", "regional", *(("programs",) if method in ("mag_cache", "first_block_cache") else ())):
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            torch._dynamo.reset()
            step = ck.cache(work.model, policy)
            step = step if way == "eager" else step.compile(regional=way == "regional")
            run = trajectory(step, work)
            start = time.perf_counter()
            out, state = run()
            first = time.perf_counter() - start
            outputs[way] = out.float()
            error = ((outputs[way] - outputs["eager"]).norm() / outputs["eager"].norm()).item()
            if not error < 5e-2:  # bfloat16 through all blocks, 28 times; a wrong branch is off by far more
                raise SystemExit(f"{work.name}, {method}, {way}: off by {error:.1e} from eager. Not timed.")
            loop = seconds_of(lambda run=run: run(), device, max(2, rounds // 3))
            computed = sum(ck.summary(state).computed)
            floor = alone(work, method, device, rounds, way != "eager")
            row = {
                "model": work.name, "method": method, "way": way, "action": "loop", "seconds": loop, "steps": STEPS,
                "computed": computed, "first_loop_seconds": first, "state_bytes": ck.summary(state).state_bytes,
                "speed_up": full[way] * STEPS / loop,
            }  # fmt: skip
            if floor is not None:
                row["efficiency"] = (computed * full[way] + (STEPS - computed) * floor) / loop
            if device.type == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
            yield row
        yield from hooked(work, method, device, rounds, outputs["eager"])


def hooked(
    work: Workload, method: str, device: torch.device, rounds: int, ours: torch.Tensor
) -> Iterator[dict[str, Any]]:
    """The same under diffusers' hooks, where they have the method with these settings."""
    from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig

    config = {
        "first_block_cache": lambda: FirstBlockCacheConfig(threshold=threshold_for(work)),
        "mag_cache": lambda: MagCacheConfig(
            threshold=0.06, max_skip_steps=2, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
        ),
    }.get(method)
    if config is None:
        return
    work.model.enable_cache(config())
    given = [work.inputs(i) for i in range(STEPS)]

    def run() -> torch.Tensor:
        out = None
        with work.model.cache_context("bench"):
            for each in given:
                (out, *_) = work.model(**each)
        work.model._reset_stateful_cache()
        assert out is not None
        return out

    try:
        error = ((run().float() - ours).norm() / ours.norm()).item()
        loop = seconds_of(run, device, max(2, rounds // 3))
    finally:
        work.model.disable_cache()
    yield {
        "model": work.name, "method": method, "way": "diffusers hooks, eager", "action": "loop", "seconds": loop,
        "steps": STEPS, "difference_to_ours": error,
    }  # fmt: skip


# CUDA graphs -------------------------------------------------------------------------------------------------


def graphs(device: torch.device, dry: bool) -> Iterator[dict[str, Any]]:
    """Programs replayed as CUDA graphs, with the state carried across replays."""
    work = flux(device, True)
    model = copy.deepcopy(work.model).float()
    given = [
        {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in work.inputs(i).items()}
        for i in range(50)
    ]
    for name, policy in {
        "mag_cache": ck.mag_cache([1.0] * 50, max_skips=2),
        "first_block_cache": ck.first_block_cache(0.05),
    }.items():
        results = []
        for mode in (None, "default" if dry else "reduce-overhead"):
            torch._dynamo.reset()
            step = ck.cache(model, policy)
            step = step if mode is None else step.compile(mode=mode)
            before = torch.cuda.memory_reserved() if device.type == "cuda" else 0
            state = step.init(50, **given[0])
            outs = []
            for each in given:
                (out,), state = step(state, **each)
                outs.append(out.clone())
            taken = torch.cuda.memory_reserved() - before if device.type == "cuda" else 0
            results.append((torch.stack(outs), ck.summary(state).computed))
        (wanted, decided), (found, same) = results
        error = ((found - wanted).norm() / wanted.norm()).item()
        if same != decided or not error < 1e-3:
            raise SystemExit(
                f"graphs, {name}: off by {error:.1e}, decisions {'alike' if same == decided else 'differ'}."
            )
        yield {
            "part": "graphs",
            "method": name,
            "computed": sum(same),
            "worst_relative_error": error,
            "reserved_bytes": taken,
        }


# ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=("kernels", "flux", "wan", "graphs", "all"))
    parser.add_argument("--rounds", type=int, default=9, help="samples a row")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: to try the script")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON files")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("No GPU here. Use --dry-run to try the script.")
    warnings.filterwarnings("ignore")
    device = torch.device("cpu" if options.dry_run else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    wanted = ("kernels", "flux", "wan", "graphs") if options.part == "all" else (options.part,)
    left_out, lines = [], []
    if importlib.util.find_spec("cache_dit") is None:
        left_out.append("cache-dit: not installed")
    for part in wanted:
        if part != "kernels" and importlib.util.find_spec("diffusers") is None:
            left_out.append(f"{part}: diffusers is not installed")
            continue
        start, made = time.perf_counter(), record(device, options.rounds)
        with torch.no_grad():
            if part == "kernels":
                found = [*correct(device, options.dry_run)]
                shapes, batches = (["tiny"], [1]) if options.dry_run else (["flux", "wan", "hunyuan"], [1, 2])
                found += kernel_bench.rows(shapes, batches, 2 if options.dry_run else 30, device)
            elif part == "graphs":
                found = [*graphs(device, options.dry_run)]
            else:
                work = {"flux": flux, "wan": wan}[part](device, options.dry_run)
                found = []
                for row in loops(work, device, 2 if options.dry_run else options.rounds):
                    found.append(row)
                    print({name: value for name, value in row.items() if name != "part"}, flush=True)
                del work
        made["rows"] = found
        write(made, options.out, f"gpu-{part}" + ("-dry-run" if options.dry_run else ""))
        lines += [short(row) for row in found]
        lines.append(f"{part}: {time.perf_counter() - start:.0f} s")
    print("\n".join([*lines, *(f"left out: {what}" for what in left_out)]))


def short(row: dict[str, Any]) -> str:
    """A row in a line."""
    names = ("part", "model", "kernel", "method", "way", "shape", "batch")
    label = " ".join(str(row[name]) for name in names if name in row)
    figures = [
        f"{row[name]:.3g} {name}"
        for name in ("seconds", "speed_up", "efficiency", "of_copy", "over_compiled", "worst_relative_error")
        if name in row
    ]
    return f"{label:<60} {', '.join(figures)}"


if __name__ == "__main__":
    main()
