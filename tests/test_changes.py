"""A model that is changed between two steps, or between a step and the next trajectory: followed or refused."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cachekit as ck

cachekit_gain = 1.0
X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.compiles


class Block(nn.Module):
    """With every kind of thing a user may change."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.step = types.SimpleNamespace(gain=1.0)
        self.skip = False

    def forward(self, x):
        """The tokens, with something added."""
        out = x + 0.3 * self.step.gain * cachekit_gain * torch.tanh(self.lin(x))
        for extra in self.buffers(recurse=False):
            out = out + extra
        return out


class Model(nn.Module):
    """A model that asks what it and its blocks are like."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.between = False

    def forward(self, x):
        """The tokens."""
        x = self.inp(x.to(self.inp.weight.dtype))
        if hasattr(self, "control"):
            x = x + self.control
        for block in self.blocks:
            x = x if block.skip else block(x)
            if self.between:
                x = 1.5 * x
        return self.out(x)


class Twice(nn.Linear):
    """Of the same parameters."""

    def forward(self, x):
        """Twice as much."""
        return 2 * super().forward(x)


class Negated(Model):
    """Of the same modules."""

    def forward(self, x):
        """The other sign."""
        return -super().forward(x)


def gain(model: Model) -> None:
    global cachekit_gain
    cachekit_gain = 3.0


def kind(module: nn.Module, to: type) -> None:
    module.__class__ = to


FOLLOWED: dict[str, Callable[[Model], object]] = {
    "a global whose name has ours in it": gain,
    "an attribute whose name is ours": lambda model: setattr(model.blocks[1].step, "gain", 3.0),
    "a new buffer": lambda model: model.blocks[1].register_buffer("extra", torch.ones(8)),
    "a new attribute of the model": lambda model: setattr(model, "control", torch.ones(8)),
    "a hook on the model": lambda model: model.register_forward_hook(lambda module, args, out: 2 * out),
}
REFUSED: dict[str, Callable[[Model], object]] = {
    "the class of a module inside": lambda model: kind(model.blocks[1].lin, Twice),
    "the class of a module beside": lambda model: kind(model.out, Twice),
    "the class of the model": lambda model: kind(model, Negated),
    "a block that is now left out": lambda model: setattr(model.blocks[1], "skip", True),
    "something between the blocks": lambda model: setattr(model, "between", True),
}


@pytest.fixture(autouse=True)
def _as_it_was():
    global cachekit_gain
    with torch.no_grad():
        yield
    cachekit_gain = 1.0


def begin(way: str, change: Callable[[Model], object] = lambda model: None):
    """A step under which everything computes, its state after one step, and the model, changed after that."""
    model = Model()
    step = ck.cache(model, ck.step_mask([1] * 6))
    if way == "compiled":
        step = step.compile(backend="eager")
    out, state = step(step.init(6, X), X)
    assert torch.equal(out, model(X))
    change(model)
    return model, step, state


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("change", FOLLOWED)
def test_followed(change, way):
    model, step, state = begin(way, FOLLOWED[change])
    out, _ = step(state, X)
    assert torch.equal(out, model(X))


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("change", REFUSED)
def test_refused_until_the_next_init(change, way):
    model, step, state = begin(way, REFUSED[change])
    with pytest.raises(ck.StructureError):
        step(state, X)
    out, _ = step(step.init(6, X), X)
    assert torch.equal(out, model(X))


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_an_attribute_that_is_deleted(way):
    model, step, state = begin(way)
    model.control = torch.ones(8)
    out, state = step(state, X)
    assert torch.equal(out, model(X))
    del model.control
    out, state = step(state, X)
    assert torch.equal(out, model(X))


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_another_dtype_is_another_record(way):
    model, step, _ = begin(way, lambda model: model.to(torch.bfloat16))
    out, _ = step(step.init(6, X), X)
    assert torch.equal(out, model(X)) and out.dtype == torch.bfloat16


def test_the_mode_of_a_step_is_that_of_its_model():
    model = Model()
    model.blocks[1].lin = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    step = ck.cache(model, ck.step_mask([1] * 6)).eval()
    assert not model.blocks[1].lin.training
    state = step.init(6, X)
    first, state = step(state, X)
    second, _ = step(state, X)
    assert torch.equal(first, second)


def test_a_trajectory_begun_before_a_replacement_does_not_go_on():
    model, step, state = begin("eager")
    model.blocks[2] = Block()
    fresh = step.init(6, X)
    with pytest.raises(ck.StructureError, match=r"added, removed or replaced since this trajectory began"):
        step(state, X)
    out, _ = step(fresh, X)
    assert torch.equal(out, model(X))
    out, _ = step(step.init_like(state), X)
    assert torch.equal(out, model(X))


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_deep_copy_is_a_step_of_a_copy_of_the_model(way):
    model, step, state = begin(way)
    other = copy.deepcopy({"step": step, "model": model})
    twin, its = other["step"].eval(), other["model"]
    with torch.no_grad():
        its.out.weight.mul_(2)
    out, _ = twin(twin.init(6, X), X)
    assert torch.equal(out, its(X)) and not torch.equal(out, model(X))
    out, _ = step(state, X)
    assert torch.equal(out, model(X))
    assert (twin._programs is None) == (way == "eager")
    for attempt in (pickle.dumps, copy.copy):
        with pytest.raises(ck.ArgumentTypeError, match=r"cachekit\.cache; .* copy\.deepcopy"):
            attempt(step)


class Shared(nn.Module):
    """Blocks that look at more than a tensor computed before all of them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.scale = nn.Linear(8, 8), 1.0

        def forward(self, x, context=None, gain=None):
            out = x + 0.3 * self.scale * torch.tanh(self.lin(x))
            if context is not None:
                out = out * (1 + (context["layer"] if isinstance(context, dict) else context.layer))
            return out if gain is None else (out * gain).to(x.dtype)

    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks, self.out, self.how = nn.ModuleList(self.Block() for _ in range(4)), nn.Linear(8, 8), how

    def forward(self, x):
        context, gain, seen = SimpleNamespace(layer=0), torch.linspace(0.5, 1.5, 8), 0
        held: dict[str, int] = {}
        for n, block in enumerate(self.blocks):
            match self.how:
                case "an object that is written to":
                    context.layer = n
                    x = block(x, context)
                case "a dict that is written to":
                    held["layer"] = n
                    x = block(x, held)
                case "a tensor that is written to":
                    x = block(x, None, gain.mul_(1.5))
                case "autocast":
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=n % 2 == 1):
                        x = block(x)
                case "a dtype that is asked for":
                    x = block(x.double() if n == 1 else x, None, gain.to(x.dtype) * 1.3)
                case "a class that is asked for":
                    x = block(x if type(block) is self.Block else 2 * x)
                case "an attribute that is set":
                    block.scale = float(n + 1)
                    x = block(x)
                case "a result that is compared":
                    out = block(x)
                    seen, x = seen + (out is not x), out
        return self.out(x.float()) * (1 + seen)


