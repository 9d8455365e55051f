"""Where blocks may stand, and what their streams may be carried in; and what a refusal says is true and helps."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wrapped import WIDTH, Attention, Block, feed
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cachekit as ck
from cachekit.releases import FORGETFUL

STEPS, DEPTH = 6, 4


def feed_forward() -> nn.Module:
    """A feed-forward network."""
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class Added(nn.Module):
    """Another module, and what it was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        """The same shape."""
        return x + self.inner(x)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Streams in a class that torch.utils._pytree knows."""

    image: Tensor
    text: Tensor


@dataclasses.dataclass(frozen=True)
class Closed:
    """In one that it does not know."""

    image: Tensor
    text: Tensor


pytree.register_dataclass(Tokens)


class Carrying(Block):
    """A block whose two streams come and go in one container."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any], unpack: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.pack, self.unpack = pack, unpack

    def forward(self, carried, t=None):
        """The same container of the same shapes."""
        image, text = self.unpack(carried)
        joint = super().forward(torch.cat([image, text], 1))
        image, text = joint.split([image.shape[1], text.shape[1]], 1)
        return self.pack(image, text)


PACKS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "list": (lambda image, text: [image, text], tuple),
    "tuple": (lambda image, text: (image, text), tuple),
    "dict": (lambda image, text: {"image": image, "text": text}, lambda found: (found["image"], found["text"])),
    "nested": (lambda image, text: {"all": [image, (text,)]}, lambda found: (found["all"][0], found["all"][1][0])),
    "dataclass": (Tokens, lambda found: (found.image, found.text)),
    "closed": (Closed, lambda found: (found.image, found.text)),
}


class Values(Block):
    """A block that adds the values of the first one: it returns them beside its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, first=None):
        """Tokens, and the values of the first block."""
        first = self.values(x) if first is None else first
        return super().forward(x) + 0.1 * first, first


class Skipping(Block):
    """A block that may be given the tokens of an earlier one, or push to and pop from a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, skip=None, push=None):
        """The same shape."""
        skip = skip.pop() if isinstance(skip, list) else skip
        x = x if skip is None else self.mix(torch.cat([x, skip], -1))
        x = super().forward(x)
        if push is not None:
            push.append(x)
        return x


def in_order(blocks, x):
    """One after the other."""
    for block in blocks:
        x = block(x)
    return x


def summed_outside(model, x):
    """The sums are the model's."""
    for attn, ff in model.layers:
        x = attn(x) + x
        x = ff(x) + x
    return x


def parts_called(model, x):
    """Blocks whose parts are called, never they."""
    for layer in model.layers:
        x = x + layer.attn(x)
        x = x + layer.ff(x)
    return x


def recurring(model, x):
    """One block, again and again."""
    for _ in range(DEPTH):
        x = model.block(x)
    return x


def carried(kind: str):
    """Two streams in a container."""
    pack, unpack = PACKS[kind]

    def flow(model, x):
        found = pack(x, x[:, :2].sin())
        for block in model.blocks:
            found = block(found)
        image, text = unpack(found)
        return image + text.mean(1, keepdim=True)

    return flow


