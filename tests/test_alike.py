"""Blocks that are proven to do the same are looked at once: the record is that of looking at every one of them."""

from __future__ import annotations

import collections
import contextvars
import functools
import gc
import os
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import dit
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import cachekit as ck
from cachekit.diffusers import zoo
from cachekit.running.shadow import block_paths
from cachekit.structure.alike import Accounts
from cachekit.structure.discovery import Twin
from cachekit.structure.forms import Forming, form
from cachekit.structure.parts import part_paths
from cachekit.structure.record import Leaf, Opaque, Record

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
DEPTH = 5


class Forgetful(Accounts):
    """Keeps no account, so every block is looked at."""

    def keep(self, block, account) -> None:
        pass


def recorded(model: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None, *, accounts=Accounts):
    """The record of a forward, and how many blocks were looked at as an example of others."""
    paths, looked = block_paths(model), []
    parts = part_paths(model, paths, "chain")

    class Counted(accounts):
        def watching(self, block, run, given):
            looked.append(block)
            return super().watching(block, run, given)

    twin = Twin(model, paths, parts, args, kwargs or {}, torch.device("cpu"))
    twin._accounts = Counted(parts)
    record = twin.record()
    return record, len(looked)


def canonical(record: Record) -> Any:
    """A record whose tensors are numbered in the order in which they are met."""
    numbers: dict[tuple[str, int], int] = {}

    def number(kind: str, old: int) -> int:
        return numbers.setdefault((kind, old), len(numbers))

    def node(value: Any) -> Any:
        if isinstance(value, Leaf):
            return value._replace(token=number("token", value.token), storage=number("memory", value.storage))
        if isinstance(value, Opaque):
            return value._replace(token=number("object", value.token))
        return type(value.value), repr(value.value)

    def call(one) -> Any:
        return one._replace(
            args={key: node(value) for key, value in one.args.items()},
            outs=tuple(map(node, one.outs)),
            mutated={key: number("token", token) for key, token in one.mutated.items()},
            attributes={name: number("token", token) for name, token in one.attributes.items()},
        )

    def tokens(some) -> list[int]:
        # A token that nothing else names is one more, whichever it is.
        return sorted(numbers.get(("token", token), -1) for token in some)

    calls = [call(one) for one in record.calls]
    parts = [part._replace(call=call(part.call)) for part in record.parts]
    rest = [node(value) for value in record.given.values()], [node(value) for value in record.outs]
    early = [one._replace(outs=tokens(one.outs)) for one in record.early]
    return calls, parts, rest, early, tokens(record.read), record.treespec, record.written


