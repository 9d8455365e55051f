"""Every mistake has an error of ours that names the argument or the site, its value and the fix, eager or compiled."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import dit
import pytest
import torch
from dit import feed
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cachekit as ck

STEPS = 4
MASK = ck.step_mask([1, 0, 1, 0])
DRIFT = ck.first_block_cache(0.1)
POLICIES = pytest.mark.parametrize("policy", [MASK, DRIFT], ids=lambda policy: policy.name)


@contextlib.contextmanager
def refused(kind: type[ck.CacheError], *parts: str) -> Iterator[None]:
    """An error of this type, ours, whose message holds every part."""
    with pytest.raises(kind) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)


def eagerly(step: ck.CachedStep) -> ck.CachedStep:
    return step


def compiled(step: ck.CachedStep) -> ck.CachedStep:
    return step.compile(backend="eager")


WAYS = pytest.mark.parametrize("way", [eagerly, pytest.param(compiled, marks=pytest.mark.compiles)])


def walked(step: Callable, state: ck.State, steps: int) -> ck.State:
    """The state some steps on."""
    for index in range(steps):
        _, state = step(state, *feed(index))
    return state


@pytest.fixture(autouse=True)
def _without_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# Making a step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [3, "model", None, dit.dit, {}])
def test_what_is_no_model(model):
    with refused(ck.ArgumentTypeError, "`model` must be a torch.nn.Module", type(model).__name__):
        ck.cache(model, MASK)


def test_a_step_is_no_model():
    with refused(ck.ArgumentTypeError, "`model` is a cached step already", "Give cache the model itself"):
        ck.cache(ck.cache(dit.dit(), MASK), MASK)


@pytest.mark.parametrize("policy", [0.1, "mag_cache", None, ck.first_block_cache, ck.deciders.always()])
def test_what_is_no_policy(policy):
    with refused(ck.ArgumentTypeError, "`policy` must be a Policy", type(policy).__name__, "first_block_cache(0.1)"):
        ck.cache(dit.dit(), policy)


@pytest.mark.parametrize("structure", ["blocks", ["blocks"], {"blocks": 0}, 3, dit.dit])
def test_what_is_no_structure(structure):
    with refused(ck.ArgumentTypeError, "`structure` must be a cachekit.Chain or several", repr(structure)):
        ck.cache(dit.dit(), MASK, structure)


class Plain(nn.Module):
    """A model without blocks, or with blocks that no chain can be made of."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.proj = kind, nn.Linear(dit.CHANNELS, dit.CHANNELS)
        if kind != "no list":
            self.layers = nn.ModuleList(nn.Linear(dit.CHANNELS, 1 if kind == "no stream" else 4) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Denoise."""
        if self.kind == "no stream":
            x = x * self.layers[0](x) * self.layers[1](x)
        return self.proj(x)


def test_models_without_a_chain():
    with refused(ck.StructureError, "Plain has no list of blocks", "Its children: proj", "cachekit.Chain"):
        ck.cache(Plain("no list"), MASK)
    with refused(ck.StructureError, "No block of the model ran", "cachekit.Chain"):
        ck.cache(Plain("not called"), MASK).init(STEPS, *feed(0))
    with refused(ck.StructureError, "no chain of blocks", "Blocks that ran: layers", 'sites="output"'):
        ck.cache(Plain("no stream"), MASK).init(STEPS, *feed(0))


@pytest.mark.parametrize(
    ("blocks", "streams", "parts"),
    [
        ("foo", {0: 0}, ["'foo'", "blocks"]),
        (["blocks.9"], {0: 0}, ["'blocks.9'"]),
        (["blocks.0.mlp"], {0: 0}, ["'blocks.0.mlp'", "blocks.0, blocks.1, blocks.2, blocks.3"]),
        ([], {0: 0}, ["`blocks` must be names of blocks", "[]"]),
        ([3], {0: 0}, ["`blocks` must be names of blocks", "[3]"]),
        (3, {0: 0}, ["`blocks` must be names of blocks", "3"]),
        ("blocks", {}, ["`streams` must map output positions to arguments", "{}", "Use {0: 0}"]),
        ("blocks", 0, ["`streams` must map output positions to arguments", "0", "Use {0: 0}"]),
        ("blocks", {"a": 0}, ["`streams`", "'a'"]),
        ("blocks", {7: 0}, ["`streams` names output 7 of blocks.0", "returns 2 values"]),
        ("blocks", {0: "x"}, ["`streams` names argument 'x' of blocks.0", "Its arguments are: 0, 1, 2"]),
        ("blocks", {0: 9}, ["`streams` names argument 9 of blocks.0", "Its arguments are: 0, 1, 2"]),
        ("blocks", {0: 1}, ["blocks.0", "[2, 5, 16]", "[2, 6, 16]"]),
        (["head"], {0: 0}, ["head", "[2, 6, 16]", "[2, 6, 4]"]),
    ],
)
def test_chains_that_name_what_is_not_there(blocks, streams, parts):
    with refused(ck.CacheError, *parts):
        ck.cache(dit.dit(), MASK, ck.Chain(blocks, streams)).init(STEPS, *feed(0))


@pytest.mark.parametrize(
    ("flow", "chains", "parts"),
    [
        ("glue", [ck.Chain("blocks", {0: 0, 1: 1})], ["blocks.1 and blocks.2 as one chain", "State two chains"]),
        ("plain", [ck.Chain("blocks", {0: 0, 1: 1})] * 2, ["states blocks.0 in two chains"]),
        ("two", [ck.Chain("blocks", {0: 0})], ["does not name output 1 of blocks.3", "{1: ...}"]),
        (
            "plain",
            [ck.Chain(["blocks.1", "blocks.0"], {0: 0})],
            ["blocks.1, blocks.0, but", "order blocks.0, blocks.1"],
        ),
    ],
)
def test_chains_that_are_none(flow, chains, parts):
    with refused(ck.CacheError, *parts):
        ck.cache(dit.dit(flow), MASK, chains).init(STEPS, *feed(0))


# Making a policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "parts"),
    [
        ([], ["shape (0,)"]),
        ([1.0, -0.5], ["-0.5 at index 1"]),
        ([1.0, 1.0, math.nan], ["nan at index 2"]),
        ([math.inf], ["inf at index 0"]),
        ([0.0], ["0.0 at index 0"]),
        ([[1.0, 1.0]], ["shape (1, 2)"]),
        (torch.zeros(0), ["shape (0,)"]),
        ("ratios.json", ["'ratios.json'", "MagRatios.load(path)"]),
        (None, ["NoneType", "mag_calibration()"]),
    ],
)
def test_ratios(ratios, parts):
    with refused(ck.CacheError, "`ratios` must be", *parts):
        ck.mag_cache(ratios)
    assert issubclass(ck.ArgumentError, ValueError)
    assert issubclass(ck.ArgumentTypeError, TypeError)


@pytest.mark.parametrize(
    ("factory", "arguments", "parts"),
    [
        (ck.first_block_cache, {"threshold": -1}, ["`threshold` must be >= 0, got -1", "Use 0"]),
        (ck.first_block_cache, {"threshold": math.nan}, ["`threshold` must be >= 0, got nan"]),
        (ck.first_block_cache, {"threshold": "0.1"}, ["`threshold` must be a number, got '0.1'"]),
        (ck.first_block_cache, {"warmup": -1}, ["`warmup` must be an int >= 0, got -1"]),
        (ck.first_block_cache, {"max_skips": 1.5}, ["`max_skips` must be an int >= 0, got 1.5"]),
        (ck.first_block_cache, {"semantics": "hf"}, ["`semantics` must be one of", "'hf'"]),
        (ck.first_block_cache, {"forecaster": ck.forecasters.hold}, ["`forecaster` must be a Forecaster"]),
        (ck.mag_cache, {"ratios": [1.0], "retention": 2}, ["`retention` must be in [0, 1], got 2"]),
        (ck.mag_cache, {"ratios": [1.0], "interpolation": "cubic"}, ["`interpolation` must be one of", "'cubic'"]),
        (ck.step_mask, {"mask": []}, ["`mask` must have an entry a step, got []"]),
        (ck.step_mask, {"mask": "1010"}, ["`mask` must be a sequence of bools", "str"]),
        (ck.step_mask, {"mask": [torch.ones(2)]}, ["`mask` must hold bools, got tensor([1., 1.]) at step 0"]),
        (ck.step_mask, {"mask": [True, 2]}, ["`mask` must hold bools, got 2 at step 1"]),
    ],
)
def test_values_of_a_policy(factory, arguments, parts):
    with refused(ck.CacheError, *parts):
        factory(**arguments)


# Making a state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timesteps", "kind", "value"),
    [
        (0, ck.ArgumentError, "0"),
        (-3, ck.ArgumentError, "-3"),
        ([], ck.ArgumentError, "(0,)"),
        (torch.zeros(2, 2), ck.ArgumentError, "(2, 2)"),
        (1.5, ck.ArgumentTypeError, "float"),
        (True, ck.ArgumentTypeError, "bool"),
        (None, ck.ArgumentTypeError, "NoneType"),
        ("999", ck.ArgumentTypeError, "str"),
        (["a"], ck.ArgumentTypeError, "only their number"),
        (b"999", ck.ArgumentTypeError, "bytes"),
        (torch.zeros(2, dtype=torch.complex64), ck.ArgumentTypeError, "complex"),
    ],
)
def test_what_is_no_trajectory(timesteps, kind, value):
    for policy in (MASK, DRIFT):
        step = ck.cache(dit.dit(), policy)
        for use in (step.plan, lambda timesteps, step=step: step.init(timesteps, *feed(0))):
            with refused(kind, "`timesteps` must", value):
                use(timesteps)


@pytest.mark.parametrize("device", ["nowhere", 3.5, "cuda:77"])
def test_what_is_no_device_here(device):
    step = ck.cache(dit.dit(), MASK)
    with refused(ck.ArgumentError, "`device`", str(device), "Leave it out"):
        step.init(4, *feed(0), device=device)


@WAYS
def test_a_mask_shorter_than_the_trajectory(way):
    step = way(ck.cache(dit.dit(), MASK))
    with refused(ck.ArgumentError, "`mask` has 4 entries", "5 steps", "an entry for every step"):
        step.init(5, *feed(0))
    with refused(ck.ArgumentError, "`mask` has 4 entries", "5 steps"):
        step.init_like(step.init(4, *feed(0)), 5)


def test_arguments_that_the_model_refuses():
    x, t, text = feed(0)
    for inputs in ((), (x[..., :3], t, text)):
        with refused(ck.StructureError, "forward failed on the arguments given to init", "the first real call"):
            ck.cache(dit.dit(), MASK).init(STEPS, *inputs)


# Taking a step ------------------------------------------------------------------------------------------------------


@WAYS
@POLICIES
def test_what_is_no_state(way, policy):
    step = way(ck.cache(dit.dit(), policy))
    state = step.init(STEPS, *feed(0))
    for given in (None, 3, tuple(state), state._asdict(), feed(0)[0]):
        with refused(ck.ArgumentTypeError, "`state` must be a cachekit State", type(given).__name__, "step.init("):
            step(given, *feed(0))
    with refused(ck.ArgumentTypeError, "`state` must be a cachekit State", "int"):
        step.init_like(3)


@WAYS
@POLICIES
def test_a_step_past_the_last_timestep(way, policy):
    step = way(ck.cache(dit.dit(depth=2), policy))
    state = walked(step, step.init(STEPS, *feed(0)), STEPS)
    with refused(ck.StateError, "all 4 of its timesteps", "step.init or step.init_like"):
        step(state, *feed(STEPS))


@pytest.mark.parametrize("way", [eagerly, pytest.param(compiled, marks=pytest.mark.compiles)])
@POLICIES
@pytest.mark.parametrize("steps", [0, 1])
def test_tensors_that_changed_since_init(way, policy, steps):
    model = dit.dit(depth=2)
    step = way(ck.cache(model, policy))
    state = walked(step, step.init(STEPS, *feed(0)), steps)
    kept = pytree.tree_map(torch.clone, state)
    x, t, text = feed(steps)
    for inputs, shape in ((feed(steps, batch=1), "[1, 6, 16] float32"), ((x[:, :4], t, text), "[2, 4, 16] float32")):
        with refused(ck.StateError, "At blocks.", "the state holds [2, 6, 16] float32", shape, "step.init"):
            step(state, *inputs)
    model.to(torch.float64)
    with refused(ck.StateError, "At blocks.", "[2, 6, 16] float32", "[2, 6, 16] float64", "step.init"):
        step(state, *(value.double() for value in feed(steps)))
    model.to(torch.float32)
    out, _ = step(state, *feed(steps))
    again, _ = step(kept, *feed(steps))
    assert torch.equal(out, again), "the caller's state has changed"


@WAYS
@POLICIES
def test_sites_that_the_step_does_not_know(way, policy):
    step = way(ck.cache(dit.dit(), policy))
    state = step.init(STEPS, *feed(0))
    (name,) = state.sites
    with refused(ck.StateError, "`state` has the sites ['elsewhere']", name, "Call step.init once"):
        step(state._replace(sites={"elsewhere": state.sites[name]}), *feed(0))
    with refused(ck.StateError, f"`state` has the sites ['{name}']", "Call step.init once", "a state that was saved"):
        way(ck.cache(dit.dit(), policy))(state, *feed(0))
    other = ck.cache(dit.dit("two"), policy).init(STEPS, *feed(0))
    with refused(ck.StateError, "'single.0..single.3'", name, "step.init"):
        step(other, *feed(0))


MASKED = ck.Policy("front", ck.deciders.mask([1, 0]), ck.forecasters.hold(), ck.signals.change, front=1)
CAPPED = ck.first_block_cache(0.1, max_skips=2)
LINEAR, QUADRATIC = (ck.step_mask([1, 0], forecaster=ck.forecasters.taylor(order)) for order in (1, 2))


@WAYS
@pytest.mark.parametrize(
    ("policy", "other"),
    [
        (MASK, DRIFT),
        (DRIFT, MASK),
        (DRIFT, MASKED),
        (MASKED, DRIFT),
        *(pair for pair in ((MASK, LINEAR), (LINEAR, MASK), (QUADRATIC, LINEAR), (DRIFT, CAPPED), (CAPPED, DRIFT))),
    ],
    ids=lambda policy: policy.name,
)
def test_the_state_of_another_policy(way, policy, other):
    model = dit.dit(depth=2)
    step = way(ck.cache(model, policy))
    step.init(1, *feed(0))
    state = ck.cache(model, other).init(1, *feed(0))
    with refused(ck.StateError, "`state`"):
        step(state, *feed(0))


@pytest.mark.parametrize(
    "way", ["eager", *(pytest.param(way, marks=pytest.mark.compiles) for way in ("programs", "graph"))]
)
def test_a_signal_that_is_nan_computes(way):
    model = dit.dit(depth=2)
    for semantics in ("paper", "diffusers"):
        step = ck.cache(model, ck.first_block_cache(1e6, semantics=semantics))
        run, init = step, step.init
        if way == "programs":
            run = step.compile(backend="eager")
            init = run.init
        elif way == "graph":
            run = torch.compile(step, fullgraph=True, backend="eager")
        state = init(7, *feed(0))
        for index in range(7):
            x, t, text = feed(index)
            if index == 2:
                x[0, 0, 0] = math.nan
            out, state = run(state, x, t, text)
            if index in (2, 3):
                assert torch.equal(out.nan_to_num(), model(x, t, text).nan_to_num())
            assert bool(out.isnan().any()) == (index == 2)
        # Step 3 has nothing finite to compare with; from then on all is as before.
        assert ck.summary(state).computed == (True, False, True, True, False, False, False)
        assert [math.isnan(signal) for signal in ck.summary(state).signal] == [False] * 2 + [True] * 2 + [False] * 3


# In one graph -------------------------------------------------------------------------------------------------------


@pytest.mark.compiles
@POLICIES
def test_one_graph_fails_rather_than_being_wrong(policy):
    step = ck.cache(dit.dit(depth=2), policy)
    whole = torch.compile(step, fullgraph=True, backend="eager")
    state = walked(whole, step.init(STEPS, *feed(0)), STEPS)
    with pytest.raises(Exception, match="has done all of its timesteps"):
        whole(state, *feed(STEPS))
    state = walked(whole, step.init(STEPS, *feed(0)), 1)
    x, t, text = feed(1)
    for inputs in (feed(1, batch=1), (x[:, :4], t, text)):
        with pytest.raises(Exception, match=r"(?s)the state holds .*\[2, 6, 16\] float32.*step\.init"):
            whole(state, *inputs)
    elsewhere = state._replace(sites=dict.fromkeys(["elsewhere"], *state.sites.values()))
    with pytest.raises(Exception, match="elsewhere"):
        whole(elsewhere, *feed(1))
    out, _ = whole(state, *feed(1))
    assert torch.equal(out, step(state, *feed(1))[0])


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """Twice the weight."""
        return 2 * weight


@pytest.mark.parametrize("name", ["blocks.1.modulate", "patch"])
def test_a_parametrization_in_between_raises_and_the_next_init_takes_it_up(name):
    model = dit.dit()
    step = ck.cache(model, MASK)
    state = walked(step, step.init(STEPS, *feed(0)), 1)
    nn.utils.parametrize.register_parametrization(model.get_submodule(name), "weight", Twice())
    with refused(ck.StructureError, "was added, removed or replaced since init", "step.init"):
        step(state, *feed(1))
    with torch.no_grad():
        out, _ = step(step.init(STEPS, *feed(0)), *feed(0))
        assert torch.equal(out, model(*feed(0)))


def test_a_summary_of_no_state():
    with refused(ck.ArgumentTypeError, "`state` must be a cachekit State, got NoneType", "step.init"):
        ck.summary(None)