def long_skips(model, x):
    """A U-Net of tokens, the skip an argument."""
    kept = []
    for block in model.blocks[: DEPTH // 2]:
        x = block(x)
        kept.append(x)
    for block in model.blocks[DEPTH // 2 :]:
        x = block(x, kept.pop())
    return x


def pushed(model, x):
    """The same, the blocks share a list."""
    kept: list[Tensor] = []
    for n, block in enumerate(model.blocks):
        x = block(x, None, kept) if n < DEPTH // 2 else block(x, kept)
    return x


def value_residual(model, x):
    """The first block's values go to all."""
    first = None
    for block in model.blocks:
        x, first = block(x, first)
    return x


def mixed(model, x):
    """Hyper-connections: what a block is given is mixed of several streams outside."""
    streams = torch.stack([x, 0.5 * x, x.sin()])
    for n, block in enumerate(model.blocks):
        weights = torch.softmax(torch.arange(3.0) * (n + 1), 0)[:, None, None, None]
        streams = streams + weights * block((weights * streams).sum(0))
    return streams.sum(0)


def listed(make: Callable[[], nn.Module] = Block) -> dict[str, nn.Module]:
    """A list of blocks."""
    return {"blocks": nn.ModuleList(make() for _ in range(DEPTH))}


MODELS: dict[str, tuple[Callable[[], dict[str, nn.Module]], Callable[[Any, Tensor], Tensor]]] = {
    "list": (listed, lambda model, x: in_order(model.blocks, x)),
    "sequential": (
        lambda: {"blocks": nn.Sequential(*(Block() for _ in range(DEPTH)))},
        lambda model, x: model.blocks(x),
    ),
    "sequential, in a loop": (
        lambda: {"blocks": nn.Sequential(*(Block() for _ in range(DEPTH)))},
        lambda model, x: in_order(model.blocks, x),
    ),
    "dict": (
        lambda: {"blocks": nn.ModuleDict({f"b{n}": Block() for n in range(DEPTH)})},
        lambda model, x: in_order(model.blocks.values(), x),
    ),
    "children": (
        lambda: {name: Block() for name in ("one", "two", "three", "four")},
        lambda model, x: in_order((model.one, model.two, model.three, model.four), x),
    ),
    "one beside a list": (
        lambda: {"before": Block(), **listed()},
        lambda model, x: in_order((model.before, *model.blocks), x),
    ),
    "one several times": (lambda: {"block": Block()}, recurring),
    "pairs, summed inside": (
        lambda: {
            "layers": nn.ModuleList(
                nn.ModuleList([Added(Attention()), Added(feed_forward())]) for _ in range(DEPTH // 2)
            )
        },
        lambda model, x: in_order([each for pair in model.layers for each in pair], x),
    ),
    "pairs, summed outside": (
        lambda: {"layers": nn.ModuleList(nn.ModuleList([Attention(), feed_forward()]) for _ in range(DEPTH))},
        summed_outside,
    ),
    "parts called": (lambda: {"layers": nn.ModuleList(Block() for _ in range(DEPTH))}, parts_called),
    **{
        f"streams in a {kind}": ((lambda pack=PACKS[kind]: listed(lambda: Carrying(*pack))), carried(kind))
        for kind in PACKS
    },
    "long skips": (lambda: listed(Skipping), long_skips),
    "long skips, pushed": (lambda: listed(Skipping), pushed),
    "values of the first": (lambda: listed(Values), value_residual),
    "hyper-connections": (listed, mixed),
}
NO_CHAIN = {"pairs, summed outside", "parts called", "streams in a closed", "long skips, pushed"}
PARTS = {  # what taylorseer finds, where it is not blocks.*.attn and blocks.*.ff
    "children": {
        f"{kind}: {name}.{part}"
        for name in ("one", "two", "three", "four")
        for kind, part in (("spatial", "attn"), ("mlp", "ff"))
    },
    "dict": {
        f"{kind}: blocks.b{n}.{part}" for n in range(DEPTH) for kind, part in (("spatial", "attn"), ("mlp", "ff"))
    },
    "one beside a list": {"spatial: before.attn", "mlp: before.ff", "spatial: blocks.*.attn", "mlp: blocks.*.ff"},
    "one several times": {"spatial: block.attn", "spatial: block.attn#*", "mlp: block.ff", "mlp: block.ff#*"},
    "pairs, summed inside": {"spatial: layers.*.0.inner", "mlp: layers.*.1.inner"},
    "pairs, summed outside": {"spatial: layers.*.0", "mlp: layers.*.1"},
    "parts called": {"spatial: layers.*.attn", "mlp: layers.*.ff"},
}


class Model(nn.Module):
    """Modules, and a flow through them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        make, self.flow = MODELS[name]
        for child, module in make().items():
            self.add_module(child, module)
        self.inp, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, t):
        """The same shape."""
        return self.head(self.flow(self, self.inp(x) + t))


POLICIES: dict[str, tuple[ck.Policy, ck.Policy]] = {
    "mask": (ck.step_mask([1] * STEPS), ck.step_mask([1, 0] * 3)),
    "probe": (ck.first_block_cache(0.0), ck.first_block_cache(1e9, max_skips=1)),
    "parts": (ck.taylorseer(1), ck.taylorseer(2, warmup=1)),
    "output": (ck.taylorseer(1, sites="output"), ck.taylorseer(2, warmup=1, sites="output")),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run(step: ck.CachedStep | Any, state: ck.State) -> tuple[list[Tensor], ck.State]:
    """The outputs of a trajectory, and its last state."""
    outs = []
    for index in range(STEPS):
        out, state = step(state, *feed(index))
        outs.append(out)
    return outs, state


def check(model: nn.Module, step: ck.CachedStep) -> tuple[bool, ...]:
    """Run it: what is computed is what the model computes, what is left out is something else."""
    outs, state = run(step, step.init(STEPS, *feed(0)))
    pattern = ck.summary(state).computed
    for index, computed in enumerate(pattern):
        assert torch.equal(outs[index], model(*feed(index))) == computed
    return pattern


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_every_policy_works_or_says_what_does(name, policy):
    model = Model(name).eval()
    every, some = POLICIES[policy]
    if policy in ("mask", "probe") and name in NO_CHAIN:
        with pytest.raises(ck.StructureError) as refused:
            ck.cache(model, some).init(STEPS, *feed(0))
        assert "cachekit." in str(refused.value)
        return
    assert all(check(model, ck.cache(model, every)))
    assert not all(check(model, ck.cache(model, some)))


@pytest.mark.parametrize("name", MODELS)
def test_attention_and_feed_forward_networks_are_found(name):
    found = ck.cache(Model(name).eval(), ck.taylorseer(2)).explain(STEPS, *feed(0))
    wanted = PARTS.get(name, {"spatial: blocks.*.attn", "mlp: blocks.*.ff"})
    assert {row.name for row in found.sites} == wanted and not found.left


@pytest.mark.parametrize(
    ("name", "site", "blocks"),
    [
        ("list", "blocks.0..blocks.3", 4),
        ("sequential", "blocks.0..blocks.3", 4),
        ("dict", "blocks.b0..blocks.b3", 4),
        ("children", "one..four", 4),
        ("one beside a list", "before..blocks.3", 5),
        ("one several times", "block..block", 4),
        ("pairs, summed inside", "layers.0.0..layers.1.1", 4),
        ("streams in a dict", "blocks.0..blocks.3", 4),
        ("streams in a dataclass", "blocks.0..blocks.3", 4),
        ("long skips", "blocks.0..blocks.3", 4),
        ("values of the first", "blocks.0..blocks.3", 4),
    ],
)
def test_a_chain_is_all_of_it(name, site, blocks):
    found = ck.cache(Model(name).eval(), POLICIES["mask"][1]).explain(STEPS, *feed(0))
    assert [(row.name, row.modules) for row in found.sites] == [(site, blocks)]


@pytest.mark.compiles
@pytest.mark.parametrize("way", ["programs", "one graph"])
@pytest.mark.parametrize("policy", ["mask", "probe"])
@pytest.mark.parametrize(
    "name",
    ["sequential", "dict", "streams in a list", "streams in a nested", "streams in a dataclass", "values of the first"],
)
def test_compiled_it_is_the_same(name, policy, way):
    model = Model(name).eval()
    step = ck.cache(model, POLICIES[policy][1])
    wanted, _ = run(step, step.init(STEPS, *feed(0)))
    made = step.compile(backend="eager") if way == "programs" else torch.compile(step, fullgraph=True, backend="eager")
    outs, _ = run(made, (made if way == "programs" else step).init(STEPS, *feed(0)))
    for out, other in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, other)


ADVICE = re.compile(r"cachekit\.(?:taylorseer|Chain)\((?:[^()]|\([^()]*\))*\)")


class Bent(nn.Module):
    """A block whose result is no sum: nobody can see what it continues."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x, other):
        """New tokens."""
        return torch.tanh(self.mix(x, other))


class Lone(nn.Module):
    """One of them alone, or several in a row that are given what the others return, or something in between."""

    def __init__(self, blocks: int, between: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.between = nn.ModuleList(Bent() for _ in range(blocks)), between

    def forward(self, x, t):
        """The same shape."""
        other = x.cos()
        for block in self.blocks:
            x = block(x, other)
            x = x * 2 if self.between else x
        return x + t


class Told(Block):
    """A block that returns an object beside its tokens."""

    def forward(self, x):
        """Tokens and an object."""
        return super().forward(x), Closed(x, x)


class Scoring(Block):
    """A block that returns a score beside its tokens."""

    def forward(self, x):
        """Tokens and a number."""
        x = super().forward(x)
        return x, x.mean()


class Telling(nn.Module):
    """Blocks that return objects, with or without parts that could be left out instead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Told() for _ in range(2))

    def forward(self, x, t):
        """The same shape."""
        for block in self.blocks:
            x, _ = block(x + t)
        return x


class Collecting(nn.Module):
    """Blocks that return a number beside their tokens, which the model adds up, as a loss of experts is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Scoring() for _ in range(3))

    def forward(self, x, t):
        """The same shape."""
        collected = []
        for block in self.blocks:
            x, score = block(x)
            collected.append(score)
        return x + t + torch.stack(collected).sum()


REFUSED: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: Model(name)) for name in sorted(NO_CHAIN)},
    "one that bends": lambda: Lone(1, between=False),
    "two that bend, apart": lambda: Lone(2, between=True),
    "objects": Telling,
    "scores": Collecting,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_refusal_says_can_be_done_can_be_done(name):
    model = REFUSED[name]().eval()
    with pytest.raises(ck.StructureError) as refused:
        ck.cache(model, POLICIES["mask"][1]).init(STEPS, *feed(0))
    advice = ADVICE.findall(str(refused.value))
    assert advice, str(refused.value)
    for said in advice:
        made = eval(said, {"cachekit": ck})  # as a reader would paste it
        step = ck.cache(model, POLICIES["mask"][1], made) if isinstance(made, ck.Chain) else ck.cache(model, made)
        assert not all(check(model, step)), said


def test_a_dataclass_that_is_made_known_is_looked_into():
    @dataclasses.dataclass
    class Unknown:
        image: Tensor
        text: Tensor

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pack = Unknown, lambda found: (found.image, found.text)
            self.blocks = nn.ModuleList(Carrying(*pack) for _ in range(3))

        def forward(self, x, t):
            found = Unknown(x + t, x[:, :2])
            for block in self.blocks:
                found = block(found)
            return found.image

    model = Own().eval()
    with pytest.raises(ck.StructureError, match=r"register_dataclass\(Unknown\)"):
        ck.cache(model, POLICIES["mask"][1]).init(STEPS, *feed(0))
    pytree.register_dataclass(Unknown)
    assert not all(check(model, ck.cache(model, POLICIES["mask"][1])))


def test_a_stream_in_a_container_is_stated_by_its_place():
    model = Model("streams in a dict").eval()
    found = ck.cache(model, POLICIES["probe"][1])
    stated = ck.cache(model, POLICIES["probe"][1], ck.Chain("blocks", {0: (0, 0), 1: (0, 1)}))
    assert check(model, stated) == check(model, found)
    with pytest.raises(ck.ArgumentError, match=r"Its arguments are: \(0, 0\), \(0, 1\)"):
        ck.cache(model, POLICIES["probe"][1], ck.Chain("blocks", {0: 0})).init(STEPS, *feed(0))


def test_without_a_list_the_model_as_a_whole_can_be_left_out():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).eval()
    step = ck.cache(model, ck.step_mask([1, 0] * 3, sites="output"))
    state = step.init(STEPS, feed(0)[0])
    for index in range(STEPS):
        out, state = step(state, feed(index)[0])
        assert torch.equal(out, model(feed(index)[0])) == (index % 2 == 0)


