"""Every kernel against what it replaces, and against the time its bytes need, on a GPU.

Rows are kernels at the shapes of real models; columns are eager PyTorch, `torch.compile` of the same reference, and the
kernel: median time on the device, the part of the bandwidth of a measured device copy, the kernel's time over the
compiled reference's in the same round, and the time until the host has queued the kernel. A result that does not match
the reference is not timed.

    python bench/kernels.py [--shapes flux,wan,hunyuan] [--batches 1,2] [--rounds 30] [--out DIR]
    TRITON_INTERPRET=1 python bench/kernels.py --dry-run    # tiny, on the CPU: to try the script
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cachekit_kernels as kernels
import torch
from cachekit_kernels import reference
from records import record, write
from torch.utils import _pytree as pytree

SHAPES = {
    "flux": (4096 + 512, 3072),  # FLUX.1 at 1024x1024, image and text
    "wan": (32760, 1536),  # Wan2.1 1.3B, 81 frames at 480p
    "hunyuan": (118800, 3072),  # HunyuanVideo, 129 frames at 720p
    "tiny": (37, 96),
}


class Case(NamedTuple):
    """A kernel at work."""

    name: str  # of the function, and after it the order or the form
    arguments: Callable[..., tuple]  # from a source of tensors, and two numbers on the device
    tensors: int  # how many tensors of the value's dtype it must read or write
    options: dict[str, Any] = {}  # noqa: RUF012  # of the function

    @property
    def ours(self) -> Callable[..., Any]:
        """The kernel."""
        return functools.partial(getattr(kernels, self.name.partition(" ")[0]), **self.options)

    @property
    def plain(self) -> Callable[..., Any]:
        """Its reference."""
        return functools.partial(getattr(reference, self.name.partition(" ")[0]), **self.options)


def several(count: int, draw: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    return [draw() for _ in range(count)]


def polynomials(order: int) -> tuple[Case, Case]:
    return (
        Case(f"taylor_update {order}", lambda d, w: (several(order + 1, d), d(), w[0]), 2 * order + 2),
        Case(f"taylor_predict {order}", lambda d, w: (several(order + 1, d), w[0]), order + 2),
    )


CASES = (
    Case("residual_norm", lambda d, _: (d(), d(), d()), 4),
    Case("residual_norm rows", lambda d, _: (d(), d(), d()), 4, {"rows": True}),
    Case("residual_change", lambda d, _: (d(), d()), 2),
    Case("norm_ratio", lambda d, _: (d(), d()), 2),
    *polynomials(1),
    *polynomials(2),
    Case("newton_update 1", lambda d, w: (several(2, d), d(), w[:1]), 4),
    Case("newton_predict 1", lambda d, w: (several(2, d), w), 3),
    # Two tensors of float32 weigh as four of bfloat16.
    Case("guidance_delta", lambda d, w: (d(), d(torch.float32), d(torch.float32), w), 3 + 4),
)


def check(case: Case, arguments: tuple) -> None:
    """Refuse a kernel that is wrong."""
    found, wanted = case.ours(*arguments), case.plain(*arguments)
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        tolerance = 2e-2 if one.ndim else 1e-3  # bfloat16, one rounding more or less; a sum of float32
        try:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            raise SystemExit(f"{case.name}: the result is wrong, so it is not timed. {error}") from error


def measure(calls: list[Callable[[], Any]], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of every call on the device, in turn, each behind a flush of the cache.

    The flush takes the device longer than a call takes the host: it is queued when the device comes to it.
    """
    flush = torch.empty(4 * 2**30 if device.type == "cuda" else 1, dtype=torch.int8, device=device)
    samples: list[list[float]] = [[] for _ in calls]
    for n in range(rounds + 3):
        for call, found in zip(calls, samples, strict=True):
            flush.zero_()
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                seconds = start.elapsed_time(end) / 1e3
            else:
                begun = time.perf_counter()
                call()
                seconds = time.perf_counter() - begun
            if n >= 3:
                found.append(seconds)
    return samples


