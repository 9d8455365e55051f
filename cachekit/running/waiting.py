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
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode


@torch.compiler.allow_in_graph
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

    def backend(probe: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        results, late = _results(probe), _late(probe)
        rest = _rest(probe, late) if late else None
        if rest is None:
            return compile_graph(probe, inputs)
        _cut(probe, late)
        run = compile_graph(probe, inputs)

        def cut(*values: Any) -> list[Any]:
            found = iter(run(*values))
            kept = {node: next(found) for node in results if node not in late}
            given = tuple(found)
            return [kept[node] if node in kept else Waiting(rest, given, late.index(node)) for node in results]

        return cut

    return backend


def _late(probe: fx.GraphModule) -> list[fx.Node]:
    """Results that may wait and take work of their own; none where that work cannot be moved to the end."""
    marked = [node for node in _results(probe) if node.target is may_wait]
    needed = _ancestors(node for node in _results(probe) if node not in marked)
    late = [node for node in marked if node.all_input_nodes[0] not in needed]
    if not late or torch.is_grad_enabled():
        return []
    own, given = _sides(probe, late)
    if not all(isinstance(_example(node), Tensor) for node in given):  # a size that is not known beforehand
        return []
    after = list(itertools.dropwhile(lambda node: node not in own, probe.graph.nodes))
    if any(not node.users and _example(node) is None for node in after if node.op != "output"):
        return []  # it switches something on or off, autocast for instance
    touching = _touching(probe)
    return late if touching is not None and touching.isdisjoint(after) else []


def _rest(probe: fx.GraphModule, late: list[fx.Node]) -> fx.GraphModule | None:
    """What the late results alone need, as operators that every compiler can trace; None if they cannot be had."""
    own, given = _sides(probe, late)
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"given_{n}") for n, node in enumerate(given)}
    for node in own:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in late))
    try:
        with FakeTensorMode():
            made = make_fx(fx.GraphModule(probe, graph))(*map(_stand_in, given))
        return fx.GraphModule(made, made.graph)  # not a lazy one, which Dynamo does not trace
    except Exception:  # of whatever the late half does that no tracer follows: then it does not wait
        return None


def _cut(probe: fx.GraphModule, late: list[fx.Node]) -> None:
    """Take what the late results alone need out of a graph, which returns what they are computed from instead."""
    own, given = _sides(probe, late)
    (output,) = probe.graph.find_nodes(op="output")
    output.args = ((*(node for node in _results(probe) if node not in late), *given),)
    gone = set(own)
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


def _touching(probe: fx.GraphModule) -> set[fx.Node] | None:
    """The nodes that write to a tensor or draw random numbers; None where that cannot be told."""
    trial = _Trial(probe)
    try:
        with FakeTensorMode():
            trial.run(*map(_stand_in, probe.graph.find_nodes(op="placeholder")))
    except Exception:  # of whatever the graph holds that does not run on tensors without values
        return None
    return trial.touching


def _stand_in(node: fx.Node) -> Any:
    """A tensor without values like the one of a node, where its sizes are known."""
    like = _example(node)
    if not isinstance(like, Tensor):
        return like
    if not all(isinstance(n, int) for n in (*like.shape, *like.stride())):
        raise TypeError("a size that is not known beforehand")
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _sides(probe: fx.GraphModule, late: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that only late results need, and those that they are computed from, in the order of the graph."""
    needed = _ancestors(node for node in _results(probe) if node not in late)
    wanted = _ancestors(late)
    # A piece of what is there costs nothing, and a tuple cannot be handed on.
    needed |= {node for node in wanted if node.target is operator.getitem and node.all_input_nodes[0] in needed}
    own = [node for node in probe.graph.nodes if node in wanted and node not in needed and node.op != "placeholder"]
    read = {value for node in own for value in node.all_input_nodes}.difference(own)
    return own, [node for node in probe.graph.nodes if node in read]


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