@st.composite
def shapes(draw) -> Any:
    """A container of places for two streams, of whatever depth, with other values between them."""
    left, right = "image", "text"
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["list", "tuple", "dict", "beside", "swap"]))
        if kind == "list":
            left = [left]
        elif kind == "tuple":
            right = (right, 3)
        elif kind == "dict":
            left = {"a": left, "n": None}
        elif kind == "beside":
            right = ["x", right]
        else:
            left, right = right, left
    return draw(st.sampled_from([[left, right], (left, right), {"one": left, "other": right}]))


@given(shapes())
@settings(max_examples=20)
def test_however_deep_the_streams_lie(shape):
    def pack(image, text):
        return pytree.tree_map(lambda each: {"image": image, "text": text}.get(each, each), shape)

    def unpack(found):
        leaves = dict(zip(pytree.tree_leaves(shape), pytree.tree_leaves(found), strict=True))
        return leaves["image"], leaves["text"]

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Carrying(pack, unpack) for _ in range(3))

        def forward(self, x, t):
            found = pack(x + t, x[:, :2])
            for block in self.blocks:
                found = block(found)
            image, text = unpack(found)
            return image + text.mean(1, keepdim=True)

    with torch.no_grad():
        model = Deep().eval()
        for policy in ("mask", "probe"):
            step = ck.cache(model, POLICIES[policy][1])
            assert not all(check(model, step))
            assert {row.modules for row in step.explain(STEPS, *feed(0)).sites} <= {1, 2, 3}


