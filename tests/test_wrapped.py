"""Pieces of a model that a user has compiled, wrapped or patched: the same names, the same numbers, and a word."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from tiers import covering
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

import cachekit as ck

WIDTH, STEPS = 16, 6


class Attention(nn.Module):
    """Attention to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        """The same shape."""
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """An attention and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        """The same shape."""
        x = x + self.attn(x)
        return x + self.ff(x)


class Head(nn.Linear):
    """A layer of the user's own: of PyTorch's, `compile` makes nothing before 2.14."""

    def forward(self, x):
        """[..., WIDTH]."""
        return super().forward(x).tanh()


class Model(nn.Module):
    """Four of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.head = nn.Linear(WIDTH, WIDTH), Head(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, t):
        """The same shape."""
        x = self.inp(x) + t
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PLAIN = Model().requires_grad_(False).eval()


def feed(index: int) -> tuple[Tensor, Tensor]:
    """The arguments of a step."""
    noise = torch.Generator().manual_seed(7)
    x, drift = (torch.randn(2, 5, WIDTH, generator=noise) for _ in range(2))
    return x + 0.1 * index * drift, torch.tensor(1 - 0.1 * index)


def wrapped(model: Model, where: str, how: str, compiler: Callable) -> nn.Module:
    """The model with a piece compiled in one of the ways in which users do it."""
    if where == "the model":
        pieces = [(None, "", model)]
    elif where == "the blocks":
        pieces = [(model.blocks, str(n), block) for n, block in enumerate(model.blocks)]
    elif where == "the attention":
        pieces = [(block, "attn", block.attn) for block in model.blocks]
    else:
        pieces = [(model, "head", model.head)]
    for parent, child, module in pieces:
        if how == "its forward":
            module.forward = compiler(module.forward)
        elif how == "in place":
            module.compile(backend=compiler.keywords["backend"])
        elif parent is None:
            return compiler(module)
        else:
            parent._modules[child] = compiler(module)
    return model


