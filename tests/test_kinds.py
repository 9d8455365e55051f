"""What a module is, is told by what it does to data: not by its name, and not by which operators torch has heard of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import cachekit as ck
from cachekit.running.shadow import block_paths
from cachekit.structure.discovery import Twin
from cachekit.structure.parts import part_paths

WIDTH, TOKENS = 16, 6
STEPS = 6


@torch.library.custom_op("cachekit_tests::blend", mutates_args=())
def blend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """An attention that torch has never heard of, and whose name does not tell."""
    return functional.scaled_dot_product_attention(query, key, value).clone()


@torch.library.custom_op("cachekit_tests::fmha_fwd", mutates_args=())
def fmha_fwd(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One whose name does, on tokens without heads."""
    return functional.scaled_dot_product_attention(query, key, value).clone()


@torch.library.custom_op("cachekit_tests::packed", mutates_args=())
def packed(x: Tensor, weight: Tensor) -> Tensor:
    """A product with a weight of two numbers a byte."""
    numbers = torch.stack((weight & 15, weight >> 4), -1).flatten(-2).to(x.dtype) / 8 - 1
    return x @ numbers.t()


@torch.library.custom_op("cachekit_tests::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor) -> Tensor:
    """No product: a norm with a weight."""
    return functional.rms_norm(x, (x.shape[-1],), weight).clone()


blend.register_fake(lambda query, key, value: torch.empty_like(query))
fmha_fwd.register_fake(lambda query, key, value: torch.empty_like(query))
packed.register_fake(lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]))
scaled.register_fake(lambda x, weight: torch.empty_like(x))


def heads(x: Tensor) -> Tensor:
    """[B, L, D] -> [B, 2, L, D / 2]."""
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two products and a softmax."""
    return (query @ key.transpose(-1, -2)).softmax(-1) @ value


CORES: dict[str, Callable[..., Tensor]] = {
    "torch's": functional.scaled_dot_product_attention,
    "by hand": by_hand,
    "unknown": blend,
    "unknown, by its name": fmha_fwd,
}


class Core(nn.Module):
    """Attention of what has been projected outside, in a module with another one in it."""

    def __init__(self, core: str) -> None:
        super().__init__()
        self.core, self.dropout = core, nn.Dropout(0.0)

    def forward(self, query, key, value):
        """Mixed tokens."""
        return self.dropout(CORES[self.core](query, key, value))


class Attention(nn.Module):
    """Attention to itself, or to a text."""

    def __init__(self, core: str, layer: str, *, inner: bool) -> None:
        super().__init__()
        self.q, self.out = (LAYERS[layer](WIDTH, WIDTH) for _ in range(2))
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.Sequential(nn.LayerNorm(WIDTH))
        self.attend = Core(core) if inner else CORES[core]

    def forward(self, x, text=None):
        """The same shape."""
        x = self.norm(x)
        query, (key, value) = self.q(x), self.kv(x if text is None else text).chunk(2, -1)
        mixed = self.attend(heads(query), heads(key), heads(value))
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Packed(nn.Module):
    """A layer of four bits."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(0, 256, (out, width // 2), dtype=torch.uint8))

    def forward(self, x):
        """[..., width] -> [..., out]."""
        return packed(x, self.weight)


class Integer(nn.Module):
    """A layer of eight bits, with a product that torch does not count."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-128, 127, (width, out), dtype=torch.int8))

    def forward(self, x):
        """[..., width] -> [..., out]."""
        flat = (x.flatten(0, -2) * 16).clamp(-127, 127).to(torch.int8)
        return torch._int_mm(flat, self.weight).to(x.dtype).unflatten(0, x.shape[:-1]) / 2048


class Adapted(nn.Module):
    """A layer with an adapter of low rank: two products in a row and nothing between them that bends."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(width, out), nn.Linear(width, 2), nn.Linear(2, out)

    def forward(self, x):
        """[..., width] -> [..., out]."""
        return self.base(x) + self.up(self.down(x)) * 0.5


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": nn.Linear,
    "four bits": Packed,
    "eight bits": Integer,
    "adapted": Adapted,
}


