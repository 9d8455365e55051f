"""PyTorch's own layers are models too, in eval mode as well, where it runs a whole layer as one operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cachekit as ck

WIDTH, HEADS, STEPS = 16, 2, 6
ALWAYS = (-1.0, 1001.0)
TIMES = [float(t) for t in range(900, 300, -100)]


class Block(nn.Module):
    """A layer of one's own, of nn.MultiheadAttention and nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        """The same shape."""
        h = self.before(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.ff(self.between(x))


def encoder_layer(**more) -> nn.Module:
    """One that runs as one operator."""
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, **more)


class Listed(nn.Module):
    """A list of them."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(make() for _ in range(3)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, t):
        """The same shape."""
        x = x + t
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Encoder(nn.Module):
    """A whole nn.TransformerEncoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.TransformerEncoder(encoder_layer(), 3), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, t, mask=None):
        """The same shape."""
        return self.head(self.inner(x + t, src_key_padding_mask=mask))


class Decoder(nn.Module):
    """A whole nn.TransformerDecoder, with an observation to look at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True)
        self.inner, self.head = nn.TransformerDecoder(layer, 3), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.randn(2, 4, WIDTH))

    def forward(self, x, t):
        """The same shape."""
        return self.head(self.inner(x + t, self.seen))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MultiheadAttention": lambda: Listed(Block),
    "EncoderLayer": lambda: Listed(encoder_layer),
    "EncoderLayer, norm first, gelu": lambda: Listed(lambda: encoder_layer(norm_first=True, activation="gelu")),
    "EncoderLayer, of its own activation": lambda: Listed(lambda: encoder_layer(activation=torch.tanh)),
    "Encoder": Encoder,
    "Decoder": Decoder,
}
PARTS = {"MultiheadAttention": {"spatial": "attn", "mlp": "ff"}}
PARTS["Decoder"] = {"spatial": "self_attn", "cross": "multihead_attn", "mlp": "_ff_block"}
METHODS: dict[str, tuple[ck.Policy, ck.Policy]] = {
    "first_block_cache": (ck.first_block_cache(0.0), ck.first_block_cache(1e9, max_skips=1)),
    "mag_cache": (
        ck.mag_cache([1.0] * STEPS, max_skips=0),
        ck.mag_cache([1.0] * STEPS, threshold=1.0, max_skips=2, retention=0.2),
    ),
    "taylorseer": (ck.taylorseer(1), ck.taylorseer(2, warmup=1)),
    "pyramid_attention_broadcast": (
        ck.pyramid_attention_broadcast(1, cross=1, spatial_range=ALWAYS, cross_range=ALWAYS),
        ck.pyramid_attention_broadcast(2, cross=2, spatial_range=ALWAYS, cross_range=ALWAYS),
    ),
    "faster_cache": (
        ck.faster_cache(attention=1, cfg=None),
        ck.faster_cache(attention=2, attention_range=ALWAYS, cfg=None),
    ),
}


def feed(index: int) -> tuple[Tensor, Tensor]:
    """The arguments of a step."""
    noise = torch.Generator().manual_seed(3)
    x, drift = (torch.randn(2, 5, WIDTH, generator=noise) for _ in range(2))
    return x + 0.1 * index * drift, torch.tensor(0.9 - 0.1 * index)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run(step: ck.CachedStep) -> tuple[list[Tensor], ck.State]:
    """The outputs of a trajectory, and its last state."""
    state, outs = step.init(TIMES, *feed(0)), []
    for index in range(STEPS):
        out, state = step(state, *feed(index))
        outs.append(out)
    return outs, state


@pytest.mark.filterwarnings("ignore:.*decides about cross")  # which the decoder alone has
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_every_method_works_and_computes_what_the_model_does(name, method, mode):
    model = MODELS[name]().train(mode == "train")
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            module.train(False) if isinstance(module, nn.Dropout) else setattr(module, "dropout", 0.0)
    exact, skipping = METHODS[method]
    for index, out in enumerate(run(ck.cache(model, exact))[0]):
        assert torch.equal(out, model(*feed(index)))
    outs, state = run(ck.cache(model, skipping))
    pattern = ck.summary(state).computed
    assert not all(pattern)
    for index, computed in enumerate(pattern):
        assert torch.equal(outs[index], model(*feed(index))) == computed


@pytest.mark.parametrize("name", MODELS)
def test_attention_and_feed_forward_networks_are_found(name):
    model = MODELS[name]().eval()
    where = "blocks" if isinstance(model, Listed) else "inner.layers"
    parts = PARTS.get(name, {"spatial": "self_attn", "mlp": "_ff_block"})
    found = ck.cache(model, ck.taylorseer(2)).explain(TIMES, *feed(0))
    assert {row.name: row.modules for row in found.sites} == {
        f"{kind}: {where}.*.{part}": 3 for kind, part in parts.items()
    }
    assert found.faked


@pytest.mark.compiles
@pytest.mark.parametrize("way", ["programs", "one graph", "regional"])
@pytest.mark.parametrize("name", ["EncoderLayer", "Decoder"])
def test_compiled_it_is_the_same(name, way):
    model = MODELS[name]().eval()
    step = ck.cache(model, METHODS["taylorseer"][1])
    wanted, _ = run(step)
    if way == "one graph":
        state, compiled, outs = step.init(TIMES, *feed(0)), torch.compile(step, fullgraph=True, backend="eager"), []
        for index in range(STEPS):
            out, state = compiled(state, *feed(index))
            outs.append(out)
    else:
        outs, _ = run(step.compile(backend="eager", regional=way == "regional"))
    for out, other in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, other)


def test_a_method_follows_what_is_written_to_its_layer():
    model = Listed(encoder_layer).eval()
    step = ck.cache(model, METHODS["taylorseer"][1])
    state = step.init(TIMES, *feed(0))
    _, state = step(state, *feed(0))
    for block in model.blocks:
        block.activation = torch.tanh
        block.activation_relu_or_gelu = 0
    out, _ = step(step.init(TIMES, *feed(0)), *feed(1))
    assert torch.equal(out, model(*feed(1)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_tokens_are_refused_with_what_can_be_done_about_it():
    model, mask = Encoder().eval(), torch.arange(5)[None] >= torch.tensor([[3], [5]])
    step = ck.cache(model, ck.step_mask([1, 0] * 3))
    with pytest.raises(ck.StructureError, match="use_nested_tensor = False"):
        step(step.init(STEPS, *feed(0), mask=mask), *feed(0), mask=mask)
    model.inner.use_nested_tensor = False
    out, _ = step(step.init(STEPS, *feed(0), mask=mask), *feed(0), mask=mask)
    assert torch.equal(out, model(*feed(0), mask=mask))
    inside = ck.cache(model, ck.taylorseer(1))
    out, _ = inside(inside.init(STEPS, *feed(0), mask=mask), *feed(0), mask=mask)
    torch.testing.assert_close(out, model(*feed(0), mask=mask))  # with a mask the one operator rounds otherwise


def test_of_a_layer_of_which_nothing_inside_is_a_site_the_one_operator_runs():
    names = set()

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.name())
            return func(*args, **(kwargs or {}))

    step = ck.cache(Listed(encoder_layer).eval(), ck.step_mask([1, 0] * 3))
    state = step.init(TIMES, *feed(0))
    with Seen():
        step(state, *feed(0))
    assert "aten::_transformer_encoder_layer_fwd" in names


class Gated(nn.TransformerEncoderLayer):
    """A feed-forward network of one's own, which PyTorch calls in train mode alone."""

    def _ff_block(self, x):
        return 0.5 * super()._ff_block(x)


