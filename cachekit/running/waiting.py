"""Work of a probe that can wait until it is known whether anybody needs it.

A front block may return more than the decision looks at: the text half of a double-stream block, say. The probe's
graph is cut where the decision has what it needs, and what is left opens the programs after it. In the one that
reuses nobody reads the result, and the compiler drops it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode


def may_wait(value: Tensor) -> Tensor:
    """Marks a result of the probe that the decision does not look at."""
    return value


class Waiting(NamedTuple):
    """Stands for a result of the probe that is not computed yet."""

    rest: fx.GraphModule  # computes what waits
    given: tuple[Tensor, ...]  # from these
    place: int  # of this one among its results


def arrived(carried: Sequence[Tensor | Waiting]) -> list[Tensor]:
    """What the probe hands on, with what has waited computed: inside the graph of the program that is given it."""
    late = next((value.rest(*value.given) for value in carried if isinstance(value, Waiting)), ())
    return [late[value.place] if isinstance(value, Waiting) else value for value in carried]


def cutting(compile_graph: Callable[..., Any]) -> Callable[..., Any]:
    """A backend that compiles a probe without what may wait: in place of that it returns a `Waiting`."""
    torch.compiler.allow_in_graph(may_wait)  # not at import: it loads Dynamo, which is needed from here on

    def backend(probe: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        results, sides = _results(probe), _sides(probe)
        try:
            rest = _rest(probe, sides) if _movable(probe, sides.own) else None
        except Exception:  # of whatever does not run, or trace, on tensors without values: it stays where it is
            rest = None
        if rest is None:
            return compile_graph(probe, inputs)
        _cut(probe, sides)
        run = compile_graph(probe, inputs)
        places = [sides.late.index(node) if node in sides.late else None for node in results]

        def cut(*values: Any) -> list[Any]:
            found = iter(run(*values))
            kept = [next(found) if place is None else None for place in places]
            given = tuple(found)
            return [
                value if place is None else Waiting(rest, given, place)
                for value, place in zip(kept, places, strict=True)
            ]

        return cut

    return backend


class _Sides(NamedTuple):
    """Where a probe can be cut; all in the order of its graph."""

    late: list[fx.Node]  # results that may wait and take work of their own
    own: list[fx.Node]  # what only they need
    given: list[fx.Node]  # what that is computed from


def _sides(probe: fx.GraphModule) -> _Sides:
    results = _results(probe)
    needed = _ancestors(node for node in results if node.target is not may_wait)
    late = [node for node in results if node.target is may_wait and node.all_input_nodes[0] not in needed]
    wanted = _ancestors(late)
    # A piece of what is there costs nothing, and a tuple cannot be handed on.
    needed |= {node for node in wanted if node.target is operator.getitem and node.all_input_nodes[0] in needed}
    needed |= _ancestors(node for node in results if node not in late)  # a mark on what is there already, too
    own = [node for node in probe.graph.nodes if node in wanted and node not in needed and node.op != "placeholder"]
    read = {value for node in own for value in node.all_input_nodes}.difference(own)
    return _Sides(late, own, [node for node in probe.graph.nodes if node in read])


def _movable(probe: fx.GraphModule, own: list[fx.Node]) -> bool:
    """Whether it makes no difference if these nodes run after all others."""
    if not own or torch.is_grad_enabled():
        return False
    after = list(itertools.dropwhile(lambda node: node not in own, probe.graph.nodes))
    if any(not node.users and _example(node) is None for node in after if node.op != "output"):
        return False  # it switches something on or off, autocast for instance
    trial = _Trial(probe)
    with FakeTensorMode():
        trial.run(*map(_stand_in, probe.graph.find_nodes(op="placeholder")))
    return trial.touching.isdisjoint(after)


def _rest(probe: fx.GraphModule, sides: _Sides) -> fx.GraphModule:
    """What the late results alone need, as operators that every compiler can trace."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"given_{n}") for n, node in enumerate(sides.given)}
    for node in sides.own:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in sides.late))
    with FakeTensorMode():
        made = make_fx(fx.GraphModule(probe, graph))(*map(_stand_in, sides.given))
    return fx.GraphModule(made, made.graph)  # not a lazy one, which Dynamo does not trace


def _cut(probe: fx.GraphModule, sides: _Sides) -> None:
    """Take what the late results alone need out of a graph, which returns what they are computed from instead."""
    (output,) = probe.graph.find_nodes(op="output")
    output.args = ((*(node for node in _results(probe) if node not in sides.late), *sides.given),)
    gone = set(sides.own)
    for node in probe.graph.nodes:
        if node is not output and gone.intersection(node.all_input_nodes):  # that nobody reads
            gone.add(node)
    for node in reversed(probe.graph.nodes):
        if node in gone:
            probe.graph.erase_node(node)
    probe.recompile()


class _Watch(TorchDispatchMode):
    """Sees operators that write to a tensor or draw random numbers, whatever they are called under."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen |= func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _Trial(fx.Interpreter):
    """Runs a graph node by node, and keeps those whose place in the order matters."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.touching: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        with _Watch() as watch:
            result = super().run_node(n)
        if watch.seen:
            self.touching.add(n)
        return result


def _stand_in(node: fx.Node) -> Tensor:
    """A tensor without values like the one of a node."""
    like, argument = _example(node), node.meta.get("grapharg")
    real = like if argument is None else argument.example  # the example of a weight does not always tell its class
    if not {type(like), type(real)} <= {FakeTensor, Tensor, nn.Parameter}:
        raise TypeError("a tensor of another class, a quantised weight say, for which no plain one can stand")
    if not isinstance(like, Tensor) or not all(isinstance(n, int) for n in (*like.shape, *like.stride())):
        raise TypeError("a size that is not known beforehand")
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _results(graph_module: fx.GraphModule) -> list[fx.Node]:
    (output,) = graph_module.graph.find_nodes(op="output")
    return list(output.args[0])  # type: ignore[arg-type]


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    open_ = [*nodes]
    while open_:
        node = open_.pop()
        if node not in found:
            found.add(node)
            open_ += node.all_input_nodes
    return found


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")