SHARED = (
    "an object that is written to",
    "a tensor that is written to",
    "autocast",
    "a class that is asked for",
    "an attribute that is set",
    "a result that is compared",
)


@pytest.mark.parametrize("how", SHARED)
def test_what_changes_between_two_blocks_is_refused(how):
    step = ck.cache(Shared(how), ck.step_mask([1, 0]))
    with pytest.raises(ck.StructureError, match="returns something else when its blocks run as a step runs them"):
        step.init(2, X)


def test_a_dict_that_is_written_to_is_for_every_block_what_it_was_for_it():
    model = Shared("a dict that is written to")
    step = ck.cache(model, ck.step_mask([1, 0]))
    out, state = step(step.init(2, X), X)
    assert torch.equal(out, model(X))
    again, _ = step(state, X)  # what the blocks add is held
    torch.testing.assert_close(again, out)


@pytest.mark.parametrize("how", [*SHARED[:3], *SHARED[4:]])
def test_as_a_whole_it_is_cached_all_the_same(how):
    model = Shared(how)
    step = ck.cache(model, ck.step_mask([1, 0], sites="output"))
    out, state = step(step.init(2, X), X)
    assert torch.equal(out, Shared.forward(model, X))
    again, _ = step(state, 2 * X)
    assert torch.equal(again, out)
