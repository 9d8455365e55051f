"""What a cached step costs beside the step it replaces, on the CPU, peers in the same run.

Models of diffusers' Flux class with random weights: a medium one, whose blocks are real work, the same with the weights
of its linear layers in eight bits (torchao), and a near-empty one, where all that is left is overhead. The rows of a
method and an action are measured together with the plain model, call by call in turn; a row's figure is the median of
its ratios to the plain compiled call of the same round, beside it the ratio of the medians.
Seconds are for orientation only. Compilation is timed apart, from an empty cache of compiled code. No result is timed
before it agrees with what it should be.

    python bench/overhead.py [--rounds 40] [--models medium,medium-int8,small] [--methods mag_cache,taylorseer]
                             [--ways programs] [--out DIR]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.hooks.faster_cache import FasterCacheConfig, apply_faster_cache
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks.mag_cache import MagCacheConfig, apply_mag_cache
from diffusers.hooks.pyramid_attention_broadcast import (
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
)
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig, apply_taylorseer_cache
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from records import record, write

import cachekit as ck
from cachekit.coverage import weights

STEPS = 1000  # a row that reaches the end starts again
TIMES = [950.0] + [500.0] * (STEPS - 1)  # the first outside, the others inside of every range of timesteps
WAYS = ("hooks", "eager", "eager fused", "regional", "programs", "one graph")
"""`hooks`: those of diffusers, compiled. `eager fused`: what the policy computes compiled, the model as it is."""
MEDIUM = {"layers": 3, "singles": 5, "heads": 6, "width": 64, "image": 256, "text": 64}
MODELS = {
    "medium": MEDIUM,
    "medium-int8": MEDIUM,
    "small": {"layers": 2, "singles": 4, "heads": 2, "width": 8, "image": 4, "text": 4},
}


class Row(NamedTuple):
    """One way to run a step."""

    method: str  # plain, or a method
    way: str  # who runs it and how
    action: str  # computed or skipped
    call: Callable[[int], torch.Tensor]  # step index -> output
    expected: Callable[[int], torch.Tensor] | None  # what the output must be; None to compare with `against`
    against: str | None = None  # name of the row that shows the right output


def build(name: str) -> tuple[Any, list[dict[str, Any]]]:
    """A Flux of the given size with open gates, and the inputs of a few slowly changing steps."""
    spec = MODELS[name]
    torch.manual_seed(0)
    width = spec["heads"] * spec["width"]
    axes = {64: (16, 24, 24), 8: (2, 2, 4)}[spec["width"]]
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=spec["layers"],
        num_single_layers=spec["singles"],
        attention_head_dim=spec["width"],
        num_attention_heads=spec["heads"],
        joint_attention_dim=width,
        pooled_projection_dim=width,
        axes_dims_rope=axes,
    ).eval()
    noise = torch.Generator().manual_seed(1)
    x, drift = (torch.randn(1, spec["image"], 16, generator=noise) for _ in range(2))
    text = torch.randn(1, spec["text"], width, generator=noise)
    pooled = torch.randn(1, width, generator=noise)
    side = int(spec["image"] ** 0.5)
    ids = torch.zeros(spec["image"], 3)
    ids[:, 1], ids[:, 2] = torch.arange(spec["image"]) // side, torch.arange(spec["image"]) % side
    inputs = [
        {
            "hidden_states": x + 0.05 * i * drift,
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": torch.full((1,), 1.0 - 0.02 * i),
            "img_ids": ids,
            "txt_ids": torch.zeros(spec["text"], 3),
            "return_dict": False,
        }
        for i in range(8)
    ]
    return weights.quantised("int8 weight-only", model) if name.endswith("int8") else model, inputs


class Ours:
    """A trajectory of one of our steps."""

    def __init__(self, model, policy: ck.Policy, inputs, way: str) -> None:
        step = ck.cache(model, policy)
        if way == "regional":
            step = step.compile(regional=True)
        elif way == "programs":
            step = step.compile()
        elif way == "eager fused":
            step.arithmetic = step.arithmetic.compiled({"fullgraph": True})
        self.left, self.state = STEPS, step.init(TIMES, **inputs[0])
        self.sites = len(self.state.sites)
        self.run = torch.compile(step, fullgraph=True) if way == "one graph" else step
        self.inputs = inputs

    def __call__(self, i: int) -> torch.Tensor:
        """One step; its output."""
        if not self.left:
            # As good as new: the first step of a trajectory is not timed here, so carry on after it.
            self.left, self.state = STEPS - 1, self.second
        out, self.state = self.run(self.state, **self.inputs[i % len(self.inputs)])
        if self.left == STEPS:
            self.second = self.state
        self.left -= 1
        return out[0]

    @property
    def state_bytes(self) -> int:
        """Of all tensors in the state."""
        return ck.summary(self.state).state_bytes


class Hooks:
    """A trajectory under the hooks of diffusers."""

    def __init__(self, model, apply: Callable, config: Callable, inputs, compiled: bool) -> None:
        self.calls, self.inputs = 0, inputs
        self.model = copy.deepcopy(model)
        apply(self.model, config(lambda: TIMES[min(self.calls, 1)]))
        self.run = torch.compile(self.model) if compiled else self.model

    def __call__(self, i: int) -> torch.Tensor:
        """One step; its output."""
        with self.model.cache_context("cond"):
            out = self.run(**self.inputs[i % len(self.inputs)])[0]
        self.calls += 1
        return out

    @property
    def state_bytes(self) -> int:
        """Of all tensors that the hooks hold on to."""
        found: dict[int, int] = {}

        def visit(value: Any) -> None:
            if isinstance(value, torch.Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            elif isinstance(value, dict):
                for name, each in value.items():
                    if name != "fn_ref":
                        visit(each)
            elif isinstance(value, (list, tuple)):
                for each in value:
                    visit(each)
            elif type(value).__module__.startswith("diffusers.hooks"):
                visit(getattr(value, "__dict__", None))

        for module in self.model.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None:
                visit(registry.hooks)
        return sum(found.values())


class Method(NamedTuple):
    """Ours and theirs, set so that every step after the first few takes one action."""

    policy: ck.Policy
    apply: Callable  # the hooks of diffusers
    config: Callable  # a function that returns the timestep -> their settings
    gone: tuple[str, ...]  # names of the modules in a block that do not run on a skip; () for whole blocks


def first_block_cache(skip: bool) -> Method:
    threshold = 1e9 if skip else 0.0
    theirs = FirstBlockCacheConfig(threshold=threshold)
    return Method(ck.first_block_cache(threshold), apply_first_block_cache, lambda _: theirs, ())


def mag_cache(skip: bool) -> Method:
    skips, ones = STEPS if skip else 0, [1.0] * 4
    theirs = MagCacheConfig(
        threshold=0.5, max_skip_steps=skips, retention_ratio=0.0, num_inference_steps=STEPS, mag_ratios=ones
    )
    ours = ck.mag_cache(ones, threshold=0.5, max_skips=skips, retention=0.0)
    return Method(ours, apply_mag_cache, lambda _: theirs, ())


def pyramid_attention_broadcast(skip: bool) -> Method:
    every = STEPS if skip else 1
    return Method(
        ck.pyramid_attention_broadcast(every),
        apply_pyramid_attention_broadcast,
        lambda now: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=every, current_timestep_callback=now
        ),
        ("attn",),
    )


def taylorseer(skip: bool) -> Method:
    every, parts = STEPS if skip else 1, r".*\.(attn|ff|ff_context)"
    theirs = TaylorSeerCacheConfig(
        cache_interval=every,
        disable_cache_before_step=2,
        cache_identifiers=[parts],
        taylor_factors_dtype=torch.float32,
    )
    ours = ck.taylorseer(every, warmup=2, dtype=torch.float32, sites="attention+mlp", semantics="diffusers")
    return Method(ours, apply_taylorseer_cache, lambda _: theirs, ("attn", "ff", "ff_context"))


def faster_cache(skip: bool) -> Method:
    every = STEPS if skip else 1
    return Method(
        ck.faster_cache(every, cfg=None),
        apply_faster_cache,
        lambda now: FasterCacheConfig(
            spatial_attention_block_skip_range=every,
            attention_weight_callback=lambda _: 0.5,
            is_guidance_distilled=True,
            current_timestep_callback=now,
        ),
        ("attn",),
    )


METHODS = {
    made.__name__: made
    for made in (first_block_cache, mag_cache, pyramid_attention_broadcast, taylorseer, faster_cache)
}


class Gone(torch.nn.Module):
    """What stands where a module of a block was taken out."""

    def forward(self, hidden_states, encoder_hidden_states=None, **_):
        """What came in."""
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


def without(model, method: str, gone: tuple[str, ...]):
    """The model, with what a skipped step leaves out taken out by hand; None for nothing to compare with."""
    cut = copy.deepcopy(model)
    if method == "first_block_cache":
        cut.transformer_blocks, cut.single_transformer_blocks = cut.transformer_blocks[:1], torch.nn.ModuleList()
    elif method == "mag_cache":
        cut.transformer_blocks = cut.single_transformer_blocks = torch.nn.ModuleList()
    for block in (*cut.transformer_blocks, *cut.single_transformer_blocks):
        for name in gone:
            if hasattr(block, name):
                setattr(block, name, Gone())
    return cut


def rows(model, inputs, method: str, action: str, ways: list[str]) -> list[Row]:
    """These ways of one method and action, side by side with the plain model, and with what shows the right output."""

    def plain(i: int) -> torch.Tensor:
        return model(**inputs[i % len(inputs)])[0]

    # A function of its own: compiled code is looked up by code object, and the hooked model has that of the class.
    compiled = torch.compile(lambda kwargs: model(**kwargs), fullgraph=True)
    table = [
        Row("plain", "eager", "computed", plain, None),
        Row("plain", "torch.compile", "computed", lambda i: compiled(inputs[i % len(inputs)])[0], plain),
    ]
    ours, apply, config, gone = METHODS[method](action == "skipped")
    if action == "skipped":
        # What no cache that runs the rest can go below.
        cut = without(model, method, gone)
        alone = torch.compile(lambda kwargs: cut(**kwargs), fullgraph=True)

        def floor(i: int) -> torch.Tensor:
            return alone(inputs[i % len(inputs)])[0]

        def right(i: int) -> torch.Tensor:
            return cut(**inputs[i % len(inputs)])[0]

        table.append(Row(method, "what is skipped taken out", action, floor, right))
    expected = plain if action == "computed" else None
    against = f"{method}, diffusers hooks, eager, {action}"
    for way, is_compiled in (("eager", False), ("torch.compile", True)):
        if is_compiled and "hooks" not in ways:
            continue
        hooked = Hooks(model, apply, config, inputs, is_compiled)
        table.append(Row(method, f"diffusers hooks, {way}", action, hooked, expected, against))
    for way in (each for each in WAYS if each != "hooks" and each in ways):
        table.append(Row(method, f"cachekit, {way}", action, Ours(model, ours, inputs, way), expected, against))
    return table


def check(table: list[Row], calls: int = 6) -> dict[str, float]:
    """Run every row a few steps: compile it, and refuse a wrong result. Returns seconds of the first calls."""
    outputs: dict[str, list[torch.Tensor]] = {}
    seconds = {}
    for row in table:
        name = f"{row.method}, {row.way}, {row.action}"
        start = time.perf_counter()
        outputs[name] = [row.call(0).clone(), row.call(1).clone()]
        seconds[name] = time.perf_counter() - start
        outputs[name] += [row.call(i).clone() for i in range(2, calls)]
        if row.expected is not None:
            right = [row.expected(i) for i in range(calls)]
        elif row.against in outputs:
            right = outputs[row.against]
        else:
            continue
        for i, (got, wanted) in enumerate(zip(outputs[name], right, strict=True)):
            error = ((got - wanted).norm() / wanted.norm()).item()
            if not error < 1e-4:
                raise SystemExit(f"{name}: step {i} is off by {error:.1e} relative. A wrong result is not timed.")
        print(f"  {name:<62} right, first calls {seconds[name]:6.1f} s", file=sys.stderr)
    return seconds


def measure(table: list[Row], rounds: int, warm: int, timed: int) -> list[list[float]]:
    """Seconds of a call, all rows in turn: the median of some calls after those that warm the processor's caches."""
    samples: list[list[float]] = [[] for _ in table]
    for n in range(rounds):
        for row, found in zip(table, samples, strict=True):
            for i in range(warm):
                row.call(n + i)
            seconds = []
            for i in range(warm, warm + timed):
                start = time.perf_counter()
                row.call(n + i)
                seconds.append(time.perf_counter() - start)
            found.append(statistics.median(seconds))
        if sys.stderr.isatty():
            print(f"\r  round {n + 1} of {rounds}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return samples


def bench(name: str, methods: list[str], ways: list[str], rounds: int) -> list[dict[str, Any]]:
    """Measure one model and print its table."""
    model, inputs = build(name)
    print(f"\n{name}: {MODELS[name]}")
    if name.endswith("int8") and "one graph" in ways:
        print("one graph: left out, torch.cond takes no weight of a class of its own")
        ways = [way for way in ways if way != "one graph"]
    print(
        f"{'method':<28} {'way':<30} {'action':<9} {'x plain':>8} {'p25':>7} {'p75':>7} {'medians':>8} "
        f"{'ms':>9} {'first s':>8} {'state KiB':>10}"
    )
    results: list[dict[str, Any]] = []
    for action in ("computed", "skipped"):
        for method in methods:
            # Fresh: whatever was compiled for other rows costs none of these a look.
            torch._dynamo.reset()
            table = rows(model, inputs, method, action, ways)
            seconds = check(table)
            # A near-empty call is over before the caches are warm, and so short that many more are affordable.
            warm, timed = (20, 20) if name == "small" else (2, 1)
            samples = measure(table, rounds, warm, timed)
            base = samples[1]
            for row, found in list(zip(table, samples, strict=True))[2 if results else 0 :]:
                low, middle, high = statistics.quantiles([a / b for a, b in zip(found, base, strict=True)], n=4)
                entry = {
                    "model": name,
                    "method": row.method,
                    "way": row.way,
                    "action": row.action,
                    "ratio": middle,
                    "ratio_of_medians": statistics.median(found) / statistics.median(base),
                    "p25": low,
                    "p75": high,
                    "seconds": statistics.median(found),
                    "first_calls_seconds": seconds[f"{row.method}, {row.way}, {row.action}"],
                    "state_bytes": getattr(row.call, "state_bytes", 0),
                    "sites": getattr(row.call, "sites", None),
                }
                print(
                    f"{row.method:<28} {row.way:<30} {row.action:<9} {middle:>8.4f} {low:>7.3f} {high:>7.3f} "
                    f"{entry['ratio_of_medians']:>8.4f} "
                    f"{entry['seconds'] * 1e3:>9.3f} {entry['first_calls_seconds']:>8.1f} "
                    f"{entry['state_bytes'] / 1024:>10.1f}"
                )
                results.append(entry)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=40, help="samples a row; one is a call of the medium model, 20 of the small one"
    )
    parser.add_argument("--models", default=",".join(MODELS), help=f"which of {', '.join(MODELS)}")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"which of {', '.join(WAYS)}")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"which of {', '.join(METHODS)}")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON files, one a model"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="cachekit-bench-")
    warnings.filterwarnings("ignore")
    made, measured = record("cpu", options.rounds), {}
    for name in options.models.split(","):
        with torch.no_grad():
            made["rows"] = bench(name, options.methods.split(","), options.ways.split(","), options.rounds)
        write(made, options.out, f"overhead-{name}")
        measured[name] = made["rows"]
    if {"medium", "medium-int8"} <= set(measured):
        beside(measured["medium"], measured["medium-int8"])


def beside(plain: list[dict[str, Any]], eight: list[dict[str, Any]]) -> None:
    """Print the ratios of the model in eight bits beside those of the model in float32."""
    known = {(row["method"], row["way"], row["action"]): row["ratio"] for row in plain}
    print(f"\n{'eight bits beside float32':<69} {'int8':>8} {'float32':>8} {'of it':>7}")
    for row in eight:
        key = row["method"], row["way"], row["action"]
        if row["method"] != "plain" and key in known:
            name = f"{row['method']:<28} {row['way']:<30} {row['action']:<9}"
            print(f"{name} {row['ratio']:>8.4f} {known[key]:>8.4f} {row['ratio'] / known[key]:>7.3f}")


if __name__ == "__main__":
    main()
