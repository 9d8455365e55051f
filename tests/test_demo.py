"""The demo: its metrics, its comparison with fewer steps, and a short run from end to end."""

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
from cachekit.demo.report import GAINED, SPEEDUP, cells, html, legend, table
from cachekit.demo.runs import STREAMS, Trial, choose
from cachekit.demo.sample import timesteps
from cachekit.demo.scores import Row, score, timed
from cachekit.demo.settings import CHOSEN, FEWER, PLANNED, UNCACHED, Setting, counts_of, settings
from cachekit.demo.verdict import gain, headline, measure
from cachekit.diffusers import digits

seeds = st.integers(0, 2**32 - 1)


def images(seed: int, count: int = 3) -> Tensor:
    """[count, 1, 1, 16, 16] in [-1, 1]."""
    return torch.rand(count, 1, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def row(group: str, steps: float, psnr: float, seconds: float | None = None) -> Row:
    """A row of which only what is compared matters."""
    return Row(
        group=group,
        detail=f"{steps:g}",
        series=group,
        policy="",
        forecast=False,
        partial=False,
        steps=50,
        computed={"cond": (True,) * int(steps)},
        computed_steps=steps,
        work=steps,
        speedup_by_work=50 / steps,
        seconds=steps if seconds is None else seconds,
        pace=1.0,
        busy=False,
        speedup_by_time=50 / (steps if seconds is None else seconds),
        psnr=psnr,
        worst=psnr,
        ssim=1.0,
        recognised=1.0,
    )


PLAIN = [row(UNCACHED, 50, math.inf), row(FEWER, 40, 50.0), row(FEWER, 20, 40.0), row(FEWER, 10, 30.0)]


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


# Against fewer steps -----------------------------------------------------------------------------------------


@given(steps=st.floats(10, 40), distance=st.floats(20, 60))
def test_gain_is_over_the_line_between_the_two_nearest_runs(steps, distance):
    cached = row("step_mask", steps, distance)
    expected = 30 + 10 * math.log2(steps / 10)  # PLAIN gains 10 dB with every doubling
    assert gain(cached, [*PLAIN, cached]).at_equal_work == pytest.approx(distance - expected)


def test_gain_by_work_and_by_time_are_two_things():
    cached = row("first_block_cache", 20, 45.0, seconds=40.0)
    assert gain(cached, [*PLAIN, cached]) == pytest.approx((5.0, -5.0))


@pytest.mark.parametrize(
    ("steps", "distance", "expected"),
    [
        (45, 49.0, -1.0),  # costs more than 40 plain steps and is worse
        (45, 51.0, None),  # costs more and is better: 45 plain steps are not known
        (5, 31.0, 1.0),  # costs less than 10 plain steps and is better
        (5, 29.0, None),
        (20, math.inf, None),  # identical to the reference
    ],
)
def test_beyond_the_ends_only_what_is_certain_is_claimed(steps, distance, expected):
    cached = row("mag_cache", steps, distance)
    assert gain(cached, [*PLAIN, cached]).at_equal_work == expected


def test_steps_that_run_in_part_are_held_against_work():
    """Not against computed steps, of which they are no measure."""
    cached = row("taylorseer", 10, 45.0)._replace(partial=True, work=20.0, seconds=20.0)
    assert gain(cached, PLAIN) == pytest.approx((5.0, 5.0))


def test_runs_without_a_cache_gain_nothing():
    assert all(gain(entry, PLAIN) == (None, None) for entry in PLAIN)


def test_headline_is_a_sentence_and_names_the_best_and_every_loser():
    rows = [*PLAIN, row("step_mask", 20, 44.0), row("mag_cache", 20, 38.5), row("first_block_cache", 20, 41.0, 40.0)]
    best, which, work, seconds = headline(rows)
    assert best == (
        "With the work of 20 of 50 steps, the best cache keeps 44.0 dB of PSNR, where simply taking fewer steps keeps "
        "about 40.0 dB."
    )
    assert which.startswith("The best cached run is “step_mask 20”.")
    assert work == (
        "At equal work, 2 of 3 cached settings beat taking fewer steps. These do not: mag_cache 20 (-1.5 dB)."
    )
    assert "In equal time, 1 of 3" in seconds
    assert "first_block_cache 20 (-9.0 dB); mag_cache 20 (-1.5 dB)" in seconds


def test_headline_counts_work_and_not_steps():
    best, *_ = headline([*PLAIN, row("first_block_cache", 14, 46.0)._replace(work=20.04)])
    assert best.startswith("With the work of 20 of 50 steps, the best cache keeps 46.0 dB")


def test_headline_says_what_is_only_a_bound():
    best, *_ = headline([*PLAIN, row("step_mask", 5, 31.0)])
    assert best.endswith("where simply taking fewer steps keeps less than 30.0 dB.")


def test_headline_admits_that_no_cache_wins():
    best, *_ = headline([*PLAIN, row("mag_cache", 20, 38.5)])
    assert best == (
        "Here no cache beats simply taking fewer steps: with the work of 20 of 50 steps the best one keeps 38.5 dB of "
        "PSNR, where fewer steps keep about 40.0 dB."
    )


def test_headline_without_anything_to_compare():
    assert len(headline([*PLAIN, row("mag_cache", 45, 60.0)])) == 1


# On a busy machine -------------------------------------------------------------------------------------------


def scored(paces: list[float]) -> list[Row]:
    """Rows of runs whose computed forwards took so long."""
    setting = Setting(UNCACHED, "", 1)
    trials = [Trial(setting, images(0), {"cond": (True,)}, 1.0, pace, 1.0) for pace in paces]
    return score(trials, torch.arange(3))


def test_a_pace_of_its_own_is_taken_for_a_busy_machine():
    rows = scored([1.0, 1.1, 0.9, 1.0, 1.3, 0.7])
    assert [entry.busy for entry in rows] == [False] * 4 + [True] * 2
    assert [entry.speedup_by_time for entry in rows] == [1.0] * 4 + [None] * 2
    assert [entry.speedup_by_work for entry in rows] == [1.0] * 6
    assert not timed(rows) and timed(rows[:4])


def test_no_speedup_over_an_uncached_run_on_a_busy_machine():
    assert [entry.speedup_by_time for entry in scored([1.3, 1.0, 1.0])] == [None] * 3


CACHED = row("mag_cache", 20, 45.0, seconds=40.0)
DISTURBED = [*PLAIN, CACHED._replace(busy=True, speedup_by_time=None), row("step_mask", 10, 35.0)]
PIXELS = dict.fromkeys(["pattern", "front", "speed"], b"") | {
    f"{kind}/{n:02d}": b"" for kind in ("samples", "differences") for n in range(len(DISTURBED))
}


def test_seconds_that_can_be_trusted_are_shown_with_the_work_beside_them():
    rows = [*PLAIN, CACHED]
    made = cells(CACHED, rows)
    assert (made[SPEEDUP, "work"], made[SPEEDUP, "time"]) == ("2.50x", "1.25x")
    assert (made[GAINED, "work"], made[GAINED, "time"]) == ("+5.0", "-5.0")
    assert measure(rows).startswith("Speed-ups are shown by time and, beside it, by work")
    page = html(rows, headline(rows), measure(rows), {}, PIXELS, 1)
    assert 'class="measure "' in page and "measured in seconds" in page and "1.25x, 45.0 dB" in page


def test_seconds_that_cannot_be_trusted_give_way_to_work():
    """Everywhere: no column, no sentence and no chart is by time, and the report says so where it can be seen."""
    for entry in DISTURBED:
        made = cells(entry, DISTURBED)
        assert made[SPEEDUP, "work"] == f"{entry.speedup_by_work:.2f}x"
        assert (SPEEDUP, "time") not in made and (GAINED, "time") not in made
        assert made["", "seconds"].startswith("~") == entry.busy
    assert gain(DISTURBED[-2], DISTURBED) == (5.0, None)
    assert not any("time" in sentence for sentence in headline(DISTURBED))
    said = measure(DISTURBED)
    assert said.startswith("Speed-ups are shown by work, which is counted in multiplications, not by time: during 1 of")
    page = html(DISTURBED, headline(DISTURBED), said, {}, PIXELS, 1)
    assert f'<p class="measure busy">{said}</p>' in page
    assert "by work, for seconds cannot be trusted here" in page and "2.50x by work, 45.0 dB" in page
    # Nothing is blank but what has nothing to be held against.
    assert all(cell for entry in DISTURBED for (common, _), cell in cells(entry, DISTURBED).items() if common != GAINED)


def test_every_mark_of_the_table_is_explained_under_it():
    partial = row("taylorseer", 20, 45.0)._replace(partial=True)
    split = CACHED._replace(computed={"cond": (True,), "uncond": (False,)})
    for rows, marks in (
        ([*PLAIN, CACHED], set()),
        ([*PLAIN, partial], {"*"}),
        ([*PLAIN, split], {"a"}),
        ([*DISTURBED, partial, split], {"*", "~", "a"}),
    ):
        assert {said[0] for said in legend(rows)} & {"*", "~", "a"} == marks
        shown = table(rows)
        assert ("*" in shown, "~" in shown, " / " in shown) == tuple(mark in marks for mark in "*~a")
        page = html(
            rows,
            ["."],
            ".",
            {},
            {**PIXELS, "samples/06": b"", "differences/06": b"", "samples/07": b"", "differences/07": b""},
            1,
        )
        items = page[page.index("</table>") :]
        assert items.index('<ul class="note">') < 100
        assert all(f"<li>{said}</li>" in items for said in legend(rows))


def test_the_table_is_of_one_width():
    """In a terminal, the headings that stand above several columns included."""
    for rows in ([*PLAIN, CACHED], DISTURBED):
        above, *lines = table(rows).splitlines()
        assert len({len(line) for line in lines}) == 1
        assert SPEEDUP in above and GAINED in above and len(above) <= len(lines[0])


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
