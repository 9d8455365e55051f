"""TaylorSeer, Pyramid Attention Broadcast and sites by name: the published rules, and what does not fit."""

from __future__ import annotations

import re

import byhand
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_grid import STEPS, feed
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import cachekit as ck

TIMES = [980.0, 900.0, 800.0, 690.0, 600.0, 500.0, 400.0, 280.0, 150.0, 60.0]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run(step, timesteps=STEPS):
    """The outputs of a trajectory, and its last state."""
    state, outputs = step.init(timesteps, *feed(0)), []
    for index in range(STEPS):
        out, state = step(state, *feed(index))
        outputs.append(out)
    return outputs, state


@given(
    interval=st.integers(1, 7),
    warmup=st.integers(0, 5),
    end=st.none() | st.integers(0, 20),
    semantics=st.sampled_from(["paper", "diffusers"]),
)
def test_taylorseer_computes_when_it_is_published_to(interval, warmup, end, semantics):
    policy = ck.taylorseer(interval, warmup=warmup, cooldown_after=end, semantics=semantics)
    for step, computed in enumerate(ck.deciders.plan(policy.decider, 20)):
        regular = (step - warmup + (1 if semantics == "paper" else -1)) % interval == 0
        assert computed == (step == 0 or step < warmup or regular or (end is not None and step >= end))


@given(
    every=st.integers(1, 6),
    times=st.lists(st.integers(0, 1000), min_size=1, max_size=20).map(lambda drawn: sorted(drawn, reverse=True)),
    low=st.integers(-1, 500),
    width=st.integers(1, 600),
)
def test_pyramid_attention_broadcast_computes_when_it_is_published_to(every, times, low, width):
    policy = ck.pyramid_attention_broadcast(every, cross=2 * every, spatial_range=(low, low + width))
    for step, computed in enumerate(ck.deciders.plan(policy.deciders["spatial"], times)):
        assert computed == (step % every == 0 or not low < times[step] < low + width)
    for step, computed in enumerate(ck.deciders.plan(policy.deciders["cross"], times)):
        assert computed == (step % (2 * every) == 0 or not 100 < times[step] < 800)


@pytest.mark.parametrize("basis", ["taylor", "newton"])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("sites", ["attention+mlp", "attention", "mlp", "chain", "output"])
def test_taylorseer_is_its_formula(sites, order, basis):
    model = byhand.shared()
    policy = ck.taylorseer(3, warmup=2, order=order, basis=basis, sites=sites)
    outputs, state = run(ck.cache(model, policy))
    forecast = {"taylor": byhand.taylor, "newton": byhand.newton}[basis](order)
    cache = byhand.Cache(model, sites, forecast, ck.deciders.plan(policy.decider, STEPS))
    for index, out in enumerate(outputs):
        torch.testing.assert_close(out, cache(*feed(index)), atol=2e-4, rtol=2e-4)
    # order + 1 tensors a site, and no copy.
    values = {"attention+mlp": 9, "attention": 6, "mlp": 3, "chain": 1, "output": 1}[sites]
    size = 2 * byhand.IMAGE * (byhand.CHANNELS if sites == "output" else byhand.WIDTH) * 4
    held = sum(leaf.numel() * 4 for leaf in torch.utils._pytree.tree_leaves(state.sites) if leaf.ndim > 1)
    assert held == values * (order + 1) * size


def test_pyramid_attention_broadcast_is_its_rule():
    model = byhand.net()
    policy = ck.pyramid_attention_broadcast(2, cross=3, mlp=4, cross_range=(0, 700))
    step = ck.cache(model, policy)
    outputs, _ = run(step, TIMES)
    plan = step.plan(TIMES)
    assert plan is not None and plan.actions == len(set(zip(*plan.kinds.values(), strict=True))) > 3
    caches = [byhand.Cache(model, "none", byhand.hold, [True] * STEPS)]
    reference = caches[0].model
    kinds = {"spatial": "attn", "cross": "cross", "mlp": "mlp"}
    for kind, name in kinds.items():
        caches.append(byhand.Cache(byhand.net(), "none", byhand.hold, plan.kinds[kind]))
        for block in reference.blocks:
            setattr(block, name, byhand.Held(getattr(block, name), caches[-1]))
    for index, out in enumerate(outputs):
        for cache in caches:
            cache.step, cache.computing = index, cache.plan[index]
        torch.testing.assert_close(out, reference(*feed(index)), atol=2e-4, rtol=2e-4)


