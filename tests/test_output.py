"""The model's output as the site: on a reuse nothing of the model runs but a probe."""

from __future__ import annotations

import re

import byhand
import dit
import pytest
import torch
import ways
from dit import feed
from specimens import shared
from torch import Tensor
from torch.utils import _pytree as pytree

import cachekit as ck
from cachekit.diffusers import zoo

STEPS = 9
MASK = (1, 0, 1, 1, 0, 0, 1, 0, 0)
RATIOS = [1.0, 1.2, 1.1, 1.08, 1.06, 1.04, 0.9, 0.95, 1.0]
DECIDERS = {
    "mask": (ck.deciders.mask(MASK), 0),
    "budget": (ck.deciders.max_skips(2, ck.deciders.magnitude_budget(RATIOS, threshold=0.15)), 0),
    "probe, mask": (ck.deciders.mask(MASK), 1),
    "drift": (ck.deciders.max_skips(2, ck.deciders.drift(0.3)), 1),
}
FORECASTERS = {
    "hold": (ck.forecasters.hold(), byhand.hold),
    "taylor 1": (ck.forecasters.taylor(1), byhand.taylor(1)),
    "taylor 2": (ck.forecasters.taylor(2), byhand.taylor(2)),
    "newton 1": (ck.forecasters.newton(1), byhand.newton(1)),
    "newton 2": (ck.forecasters.newton(2), byhand.newton(2)),
    "newton 3": (ck.forecasters.newton(3), byhand.newton(3)),
    "newton 1 repaid": (ck.forecasters.newton(1, repay=True), byhand.repaid(1)),
}


def policy(decider: str = "mask", forecaster: str = "hold") -> ck.Policy:
    """A row of the grid."""
    when, front = DECIDERS[decider]
    signal = ck.signals.change if front else None
    return ck.Policy("output", when, FORECASTERS[forecaster][0], signal, front, sites="output")


@torch.no_grad()
def run(step, init=None) -> tuple[list[Tensor], ck.State]:
    """The outputs of a trajectory, and its last state."""
    state, outputs = (init or step.init)(STEPS, *feed(0)), []
    for index in range(STEPS):
        out, state = step(state, *feed(index))
        outputs.append(out)
    return outputs, state


@pytest.mark.parametrize("forecaster", FORECASTERS)
@pytest.mark.parametrize("decider", DECIDERS)
def test_a_reuse_is_the_forecast_of_what_the_model_returned(decider, forecaster):
    model = dit.shared("two")
    outputs, state = run(ck.cache(model, policy(decider, forecaster)))
    computed = ck.summary(state).computed
    assert {True, False} == set(computed)
    seen: dict[int, Tensor] = {}
    for index, out in enumerate(outputs):
        right = model(*feed(index)).detach()
        if computed[index]:
            seen[index] = right
            assert torch.equal(out, right)
            continue
        wanted = FORECASTERS[forecaster][1](seen, index)
        torch.testing.assert_close(out.double(), wanted, atol=2e-5, rtol=2e-5)
        assert not torch.equal(out, right)


@pytest.mark.parametrize("decider", DECIDERS)
def test_nothing_of_the_model_runs_on_a_reuse_but_the_probe(decider):
    model = dit.dit("two")
    ran = []
    for name, module in model.named_modules():
        if name.count(".") <= 1:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    step = ck.cache(model, policy(decider))
    with torch.no_grad():
        state = step.init(STEPS, *feed(0))
        for index in range(STEPS):
            ran.clear()
            _, state = step(state, *feed(index))
            blocks = {name for name in ran if re.fullmatch(r"(blocks|single)\.\d", name)}
            if ck.summary(state).computed[index]:
                assert len(blocks) == len(model.blocks) + len(model.single)
            else:
                assert blocks == ({"blocks.0"} if DECIDERS[decider][1] else set())
                assert DECIDERS[decider][1] or not ran


@pytest.mark.compiles
@pytest.mark.parametrize("forecaster", ["hold", "newton 2"])
@pytest.mark.parametrize("decider", DECIDERS)
def test_every_way_to_run_is_the_same(decider, forecaster):
    step = ck.cache(dit.shared("two"), policy(decider, forecaster))
    for way, graphs in (("one graph", 1), ("programs", 2 + bool(DECIDERS[decider][1]))):
        # What the compiler makes of what is written and of views is looked at once; the rest is the same tracing.
        backend = "aot_eager" if (decider, forecaster) == ("budget", "newton 2") else "eager"
        ways.assert_alike(step, run, way, graphs, 1e-6, backend)


@pytest.mark.parametrize("decider", DECIDERS)
def test_bytes_said_are_bytes_held(decider):
    step = ck.cache(dit.shared("two"), policy(decider, "newton 2"))
    said = re.search(r"total state: .* \((\d+) bytes\)", str(step.explain(STEPS, *feed(0))))
    _, state = run(step)
    assert int(said[1]) == ck.summary(state).state_bytes
    assert list(state.sites) == ["output"]


# What two of the models say of themselves, cached or not.
@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning")
@pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_class_of_the_zoo(name):
    specimen = shared(name)
    with torch.no_grad():
        step = ck.cache(specimen.model, ck.step_mask([1, 0, 1], sites="output"))
        state, outputs = step.init(3, **specimen.inputs(0)), []
        for index in range(3):
            out, state = step(state, **specimen.inputs(index))
            outputs.append(out)
        right = [specimen.model(**specimen.inputs(index)) for index in (0, 2)]
    assert type(outputs[1]) is type(right[0])
    for out, wanted in zip(outputs, (right[0], right[0], right[1]), strict=True):
        ours, theirs = pytree.tree_leaves(out), pytree.tree_leaves(wanted)
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(b, Tensor))


def test_what_is_no_site():
    with pytest.raises(ck.ArgumentError, match=r"`sites` must be one of 'chain', 'output'.* got 'blocks'"):
        ck.step_mask([1, 0], sites="blocks")
    with pytest.raises(ck.ArgumentError, match=r"`signal` is measured on chains"):
        ck.Policy("x", ck.deciders.always(), ck.forecasters.hold(), ck.signals.change, sites="output")
    step = ck.cache(dit.shared("two"), policy())
    with torch.no_grad():
        _, state = step(step.init(STEPS, *feed(0)), *feed(0))
        _, state = step(state, *feed(1))
        with pytest.raises(ck.StateError, match=r"At output the state holds .*make a new state with step\.init"):
            step(state, *feed(2, batch=3))


@pytest.mark.parametrize("forecaster", [ck.forecasters.hold(), ck.forecasters.taylor(0), ck.forecasters.newton(0)])
@pytest.mark.parametrize("donate", [False, True])
def test_what_is_returned_is_not_what_is_remembered(forecaster, donate):
    step = ck.cache(dit.shared("two"), ck.step_mask(MASK, forecaster=forecaster, sites="output"), donate=donate)
    wanted, _ = run(step)
    with torch.no_grad():
        state = step.init(STEPS, *feed(0))
        for index, right in enumerate(wanted):
            out, state = step(state, *feed(index))
            torch.testing.assert_close(out, right)
            out.fill_(1000.0)  # it is the caller's
