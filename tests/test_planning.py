"""One recording answers for every policy: replays are the live run, plans are the best there are."""

from __future__ import annotations

import itertools
import json
import math
import warnings

import dit
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cachekit as ck
from cachekit import ArgumentError, ArgumentTypeError, StateError, TraceWarning
from cachekit.forecasters import Clock, Forecaster, hold, newton, taylor, two_point
from cachekit.planning.replay import deviations

STEPS = 12
FORECASTERS = {
    "hold": hold(),
    **{f"newton {order}": newton(order) for order in range(4)},
    **{f"taylor {order}": taylor(order) for order in range(4)},
    "two-point": two_point(0.3),
    "ramp": two_point("ramp"),
    "of the step": two_point(lambda step, steps: step / (steps + 1)),
    "feedback": two_point(0.4, feedback=True),
}
FLOWS = ("plain", "two", "interleaved", "swapped", "inplace")


def plans_of(steps: int) -> st.SearchStrategy[list[int]]:
    """Computed steps of a trajectory, step 0 among them."""
    return st.sets(st.integers(1, steps - 1), min_size=1, max_size=steps - 1).map(lambda rest: [0, *sorted(rest)])


def inputs(step: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What the model is called with at a step, whatever it returned before."""
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, 2, dit.IMAGE, dit.CHANNELS, generator=generator)
    text = torch.randn(2, dit.WORDS, dit.CHANNELS, generator=generator)
    share = step / STEPS
    return start * (1 - share) + end * share, torch.full((2,), 1 - share), text


def times() -> Tensor:
    """The timesteps of these inputs."""
    return torch.tensor([1000.0 * (1 - step / STEPS) for step in range(STEPS)], dtype=torch.float64)


def model_of(flow: str) -> dit.DiT:
    """A model with weights of its own."""
    torch.manual_seed(3)
    return dit.DiT(flow)


@torch.no_grad()
def run(step, seed: int = 0) -> tuple[list[Tensor], ck.State]:
    """All steps on the same inputs: what they return, and the last state."""
    state, outs = step.init(times(), *inputs(0, seed)), []
    for now in range(STEPS):
        out, state = step(state, *inputs(now, seed))
        outs.append(out.clone())
    return outs, state


@pytest.fixture(scope="module")
def recorded() -> dict[str, ck.Trace]:
    """A trace of every flow."""
    return {flow: ck.Trace.from_state(run(ck.cache(model_of(flow), ck.recording()))[1]) for flow in FLOWS}


def smooth(seed: int, steps: int, numbers: int = 6) -> list[Tensor]:
    """Values that change from step to step as those of a model do: slowly, and not evenly."""
    generator = torch.Generator().manual_seed(seed)
    base, slope, bend, noise = torch.randn(4, numbers, generator=generator, dtype=torch.float64)
    share = [step / steps for step in range(steps)]
    return [base + slope * s + bend * math.sin(5 * s) + 0.05 * noise * (-1) ** n for n, s in enumerate(share)]


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
    weights = forecaster.weights(torch.tensor(near).double(), torch.tensor(float(step)).double(), STEPS)
    combined = sum(weight * values[node] for weight, node in zip(weights, near, strict=True))
    predicted = forecast(forecaster, values, nodes, step)
    torch.testing.assert_close(combined, predicted, rtol=1e-5, atol=1e-5 * float(weights.abs().sum()))


@pytest.mark.parametrize("name", FORECASTERS)
def test_weights_of_many_groups_at_once(name):
    forecaster = FORECASTERS[name]
    count = forecaster.memory or 3
    groups = torch.tensor(list(itertools.combinations(range(6), count))).double()
    steps = torch.arange(6, 9).double()
    together = forecaster.weights(groups[:, None], steps, 9).expand(len(groups), 3, count)
    for n, group in enumerate(groups):
        for k, step in enumerate(steps):
            torch.testing.assert_close(together[n, k], forecaster.weights(group, step, 9))


# Recording ----------------------------------------------------------------------------------------------------------


def gram_of(values: list[Tensor]) -> Tensor:
    rows = torch.stack([value.flatten().double() for value in values])
    return rows @ rows.T


def watched(model, paths: list[str]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Outputs of the model at every step, and residuals of its blocks, found with hooks."""
    residuals: dict[str, list[Tensor]] = {path: [] for path in paths}
    before: dict[str, Tensor] = {}

    def enter(path):
        return lambda module, args: before.update({path: args[0].clone()})

    def leave(path):
        def hook(module, args, out):
            residuals[path].append((out[0] if isinstance(out, tuple) else out).clone() - before[path])

        return hook

    handles = []
    for path in paths:
        block = model.get_submodule(path)
        handles += [block.register_forward_pre_hook(enter(path)), block.register_forward_hook(leave(path))]
    with torch.no_grad():
        outs = [model(*inputs(step)) for step in range(STEPS)]
    for handle in handles:
        handle.remove()
    return outs, residuals


@pytest.mark.parametrize("flow", ["plain", "cross", "inplace"])
def test_a_trace_holds_what_the_model_computed(flow):
    model = model_of(flow)
    outs, residuals = watched(model, [f"blocks.{n}" for n in range(4)])
    trace = ck.Trace.from_state(run(ck.cache(model, ck.recording()))[1])
    assert trace.sites == ("output", "chain", "probe", "rest")
    recorded = trace.streams[""]
    torch.testing.assert_close(recorded["output"].gram, gram_of(outs))
    probe = residuals["blocks.0"]
    torch.testing.assert_close(recorded["probe"].gram, gram_of(probe))
    for i, j in itertools.product(range(STEPS), repeat=2):
        moved = (probe[i] - probe[j]).abs().sum()
        torch.testing.assert_close(recorded["probe"].distances[i, j].float(), moved, rtol=1e-5, atol=1e-5)
    sizes = torch.stack([each.abs().sum() for each in probe])
    torch.testing.assert_close(recorded["probe"].magnitudes.float(), sizes)
    if flow == "cross":  # one stream alone
        whole = [sum(parts) for parts in zip(*residuals.values(), strict=True)]
        torch.testing.assert_close(recorded["chain"].gram, gram_of(whole), rtol=1e-5, atol=1e-5)
        rest = [all_ - first for all_, first in zip(whole, probe, strict=True)]
        torch.testing.assert_close(recorded["rest"].gram, gram_of(rest), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_recording_returns_what_the_model_returns(flow):
    model = model_of(flow)
    outs, state = run(ck.cache(model, ck.recording()))
    for step, out in enumerate(outs):
        assert torch.equal(out, model(*inputs(step)))
    assert all(ck.summary(state).computed)


@pytest.mark.parametrize("sites", [("output",), ("chain",), ("output", "chain"), ("probe",), ("output", "probe")])
def test_what_is_not_asked_for_is_not_kept(sites, recorded):
    trace = ck.Trace.from_state(run(ck.cache(model_of("plain"), ck.recording(sites)))[1])
    # The probe and the rest are parts of the chain, which is there then.
    expected = ("chain", "probe", "rest") if "probe" in sites else tuple(site for site in sites if site == "chain")
    assert trace.sites == (("output",) if "output" in sites else ()) + expected
    for site in trace.sites:
        torch.testing.assert_close(trace.gram(site), recorded["plain"].gram(site))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("way", ["programs", "one graph", "regional"])
@pytest.mark.parametrize("flow", ["plain", "two"])
@pytest.mark.compiles
def test_every_way_to_run_records_the_same(flow, way, donate, recorded):
    step = ck.cache(model_of(flow), ck.recording(), donate=donate)
    state = step.init(times(), *inputs(0))
    if way == "one graph":
        compiled = torch.compile(step, fullgraph=True, backend="eager")
    else:
        compiled = step.compile(backend="eager", regional=way == "regional")
    with torch.no_grad():
        for now in range(STEPS):
            _, state = compiled(state, *inputs(now))
    trace = ck.Trace.from_state(state)
    for site in trace.sites:
        torch.testing.assert_close(trace.gram(site), recorded[flow].gram(site))
    torch.testing.assert_close(trace.streams[""]["probe"].distances, recorded[flow].streams[""]["probe"].distances)


class Residual(torch.nn.Linear):
    """A block."""

    def forward(self, x):
        """With something added."""
        return x + super().forward(x)


class Named(torch.nn.Module):
    """Its blocks have the name of a site."""

    def __init__(self):
        super().__init__()
        self.output_blocks = torch.nn.ModuleList(Residual(8, 8) for _ in range(3))

    def forward(self, x):
        """Twice what the blocks make of it."""
        for block in self.output_blocks:
            x = block(x)
        return 2.0 * x


def test_blocks_may_be_called_output():
    model, x = Named(), torch.randn(1, 4, 8)
    with torch.no_grad():
        step = ck.cache(model, ck.recording(("output", "chain")))
        state = step.init(2, x)
        for _ in range(2):
            out, state = step(state, x)
    trace = ck.Trace.from_state(state)
    assert trace.sites == ("output", "chain")
    assert trace.gram("output")[0, 0] == pytest.approx(float(out.double().square().sum()), rel=1e-6)
    assert trace.gram("chain")[0, 0] == pytest.approx(float((out / 2 - x).double().square().sum()), rel=1e-4)


def test_a_second_trajectory_may_have_another_length():
    step = ck.cache(model_of("plain"), ck.recording())
    _, first = run(step)
    again = step.init_like(first, times()[:5])
    with torch.no_grad():
        for now in range(5):
            _, again = step(again, *inputs(now))
    short = ck.Trace.from_state(again)
    torch.testing.assert_close(short.gram("output"), ck.Trace.from_state(first).gram("output")[:5, :5])


@pytest.mark.parametrize("kept", [97, 1009])
def test_a_sketch_tells_the_norm_of_any_combination(kept):
    generator = torch.Generator().manual_seed(0)
    policy = ck.recording("output", sketch=kept)
    step = ck.cache(Loud(), policy)
    values = [torch.randn(1, 64, 96, generator=generator) * (1 + 5 * (torch.arange(96) == 3)) for _ in range(6)]
    with torch.no_grad():
        state = step.init(6, values[0])
        for value in values:
            _, state = step(state, value)
    trace = ck.Trace.from_state(state)
    outs = torch.stack([value.flatten() for value in values]).double()
    coefficients = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    off = trace.norm("output", coefficients) / torch.linalg.vector_norm(coefficients @ outs, dim=-1) - 1
    # The docstring: within a factor of 1 +- 1 / sqrt(2 sketch), as a standard deviation.
    spread = 1 / math.sqrt(2 * kept)
    assert off.abs().max() < 4 * spread
    assert off.abs().mean() > spread / 20  # it is a sketch
    (record,) = state.sites["output"]
    assert record.rows.shape == record.sample.shape == (6, kept)


@pytest.mark.parametrize("numbers", [2**21, 2**22, 2**23])
def test_a_sketch_of_what_is_the_same_everywhere_is_not_off(numbers):
    step, value = ck.cache(Loud(), ck.recording("output")), torch.ones(1, numbers // 64, 64)
    with torch.no_grad():
        _, state = step(step.init(1, value), value)
    assert state.sites["output"][0].rows.shape == (1, 65_521)
    norm = float(ck.Trace.from_state(state).norm("output", torch.ones(1, dtype=torch.float64)))
    assert norm == pytest.approx(math.sqrt(numbers), rel=3 / math.sqrt(2 * 65_521))


class Loud(torch.nn.Module):
    """Returns what it is given; of its tokens some channels are far larger than the others."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))

    def forward(self, x):
        """The same."""
        for block in self.blocks:
            x = block(x)
        return x * 1.0


def test_bad_recordings_are_refused():
    for sites in ((), ("attention",), "nothing", 5, None, [["output"]]):
        with pytest.raises(ArgumentError, match="sites"):
            ck.recording(sites)
    for sketch in (0, True, 2.5):
        with pytest.raises(ArgumentError, match="sketch"):
            ck.recording(sketch=sketch)
    for more in ({"recorded": ("mlp",)}, {"recorded": ("chain",), "front": 1, "signal": ck.signals.change}):
        with pytest.raises(ArgumentError, match="recorded"):
            ck.Policy("p", ck.deciders.always(), hold(), **more)
    step = ck.cache(model_of("plain"), ck.recording())
    explained = step.explain(times(), *inputs(0))
    state = step.init(times(), *inputs(0))
    assert sum(row.state_bytes for row in explained.sites) <= explained.state_bytes == ck.summary(state).state_bytes
    assert [row.name.rpartition(" ")[2] for row in explained.sites][1:3] == ["(probe)", "(rest)"]
    with pytest.raises(StateError, match="0 of 12"):
        ck.Trace.from_state(state)
    with pytest.raises(StateError, match="no recording"):
        ck.Trace.from_state(run(ck.cache(model_of("plain"), ck.step_mask([1] * STEPS)))[1])


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


def quietly(trace: ck.Trace, policy: ck.Policy) -> ck.Replay:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        return ck.replay(trace, policy)


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
    total = torch.zeros(())
    gap = torch.zeros_like(exact[0]).double()
    sizes = ck.Trace.of(exact, times()).step_sizes
    for step, (out, true) in enumerate(zip(outs, exact, strict=True)):
        off = out.double() - true.double()
        measured = float(off.norm() / true.double().norm())
        assert replayed.errors[step] == pytest.approx(measured, rel=1e-4, abs=1e-6)
        if mask[step]:
            total, gap = total + gap.square().sum(), torch.zeros_like(gap)
        gap = gap + sizes[step] * off
    total = total + gap.square().sum()
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
        off = deviations(steps, nodes, forecaster) @ stacked * sizes[:, None]
        cost = sum(off[node:end].sum(0).square().sum() for node, end in zip(nodes, ends, strict=True))
        best = min(best, float(cost))
    return best


@pytest.mark.parametrize("name", ["hold", "newton 1", "newton 2", "taylor 1", "taylor 2", "two-point", "ramp"])
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


@pytest.mark.parametrize("name", ["hold", "newton 1", "newton 2", "taylor 2"])
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
    best = brute_force(values, early.reach, 4, newton(1), 10, ())
    found = ck.plan(early, computed=4)
    assert found.error == pytest.approx(math.sqrt(best) / float((sizes @ torch.stack(values)).norm()), rel=1e-6)
    assert found.steps[1] > ck.plan(alike, computed=4).steps[1]  # what is early counts less
    for spread in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ArgumentError, match="spread"):
            alike.carried(spread)


@pytest.mark.parametrize("longest", range(5))
@pytest.mark.parametrize("name", ["hold", "newton 1", "newton 2"])
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


def test_named_forecasters():
    for forecaster in (hold(), newton(2), taylor(0), two_point(0.123456789), two_point("ramp"), two_point(1.0)):
        assert ck.forecasters.named(forecaster.name).name == forecaster.name
    for name in ("newton", "newton x", "taylor -1", "spline 3", "", "hold 2", "two-point of the step"):
        with pytest.raises(ArgumentError, match=r"name|order|weight"):
            ck.forecasters.named(name)


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
    assert max(quality for computed, quality in choice.measured if computed == len(choice.plan.steps)) >= 35
    assert all(quality < 35 for computed, quality in choice.measured if computed < len(choice.plan.steps))
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
        assert [computed for computed, _ in choice.measured] == [5, 5, 5]  # no plan is run twice
        assert max(quality for _, quality in choice.measured) == pytest.approx(60)
        assert str(choice).endswith("dB") and "measured:" in str(choice)
        assert ck.choose(trace, sample, computed=5, spreads=(None,), even=False, peak=1.0).plan == plans[0]


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
        ck.replay(trace, ck.step_mask([s in n for s in range(14)], forecaster=newton(1), sites="output")).error
        for n in seen[1:]
    ]
    assert predicted == sorted(predicted)
    # What is better is gone on from, and no further than there are runs.
    better, seen[:] = seen[4], []
    choice = ck.choose(trace, ran({better: 0.01}, seen), computed=5, refine=9, **options)
    assert choice.plan.steps == better and len(seen) == len(choice.measured) == 1 + 9
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


def test_refining_finds_fewer_steps():
    trace, seen = ck.Trace.of(smooth(5, 14), 14, step_sizes=torch.ones(14)), []
    options = {"spreads": (None,), "even": False, "peak": 1.0}
    found = ck.frontier(trace)
    # Seven keep it, and six would with another step.
    moved = tuple(sorted({*found[5].steps, found[5].steps[2] + 1} - {found[5].steps[2]}))
    assert moved not in {plan.steps for plan in found}
    good = {plan.steps: 0.001 for plan in found[6:]} | {moved: 0.001}
    plain = ck.choose(trace, ran(good, seen), "50 dB", **options)
    assert plain.plan == found[6]
    before, seen[:] = len(seen), []
    choice = ck.choose(trace, ran(good, seen), "50 dB", refine=40, **options)
    assert choice.plan.steps == moved and before < len(seen) <= before + 40
    assert len(seen) == len(set(seen)) == len(choice.measured)
    seen[:] = []
    assert ck.choose(trace, ran(good, seen), "50 dB", refine=1, **options).plan == found[6] and len(seen) == before + 1


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor(1.0),
        torch.zeros(0, 3),
        torch.zeros(2, 3, dtype=torch.bool),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.tensor([[1.0, math.nan]]),
        torch.tensor([[1.0, math.inf]]),
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


# Calibrating --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", FLOWS)
def test_ratios_are_those_of_a_calibration(flow, recorded):
    _, state = run(ck.cache(model_of(flow), ck.mag_calibration()))
    assert recorded[flow].mag_ratios().ratios == pytest.approx(ck.MagRatios.from_state(state).ratios, rel=1e-4)


def test_ratios_of_a_sketch_are_whole():
    _, state = run(ck.cache(model_of("plain"), ck.recording(sketch=31)))
    _, calibrated = run(ck.cache(model_of("plain"), ck.mag_calibration()))
    ratios = ck.Trace.from_state(state).mag_ratios().ratios
    assert ratios == pytest.approx(ck.MagRatios.from_state(calibrated).ratios, rel=1e-4)


def test_a_polynomial_is_found_again():
    # The probe goes up by growing shares, and the output by a polynomial of these.
    shares = [0.01 * (1 + step) for step in range(STEPS)]
    wanted = (3.0, 0.5, 0.02)
    probe, output = [torch.tensor([1.0])], [torch.tensor([1.0])]
    for share in shares[1:]:
        probe.append(probe[-1] * (1 + share))
        output.append(output[-1] * (1 + wanted[0] * share**2 + wanted[1] * share + wanted[2]))
    one, other = ck.Trace.of(probe, STEPS, site="probe"), ck.Trace.of(output, STEPS)
    trace = ck.Trace({"": {**one.streams[""], **other.streams[""]}}, one.timesteps, one.step_sizes)
    assert trace.fit_polynomial(2) == pytest.approx(wanted, rel=1e-2, abs=1e-3)
    assert len(trace.fit_polynomial()) == 5
    for degree in (-1, True, 1.5, STEPS):
        with pytest.raises(ArgumentError, match="degree"):
            trace.fit_polynomial(degree)
    with pytest.raises(ArgumentError, match="probe"):
        other.fit_polynomial()
    still = ck.Trace.of([torch.zeros(1)] * STEPS, STEPS, site="probe")
    with pytest.raises(ArgumentError, match=r"probe.*zero"):
        ck.Trace({"": {**still.streams[""], **other.streams[""]}}, one.timesteps, one.step_sizes).fit_polynomial(2)


# Traces as values ---------------------------------------------------------------------------------------------------


def test_a_trace_is_saved_whole(recorded, tmp_path):
    step = ck.cache(model_of("two"), ck.recording())
    states = {"transformer/cond": run(step, 0)[1], "transformer/uncond": run(step, 1)[1]}
    factors = {"transformer/cond": 1.5}
    trace = ck.Trace.from_state(states, notes={"model": "tiny", "guidance": 2.0}, weights=factors).carried(0.5)
    trace.save(tmp_path / "two.trace.safetensors")
    again = ck.Trace.load(tmp_path / "two.trace.safetensors")
    assert again.notes == {"model": "tiny", "guidance": "2.0"}
    assert again.weights == trace.weights and torch.equal(again.reach, trace.reach)
    assert list(again.streams) == list(trace.streams) and again.sites == trace.sites
    for name, sites in trace.streams.items():
        for site, each in sites.items():
            for field, tensor in each._asdict().items():
                assert torch.equal(tensor, getattr(again.streams[name][site], field))
    assert torch.equal(again.timesteps, trace.timesteps) and torch.equal(again.step_sizes, trace.step_sizes)
    assert (tmp_path / "two.trace.safetensors").stat().st_size < 20_000
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    for name in ("other.safetensors", "missing.safetensors"):
        with pytest.raises(ArgumentError, match=name):
            ck.Trace.load(tmp_path / name)


def test_a_trace_of_matrices_that_do_not_fit_is_refused():
    good = ck.Trace.of(smooth(0, 5), 5)
    with pytest.raises(ArgumentError, match="step_sizes"):
        ck.Trace(good.streams, good.timesteps, good.step_sizes[:3])
    with pytest.raises(ArgumentError, match="Gram"):
        ck.Trace(good.streams, good.timesteps[:3], good.step_sizes[:3])
    with pytest.raises(ArgumentError, match="streams"):
        ck.Trace({}, good.timesteps, good.step_sizes)
    with pytest.raises(ArgumentError, match="step_sizes"):
        ck.Trace.of(smooth(0, 5), 5, step_sizes=[1.0])
    with pytest.raises(ArgumentError, match=r"`step_sizes`.*somewhere"):
        ck.Trace.of(smooth(0, 2), 2, step_sizes=[1.0, -1.0])
    for sizes in ("ab", [1j, 1j], [None, 1.0]):
        with pytest.raises(ArgumentTypeError, match="`step_sizes`"):
            ck.Trace.of(smooth(0, 2), 2, step_sizes=sizes)
    with pytest.raises(ArgumentTypeError, match="`step_sizes`"):
        ck.Trace(good.streams, good.timesteps, [1.0] * 5)
    with pytest.raises(ArgumentTypeError, match="`timesteps`"):
        ck.Trace(good.streams, 5, good.step_sizes)
    for weight in ("much", math.nan, None):
        with pytest.raises(ArgumentError, match="`weights`"):
            ck.Trace(good.streams, good.timesteps, good.step_sizes, {}, {"": weight})
    for values in ([], [torch.ones(2)] * 3, [torch.ones(2), torch.ones(3)]):
        with pytest.raises(ArgumentError, match="`values`"):
            ck.Trace.of(values, 2)
    for values in (None, 5, [1.0, 2.0], [torch.ones(2).numpy()] * 2):
        with pytest.raises(ArgumentTypeError, match="`values`"):
            ck.Trace.of(values, 2)
    for state in (5, None, {"cond": 5}, [1]):
        with pytest.raises(ArgumentTypeError, match="`state`"):
            ck.Trace.from_state(state)
    with pytest.raises(ArgumentError, match=r"`step_sizes`.*finite"):
        ck.Trace.of(smooth(0, 2), 2, step_sizes=[1.0, math.nan])
    spoilt = smooth(0, 5)
    spoilt[3][0] = math.inf
    with pytest.raises(ArgumentError, match=r"'output'.*step 3 is not finite"):
        ck.Trace.of(spoilt, 5)
    for wrong in (None, "trace"):
        for use in (ck.plan, ck.frontier, ck.replay):
            given = {"computed": 3} if use is ck.plan else {"policy": ck.taylorseer(2)} if use is ck.replay else {}
            with pytest.raises(ArgumentTypeError, match="`trace`"):
                use(wrong, **given)
    with pytest.raises(ArgumentTypeError, match="`spread`"):
        good.carried("half")
    with pytest.raises(ArgumentError, match="site"):
        ck.Trace.of(smooth(0, 5), 5, site="attention")


def test_step_sizes_are_those_of_the_timesteps():
    assert ck.Trace.of(smooth(0, 4), [1000.0, 700.0, 300.0, 100.0]).step_sizes.tolist() == [300, 400, 200, 100]
    assert ck.Trace.of(smooth(0, 4), 4).step_sizes.tolist() == [1, 1, 1, 1]
    given = ck.Trace.of(smooth(0, 4), 4, step_sizes=[1, 2, 3, 4])
    assert given.step_sizes.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("times", "sizes"),
    [
        ([0.0, 100.0, 200.0, 400.0], [100, 100, 200, 200]),  # from data's end of the clock
        ([800.0, 500.0, 500.0, 200.0, 200.0], [150, 150, 150, 150, 200]),  # Heun: at both ends of a step
        ([800.0, 500.0, 200.0, 0.0], [300, 300, 200, 200]),
        ([7.0, 7.0, 7.0], [1, 1, 1]),
        ([math.nan, math.nan], [1, 1]),
        ([800.0, 500.0, 600.0], [1, 1, 1]),
        ([0.0], [1]),
    ],
)
def test_step_sizes_of_other_clocks(times, sizes):
    assert ck.Trace.of(smooth(0, len(times)), times).step_sizes.tolist() == sizes


def test_a_later_start_is_no_more_noise():
    whole = ck.Trace.of(smooth(0, 10), [1000.0 - 100 * step for step in range(10)]).carried(0.4)
    late = ck.Trace.of(smooth(0, 4), [400.0, 300.0, 200.0, 100.0]).carried(0.4)
    torch.testing.assert_close(late.reach, whole.reach[6:])
    early = ck.Trace.of(smooth(0, 3), [1.0, 0.9, 0.8], step_sizes=[0.1, 0.1, 0.1]).carried(0.4)
    torch.testing.assert_close(early.reach * 1000, whole.reach[:3])


def test_steps_that_were_recorded_are_kept_when_resampled(recorded):
    trace = recorded["plain"]
    some = [0, 2, 3, 7, 11]
    made = trace.resample(trace.timesteps[some])
    for site in trace.sites:
        torch.testing.assert_close(made.gram(site), trace.gram(site)[some][:, some])
    assert made.notes["resampled"] == "from 12 steps"
    with pytest.raises(ArgumentError, match="timesteps"):
        trace.resample([1.0, 2.0])
    with pytest.raises(ArgumentError, match="the trace"):
        ck.Trace.of(smooth(0, 4), 4).resample([2.0, 1.0])


def test_given_step_sizes_are_resampled_too():
    times = [1000.0, 800.0, 600.0, 400.0, 200.0]
    trace = ck.Trace.of(smooth(0, 5), times, step_sizes=[1, 2, 3, 4, 5])
    torch.testing.assert_close(trace.resample(times).step_sizes, trace.step_sizes)
    made = trace.resample([1000.0, 900.0, 600.0, 300.0]).step_sizes
    assert made.tolist() == pytest.approx([0.5, 2.5, 5.0, 7.0])
    twice = ck.Trace.of(smooth(0, 5), times, step_sizes=[2, 2, 2, 2, 2]).resample([1000.0, 500.0]).step_sizes
    assert twice.tolist() == pytest.approx([5.0, 5.0])


def test_resampling_is_near_what_would_have_been_recorded():
    """What it costs: a plan from a trace of twice as many steps is nearly as good as one from a trace of its own."""

    def values(steps: int) -> list[Tensor]:
        return [
            torch.tensor([math.cos(3 * s / steps), math.sin(5 * (s / steps) ** 2), 1.0]).double() for s in range(steps)
        ]

    def at(steps: int) -> list[float]:
        return [1000 * (1 - s / steps) for s in range(steps)]

    fine, coarse = ck.Trace.of(values(40), at(40)), ck.Trace.of(values(25), at(25))
    with pytest.raises(ArgumentError, match="resample"):
        ck.plan(fine, computed=8, timesteps=at(25))
    for computed in (6, 8, 12):
        own = ck.plan(coarse, computed=computed)
        other = ck.plan(fine, computed=computed, timesteps=at(25), resample=True)
        assert other.timesteps == tuple(at(25))
        cost = ck.replay(coarse, ck.planned(other)).error / own.error
        assert 1 - 1e-9 <= cost < 1.25


def test_sites_that_share_their_matrices_are_saved(tmp_path):
    made = ck.Trace.of(smooth(0, 5), 5)
    both = ck.Trace({"": {**made.streams[""], "rest": made.streams[""]["output"]}}, made.timesteps, made.step_sizes)
    both.save(tmp_path / "t")
    again = ck.Trace.load(tmp_path / "t")
    assert torch.equal(again.gram("rest"), made.gram("output")) and torch.equal(
        again.gram("output"), made.gram("output")
    )