def test_sites_by_name():
    model = byhand.net()
    for patterns, found in (
        (
            (r"blocks\.[01]\.attn", r".*\.mlp"),
            {"blocks.0.attn", "blocks.1.attn", *(f"blocks.{n}.mlp" for n in range(3))},
        ),
        ((r".*\.attn\.query",), {f"blocks.{n}.attn.query" for n in range(3)}),
        ((r".*\.attn", r".*\.attn\.query"), {f"blocks.{n}.attn" for n in range(3)}),  # what lies in a site is none
        (("head",), {"head"}),
        ((r"blocks\.2",), {"blocks.2"}),
    ):
        policy = ck.Policy("named", ck.deciders.interval(3), ck.forecasters.hold(), sites=patterns)
        outputs, state = run(ck.cache(model, policy))
        assert set(state.sites) == found
        changed = [not torch.equal(out, model(*feed(index))) for index, out in enumerate(outputs)]
        assert changed == [index % 3 != 0 for index in range(STEPS)]
    by_kind = {"spatial": r".*\.cross", "mlp": r".*\.mlp"}
    step = ck.cache(model, ck.pyramid_attention_broadcast(2, mlp=3, patterns=by_kind))
    _, state = run(step, TIMES)
    assert set(state.sites) == {f"blocks.{n}.{name}" for n in range(3) for name in ("cross", "mlp")}
    assert "spatial: blocks.*.cross" in str(step.explain(TIMES, *feed(0)))


