"""The three ways to run mean the same, and nothing compiles twice."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from dit import CHANNELS, DiT
from specimens import shallow
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import cachekit as ck
from cachekit.diffusers.zoo.specimen import Specimen

CLASSES = ("Flux", "SD3", "Wan", "CogVideoX", "QwenImage")
RATIOS = [1.0, 1.02, 0.99, 1.01, 0.98, 1.0]
POLICIES = {
    "first_block_cache": lambda: ck.first_block_cache(0.04, max_skips=2),
    "mag_cache": lambda: ck.mag_cache(RATIOS, threshold=0.1, max_skips=2, retention=0.1),
}

IN_TURN = [*zip(CLASSES, itertools.cycle(POLICIES), strict=False)]
THE_OTHER_WAY = [*zip(CLASSES, itertools.cycle(reversed(POLICIES)), strict=False)]

pytestmark = pytest.mark.compiles


def tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def error(a, b) -> float:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return max(((x - y).norm() / y.norm()).item() for x, y in pairs)


def spec(state):
    return [(x.shape, x.dtype, x.device, x.stride()) for x in tensors(state)], pytree.tree_structure(state)


def threshold_between(sp, steps: int) -> float:
    """A threshold that computes some steps and reuses others, with no signal within 1% of it."""
    step = ck.cache(sp.model, ck.first_block_cache(0.0))
    state = step.init(steps, **sp.inputs(0))
    for i in range(steps):
        _, state = step(state, **sp.inputs(i))
    return sorted(ck.summary(state).signal[1:])[steps // 2] * 1.51


def policy_for(name: str, sp, steps: int) -> ck.Policy:
    if name == "mag_cache":
        return POLICIES[name]()
    return ck.first_block_cache(threshold_between(sp, steps))


def run(step, state, sp, steps: int):
    outs = []
    for i in range(steps):
        out, state = step(state, **sp.inputs(i))
        outs.append(out)
    return outs, state


def same(step, compiled, sp, steps: int, first=None) -> None:
    """A trajectory compiled equals it eager: decisions, outputs, the form of the state."""
    outs, state = run(compiled, first or step.init(steps, **sp.inputs(0)), sp, steps)
    wanted, right = run(step, step.init(steps, **sp.inputs(0)), sp, steps)
    assert ck.summary(state).computed == ck.summary(right).computed
    assert {True, False} == set(ck.summary(right).computed), "the trajectory mixes both actions"
    assert spec(state) == spec(right)
    assert max(error(a, b) for a, b in zip(outs, wanted, strict=True)) < 1e-4
    assert torch.allclose(state.signal, right.signal, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("name", "method"), IN_TURN)
def test_one_graph_for_every_step_trajectory_and_length(name, method):
    sp = shallow(name)
    counters.clear()
    with torch.no_grad():
        step = ck.cache(sp.model, policy_for(method, sp, 24))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        same(step, compiled, sp, 24)
        assert counters["stats"]["unique_graphs"] == 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            same(step, compiled, sp, 24)
            same(step, compiled, sp, 11)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(("name", "method"), THE_OTHER_WAY)
def test_one_program_an_action(name, method):
    sp = shallow(name)
    counters.clear()
    with torch.no_grad():
        step = ck.cache(sp.model, policy_for(method, sp, 24))
        compiled = step.compile(backend="aot_eager")
        same(step, compiled, sp, 24, compiled.init(24, **sp.inputs(0)))
        programs = 3 if method == "first_block_cache" else 2
        assert counters["stats"]["unique_graphs"] == programs
        with torch._dynamo.config.patch(error_on_recompile=True):
            same(step, compiled, sp, 24, compiled.init(24, **sp.inputs(0)))
            same(step, compiled, sp, 11, compiled.init(11, **sp.inputs(0)))
    assert counters["stats"]["unique_graphs"] == programs
    assert not counters["graph_break"]


# Lists of two kinds of blocks, and one list. Inductor sees operators, not classes.
@pytest.mark.parametrize(("name", "way"), [("Flux", "programs"), ("DiT", "programs"), ("DiT", "one graph")])
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
def test_inductor_equals_eager(name, way):
    sp = shallow(name) if name != "DiT" else Specimen(name, *of_dit(6), ())
    with torch.no_grad():
        step = ck.cache(sp.model, policy_for("first_block_cache", sp, 12))
        compiled = step.compile() if way == "programs" else torch.compile(step, fullgraph=True)
        same(step, compiled, sp, 12, (compiled if way == "programs" else step).init(12, **sp.inputs(0)))


def of_flux(tokens: int):
    """Flux, and what it is called with at a step under so many tokens of text."""
    sp = shallow("Flux")

    def inputs(i):
        given = sp.inputs(i)
        given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :1].repeat(1, tokens, 1)
        given["txt_ids"] = given["txt_ids"][:1].repeat(tokens, 1)
        return given

    return sp.model, inputs


def of_dit(tokens: int):
    """The same of a plain transformer."""
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 6, CHANNELS, generator=generator), torch.randn(1, tokens, CHANNELS, generator=generator)
    return DiT(), lambda i: {"x": x + 0.1 * i, "t": torch.full((1,), 1 - 0.1 * i), "text": text}


@pytest.mark.parametrize("way", ["one graph", "programs"])
@pytest.mark.parametrize("of", [of_dit, of_flux], ids=["DiT", "Flux"])
def test_another_sequence_length_costs_one_more_graph_at_most(of, way):
    model, _ = of(6)
    counters.clear()
    with torch.no_grad():
        step = ck.cache(model, ck.step_mask([True, False] * 4))
        compiled = step.compile(backend="eager") if way == "programs" else None
        call = compiled or torch.compile(step, fullgraph=True, backend="eager")
        graphs = []
        for tokens in (6, 9, 11, 14):
            _, inputs = of(tokens)
            state, wanted = (compiled or step).init(6, **inputs(0)), step.init(6, **inputs(0))
            for i in range(6):
                out, state = call(state, **inputs(i))
                right, wanted = step(wanted, **inputs(i))
                assert error(out, right) < 1e-4
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] <= 2 * graphs[0]
    assert graphs[1:] == graphs[1:2] * 3


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_regional_compiles_every_class_of_block_once(name):
    sp = shallow(name)
    counters.clear()
    with torch.no_grad():
        step = ck.cache(sp.model, policy_for("first_block_cache", sp, 12))
        compiled = step.compile(regional=True, backend="aot_eager")
        same(step, compiled, sp, 12, compiled.init(12, **sp.inputs(0)))
    ours = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    # The measure is the uncached model with its blocks compiled one by one: one graph a class, and one more where a
    # class is called with another layout of memory (the first single block of Flux is).
    plain = shallow(name)
    for path in compiled.opened.blocks:
        plain.model.get_submodule(path).compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for i in range(3):
            plain.model(**plain.inputs(i))
    arithmetic = 2  # what is measured of the probe, what is added on a reuse; holding is no arithmetic
    assert ours == counters["stats"]["unique_graphs"] + arithmetic


def test_compile_leaves_the_old_step_eager():
    sp = shallow("Wan")
    with torch.no_grad():
        step = ck.cache(sp.model, ck.step_mask([1, 0, 1]))
        compiled = step.compile(backend="eager")
        assert compiled is not step
        counters.clear()
        run(step, step.init(3, **sp.inputs(0)), sp, 3)
    assert not counters["stats"]["unique_graphs"]


def test_every_program_has_the_options():
    model, x = DiT(), (torch.randn(1, 6, CHANNELS), torch.ones(1), torch.randn(1, 5, CHANNELS))
    asked = []

    def keep_all(entries):
        asked.append(len(entries))
        return [True] * len(entries)

    step = ck.cache(model, ck.first_block_cache(0.3, max_skips=1)).compile(
        backend="eager", options={"guard_filter_fn": keep_all}
    )
    with torch.no_grad():
        state = step.init(3, *x)
        for _ in range(3):
            _, state = step(state, *x)
    assert ck.summary(state).computed == (True, False, True)
    assert len(asked) == 3, "probe, compute and reuse: torch.compile takes the filter out of what it is given"


class Doubled(torch.nn.Linear):
    """What a checkpoint of plain layers fits into as well."""

    def forward(self, x):
        """Twice as much."""
        return 2 * super().forward(x)


@pytest.mark.parametrize("method", POLICIES)
@torch.no_grad()
def test_a_replaced_module_is_compiled_anew(method):
    model = DiT()
    x, t, text = torch.randn(1, 6, CHANNELS), torch.ones(1), torch.randn(1, 5, CHANNELS)
    step = ck.cache(model, POLICIES[method]()).compile(backend="eager")
    _, state = step(step.init(6, x, t, text), x, t, text)
    for parent, name in ((model, "head"), (model.blocks[2], "modulate")):
        old = getattr(parent, name)
        new = Doubled(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        setattr(parent, name, new)
        with pytest.raises(ck.StructureError, match="was added, removed or replaced since init"):
            step(state, x, t, text)
        out, state = step(step.init(6, x, t, text), x, t, text)
        assert torch.allclose(out, model(x, t, text), rtol=1e-5, atol=1e-6)


def test_a_wrong_call_of_a_compiled_step_is_no_wrong_result():
    model, inputs = of_dit(5)
    with torch.no_grad():
        step = ck.cache(model, ck.step_mask([1, 0]))
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        state = step.init(2, **inputs(0))
        for i in range(2):
            _, state = compiled(state, **inputs(i))
        with pytest.raises(RuntimeError, match="all of its timesteps"):
            compiled(state, **inputs(2))
        longer = of_dit(7)[1](0)
        state = step.init(2, **inputs(0))
        with pytest.raises(Exception, match="the state holds"):
            compiled(state, **{**longer, "x": longer["x"].repeat(2, 1, 1)})


LOADER = """
import json, sys, torch
package = sys.argv[1]
run = torch._inductor.aoti_load_package(package)
leaves = torch.load(package + ".state.pt")
inputs, outs = torch.load(sys.argv[2])
for given, wanted in zip(inputs, outs, strict=True):
    out, leaves = run(leaves, **given)
    error = ((out[0] - wanted).norm() / wanted.norm()).item()
    assert error < 1e-4, error
names = [leaf["name"] for leaf in json.load(open(package + ".json"))["state"]]
computed = leaves[names.index("computed")]
assert not {"cachekit", "diffusers"} & set(sys.modules)
print(computed.tolist())
"""


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_export_runs_in_a_process_that_knows_only_torch(tmp_path):
    sp = shallow("DiT")
    with torch.no_grad():
        step = ck.cache(sp.model, policy_for("first_block_cache", sp, 10))
        package = tmp_path / "step.pt2"
        state = step.init(10, **sp.inputs(0), return_dict=False)
        step.export(package, state, **sp.inputs(0), return_dict=False)
        inputs = [sp.inputs(i) for i in range(10)]
        outs = []
        for given in inputs:
            out, state = step(state, **given, return_dict=False)
            outs.append(out[0])
    torch.save((inputs, outs), tmp_path / "io.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(package), str(tmp_path / "io.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    computed = json.loads(done.stdout.strip().splitlines()[-1].lower())
    assert tuple(computed) == ck.summary(state).computed
    assert {True, False} == set(computed)
