"""Plans are the best there are, and run as they say."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from traces import FORECASTERS, STEPS, inputs, model_of, quietly, run, smooth, times

import cachekit as ck
from cachekit import ArgumentError, ArgumentTypeError
from cachekit.forecasters import Forecaster, hold, newton, taylor, two_point
from cachekit.planning.replay import deviations

# Planning -----------------------------------------------------------------------------------------------------------


def brute_force(values: list[Tensor], sizes: Tensor, computed: int, forecaster: Forecaster, longest: int, always):
    """The least cost of all plans, by trying them on the values themselves."""
    stacked, steps = torch.stack(values), len(values)
    best = math.inf
    for rest in itertools.combinations(range(1, steps), computed - 1):
        nodes = (0, *rest)
        ends = (*rest, steps)
        if not set(always) <= set(nodes) or any(
            end - node - 1 > longest for node, end in zip(nodes, ends, strict=True)
        ):
            continue
        off, back = (factors @ stacked * sizes[:, None] for factors in deviations(steps, nodes, forecaster))
        left = [off[node:end].sum(0) for node, end in zip(nodes, ends, strict=True)]
        for n, node in enumerate(nodes[1:]):
            left[n] = left[n] + back[node : ends[n + 1]].sum(0)
        best = min(best, sum(float(each.square().sum()) for each in left))
    return best


PLANNED = [
    "hold",
    "newton 1",
    "newton 2",
    "newton 0 repaid",
    "newton 1 repaid",
    "taylor 1",
    "taylor 2",
    "two-point",
    "ramp",
]


@pytest.mark.parametrize("name", PLANNED)
@settings(max_examples=12)
@given(data=st.data())
def test_no_plan_is_better(name, data):
    steps = data.draw(st.integers(4, 14))
    computed = data.draw(st.integers(1, steps).filter(lambda count: math.comb(steps - 1, count - 1) <= 500))
    longest = data.draw(st.integers(0, steps))
    always = data.draw(st.lists(st.integers(0, steps - 1), max_size=2))
    values = smooth(data.draw(st.integers(0, 999)), steps)
    sizes = torch.tensor(data.draw(st.lists(st.floats(0.1, 3), min_size=steps, max_size=steps)), dtype=torch.float64)
    trace = ck.Trace.of(values, steps, step_sizes=sizes).carried(data.draw(st.none() | st.floats(0.1, 2)))
    best = brute_force(values, trace.reach, computed, FORECASTERS[name], longest, always)
    options = {"computed": computed, "forecaster": FORECASTERS[name], "max_gap": longest, "always": always}
    if best == math.inf:
        with pytest.raises(ArgumentError):
            ck.plan(trace, **options)
        return
    found = ck.plan(trace, **options)
    assert len(found.steps) == computed and set(always) | {0} <= set(found.steps)
    way = float((sizes @ torch.stack(values)).norm())
    # Of two plans that cost nearly nothing either is as good: squares of float64 are exact to 1e-8 of the way.
    assert found.error == pytest.approx(math.sqrt(best) / way, rel=1e-6, abs=1e-7)
    policy = ck.step_mask(found.computed, forecaster=FORECASTERS[name], sites="output")
    assert quietly(trace, policy).error == pytest.approx(found.error, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["hold", "newton 1", "newton 2", "newton 1 repaid", "taylor 2"])
def test_no_plan_of_half_the_steps_is_better(name):
    values, sizes = smooth(5, 14), torch.linspace(0.5, 2.0, 14, dtype=torch.float64)
    found = ck.plan(ck.Trace.of(values, 14, step_sizes=sizes), computed=7, forecaster=FORECASTERS[name])
    best = brute_force(values, sizes, 7, FORECASTERS[name], 14, ())
    way = float((sizes @ torch.stack(values)).norm())
    assert found.error == pytest.approx(math.sqrt(best) / way, rel=1e-6, abs=1e-7)


@settings(max_examples=30)
@given(data=st.data(), spread=st.floats(0.1, 4))
def test_errors_are_carried_as_the_flow_of_normal_data_carries_them(data, spread):
    steps = data.draw(st.integers(1, 9))
    sizes = torch.tensor(data.draw(st.lists(st.floats(0.1, 3), min_size=steps, max_size=steps)), dtype=torch.float64)
    reach = ck.Trace.of(smooth(0, steps), steps, step_sizes=sizes).carried(spread).reach
    after = 1 - sizes.cumsum(0) / sizes.sum()
    for share, level in zip((reach / sizes).tolist(), after.tolist(), strict=True):
        # x(t) = (1 - t) data + t noise flows with E[noise - data | x(t) = x], which for normal data is linear in x.
        t = torch.linspace(0, level, 4001, dtype=torch.float64)
        slope = (t - (1 - t) * spread**2) / ((1 - t).square() * spread**2 + t.square())
        assert share == pytest.approx(math.exp(-float(torch.trapezoid(slope, t))), rel=1e-3)


def test_plans_for_carried_errors_are_the_best_for_those():
    values, sizes = smooth(5, 10), torch.ones(10, dtype=torch.float64)
    alike = ck.Trace.of(values, 10, step_sizes=sizes)
    early = alike.carried(0.2)
    assert torch.equal(alike.reach, sizes) and alike.carried(None) == alike
    best = brute_force(values, early.reach, 4, newton(1, repay=True), 10, ())
    found = ck.plan(early, computed=4)
    assert found.error == pytest.approx(math.sqrt(best) / float((sizes @ torch.stack(values)).norm()), rel=1e-6)
    assert found.steps[1] > ck.plan(alike, computed=4).steps[1]  # what is early counts less
    for spread in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ArgumentError, match="spread"):
            alike.carried(spread)


def test_traces_are_equal_where_their_numbers_are():
    one, same, other = (ck.Trace.of(smooth(seed, 10), 10) for seed in (5, 5, 6))
    assert one == same and one != other and one != one.carried(0.2)
    assert one.timesteps.isnan().all(), "numbers that equal nothing are the same numbers"
    assert one != "a trace"


@pytest.mark.parametrize("longest", range(5))
@pytest.mark.parametrize("name", ["hold", "newton 1", "newton 2", "newton 1 repaid"])
def test_gaps_are_as_long_as_allowed_and_no_longer(name, longest):
    values, sizes = smooth(7, STEPS), torch.linspace(0.5, 2.0, STEPS, dtype=torch.float64)
    trace, forecaster = ck.Trace.of(values, STEPS, step_sizes=sizes), FORECASTERS[name]
    found = ck.frontier(trace, forecaster=forecaster, max_gap=longest)
    assert len(found[0].steps) == math.ceil(STEPS / (longest + 1))
    for plan in found:
        assert max(end - node - 1 for node, end in itertools.pairwise((*plan.steps, STEPS))) <= longest
    best = brute_force(values, sizes, len(found[0].steps), forecaster, longest, ())
    assert found[0].error == pytest.approx(math.sqrt(best) / float((sizes @ torch.stack(values)).norm()), abs=1e-7)


def test_a_frontier_holds_every_plan(recorded):
    trace = recorded["two"]
    for site in ("output", "chain"):
        found = ck.frontier(trace, site=site)
        assert [len(plan.steps) for plan in found] == list(range(1, STEPS + 1))
        assert found[-1].error == 0
        for count in (1, 4, 9, STEPS):
            assert ck.plan(trace, computed=count, site=site) == found[count - 1]
    # One more computed step is never worse for a forecast that can do without it.
    errors = [plan.error for plan in ck.frontier(trace, forecaster=hold())]
    assert errors[0] > errors[4] > errors[8] > errors[-1]


def test_targets(recorded):
    trace = recorded["plain"]
    assert len(ck.plan(trace, speedup=2.0).steps) == 6
    assert len(ck.plan(trace, speedup=2.0, costs=(2.0, 0.4)).steps) == 4  # 4 * 2.0 + 8 * 0.4 <= 12
    assert len(ck.plan(trace, speedup=1.0).steps) == STEPS
    found = ck.frontier(trace)
    for plan in found[2:5]:
        reached = ck.plan(trace, error=plan.error)
        assert reached.error <= plan.error and len(reached.steps) <= len(plan.steps)
    assert len(ck.plan(trace, error=0.0).steps) == STEPS


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "Give one of"),
        ({"computed": 3, "error": 0.1}, "Give one of"),
        ({"computed": 0}, "computed"),
        ({"computed": STEPS + 1}, "computed"),
        ({"computed": True}, "computed"),
        ({"computed": 1, "always": (0, 4)}, "computed"),
        ({"computed": 3, "max_gap": 1}, "max_gap"),
        ({"computed": 3, "max_gap": -1}, "max_gap"),
        ({"computed": 3, "always": (STEPS,)}, "always"),
        ({"computed": 3, "site": "attention"}, "site"),
        ({"computed": 3, "forecaster": newton(3)}, "newton 3"),
        ({"computed": 3, "forecaster": two_point(0.4, feedback=True)}, "two-point"),
        ({"computed": 3, "always": [[1]]}, "always"),
        ({"computed": 3, "always": 4}, "always"),
        ({"error": -1.0}, "error"),
        ({"error": math.nan}, "error"),
        ({"error": True}, "error"),
        ({"speedup": 0.0}, "speedup"),
        ({"speedup": 20.0}, "speedup"),
        ({"speedup": True}, "speedup"),
        ({"speedup": 2.0, "costs": (1.0, 1.0)}, "costs"),
        ({"speedup": 2.0, "costs": 1.0}, "costs"),
        ({"speedup": 2.0, "costs": None}, "costs"),
        ({"speedup": 2.0, "costs": (1.0,)}, "costs"),
        ({"speedup": 2.0, "costs": (1.0, "0")}, "costs"),
        ({"speedup": 6.0, "always": (0, 3, 6, 9)}, "speedup"),
        ({"speedup": 6.0, "max_gap": 1}, "speedup"),
        ({"computed": 3, "timesteps": [3.0, 2.0, 1.0]}, "resample"),
    ],
)
def test_bad_targets_are_refused(options, named, recorded):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=named):
        ck.plan(recorded["plain"], **options)


@pytest.mark.parametrize("most", [0, -1, 2.5, "3", True])
def test_a_frontier_is_of_a_number_of_steps(most, recorded):
    with pytest.raises(ArgumentError, match="`most`"):
        ck.frontier(recorded["plain"], most=most)


# Running a plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["output", "chain"])
def test_a_plan_runs_as_it_says(site, recorded, tmp_path):
    found = ck.plan(recorded["plain"], computed=5, site=site)
    found.save(tmp_path / "five.plan.json")
    again = ck.Plan.load(tmp_path / "five.plan.json")
    assert again == found
    policy = ck.planned(again)
    assert policy.static and policy.sites == site and not policy.front
    step = ck.cache(model_of("plain"), policy)
    assert step.explain(times(), *inputs(0)).programs == 2
    _, state = run(step)
    assert tuple(ck.summary(state).computed) == found.computed


def test_a_plan_is_for_its_trajectory_alone(recorded):
    trace = recorded["plain"]
    policy = ck.planned(ck.plan(trace, computed=5))
    step = ck.cache(model_of("plain"), policy)
    step.init(STEPS, *inputs(0))  # of which only the number is known
    step.init(times() + 0.5, *inputs(0))  # as a scheduler rounds it
    with pytest.raises(ArgumentError, match=r"12 steps.*has 8.*resample"):
        step.init(8, *inputs(0))
    with pytest.raises(ArgumentError, match=r"timestep.*resample"):
        step.init(times() * 0.9, *inputs(0))


def test_scheduler_and_guidance_are_compared(recorded):
    base = recorded["plain"]
    trace = ck.Trace(base.streams, base.timesteps, base.step_sizes, {"scheduler": "Euler", "guidance": "2.0"})
    found = ck.plan(trace, computed=5)
    ck.planned(found, scheduler="Euler", guidance=2)
    with pytest.raises(ArgumentError, match="`scheduler` is 'Heun'"):
        ck.planned(found, scheduler="Heun")
    with pytest.raises(ArgumentError, match=r"`guidance` is 3\.5"):
        ck.planned(found, guidance=3.5)
    with pytest.raises(ArgumentTypeError, match="plan"):
        ck.planned([1, 0, 1])
    with pytest.raises(ArgumentError, match="kind"):
        ck.planned(ck.Plan((True, False), kinds={"mlp": (True, False)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("computed"),
        lambda record: record.update(version=99),
        lambda record: record.update(version=True),
        lambda record: record.update(computed=[1, 2]),
        lambda record: record.update(computed=[0, 40]),
        lambda record: record.update(timesteps=[1.0]),
        lambda record: record.update(kinds={"mlp": [True]}),
        lambda record: record.update(error="much"),
        lambda record: record.update(error=math.nan),
        lambda record: record.update(error=-1.0),
        lambda record: record.update(computed=[0, 1.7]),
        lambda record: record.update(computed=[0, True]),
        lambda record: record.update(steps=12.9),
        lambda record: record.update(timesteps=[math.nan] * 12),
        lambda record: record.clear(),
    ],
)
def test_a_spoilt_plan_is_refused(change, recorded, tmp_path):
    path = tmp_path / "plan.json"
    ck.plan(recorded["plain"], computed=5).save(path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ArgumentError, match=r"plan\.json"):
        ck.Plan.load(path)


def test_a_plan_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(ArgumentError, match="holds no plan"):
            ck.Plan.load(path)
    with pytest.raises(ArgumentError, match="2 steps: it has 3 timesteps"):
        ck.Plan((True, False), timesteps=(3.0, 2.0, 1.0))
    for parts in ({"timesteps": None}, {"timesteps": ("a", "b")}, {"error": "0.1"}, {"computed": ()}):
        with pytest.raises(ArgumentError):
            ck.Plan(**{"computed": (True, False), **parts})


def test_named_forecasters():
    for forecaster in (
        hold(),
        newton(2),
        newton(1, repay=True),
        taylor(0),
        two_point(0.123456789),
        two_point("ramp"),
        two_point(1.0),
    ):
        assert ck.forecasters.named(forecaster.name).name == forecaster.name
    for name in (
        "newton",
        "newton x",
        "newton repaid",
        "newton 1 repaid twice",
        "taylor 1 repaid",
        "taylor -1",
        "spline 3",
        "",
        "hold 2",
        "two-point of the step",
    ):
        with pytest.raises(ArgumentError, match=r"name|order|weight"):
            ck.forecasters.named(name)
