"""The state of a trajectory: a value of constant layout that nobody else can reach and that costs what it says."""

from __future__ import annotations

import copy
import functools
import io
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import dit
import pytest
import torch
from dit import Reference, feed
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import cachekit as ck
from cachekit.diffusers import zoo

STEPS = 8
MASK = (1, 0, 1, 0, 0, 1, 0, 0)
POLICIES = {
    "first_block": ck.first_block_cache(0.1),
    "capped": ck.first_block_cache(0.5, warmup=2, max_skips=2, forecaster=ck.forecasters.taylor(1)),
    "mag": ck.mag_cache([1.0] * STEPS, retention=0.2),
    "newton": ck.step_mask(MASK, forecaster=ck.forecasters.newton(2)),
    "calibration": ck.mag_calibration(),
}


def layout(state: ck.State) -> tuple:
    """Tree, shapes, dtypes, devices, strides, and that nothing hangs on a graph of autograd."""
    leaves, treespec = pytree.tree_flatten(state)
    seen = [(leaf.shape, leaf.dtype, leaf.device, leaf.stride(), leaf.requires_grad, leaf.grad_fn) for leaf in leaves]
    return treespec, seen


def same(one: ck.State, other: ck.State) -> bool:
    """Equal to the last bit, NaN at the same places."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs)


def frozen(state: ck.State) -> ck.State:
    """The same values in tensors of their own."""
    return pytree.tree_map(torch.clone, state)


def go(step: Callable, state: ck.State, steps: range, **inputs: int) -> tuple[list[Tensor], ck.State]:
    """Some steps on, from a state."""
    outputs = []
    for index in steps:
        out, state = step(state, *feed(index, **inputs))
        outputs.append(out)
    return outputs, state


def alike(one: list[Tensor], other: list[Tensor]) -> bool:
    """Equal to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("flow", ["plain", "two", "swapped", "inplace"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("grad", [False, True])
def test_the_layout_is_that_of_init_for_ever(flow, name, grad):
    with torch.set_grad_enabled(grad):
        step = ck.cache(dit.shared(flow), POLICIES[name])
        state = step.init(STEPS, *feed(0))
        first = layout(state)
        assert all(not wanted and function is None for *_, wanted, function in first[1])
        for index in range(STEPS):
            out, state = step(state, *feed(index))
            assert layout(state) == first
            assert out.requires_grad == grad


@pytest.mark.parametrize("name", ["Flux", "Wan", "LTX", "HunyuanVideo"])
def test_the_layout_is_that_of_init_on_transformers_of_diffusers(name):
    specimen = zoo.specimen(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for policy in (POLICIES["capped"], POLICIES["newton"]):
            step = ck.cache(specimen.model, policy)
            state = step.init(specimen.timesteps[:STEPS], **specimen.inputs(0))
            first = layout(state)
            for index in range(4):
                _, state = step(state, **specimen.inputs(index))
                assert layout(state) == first


@torch.no_grad()
@pytest.mark.parametrize(("flow", "held"), [("plain", 1), ("two", 3), ("glue", 3), ("interleaved", 15)])
def test_mag_cache_holds_one_residual_per_chain_and_stream(flow, held):
    model, batch = dit.dit(flow), 3
    step = ck.cache(model, POLICIES["mag"])
    state = step.init(STEPS, *feed(0, batch))
    _, state = go(step, state, range(STEPS), batch=batch)
    cached = pytree.tree_leaves(state.sites)
    assert len(cached) == held
    rows = {"two": [dit.IMAGE, dit.WORDS, dit.IMAGE + dit.WORDS]}.get(flow, [leaf.shape[1] for leaf in cached])
    by_hand = sum(batch * row * dit.WIDTH * 4 for row in rows)
    assert by_hand == sum(leaf.untyped_storage().nbytes() for leaf in cached)
    counters = 8 + STEPS * (8 + 1 + 1 + 8)  # step; timesteps, plan, computed, signal
    said = re.search(r"total state: .* \((\d+) bytes\)", str(step.explain(STEPS, *feed(0, batch))))
    measured = sum(leaf.untyped_storage().nbytes() for leaf in pytree.tree_leaves(state))
    assert int(said[1]) == measured == by_hand + counters == ck.summary(state).state_bytes


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
def test_bytes_said_are_bytes_held(name):
    for flow in ("plain", "two"):
        step = ck.cache(dit.shared(flow), POLICIES[name])
        said = re.search(r"\((\d+) bytes\)", str(step.explain(STEPS, *feed(0))))
        _, state = go(step, step.init(STEPS, *feed(0)), range(STEPS))
        assert int(said[1]) == sum(leaf.untyped_storage().nbytes() for leaf in pytree.tree_leaves(state))


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
def test_a_saved_state_resumes_bit_exactly(name):
    step = ck.cache(dit.shared(), POLICIES[name])
    outputs, last = go(step, step.init(STEPS, *feed(0)), range(STEPS))
    _, state = go(step, step.init(STEPS, *feed(0)), range(4))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    later = ck.cache(dit.shared(), POLICIES[name])
    later.init(STEPS, *feed(0))
    resumed, end = go(later, torch.load(file), range(4, STEPS))
    assert alike(outputs[4:], resumed)
    assert same(last, end)


RESUME = """
import sys, torch, dit, cachekit as ck
folder = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))
step = ck.cache(dit.dit(), ck.first_block_cache(0.1))
with torch.no_grad():
    step.init(8, *dit.feed(0))
    state, outputs = torch.load(folder + "/state.pt"), []
    for index in range(4, 8):
        out, state = step(state, *dit.feed(index))
        outputs.append(out)
torch.save((outputs, state), folder + "/end.pt")
"""


@torch.no_grad()
def test_a_saved_state_resumes_in_another_process(tmp_path):
    step = ck.cache(dit.dit(), POLICIES["first_block"])
    _, state = go(step, step.init(STEPS, *feed(0)), range(4))
    torch.save(state, tmp_path / "state.pt")
    paths = [str(Path(__file__).parent), str(Path(ck.__file__).parents[1])]
    command = f"import sys; sys.path[:0] = {paths!r}\n{RESUME}"
    threads = str(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", command, str(tmp_path), threads], check=True)
    outputs, end = torch.load(tmp_path / "end.pt")
    expected, last = go(step, state, range(4, STEPS))
    assert alike(expected, outputs)
    assert same(last, end)


def ways(step: ck.CachedStep) -> dict[str, tuple[Callable, Callable]]:
    """The ways to run a step, each with its init."""
    programs = step.compile(backend="eager")
    graph = torch.compile(step, fullgraph=True, backend="eager")
    return {"eager": (step, step.init), "programs": (programs, programs.init), "graph": (graph, step.init)}


COMPILED = [pytest.param(way, marks=pytest.mark.compiles) for way in ("programs", "graph")]
WAYS = pytest.mark.parametrize("way", ["eager", *COMPILED])


@torch.no_grad()
@WAYS
def test_trajectories_on_one_step_never_touch(way):
    step, init = ways(ck.cache(dit.shared("two", depth=2), POLICIES["capped"]))[way]
    alone = [go(step, init(STEPS, *feed(0, seed=seed)), range(STEPS), seed=seed) for seed in range(3)]
    states = [init(STEPS, *feed(0, seed=seed)) for seed in range(3)]
    for index in range(STEPS):
        for seed in (1, 0, 2):
            out, states[seed] = step(states[seed], *feed(index, seed=seed))
            assert torch.equal(out, alone[seed][0][index])
    for seed in range(3):
        assert same(states[seed], alone[seed][1])


KEPT = [("chain", "programs"), ("chain", "graph"), ("output", "programs")]


class Keeping(dit.DiT):
    """Looks at the first text that it is given, until it is told to forget it: as speech models keep their letters."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth=depth)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Velocity [B, S, C]."""
        if self.kept is None:
            self.kept = text * 2
        return super().forward(x, t, self.kept)


@torch.no_grad()
@pytest.mark.parametrize(
    ("sites", "way"),  # of what a forward writes within a condition torch makes no graph
    [("chain", "eager"), *(pytest.param(*cell, marks=pytest.mark.compiles) for cell in KEPT)],
)
def test_a_trajectory_begins_with_what_the_model_has_and_not_with_what_is_left_of_another(sites, way):
    torch.manual_seed(0)
    model = Keeping(2)
    step, init = ways(ck.cache(model, ck.step_mask([1, 1, 0], sites=sites)))[way]
    state = None
    for seed, like in ((0, False), (1, False), (2, True)):
        wanted = [model(*feed(index, seed=seed)) for index in range(2)]
        model.kept = None
        state = step.init_like(state) if like and way != "graph" else init(3, *feed(0, seed=seed))
        for index in range(2):
            out, state = step(state, *feed(index, seed=seed))
            torch.testing.assert_close(out, wanted[index])
        _, state = step(state, *feed(2, seed=seed))
        assert model.kept is None, "a step writes to its own copy of the model"


@torch.no_grad()
def test_text_that_a_model_keeps_is_kept_by_branch_and_of_one_trajectory_alone():
    kept, plain = (zoo.specimen("F5DiT", seed=0) for _ in range(2))

    def given(index, prompt, drop):
        inputs = kept.inputs(index)
        return {**inputs, "text": inputs["text"].roll(prompt, 1), "drop_text": drop}

    step = ck.cache(kept.model, ck.step_mask([1, 1, 0]))
    for prompt in (0, 1):
        branches = {}
        for drop in (False, True):
            branches[drop] = step.init(3, **given(0, prompt, drop), cache=True)
        for index in range(2):
            for drop in (False, True):
                out, branches[drop] = step(branches[drop], **given(index, prompt, drop), cache=True)
                torch.testing.assert_close(out, plain.model(**given(index, prompt, drop)))
    assert not kept.model.kept


@pytest.mark.compiles
@torch.no_grad()
def test_a_new_trajectory_of_a_patched_forward_that_keeps_something_compiles_nothing():
    model = Keeping(2)
    model.forward = functools.partial(Keeping.forward, model)  # as hooks of accelerate do
    step, graphs = ck.cache(model, ck.step_mask([1, 1, 0])).compile(backend="eager"), []
    counters.clear()
    for seed in range(4):
        state = step.init(3, *feed(0, seed=seed))
        for index in range(3):
            _, state = step(state, *feed(index, seed=seed))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == graphs[:1] * 3


@torch.no_grad()
@WAYS
def test_old_states_stay_valid(way):
    step, init = ways(ck.cache(dit.shared(depth=2), POLICIES["capped"]))[way]
    state, outputs, states, copies = init(STEPS, *feed(0)), [], [], []
    for index in range(STEPS):
        states.append(state)
        copies.append(frozen(state))
        out, state = step(state, *feed(index))
        outputs.append(out.clone())
    assert all(same(old, kept) for old, kept in zip(states, copies, strict=True))
    for start in (0, 3, STEPS - 1):
        replayed, end = go(step, states[start], range(start, STEPS))
        assert alike(replayed, outputs[start:])
        assert same(end, state)


class TroubleError(Exception):
    """What a block may run into."""


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("flow", ["two", "inplace"])
def test_an_exception_in_a_step_leaves_the_state_valid(name, flow):
    model = dit.dit(flow)
    step = ck.cache(model, POLICIES[name])
    outputs, last = go(step, step.init(STEPS, *feed(0)), range(STEPS))
    mlp = model.blocks[2].mlp
    state, raised, redone = step.init(STEPS, *feed(0)), 0, []

    def fail(*_):
        raise TroubleError

    for index in range(STEPS):
        before = frozen(state)
        handle = mlp.register_forward_hook(fail)
        try:
            step(state, *feed(index))
        except TroubleError:
            raised += 1
        handle.remove()
        assert same(state, before)
        assert torch.equal(step.shadow(*feed(index)), model(*feed(index))), "something of the failed step is left"
        with pytest.raises(ck.StateError):
            step(state, *feed(index, batch=1))
        assert same(state, before)
        out, state = step(state, *feed(index))
        redone.append(out)
    assert raised == sum(ck.summary(state).computed)
    assert alike(outputs, redone)
    assert same(last, state)


@torch.no_grad()
def test_init_like_is_init_without_discovery():
    for policy in POLICIES.values():
        step = ck.cache(dit.shared("two"), policy)
        fresh = step.init(STEPS, *feed(0))
        outputs, used = go(step, fresh, range(STEPS))
        again = step.init_like(used)
        assert layout(again) == layout(fresh)
        assert same(again, fresh)
        assert alike(go(step, again, range(STEPS))[0], outputs)
        assert same(step.init_like(used, 5), step.init(5, *feed(0)))
        assert same(step.init_like(used, [9.0, 4.0]), step.init(torch.tensor([9, 4]), *feed(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("batch", [1, 3])
def test_modes_dtypes_and_batches(dtype, mode, batch):
    model = dit.dit("two").to(dtype)
    reference = Reference(model)
    with mode():
        step = ck.cache(model, ck.step_mask(MASK))
        state = step.init(STEPS, *(value.to(dtype) for value in feed(0, batch)))
        for index in range(STEPS):
            inputs = [value.to(dtype) for value in feed(index, batch)]
            out, state = step(state, *inputs)
            assert out.dtype == dtype
            assert torch.equal(out, reference(bool(MASK[index]), *inputs))
        assert {leaf.dtype for leaf in pytree.tree_leaves(state.sites)} == {dtype}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    model = dit.dit("two").to(dtype)
    reference = Reference(model)
    step = ck.cache(model, ck.step_mask(MASK))
    with torch.autocast("cpu", torch.bfloat16):
        state = step.init(STEPS, *(value.to(dtype) for value in feed(0)))
        for index in range(STEPS):
            inputs = [value.to(dtype) for value in feed(index)]
            out, state = step(state, *inputs)
            assert torch.equal(out, reference(bool(MASK[index]), *inputs))
    if dtype == torch.float32:
        with pytest.raises(ck.StateError, match=r"bfloat16 .*float32 .*step\.init"):
            step(step.init_like(state), *feed(0))  # the cast is part of what init has seen


class Stack(nn.Module):
    """The blocks of a list as one, cached by hand."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks, self.computed = blocks, True

    def forward(self, hidden_states: Tensor, **others: Tensor) -> Tensor:
        """Run, or add what the last run has added."""
        if self.computed:
            out = hidden_states
            for block in self.blocks:
                out = block(hidden_states=out, **others)
            self.added, self.dtype = out - hidden_states, out.dtype
            return out
        return (hidden_states + self.added).to(self.dtype)


@torch.no_grad()
def test_blocks_that_change_the_dtype_under_autocast():
    specimen = zoo.specimen("LTX")
    twin = copy.deepcopy(specimen.model)
    stack = Stack(twin.transformer_blocks)
    twin.transformer_blocks = nn.ModuleList([stack])
    step = ck.cache(specimen.model, ck.step_mask(MASK))
    with torch.autocast("cpu", torch.bfloat16):
        seen = []
        specimen.model.transformer_blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: seen.append(kwargs["hidden_states"].dtype), with_kwargs=True
        )
        state = step.init(STEPS, **specimen.inputs(0))
        for index in range(STEPS):
            stack.computed = bool(MASK[index])
            (out,), state = step(state, **specimen.inputs(index), return_dict=False)
            (expected,) = twin(**specimen.inputs(index), return_dict=False)
            assert torch.equal(out, expected)
    assert (seen[-1], stack.dtype) == (torch.bfloat16, torch.float32)
    assert {leaf.dtype for leaf in pytree.tree_leaves(state.sites)} == {torch.float32}


@WAYS
def test_two_threads_on_one_step(way):
    model, policy = dit.dit(depth=2), ck.first_block_cache(0.1, max_skips=3)
    with torch.no_grad():
        single = ck.cache(model, policy)
        alone = [go(single, single.init(20, *feed(0, seed=seed)), range(20), seed=seed) for seed in range(2)]
    assert 5 < sum(ck.summary(alone[0][1]).computed) < 15
    step, init = ways(ck.cache(model, policy))[way]
    problems, gate = [], threading.Barrier(2)

    def work(seed: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    gate.wait()
                    outputs, state = go(step, init(20, *feed(0, seed=seed)), range(20), seed=seed)
                    if not (alike(outputs, alone[seed][0]) and same(state, alone[seed][1])):
                        problems.append(seed)
        except BaseException as error:
            gate.abort()
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@torch.no_grad()
@pytest.mark.parametrize("timesteps", [3, [900.0, 500.5, 1.0], (900, 500.5, 1), torch.tensor([900.0, 500.5, 1.0])])
def test_timesteps_are_a_number_or_values(timesteps):
    step = ck.cache(dit.dit(), ck.step_mask([1, 0, 1]))
    state = step.init(timesteps, *feed(0))
    assert state.timesteps.dtype == torch.float64
    expected = [math.nan] * 3 if isinstance(timesteps, int) else [900.0, 500.5, 1.0]
    torch.testing.assert_close(state.timesteps.tolist(), expected, rtol=0, atol=0, equal_nan=True)
    assert str(step.plan(timesteps)) == "2 of 3 steps computed  #.#"
    _, state = go(step, state, range(3))
    assert ck.summary(state).computed == (True, False, True)


@torch.no_grad()
def test_summary_is_the_log_as_a_table():
    step = ck.cache(dit.dit(), ck.first_block_cache(math.inf, max_skips=1))
    state = step.init([900, 500.5, 1], *feed(0))
    _, state = go(step, state, range(2))
    log = ck.summary(state)
    assert (log.computed, log.steps, log.timesteps) == ((True, False), 2, (900.0, 500.5, 1.0))
    assert log.signal[0] == math.inf
    assert 0 < log.signal[1] < 1
    lines = str(log).splitlines()
    assert re.fullmatch(r"1 of 2 steps computed of 3 planned, state \d\.\d KiB", lines[0])
    assert lines[1:3] == ["#.", " step   timestep action       signal"]
    assert lines[3] == "    0     900.00 compute         inf"
    assert re.fullmatch(r" {4}1 {5}500\.50 reuse {4,}0\.\d+", lines[4])
    assert len(lines) == 5
    fresh = ck.summary(step.init(2, *feed(0)))
    assert (fresh.computed, fresh.signal, fresh.steps) == ((), (), 0)
    _, state = go(step := ck.cache(dit.dit(), ck.step_mask([1, 0])), step.init(2, *feed(0)), range(2))
    assert str(ck.summary(state)).splitlines()[-1] == "    1          - reuse             -"


@pytest.mark.parametrize("name", POLICIES)
def test_a_saved_state_is_read_by_torch_load_as_it_is(name, tmp_path):
    step = ck.cache(dit.dit(), POLICIES[name])
    _, state = go(step, step.init(STEPS, *feed(0)), range(3))
    torch.save(state, tmp_path / "state.pt")
    assert same(torch.load(tmp_path / "state.pt", weights_only=True), state)
