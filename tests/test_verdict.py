"""What the demo says of its runs: caching against fewer steps, on a quiet machine and on a busy one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachekit.demo.report import GAINED, SPEEDUP, cells, html, legend, table
from cachekit.demo.runs import Trial
from cachekit.demo.scores import Row, score, timed
from cachekit.demo.settings import FEWER, UNCACHED, Setting
from cachekit.demo.verdict import gain, headline, measure


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
    trials = [Trial(setting, torch.zeros(3, 1, 1, 16, 16), {"cond": (True,)}, 1.0, pace, 1.0) for pace in paces]
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
