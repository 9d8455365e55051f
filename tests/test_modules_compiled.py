"""Methods on modules inside the blocks: one program an action, or one graph, and nothing compiles twice."""

from __future__ import annotations

import pytest
import tiers
import torch
from specimens import shallow
from test_compiled import error, spec
from test_module_parity import both_halves
from torch._dynamo.utils import counters

import cachekit as ck
from cachekit.diffusers import zoo
from cachekit.running.arithmetic import arithmetic

STEPS = 25
LAYOUTS = {"SD3": "BCHW", "Wan": "BCFHW", "CogVideoX": "BFCHW"}
CLASSES = ("Flux", *LAYOUTS)
METHODS = ("taylorseer", "pyramid_attention_broadcast", "faster_cache")

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
]


def setup(name: str, method: str) -> tuple[zoo.Specimen, ck.Policy]:
    """A model with its inputs, and a policy that leaves different modules out in different steps."""
    specimen = shallow(name)
    if method == "taylorseer":
        return specimen, ck.taylorseer(4, warmup=2, order=2)
    if method == "pyramid_attention_broadcast":
        cross = 3 if name == "Wan" else None
        return specimen, ck.pyramid_attention_broadcast(2, None, cross, spatial_range=(100, 900))
    if name not in LAYOUTS:
        return specimen, ck.faster_cache(cfg=None, attention_range=(-1, 900))
    return both_halves(specimen), ck.faster_cache(layout=LAYOUTS[name], uncond_range=(-1, 900))


def one_block(specimen: zoo.Specimen) -> None:
    """Leave one block a list: a second one has the same modules, and takes the compiler as long again."""
    for child in specimen.model.children():
        if isinstance(child, torch.nn.ModuleList):
            del child[1:]


def run(step, init, specimen: zoo.Specimen, steps: int) -> tuple[list, ck.State]:
    """The outputs of a trajectory, and its last state."""
    state, outputs = init([zoo.schedule(2 * at) for at in range(steps)], **specimen.inputs(0)), []
    for at in range(steps):
        out, state = step(state, **specimen.inputs(at))
        outputs.append(out)
    return outputs, state


def assert_same(one: tuple[list, ck.State], other: tuple[list, ck.State]) -> None:
    """Equal decisions, outputs, and form of the state."""
    assert ck.summary(one[1]).computed == ck.summary(other[1]).computed
    assert {True, False} == set(ck.summary(other[1]).computed)
    assert spec(one[1]) == spec(other[1])
    assert max(error(a, b) for a, b in zip(one[0], other[0], strict=True)) < 1e-4


@pytest.mark.parametrize(("name", "method", "way"), tiers.covering(CLASSES, METHODS, ("programs", "one graph")))
def test_nothing_compiles_twice(name, method, way):
    specimen, policy = setup(name, method)
    one_block(specimen)
    with torch.no_grad():
        step = ck.cache(specimen.model, policy)
        wanted = {steps: run(step, step.init, specimen, steps) for steps in (STEPS, 11)}
        plan = step.plan([zoo.schedule(2 * at) for at in range(STEPS)])
        compiled = step.compile(backend="eager") if way == "programs" else None
        call = compiled or torch.compile(step, fullgraph=True, backend="eager")
        counters.clear()
        assert_same(run(call, (compiled or step).init, specimen, STEPS), wanted[STEPS])
        graphs = plan.actions if way == "programs" else 1
        assert counters["stats"]["unique_graphs"] == graphs
        with torch._dynamo.config.patch(error_on_recompile=True):
            for steps in (STEPS, 11):
                assert_same(run(call, (compiled or step).init, specimen, steps), wanted[steps])
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize(("name", "method"), [("Flux", "taylorseer"), ("Wan", "faster_cache")])
def test_inductor_equals_eager(name, method):
    specimen, policy = setup(name, method)
    one_block(specimen)
    with torch.no_grad():
        step = ck.cache(specimen.model, policy)
        compiled = step.compile()
        assert_same(run(compiled, compiled.init, specimen, 12), run(step, step.init, specimen, 12))


ONE_GRAPH = {
    "hold": lambda: ck.pyramid_attention_broadcast(3, cross=2, spatial_range=(-1, 1001)),
    "taylor": lambda: ck.taylorseer(4, warmup=2, order=1),
    "newton": lambda: ck.taylorseer(3, warmup=2, basis="newton", sites="output"),
}


# What the two-point forecast is to a graph is in "guided", a chain is in test_compiled.py.
@pytest.mark.parametrize(
    ("name", "policy"), [("PixArt", "hold"), ("Wan", "taylor"), ("DiT", "newton"), ("Wan", "guided")]
)
def test_one_graph_of_inductor_equals_eager(name, policy):
    """What is returned and what is remembered are two tensors, and a branch gets what it was compiled for."""
    if policy == "guided":
        specimen, made = setup(name, "faster_cache")
    else:
        specimen, made = shallow(name), ONE_GRAPH[policy]()
    one_block(specimen)
    with torch.no_grad():
        step = ck.cache(specimen.model, made)
        call = torch.compile(step, fullgraph=True)
        compiled, eager = run(call, step.init, specimen, 12), run(step, step.init, specimen, 12)
        assert_same(compiled, eager)
        assert error(compiled[1].sites, eager[1].sites) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_regional(method):
    specimen, policy = setup("Wan", method)
    with torch.no_grad():
        step = ck.cache(specimen.model, policy)
        regional = step.compile(regional=True, backend="aot_eager")
        assert_same(run(regional, regional.init, specimen, 12), run(step, step.init, specimen, 12))


def test_regional_arithmetic_goes_on_past_the_kinds_that_a_compiler_keeps():
    policy = ck.taylorseer(2, order=2)
    plain, now = arithmetic(policy), ck.forecasters.Clock(torch.tensor(3.0), torch.tensor(9.0))
    compiled = plain.compiled({"backend": "eager", "fullgraph": True})
    for streams in range(1, 5):
        for rank in range(1, 5):
            values = [torch.randn([2] * rank) for _ in range(streams)]
            states = tuple(policy.forecaster.init(value) for value in values)
            for _ in range(2):
                states, same = (each.update(states, values, now) for each in (plain, compiled))
                torch.testing.assert_close(same, states)
            torch.testing.assert_close(compiled.predict(states, now), plain.predict(states, now))