WHERE = ("the model", "the blocks", "the attention", "the head")
HOW = ("wrapped", "in place", "its forward")
POLICIES: dict[str, Callable[[], ck.Policy]] = {
    "chain": lambda: ck.step_mask([1, 0, 1, 0, 0, 1]),
    "probe": lambda: ck.first_block_cache(1e9, max_skips=1),
    "parts": lambda: ck.taylorseer(2, warmup=1),
    "output": lambda: ck.taylorseer(2, warmup=1, sites="output"),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run(step: ck.CachedStep) -> tuple[list[Tensor], ck.State]:
    """The outputs of a trajectory, and its last state."""
    state, outs = step.init(STEPS, *feed(0)), []
    for index in range(STEPS):
        out, state = step(state, *feed(index))
        outs.append(out)
    return outs, state


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """What is said meanwhile, of cachekit."""
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield heard
    heard += [str(each.message) for each in caught if "is compiled by itself" in str(each.message)]


def compiler(backend="eager"):
    """torch.compile with this backend."""
    return functools.partial(torch.compile, backend=backend)


@pytest.mark.compiles
@pytest.mark.parametrize(("where", "how", "policy"), covering(WHERE, HOW, [*POLICIES]))
def test_it_is_cached_as_if_nothing_were_compiled(where, how, policy):
    wanted, plain = run(ck.cache(PLAIN, POLICIES[policy]()))
    step = ck.cache(wrapped(copy.deepcopy(PLAIN), where, how, compiler()), POLICIES[policy]())
    around = ("the model", "the blocks") if policy == "parts" else ("the model",)
    with said() as heard:
        outs, state = run(step)
        run(step)
    assert all(map(torch.equal, outs, wanted))
    assert state.sites.keys() == plain.sites.keys() and ck.summary(state).computed == ck.summary(plain).computed
    assert len(heard) == (where in around)  # once, and only where it is so


@pytest.mark.compiles
@pytest.mark.parametrize(("where", "how", "policy"), covering(WHERE, HOW, [*POLICIES]))
def test_in_programs_it_is_compiled_again(where, how, policy):
    wanted, _ = run(ck.cache(PLAIN, POLICIES[policy]()))
    step = ck.cache(wrapped(copy.deepcopy(PLAIN), where, how, compiler()), POLICIES[policy]()).compile(backend="eager")
    with said() as heard:
        outs, _ = run(step)
    assert all(map(torch.equal, outs, wanted)) and not heard


@pytest.mark.compiles
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("where", ["the blocks", "the attention", "the head"])
def test_what_has_no_sites_inside_runs_the_program_that_it_has(where, how):
    counter = CompileCounter()
    model = wrapped(copy.deepcopy(PLAIN), where, how, compiler(counter))
    model(*feed(0))
    graphs = counter.frame_count
    assert graphs
    outs, _ = run(ck.cache(model, ck.step_mask([1] * STEPS)))
    assert counter.frame_count == graphs
    for index, out in enumerate(outs):
        assert torch.equal(out, model(*feed(index)))


@pytest.mark.compiles
@pytest.mark.parametrize(("where", "how"), [("the blocks", "wrapped"), ("the attention", "its forward")])
def test_with_the_default_backend(where, how):
    model = wrapped(copy.deepcopy(PLAIN), where, how, compiler("inductor"))
    outs, _ = run(ck.cache(model, ck.step_mask([1, 0] * 3)))
    for index in (0, 2, 4):
        assert torch.equal(outs[index], model(*feed(index)))


def test_names_are_those_of_the_model_that_is_not_compiled():
    model = wrapped(copy.deepcopy(PLAIN), "the blocks", "wrapped", compiler())
    step = ck.cache(model, ck.taylorseer(2, warmup=1, sites=(r"blocks\.\d+\.ff",)))
    assert [*step.init(STEPS, *feed(0)).sites] == [f"blocks.{n}.ff" for n in range(4)]
    stated = ck.cache(model, ck.step_mask([1, 0] * 3), ck.Chain("blocks", {0: 0}))
    assert [*stated.init(STEPS, *feed(0)).sites] == ["blocks.0..blocks.3"]


def test_a_block_that_is_compiled_later_is_another_module():
    model = copy.deepcopy(PLAIN)
    step = ck.cache(model, ck.step_mask([1, 0] * 3))
    state = step.init(STEPS, *feed(0))
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    with pytest.raises(ck.StructureError, match=r"blocks\.1"):
        step(state, *feed(0))
    out, _ = step(step.init(STEPS, *feed(0)), *feed(0))
    assert torch.equal(out, PLAIN(*feed(0)))


@pytest.mark.compiles
@pytest.mark.parametrize("policy", ["chain", "parts"])
def test_regional_compiles_the_blocks_anew(policy):
    wanted, _ = run(ck.cache(PLAIN, POLICIES[policy]()))
    model = wrapped(copy.deepcopy(PLAIN), "the blocks", "wrapped", compiler())
    outs, _ = run(ck.cache(model, POLICIES[policy]()).compile(regional=True, backend="eager"))
    assert all(map(torch.equal, outs, wanted))


@pytest.mark.compiles
@pytest.mark.parametrize("policy", ["chain", "parts"])
@pytest.mark.parametrize("where", ["the blocks", "the attention", "the head"])
def test_in_one_graph_it_is_entered(where, policy):
    wanted, _ = run(ck.cache(PLAIN, POLICIES[policy]()))
    step = ck.cache(wrapped(copy.deepcopy(PLAIN), where, "wrapped", compiler()), POLICIES[policy]())
    state, whole = step.init(STEPS, *feed(0)), torch.compile(step, fullgraph=True, backend="eager")
    for index in range(STEPS):
        out, state = whole(state, *feed(index))
        torch.testing.assert_close(out, wanted[index])


def test_what_the_compiler_is_kept_away_from_is_not_taken_for_compiled():
    model = copy.deepcopy(PLAIN)
    model.forward = torch.compiler.disable(model.forward)
    with said() as heard:
        outs, _ = run(ck.cache(model, POLICIES["chain"]()))
    assert not heard and torch.equal(outs[0], PLAIN(*feed(0)))