@pytest.fixture
def as_children():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def own_feed_forward() -> nn.Module:
    """A list of them."""
    return Listed(lambda: Gated(WIDTH, HEADS, 2 * WIDTH, batch_first=True)).eval()


def test_a_method_that_eval_mode_passes_by_is_refused():
    model = own_feed_forward()
    with pytest.raises(
        ck.StructureError, match=r"blocks\.0 \(Gated\) has a _ff_block of its own.*set_fastpath_enabled"
    ):
        ck.cache(model, ck.taylorseer(1)).init(TIMES, *feed(0))
    outs, _ = run(ck.cache(model, METHODS["first_block_cache"][0]))
    assert torch.equal(outs[0], model(*feed(0)))


def test_autocast_that_the_one_operator_passes_by_is_refused():
    model = Listed(encoder_layer).eval()
    with torch.autocast("cpu", torch.bfloat16):
        for policy in (METHODS["first_block_cache"][0], ck.taylorseer(1)):
            with pytest.raises(ck.StructureError, match=r"for which autocast does not hold.*set_fastpath_enabled"):
                ck.cache(model, policy).init(TIMES, *feed(0))
        outs, _ = run(ck.cache(model, ck.taylorseer(1, sites="output")))
        assert torch.equal(outs[0], model(*feed(0)))


@pytest.mark.usefixtures("as_children")
def test_without_the_one_operator_both_work():
    model = own_feed_forward()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for policy in (METHODS["first_block_cache"][0], ck.taylorseer(1)):
                for index, out in enumerate(run(ck.cache(model, policy))[0]):
                    assert torch.equal(out, model(*feed(index)))
