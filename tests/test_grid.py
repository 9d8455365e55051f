"""Every combination of site, decider and forecaster, published or not, against the same cache written by hand."""

from __future__ import annotations

from typing import Any

import byhand
import pytest
import tiers
import torch
import ways
from torch import Tensor
from torch.utils import _pytree as pytree

import cachekit as ck

STEPS = 10
RATIOS = [1.0, 1.2, 1.1, 1.08, 1.06, 1.04, 0.9, 0.95, 1.0, 1.02]
MASK = [True, True, False, True, False, False, True, True, False, False]
SITES = ("chain", "attention", "mlp", "attention+mlp", "output")
THRESHOLD = 0.22
DECIDERS = {
    "interval": ck.deciders.interval(3, warmup=2, offset=-1),
    "drift": ck.deciders.drift(THRESHOLD),
    "budget": ck.deciders.max_skips(2, ck.deciders.magnitude_budget(RATIOS, threshold=0.15)),
    "mask": ck.deciders.mask(MASK),
}
FORECASTERS = {
    "hold": (ck.forecasters.hold(), byhand.hold),
    "two-point": (ck.forecasters.two_point(0.5), byhand.two_point),
    **{f"taylor {order}": (ck.forecasters.taylor(order), byhand.taylor(order)) for order in (1, 2)},
    **{f"newton {order}": (ck.forecasters.newton(order), byhand.newton(order)) for order in (1, 2, 3)},
    "newton 1 repaid": (ck.forecasters.newton(1, repay=True), byhand.repaid(1)),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def policy(sites: Any, decider: str, forecaster: str) -> ck.Policy:
    """One cell."""
    probe = {"signal": ck.signals.change, "front": 1} if decider == "drift" else {}
    return ck.Policy("cell", DECIDERS[decider], FORECASTERS[forecaster][0], sites=sites, **probe)


def feed(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of a step; from one to the next they change by some per cent."""
    draw = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 2, byhand.IMAGE, byhand.CHANNELS, generator=draw)
    text = torch.randn(2, byhand.WORDS, byhand.CHANNELS, generator=draw)
    turn = torch.tensor(0.08 * step)
    return turn.cos() * start + turn.sin() * end, torch.full((2,), 1 - 0.05 * step), text


def run(step: Any, init: Any = None) -> tuple[list[Tensor], ck.State]:
    """The outputs of a trajectory, and its last state."""
    state, outputs = (init or step.init)(STEPS, *feed(0)), []
    for index in range(STEPS):
        out, state = step(state, *feed(index))
        outputs.append(out)
    return outputs, state


@pytest.mark.parametrize("forecaster", FORECASTERS)
@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.parametrize("sites", SITES)
def test_every_cell_is_the_cache_by_hand(sites, decider, forecaster):
    model = byhand.shared()
    outputs, state = run(ck.cache(model, policy(sites, decider, forecaster)))
    computed = ck.summary(state).computed
    assert {True, False} == set(computed)
    probed = decider == "drift"
    plan = None if probed else ck.deciders.plan(DECIDERS[decider], STEPS)
    cache = byhand.Cache(model, sites, FORECASTERS[forecaster][1], plan, THRESHOLD if probed else None)
    decided = []
    for index, out in enumerate(outputs):
        wanted = cache(*feed(index))
        decided.append(cache.computing)
        torch.testing.assert_close(out, wanted, atol=2e-4, rtol=2e-4)
        assert torch.equal(out, model(*feed(index))) == computed[index]
    assert tuple(decided) == computed


@pytest.mark.parametrize("sites", ["attention", "attention+mlp"])
def test_what_others_write_to_is_remembered_as_it_was(sites):
    model = byhand.shared(inplace=True)
    for forecaster in ("hold", "taylor 1"):
        outputs, _ = run(ck.cache(model, policy(sites, "mask", forecaster)))
        cache = byhand.Cache(model, sites, FORECASTERS[forecaster][1], MASK)
        for index, out in enumerate(outputs):
            torch.testing.assert_close(out, cache(*feed(index)), atol=2e-4, rtol=2e-4)


def test_what_the_caller_writes_to_the_output_stays_out_of_the_state():
    step = ck.cache(byhand.shared(), policy("output", "mask", "hold"))
    right, _ = run(step)
    state = step.init(STEPS, *feed(0))
    for index in range(STEPS):
        out, state = step(state, *feed(index))
        assert torch.equal(out, right[index])
        out.mul_(7)


COMPILED = SITES, ("interval", "drift"), ("hold", "two-point", "newton 2", "newton 1 repaid"), ("one graph", "programs")
AT_ONCE = tiers.covering(*COMPILED, without=[(0, 2)])  # sites with forecasters: every pair is run eagerly
LATER = [cell for cell in tiers.covering(*COMPILED, strength=3) if cell not in AT_ONCE]


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("sites", "decider", "forecaster", "way"),
    [*AT_ONCE, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in LATER)],
)
def test_every_way_to_run_is_the_same(sites, decider, forecaster, way):
    step = ck.cache(byhand.shared(depth=2), policy(sites, decider, forecaster))
    ways.assert_alike(step, run, way, 1 if way == "one graph" else 2 + (decider == "drift"), 1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize("way", ["eager", "programs", "one graph"])
@pytest.mark.parametrize("decider", ["interval", "drift"])
@pytest.mark.parametrize("sites", ["chain", "attention+mlp", "output"])
def test_a_state_that_is_given_away_is_written_to(sites, decider, way):
    cell = policy(sites, decider, "newton 2")
    wanted, end = run(ck.cache(byhand.shared(depth=2), cell))
    step = ck.cache(byhand.shared(depth=2), cell, donate=True)
    if way == "programs":
        step = step.compile(backend="aot_eager")
    call = torch.compile(step, fullgraph=True, backend="aot_eager") if way == "one graph" else step
    places = []

    def watched(state, *args):
        out, fresh = call(state, *args)
        leaves = (fresh.sites, fresh.reference)
        places.append([leaf.data_ptr() for leaf in pytree.tree_leaves(leaves) if leaf.numel() > 1])
        return out, fresh

    outputs, state = run(watched, step.init)
    assert all(place == places[0] for place in places)
    for one, other in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert ck.summary(state).computed == ck.summary(end).computed


@pytest.mark.compiles
@pytest.mark.parametrize("sites", ["attention", "attention+mlp"])
def test_what_others_write_to_compiled(sites):
    step = ck.cache(byhand.shared(depth=2, inplace=True), policy(sites, "mask", "hold"))
    wanted, _ = run(step)
    for call, init in (
        (torch.compile(step, fullgraph=True, backend="aot_eager"), step.init),
        (compiled := step.compile(backend="aot_eager"), compiled.init),
        (regional := step.compile(regional=True, backend="aot_eager"), regional.init),
    ):
        outputs, _ = run(call, init)
        for one, other in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