class Strange(nn.Module):
    """Attention that leaves its output behind, one that writes to its argument, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(2)])

    def forward(self, x, t, text):
        """The tokens."""
        for block in self.blocks:
            x = block(x)
        return x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaving, self.writing, self.twice = (Strange.Attention(kind) for kind in ("leave", "write", "twice"))

        def forward(self, x):
            return self.twice(self.twice(self.writing(x + self.leaving(x)) + 0))

    class Attention(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind, self.inside = kind, nn.Linear(4, 4)

        def forward(self, x):
            if self.kind == "write":
                x += 1
            out = self.inside(scaled_dot_product_attention(x, x, x))
            if self.kind == "leave":
                self.last = out
            return out


def test_what_cannot_be_left_out_always_runs_and_is_said():
    model = Strange()
    policy = ck.Policy("all", ck.deciders.interval(2), ck.forecasters.hold(), sites="attention")
    step = ck.cache(model, policy)
    said = str(step.explain(STEPS, *feed(0)))
    assert "always runs: blocks.0.leaving: it leaves 'last' behind" in said
    assert "always runs: blocks.1.writing: it writes to its argument 0" in said
    state = step.init(STEPS, *feed(0))
    assert list(state.sites) == ["blocks.0.twice", "blocks.0.twice#1", "blocks.1.twice", "blocks.1.twice#1"]
    for index in range(4):
        out, state = step(state, *feed(index))
        assert torch.equal(out, model(*feed(index))) == (index % 2 == 0)


def test_bytes_and_plan_are_said_before_anything_runs():
    step = ck.cache(byhand.shared(), ck.taylorseer(3, warmup=2))
    said = str(step.explain(STEPS, *feed(0)))
    _, state = run(step)
    total = re.search(r"total state: .* \((\d+) bytes\)", said)
    assert total and int(total[1]) == ck.summary(state).state_bytes
    for line in (r"spatial: blocks\.\*\.attn +3 ", r"cross: blocks\.\*\.cross +3 ", r"mlp: blocks\.\*\.mlp +3 "):
        assert re.search(line, said)
    assert "programs of step.compile(): 2" in said


def test_a_first_step_computes_whatever_the_plan_says():
    never = ck.deciders.interval(5, offset=2)
    model = byhand.net()
    step = ck.cache(model, ck.Policy("never", never, ck.forecasters.hold(), sites="attention"))
    out, _ = step(step.init(STEPS, *feed(0)), *feed(0))
    assert torch.equal(out, model(*feed(0)))


@pytest.mark.parametrize(
    "everything",
    [
        ck.taylorseer(1),
        ck.pyramid_attention_broadcast(1),
        ck.pyramid_attention_broadcast(2, spatial_range=(2000, 3000)),
    ],
)
def test_nothing_left_out_is_the_model(everything):
    model = byhand.net()
    outputs, _ = run(ck.cache(model, everything), TIMES)
    assert all(torch.equal(out, model(*feed(index))) for index, out in enumerate(outputs))


def test_what_does_not_fit():
    hold, mask = ck.forecasters.hold(), ck.deciders.mask([1, 0])
    cases = [
        (lambda: ck.taylorseer(0), r"`interval` must be an int >= 1, got 0"),
        (lambda: ck.taylorseer(warmup=-1), r"`warmup` must be an int >= 0, got -1"),
        (lambda: ck.taylorseer(cooldown_after=1.5), r"`cooldown_after` must be an int >= 0, got 1\.5"),
        (lambda: ck.taylorseer(order=-1), r"`order` must be an int >= 0, got -1"),
        (lambda: ck.taylorseer(basis="chebyshev"), r"`basis` must be one of .* got 'chebyshev'"),
        (lambda: ck.taylorseer(sites="blocks"), r"`sites` must be one of 'chain'.* got 'blocks'"),
        (lambda: ck.taylorseer(sites=("(",)), r"`sites` has the pattern '\(', which is no regular expression"),
        (lambda: ck.taylorseer(sites=()), r"`sites` must be one of"),
        (lambda: ck.pyramid_attention_broadcast(None), r"are all None"),
        (lambda: ck.pyramid_attention_broadcast(0), r"`spatial` must be an int >= 1, got 0"),
        (lambda: ck.pyramid_attention_broadcast(2, cross=True), r"`cross` must be an int >= 1, got True"),
        (lambda: ck.pyramid_attention_broadcast(spatial_range=(800, 100)), r"`spatial_range` must be \(low, high\)"),
        (lambda: ck.pyramid_attention_broadcast(spatial_range=800), r"`spatial_range` must be a pair"),
        (lambda: ck.pyramid_attention_broadcast(spatial_range=(None, 800)), r"`spatial_range` must be a number"),
        (lambda: ck.pyramid_attention_broadcast(spatial_range=(float("nan"), 1)), r"`spatial_range` must be \(low, h"),
        (lambda: ck.pyramid_attention_broadcast(patterns={"spatial": None}), r"`patterns` has None for 'spatial'"),
        (lambda: ck.taylorseer(basis=["newton"]), r"`basis` must be one of"),
        (lambda: ck.faster_cache(weight=float("nan")), r"`weight` must be finite"),
        (lambda: ck.faster_cache(alpha_low=float("nan")), r"`alpha_low` must be finite"),
        (lambda: ck.faster_cache(layout=ck.Tokens(True, 1, 1)), r"`layout` must count at least one frame"),
        (lambda: ck.pyramid_attention_broadcast(patterns={"time": "x"}), r"`patterns` has the kind 'time'"),
        (
            lambda: ck.pyramid_attention_broadcast(patterns={"cross": "x"}),
            r"`patterns` names 'cross', which has no int",
        ),
        (lambda: ck.pyramid_attention_broadcast(patterns={}), r"`patterns` does not name 'spatial'"),
        (lambda: ck.pyramid_attention_broadcast(patterns=["x"]), r"`patterns` must be a dict"),
        (lambda: ck.pyramid_attention_broadcast(semantics="ours"), r"`semantics` must be one of"),
        (lambda: ck.Policy("x", {"spatial": mask}, hold), r"`decider` is given by kind with sites='chain'"),
        (lambda: ck.Policy("x", {"time": mask}, hold, sites="attention"), r"`decider` has the kind 'time'"),
        (lambda: ck.Policy("x", {"cross": ck.deciders.drift(1)}, hold, sites="mlp"), r"must be static"),
        (lambda: ck.deciders.interval(2, offset=0.5), r"`offset` must be an int, got 0\.5"),
    ]
    for call, words in cases:
        with pytest.raises(ck.CacheError, match=words):
            call()
    model = byhand.net()
    for policy, words in (
        (
            ck.taylorseer(sites=("nothing.*",)),
            r"The pattern 'nothing\.\*' of `sites` matches no module .* spatial: blocks\.\*\.attn;",
        ),
        (
            ck.taylorseer(sites=(r"blocks\..*\.attn", "typo")),
            r"The pattern 'typo' of `sites` matches no module .* spatial: blocks\.\*\.attn;",
        ),
        (
            ck.pyramid_attention_broadcast(2, None, 3, patterns={"spatial": r".*\.attn", "cross": "typo"}),
            r"The pattern 'typo' of `sites` matches no module .* cross: blocks",
        ),
        (ck.pyramid_attention_broadcast(None, temporal=2), r"of kind temporal matches no module .* cross: blocks"),
    ):
        with pytest.raises(ck.StructureError, match=words):
            ck.cache(model, policy).init(TIMES, *feed(0))
    with pytest.raises(ck.ArgumentError, match=r"`timesteps` must hold the values"):
        ck.cache(model, ck.pyramid_attention_broadcast()).init(10, *feed(0))
    step = ck.cache(model, ck.taylorseer(2))
    x, t, text = feed(0)
    with pytest.raises(ck.StateError, match=r"At blocks\.0\.attn the state holds \[2, 6, 16\].* make a new state"):
        step(step.init(STEPS, x, t, text), x[:1], t[:1], text[:1])


@pytest.mark.parametrize("way", ["eager", "programs"])
@pytest.mark.parametrize("sites", ["attention", "attention+mlp", "output"])
def test_another_shape_is_refused_where_nothing_is_computed(sites, way):
    step = ck.cache(byhand.shared(), ck.taylorseer(3, warmup=1, sites=sites))
    if way == "programs":
        step = step.compile(backend="eager")
    x, t, text = feed(0)
    _, state = step(step.init(STEPS, x, t, text), x, t, text)
    _, after = step(state, x, t, text)
    assert ck.summary(after).computed == (True, False)
    for changed in ((x[:1], t[:1], text[:1]), (x[:, :1], t, text)):
        with pytest.raises(ck.StateError, match=r"the state holds .* the call brings .* make a new state"):
            step(state, *changed)


def test_kinds_that_the_model_has_not_cost_nothing():
    model = byhand.net()
    policy = ck.pyramid_attention_broadcast(2, temporal=3, spatial_range=(0, 2000), temporal_range=(0, 2000))
    step = ck.cache(model, policy)
    with pytest.warns(UserWarning, match="decides about temporal, and no block of Net has that: it has spatial"):
        _, state = run(step, TIMES)
    assert ck.summary(state).computed == tuple(index % 2 == 0 for index in range(STEPS))
    assert step.plan(TIMES).kinds.keys() == {"spatial"}
    text = str(step.explain(TIMES, *feed(0)))
    assert "temporal" not in text.partition("plan:")[2]
    assert "programs of step.compile(): 2" in text


def test_what_the_model_returns_is_no_part_of_the_state():
    step = ck.cache(byhand.net(), ck.Policy("head", ck.deciders.interval(3), ck.forecasters.hold(), sites=("head",)))
    first, state = step(step.init(STEPS, *feed(0)), *feed(0))
    wanted = first.clone()
    first.mul_(7)
    again, _ = step(state, *feed(1))
    assert torch.equal(again, wanted)


def test_attention_with_positions_in_query_and_key_is_no_cross_attention():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.register_buffer("pos", torch.randn(1, 6, 8))

        def forward(self, x):
            """Positions are added to what is compared, not to what is mixed."""
            compared = x + self.pos
            return x + self.attn(compared, compared, x)[0]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            """The blocks in turn."""
            for block in self.blocks:
                x = block(x)
            return x

    text = str(ck.cache(Model(), ck.taylorseer(3, sites="attention")).explain(4, torch.randn(1, 6, 8)))
    assert "spatial: blocks.*.attn" in text