def on_the_host(call: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """The median of the seconds that a call takes to queue its work, of many in a row that nobody waits for."""
    found = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        for _ in range(20):  # far fewer than a queue holds
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def rows(shapes: list[str], batches: list[int], rounds: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row a kernel, shape and batch."""
    noise = torch.Generator(device).manual_seed(0)
    # On a CPU the script alone is tried, and Inductor takes it a minute.
    backend = "inductor" if device.type == "cuda" else "eager"
    for shape in shapes:
        for batch in batches:
            size = (batch, *SHAPES[shape])

            def draw(dtype: torch.dtype = torch.bfloat16, size: tuple[int, ...] = size) -> torch.Tensor:
                return torch.randn(size, generator=noise, device=device, dtype=dtype)

            source, target = draw(), draw()
            for case in CASES:
                torch._dynamo.reset()
                arguments = case.arguments(draw, torch.tensor([0.7, 1.3], device=device))
                compiled = torch.compile(case.plain, fullgraph=True, backend=backend)
                with torch.no_grad():
                    check(case, arguments)
                    calls = [functools.partial(each, *arguments) for each in (case.plain, compiled, case.ours)]
                    calls.append(functools.partial(target.copy_, source))
                    eager, fused, ours, copy = measure(calls, rounds, device)
                number = source.numel() * source.element_size()
                bandwidth = 2 * number / statistics.median(copy)
                moved = case.tensors * number
                low, middle, high = statistics.quantiles(ours, n=4)
                yield {
                    "kernel": case.name,
                    "shape": shape,
                    "batch": batch,
                    "eager_seconds": statistics.median(eager),
                    "compiled_seconds": statistics.median(fused),
                    "seconds": middle,
                    "host_seconds": on_the_host(calls[2], rounds, device),
                    "compiled_host_seconds": on_the_host(calls[1], rounds, device),
                    "p25": low,
                    "p75": high,
                    "bytes": moved,
                    "gb_per_second": moved / middle / 1e9,
                    "of_copy": moved / middle / bandwidth,
                    "compiled_of_copy": moved / statistics.median(fused) / bandwidth,
                    "over_compiled": statistics.median(a / b for a, b in zip(ours, fused, strict=True)),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="flux,wan,hunyuan", help=f"which of {', '.join(SHAPES)}")
    parser.add_argument("--batches", default="1,2", help="sizes of the batch")
    parser.add_argument("--rounds", type=int, default=30, help="samples a row")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: try the script")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    options = parser.parse_args()
    if options.dry_run:
        device, shapes, batches, rounds = torch.device("cpu"), ["tiny"], [1], 2
    elif torch.cuda.is_available():
        device, shapes = torch.device("cuda"), options.shapes.split(",")
        batches, rounds = [int(batch) for batch in options.batches.split(",")], options.rounds
    else:
        raise SystemExit("No GPU here, and a kernel's time on a CPU means nothing. Use --dry-run to try the script.")
    print(f"{'kernel':<18} {'shape':<8} {'batch':>5} {'eager us':>9} {'compiled':>9} {'kernel':>9} ", end="")
    print(f"{'GB/s':>7} {'of copy':>8} {'over compiled':>14} {'host us':>8}")
    made = record(device, rounds)
    for row in rows(shapes, batches, rounds, device):
        made["rows"].append(row)
        times = " ".join(f"{row[name] * 1e6:>9.1f}" for name in ("eager_seconds", "compiled_seconds", "seconds"))
        print(f"{row['kernel']:<18} {row['shape']:<8} {row['batch']:>5} {times} ", end="")
        print(f"{row['gb_per_second']:>7.0f} {row['of_copy']:>8.1%} {row['over_compiled']:>14.3f} ", end="")
        print(f"{row['host_seconds'] * 1e6:>8.1f}")
    write(made, options.out, "kernels-dry-run" if options.dry_run else "kernels")


if __name__ == "__main__":
    main()