MUTATIONS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], None], Callable[[Any], Tensor | float]]] = {
    "a key": (dict, lambda kept, x: kept.update(last=x), lambda kept: kept["last"]),
    "a list": (list, lambda kept, x: kept.append(x), lambda kept: kept[-1]),
    "a list inside": (lambda: {"all": []}, lambda kept, x: kept["all"].append(x), lambda kept: kept["all"][-1]),
    "a place": (lambda: [torch.zeros(())], lambda kept, x: kept.__setitem__(0, x), lambda kept: kept[0]),
    "a deque": (lambda: collections.deque(maxlen=1), lambda kept, x: kept.append(x), lambda kept: kept[0]),
    "a number": (lambda: {"n": 0}, lambda kept, _: kept.update(n=kept["n"] + 1), lambda kept: float(kept["n"])),
    "an attribute": (
        lambda: Open(torch.zeros(()), torch.zeros(())),
        lambda kept, x: setattr(kept, "image", x),
        lambda kept: kept.image,
    ),
}


@dataclasses.dataclass
class Open:
    """Streams in a class that can be written to."""

    image: Tensor
    text: Tensor


pytree.register_dataclass(Open)


class Keeping(Block):
    """A block that keeps its tokens in what it was given."""

    def __init__(self, keep: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x, kept):
        """Tokens."""
        x = super().forward(x)
        self.keep(kept, x)
        return x


