"""What a probe leaves for later is computed when it is needed, once, and not at all when it is not."""

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from specimens import shallow
from torch._dynamo.backends.common import aot_autograd

import cachekit as ck
from cachekit.running import waiting
from cachekit.running.waiting import Waiting, arrived, cutting, may_wait

pytestmark = pytest.mark.compiles


def quietly(a, b):
    """Under a switch that is a node of the graph without a result, as autocast inside a model is."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (a.outer(b) @ b.outer(a))[0].float()


OPERATORS = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b.tanh(),
    "first half": lambda a, b: a.chunk(2)[0].repeat(2) - b,
    "wave": lambda a, b: torch.sin(a),
    "write": lambda a, b: a.add_(b),  # from here on what is cut off would see another value
    "quietly": lambda a, b: quietly(a, b),
}
PURE = [name for name in OPERATORS if name not in ("write", "quietly")]


def programs(names):
    """Operators on earlier values, and which values are results: those needed at once, those that may wait."""
    places = st.integers(0, 9)
    lines = st.lists(st.tuples(st.sampled_from(names), places, places), min_size=1, max_size=8)
    return st.tuples(lines, st.lists(places, min_size=1, max_size=2), st.lists(places, min_size=2, max_size=4))


def interpret(program, mark):
    lines, needed, late = program

    def run(x, y):
        values = [x + 1, y * 2]
        for name, i, j in lines:
            values.append(OPERATORS[name](values[i % len(values)], values[j % len(values)]))
        return [values[i % len(values)] * 1 for i in needed], [mark(values[i % len(values)]) for i in late]

    return run


def whole(graph, inputs):
    return graph


def compiled(program):
    torch._dynamo.reset()
    return torch.compile(interpret(program, may_wait), backend=cutting(whole), fullgraph=True)


X, Y = torch.tensor([0.3, -1.2, 2.0, 0.7]), torch.tensor([1.5, 0.2, -0.4, 0.9])


@settings(max_examples=40)
@given(programs(list(OPERATORS)))
def test_a_cut_program_returns_what_the_whole_returns(program):
    with torch.no_grad():
        wanted = interpret(program, lambda value: value)(X, Y)
        now, late = compiled(program)(X, Y)
        torch.testing.assert_close((now, arrived(late)), (wanted[0], wanted[1]), rtol=0, atol=0)


@settings(max_examples=20)
@given(programs(PURE))
def test_a_result_waits_if_and_only_if_the_rest_does_without_it(program):
    lines, needed, late = program
    size = len(lines) + 2
    reads = {
        n + 2: {i % (n + 2), j % (n + 2)} if name != "wave" else {i % (n + 2)} for n, (name, i, j) in enumerate(lines)
    }

    def below(nodes):
        found = set()
        while nodes:
            node = nodes.pop()
            found.add(node)
            nodes |= reads.get(node, set()) - found
        return found

    there = below({i % size for i in needed})
    with torch.no_grad():
        _, results = compiled(program)(X, Y)
    assert [isinstance(value, Waiting) for value in results] == [i % size not in there for i in late]


@torch.library.custom_op("cachekit_tests::halve", mutates_args={"x"})
def halve(x: torch.Tensor) -> torch.Tensor:
    x.mul_(0.5)
    return x.clone()


halve.register_fake(lambda x: torch.empty_like(x))

WRITES = {
    "inplace=True": lambda x, h: torch.nn.functional.relu(x, inplace=True),
    "positional": lambda x, h: torch.nn.functional.relu(x, True),
    "module": lambda x, h: torch.nn.SiLU(inplace=True)(x),
    "aten": lambda x, h: torch.ops.aten.add_.Tensor(x, h),
    "dunder": lambda x, h: x.__iadd__(h),
    "out": lambda x, h: torch.add(x, h, out=x),
    "custom operator": lambda x, h: halve(x),
    "random": lambda x, h: torch.nn.functional.dropout(x, 0.5, True),
    "data": lambda x, h: x.data,
    "numpy": lambda x, h: torch.from_numpy(np.tanh(x.numpy())),
    "pure": lambda x, h: x * 2,
}


class Double(torch.nn.Module):
    """A block of two streams, in one half of which something happens to what the other half reads."""

    def __init__(self, write, half):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(8, 8) for _ in range(3))
        self.write, self.half = write, half

    def forward(self, h, e):
        x = self.a(h)
        if self.half == "first stream":
            e = e + self.b(x.mean(1, keepdim=True))
            return h + self.c(self.write(x, h)), e
        e = e + self.b(self.write(x, h).mean(1, keepdim=True))
        return h + self.c(x), e


class Doubles(torch.nn.Module):
    def __init__(self, write, half):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Double(write, half) for _ in range(3))

    def forward(self, h, e):
        for block in self.blocks:
            h, e = block(h, e)
        return h + e.mean(1, keepdim=True)


@pytest.mark.parametrize("half", ["first stream", "second stream"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.filterwarnings("ignore")  # an out= of another size, NumPy under the compiler
def test_what_a_block_writes_draws_or_asks_of_others_stays_in_its_order(write, half):
    torch.manual_seed(0)
    step = ck.cache(Doubles(WRITES[write], half), ck.first_block_cache(1e9, max_skips=1))
    h, e = torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    outs = []
    for run in (step, step.compile(backend="eager")):
        torch.manual_seed(1)
        with torch.no_grad():
            state, found = run.init(4, h, e), []
            for _ in range(4):
                out, state = run(state, h, e)
                found.append(out)
        assert ck.summary(state).computed == (True, False, True, False)
        outs.append(torch.stack(found))
    torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-5)


def matmuls(step, sp, mask):
    """How many matrix products every program has, once the compiler has dropped what nobody reads."""
    found = []

    def count(graph, inputs):
        products = [
            node for node in graph.graph.nodes if str(node.target).startswith(("aten.addmm", "aten.mm", "aten.bmm"))
        ]
        found.append(len(products))
        return make_boxed_func(graph.forward)

    compiled = step.compile(backend=aot_autograd(fw_compiler=count, inference_compiler=count))
    state = compiled.init(len(mask), **sp.inputs(0))
    for i in range(len(mask)):
        _, state = compiled(state, **sp.inputs(i))
    assert ck.summary(state).computed == mask
    return found


@pytest.mark.parametrize("name", ["Flux", "HunyuanVideo"])
def test_the_text_half_of_the_probe_is_computed_where_the_rest_is(name, monkeypatch):
    sp, policy = shallow(name), ck.first_block_cache(1e9)
    with torch.no_grad():
        probe, compute, reuse = matmuls(ck.cache(sp.model, policy), sp, (True, False))
        monkeypatch.setattr(waiting, "_movable", lambda probe, own: False)
        whole_probe, rest, same = matmuls(ck.cache(sp.model, policy), sp, (True, False))
    # What attention returns for the text, and its feed-forward network of two layers.
    assert (probe, compute, reuse) == (whole_probe - 3, rest + 3, same)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_probe_that_keeps_gradients_is_whole():
    sp = shallow("Flux")
    step = ck.cache(sp.model, ck.first_block_cache(1e9))
    compiled = step.compile(backend="eager")
    outs = []
    for run in (step, compiled):
        state = run.init(2, **sp.inputs(0))
        for i in range(2):
            given = sp.inputs(i)
            given["hidden_states"].requires_grad_(True)
            out, state = run(state, **given)
        out[0].sum().backward()
        outs.append((out[0].detach(), given["hidden_states"].grad))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-4)
