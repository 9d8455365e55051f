"""The charts of the demo: names can be read, colours told apart, and lines join what belongs together."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pages
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import cachekit as ck
from cachekit.demo import pictures
from cachekit.demo.runs import record
from cachekit.demo.scores import Row
from cachekit.demo.settings import CHOSEN, FEWER, PLANNED, Setting, settings
from cachekit.diffusers import digits
from cachekit.drawing import DPI

NOTHING: dict[str, Any] = dict.fromkeys(Row._fields)
KEPT: list[dict[str, Any]] = json.loads((pages.ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))["rows"]
FULL = [Row(**{**NOTHING, **kept, "psnr": math.inf if kept["psnr"] is None else kept["psnr"]}) for kept in KEPT]
"""The rows of a whole run, as the documents keep them."""
TIMED = [row._replace(busy=False, speedup_by_time=row.speedup_by_work * 0.9) for row in FULL]
BUSY = [row._replace(busy=True, speedup_by_time=None) for row in FULL]


@pytest.fixture(scope="module")
def trace() -> ck.Trace:
    return record(digits.load(), 20, seed=1)


@pytest.fixture(scope="module")
def offered(trace) -> list[Setting]:
    """All settings, those of other plans than the planned ones included."""
    plans = {count: ck.plan(trace, computed=count - 1) for count in (10, 8)}
    return settings(20, trace, plans)


def texts(figure: Figure) -> dict[Text, Any]:
    """The box of every text that is drawn, from the renderer that draws it."""
    figure.set_dpi(DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    drawn: list[Text] = []
    with pytest.MonkeyPatch.context() as patch:
        plain = Text.draw

        def draw(text: Text, *args: Any, **kwargs: Any) -> None:
            drawn.append(text)
            plain(text, *args, **kwargs)

        patch.setattr(Text, "draw", draw)
        figure.draw(renderer)
    return {text: Text.get_window_extent(text, renderer) for text in drawn if text.get_text() and text.get_visible()}


def check(figure: Figure) -> None:
    """No two texts intersect, and none leaves the figure."""
    boxes = texts(figure)
    assert boxes
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (text, box), (other, beside) in itertools.combinations(boxes.items(), 2):
        apart = box.x1 <= beside.x0 or beside.x1 <= box.x0 or box.y1 <= beside.y0 or beside.y1 <= box.y0
        assert apart, (text, other)


def names(axes: Any) -> list[str]:
    """What is written beside the points."""
    return [text.get_text() for text in axes.texts if text.get_text()]


@pytest.mark.parametrize("rows", [TIMED, BUSY], ids=["timed", "busy"])
def test_no_name_of_the_speed_chart_covers_another_and_none_is_missing(rows):
    figure = pictures.speed(rows)
    check(figure)
    left, right = figure.axes
    shown = [row for row in rows if math.isfinite(row.psnr)]
    assert len(names(right)) == len(shown)
    assert len(names(left)) == sum(not row.partial for row in shown)


@hypothesis_settings(max_examples=5, deadline=None)  # each draws a chart
@given(
    points=st.lists(st.tuples(st.floats(8, 12), st.floats(38, 42)), min_size=len(FULL), max_size=len(FULL)),
)
def test_names_of_points_that_lie_close_together_keep_apart(points):
    rows = [
        row._replace(computed_steps=cost, speedup_by_work=50 / cost, psnr=psnr) if math.isfinite(row.psnr) else row
        for row, (cost, psnr) in zip(BUSY, points, strict=True)
    ]
    check(pictures.speed(rows))


def test_names_cover_no_mark_and_no_line():
    figure = pictures.speed(BUSY)
    boxes = texts(figure)
    for axes in figure.axes:
        beside = [boxes[text] for text in axes.texts if text.get_text()]
        for line in axes.get_lines():
            path = line.get_transform().transform_path(line.get_path())
            assert not any(box.contains(*point) for box in beside for point in path.vertices)
            if line.get_linestyle() != "None":
                assert not any(path.intersects_bbox(box, filled=False) for box in beside)


def test_the_right_half_of_the_speed_chart_is_never_empty():
    """It was, wherever the machine was busy during the uncached run."""
    for rows, measure in ((TIMED, "measured in seconds"), (BUSY, "by work, counted in multiplications")):
        _, right = pictures.speed(rows).axes
        assert right.get_xlabel() == f"speed-up over the uncached run, {measure}"
        drawn = sorted(x for line in right.get_lines() for x in line.get_xdata())
        finite = [row for row in rows if math.isfinite(row.psnr)]
        assert drawn == sorted(row.speedup_by_work if rows is BUSY else row.speedup_by_time for row in finite)


def test_no_text_of_the_pattern_covers_another():
    rows = [
        row._replace(steps=50, computed={"cond": (True,) * 25 + (False,) * 25, "uncond": (n % 2 == 0,) * 50})
        for n, row in enumerate(FULL)
    ]
    check(pictures.pattern(rows))


def test_what_is_predicted_and_measured_is_drawn_in_series_that_can_be_told_apart(trace, offered):
    policies = {setting.label: setting.policy for setting in offered if setting.policy is not None}
    rows = [
        Row(
            **NOTHING
            | {name: getattr(setting, name) for name in ("group", "detail", "series", "forecast", "partial", "steps")}
            | {"computed_steps": 10 + n % 7, "psnr": 40.0 + n}
        )
        for n, setting in enumerate(offered)
    ]
    figure = pictures.front(rows, trace, policies)
    check(figure)
    left, right = figure.axes
    looks = {
        line.get_label(): (line.get_color(), line.get_marker(), line.get_markerfacecolor())
        for line in right.get_lines()
    }
    assert {FEWER, PLANNED, CHOSEN, "mag_cache", "mag_cache + taylor 1", "step_mask + taylor 1, output"} <= set(looks)
    assert len(set(looks.values())) == len(looks)
    assert len({looks[series][0] for series in (FEWER, PLANNED, CHOSEN)}) == 3
    assert len({looks[series][1] for series in (FEWER, PLANNED, CHOSEN)}) == 3
    for axes in (left, right):
        joined = {line.get_color() for line in axes.get_lines() if line.get_linestyle() != "None"}
        assert joined <= {pictures.COLOURS[FEWER], pictures.COLOURS[PLANNED]}


def test_a_series_is_of_one_forecaster_in_one_place(offered):
    """So that no line can join settings of different ones."""
    series: dict[str, set[tuple[str, Any]]] = {}
    for setting in offered:
        if setting.policy is not None:
            series.setdefault(setting.series, set()).add((setting.policy.forecaster.name, str(setting.policy.sites)))
    assert len(series) > 10
    assert all(len(each) == 1 for each in series.values()), series


# How colours look to those who lack one kind of cone: Machado et al. 2009, for linear RGB.
EYES = {
    "all": np.eye(3),
    "no red": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "no green": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "no blue": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def lab(colour: str, eye: np.ndarray) -> np.ndarray:
    """CIELAB of a colour as an eye sees it: equal distances look about as different."""
    rgb = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    linear = (eye @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)).clip(0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", EYES)
def test_the_three_series_are_of_three_colours_whoever_looks(eye):
    colours = [lab(pictures.COLOURS[group], EYES[eye]) for group in (FEWER, PLANNED, CHOSEN)]
    for one, other in itertools.combinations(colours, 2):
        assert np.linalg.norm(one - other) > 30  # 2 can just be told apart


def test_every_method_has_a_colour_of_its_own(offered):
    assert {setting.group for setting in offered} == set(pictures.COLOURS)
    assert len(set(pictures.COLOURS.values())) == len(pictures.COLOURS)
