"""The law that every way to run keeps, in one place for the tests that hold policies of their own against it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import cachekit as ck

Run = Callable[..., tuple[list[Tensor], ck.State]]
"""`(step, init) -> outputs, last state` of a trajectory; without `init`, that of the step."""


def assert_alike(
    step: ck.CachedStep, run: Run, way: str, graphs: int, tolerance: float, backend: str = "eager"
) -> None:
    """Two trajectories of "one graph" or "programs" equal the step run eagerly, in so many graphs, without a break."""
    wanted, end = run(step)
    torch._dynamo.reset()
    counters.clear()
    compiled = step.compile(backend=backend) if way == "programs" else None
    call = compiled or torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(2):
        outputs, state = run(call, (compiled or step).init)
        for one, other in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
        assert ck.summary(state).computed == ck.summary(end).computed
        torch.testing.assert_close(state.signal, end.signal, equal_nan=True)
        assert pytree.tree_structure(state) == pytree.tree_structure(end)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
