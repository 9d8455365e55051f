"""Laws that every forecaster obeys, and the formulas of Taylor and Newton restated."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from laws import assert_same, copied, counting, layout
from torch import Tensor

import cachekit
from cachekit import ArgumentError, ArgumentTypeError
from cachekit.forecasters import Clock, Forecaster, hold, newton, taylor, two_point

FAMILIES = {"taylor": taylor, "newton": newton}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Config(NamedTuple):
    """A forecaster as a description."""

    family: str = "hold"
    order: int = 0
    dtype: torch.dtype | None = None
    repay: bool = False

    def build(self) -> Forecaster:
        """The forecaster."""
        if self.repay:
            return newton(self.order, repay=True, dtype=self.dtype)
        return hold() if self.family == "hold" else FAMILIES[self.family](self.order, dtype=self.dtype)


class History(NamedTuple):
    """What was computed, and when."""

    steps: list[int]
    values: list[float]

    def on(self, function: Callable[[int], float]) -> History:
        """The same steps with the values of a function."""
        return self._replace(values=[function(step) for step in self.steps])


ORDERS = [(family, order) for family in FAMILIES for order in range(4)]
STORED = (None, torch.bfloat16)
BARE = [Config(), *(Config(*entry, dtype) for entry in ORDERS for dtype in STORED)]
ALL = [*BARE, *(Config("newton", order, dtype, repay=True) for order in range(3) for dtype in STORED)]


def _id(config: Config) -> str:
    return f"{config.family}{config.order}{' repaid' if config.repay else ''}-{config.dtype or 'as is'}"


every_forecaster = pytest.mark.parametrize("config", ALL, ids=_id)
every_order = pytest.mark.parametrize("order", range(4))

AHEAD = st.integers(1, 8)
VALUES = st.floats(-100, 100, width=16)
LINES = st.tuples(st.integers(-8, 8), st.integers(-4, 4))


def histories(values: st.SearchStrategy = VALUES, least: int = 1) -> st.SearchStrategy[History]:
    """Values computed at steps of any start and any spacing, at most 41."""
    entries = st.lists(st.tuples(st.integers(1, 6), values), min_size=least, max_size=7)
    return entries.map(
        lambda drawn: History(
            steps=[int(step) - 1 for step in np.cumsum([gap for gap, _ in drawn])],
            values=[value for _, value in drawn],
        )
    )


def clock(forecaster: Forecaster, step: float, steps: float = 42) -> Clock | None:
    """The time as the engine shows it."""
    return Clock(torch.tensor(float(step)), torch.tensor(float(steps))) if forecaster.timed else None


def forecast(forecaster: Forecaster, history: History, ahead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What is predicted `ahead` of the last computed step: [1]."""
    state = forecaster.init(torch.full((1,), math.nan, dtype=dtype))  # only its shape, dtype and device count
    for step, value in zip(*history, strict=True):
        state = forecaster.update(state, torch.tensor([value], dtype=dtype), clock(forecaster, step))
    return forecaster.predict(state, clock(forecaster, history.steps[-1] + ahead))


def double(number: float | Fraction) -> Tensor:
    """A number as the forecast of one: [1] float64."""
    return torch.tensor([float(number)], dtype=torch.float64)


@every_forecaster
@settings(max_examples=30)
@given(history=histories(), dtype=st.sampled_from(DTYPES))
def test_predict_at_the_step_just_updated_is_the_value(config, history, dtype):
    value = torch.tensor(history.values[-1:], dtype=dtype)
    stored = value.to(config.dtype or dtype).to(dtype)  # what storage in a narrow type leaves of it
    assert_same(forecast(config.build(), history, 0, dtype), stored)


@every_forecaster
@settings(max_examples=30)
@given(history=histories(), constant=st.integers(-256, 256), ahead=AHEAD)
def test_exact_on_constants(config, history, constant, ahead):
    # Whole numbers to 256: of others bfloat16 storage leaves a rounding error, which looks like a slope.
    assert_same(forecast(config.build(), history.on(lambda _: constant), ahead), double(constant))


@pytest.mark.parametrize("config", BARE, ids=_id)  # on lines the first gap owes something too: it was held
@settings(max_examples=30)
@given(history=histories(least=2), line=LINES, ahead=AHEAD)
def test_exact_on_lines(config, history, line, ahead):
    start, slope = line  # whole numbers below 256 at every step, for the same reason
    at = history.steps[-1] + (ahead if config.order else 0)
    found = forecast(config.build(), history.on(lambda step: start + slope * step), at - history.steps[-1])
    assert_same(found, double(start + slope * at))


@every_order
@given(history=histories(), ahead=AHEAD, factors=st.lists(st.integers(-3, 3), min_size=4, max_size=4))
@example(history=History([1, 2, 4, 7, 13], []), ahead=3, factors=[1, -2, 3, -1])
def test_newton_is_exact_on_polynomials_of_its_degree(order, history, ahead, factors):
    polynomial = np.polynomial.Polynomial(factors[: min(order + 1, len(history.steps))])
    found = forecast(newton(order), history.on(polynomial), ahead)
    torch.testing.assert_close(found, double(polynomial(history.steps[-1] + ahead)))


