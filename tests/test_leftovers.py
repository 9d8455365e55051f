"""Discovery leaves no trace: whatever a forward keeps outside of the model, and whatever it is given, is as it was."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import cachekit as ck

WIDTH, STEPS = 8, 4


def made(n: int) -> Tensor:
    """A table."""
    return torch.arange(float(n)).unsqueeze(-1) * torch.linspace(0, 1, WIDTH)


@functools.cache
def cached(n: int) -> Tensor:
    return made(n)


@functools.cache
def pair(n: int) -> tuple[str, tuple[Tensor]]:
    return "table", (made(n),)


GLOBAL: dict[int, Tensor] = {}
SEEN: list[Tensor] = []
LATEST: Tensor | None = None


class Tables:
    """A class that keeps them, and objects of it that do."""

    kept: ClassVar[dict[int, Tensor]] = {}
    latest: Tensor | None = None

    def __init__(self) -> None:
        self.own: dict[int, Tensor] = {}
        self.last: Tensor | None = None

    @classmethod
    def of_class(cls, n: int) -> Tensor:
        if n not in cls.kept:
            cls.kept[n] = made(n)
        return cls.kept[n]

    @classmethod
    def attribute(cls, n: int) -> Tensor:
        if cls.latest is None or len(cls.latest) != n:
            cls.latest = made(n)
        return cls.latest

    def of_object(self, n: int) -> Tensor:
        self.last = self.own.setdefault(n, made(n))
        return self.last


OBJECT = Tables()


def of_dict(n: int) -> Tensor:
    return GLOBAL.setdefault(n, made(n))


def of_list(n: int) -> Tensor:
    SEEN.append(made(n))
    return SEEN[-1]


def of_name(n: int) -> Tensor:
    global LATEST
    if LATEST is None or len(LATEST) != n:
        LATEST = made(n)
    return LATEST


def of_function(n: int) -> Tensor:
    of_function.kept = getattr(of_function, "kept", None)
    of_function.kept = made(n)
    return of_function.kept


def remembering(function: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """A decorator that keeps results in a variable of its own."""
    kept: dict[int, Tensor] = {}

    def wrapped(n: int) -> Tensor:
        if n not in kept:
            kept[n] = function(n)
        return kept[n]

    wrapped.kept = kept
    return wrapped


of_closure = remembering(made)
# Nothing that the code of the model names leads there: what is kept is found because it is alive.
HIDDEN = types.SimpleNamespace(tables={})


def hidden(n: int, reach: Callable[[], Any] = lambda: HIDDEN) -> Tensor:
    return reach().tables.setdefault(n, made(n))


KEEPERS: dict[str, Callable[[int], Tensor]] = {
    "lru_cache": lambda n: cached(n),
    "tuple in lru_cache": lambda n: pair(n)[1][0],
    "dict": lambda n: of_dict(n),
    "list": lambda n: of_list(n),
    "global": lambda n: of_name(n),
    "class dict": lambda n: Tables.of_class(n),
    "class attribute": lambda n: Tables.attribute(n),
    "object": lambda n: OBJECT.of_object(n),
    "function": lambda n: of_function(n),
    "closure": lambda n: of_closure(n),
    "hidden": lambda n: hidden(n),
}
HOLDERS = (GLOBAL, SEEN, Tables.kept, OBJECT.own, of_closure.kept, HIDDEN.tables)


def forget() -> None:
    """As in a process where no forward came first."""
    global LATEST
    for each in HOLDERS:
        each.clear()
    cached.cache_clear()
    pair.cache_clear()
    LATEST = Tables.latest = OBJECT.last = None


def held() -> list[Tensor]:
    """All that is kept."""
    of_caches = [cached(5), pair(5)[1][0]]
    containers = [*GLOBAL.values(), *SEEN, *Tables.kept.values(), *OBJECT.own.values(), *of_closure.kept.values()]
    names = [LATEST, Tables.latest, OBJECT.last, getattr(of_function, "kept", None), *HIDDEN.tables.values()]
    return [each for each in (*of_caches, *containers, *names) if each is not None]


class Block(nn.Module):
    """A feed-forward network with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, memory: Any = None) -> Tensor:
        """New tokens."""
        if memory is not None:
            memory.add(x)
        return x + self.mlp(x)


class Model(nn.Module):
    """A model that adds a table to its tokens."""

    def __init__(self, keeper: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.keeper = keeper
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, memory: Any = None) -> Tensor:
        """New tokens."""
        x = x + KEEPERS[self.keeper](x.shape[1])
        for block in self.blocks:
            x = block(x, memory)
        return x


def tokens(n: int = 5) -> Tensor:
    """The argument."""
    return torch.linspace(-1, 1, n * WIDTH).reshape(1, n, WIDTH)


