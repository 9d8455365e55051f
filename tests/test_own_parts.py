"""Parts that users write: mistakes are said with the fix, laws can be tried, a decision can come from outside."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from dit import CHANNELS, DiT
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import LENGTH, build, specs

import cachekit as ck
from cachekit.deciders import Decider, Sums
from cachekit.forecasters import Forecaster

STEPS = 6


@functools.cache
def model() -> DiT:
    """The same one in every test."""
    torch.manual_seed(0)
    return DiT().eval()


def inputs(step: int = 0) -> tuple:
    """What DiT is called with."""
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 6, CHANNELS, generator=generator), torch.randn(1, 5, CHANNELS, generator=generator)
    return x + 0.1 * step, torch.full((1,), 1 - 0.1 * step), text


def run(policy: ck.Policy, way: str = "eager") -> tuple[list[torch.Tensor], str]:
    """Outputs and pattern of a trajectory."""
    step = ck.cache(model(), policy)
    call = {
        "eager": lambda: step,
        "programs": lambda: step.compile(backend="eager"),
        "one graph": lambda: torch.compile(step, fullgraph=True, backend="eager"),
    }[way]()
    with torch.no_grad():
        state, outputs = (call if way == "programs" else step).init(STEPS, *inputs()), []
        for at in range(STEPS):
            out, state = call(state, *inputs(at))
            outputs.append(out)
    return outputs, "".join(".#"[computed] for computed in ck.summary(state).computed)


def number() -> torch.Tensor:
    """A state."""
    return torch.zeros((), dtype=torch.float64)


def above(state, now):
    """Computes on doubt."""
    return (now.signal.numerator < 0.2 * now.signal.denominator) == False  # noqa: E712


def deciding(**parts) -> ck.Policy:
    """A policy of a decider that is right but for these parts."""
    right = {"init": lambda times: (), "decide": above, "update": lambda state, now, computed: state, "static": False}
    signal = parts.pop("signal", ck.signals.change)
    return ck.Policy("mine", Decider("mine", **{**right, **parts}), ck.forecasters.hold(), signal, front=1)


def forecasting(**parts) -> ck.Policy:
    """A policy of a forecaster that is right but for these parts."""
    right = {"init": torch.zeros_like, "update": lambda s, value, now: value.clone(), "predict": lambda s, now: s}
    made = Forecaster("mine", **{**right, "timed": False, **parts})
    return ck.step_mask([True, False] * (STEPS // 2), forecaster=made)


def branching(state, now):
    """What an `if` makes of NaN."""
    return bool(ck.deciders.ratio(now.signal) > 0.2)


MISTAKES = {
    "a branch that NaN does not enter": (lambda: deciding(decide=branching), "'mine' skips a step whose signal is NaN"),
    "a division by zero": (
        lambda: deciding(decide=lambda s, now: (now.signal.numerator / now.signal.denominator < 1) == False),  # noqa: E712
        "'mine' fails in `decide`: ZeroDivisionError.*deciders.ratio",
    ),
    "nothing returned": (lambda: deciding(decide=lambda s, now: None), r"`decide` returns None \(NoneType\)"),
    "a number returned": (lambda: deciding(decide=lambda s, now: 1.0), r"`decide` returns 1.0 \(float\)"),
    "a tensor of several": (
        lambda: deciding(decide=lambda s, now: torch.ones(2) > 0),
        r"`decide` returns a tensor \[2\]",
    ),
    "a float as state": (lambda: deciding(init=lambda times: 0.0), r"its state holds 0.0 \(float\)"),
    "another dtype": (
        lambda: deciding(init=lambda times: number().float(), update=lambda s, now, c: s.double()),
        r"`update` makes a tensor \[\] float64 on cpu of what was a tensor \[\] float32",
    ),
    "a list that grows": (
        lambda: deciding(init=lambda times: [number()], update=lambda s, now, c: [*s, number()]),
        "`update` makes 2 leaves, or in another tree of what was 1 leaves",
    ),
    "static, and looks": (
        lambda: ck.Policy("mine", Decider("mine", lambda t: (), above, lambda s, n, c: s, True), ck.forecasters.hold()),
        "'mine' says static=True and looks at `signal",
    ),
    "static, and unpacks": (
        lambda: ck.Policy(
            "mine",
            Decider("mine", lambda t: (), lambda s, n: next(iter(n.signal)) > 1, lambda s, n, c: s, True),
            ck.forecasters.hold(),
        ),
        "'mine' says static=True and looks at",
    ),
    "writes in place": (
        lambda: deciding(init=lambda times: number(), update=lambda s, now, c: s.add_(0.3)),
        "`update` writes to a tensor that it is given",
    ),
    "fails": (lambda: deciding(update=lambda s, now, c: s.nothing), "'mine' fails in `update`: AttributeError"),
    "a signal that is one number": (
        lambda: deciding(signal=lambda v, r: (v - r).abs().mean()),
        r"returns a tensor \[\] float32.*Return cachekit",
    ),
    "a signal of Python numbers": (
        lambda: deciding(signal=lambda v, r: Sums((v - r).abs().sum().item(), 1.0)),
        "reads the value of a tensor",
    ),
    "a signal that is not summed": (
        lambda: deciding(signal=lambda v, r: Sums((v - r).abs(), r.abs())),
        "two 0-d floating point tensors",
    ),
    "a forecast of another shape": (
        lambda: forecasting(predict=lambda s, now: s[:, :1]),
        r"`predict` returns a tensor \[1, 1, 16\]",
    ),
    "a forecast of another dtype": (
        lambda: forecasting(predict=lambda s, now: s.double()),
        r"float64.*values it stands for.*float32",
    ),
    "an untimed look at the clock": (
        lambda: forecasting(predict=lambda s, now: s * now.step),
        "`predict` looks at the clock.*Say timed=True",
    ),
    "a forecast that remembers a number": (lambda: forecasting(update=lambda s, value, now: 3), "`update` makes 3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_at_init_with_the_part_and_the_fix(mistake):
    make, words = MISTAKES[mistake]
    with pytest.raises(ck.CacheError, match=words):
        ck.cache(model(), make()).init(STEPS, *inputs())


def test_what_is_not_said_has_a_default_that_is_safe():
    decider = Decider("mine", lambda times: (), above, lambda state, now, computed: state)
    assert not decider.static
    forecaster = Forecaster("mine", torch.zeros_like, lambda s, value, now: value + 0 * now.step, lambda s, now: s)
    assert forecaster.timed
    policy = ck.Policy("mine", decider, forecaster, ck.signals.change, front=1)
    assert "." in run(policy)[1]


@pytest.mark.compiles
def test_a_branch_runs_on_the_host_and_one_graph_says_why_not():
    def decide(state, now):
        return not now.signal.numerator < 0.2 * now.signal.denominator

    policy = deciding(decide=decide)
    assert run(policy)[1] == run(policy, "programs")[1] == run(deciding())[1]
    with pytest.raises(Exception, match="'mine' asks in Python for the value of a number"):
        run(policy, "one graph")
    with pytest.raises(ck.ArgumentError, match="'mine' asks in Python for the value of a number"):
        ck.testing.check(policy)


# Laws --------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(spec=specs())
def test_the_deciders_that_are_there_pass(spec):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ck.testing, "_check_compiled_decider", lambda *_: None)  # seconds each; FORECASTERS compile
        patch.setattr(ck.testing, "LENGTHS", (LENGTH - 3, 2, 1))
        decider = build(spec)
        try:
            ck.testing.check(decider)
        except ck.ArgumentError as error:
            assert "only their number" in str(error)


FORECASTERS = {
    "hold": ck.forecasters.hold,
    "taylor": lambda: ck.forecasters.taylor(2),
    "newton": lambda: ck.forecasters.newton(2),
    "newton, repaid": lambda: ck.forecasters.newton(1, repay=True),
    "two-point": ck.forecasters.two_point,
}


@pytest.mark.compiles
@pytest.mark.parametrize("name", FORECASTERS)
def test_the_forecasters_that_are_there_pass(name):
    ck.testing.check(FORECASTERS[name]())


POLICIES = {
    "first_block_cache": lambda: ck.first_block_cache(0.1),
    "mag_cache": lambda: ck.mag_cache([1.0] * 9, threshold=0.1, retention=0.2),
    "taylorseer": lambda: ck.taylorseer(3, warmup=2),
    "step_mask": lambda: ck.step_mask([True, False, False] * 3, sites="output"),
    "by_hand": ck.by_hand,
}


@pytest.mark.compiles
@pytest.mark.parametrize("name", POLICIES)
def test_the_policies_that_are_there_pass(name):
    ck.testing.check(POLICIES[name]())


@pytest.mark.compiles
def test_a_policy_of_patterns_needs_a_model():
    policy = ck.taylorseer(3, warmup=2, sites=(r"blocks\.1",))
    with pytest.raises(ck.ArgumentError, match="`model` is missing"):
        ck.testing.check(policy)
    ck.testing.check(policy, model(), *inputs())


def counter():
    """A decider that counts outside of its state."""
    calls = []

    def decide(state, now):
        calls.append(now)
        return above(state, now) | (len(calls) % 5 == 0)

    return deciding(decide=decide).decider


def sums_up(state, now):
    """Forgets what it does not know."""
    return (state + ck.deciders.ratio(now.signal) < 0.5) == False  # noqa: E712


UNLAWFUL = {
    "counts outside": (counter, "does not say the same twice"),
    "draws": (
        lambda: deciding(decide=lambda s, now: above(s, now) | (random.random() < 0.5)).decider,
        "does not say the same twice",
    ),
    "computes on NaN alone": (
        lambda: deciding(decide=lambda s, now: (now.signal.numerator < 0.2) == False).decider,  # noqa: E712
        "skips step 0 at the signal",
    ),
    "another on tensors": (
        lambda: deciding(decide=lambda s, now: above(s, now) | isinstance(now.step, torch.Tensor)).decider,
        "on Python numbers and .* on 0-d tensors",
    ),
    "writes what it looks at": (
        lambda: Decider("mine", lambda t: t.new_zeros(3), lambda s, n: s.add_(1).sum() > 6, lambda s, n, c: s, True),
        "'mine' writes to what it is given",
    ),
    "init looks": (lambda: forecasting(init=lambda v: v.clone()).forecaster, "`init` looks at the value"),
    "not the constant": (
        lambda: forecasting(predict=lambda s, now: s * (1 + 0.1 * (now.step > 6)), timed=True).forecaster,
        "the forecast of a constant is not the constant",
    ),
    "overwrite": (
        lambda: forecasting(overwrite=lambda s, value, now: 2 * value).forecaster,
        "`overwrite` gives another state",
    ),
    "weights": (
        lambda: forecasting(memory=1, weights=lambda nodes, step, steps: 0.5 * torch.ones_like(nodes)).forecaster,
        "`weights` after 1 values are not those",
    ),
}


@pytest.mark.compiles
@pytest.mark.parametrize("law", UNLAWFUL)
def test_a_broken_law_is_found(law):
    make, words = UNLAWFUL[law]
    with pytest.raises(ck.ArgumentError, match=words):
        ck.testing.check(make())


def test_only_parts_are_checked():
    with pytest.raises(ck.ArgumentTypeError, match="`part` must be a Policy"):
        ck.testing.check(lambda: None)


# By hand -----------------------------------------------------------------------------------------------------


def by_hand(decisions: list[bool], way: str, policy: ck.Policy | None = None) -> tuple[list[torch.Tensor], str]:
    """A trajectory whose every step is decided from outside."""
    step = ck.cache(model(), policy or ck.by_hand())
    call = step.compile(backend="eager") if way == "programs" else step
    if way == "one graph":
        call = torch.compile(
            lambda state, verdict, *args: step(ck.decide(state, verdict), *args), fullgraph=True, backend="eager"
        )
    with torch.no_grad():
        state, outputs = (call if way == "programs" else step).init(len(decisions), *inputs()), []
        for at, compute in enumerate(decisions):
            if way == "one graph":
                out, state = call(state, torch.tensor(compute), *inputs(at))
            else:
                out, state = call(ck.decide(state, compute), *inputs(at))
            outputs.append(out)
    return outputs, "".join(".#"[computed] for computed in ck.summary(state).computed)


@settings(max_examples=15)
@given(decisions=st.lists(st.booleans(), min_size=STEPS, max_size=STEPS))
def test_by_hand_is_the_mask_of_its_decisions(decisions):
    outputs, pattern = by_hand(decisions, "eager")
    wanted, masked = run(ck.step_mask(decisions))
    assert pattern == masked
    for ours, theirs in zip(outputs, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.compiles
@pytest.mark.parametrize("way", ["programs", "one graph"])
def test_by_hand_compiled(way):
    decisions = [False, False, True, False, False, True]
    outputs, pattern = by_hand(decisions, way)
    wanted, same = by_hand(decisions, "eager")
    assert pattern == same == "#.#..#"
    torch.testing.assert_close(outputs, wanted)


def test_a_decision_changes_no_state_that_is_there():
    with torch.no_grad():
        step = ck.cache(model(), ck.by_hand())
        _, state = step(step.init(STEPS, *inputs()), *inputs())
        before = state.plan.clone()
        skipping = ck.decide(state, False)
        assert torch.equal(state.plan, before) and not skipping.plan[1]
        assert ck.summary(step(state, *inputs(1))[1]).computed == (True, True)
        assert ck.summary(step(skipping, *inputs(1))[1]).computed == (True, False)


def test_a_plan_can_be_overruled():
    _, pattern = by_hand([True, False, True, False, False, True], "eager", ck.step_mask([True] * STEPS))
    assert pattern == "#.#..#"


def test_what_cannot_be_decided_is_said():
    with torch.no_grad():
        step = ck.cache(model(), ck.first_block_cache(0.1))
        with pytest.raises(ck.ArgumentError, match="`state` has no plan that could be overruled"):
            ck.decide(step.init(STEPS, *inputs()), True)
        step = ck.cache(model(), ck.by_hand())
        state = step.init(1, *inputs())
        with pytest.raises(ck.ArgumentTypeError, match=r"`compute` must be a bool.*got 1"):
            ck.decide(state, 1)
        with pytest.raises(ck.ArgumentTypeError, match="`state` must be a cachekit State"):
            ck.decide(None, True)
        _, state = step(state, *inputs())
        with pytest.raises(ck.StateError, match="all 1 of its timesteps"):
            ck.decide(state, True)