class Feed(nn.Module):
    """A feed-forward network."""

    def __init__(self, layer: str, *, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.up, self.down = LAYERS[layer](WIDTH, 4 * WIDTH), LAYERS[layer]((2 if gated else 4) * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        """The same shape."""
        x = self.up(self.norm(x))
        if self.gated:
            x, gate = x.chunk(2, -1)
            return self.down(x * functional.silu(gate))
        return self.down(functional.gelu(x))


class AdaLN(nn.Module):
    """A norm with shift and scale from a condition of the same shape: products, but none behind another one."""

    def __init__(self, *, deep: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.before = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) if deep else nn.Sequential(nn.LayerNorm(WIDTH))
        self.gain, self.shift = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, condition):
        """The same shape."""
        condition = self.before(condition)
        return self.norm(x) * torch.sigmoid(self.gain(condition)) + self.shift(condition)


class Normed(nn.Module):
    """A norm of an operator that torch has never heard of, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.last = nn.Sequential(nn.LayerNorm(WIDTH))

    def forward(self, x):
        """The same shape."""
        return self.last(scaled(torch.tanh(scaled(x, self.one)), self.other))


class Block(nn.Module):
    """Each of these once."""

    def __init__(self, core: str, layer: str, *, inner: bool, deep: bool, gated: bool) -> None:
        super().__init__()
        self.own, self.cross = (Attention(core, layer, inner=inner) for _ in range(2))
        self.feed, self.modulated, self.normed = Feed(layer, gated=gated), AdaLN(deep=deep), Normed()

    def forward(self, x, text, condition):
        """New tokens."""
        x = x + self.own(self.modulated(x, condition))
        x = x + self.cross(x, text)
        return x + self.feed(self.normed(x))


class Model(nn.Module):
    """A loop over blocks."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(*args, **kwargs) for _ in range(2))

    def forward(self, x, text):
        """New tokens."""
        condition = x * 0.5
        for block in self.blocks:
            x = block(x, text, condition)
        return x


def feed(index: int = 0) -> tuple[Tensor, Tensor]:
    """The arguments of a step; more than 16 rows, for `_int_mm`."""
    draw = torch.Generator().manual_seed(0)
    x, way = (torch.randn(4, TOKENS, WIDTH, generator=draw) for _ in range(2))
    return x + 0.1 * index * way, torch.randn(4, 3, WIDTH, generator=draw)


def kinds(model: nn.Module) -> dict[str, str]:
    """Module of the first block -> what it is found to be, where it is anything."""
    paths = block_paths(model)
    record = Twin(model, paths, part_paths(model, paths, "attention+mlp"), feed(), {}, torch.device("cpu")).record()
    found = {part.call.path: part.kind for part in record.parts if part.kind}
    return {path.removeprefix("blocks.0."): kind for path, kind in found.items() if path.startswith("blocks.0.")}


@settings(max_examples=20)
@given(
    core=st.sampled_from(sorted(CORES)),
    layer=st.sampled_from(sorted(LAYERS)),
    inner=st.booleans(),
    deep=st.booleans(),
    gated=st.booleans(),
)
def test_modules_are_what_they_do(core, layer, inner, deep, gated):
    model = Model(core, layer, inner=inner, deep=deep, gated=gated).eval()
    assert kinds(model) == {"own": "spatial", "cross": "cross", "feed": "mlp"}


def test_what_an_attention_returns_beside_its_tokens_is_made_known_as_the_message_says():
    @dataclasses.dataclass
    class Notes:
        mean: Tensor

    class Noted(Attention):
        def forward(self, x, text=None):
            """The same shape, and what nobody reads."""
            out = super().forward(x, text)
            return out, Notes(out.mean())

    class Layer(Block):
        def forward(self, x, text, condition):
            """New tokens."""
            x = x + self.own(x)[0]
            x = x + self.cross(x, text)[0]
            return x + self.feed(x)

    model = Model("torch's", "plain", inner=False, deep=False, gated=False).eval()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = layer = Layer("torch's", "plain", inner=False, deep=False, gated=False)
        layer.own, layer.cross = (Noted("torch's", "plain", inner=False) for _ in range(2))
        layer.feed = block.feed
    model.eval()
    policy = ck.pyramid_attention_broadcast(2, cross=2, spatial_range=(-1, 1001), cross_range=(-1, 1001))
    times = [900.0 - 100 * n for n in range(STEPS)]
    with torch.no_grad():
        with pytest.raises(ck.StructureError, match=r"of class Notes.*register_dataclass\(Notes\)") as refused:
            ck.cache(model, policy).init(times, *feed())
        assert "Name modules" not in str(refused.value)
        torch.utils._pytree.register_dataclass(Notes)
        step = ck.cache(model, policy)
        assert {site.name: site.modules for site in step.explain(times, *feed()).sites} == {
            "spatial: blocks.*.own": 2,
            "cross: blocks.*.cross": 2,
        }
        out, _ = step(step.init(times, *feed()), *feed())
        assert torch.equal(out, model(*feed()))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("core", CORES)
def test_every_method_finds_them_and_computes_what_the_model_does(core, layer):
    model = Model(core, layer, inner=True, deep=True, gated=False).eval()
    methods = {
        "taylorseer": (ck.taylorseer(1), ck.taylorseer(3, warmup=1), 6),
        "pab": (
            ck.pyramid_attention_broadcast(1, cross=1, spatial_range=(-1, 1001)),
            ck.pyramid_attention_broadcast(2, cross=3, spatial_range=(-1, 1001), cross_range=(-1, 1001)),
            4,
        ),
    }
    with torch.no_grad():
        for every, some, expected in methods.values():
            for policy, skips in ((every, False), (some, True)):
                step = ck.cache(model, policy)
                state = step.init([900.0 - 100 * n for n in range(STEPS)], *feed())
                sites = step.explain([900.0 - 100 * n for n in range(STEPS)], *feed()).sites
                assert sum(site.modules for site in sites) == expected
                for index in range(STEPS):
                    out, state = step(state, *feed(index))
                    assert skips or torch.equal(out, model(*feed(index)))
                assert all(ck.summary(state).computed) != skips


class Learned(nn.Module):
    """Queries of the module's own ask the tokens, as in a resampler."""

    def __init__(self, *, weights: bool, inside: bool) -> None:
        super().__init__()
        self.weights = weights
        self.queries = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.ask = Attention("by hand", "plain", inner=False) if inside else nn.MultiheadAttention(WIDTH, 2)
        self.feed = Feed("plain")

    def forward(self, x, *_):
        """New tokens."""
        queries = self.queries.expand(x.shape[0], -1, -1)
        if isinstance(self.ask, Attention):
            found = self.ask(queries, x)
        else:
            found, _ = self.ask(
                queries.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), need_weights=self.weights
            )
            found = found.transpose(0, 1)
        return self.feed(x + found.mean(1, keepdim=True))


