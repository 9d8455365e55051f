"""What a model looks like is recorded once, kept while it lives, and never answered from after a change."""

from __future__ import annotations

import array
import collections
import contextvars
import functools
import gc
import math
import os
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import dit
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import cachekit as ck
from cachekit.structure import discovery, store
from cachekit.structure.reach import Reach, Standing, names_in

POLICIES = (
    ck.step_mask([1, 0, 1, 0]),
    ck.first_block_cache(0.1),
    ck.taylorseer(2, sites="mlp", warmup=1),
    ck.mag_cache([1.0] * 12, retention=0),
    ck.step_mask([1, 0, 1, 0], sites="output"),
)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models of which a forward was recorded."""
    seen: list[nn.Module] = []
    right = discovery.discover

    def discover(model, *args, **kwargs):
        seen.append(model)
        return right(model, *args, **kwargs)

    monkeypatch.setattr(discovery, "discover", discover)
    return seen


def model_of(flow: str = "plain") -> nn.Module:
    return dit.dit(flow)


def test_every_policy_and_every_step_is_answered_from_one_record(records):
    model = model_of()
    for policy in POLICIES:
        step = ck.cache(model, policy)
        step.init(4, *dit.feed(0))
        step.init([3.0, 2.0, 1.0, 0.0], *dit.feed(1))
        step.compile(backend="eager").init(4, *dit.feed(0))
        step.compile(backend="eager", regional=True).init(4, *dit.feed(0))
    assert records == [model]


def test_other_arguments_are_another_record_and_both_are_kept(records):
    model = model_of()
    step = ck.cache(model, POLICIES[0])
    for batch in (1, 2, 1, 2):
        step.init(4, *dit.feed(0, batch))
        ck.cache(model, POLICIES[1]).init(4, *dit.feed(0, batch))
    assert len(records) == 2


def test_no_more_than_so_many_are_kept(records):
    model = model_of()
    for batch in range(1, store.LIMIT + 2):
        ck.cache(model, POLICIES[0]).init(4, *dit.feed(0, batch))
    ck.cache(model, POLICIES[0]).init(4, *dit.feed(0, store.LIMIT + 1))
    assert len(records) == store.LIMIT + 1
    ck.cache(model, POLICIES[0]).init(4, *dit.feed(0, 1))
    assert len(records) == store.LIMIT + 2


def test_a_model_that_had_to_be_run_is_recorded_once(records):
    model = model_of("branching")
    for policy in POLICIES:
        ck.cache(model, policy).init(4, *dit.feed(0))
    assert records == [model]


class Processor:
    """What a block calls that is no module."""

    factor = 1.0

    def __call__(self, x):
        return self.factor * x


def widened(model: nn.Module) -> None:
    """An adapter in the place of a layer, as LoRA does."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.low = base, nn.Linear(dit.WIDTH, dit.WIDTH)

        def forward(self, x):
            return self.base(x) + self.low(x)

    model.blocks[1].mlp[0] = Adapted(model.blocks[1].mlp[0])


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a module inside a block": lambda model: setattr(model.blocks[1].mlp, "1", nn.GELU()),
    "an adapter": widened,
    "a block": lambda model: model.blocks.__setitem__(1, dit.Block("image")),
    "a block less": lambda model: model.blocks.__delitem__(-1),
    "an attribute deep inside": lambda model: setattr(model.blocks[2].mlp[1], "kind", "other"),
    "an object deep inside": lambda model: setattr(model.blocks[2].mlp[1], "processor", Processor()),
    "a hook deep inside": lambda model: model.blocks[2].mlp[0].register_forward_hook(lambda module, args, out: 2 * out),
    "the mode": lambda model: model.train(),
    "the dtype": lambda model: model.double(),
    "a patched forward": lambda model: setattr(model.blocks[2], "forward", model.blocks[2].forward),
}