def check(model: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> int:
    """Looking once says what looking at each says; how many were looked at."""
    once, looked = recorded(model, args, kwargs)
    each, _ = recorded(model, args, kwargs, accounts=Forgetful)
    assert canonical(once) == canonical(each)
    return looked


@pytest.mark.parametrize("flow", [flow for flow in dit.FLOWS if flow != "branching"])
def test_the_record_of_every_flow_is_that_of_looking_at_every_block(flow):
    looked = check(dit.dit(flow, depth=6), dit.feed(0))
    expected = {"plain": 1, "cross": 1, "swapped": 1, "one": 1, "narrow": 2}
    assert looked == expected.get(flow, looked)


CLASSES = ("Flux", "Wan", "SD3", "HunyuanVideo", "Sana", "QwenImage", "PixArt", "CogVideoX", "LTX", "Allegro")


@pytest.mark.parametrize("name", CLASSES)
def test_the_record_of_a_class_of_diffusers_is_that_of_looking_at_every_block(name):
    specimen = zoo.specimen(name)
    assert check(specimen.model, (), specimen.inputs(0)) < len(block_paths(specimen.model))


class Part(nn.Module):
    """A feed-forward network with something to change inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gain, self.processor = 1.0, Processor()

    def forward(self, x):
        return self.processor(self.second(torch.tanh(self.first(x)))) * self.gain


class Processor:
    """An object that is no module."""

    factor = 1.0

    def __init__(self) -> None:
        self.weight = 0.5

    def __call__(self, x):
        return x * self.weight * self.factor


class Block(nn.Module):
    """A block that does a few things, which may hang on almost anything."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.added = Part(), nn.Parameter(torch.ones(8))
        self.lin = nn.Linear(8, 8)

    def forward(self, x, *more, **named):
        return x + self.part(x) + self.added


calls, collected, table = 0, [], {"sign": 1}
KEPT = torch.ones(8)


@functools.lru_cache(maxsize=4)
def rotary(width: int) -> Tensor:
    return torch.arange(width).cos()


def counter() -> Callable[[], int]:
    count = 0

    def call() -> int:
        nonlocal count
        count += 1
        return count

    return call


count = counter()


class Counts(Block):
    def forward(self, x):
        global calls
        calls += 1
        return x + self.part(x) if calls % 3 else x - self.part(x)


class CountsInAContainer(Block):
    def forward(self, x):
        table["calls"] = table.get("calls", 0) + 1
        return x + self.part(x) if table["calls"] % 3 else x - self.part(x)


class CountsOnTheClass(Block):
    seen = 0

    def forward(self, x):
        type(self).seen += 1
        return x + self.part(x) if self.seen % 3 else x - self.part(x)


class Toggles(nn.Module):
    """Nothing stands inside, so it is run once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        table["sign"] = -table["sign"]
        return x + self.weight * table["sign"]


class CountsInAClosure(Block):
    def forward(self, x):
        return x + self.part(x) if count() % 3 else x - self.part(x)


class CountsOnItself(Block):
    def forward(self, x):
        self.part.processor.weight += 1
        return x + self.part(x)


class ReadsOutside(Block):
    def forward(self, x):
        return x + self.part(x) * KEPT


class ReadsATable(Block):
    def forward(self, x):
        return x + self.part(x) * rotary(8)


class Collects(Block):
    def forward(self, x):
        collected.append(self.part(x))
        return x + collected[-1]


class Writes(Block):
    def forward(self, x):
        x += self.part(x)
        return x


class HandsOnAView(Block):
    def forward(self, x):
        return x.view(x.shape)


class ReturnsAnObject(Block):
    def forward(self, x):
        return x + self.part(x), types.SimpleNamespace(kept=x)


class Slices(Block):
    """Two results in one memory, as the single blocks of Flux have."""

    def forward(self, x, *more):
        joined = torch.cat((x, x), 1) + self.part(torch.cat((x, x), 1))
        return joined[:, : x.shape[1]], joined[:, x.shape[1] :]


class HandsThrough(Block):
    def forward(self, x, *more):
        return x + self.part(x), (more[0] if more else x)


class Model(nn.Module):
    """A loop over blocks."""

    def __init__(self, block: Callable[[], nn.Module] = Block, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList(block() for _ in range(DEPTH)), nn.Linear(8, 8)
        self.call = call or (lambda block, x, n: block(x))

    def forward(self, x):
        for n, block in enumerate(self.blocks):
            out = self.call(block, x, n)
            x = out[0] if isinstance(out, tuple) else out
        return self.out(x)


# What a block does is not a function of what can be compared, so each is looked at.
SECRETIVE = (
    Toggles,
    *(Counts, CountsInAContainer, CountsOnTheClass, CountsInAClosure, CountsOnItself),
    *(ReadsOutside, ReadsATable, Collects, Writes, HandsOnAView, ReturnsAnObject),
)


@pytest.mark.parametrize("block", SECRETIVE)
def test_a_block_that_does_more_than_compute_is_no_account_of_others(block):
    global calls, count

    def afresh() -> None:
        global calls, count
        calls, count, CountsOnTheClass.seen = 0, counter(), 0
        table.pop("calls", None)
        table["sign"] = 1
        rotary.cache_clear()
        collected.clear()

    model = Model(block)
    afresh()
    once, looked = recorded(model, (X,))
    afresh()
    each, _ = recorded(model, (X,), accounts=Forgetful)
    afresh()
    assert canonical(once) == canonical(each)
    assert looked == DEPTH


@pytest.mark.parametrize("block", [Block, Slices, HandsThrough])
def test_blocks_that_compute_are_looked_at_once(block):
    assert check(Model(block), (X,)) <= 2  # the first may be given something else than the others


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    Processor.factor, table["sign"] = 1.0, 1


def at(index: int, change: Callable[[Any], object]) -> Callable[[Model], None]:
    return lambda model: (change(model.blocks[index]), None)[1]


def replace(block: Block, name: str, value: Any) -> None:
    setattr(block, name, value)


UNLIKE: dict[str, Callable[[Model], object]] = {
    "an attribute": at(2, lambda block: replace(block.part, "gain", 2.0)),
    "the type of an attribute": at(2, lambda block: replace(block.part, "gain", 1)),
    "an attribute of an object": at(2, lambda block: replace(block.part.processor, "weight", 2.0)),
    "another object": at(2, lambda block: replace(block.part, "processor", torch.sin)),
    "another module": at(2, lambda block: replace(block.part, "first", nn.Sequential(nn.Linear(8, 8)))),
    "a parameter of another type": at(2, lambda block: replace(block, "added", nn.Parameter(torch.ones(8).half()))),
    "a parameter of another shape": at(2, lambda block: replace(block, "added", nn.Parameter(torch.ones(1)))),
    "other strides": at(2, lambda block: replace(block.lin, "weight", nn.Parameter(torch.ones(8, 8).t()[:, :]))),
    "a parameter twice": at(2, lambda block: replace(block.part.second, "weight", block.part.first.weight)),
    "a mode": at(2, lambda block: block.part.train()),
    "a hook inside": at(2, lambda block: block.part.register_forward_hook(lambda module, args, out: 2 * out)),
    "a hook": at(2, lambda block: block.register_forward_hook(lambda module, args, out: 2 * out)),
    "a forward of its own": at(2, lambda block: replace(block, "forward", lambda x: 2 * x)),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_a_block_that_is_not_like_the_others_is_looked_at(what):
    model = Model().eval()
    UNLIKE[what](model)
    if what == "a forward of its own":  # not looked at by itself: it has no form
        assert check(model, (X,)) == 1
        return
    expected = 1 if what == "a hook" else 2
    assert check(model, (X,)) == expected
    assert what == "a hook" or form(model.blocks[2]) != form(model.blocks[1]) == form(model.blocks[3])


def cast(block: nn.Module, x: Tensor, n: int) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=n == 2):
        return block(x)


def scaled(block: nn.Module, x: Tensor, n: int) -> Tensor:
    Processor.factor = 2.0 if n == 2 else 1.0
    return block(x)


def signed(block: nn.Module, x: Tensor, n: int) -> Tensor:
    table["sign"] = -1 if n == 2 else 1
    return block(x)


class Signed(Block):
    def forward(self, x):
        return x + self.part(x) * table["sign"]


GIVEN: dict[str, Callable[..., Any]] = {
    "another constant": lambda block, x, n: block(x, n == 2),
    "a constant of another type": lambda block, x, n: block(x, 1.0 if n == 2 else 1),
    "another name": lambda block, x, n: block(x, b=1) if n == 2 else block(x, a=1),
    "another shape": lambda block, x, n: block(x, x if n == 2 else x[:1]),
    "other strides": lambda block, x, n: block(x, (x.transpose(0, 1).contiguous().transpose(0, 1) if n == 2 else x)),
    "another type": lambda block, x, n: block(x, x.half() if n == 2 else x),
    "the same tensor twice": lambda block, x, n: block(x, x if n == 2 else x * 1),
    "one memory": lambda block, x, n: block(x, x.view(x.shape) if n == 2 else x * 1),
    "a nested argument": lambda block, x, n: block(x, (x, [x]) if n == 2 else (x, x)),
    "autocast": cast,
    "a class that has changed": scaled,
}


@pytest.mark.parametrize("what", GIVEN)
def test_a_block_that_is_given_something_else_is_looked_at(what):
    assert check(Model(Block, GIVEN[what]), (X,)) == 2


def test_a_global_that_has_changed_is_looked_at():
    assert check(Model(Signed, signed), (X,)) == 2


class Scaling(TorchFunctionMode):
    """A mode that changes what functions of torch return."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 3 * out if func is torch.tanh else out


class Attends(Block):
    def forward(self, x):
        return x + nn.functional.scaled_dot_product_attention(*[self.part(x).unsqueeze(1)] * 3).squeeze(1)


def hooked() -> Any:
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 2 * out if isinstance(module, Block) else None
    )


