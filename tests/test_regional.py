"""`step.compile(regional=True)` with sites inside the blocks: whole blocks, one program a kind of block and action."""

from __future__ import annotations

import threading

import byhand
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from test_compiled import error
from test_grid import policy, run
from test_modules_compiled import assert_same, setup
from test_modules_compiled import run as walk
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import cachekit as ck
from cachekit.running.frames import call_frames

pytestmark = pytest.mark.compiles


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Block(nn.Module):
    """Attention, once or more, and a feed-forward network."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.attn, self.times = nn.MultiheadAttention(8, 2, batch_first=True), times
        self.ff = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        for n in range(self.times):
            x = x + (1 + n) * self.attn(x, x, x, need_weights=False)[0]
        return x + self.ff(x)


class Deep(nn.Module):
    """Many blocks of one kind."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Twice(nn.Module):
    """A block that is called twice a forward, and one whose attention is called twice a call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(1), Block(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.blocks[0], self.blocks[1], self.blocks[0]):
            x = block(x)
        return x


def turning(step: int, tokens: int = 5) -> Tensor:
    """The input of a step."""
    draw = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 2, tokens, 8, generator=draw)
    turn = torch.tensor(0.1 * step)
    return turn.cos() * start + turn.sin() * end


def through(step: ck.CachedStep, tokens: int = 5, steps: int = 8) -> tuple[list[Tensor], ck.State]:
    """Some steps."""
    state, outputs = step.init(steps, turning(0, tokens)), []
    for index in range(steps):
        out, state = step(state, turning(index, tokens))
        outputs.append(out)
    return outputs, state


@pytest.mark.parametrize("sites", ["attention", "mlp", "attention+mlp"])
def test_blocks_of_one_kind_are_two_programs_however_many_they_are(sites):
    step = ck.cache(Deep(7), ck.taylorseer(3, warmup=2, sites=sites))
    regional = step.compile(regional=True, backend="aot_eager")
    counters.clear()
    assert_alike(through(regional), through(step))
    assert counters["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        through(regional, steps=11)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def assert_alike(one: tuple[list[Tensor], ck.State], other: tuple[list[Tensor], ck.State]) -> None:
    """Equal outputs, decisions and states."""
    assert max(error(a, b) for a, b in zip(one[0], other[0], strict=True)) < 1e-5
    assert ck.summary(one[1]).computed == ck.summary(other[1]).computed
    assert {True, False} == set(ck.summary(other[1]).computed)
    assert pytree.tree_structure(one[1]) == pytree.tree_structure(other[1])
    assert list(one[1].sites) == list(other[1].sites)
    for a, b in zip(pytree.tree_leaves(one[1].sites), pytree.tree_leaves(other[1].sites), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_calls_that_are_repeated_have_each_their_own_memory():
    step = ck.cache(Twice(), ck.taylorseer(3, warmup=2, sites="attention"))
    regional = step.compile(regional=True, backend="eager")
    eager = through(step)
    assert len(eager[1].sites) == 4
    assert_alike(through(regional), eager)


def test_blocks_of_one_class_need_not_have_the_same_sites():
    step = ck.cache(Deep(4), ck.taylorseer(3, warmup=2, sites=(r"blocks\.[02]\.attn", r"blocks\.[23]\.ff")))
    regional = step.compile(regional=True, backend="eager")
    eager = through(step)
    assert len(eager[1].sites) == 4
    assert_alike(through(regional), eager)


@pytest.mark.parametrize("forecaster", ["hold", "two-point", "newton 2"])
@pytest.mark.parametrize("sites", ["attention", "attention+mlp"])
@pytest.mark.parametrize("decider", ["interval", "drift"])
def test_every_cell_is_that_of_the_step_itself(sites, decider, forecaster):
    step = ck.cache(byhand.net(), policy(sites, decider, forecaster))
    regional = step.compile(regional=True, backend="eager")
    assert_alike(run(regional), run(step))


@pytest.mark.parametrize("method", ["pyramid_attention_broadcast", "faster_cache"])
def test_inductor_equals_eager(method):
    specimen, made = setup("Wan", method)
    step = ck.cache(specimen.model, made)
    regional = step.compile(regional=True)
    assert_same(walk(regional, regional.init, specimen, 12), walk(step, step.init, specimen, 12))


def test_a_state_that_is_given_away_is_written_to():
    made = ck.taylorseer(3, warmup=2, order=2)
    wanted = through(ck.cache(Deep(3), made))
    regional = ck.cache(Deep(3), made, donate=True).compile(regional=True, backend="eager")
    state, places = regional.init(8, turning(0)), []
    for index in range(8):
        out, state = regional(state, turning(index))
        assert error(out, wanted[0][index]) < 1e-5
        places.append([leaf.data_ptr() for leaf in pytree.tree_leaves(state.sites) if leaf.numel() > 1])
    assert all(place == places[0] for place in places)


def test_another_resolution_is_another_state_and_says_so():
    regional = ck.cache(Deep(2), ck.taylorseer(3, warmup=2)).compile(regional=True, backend="eager")
    through(regional)
    state = regional.init(8, turning(0))
    for index in range(2):
        _, state = regional(state, turning(index))
    for tokens in (5, 9):
        if tokens == 9:
            with pytest.raises(ck.StateError, match=r"make a new state with step\.init"):
                regional(state, turning(2, tokens))
        through(regional, tokens)


def test_a_module_that_is_replaced_is_followed():
    model = Deep(2)
    step = ck.cache(model, ck.taylorseer(3, warmup=2))
    regional = step.compile(regional=True, backend="eager")
    through(regional)
    model.blocks[1] = Deep(1).blocks[0]
    nn.init.normal_(model.blocks[1].ff[0].weight)
    assert_alike(through(regional), through(step))


def test_threads_share_the_programs_and_nothing_else():
    step = ck.cache(Deep(3), ck.taylorseer(3, warmup=2))
    regional = step.compile(regional=True, backend="eager")
    wanted = {tokens: through(step, tokens) for tokens in (5, 9)}
    for tokens in wanted:
        through(regional, tokens)
    found: dict[int, tuple[list[Tensor], ck.State]] = {}

    def work(tokens: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                found[tokens] = through(regional, tokens)

    threads = [threading.Thread(target=work, args=(tokens,)) for tokens in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tokens, right in wanted.items():
        assert_alike(found[tokens], right)


def test_a_forward_that_fails_leaves_no_frame_behind():
    model = Deep(2)
    regional = ck.cache(model, ck.taylorseer(3, warmup=2)).compile(regional=True, backend="eager")
    wanted = through(regional)
    state = regional.init(8, turning(0))
    with pytest.raises(
        ck.StateError, match=r"At blocks\.0\.attn the state holds \[2, 5, 8\], the call brings \[2, 5, 7\]"
    ):
        regional(state, torch.randn(2, 5, 7))
    assert not call_frames.stack
    assert_alike(through(regional), wanted)


def twice(module, args, out):
    """A hook."""
    return 1.5 * out


@pytest.mark.parametrize("sites", ["attention", "chain"])
@pytest.mark.parametrize("path", ["blocks.0", "blocks.1", "blocks.1.ff", "blocks.2.ff.0"])
@pytest.mark.parametrize("late", [False, True])
def test_a_hook_is_called_wherever_it_is(path, sites, late):
    model = Deep(3)
    step = ck.cache(model, ck.taylorseer(3, warmup=2, sites=sites))
    regional = step.compile(regional=True, backend="eager")
    plain = through(step)
    if late:
        assert_alike(through(regional), plain)
    handle = model.get_submodule(path).register_forward_hook(twice)
    hooked = through(step)
    assert error(hooked[0][0], plain[0][0]) > 0.01
    block = ".".join(path.split(".")[:2])
    with pytest.warns(UserWarning, match=f"block {block} runs as it is, not compiled: a hook") as told:
        assert_alike(through(regional), hooked)
    assert len(told) == 1
    handle.remove()
    assert_alike(through(regional), plain)


@pytest.mark.parametrize("sites", ["attention", "chain"])
def test_a_patched_block_runs_as_it_is(sites):
    """As accelerate patches it, for one."""
    model = Deep(3)
    plain = through(ck.cache(model, ck.taylorseer(3, warmup=2, sites=sites)))
    add_hook_to_module(model.blocks[1], AlignDevicesHook("cpu"))
    regional = ck.cache(model, ck.taylorseer(3, warmup=2, sites=sites)).compile(regional=True, backend="eager")
    with pytest.warns(UserWarning, match=r"block blocks\.1 runs as it is, not compiled: a patched forward"):
        assert_alike(through(regional), plain)


@pytest.mark.parametrize("sites", ["attention", "chain"])
def test_a_forward_that_hooks_have_left_behind_is_compiled(sites):
    """The hooks of diffusers leave on every block the bound method that its class has."""
    counted = []
    for left_behind in (False, True):
        model = Deep(7)
        for block in model.blocks if left_behind else ():
            for module in (block, block.ff):
                module.forward = module.forward
        step = ck.cache(model, ck.taylorseer(3, warmup=2, sites=sites))
        counters.clear()
        torch._dynamo.reset()
        assert_alike(through(step.compile(regional=True, backend="eager")), through(step))
        counted.append(counters["stats"]["unique_graphs"])
    assert counted[0] == counted[1] > 0


def test_the_options_of_the_caller_stay_as_they_are():
    seen = []
    options = {"guard_filter_fn": lambda entries: seen.append(1) or [True] * len(entries)}
    step = ck.cache(Deep(3), ck.taylorseer(3, warmup=2, sites="attention"))
    through(step.compile(regional=True, backend="eager", options=options))
    assert len(seen) >= 2 and set(options) == {"guard_filter_fn"}