@pytest.mark.parametrize(("weights", "inside"), [(True, False), (False, False), (False, True)])
def test_learned_queries_attend_too(weights, inside):
    model = Model("torch's", "plain", inner=False, deep=False, gated=False)
    model.blocks = nn.ModuleList(Learned(weights=weights, inside=inside) for _ in range(2))
    assert kinds(model.eval()) == {"ask": "cross", "feed": "mlp"}


class Grouped(nn.Module):
    """Feed-forward networks side by side, whose weights it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Sequential(nn.GELU())

    def forward(self, x, up, down):
        """[B, L, D] -> [B, L, D], a network each for every entry of the batch."""
        return self.act(x @ up) @ down


class Experts(nn.Module):
    """The weights, and what multiplies with them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, *shape) / 8) for shape in ((WIDTH, 32), (32, WIDTH)))
        self.grouped = Grouped()

    def forward(self, x, *_):
        """New tokens."""
        return x + self.grouped(x, self.up, self.down)


def test_weights_that_a_module_is_given_are_no_queries():
    model = Model("torch's", "plain", inner=False, deep=False, gated=False)
    model.blocks = nn.ModuleList(Experts() for _ in range(2))
    assert kinds(model.eval()) == {"grouped": "mlp"}


@torch.library.custom_op("cachekit_tests::turned", mutates_args=())
def turned(x: Tensor, weight: Tensor) -> Tensor:
    """A product that shapes do not tell: it returns another layout."""
    return (x @ weight).transpose(0, 1).clone()


