"""One recording answers for every policy: replays are the live run."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from traces import FLOWS, FORECASTERS, STEPS, model_of, plans_of, quietly, run, smooth, times

import cachekit as ck
from cachekit import ArgumentError, ArgumentTypeError, TraceWarning
from cachekit.forecasters import Clock, Forecaster, hold, newton

# Weights ------------------------------------------------------------------------------------------------------------


def forecast(forecaster: Forecaster, values: list[Tensor], nodes: list[int], step: int) -> Tensor:
    """By updates with what was computed, and one prediction."""
    state, steps = forecaster.init(values[0]), torch.tensor(float(len(values)))
    for node in nodes:
        state = forecaster.update(state, values[node], Clock(torch.tensor(float(node)), steps))
    return forecaster.predict(state, Clock(torch.tensor(float(step)), steps))


@pytest.mark.parametrize("name", FORECASTERS)
@settings(max_examples=40)
@given(data=st.data())
def test_weights_are_what_is_predicted(name, data):
    forecaster, values = FORECASTERS[name], smooth(data.draw(st.integers(0, 99)), STEPS)
    nodes = data.draw(plans_of(STEPS - 1))
    step = data.draw(st.integers(nodes[-1] + 1, STEPS - 1))
    near = nodes if forecaster.memory is None else nodes[-forecaster.memory :]
    at = torch.tensor(near).double(), torch.tensor(float(step)).double(), STEPS
    weights = forecaster.weights(*at)
    if forecaster.repaid is not None:
        assert step == nodes[-1] + 1 or not forecaster.repaid(*at).any()
        weights = weights + forecaster.repaid(*at)
    combined = sum(weight * values[node] for weight, node in zip(weights, near, strict=True))
    predicted = forecast(forecaster, values, nodes, step)
    torch.testing.assert_close(combined, predicted, rtol=1e-5, atol=1e-5 * float(weights.abs().sum()))


@pytest.mark.parametrize("name", FORECASTERS)
def test_weights_of_many_groups_at_once(name):
    forecaster = FORECASTERS[name]
    count = forecaster.memory or 3
    groups = torch.tensor(list(itertools.combinations(range(6), count))).double()
    steps = torch.arange(6, 9).double()
    for weights in filter(None, (forecaster.weights, forecaster.repaid)):
        together = weights(groups[:, None], steps, 9).expand(len(groups), 3, count)
        for n, group in enumerate(groups):
            for k, step in enumerate(steps):
                torch.testing.assert_close(together[n, k], weights(group, step, 9))


# Replaying ----------------------------------------------------------------------------------------------------------

DECIDERS = st.one_of(
    st.floats(0.001, 0.6).map(lambda threshold: ck.deciders.drift(threshold)),
    st.tuples(st.floats(0.001, 0.6), st.integers(1, 4)).map(
        lambda given: ck.deciders.max_skips(given[1], ck.deciders.drift(given[0]))
    ),
    st.tuples(st.floats(0.001, 0.6), st.integers(0, 5)).map(
        lambda given: ck.deciders.warmup(given[1], ck.deciders.drift(given[0]))
    ),
    st.tuples(st.floats(0.001, 0.6), st.integers(2, 4)).map(
        lambda given: ck.deciders.any_of(ck.deciders.drift(given[0]), ck.deciders.interval(given[1]))
    ),
    st.tuples(st.floats(0.001, 0.6), st.floats(100, 900)).map(
        lambda given: ck.deciders.within(given[1] - 90, given[1] + 90, ck.deciders.drift(given[0]))
    ),
)


@pytest.mark.parametrize("sites", ["chain", "output"])
@settings(max_examples=25)
@given(decider=DECIDERS, flow=st.sampled_from(FLOWS))
def test_decisions_are_those_of_a_live_run(sites, decider, flow, recorded):
    # On inputs that do not depend on what came out before, the run that reuses and the one that only logs see the same.
    policy = ck.Policy("live", decider, hold(), signal=ck.signals.change, front=1, sites=sites)
    replayed = quietly(recorded[flow], policy)
    _, state = run(ck.cache(model_of(flow), policy))
    live = ck.summary(state)
    assert replayed.computed[""] == tuple(step for step, computed in enumerate(live.computed) if computed)
    assert replayed.signal[""][1:] == pytest.approx(live.signal[1:], rel=1e-6)


@pytest.mark.parametrize("name", FORECASTERS)
@settings(max_examples=8)
@given(nodes=plans_of(STEPS))
def test_errors_are_those_of_a_live_run(name, nodes, recorded):
    mask = [step in nodes for step in range(STEPS)]
    policy = ck.step_mask(mask, forecaster=FORECASTERS[name], sites="output")
    replayed = quietly(recorded["plain"], policy)
    exact, _ = run(ck.cache(model_of("plain"), ck.step_mask([1] * STEPS)))
    outs, _ = run(ck.cache(model_of("plain"), policy))
    bare = outs
    if name.endswith(" repaid"):
        alone = ck.step_mask(mask, forecaster=FORECASTERS[name.removesuffix(" repaid")], sites="output")
        bare, _ = run(ck.cache(model_of("plain"), alone))
    gaps = [torch.zeros_like(exact[0]).double() for _ in range(2)]
    sizes = ck.Trace.of(exact, times()).step_sizes
    for step, (out, true) in enumerate(zip(outs, exact, strict=True)):
        off = out.double() - true.double()
        measured = float(off.norm() / true.double().norm())
        assert replayed.errors[step] == pytest.approx(measured, rel=1e-4, abs=1e-6)
        if mask[step]:
            gaps.append(torch.zeros_like(off))
        back = out.double() - bare[step].double()
        gaps[-1] += sizes[step] * (off - back)
        gaps[-2] += sizes[step] * back
    total = sum(gap.square().sum() for gap in gaps)
    way = sum(size * true.double() for size, true in zip(sizes, exact, strict=True)).norm()
    assert replayed.error == pytest.approx(float(total.sqrt() / way), rel=1e-4, abs=1e-6)


def test_streams_decide_for_themselves_and_count_together():
    step = ck.cache(model_of("plain"), ck.recording())
    states = {"cond": run(step, 0)[1], "uncond": run(step, 1)[1]}
    both = ck.Trace.from_state(states)
    alone = {name: ck.Trace.from_state(state) for name, state in states.items()}
    policy = ck.first_block_cache(0.2)
    replayed = ck.replay(both, policy)
    for name, trace in alone.items():
        assert replayed.computed[name] == ck.replay(trace, policy).computed[""]
    assert len(set(replayed.computed.values())) == 2
    torch.testing.assert_close(both.gram("chain"), alone["cond"].gram("chain") + alone["uncond"].gram("chain"))
    static = ck.step_mask([step % 3 == 0 for step in range(STEPS)])
    ways = [float(trace.norm("chain", trace.step_sizes)) for trace in alone.values()]
    parts = [ck.replay(trace, static).error for trace in alone.values()]
    expected = math.sqrt(sum((part * way) ** 2 for part, way in zip(parts, ways, strict=True)))
    assert ck.replay(both, static).error * float(both.norm("chain", both.step_sizes)) == pytest.approx(expected)


def test_streams_weigh_as_guidance_does():
    step = ck.cache(model_of("plain"), ck.recording("output"))
    states = {"cond": run(step, 0)[1], "uncond": run(step, 1)[1]}
    guided = ck.Trace.from_state(states, notes={"guidance": 3.0})
    assert guided.weights == {"cond": 3.0, "uncond": -2.0}
    parts = {name: ck.Trace.from_state(state).gram("output") for name, state in states.items()}
    torch.testing.assert_close(guided.gram("output"), 9 * parts["cond"] + 4 * parts["uncond"])
    given = ck.Trace.from_state(states, notes={"guidance": 3.0}, weights={"uncond": 0.0})
    policy = ck.step_mask([step % 3 == 0 for step in range(STEPS)], sites="output")
    assert ck.replay(given, policy).error == pytest.approx(ck.replay(ck.Trace.from_state(states["cond"]), policy).error)
    assert ck.replay(guided, policy).error != pytest.approx(ck.replay(given, policy).error, rel=1e-4)
    for other in ({"notes": {"guidance": "strong"}}, {}):
        assert ck.Trace.from_state(states, **other).weights == {}
    assert ck.Trace.from_state(states["cond"], notes={"guidance": 3.0}).weights == {}
    with pytest.raises(ArgumentError, match="`weights` names 'c'"):
        ck.Trace.from_state(states, weights={"c": 1.0})


def test_what_a_trace_does_not_hold_is_refused(recorded):
    trace, bare = recorded["plain"], ck.Trace.of(smooth(0, STEPS), STEPS)
    for policy in (ck.taylorseer(3), ck.pyramid_attention_broadcast(2), ck.faster_cache()):
        with pytest.raises(ArgumentError, match="inside the blocks"):
            ck.replay(trace, policy)
    for policy in (ck.first_block_cache(0.1), ck.step_mask([1, 0] * 6)):
        with pytest.raises(ArgumentError, match="not in the trace"):
            ck.replay(bare, policy)
    probing = ck.Policy("p", ck.deciders.drift(0.1), hold(), signal=ck.signals.change, front=1, sites="output")
    with pytest.raises(ArgumentError, match="probe"):
        ck.replay(bare, probing)
    other = ck.Policy("p", ck.deciders.drift(0.1), hold(), signal=lambda value, reference: None, front=1)
    with pytest.raises(ArgumentError, match="signal"):
        ck.replay(trace, other)
    curved = hold()._replace(name="curved", weights=None)
    with pytest.raises(ArgumentError, match="curved"):
        ck.replay(bare, ck.step_mask([1, 0] * 6, forecaster=curved, sites="output"))
    with pytest.raises(ArgumentError, match="recording"):
        ck.replay(trace, ck.recording())
    with pytest.raises(ArgumentTypeError, match="policy"):
        ck.replay(trace, [0.1])


# Warnings -----------------------------------------------------------------------------------------------------------


def test_a_threshold_that_never_triggers_is_told(recorded):
    with pytest.warns(TraceWarning, match=r"leaves out no step.*never below"):
        ck.replay(recorded["plain"], ck.first_block_cache(1e-6))
    with pytest.warns(TraceWarning, match="leave out no step"):
        ck.sweep(recorded["plain"], ck.first_block_cache, [1e-7, 1e-6])


def jumping() -> ck.Trace:
    """A signal of 0.1 at every step, and an output that stands still but for one far value."""
    values = [torch.tensor([1.0, 1e-4 * step + (50.0 if step == 6 else 0.0)]) for step in range(STEPS)]
    made = ck.Trace.of(values, STEPS)
    apart = (torch.arange(STEPS)[:, None] - torch.arange(STEPS)).abs().double() * 0.01
    apart[6, :], apart[:, 6] = 0.5, 0.5
    probe = made.streams[""]["output"]._replace(distances=apart, magnitudes=torch.ones(STEPS, dtype=torch.float64))
    rest = made.streams[""]["output"]
    return ck.Trace({"": {"output": rest, "probe": probe, "rest": rest}}, made.timesteps, made.step_sizes)


def test_a_cliff_is_told_and_where_it_is():
    with pytest.warns(TraceWarning, match="rises more than 10 times"):
        swept = ck.sweep(jumping(), ck.first_block_cache, [0.05, 0.2, 0.8])
    ((below, above),) = swept.cliffs
    assert below <= 0.5 < above and above - below <= 0.03 * above
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ck.sweep(jumping(), ck.first_block_cache, [0.05, 0.2]).cliffs == ()
    with pytest.raises(ArgumentError, match="settings"):
        ck.sweep(jumping(), ck.first_block_cache, [])
    for bad in (5, None, ["0.1"], [math.nan]):
        with pytest.raises(ArgumentError, match="`settings`"):
            ck.sweep(jumping(), ck.first_block_cache, bad)
    with pytest.raises(ArgumentTypeError, match="`make`"):
        ck.sweep(jumping(), None, [0.1])
    with pytest.raises(ArgumentTypeError, match="`trace`"):
        ck.sweep(None, ck.first_block_cache, [0.1])


def test_from_nothing_to_nearly_everything_is_a_cliff():
    # A signal that is 0.1 whatever the step: one threshold computes all, the next one the first step alone.
    probe = ck.Trace.of([torch.tensor([1.0]), *[torch.tensor([1.1]), torch.tensor([1.0])] * 5], 11, site="probe")
    rest = ck.Trace.of(smooth(0, 11), 11, site="rest")
    sites = {"probe": probe.streams[""]["probe"], "rest": rest.streams[""]["rest"]}
    trace = ck.Trace({"": sites}, probe.timesteps, probe.step_sizes)
    with pytest.warns(TraceWarning) as caught:
        swept = ck.sweep(trace, ck.first_block_cache, [0.01, 0.05, 0.3])
    ((below, above),) = swept.cliffs
    assert 0.05 <= below < above <= 0.3 and above - below <= 0.02 * above
    said = [str(each.message) for each in caught]
    assert len(said) == 2
    assert "first_block_cache(0.01) to first_block_cache(0.05) leave out no step" in said[0]
    assert "goes from leaving out no step to" in said[1]


def test_an_error_that_grows_by_degrees_is_no_cliff():
    values = [torch.tensor([1.0, 0.02 * step**2]) for step in range(60)]
    trace = ck.Trace.of(values, 60)

    def every(interval: int) -> ck.Policy:
        return ck.step_mask([step % interval == 0 for step in range(60)], sites="output", forecaster=newton(1))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swept = ck.sweep(trace, every, [2, 20])
    assert swept.replays[1].error > 10 * swept.replays[0].error
    assert swept.cliffs == ()