@pytest.mark.parametrize("kept", [True, False], ids=["the same step", "another step"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_recorded_again(change, kept, records):
    model = model_of("cross")
    step = ck.cache(model, POLICIES[0])
    step.init(4, *dit.feed(0))
    CHANGES[change](model)
    feed = [tensor.double() if change == "the dtype" else tensor for tensor in dit.feed(0)]
    step = step if kept else ck.cache(model, POLICIES[1])
    with torch.no_grad():
        state = step.init(4, *feed)
        assert len(records) == 2
        if change != "a block":  # one that returns one tensor among blocks that do
            out, _ = step(state, *feed)
            assert torch.equal(out, model(*feed))


def test_what_changes_in_an_object_is_seen(records):
    model = model_of()
    model.blocks[1].processor = Processor()
    ck.cache(model, POLICIES[0]).init(4, *dit.feed(0))
    model.blocks[1].processor.factor = 2.0
    ck.cache(model, POLICIES[0]).init(4, *dit.feed(0))
    assert len(records) == 2


def test_other_weights_of_the_same_kind_are_the_same_model(records):
    model, other = model_of(), dit.dit(seed=1)
    step = ck.cache(model, POLICIES[0])
    step.init(4, *dit.feed(0))
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        out, _ = step(step.init(4, *dit.feed(0)), *dit.feed(0))
        assert torch.equal(out, other(*dit.feed(0)))
    assert len(records) == 1


def test_a_forward_that_took_another_way_is_recorded_again(records):
    class Shortened(dit.DiT):
        short = False

        def chain(self, calls, x, text):
            return super().chain(calls[:-1] if Shortened.short else calls, x, text)

    model = Shortened().eval()
    step = ck.cache(model, POLICIES[0])
    with torch.no_grad():
        state = step.init(4, *dit.feed(0))
        Shortened.short = True
        with pytest.raises(ck.StructureError, match="took another way"):
            step(state, *dit.feed(0))
        for each in (step, ck.cache(model, POLICIES[0])):
            out, _ = each(each.init(4, *dit.feed(0)), *dit.feed(0))
            assert torch.equal(out, model(*dit.feed(0)))
    assert len(records) == 2


def with_parent(model: nn.Module) -> None:
    model.blocks[0].__dict__["parent"] = model


def with_closure(model: nn.Module) -> None:
    model.blocks[0].mlp[1].__dict__["ask"] = lambda: model


def with_hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, out: 2 * out if model.training else out)


def with_method(model: nn.Module) -> None:
    model.blocks[0].__dict__["again"] = model.forward


HOLDS = {"nothing": lambda model: None, "parent": with_parent, "closure": with_closure, "hook": with_hook}
HOLDS["method"] = with_method


@pytest.mark.parametrize("flow", ["plain", "branching"])
@pytest.mark.parametrize("holds", HOLDS)
def test_a_model_is_not_kept_alive(holds, flow):
    model = model_of(flow)
    HOLDS[holds](model)
    step = ck.cache(model, POLICIES[0])
    state = step.init(4, *dit.feed(0))
    explained = step.explain(4, *dit.feed(0))
    gone = weakref.ref(model)
    held = [weakref.ref(block) for block in model.blocks]
    del model, step
    gc.collect()
    assert gone() is None and all(block() is None for block in held)
    assert state is not None and explained is not None


def test_a_record_that_holds_on_to_the_model_is_not_kept(records):
    model = model_of()
    with_closure(model)
    for _ in range(2):
        ck.cache(model, POLICIES[0]).init(4, *dit.feed(0))
    assert len(records) == 2 and not store._kept[model].forwards


def test_reaching_is_seen_through_what_objects_hold():
    class Slotted:
        __slots__ = ("value",)

    target, slotted = nn.Linear(1, 1), Slotted()
    slotted.value = [{"a": (lambda: target,)}]
    assert discovery._reaches([slotted], {id(target)})
    slotted.value = [{"a": (lambda: None,)}]
    assert not discovery._reaches([slotted], {id(target)})


class Turning(nn.Module):
    """The head looks at a block in the middle where something that it holds says so."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.held = held

    def turns(self, *_: Any) -> bool:
        """Whether it looks there."""
        return bool(self.held[0])

    def forward(self, x, *given):
        """New tokens."""
        seen = []
        for block in self.blocks:
            x = block(x)
            seen.append(x)
        return x * seen[1] if self.turns(*given) else x


class Residual(nn.Linear):
    """A block."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x):
        """With something added."""
        return x + torch.tanh(super().forward(x))


@pytest.mark.parametrize("same", [True, False], ids=["the same step", "another step"])
@pytest.mark.parametrize("held", [collections.deque, array.array, np.array, list], ids=lambda made: made.__name__)
def test_what_cannot_be_seen_may_have_changed(held, same):
    model = Turning(held("b", [0]) if held is array.array else held([0]))
    step, x = ck.cache(model, ck.step_mask([1, 0])), torch.ones(1, 3, 8)
    with torch.no_grad():
        for told in (0, 1):
            model.held[0] = told
            step = step if same else ck.cache(model, ck.step_mask([1, 0]))
            out, _ = step(step.init(2, x), x)
            assert torch.equal(out, model(x))


def test_a_parameter_of_another_shape_inside_is_recorded_again():
    model = Turning([0])
    step, x = ck.cache(model, ck.step_mask([1, 0])), torch.ones(1, 3, 8)
    with torch.no_grad():
        step.init(2, x)
        for parameter in model.parameters():
            parameter.data = parameter.data.double()
        out, _ = step(step.init(2, x.double()), x.double())
        assert torch.equal(out, model(x.double()))


class Told:
    """What decides and is no attribute of the model."""

    of_class = False
    container: ClassVar[list[Any]] = [{"deep": {"value": False}}]

    def plain(self) -> bool:
        """A method that is replaced on the class."""
        return False


class Dark:
    """What decides, and hides what it holds."""

    variable: contextvars.ContextVar[bool] = contextvars.ContextVar("variable", default=False)
    slot = type("Slot", (), {"__slots__": ("value",)})()


def around() -> tuple[Callable[[], bool], Callable[[bool], None]]:
    """A variable of a function around two others."""
    told = False

    def put(value: bool) -> None:
        nonlocal told
        told = value

    return lambda: told, put


def noted(default: bool = False) -> bool:
    """A function with an attribute, and a default."""
    return default or getattr(noted, "value", False)


GLOBAL = False
of_closure, tell_closure = around()
Dark.slot.value = False

TELL: dict[str, Callable[[bool], Any]] = {
    "class": lambda told: setattr(Told, "of_class", told),
    "method": lambda told: setattr(Told, "plain", lambda self: told),
    "container": lambda told: Told.container[0]["deep"].update(value=told),
    "context": Dark.variable.set,
    "slot": lambda told: setattr(Dark.slot, "value", told),
    "closure": tell_closure,
    "default": lambda told: setattr(noted, "__defaults__", (told,)),
    "attribute": lambda told: setattr(noted, "value", told),
    "global": lambda told: globals().update(GLOBAL=told),
    "environment": lambda told: os.environ.update(CACHEKIT_TOLD="1" if told else ""),
}


class Asking(Turning):
    """It asks for each of these, and for what it is given."""

    tells = ("class", "method", "container", "closure", "default", "attribute", "global", "environment")

    def asked(self, given) -> list[bool]:
        """What it is told."""
        outside = [Told.of_class, Told().plain(), Told.container[0]["deep"]["value"], of_closure(), noted(), GLOBAL]
        outside += [bool(os.environ.get("CACHEKIT_TOLD"))]
        given = [given.requires_grad, not given.is_contiguous(), given.dim() == 3, isinstance(given, nn.Parameter)]
        return outside + given

    def forward(self, x, given):
        """New tokens."""
        self.held = [sum(self.asked(given)) % 2]
        return super().forward(x)


class AskingInTheDark(Asking):
    """It asks for what nobody can see change, too."""

    tells = (*Asking.tells, "context", "slot")

    def asked(self, given) -> list[bool]:
        """What it is told."""
        return [*super().asked(given), Dark.variable.get(), Dark.slot.value]


GIVEN = {
    "as it is": torch.ones(4, 4),
    "with gradients": torch.ones(4, 4, requires_grad=True),
    "other strides": torch.ones(4, 4)[:, ::2].expand(4, 2),
    "more dimensions": torch.ones(1, 4, 4),
    "a parameter": nn.Parameter(torch.ones(4, 4), requires_grad=False),
}


@pytest.fixture
def told():
    yield
    for tell in TELL.values():
        tell(False)


@pytest.mark.parametrize("kind", [Asking, AskingInTheDark])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_model_is_told_outside_the_next_init_knows(told, kind, data):
    model, x = kind([0]), torch.ones(1, 3, 8)
    step = ck.cache(model, ck.step_mask([1, 0]))
    saying = st.tuples(st.sampled_from(kind.tells), st.booleans(), st.sampled_from(sorted(GIVEN)), st.booleans())
    with torch.no_grad():
        for how, value, given, same in [("class", False, "as it is", True), *data.draw(st.lists(saying, max_size=4))]:
            TELL[how](value)
            step = step if same else ck.cache(model, ck.step_mask([1, 0]))
            out, _ = step(step.init(2, x, GIVEN[given]), x, GIVEN[given])
            assert torch.equal(out, model(x, GIVEN[given]))


@pytest.mark.parametrize("how", Asking.tells)
def test_what_the_model_is_told_outside_is_another_form(told, how):
    model = Asking([0])
    before = Standing(model)
    assert before.same() and before.form == Standing(model).form
    TELL[how](True)
    assert not before.same() and before.form != Standing(model).form


# What decides, reached in ways that no global names: each is seen, too ------------------------------------------------

OUTER, BESIDE = types.ModuleType("outer_of_a_test"), types.ModuleType("beside_a_test")
OUTER.inner = types.ModuleType("outer_of_a_test.inner")
OUTER.inner.flag = BESIDE.flag = False
ORDER = {"first": False, "second": True}
TENSOR = torch.zeros(2)
DECIDES = False


class Settings:
    """It is held as a class."""

    flag = False


class Bound:
    """It has methods that are hooks and attributes of a model, and operators."""

    flag = False

    def asked(self) -> bool:
        """A global."""
        return DECIDES

    @classmethod
    def of_class(cls) -> bool:
        """One of the class."""
        return cls.flag

    def _either(self, no: bool) -> bool:
        return DECIDES and not no

    part = functools.partialmethod(_either, False)

    def __bool__(self) -> bool:
        return DECIDES

    def __getitem__(self, _: int) -> bool:
        return DECIDES

    @property
    def way(self) -> bool:
        """What one class says, and another one does not."""
        return False


class Other(Bound):
    """Another class of the same object."""

    way = True  # type: ignore[assignment]


BOUND, WEAK = Bound(), Settings()


def decide(value: bool) -> None:
    """Set the global."""
    globals()["DECIDES"] = value


def turn(value: bool) -> None:
    """The same items in another order."""
    ORDER.clear()
    ORDER.update({"second": True, "first": False} if value else {"first": False, "second": True})


REACHED: dict[str, tuple[Any, Callable[[Any], bool], Callable[[bool], Any]]] = {
    "a module in a module": (None, lambda _: OUTER.inner.flag, lambda value: setattr(OUTER.inner, "flag", value)),
    "a module that is held": (BESIDE, lambda held: held.flag, lambda value: setattr(BESIDE, "flag", value)),
    "a class that is held": (Settings, lambda held: held.flag, lambda value: setattr(Settings, "flag", value)),
    "a bound method": (BOUND.asked, lambda held: held(), decide),
    "a method of a class": (Bound.of_class, lambda held: held(), lambda value: setattr(Bound, "flag", value)),
    "a part of a method": (BOUND, lambda held: held.part(), decide),
    "a truth": (BOUND, bool, decide),
    "an item": (BOUND, lambda held: held[0], decide),
    "another class": (
        BOUND,
        lambda held: held.way,
        lambda value: setattr(BOUND, "__class__", Other if value else Bound),
    ),
    "a weak reference": (weakref.ref(WEAK), lambda held: held().flag, lambda value: setattr(WEAK, "flag", value)),
    "an order": (None, lambda _: next(iter(ORDER.values())), turn),
    "a tensor outside": (None, lambda _: TENSOR.requires_grad, lambda value: TENSOR.requires_grad_(value)),
    "a hook on all modules": (
        None,
        lambda _: bool(nn.modules.module._global_forward_hooks),
        lambda value: hook(value),
    ),
}


def hook(value: bool) -> None:
    """Put a hook that does nothing on all modules, or take it away."""
    for handle in HOOKS:
        handle.remove()
    HOOKS[:] = [nn.modules.module.register_module_forward_hook(lambda *_: None)] if value else []


HOOKS: list[Any] = []


class Reaching(Turning):
    """It asks for what it holds, or for what lies outside."""

    def __init__(self, kept: Any, ask: Callable[[Any], bool]) -> None:
        super().__init__([0])
        self.kept, self.ask = kept, ask

    def turns(self, *_: Any) -> bool:
        """As it is told."""
        return self.ask(self.kept)


@pytest.mark.parametrize("same", [True, False], ids=["the same step", "another step"])
@pytest.mark.parametrize("how", REACHED)
def test_what_is_reached_in_other_ways_is_seen(how, same):
    kept, ask, tell = REACHED[how]
    model, x = Reaching(kept, ask), torch.ones(1, 3, 8)
    step = ck.cache(model, ck.step_mask([1, 0]))
    try:
        with torch.no_grad():
            for value in (False, True, False):
                tell(value)
                assert bool(ask(kept)) == value
                step = step if same else ck.cache(model, ck.step_mask([1, 0]))
                out, _ = step(step.init(2, x), x)
                assert torch.equal(out, model(x))
    finally:
        tell(False)


@pytest.mark.parametrize("same", [True, False], ids=["the same step", "another step"])
@pytest.mark.parametrize("way", ["class", "closure", "zero"])
def test_what_an_argument_reaches_is_seen(way, same):
    class Choice:
        flag = False

    told = False
    given = {"class": Choice(), "closure": lambda: told, "zero": 0.0}
    asks = {
        "class": lambda choice: choice.flag,
        "closure": lambda choice: choice(),
        "zero": lambda choice: math.copysign(1, choice) < 0,
    }
    model, x = Choosing(asks[way]), torch.ones(1, 3, 8)
    step = ck.cache(model, ck.step_mask([1, 0]))
    with torch.no_grad():
        for value in (False, True):
            Choice.flag = told = value
            given["zero"] = -0.0 if value else 0.0
            step = step if same else ck.cache(model, ck.step_mask([1, 0]))
            out, _ = step(step.init(2, x, given[way]), x, given[way])
            assert torch.equal(out, model(x, given[way]))


class Choosing(Turning):
    """It asks an argument."""

    def __init__(self, ask: Callable[[Any], bool]) -> None:
        super().__init__([0])
        self.ask = ask

    def turns(self, *given: Any) -> bool:
        """As it is told."""
        return self.ask(*given)


def test_arguments_that_cannot_be_seen_are_not_kept():
    class Closed:
        __slots__ = ("__weakref__", "lock")

        def __init__(self) -> None:
            self.lock = threading.Lock()

    model, x = Choosing(lambda _: False), torch.ones(1, 3, 8)
    step, alive = ck.cache(model, ck.step_mask([1, 0])), weakref.WeakSet()
    for _ in range(3):
        alive.add(closed := Closed())
        step.init(2, x, closed)
    del closed
    gc.collect()
    assert not alive
    assert not store._kept.get(model) and not step.opened._found


LONG = "def long():\n" + "".join(f"    x{n} = {n}.5 + y{n}\n" for n in range(400))
LONG += "    from .deep import thing\n    from ..deeper import other\n    import unheard_of, os\n"


@pytest.mark.parametrize("package", [None, "", "one", "one.two"])
def test_imports_are_found_in_long_functions_and_may_lead_nowhere(package):
    names: dict[str, Any] = {"__name__": "a_script", "__package__": package}
    exec(LONG, names)
    code = names["long"].__code__
    assert names_in(code).imports == {(1, "deep"), (2, "deeper"), (0, "unheard_of")}
    reach = Reach()
    reach.code(code, names)
    assert reach.same() and not reach.closed
    names["y399"] = 1
    assert not reach.same()


class Absent:
    """It stands for an object that is not there, as proxies of a request do."""

    @property
    def __class__(self):  # type: ignore[override]
        raise RuntimeError("there is no request")


ABSENT = [Absent()]


class AskingTheAbsent(Turning):
    """Its code names such an object."""

    def forward(self, x):
        """New tokens."""
        if type(ABSENT[0]) is int:
            return x
        return super().forward(x)


def test_an_object_that_does_not_let_itself_be_looked_at_is_one_that_cannot_be_seen():
    model, x = AskingTheAbsent([0]), torch.ones(1, 3, 8)
    step = ck.cache(model, ck.step_mask([1, 0]))
    with torch.no_grad():
        assert torch.equal(step(step.init(2, x), x)[0], model(x))
    assert Standing(model).form != Standing(model).form


def of_class(hold: Callable[[type, nn.Module], object]) -> Callable[[], nn.Module]:
    """A model whose class of blocks holds it in some way."""

    def make() -> nn.Module:
        class Holding(Residual):
            """A block."""

        made = Turning([0])
        made.blocks = nn.ModuleList(Holding() for _ in range(3))
        hold(Holding, made)
        return made

    return make


HOLDING = {
    "closure": of_class(lambda kind, model: setattr(kind, "ask", lambda self: model)),
    "attribute": of_class(lambda kind, model: setattr(kind, "owner", model)),
    "container": of_class(lambda kind, model: setattr(kind, "owners", {"all": [model]})),
}


@pytest.mark.parametrize("how", HOLDING)
def test_a_model_that_its_classes_hold_is_not_kept_alive(how):
    model = HOLDING[how]()
    ck.cache(model, ck.step_mask([1, 0])).init(2, torch.ones(1, 3, 8))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
