"""The demo: its metrics, and a short run from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from matplotlib.image import imread
from torch import Tensor

import cachekit as ck
from cachekit.demo import pictures
from cachekit.demo.__main__ import arguments, main
from cachekit.demo.metrics import psnr, ssim
from cachekit.demo.report import legend
from cachekit.demo.runs import STREAMS, choose
from cachekit.demo.sample import timesteps
from cachekit.demo.scores import Row, timed
from cachekit.demo.settings import CHOSEN, FEWER, PLANNED, counts_of, settings
from cachekit.demo.verdict import measure
from cachekit.diffusers import digits

seeds = st.integers(0, 2**32 - 1)


def images(seed: int, count: int = 3) -> Tensor:
    """[count, 1, 1, 16, 16] in [-1, 1]."""
    return torch.rand(count, 1, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Metrics -----------------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_equal_images_are_perfect(seed):
    x = images(seed)
    assert psnr(x, x).tolist() == [math.inf] * 3
    assert ssim(x, x) == pytest.approx(1.0, abs=1e-12)


@given(seed=seeds, offset=st.floats(1e-3, 2))
def test_psnr_of_a_constant_offset(seed, offset):
    x = images(seed).double()
    assert psnr(x + offset, x).tolist() == pytest.approx([20 * math.log10(2 / offset)] * 3, abs=1e-6)


def test_psnr_is_of_every_image():
    """One pixel off by 1 in one image is a mean squared error of 1/256 there, and none elsewhere."""
    x = torch.zeros(4, 1, 1, 16, 16)
    y = x.clone()
    y[2, 0, 0, 3, 5] += 1
    assert psnr(y, x).tolist() == pytest.approx([math.inf, math.inf, 10 * math.log10(4 * 256), math.inf])


def test_psnr_sees_beyond_the_ends():
    distance = psnr(torch.full((1, 1, 1, 16, 16), 1.5), torch.ones(1, 1, 1, 16, 16))
    assert distance.item() == pytest.approx(20 * math.log10(4))


@given(
    seed=seeds,
    metric=st.sampled_from([lambda x, y: psnr(x, y).mean().item(), ssim]),
    small=st.floats(0.01, 0.1),
    factor=st.floats(1.5, 5),
)
def test_metrics_are_symmetric_and_fall_with_noise(seed, metric, small, factor):
    x, noise = images(seed), images(seed + 1)
    near, far = x + small * noise, x + small * factor * noise
    assert metric(x, near) == pytest.approx(metric(near, x))
    assert metric(near, x) > metric(far, x)


@given(a=st.floats(-1, 1), b=st.floats(-1, 1))
def test_ssim_of_constant_images_is_their_luminance_term(a, b):
    x, y = (torch.full((2, 1, 1, 16, 16), value, dtype=torch.float64) for value in (a, b))
    c1 = (0.01 * 2) ** 2
    assert ssim(x, y) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-6)


@hypothesis_settings(max_examples=10)  # the loop is slow
@given(seed=seeds)
def test_ssim_agrees_with_a_loop_over_windows(seed):
    x, y = images(seed, 2).double(), images(seed + 1, 2).double()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for n in range(2):
        for top in range(16 - 6):
            for left in range(16 - 6):
                a, b = (batch[n, 0, 0, top : top + 7, left : left + 7].flatten() for batch in (x, y))
                covariance = ((a - a.mean()) * (b - b.mean())).mean()
                above = (2 * a.mean() * b.mean() + c1) * (2 * covariance + c2)
                below = (a.mean() ** 2 + b.mean() ** 2 + c1) * (a.var(correction=0) + b.var(correction=0) + c2)
                values.append(above / below)
    assert ssim(x, y) == pytest.approx(float(sum(values) / len(values)))


# Pictures ----------------------------------------------------------------------------------------------------


def test_pictures_show_ink_dark_and_differences_red(tmp_path):
    blank, inked = torch.full((10, 1, 1, 16, 16), -1.0), torch.full((10, 1, 1, 16, 16), 1.0)
    for name, png, colour in [
        ("blank", pictures.samples(blank, 5), (1, 1, 1)),
        ("inked", pictures.samples(inked, 5), (0, 0, 0)),
        ("equal", pictures.differences(blank, blank, 5), (1, 1, 1)),
        ("apart", pictures.differences(inked, blank, 5), (0.78, 0.1, 0.12)),
    ]:
        (tmp_path / name).write_bytes(png)
        pixels = imread(tmp_path / name, format="png")
        assert pixels.shape[:2] == (2 * 64 + 3, 5 * 64 + 4 * 3)
        assert tuple(pixels[0, 0, :3]) == pytest.approx(colour, abs=0.01)


# A short run -------------------------------------------------------------------------------------------------


def made_of(entry: dict[str, Any]) -> Row:
    """The row of an entry of results.json."""
    entry = {
        name: math.inf if entry[name] is None and name != "speedup_by_time" else entry[name] for name in Row._fields
    }
    computed = {stream: tuple(each) for stream, each in entry["computed"].items()}
    return Row(**{**entry, "computed": computed})


class Output:
    """What a short run left behind."""

    def __init__(self, folder: Path, printed: str) -> None:
        self.folder = folder
        self.printed = printed
        self.results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        self.rows: list[dict[str, Any]] = self.results["rows"]
        self.report = (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Output:
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *values: lines.append(" ".join(map(str, values))))
        main(["--short", "--seed", "3", "--threads", str(torch.get_num_threads()), "--out", str(folder)])
    return Output(folder, "\n".join(lines))


def test_every_file_is_there(output):
    count = len(output.rows)
    pngs = sorted(str(path.relative_to(output.folder)) for path in output.folder.rglob("*.png"))
    numbered = [f"{kind}/{n:02d}.png" for kind in ("differences", "samples") for n in range(count)]
    assert pngs == sorted(["front.png", "pattern.png", "speed.png", *numbered])
    for png in pngs:
        assert imread(output.folder / png).size > 0
    assert len(ck.Trace.load(output.folder / "digits.trace.safetensors")) == 20


def test_rows_are_what_was_planned(output):
    trace = ck.Trace.load(output.folder / "digits.trace.safetensors")
    chosen = choose(digits.load(), trace, counts_of(20, short=True), output.results["seed"] + 1)
    planned = settings(20, trace, chosen, short=True)
    assert [entry["label"] for entry in output.rows] == [setting.label for setting in planned]
    groups = {entry["group"] for entry in output.rows}
    assert groups | {CHOSEN} == set(pictures.COLOURS)  # what is chosen may be what is planned
    for entry, setting in zip(output.rows, planned, strict=True):
        assert set(entry["computed"]) == set(STREAMS)
        for computed in entry["computed"].values():
            assert len(computed) == setting.steps == entry["steps"] and computed[0]
            if setting.policy is None:
                assert all(computed)
            elif setting.policy.static:
                times = 1000 * timesteps(setting.steps)[:-1]
                plans = [ck.deciders.plan(decider, times) for decider in setting.policy.deciders.values()]
                assert tuple(computed) in (*plans, tuple(map(all, zip(*plans, strict=True))))
        counts = [sum(computed) for computed in entry["computed"].values()]
        assert entry["computed_steps"] == sum(counts) / len(counts)


def test_scores_are_consistent(output):
    uncached, *others = output.rows
    assert (uncached["psnr"], uncached["ssim"]) == (None, pytest.approx(1.0))
    assert uncached["speedup_by_time"] in (1.0, None)
    assert (uncached["work"], uncached["speedup_by_work"]) == (20.0, 1.0)
    for entry in others:
        assert entry["seconds"] > 0
        if entry["speedup_by_time"] is not None:  # unknown where the machine was busy
            assert entry["speedup_by_time"] == pytest.approx(uncached["seconds"] / entry["seconds"])
        assert entry["speedup_by_work"] == 20 / entry["work"]
        assert entry["computed_steps"] <= entry["work"] < 20
        if entry["group"] in (FEWER, PLANNED, CHOSEN):
            assert entry["work"] == entry["computed_steps"]  # nothing runs in between
        # A trained model and sane settings: all look alike, none is a copy.
        assert 15 < entry["worst"] < entry["psnr"] < 100
        assert 0.9 < entry["ssim"] < 1
        assert entry["recognised"] >= 0.8
    fewer = [entry["psnr"] for entry in others if entry["group"] == FEWER]
    assert fewer == sorted(fewer, reverse=True)


def test_no_two_rows_are_the_same_plan(output):
    plans = [str(entry["computed"]) for entry in output.rows if entry["group"] in (PLANNED, CHOSEN)]
    assert len(set(plans)) == len(plans)


def test_a_chosen_plan_that_is_the_planned_one_is_left_out(output):
    trace = ck.Trace.load(output.folder / "digits.trace.safetensors")
    frontier, counts = ck.frontier(trace), counts_of(20, short=True)

    def groups(chosen: dict[int, ck.Plan]) -> list[str]:
        return [setting.detail for setting in settings(20, trace, chosen, short=True) if setting.group == CHOSEN]

    same = {count: frontier[count - 1] for count in counts}
    other = ck.Plan(tuple(step < 8 for step in range(20)), forecaster=same[8].forecaster)
    held = ck.Plan(same[4].computed, forecaster="hold")
    assert groups(same) == []
    assert groups({count: dataclasses.replace(plan, error=0.5) for count, plan in same.items()}) == []
    assert groups({**same, 8: other}) == ["8 + newton 1 repaid, output"]
    assert groups({**same, 4: held}) == ["4 + hold, output"]


def test_the_report_says_which_speedups_it_shows(output):
    rows = [made_of(entry) for entry in output.rows]
    assert output.results["speedups"] == ("time" if timed(rows) else "work")
    assert measure(rows) in output.report and measure(rows) in output.printed
    for said in legend(rows):
        assert said in output.report and said in output.printed


def test_results_say_how_they_came_about(output):
    assert output.results["seed"] == 3 and output.results["short"] is True
    # Without the build's own suffix in some installations.
    assert torch.__version__.startswith(output.results["versions"]["torch"])
    assert output.results["versions"]["cachekit"] == ck.__version__


def test_the_report_stands_alone_and_holds_every_row(output):
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^">)]{0,22})', output.report)
    assert sources == ["data:image/png;base64,"] * (3 + 2 * len(output.rows))
    assert "http" not in re.sub(r"base64,[^\"]*", "", output.report)
    text = re.sub(r"<[^>]*>", "", output.report)
    for entry in output.rows:
        assert text.count(entry["label"]) >= 2  # in the table and with its samples
        assert entry["label"] in output.printed
    for sentence in output.results["verdict"]:
        assert sentence in text and sentence in output.printed


def test_options(capsys):
    full, short = arguments([]), arguments(["--short"])
    assert (full.digits_per_class, full.steps, full.out) == (4, 50, Path("demo_output"))
    assert (short.digits_per_class, short.steps) == (1, 20)
    assert arguments(["--short", "--steps", "30"]).steps == 30
    with pytest.raises(SystemExit):
        arguments(["--steps", "3"])
    assert "--steps must be at least 10, got 3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--out /proc/x cannot be made"):
        main(["--out", "/proc/x"])