def lagrange(history: History, at: int) -> Fraction:
    """The polynomial through all the points, in whole numbers."""
    total = Fraction(0)
    for node, value in zip(*history, strict=True):
        others = [other for other in history.steps if other != node]
        total += value * math.prod((Fraction(at - other, node - other) for other in others), start=Fraction(1))
    return total


@every_order
@given(history=histories(st.integers(-9, 9)), ahead=AHEAD)
def test_newton_is_the_polynomial_through_the_last_values(order, history, ahead):
    last = History(*(entries[-order - 1 :] for entries in history))  # fewer until there are enough
    found = forecast(newton(order), history, ahead)
    torch.testing.assert_close(found, double(lagrange(last, history.steps[-1] + ahead)))


@every_order
@given(history=histories(), ahead=AHEAD)
def test_newton_that_is_not_filled_has_a_lower_degree(order, history, ahead):
    lower = newton(min(order, len(history.steps) - 1))
    assert_same(forecast(newton(order), history, ahead), forecast(lower, history, ahead))


@every_order
@given(history=histories(st.integers(-9, 9)), ahead=st.integers(1, 3))
@example(history=History([0, 4], [1.0, 3.0]), ahead=1)
@example(history=History([0, 1, 2, 5, 9], [1.0, 0.0, 3.0, 4.0, -2.0]), ahead=1)
def test_what_a_gap_was_off_is_repaid_at_the_very_next_step(order, history, ahead):
    seen = History(*(entries[-order - 2 :] for entries in history))
    then, now = (History(*(entries[part] for entries in seen)) for part in (slice(-1), slice(-order - 1, None)))
    wanted = lagrange(now, history.steps[-1] + ahead)
    if ahead == 1 and then.steps:
        gap = range(then.steps[-1] + 1, now.steps[-1])
        wanted += sum(lagrange(seen, step) - lagrange(then, step) for step in gap)
    torch.testing.assert_close(forecast(newton(order, repay=True), history, ahead), double(wanted))


@pytest.mark.parametrize("order", range(3))
@given(factors=st.lists(st.integers(-3, 3), min_size=5, max_size=5), gaps=st.lists(st.integers(2, 6), min_size=5))
def test_nothing_of_a_polynomial_stays_owed(order, factors, gaps):
    """Over a run with a gap after every computed step, all that stays off is the bare forecast where it is repaid."""
    polynomial, forecaster = np.polynomial.Polynomial(factors[: order + 2]), newton(order, repay=True)
    state, off = forecaster.init(torch.zeros(1, dtype=torch.float64)), 0.0
    computed = {*range(order), *(order + np.cumsum([0, *gaps])).tolist()}
    seen: list[int] = []
    for step in range(max(computed) + 2):
        value = float(polynomial(step))
        if step in computed:
            state = forecaster.update(state, double(value), clock(forecaster, step))
            seen.append(step)
            continue
        off += float(forecaster.predict(state, clock(forecaster, step))) - value
        if step - 1 in computed:
            bare = forecast(newton(order), History(seen, [float(polynomial(at)) for at in seen]), 1)
            assert off == pytest.approx(float(bare) - value, rel=1e-4, abs=1e-4 * abs(value) + 1e-3)


def taylor_sum(order: int, history: History, ahead: int) -> float:
    """TaylorSeer, equations 4 to 6; a derivative appears once there are two values of the one below."""
    factors: list[float] = []
    for i, value in enumerate(history.values):
        before, factors = factors, [value]
        for below in range(min(order, len(before))):
            factors.append((factors[below] - before[below]) / (history.steps[i] - history.steps[i - 1]))
    return sum(factor * ahead**i / math.factorial(i) for i, factor in enumerate(factors))


@every_order
@given(history=histories(), ahead=AHEAD)
@example(history=History([0, 1, 4, 6, 9], [3.0, 1.0, 4.0, 1.0, 5.0]), ahead=3)
@example(history=History([2, 4], [3.0, 1.0]), ahead=3)
def test_taylor_is_the_published_sum(order, history, ahead):
    torch.testing.assert_close(forecast(taylor(order), history, ahead), double(taylor_sum(order, history, ahead)))


@given(history=histories(), ahead=AHEAD)
def test_order_zero_is_hold_and_order_one_is_both(history, ahead):
    for low in (taylor(0), newton(0)):
        assert_same(forecast(low, history, ahead), forecast(hold(), history, ahead))
    assert_same(forecast(taylor(1), history, ahead), forecast(newton(1), history, ahead))


@every_forecaster
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3)], ids=str)
def test_forecast_is_like_the_value_and_the_layout_stays(config, dtype, shape):
    forecaster = config.build()
    state = forecaster.init(torch.ones(shape, dtype=dtype))
    first = layout(state)
    for step in range(6):
        state = forecaster.update(state, torch.full(shape, float(step), dtype=dtype), clock(forecaster, step))
        predicted = forecaster.predict(state, clock(forecaster, step + 2))
        assert layout(state) == first
        assert layout(predicted) == layout(torch.empty(shape, dtype=dtype))


