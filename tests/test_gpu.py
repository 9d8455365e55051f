"""The laws that a CPU cannot show: on a GPU every way to run means the same, and nothing waits without need."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from test_kernels_compiled import fresh
from torch.utils import _pytree as pytree

import cachekit as ck
from cachekit.diffusers.zoo import specimen

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

STEPS = 12
STATIC = {
    "mag_cache": ck.mag_cache([1.0] * STEPS, max_skips=2),
    "taylorseer": ck.taylorseer(3, warmup=2, order=2),
    "pyramid_attention_broadcast": ck.pyramid_attention_broadcast(3),
    "output": ck.step_mask([i % 3 == 0 for i in range(STEPS)], sites="output", forecaster=ck.forecasters.newton(1)),
}
POLICIES = {"first_block_cache": ck.first_block_cache(0.05, max_skips=3), **STATIC}
WAYS = {
    "programs": lambda step: step.compile(),
    "CUDA graphs": lambda step: step.compile(mode="reduce-overhead"),
    "one graph": lambda step: torch.compile(step, fullgraph=True),
    "regional": lambda step: step.compile(regional=True),
}
TIMES = [1000.0 * (1 - i / STEPS) for i in range(STEPS)]


def on_gpu(value):
    return pytree.tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, torch.Tensor) else leaf, value)


@pytest.fixture(scope="module")
def flux():
    """A tiny Flux on the GPU, with its inputs already there."""
    found = specimen("Flux")
    given = [on_gpu(found.inputs(i)) for i in range(STEPS)]
    return found.model.cuda(), given


@torch.no_grad()
def trajectory(step, given, state=None, start=0, stop=STEPS):
    state, outs = state or step.init(TIMES, **given[0]), []
    for each in given[start:stop]:
        out, state = step(state, **each)
        outs.append(pytree.tree_leaves(out)[0].clone())
    return outs, state


def close(found, wanted, tolerance=1e-3):
    for one, other in zip(found, wanted, strict=True):
        assert one.is_cuda and one.isfinite().all()
        assert (one - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", POLICIES)
def test_every_way_to_run_is_the_same(flux, method, way):
    model, given = flux
    wanted, right = trajectory(ck.cache(model, POLICIES[method]), given)
    assert {*ck.summary(right).computed} == {True, False}
    step = WAYS[way](ck.cache(model, POLICIES[method]))
    for _ in range(3):  # compiled, recorded, replayed
        found, state = trajectory(step, given)
        assert ck.summary(state).computed == ck.summary(right).computed
        close(found, wanted)


@pytest.mark.parametrize("way", [None, "programs", "CUDA graphs"])
def test_an_old_state_is_as_good_as_a_new_one(flux, way):
    model, given = flux
    step = ck.cache(model, POLICIES["first_block_cache"])
    step = step if way is None else WAYS[way](step)
    trajectory(step, given)
    _, middle = trajectory(step, given, stop=5)
    first, _ = trajectory(step, given, middle, 5)
    trajectory(step, given)
    second, _ = trajectory(step, given, middle, 5)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("way", [None, "programs", "regional"])
@pytest.mark.parametrize("method", STATIC)
def test_a_plan_that_is_known_makes_nobody_wait_for_the_device(flux, method, way):
    model, given = flux
    step = ck.cache(model, STATIC[method])
    step = step if way is None else WAYS[way](step)
    _, state = trajectory(step, given)  # compiled, the kernels loaded
    state = step.init(TIMES, **given[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for each in given:
                _, state = step(state, **each)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ck.summary(state).steps == STEPS


def test_a_package_runs_on_the_gpu(flux, tmp_path):
    model, given = flux
    step = ck.cache(model, POLICIES["first_block_cache"])
    wanted, right = trajectory(step, given)
    path = str(tmp_path / "step.pt2")
    state = step.init(TIMES, **given[0])
    step.export(path, state, **given[0])
    run, leaves, found = torch._inductor.aoti_load_package(path), torch.load(f"{path}.state.pt"), []
    for each in given:
        out, leaves = run(leaves, **{name: value for name, value in each.items() if isinstance(value, torch.Tensor)})
        found.append(pytree.tree_leaves(out)[0].clone())
    close(found, wanted)
    last = pytree.tree_unflatten(leaves, pytree.tree_structure(right))
    assert ck.summary(last).computed == ck.summary(right).computed


def test_a_state_goes_to_the_cpu_and_back(flux, tmp_path):
    model, given = flux
    step = ck.cache(model, POLICIES["first_block_cache"])
    wanted, _ = trajectory(step, given)
    _, middle = trajectory(step, given, stop=6)
    torch.save(middle, tmp_path / "state.pt")
    back = torch.load(tmp_path / "state.pt", weights_only=False)
    found, _ = trajectory(step, given, back, 6)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted[6:], strict=True))


def test_two_streams_of_the_device_share_a_step(flux):
    model, given = flux
    step = ck.cache(model, POLICIES["first_block_cache"])
    inputs = [given, [{**each, "hidden_states": each["hidden_states"].flip(0, 1)} for each in given]]
    wanted = [trajectory(step, each)[0] for each in inputs]
    found: list = [None, None]
    torch.cuda.synchronize()

    def work(n):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found[n] = trajectory(step, inputs[n])[0]
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, wanted, strict=True):
        close(one, other, 1e-5)


def test_a_state_that_is_given_away_is_written_to(flux):
    model, given = flux
    wanted, _ = trajectory(ck.cache(model, STATIC["taylorseer"]), given)
    found, _ = trajectory(ck.cache(model, STATIC["taylorseer"], donate=True), given)
    close(found, wanted, 1e-5)


def test_bfloat16_decides_as_on_a_cpu():
    policy = ck.mag_cache([1.0] * STEPS, max_skips=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = specimen("Flux")
        here = found.model.bfloat16()
        given = [pytree.tree_map(_narrow, found.inputs(i)) for i in range(STEPS)]
        wanted, right = trajectory(ck.cache(here, policy), given)
        outs, state = trajectory(ck.cache(here.cuda(), policy), [on_gpu(each) for each in given])
    assert ck.summary(state).computed == ck.summary(right).computed
    for one, other in zip(outs, wanted, strict=True):
        assert (one.cpu().float() - other.float()).norm() < 5e-2 * other.float().norm()


def _narrow(value):
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_the_kernels_are_loaded_by_the_first_use_inside_a_graph(tmp_path):
    code = """
        import sys, torch, cachekit as ck
        from torch import nn

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

            def forward(self, x):
                for block in self.blocks:
                    x = x + block(x)
                return x

        with torch.device("cuda"), torch.no_grad():
            step = ck.cache(Model().eval(), ck.first_block_cache(0.5))
            x = torch.randn(2, 64)
            state = step.init(4, x)
            assert "cachekit_kernels._triton" not in sys.modules
            run, other, outs = torch.compile(step, fullgraph=True), state, []
            for _ in range(4):
                out, state = run(state, x)
                again, other = step(other, x)
                torch.testing.assert_close(out, again)
        print("cachekit_kernels._triton" in sys.modules, ck.summary(state).computed == ck.summary(other).computed)
    """
    assert fresh(code, tmp_path) == "True True"
