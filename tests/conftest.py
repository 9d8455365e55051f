"""Settings of every test: few threads, examples that are the same in every run, a fresh compiler where it is used."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import tiers
import torch
from hypothesis import HealthCheck, Phase, settings
from traces import FLOWS, model_of, run

import cachekit as ck

# The kernels run on a GPU, or interpreted, in a process of their own: `make test` does that first.
collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["test_kernels.py"]

# Beside a test in another process a second thread only waits, which takes all of a core: in scripts of tests, too.
THREADS = os.environ.get("CACHEKIT_TEST_THREADS", "1")
torch.set_num_threads(int(THREADS))
os.environ["OMP_NUM_THREADS"] = THREADS
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = THREADS  # nor does it pay to begin processes that compile

settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
# To see a test fail is enough for a mutant; nobody reads the smallest counterexample.
settings.register_profile("mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


COLLECTED = pytest.StashKey[list[pytest.Item]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is left to the slow tier, before marks are chosen from; and keep the list, for the test of that."""
    tests = [
        (item.path.name, getattr(item, "originalname", None) or item.name, tiers.parameters(item.name))
        for item in items
    ]
    for item, test in zip(items, tests, strict=True):
        if tiers.is_slow(*test):
            item.add_marker("slow")
    items[:] = [items[at] for at in tiers.order(tests)]
    config.stash[COLLECTED] = [*items]


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need look at it again, and compiling makes many."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


@pytest.fixture(scope="session")
def collected(pytestconfig: pytest.Config) -> list[pytest.Item]:
    """Every test that was collected, whichever tier is run."""
    return pytestconfig.stash[COLLECTED]


@pytest.fixture(scope="session")
def recorded() -> dict[str, ck.Trace]:
    """A trace of every flow of a small model."""
    return {flow: ck.Trace.from_state(run(ck.cache(model_of(flow), ck.recording()))[1]) for flow in FLOWS}


@pytest.fixture(autouse=True, scope="module")  # after each test it would take a tenth of the time
def _shared_models_stay_as_they_are() -> Iterator[None]:
    yield
    if "specimens" in sys.modules:
        changed = sys.modules["specimens"].changed()
        assert not changed, f"a test has changed {changed}, which others share: take a model of its own"


@pytest.fixture(autouse=True)
def _fresh_compiler(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("compiles"):
        torch._dynamo.reset()