@torch.library.custom_op("cachekit_tests::flat", mutates_args=())
def flat(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """An attention that shapes do not tell, under a name that does not: of tokens without a batch."""
    return torch.stack([functional.scaled_dot_product_attention(*each) for each in zip(query, key, value, strict=True)])


turned.register_fake(lambda x, weight: x.new_empty(x.shape[1], x.shape[0], weight.shape[1]))
flat.register_fake(lambda query, key, value: torch.empty_like(query))


class Wide(nn.Module):
    """A block of one product with a weight."""

    def __init__(self, layer: str, width: int) -> None:
        super().__init__()
        self.up = LAYERS[layer](WIDTH, width) if layer in LAYERS else nn.Linear(WIDTH, WIDTH)
        self.width, self.turned = width, layer == "turned"
        self.rest = nn.Parameter(torch.randn(WIDTH, width if self.turned else 1))

    def forward(self, x):
        """New tokens."""
        if self.turned:
            return x + turned(x, self.rest).transpose(0, 1)[..., :WIDTH] * 0.1
        return x + self.up(x)[..., :WIDTH] * 0.1


class Lists(nn.Module):
    """Two lists one after the other, the second one with the wider layers."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow = nn.ModuleList(Wide("plain", WIDTH) for _ in range(3))
        self.wide = nn.ModuleList(Wide(layer, 8 * WIDTH) for _ in range(3))

    def forward(self, x, text):
        """New tokens; after the first list another input joins them."""
        for block in self.narrow:
            x = block(x)
        x = x + text.mean(1, keepdim=True)
        for block in self.wide:
            x = block(x)
        return x


@pytest.mark.parametrize("layer", ["plain", "four bits", "eight bits", "turned"])
def test_the_leading_chain_is_weighed_whatever_its_products_are(layer):
    explained = ck.cache(Lists(layer).eval(), ck.first_block_cache(0.1)).explain(STEPS, *feed())
    assert explained.leader is not None
    assert explained.leader.startswith("wide.0..wide.2")
    by_parameters = "what some of them multiply is not known" in explained.leader
    assert by_parameters == (layer == "turned")


class Flat(nn.Module):
    """An attention that nothing tells from a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        """The same shape."""
        return self.out(flat(*self.qkv(x).chunk(3, -1)))


class Mixed(nn.Module):
    """A block with that attention."""

    def __init__(self, *, feeds: bool) -> None:
        super().__init__()
        self.own = Flat()
        self.feed = Feed("plain") if feeds else nn.Identity()

    def forward(self, x, *_):
        """New tokens."""
        x = x + self.own(x)
        return x + self.feed(x)


@pytest.mark.parametrize("feeds", [True, False])
def test_what_is_not_seen_is_said_and_doing_as_told_finds_it(feeds):
    model = Model("torch's", "plain", inner=False, deep=False, gated=False)
    model.blocks = nn.ModuleList(Mixed(feeds=feeds) for _ in range(2))
    said = r"blocks\.\*: no attention is seen, but cachekit_tests::flat, of which nothing is known"
    if feeds:
        (left,) = ck.cache(model.eval(), ck.taylorseer(3)).explain(STEPS, *feed()).left
    else:
        with pytest.raises(ck.StructureError, match=said) as refused:
            ck.cache(model.eval(), ck.taylorseer(3)).init(STEPS, *feed())
        left = str(refused.value)
    assert re.search(said, left)
    named = ck.taylorseer(3, sites=(r".*\.own", r".*\.feed") if feeds else (r".*\.own",))
    explained = ck.cache(model, named).explain(STEPS, *feed())
    assert sum(site.modules for site in explained.sites) == (4 if feeds else 2)
    assert not explained.left