@every_forecaster
def test_forecasters_are_pure(config):
    forecaster = config.build()
    state = forecaster.init(torch.zeros(2, 3))
    for step in range(6):
        value, now = torch.full((2, 3), 2.0**step), clock(forecaster, step)
        kept = copied((state, value, now))
        updates = [forecaster.update(state, value, now) for _ in range(2)]
        assert_same(*updates)
        assert_same((state, value, now), kept)
        state = updates[0]
        kept = copied(state)
        if now is not None:
            now.step.fill_(math.nan)  # the caller's clock is not part of the state
        assert_same(*(forecaster.predict(state, clock(forecaster, step + 3)) for _ in range(2)))
        assert_same(state, kept)


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@every_forecaster
def test_compiled_agrees_and_never_recompiles(config, backend):
    forecaster = config.build()
    counters = [counting(backend) for _ in range(2)]
    update = torch.compile(forecaster.update, backend=counters[0], fullgraph=True)
    predict = torch.compile(forecaster.predict, backend=counters[1], fullgraph=True)
    values = torch.sin(torch.arange(12.0)[:, None] * torch.arange(1.0, 7.0)).unflatten(1, (2, 3))
    plain = compiled = forecaster.init(values[0])
    for step in range(12):
        now = clock(forecaster, step)
        if step % 3 != 2:
            plain = forecaster.update(plain, values[step].clone(), now)
            compiled = update(compiled, values[step].clone(), now)
            torch.testing.assert_close(compiled, plain)
        torch.testing.assert_close(predict(compiled, now), forecaster.predict(plain, now))
    # One graph each, or none: the update of hold has no operation, so that no backend sees it.
    assert all(counter.frame_count <= 1 for counter in counters)


def two_points(history: History, weight, steps: int = 42, feedback: bool = False) -> Fraction:
    """The forecast one step after the last, in fractions, as the paper writes it; with `feedback`, as hooks do."""
    seen: list[Fraction] = []
    end = history.steps[-1] + 1
    values = dict(zip(history.steps, map(Fraction, history.values), strict=True))
    for step in range(history.steps[0], end + 1):
        if step in values:
            seen.append(values[step])
        elif step == end or feedback:
            before = seen[-2] if len(seen) > 1 else seen[-1]
            made = seen[-1] + Fraction(weight(step, steps)) * (seen[-1] - before)
            if step == end:
                return made
            seen.append(made)
    raise AssertionError


@settings(max_examples=60)
@given(history=histories(LINES.map(lambda line: float(line[0]))), weight=st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5]))
def test_two_points_by_a_number(history, weight):
    for feedback in (False, True):
        wanted = double(two_points(history, lambda step, steps: weight, feedback=feedback))
        got = forecast(two_point(weight, feedback=feedback), history, 1)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


@settings(max_examples=30)
@given(history=histories(LINES.map(lambda line: float(line[0]))))
def test_two_points_by_a_ramp(history):
    ramp = double(two_points(history, lambda step, steps: Fraction(step, steps - 1)))
    torch.testing.assert_close(forecast(two_point("ramp"), history, 1), ramp, rtol=1e-6, atol=1e-5)
    same = forecast(two_point(lambda step, steps: step / (steps - 1)), history, 1)
    torch.testing.assert_close(same, ramp, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("feedback", [False, True])
def test_two_points_keep_their_layout(shape, dtype, feedback):
    forecaster = two_point(0.3, feedback=feedback)
    state = forecaster.init(torch.ones(shape, dtype=dtype))
    first = layout(state)
    for step in range(0, 8, 2):
        state = forecaster.update(state, torch.full(shape, float(step), dtype=dtype), clock(forecaster, step))
        assert layout(state) == first
        assert layout(forecaster.predict(state, clock(forecaster, step + 1))) == layout(torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: two_point("fast"), ArgumentError, "`weight`.*'fast'"),
        (lambda: two_point(True), ArgumentError, "`weight`.*True"),
        (lambda: two_point("ramp", feedback=True), ArgumentError, "`weight`.*feedback.*'ramp'"),
        (lambda: taylor(-1), ArgumentError, "`order`.*-1"),
        (lambda: newton(1.5), ArgumentError, "`order`.*1.5"),
        (lambda: newton(True), ArgumentError, "`order`.*True"),
        (lambda: taylor("2"), ArgumentError, "`order`.*'2'"),
        (lambda: taylor(1, dtype="bfloat16"), ArgumentTypeError, "`dtype`.*'bfloat16'"),
        (lambda: newton(1, dtype=torch.int64), ArgumentTypeError, "`dtype`.*torch.int64"),
        (lambda: cachekit.first_block_cache(0.1, forecaster=2), ArgumentTypeError, "`forecaster`.*2"),
        (lambda: cachekit.mag_cache([1.0], forecaster="hold"), ArgumentTypeError, "`forecaster`.*'hold'"),
        (lambda: cachekit.step_mask([1], forecaster=hold), ArgumentTypeError, "`forecaster`.*function hold"),
    ],
)
def test_what_cannot_work_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
