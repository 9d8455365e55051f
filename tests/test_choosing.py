"""The closed loop: which plans are run, and which of them is taken."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from traces import STEPS, inputs, model_of, quietly, smooth, times

import cachekit as ck
from cachekit import ArgumentError, ArgumentTypeError
from cachekit.forecasters import newton


def test_choosing_halves_in_on_the_fewest_steps(recorded):
    model, ran = model_of("plain"), []

    @torch.no_grad()
    def sample(policy: ck.Policy | None) -> Tensor:
        ran.append(policy)
        x, _, text = inputs(0)
        step = ck.cache(model, policy or ck.step_mask([1] * STEPS))
        state = step.init(times(), x, torch.ones(2), text)
        for now in range(STEPS):
            out, state = step(state, x, torch.full((2,), 1 - now / STEPS), text)
            x = x - out / STEPS
        return x

    step = ck.cache(model, ck.recording("output"))
    x, _, text = inputs(0)
    with torch.no_grad():
        state = step.init(times(), x, torch.ones(2), text)
        for now in range(STEPS):
            out, state = step(state, x, torch.full((2,), 1 - now / STEPS), text)
            x = x - out / STEPS
    trace = ck.Trace.from_state(state)
    choice = ck.choose(trace, sample, "35 dB")
    assert ran[0] is None and len(ran) == 1 + len(choice.measured) <= 1 + 5 * 4
    assert max(quality for plan, quality in choice.measured if len(plan.steps) == len(choice.plan.steps)) >= 35
    assert all(quality < 35 for plan, quality in choice.measured if len(plan.steps) < len(choice.plan.steps))
    assert "to keep 35 dB" in str(choice)
    ran.clear()
    alone = ck.choose(trace, sample, "35 dB", spreads=(None,), even=False)
    assert len(ran) <= 1 + 4 and len(alone.plan.steps) >= len(choice.plan.steps)
    nothing = ck.choose(trace, sample, 1000.0)
    assert len(nothing.plan.steps) == STEPS
    with pytest.raises(ArgumentError, match="at_least"):
        ck.choose(trace, sample, "very good")
    with pytest.raises(ArgumentTypeError, match="run"):
        ck.choose(trace, None, "40 dB")


def test_choosing_takes_the_plan_that_keeps_most():
    trace = ck.Trace.of(smooth(5, 14), 14, step_sizes=torch.ones(14))
    plans = [ck.plan(trace.carried(spread), computed=5) for spread in (None, 0.6, 0.2)]
    assert len({plan.steps for plan in plans}) == 3
    for wanted in plans:

        def sample(policy: ck.Policy | None, wanted: ck.Plan = wanted) -> Tensor:
            if policy is None:
                return torch.zeros(1, 2)
            nodes = [step for step, computes in enumerate(ck.deciders.plan(policy.decider, 14)) if computes]
            return torch.full((1, 2), 0.001 if tuple(nodes) == wanted.steps else 0.1)

        choice = ck.choose(trace, sample, computed=5, spreads=(None, 0.6, 0.2, 0.2), even=False, peak=1.0)
        assert choice.plan.steps == wanted.steps and choice.at_least is None
        assert [plan.steps for plan, _ in choice.measured] == [plan.steps for plan in plans]  # no plan is run twice
        assert max(quality for _, quality in choice.measured) == pytest.approx(60)
        assert choice.origins == ("planned", "planned, spread 0.6", "planned, spread 0.2")
        assert str(choice).endswith("dB  planned, spread 0.2") and "measured:" in str(choice)
        assert ck.choose(trace, sample, computed=5, spreads=(None,), even=False, peak=1.0).plan.steps == plans[0].steps


@pytest.mark.parametrize("ruin", ["far off", "not finite"])
def test_a_sample_that_is_equal_does_not_hide_one_that_is_ruined(ruin):
    trace, equal = ck.Trace.of(smooth(5, 14), 14, step_sizes=torch.ones(14)), torch.linspace(0, 1, 8).reshape(2, 4)
    ruined = equal.clone()
    ruined[1] += 0.5 if ruin == "far off" else math.nan
    choice = ck.choose(trace, lambda policy: equal if policy is None else ruined, "60 dB")
    assert len(choice.plan.steps) == 14 and all(quality < 60 for _, quality in choice.measured)
    # Nor is the first plan taken because what it gave is no number.
    first = ck.plan(trace, computed=5).steps

    def sample(policy: ck.Policy | None):
        computes = [] if policy is None else ck.deciders.plan(policy.decider, 14)
        return (ruined if [n for n, each in enumerate(computes) if each] == list(first) else equal + 0.1).numpy()

    choice = ck.choose(trace, sample, computed=5, spreads=(None, 0.6), even=False)
    assert len(choice.measured) == 2 and choice.plan.steps != first


def ran(wanted: dict[tuple[int, ...], float], seen: list[tuple[int, ...]], steps: int = 14):
    """A run whose samples are as far off as is wanted of the steps that compute, else by 0.1."""

    def sample(policy: ck.Policy | None) -> Tensor:
        if policy is None:
            return torch.zeros(1, 2)
        computes = ck.deciders.plan(policy.decider, steps)
        assert computes is not None
        seen.append(tuple(step for step, each in enumerate(computes) if each))
        return torch.full((1, 2), wanted.get(seen[-1], 0.1))

    return sample


@given(st.integers(1, 30), st.data())
@settings(deadline=None)
def test_even_intervals_are_among_the_candidates(steps, data):
    count = data.draw(st.integers(1, steps))
    longest = data.draw(st.none() | st.integers(math.ceil(steps / count) - 1, steps))
    always = (0, *data.draw(st.sets(st.integers(0, steps - 1), max_size=min(2, count - 1))))
    values = [torch.tensor([1.0, float(step) ** 2]) for step in range(steps)]
    trace, seen = ck.Trace.of(values, steps), []
    try:
        ck.choose(
            trace, ran({}, seen, steps), computed=count, spreads=(None,), max_gap=longest, always=always, peak=1.0
        )
    except ArgumentError:  # so few steps do not keep both
        assume(False)
    shortest = math.ceil(steps / count)
    wanted = set()
    for interval in (shortest, shortest + 1):
        for start in range(steps + 1):
            nodes = tuple(step for step in range(steps) if step >= start or step % interval == 0)
            fits = longest is None or all(b - a <= longest + 1 for a, b in itertools.pairwise((*nodes, steps)))
            if len(nodes) == count and fits and set(always) <= set(nodes) and interval <= steps:
                wanted.add(nodes)
    assert set(seen[1:]) <= wanted <= set(seen) and len(seen) == len(set(seen))
    assert len(seen) <= 3 and all(len(nodes) == count for nodes in seen)


def test_refining_moves_single_steps_and_keeps_what_is_better():
    trace, seen = ck.Trace.of(smooth(5, 14), 14, step_sizes=torch.ones(14)), []
    first = ck.plan(trace, computed=5).steps
    options = {"spreads": (None,), "even": False, "peak": 1.0}
    near = {
        tuple(sorted({*first, step + by} - {step}))
        for step in first[1:]
        for by in (-2, -1, 1, 2)
        if 0 < step + by < 14 and step + by not in first
    }
    everything = ck.choose(trace, ran({}, seen), computed=5, refine=1000, **options)
    assert everything.plan.steps == first == seen[0] and set(seen[1:]) == near and len(seen) == 1 + len(near)
    predicted = [
        ck.replay(
            trace, ck.step_mask([s in n for s in range(14)], forecaster=newton(1, repay=True), sites="output")
        ).error
        for n in seen[1:]
    ]
    assert predicted == sorted(predicted)
    # What is better is gone on from, and no further than there are runs.
    better, seen[:] = seen[4], []
    choice = ck.choose(trace, ran({better: 0.01}, seen), computed=5, refine=9, **options)
    assert choice.plan.steps == better and len(seen) == len(choice.measured) == 1 + 9
    assert choice.origins == (everything.origins[0], *("refined",) * 9)
    assert choice.plan.error == pytest.approx(predicted[3]) and len(choice.plan.steps) == 5
    assert all(len({*nodes} - {*better}) <= 1 for nodes in seen[5:])
    seen[:] = []
    assert ck.choose(trace, ran({better: 0.01}, seen), computed=5, refine=3, **options).plan.steps == first
    # Samples that are equal cannot be better.
    seen[:] = []
    assert ck.choose(trace, ran({first: 0.0}, seen), computed=5, refine=9, **options).plan.steps == first
    assert len(seen) == 1
    # Nothing is moved that must be there, or so far that a gap is too long.
    seen[:] = []
    ck.choose(trace, ran({}, seen), computed=5, refine=1000, always=(0, 7, 13), max_gap=3, **options)
    assert all({0, 7, 13} <= {*nodes} for nodes in seen) and len(seen) > 1
    assert all(b - a <= 4 for nodes in seen for a, b in itertools.pairwise((*nodes, 14)))


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(2, 20), st.floats(0.0, 3.0))
def test_a_move_that_only_fits_these_samples_is_not_made(seed, count, gain):
    trace, seen = ck.Trace.of(smooth(5, 14), 14, step_sizes=torch.ones(14)), []
    options = {"spreads": (None,), "even": False, "peak": 1.0}
    ck.choose(trace, ran({}, seen), computed=5, refine=1, **options)
    first, moved = seen
    gains = gain + torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def sample(policy: ck.Policy | None) -> Tensor:
        if policy is None:
            return torch.zeros(count, 1, dtype=torch.float64)
        nodes = tuple(step for step, each in enumerate(ck.deciders.plan(policy.decider, 14)) if each)
        return 0.1 * 10 ** (-(gains if nodes == moved else 0 * gains) / 20)[:, None]

    # Student's t of the gains in dB, one of every sample.
    likely = float(gains.mean()) / float(gains.std() / math.sqrt(count))
    assume(abs(likely - 1.7) > 1e-6)
    taken = ck.choose(trace, sample, computed=5, refine=1, **options).plan.steps
    assert taken == (moved if likely > 1.7 else first)


def test_refining_finds_fewer_steps():
    trace, seen = ck.Trace.of(smooth(5, 14), 14, step_sizes=torch.ones(14)), []
    options = {"spreads": (None,), "even": False, "peak": 1.0}
    found = ck.frontier(trace)
    # Seven keep it, and six would with another step.
    moved = tuple(sorted({*found[5].steps, found[5].steps[2] - 1} - {found[5].steps[2]}))
    assert moved not in {plan.steps for plan in found}
    good = {plan.steps: 0.001 for plan in found[6:]} | {moved: 0.001}
    plain = ck.choose(trace, ran(good, seen), "50 dB", **options)
    assert plain.plan.steps == found[6].steps
    before, seen[:] = len(seen), []
    choice = ck.choose(trace, ran(good, seen), "50 dB", refine=40, **options)
    assert choice.plan.steps == moved and before < len(seen) <= before + 40
    assert len(seen) == len(set(seen)) == len(choice.measured)
    seen[:] = []
    assert (
        ck.choose(trace, ran(good, seen), "50 dB", refine=1, **options).plan.steps == found[6].steps
        and len(seen) == before + 1
    )


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.int16, torch.uint8])
def test_samples_of_any_type_may_come_in_one_buffer(kind):
    trace, buffer = ck.Trace.of(smooth(5, 14), 14), torch.zeros(1, 4, dtype=kind)
    uncached = torch.tensor([[0.0, 100.0, 200.0, 3.0]] if kind is torch.uint8 else [[-3e4, 1.0, 2.0, 3e4]])
    span = float(uncached.to(kind).double().max() - uncached.to(kind).double().min())

    def sample(policy: ck.Policy | None) -> Tensor:
        buffer.copy_(uncached if policy is None else uncached + 2.0 * (uncached == 1.0) + 2.0 * (uncached == 100.0))
        return buffer

    choice = ck.choose(trace, sample, computed=5, spreads=(None,), even=False)
    assert choice.measured == ((choice.plan, pytest.approx(10 * math.log10(span**2 / (4 / 4)))),)


def test_the_predicted_error_is_that_of_the_trace():
    trace, seen = ck.Trace.of(smooth(5, 14), 14, step_sizes=torch.ones(14)), []
    for count in range(1, 15):
        found = ck.choose(trace, ran({}, seen), computed=count, peak=1.0).plan
        mask = ck.step_mask(found.computed, forecaster=newton(1, repay=True), sites="output")
        assert found.error == pytest.approx(quietly(trace, mask).error)


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor(1.0),
        torch.zeros(0, 3),
        torch.zeros(2, 3, dtype=torch.bool),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.tensor([[1.0, math.nan]]),
        torch.tensor([[1.0, math.inf]]),
        torch.zeros(2, 3, device="meta"),
        torch.zeros(2, 3).to_sparse(),
        "an image",
        None,
    ],
)
def test_what_are_no_samples_is_refused(returned):
    with pytest.raises((ArgumentError, ArgumentTypeError), match="`run`"):
        ck.choose(ck.Trace.of(smooth(5, 10), 10), lambda policy: returned, computed=4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "Give one of `at_least`"),
        ({"at_least": "40 dB", "computed": 4}, "Give one of `at_least`"),
        ({"computed": 11}, r"from 1 to 10, got 11"),
        ({"computed": 2, "max_gap": 1}, r"from 5 to 10, got 2"),
        ({"computed": 4, "spreads": ()}, "spreads"),
        ({"computed": 4, "spreads": (0.0,)}, "spread"),
        ({"computed": 4, "spreads": 0.5}, "spreads"),
        ({"computed": True}, "computed"),
        ({"computed": 4, "peak": 0.0}, "peak"),
        ({"computed": 4, "peak": math.nan}, "peak"),
        ({"computed": 4, "refine": -1}, "refine"),
        ({"computed": 4, "refine": True}, "refine"),
        ({"computed": 4, "refine": 2.0}, "refine"),
        ({"at_least": "nan"}, "at_least"),
        ({"at_least": True}, "at_least"),
    ],
)
def test_bad_choices_are_refused(options, named):
    trace = ck.Trace.of(smooth(5, 10), 10)
    with pytest.raises(ArgumentError, match=named):
        ck.choose(trace, lambda policy: pytest.fail("nothing is to be run"), **options)
