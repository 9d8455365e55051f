"""The scripts under bench/ that need no long run: what they compare, and that they refuse a wrong result."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def script(*arguments, interpreted=False):
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment)


def record(tmp_path, name, rows):
    path = tmp_path / name
    path.write_text(json.dumps({"date": "d", "commit": "c", "torch": "t", "processor": "p", "rows": rows}))
    return path


def row(method, ratio):
    return {"model": "medium", "method": method, "way": "programs", "action": "skipped", "ratio": ratio, "seconds": 1.0}


@pytest.mark.parametrize(
    ("after", "code", "word"),
    [
        ([row("a", 1.05), row("b", 0.1)], 0, "1.050"),
        ([row("a", 1.2), row("b", 0.1)], 1, "WORSE"),
        ([row("a", float("nan")), row("b", 0.1)], 1, "WORSE"),
        ([row("a", 1.0)], 1, "gone"),
        ([row("a", 1.0), {k: v for k, v in row("b", 0.1).items() if k != "ratio"}], 1, "no figure"),
        ([row("a", 1.0), row("b", 0.1), row("c", 9.0)], 0, "new"),
        ([row("a", 1.0), {**row("b", 0.1), "efficiency": 0.95, "peak_bytes": 100}], 0, "0.950"),
        ([row("a", 1.0), {**row("b", 0.1), "efficiency": 0.5, "peak_bytes": 100}], 1, "WORSE"),
        ([row("a", 1.0), {**row("b", 0.1), "efficiency": 0.99, "peak_bytes": 150}], 1, "WORSE"),
    ],
)
def test_compare_fails_where_a_row_is_worse_or_gone(tmp_path, after, code, word):
    known = {"efficiency": 1.0, "peak_bytes": 100} if any("efficiency" in each for each in after) else {}
    before = record(tmp_path, "before.json", [row("a", 1.0), {**row("b", 0.1), **known}])
    done = script(BENCH / "compare.py", before, record(tmp_path, "after.json", after))
    assert done.returncode == code, done.stderr
    assert word in done.stdout


def test_compare_of_a_committed_record_with_itself_is_well():
    for path in (BENCH / "results").glob("*.json"):
        done = script(BENCH / "compare.py", path, path)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_benchmark_runs_dry_and_writes_every_row(tmp_path):
    done = script(BENCH / "kernels.py", "--dry-run", "--out", tmp_path, interpreted=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "kernels-dry-run.json").read_text())["rows"]
    assert len(rows) == 11 and all(each["seconds"] > 0 for each in rows)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("part", ["kernels", "wan"])
def test_the_gpu_benchmark_runs_dry_and_writes_every_row(part, tmp_path):
    done = script(BENCH / "gpu.py", part, "--dry-run", "--out", tmp_path, interpreted=part == "kernels")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / f"gpu-{part}-dry-run.json").read_text())["rows"]
    same = script(BENCH / "compare.py", *[tmp_path / f"gpu-{part}-dry-run.json"] * 2)
    assert same.returncode == 0, same.stdout + same.stderr
    assert f"{part}: " in done.stdout.splitlines()[-2 if importlib.util.find_spec("cache_dit") is None else -1]
    if part == "kernels":
        assert {row["worst_relative_error"] < 1e-2 for row in rows if "worst_relative_error" in row} == {True}
        return
    ways = {(row["method"], row["way"]) for row in rows}
    methods = {method for method, _ in ways} - {"none"}
    assert len(methods) == 5
    assert ways >= {(method, way) for method in methods for way in ("eager", "regional", "hooks, eager")}
    assert ways >= {(method, "programs") for method in ("mag_cache", "first_block_cache")}
    # Set to one pattern: the outputs differ by no more than the hooks' own storage in bfloat16 makes of it.
    assert all(row["difference_to_ours"] < 1e-2 for row in rows if row["way"] == "hooks, eager")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_benchmark_times_no_wrong_result(tmp_path):
    wrong = (
        f"import sys, runpy; sys.path.insert(0, {str(BENCH)!r}); sys.argv = ['kernels.py', '--dry-run', '--out', "
        f"{str(tmp_path)!r}]; import cachekit_kernels as k; right = k.norm_ratio; "
        f"k.norm_ratio = lambda *a: right(*a) * 1.01; "
        f"runpy.run_path({str(BENCH / 'kernels.py')!r}, run_name='__main__')"
    )
    done = script("-c", wrong, interpreted=True)
    assert done.returncode != 0 and "norm_ratio: the result is wrong" in done.stderr