MODES: dict[str, Callable[[], Any]] = {
    "a mode of functions": Scaling,
    "an attention kernel": lambda: sdpa_kernel(SDPBackend.MATH),
    "a hook of all modules": hooked,
    "a device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("what", MODES)
def test_a_block_under_another_mode_is_looked_at(what):
    def call(block: nn.Module, x: Tensor, n: int) -> Tensor:
        with MODES[what]() if n == 2 else nullcontext():
            return block(x)

    assert check(Model(Attends, call), (X,)) == (2 if what in ("an attention kernel", "a device") else 1)


def test_an_object_among_the_arguments_is_no_value():
    model = Model(Block, lambda block, x, n: block(x, types.SimpleNamespace()))
    _, looked = recorded(model, (X,))
    assert looked == 0, "every block is run, none is looked at for others"
    check(model, (X,))


STEPS = st.lists(st.sampled_from(sorted(GIVEN)), min_size=1, max_size=DEPTH)


@settings(max_examples=25)
@given(
    blocks=st.lists(st.sampled_from([Block, Slices, HandsThrough, Writes, CountsOnItself]), min_size=2, max_size=6),
    unlike=st.sampled_from([*UNLIKE, None]),
    what=STEPS,
    index=st.integers(0, 5),
)
def test_whatever_the_blocks_are_the_record_is_that_of_looking_at_each(blocks, unlike, what, index):
    kinds = iter([*blocks, *[Block] * DEPTH])

    def call(block: nn.Module, x: Tensor, n: int) -> Any:
        if not isinstance(block, (Block, Slices)) or isinstance(block, (Writes, CountsOnItself)):
            return block(x)
        return GIVEN[what[n % len(what)]](block, x, 2 if n == index else n + 3)

    model = Model(lambda: next(kinds)(), call)
    if unlike not in (None, "a forward of its own"):
        UNLIKE[unlike](model)
    try:
        check(model, (X.clone(),))
    except (TypeError, RuntimeError):  # these blocks do not take these arguments: neither way of looking says more
        with pytest.raises((TypeError, RuntimeError)):
            recorded(model, (X.clone(),), accounts=Forgetful)
    finally:
        Processor.factor = 1.0


def test_what_a_collection_calls_is_no_code_of_the_block():
    def collected(phase, info):
        global calls
        calls += 1

    before = gc.get_threshold()
    gc.callbacks.append(collected)
    gc.set_threshold(1)
    try:
        assert recorded(Model(), (X,))[1] == 1
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(collected)
        gc.set_threshold(*before)


@pytest.mark.parametrize("change", [lambda held: held[0].add(3), lambda held: held[1].update(b=held[1].pop("a"))])
def test_a_form_is_that_of_what_its_containers_hold_now(change):
    block, forming = Block(), Forming()
    block.part.held = held = ({1, 2}, {"a": 1})
    before, unchanged = forming.of(block), forming.unchanged()
    assert unchanged() and form(block) == before
    change(held)
    assert not unchanged() and form(block) != before


def test_a_profiler_keeps_its_place():
    import cProfile

    profiler = cProfile.Profile()
    profiler.enable()
    try:
        step = ck.cache(Model(), ck.step_mask([1, 0]))
        step.init(2, X)
    finally:
        profiler.disable()
    assert any("init" in str(entry.code) for entry in profiler.getstats())


class Shared:
    """Ways to tell a block something past its arguments: `say` before it is called, `ask` in it."""

    slot = type("Slot", (), {"__slots__": ("value",)})()
    module = types.ModuleType("settings_of_a_test")
    row: ClassVar[collections.deque[float]] = collections.deque([0.0])
    numbers = np.zeros(1)
    variable: contextvars.ContextVar[float] = contextvars.ContextVar("variable")


def closed() -> tuple[Callable[[float], None], Callable[[], float]]:
    """A variable of a function around two others."""
    kept = [0.0]
    return lambda value: kept.__setitem__(0, value), lambda: kept[0]


def asked() -> float:
    """The environment."""
    return float(os.environ["CACHEKIT_TOLD"])


def noted() -> float:
    """An attribute of a function."""
    return noted.value  # type: ignore[attr-defined]


def patched() -> tuple[Callable[[float], None], Callable[[], float]]:
    """A function of torch that somebody has put another one in the place of, with a variable around it."""
    say, ask = closed()
    torch.patched_by_a_test = ask  # type: ignore[attr-defined]
    return say, lambda: torch.patched_by_a_test()  # type: ignore[attr-defined]


def by_text() -> float:
    """An attribute of a module of Python that is asked for by its name."""
    return getattr(Shared.module, "value")  # noqa: B009 - that is the point


def imported() -> float:
    """One of a module that is imported by the function."""
    import settings_of_a_test  # type: ignore[import-not-found]

    return settings_of_a_test.value


def looked_up() -> float:
    """A global that the code does not name."""
    return globals()["LOOKED" + "_UP"]


sys.modules["settings_of_a_test"] = settings = Shared.module


def named_by_text() -> float:
    """The same of a module that is a global."""
    return getattr(settings, "value")  # noqa: B009 - that is the point


def say_in_the_module(value: float) -> None:
    """Say it in a module of Python."""
    settings.value = value  # type: ignore[attr-defined]


SAYS: dict[str, tuple[Callable[[float], Any], Callable[[], float]]] = {
    "a slot": (lambda value: setattr(Shared.slot, "value", value), lambda: Shared.slot.value),
    "a module": (lambda value: setattr(Shared.module, "value", value), lambda: Shared.module.value),
    "a deque": (lambda value: Shared.row.__setitem__(0, value), lambda: Shared.row[0]),
    "an array": (lambda value: Shared.numbers.__setitem__(0, value), lambda: float(Shared.numbers[0])),
    "a context": (Shared.variable.set, Shared.variable.get),
    "a closure": closed(),
    "a text": (say_in_the_module, by_text),
    "a text of a global": (say_in_the_module, named_by_text),
    "an import": (say_in_the_module, imported),
    "all globals": (lambda value: globals().update(LOOKED_UP=value), looked_up),
    "a patch of torch": patched(),
    "the environment": (lambda value: os.environ.update(CACHEKIT_TOLD=str(value)), asked),
    "a function": (lambda value: setattr(noted, "value", value), noted),
}


class Asking(nn.Module):
    """A block that asks for a factor."""

    def __init__(self, ask: Callable[[], float]) -> None:
        super().__init__()
        self.mix, self.ask = nn.Linear(8, 8), ask

    def forward(self, x):
        return x + self.ask() * torch.tanh(self.mix(x))


class Saying(nn.Module):
    """A model that tells every block another one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.say, ask = SAYS[how]
        self.blocks = nn.ModuleList(Asking(ask) for _ in range(4))

    def forward(self, x):
        for n, block in enumerate(self.blocks):
            self.say(n + 1.0)
            x = block(x)
        return x


@pytest.mark.parametrize("policy", [ck.step_mask([1, 0]), ck.first_block_cache(0.1)], ids=lambda policy: policy.name)
@pytest.mark.parametrize("how", SAYS)
def test_what_blocks_are_told_past_their_arguments_is_noticed(how, policy):
    """Nothing that is proven of one block may hide it: a step runs the blocks later than they were told."""
    with pytest.raises(ck.StructureError, match="returns something else when its blocks run as a step runs them"):
        ck.cache(Saying(how), policy).init(2, torch.ones(1, 3, 8))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.float32, torch.float64),
        (b"x", b"y"),
        (frozenset("x"), frozenset("y")),
        (types.SimpleNamespace(value=1), types.SimpleNamespace(value=2)),
    ],
    ids=["dtype", "bytes", "frozenset", "object"],
)
def test_an_argument_of_another_value_is_another_forward(one, other):
    class Branching(nn.Module):
        """What it is told decides which of the blocks is seen by the head."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Asking(lambda: 1.0) for _ in range(3))

        def forward(self, x, told):
            seen = []
            for block in self.blocks:
                x = block(x)
                seen.append(x)
            return x * seen[1] if told == other else x

    model, x = Branching(), torch.ones(1, 3, 8)
    step = ck.cache(model, ck.step_mask([1, 0]))
    with torch.no_grad():
        for told in (one, other):
            out, _ = step(step.init(2, x, told), x, told)
            assert torch.equal(out, model(x, told))