class Kept(nn.Module):
    """Blocks that do, and a head that reads what was kept."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, keep, self.read = MUTATIONS[name]
        self.blocks = nn.ModuleList(Keeping(keep) for _ in range(3))

    def forward(self, x, t):
        """The same shape."""
        kept, x = self.make(), x + t
        for block in self.blocks:
            x = block(x, kept)
        return x + self.read(kept)


@pytest.mark.parametrize("policy", ["mask", "probe"])
@pytest.mark.parametrize("name", MUTATIONS)
def test_what_blocks_keep_in_a_container_is_not_left_out(name, policy):
    model = Kept(name).eval()
    with pytest.raises(ck.StructureError, match=r"blocks\.[01] .* writes to its argument 1") as refused:
        ck.cache(model, POLICIES[policy][1]).init(STEPS, *feed(0))
    assert 'sites="output"' in str(refused.value)
    assert not all(check(model, ck.cache(model, POLICIES["parts"][1])))


@pytest.mark.compiles
@pytest.mark.parametrize("name", MUTATIONS)
def test_one_graph_of_blocks_that_keep_something_is_right_or_says_why_not(name):
    model = Kept(name).eval()
    step = ck.cache(model, POLICIES["parts"][1])
    wanted, _ = run(step, step.init(STEPS, *feed(0)))
    graph = torch.compile(step, fullgraph=True, backend="eager")
    if name == "an attribute" and FORGETFUL:
        said = r"(?s)blocks\.0 writes to its argument 1 \(Open\), and inside one graph .* Use step\.compile\(\)"
        with torch.no_grad(), pytest.raises(Exception, match=said):
            graph(step.init(STEPS, *feed(0)), *feed(0))
        made = step.compile(backend="eager")
        outs, _ = run(made, made.init(STEPS, *feed(0)))
    else:
        outs, _ = run(graph, step.init(STEPS, *feed(0)))
    for out, other in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, other)


class Written(nn.Module):
    """Blocks that are given one dict (or list), in which the model puts another value for each of them."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))
        self.kind = kind

    def forward(self, x, t):
        """Tokens."""
        given = {0: None} if self.kind is dict else [None]
        for n, block in enumerate(self.blocks):
            given[0] = 1.0 + n
            x = block(x, given) + 0.0 * t
        return x