POLICIES = {
    "chain": ck.step_mask([1, 0] * 2),
    "probe": ck.first_block_cache(1e9),
    "output": ck.step_mask([1, 0] * 2, sites="output"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("keeper", KEEPERS)
def test_what_a_forward_keeps_outside_is_never_a_fake_tensor(keeper, policy):
    forget()
    model = Model(keeper)
    step = ck.cache(model, POLICIES[policy])
    with torch.no_grad():
        state = step.init(STEPS, tokens())
        assert not any(isinstance(each, FakeTensor) for each in held())
        out, _ = step(state, tokens())
        assert torch.equal(out, model(tokens()))
    forget()


@pytest.mark.parametrize("keeper", KEEPERS)
def test_what_was_there_before_is_there_after(keeper):
    forget()
    model = Model(keeper)
    with torch.no_grad():
        model(tokens())
        before = [each for each in held() if len(each) == 5]
        ck.cache(model, POLICIES["chain"]).init(STEPS, tokens(7))  # another length
    after = held()
    assert not any(isinstance(each, FakeTensor) for each in after)
    if "lru_cache" not in keeper:
        assert all(any(one is other for other in after) for one in before[2:])
    forget()


def test_what_is_held_where_nobody_can_take_it_out_is_refused():
    class Stubborn(nn.Module):
        """It keeps a tensor where no name and no container leads."""

        def forward(self, x: Tensor, memory: Any = None) -> Tensor:
            """The same."""
            kept = x + 1

            def generate():
                yield kept

            iterator = generate()
            next(iterator)
            RUNNING.append(iterator)
            return x

    model = Model("dict")
    model.blocks.append(Stubborn())
    with pytest.raises(ck.StructureError, match=r"keeps a tensor \[1, 5, 8\] outside of the model .* Call the model"):
        ck.cache(model, POLICIES["chain"]).init(STEPS, tokens())
    RUNNING.clear()


RUNNING: list[Any] = []


class Memory:
    """An object among the arguments that blocks write to."""

    def __init__(self) -> None:
        self.rows, self.count, self.total = [], 0, torch.zeros(1)

    def add(self, x: Tensor) -> None:
        self.rows.append(x)
        self.count += 1
        self.total += x.sum()


class Guarded(Memory):
    """One that cannot be copied, for what it holds."""

    def __init__(self, lock: Any) -> None:
        super().__init__()
        self.locks = {"own": [lock]}

    def add(self, x: Tensor) -> None:
        super().add(x)
        self.locks["last"] = [x]


class Outer(Memory):
    """One with another one in it, beside what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.itself, self.lock = Guarded(threading.Lock()), self, threading.Lock()

    def add(self, x: Tensor) -> None:
        super().add(x)
        self.itself.inner.add(x)


MEMORIES: dict[str, Callable[[], Any]] = {
    "plain": Memory,
    "with a lock": lambda: Guarded(threading.Lock()),
    "with a generator": lambda: Guarded(row for row in ()),
    "in another one": Outer,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MEMORIES)
def test_an_object_among_the_arguments_is_as_it_was(kind, policy):
    memory = MEMORIES[kind]()
    step = ck.cache(Model("dict"), POLICIES[policy])
    with torch.no_grad():
        if policy == "output":
            step.init(STEPS, tokens(), memory)
        else:
            with pytest.raises(ck.StructureError, match="writes to its argument"):
                step.init(STEPS, tokens(), memory)
    for each in (memory, getattr(memory, "inner", memory)):
        assert not each.rows and each.count == 0 and torch.equal(each.total, torch.zeros(1))
        assert "last" not in getattr(each, "locks", {})


class Headed(Model):
    """A model whose head somebody has compiled."""

    def __init__(self) -> None:
        super().__init__("dict")
        self.traced: list[bool] = []
        self.head = torch.compile(self._ended, backend=self._compiler)

    def _ended(self, x: Tensor) -> Tensor:
        return x * 2

    def _compiler(self, graph: Any, inputs: Any) -> Any:
        self.traced.append(any(isinstance(each, FakeTensor) for each in inputs))
        return graph.forward

    def forward(self, x: Tensor) -> Tensor:
        """New tokens."""
        return self.head(super().forward(x))


@pytest.mark.compiles
def test_a_piece_that_is_compiled_is_recorded_uncompiled():
    model = Headed()
    step = ck.cache(model, POLICIES["chain"])
    with torch.no_grad():
        state = step.init(STEPS, tokens())
        assert not model.traced, "nothing was compiled for the tensors of the trial"
        out, state = step(state, tokens())
        assert torch.equal(out, model(tokens())) and model.traced
        assert not torch.equal(step(state, 2 * tokens())[0], model(2 * tokens()))


def test_what_compiles_does_so_again_after_threads_have_met_in_a_trial(monkeypatch):
    monkeypatch.setitem(KEEPERS, "none", made)  # a table that threads share is no law: a trial puts it back

    def begin() -> None:
        for _ in range(5):
            ck.cache(Model("none"), POLICIES["chain"]).init(STEPS, tokens())

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert torch._dynamo.eval_frame._stance.stance == "default"


class Reading(Model):
    """Its blocks look the table up themselves."""

    def __init__(self, keeper: str) -> None:
        super().__init__(keeper)
        self.blocks = nn.ModuleList(ReadingBlock(keeper) for _ in range(3))

    def forward(self, x: Tensor, memory: Any = None) -> Tensor:
        """New tokens."""
        KEEPERS[self.keeper](x.shape[1])
        for block in self.blocks:
            x = block(x)
        return x


class ReadingBlock(Block):
    """A block that looks a table up."""

    def __init__(self, keeper: str) -> None:
        super().__init__()
        self.keeper = keeper

    def forward(self, x: Tensor, memory: Any = None) -> Tensor:
        """New tokens."""
        return x + self.mlp(x) * KEEPERS[self.keeper](x.shape[1])


@pytest.mark.parametrize("keeper", KEEPERS)
def test_what_blocks_look_up_outside_is_never_a_fake_tensor(keeper):
    forget()
    model = Reading(keeper)
    with torch.no_grad():
        step = ck.cache(model, POLICIES["chain"])
        state = step.init(STEPS, tokens())
        assert not any(isinstance(each, FakeTensor) for each in held())
        out, _ = step(state, tokens())
        assert torch.equal(out, model(tokens()))
    forget()
