"""On every class of the zoo: a step that computes is the uncached model to the bit, and the model is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from specimens import shared
from torch import Tensor, nn

import cachekit as ck
from cachekit.coverage.trial import tensors
from cachekit.diffusers import zoo

STEPS = 5
SKIPPING = (True, False, True, False, False)

# What two of the models say of themselves, cached or not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning"),
]

Outputs = list[list[Tensor]]  # [step][tensor]


class Run(NamedTuple):
    """What one class did."""

    uncached: Outputs  # of a twin that cachekit has never seen
    zero: Outputs  # first_block_cache(0)
    masked: Outputs  # twice over the inputs: computing every step, then skipping
    logs: tuple[ck.Summary, ck.Summary]  # of the two cached runs
    after: Outputs  # of the model itself, afterwards
    twin: nn.Module
    before: dict[str, Any]  # `anatomy` of the model
    now: dict[str, Any]


def anatomy(model: nn.Module) -> dict[str, Any]:
    """All that could be left behind on a model: modules, attributes and the entries of torch's registries."""
    return {
        "objects": [*model.modules(), *model.parameters()],
        "names": [name for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())],
        "state_dict": list(model.state_dict()),
        "attributes": [list(vars(module)) for module in model.modules()],
        "registries": [
            {name: list(entries) for name, entries in vars(module).items() if name.endswith(("_hooks", "_modules"))}
            for module in model.modules()
        ],
    }


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """At this size a second thread only waits for the first: with two, this file takes several times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=zoo.NAMES)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """The evidence of one class, shared by the tests below."""
    name = request.param
    model, twin = shared(name), zoo.specimen(name)
    before = anatomy(model.model)
    with torch.no_grad():
        uncached = [tensors(twin.model(**twin.inputs(step))) for step in range(STEPS)]
        results = []
        for policy, rounds in ((ck.first_block_cache(0.0), 1), (ck.step_mask([True] * STEPS + [*SKIPPING]), 2)):
            cached = ck.cache(model.model, policy)
            state, outputs = cached.init(rounds * STEPS, **model.inputs(0)), []
            for step in range(rounds * STEPS):
                out, state = cached(state, **model.inputs(step % STEPS))
                outputs.append(tensors(out))
            results.append((outputs, ck.summary(state)))
        after = [tensors(model.model(**model.inputs(step))) for step in range(STEPS)]
    (zero, zero_log), (masked, masked_log) = results
    now = anatomy(model.model)
    yield Run(uncached, zero, masked, (zero_log, masked_log), after, twin.model, before, now)


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether two steps agree to the bit."""
    assert len(ours) == len(theirs) > 0
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_threshold_0_is_the_uncached_model(run: Run):
    assert run.logs[0].computed == (True,) * STEPS
    assert [equal(a, b) for a, b in zip(run.zero, run.uncached, strict=True)] == [True] * STEPS


def test_a_mask_of_computed_steps_is_the_uncached_model(run: Run):
    assert run.logs[1].computed[:STEPS] == (True,) * STEPS
    assert [equal(a, b) for a, b in zip(run.masked[:STEPS], run.uncached, strict=True)] == [True] * STEPS


def test_a_skipped_step_is_finite_and_another_one_than_the_uncached(run: Run):
    skipping = run.masked[STEPS:]
    assert run.logs[1].computed[STEPS:] == SKIPPING
    assert all(torch.isfinite(tensor).all() for step in skipping for tensor in step)
    assert [equal(a, b) for a, b in zip(skipping, run.uncached, strict=True)] == list(SKIPPING)


def test_the_model_answers_as_one_that_was_never_cached(run: Run):
    assert [equal(a, b) for a, b in zip(run.after, run.uncached, strict=True)] == [True] * STEPS


def test_nothing_is_left_on_the_model(run: Run):
    assert all(a is b for a, b in zip(run.before["objects"], run.now["objects"], strict=True))
    assert {key: run.now[key] for key in run.now if key != "objects"} == {
        key: run.before[key] for key in run.before if key != "objects"
    }
    assert run.now["state_dict"] == list(run.twin.state_dict())
    assert run.now["attributes"] == [list(vars(module)) for module in run.twin.modules()]
    assert run.now["registries"] == anatomy(run.twin)["registries"]  # the model is shared with tests before this one