class Scaled(nn.Module):
    """A network whose output counts as much as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = feed_forward()

    def forward(self, x, given):
        """Tokens."""
        return x + 0.1 * given[0] * self.ff(x)


@pytest.mark.parametrize("kind", [dict, list])
@pytest.mark.parametrize("way", ["eager", pytest.param("programs", marks=pytest.mark.compiles)])
def test_what_a_block_was_given_in_a_container_is_what_it_gets(kind, way):
    model = Written(kind).eval()
    plain = [model(*feed(index)) for index in range(4)]
    for policy in (ck.step_mask([1, 1, 0, 1]), ck.first_block_cache(0.0)):
        step = ck.cache(model, policy)
        call = step if way == "eager" else step.compile(backend="eager")
        state = call.init(4, *feed(0))
        for index in range(4):
            out, state = call(state, *feed(index))
            if ck.summary(state).computed[index]:
                torch.testing.assert_close(out, plain[index], rtol=0, atol=0 if way == "eager" else 1e-6)


class Net(nn.Module):
    """A network of two products: of pooled tokens, of every token, or of what is embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.net = feed_forward()

    def forward(self, x):
        """The same shape."""
        return self.net(x)


class Conditioned(nn.Module):
    """Blocks, with such networks before, between and after them."""

    def __init__(self, blocks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.text, self.out = Net(), Net(), Net()
        self.aux = nn.ModuleList(Net() for _ in range(3))
        self.heads = nn.ModuleDict({"a": Net(), "b": Net()})
        self.first = nn.Sequential(Net(), Net())
        make = (
            {"blocks": nn.ModuleList(Block() for _ in range(3))}
            if blocks
            else {n: Block() for n in ("one", "two", "six")}
        )
        for name, module in make.items():
            self.add_module(name, module)
        self.listed = blocks

    def forward(self, x, t):
        """The same shape."""
        pooled = self.text(x.mean(1) + t)
        x = self.first(self.embed(x))
        for n, block in enumerate(self.blocks if self.listed else (self.one, self.two, self.six)):
            pooled = self.aux[n](pooled)
            x = block(x + pooled[:, None])
        return self.heads["a"](self.out(x)) + self.heads["b"](x)


@pytest.mark.parametrize("listed", [True, False])
def test_networks_that_embed_or_modulate_are_no_blocks(listed):
    model, where = Conditioned(listed).eval(), ("blocks.*",) if listed else ("one", "two", "six")
    led = ck.cache(model, POLICIES["probe"][1]).explain(STEPS, *feed(0))
    assert led.leader.startswith("blocks.0 " if listed else "one ")
    found = ck.cache(model, POLICIES["parts"][1]).explain(STEPS, *feed(0))
    assert {row.name for row in found.sites} == {
        f"{kind}.{part}" for name in where for kind, part in ((f"spatial: {name}", "attn"), (f"mlp: {name}", "ff"))
    }
