"""A recording holds what the model computed, and calibrates; a trace is a value."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from traces import FLOWS, STEPS, inputs, model_of, run, smooth, times

import cachekit as ck
from cachekit import ArgumentError, ArgumentTypeError, StateError
from cachekit.forecasters import hold

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
    for values in (None, 5, [1.0, 2.0], [torch.ones(2).numpy()] * 2, [torch.ones(2) * 1j] * 2):
        with pytest.raises(ArgumentTypeError, match="`values`"):
            ck.Trace.of(values, 2)
    for more in ({"notes": None}, {"weights": [1.0]}):
        with pytest.raises(ArgumentTypeError, match=f"`{next(iter(more))}`"):
            ck.Trace(good.streams, good.timesteps, good.step_sizes, **more)
    with pytest.raises(ArgumentError, match="`spread`"):
        ck.Trace(good.streams, good.timesteps, good.step_sizes, spread="wide")
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
