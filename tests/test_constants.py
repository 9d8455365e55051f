"""What a block, a part or a model returns beside tensors is carried as it is, or nothing is left out in its place."""

from __future__ import annotations

import enum
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import cachekit as ck

WIDTH, STEPS = 8, 6


class Shade(enum.Enum):
    """A value that nobody can change."""

    DARK = 1


class Held:
    """An object that holds a tensor."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class Attention(nn.Module):
    """It returns an object beside the tokens, if it is asked to."""

    def __init__(self, beside: str) -> None:
        super().__init__()
        self.qkv, self.out, self.beside = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), beside

    def forward(self, x: Tensor) -> Any:
        query, key, value = (each.unsqueeze(1) for each in self.qkv(x).chunk(3, -1))
        out = self.out(scaled_dot_product_attention(query, key, value).squeeze(1))
        return (out, Held(value.squeeze(1))) if self.beside == "attention" else out


class Block(nn.Module):
    """The same of a block."""

    def __init__(self, beside: str, value: Any) -> None:
        super().__init__()
        self.attn, self.beside, self.value = Attention(beside), beside, value
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, given: Any = None) -> Any:
        out = self.attn(x)
        if self.beside == "attention":
            out, held = out
            out = out + 0.1 * held.values
        x = x + out
        x = x + self.mlp(x)
        beside = {"block": Held(x), "closure": lambda: x, "value": self.value, "argument": given}
        return (x, beside[self.beside]) if self.beside in beside else x


class Model(nn.Module):
    """A model some part of which returns more than tensors."""

    def __init__(self, beside: str, value: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.beside = nn.ModuleList(Block(beside, value) for _ in range(3)), beside
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, given: Any = None) -> Any:
        seen = []
        for block in self.blocks:
            x = block(x, given)
            if isinstance(x, tuple):
                x, each = x
                seen.append(each)
        out = self.head(x)
        if self.beside == "model":
            return out, Held(2 * out)
        return (out, *seen) if self.beside in ("value", "argument") else out


POLICIES = {
    "chain": ck.step_mask([1, 0] * 3),
    "probe": ck.first_block_cache(1e9),
    "parts": ck.taylorseer(2, warmup=1),
    "output": ck.step_mask([1, 0] * 3, sites="output"),
}
REFUSED = {("block", "chain"), ("block", "probe"), ("closure", "chain"), ("closure", "probe"), ("model", "output")}


def feed(step: int, batch: int = 2) -> Tensor:
    """The argument of a step."""
    return torch.linspace(-1, 1, batch * 5 * WIDTH).reshape(batch, 5, WIDTH) * (1 + 0.1 * step)


@torch.no_grad()
def run(step: ck.CachedStep, *given: Any, batch: int = 2) -> tuple[list[Any], ck.State]:
    """The outputs of a trajectory, and its last state."""
    state, outputs = step.init(STEPS, feed(0, batch), *given), []
    for now in range(STEPS):
        out, state = step(state, feed(now, batch), *given)
        outputs.append(out)
    return outputs, state


def same(one: Any, other: Any) -> bool:
    """Whether two results are the same, to the bit."""
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Held):
        return type(other) is Held and same(one.values, other.values)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("beside", ["attention", "block", "closure", "model"])
def test_an_object_is_carried_as_it_is_or_refused_by_name(beside, policy):
    model = Model(beside)
    step = ck.cache(model, POLICIES[policy])
    if (beside, policy) in REFUSED:
        with pytest.raises(ck.StructureError, match=r"an object of class (Held|function)"):
            run(step)
        return
    outputs, state = run(step)
    assert {True, False} == set(ck.summary(state).computed)
    with torch.no_grad():
        for now, computed in enumerate(ck.summary(state).computed):
            exact = same(outputs[now], model(feed(now)))
            assert exact or not computed
            assert type(outputs[now]) is type(model(feed(now)))
    run(step, batch=3)  # another layout is found beside the first one


def test_a_part_that_returns_an_object_runs_in_every_step_and_explain_says_why():
    text = str(ck.cache(Model("attention"), ck.taylorseer(2, warmup=1)).explain(STEPS, feed(0)))
    assert "blocks.0.attn: it returns an object of class Held, for which nothing can stand" in text
    with pytest.raises(ck.StructureError, match=r"blocks\.\*\.attn: it returns an object of class Held"):
        run(ck.cache(Model("attention"), ck.pyramid_attention_broadcast(2, spatial_range=(-1, 1001))))


@pytest.mark.parametrize("policy", ["parts", "output"])
def test_what_the_message_for_a_block_names_works(policy):
    assert {True, False} == set(ck.summary(run(ck.cache(Model("block"), POLICIES[policy]))[1]).computed)


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.just(Shade.DARK), st.just(torch.float16))


@settings(max_examples=20)
@given(PLAIN, st.sampled_from([*POLICIES]))
def test_plain_values_are_carried_whatever_they_are(value, policy):
    outputs, state = run(ck.cache(Model("value", value), POLICIES[policy]))
    assert {True, False} == set(ck.summary(state).computed)
    assert all(out[1:] == (value,) * 3 for out in outputs)


@pytest.mark.parametrize("policy", ["chain", "probe", "parts"])
def test_an_object_that_is_handed_through_is_the_callers(policy):
    given = Held(torch.ones(2))
    outputs, _ = run(ck.cache(Model("argument"), POLICIES[policy]), given)
    assert all(each is given for out in outputs for each in out[1:])


def test_a_recording_hands_out_what_the_model_returns():
    model = Model("model")
    outputs, _ = run(ck.cache(model, ck.recording("output")))
    with torch.no_grad():
        assert all(same(out, model(feed(now))) for now, out in enumerate(outputs))
