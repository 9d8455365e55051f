"""The unconditional half as a site: the formulas of the paper in NumPy, two calls a step, and what does not fit."""

from __future__ import annotations

import byhand
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

import cachekit as ck
from cachekit.guidance import Guidance

TIMES = [980.0, 900.0, 800.0, 690.0, 600.0, 500.0, 400.0, 280.0, 150.0, 60.0]
LAYOUT = ck.Tokens(1, 2, 3)  # of byhand.IMAGE tokens
RANGES = {"low_range": (99, 901), "high_range": (-1, 301)}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def low_pass(frames: np.ndarray) -> np.ndarray:
    """A centred disc of radius min(H, W) // 5 in the plane of every frame [..., H, W]."""
    height, width = frames.shape[-2:]
    spectrum = np.fft.fftshift(np.fft.fft2(frames), axes=(-2, -1))
    rows, columns = np.mgrid[:height, :width]
    disc = (rows - height // 2) ** 2 + (columns - width // 2) ** 2 <= (min(height, width) // 5) ** 2
    return np.fft.ifft2(np.fft.ifftshift(spectrum * disc, axes=(-2, -1))).real


def as_frames(array: np.ndarray, layout) -> np.ndarray:
    """[..., H, W]."""
    if not isinstance(layout, ck.Tokens):
        return array
    return array.reshape(len(array), *layout, -1).transpose(0, 4, 1, 2, 3)


def as_returned(frames: np.ndarray, layout) -> np.ndarray:
    """Back."""
    if not isinstance(layout, ck.Tokens):
        return frames
    return frames.transpose(0, 2, 3, 4, 1).reshape(len(frames), -1, frames.shape[1])


SIZES = st.tuples(st.integers(1, 13), st.integers(1, 13))


@settings(max_examples=60)
@given(
    size=SIZES,
    kind=st.sampled_from(["BCHW", "BCFHW", "BFCHW", "tokens"]),
    weights=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    seed=st.integers(0, 99),
)
def test_an_answer_is_the_conditional_output_and_two_weighted_parts(size, kind, weights, seed):
    layout = ck.Tokens(3, *size) if kind == "tokens" else kind
    lead = {"BCHW": (2, 4), "BCFHW": (2, 4, 3), "BFCHW": (2, 3, 4)}.get(kind, ())
    shape = (*lead, *size) if lead else (2, 3 * size[0] * size[1], 4)
    draw = torch.Generator().manual_seed(seed)
    uncond, cond, later = torch.randn(3, *shape, generator=draw)
    guidance = Guidance(ck.deciders.interval(2), lambda times, computed: [weights] * len(times), layout)
    state = guidance.update(guidance.init(cond, TIMES, [True] * len(TIMES)), uncond, cond)
    answer = guidance.predict(state, later, torch.tensor(3.0))
    added = as_frames((uncond - cond).double().numpy(), layout)
    low = low_pass(added)
    wanted = later.double().numpy() + as_returned(weights[0] * low + weights[1] * (added - low), layout)
    np.testing.assert_allclose(answer.double().numpy(), wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=100)
@given(
    times=st.lists(st.floats(0, 1000), min_size=1, max_size=12).map(lambda drawn: sorted(drawn, reverse=True)),
    full=st.lists(st.booleans(), min_size=12, max_size=12),
    semantics=st.sampled_from(["paper", "diffusers"]),
)
def test_weights(times, full, semantics):
    full = [True, *full[1 : len(times)]]
    policy = ck.faster_cache(alpha_low=1.5, alpha_high=0.7, semantics=semantics, **RANGES)
    assert policy.guidance is not None
    for step, got in enumerate(policy.guidance.weigh(times, full)):
        last = max(at for at in range(step + 1) if full[at])
        for weight, alpha, (low, high) in zip(got, (1.5, 0.7), RANGES.values(), strict=True):
            inside = [low < times[at] < high for at in range(last + 1, step + 1)]
            power = sum(inside) if semantics == "diffusers" else sum(inside[-1:])
            assert weight == pytest.approx(alpha**power)


def feed(step: int, prompt: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of one half; the unconditional one has fewer words."""
    draw = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 2, byhand.IMAGE, byhand.CHANNELS, generator=draw)
    words = torch.randn(2, byhand.WORDS, byhand.CHANNELS, generator=draw)
    turn = torch.tensor(0.08 * step)
    x = turn.cos() * start + turn.sin() * end
    return x, torch.full((2,), TIMES[step] / 1000), words if prompt else 0.1 * words[:, :2]


def separate(step, both=None, state=None) -> tuple[list[Tensor], list[Tensor], ck.State]:
    """Two calls a step."""
    state, conds, unconds = state or step.init(TIMES, *feed(0, True)), [], []
    for index in range(len(TIMES)):
        if both is not None:
            cond, uncond, state = both(state, feed(index, True), feed(index, False))
        else:
            cond, state = step(state, *feed(index, True))
            uncond, state = step.uncond(state, *feed(index, False))
        conds.append(cond)
        unconds.append(uncond)
    return conds, unconds, state


def policy(**more) -> ck.Policy:
    return ck.faster_cache(uncond=3, cfg="separate", layout=LAYOUT, uncond_range=(-1, 850), **more)


def test_two_calls_a_step_are_the_formula():
    model = byhand.net()
    step = ck.cache(model, policy(weight="ramp"))
    conds, unconds, state = separate(step)
    plan = step.plan(TIMES)
    assert plan is not None
    full, attended = plan.kinds["guidance"], plan.kinds["spatial"]
    assert full == (True, True, False, True, False, False, True, False, False, True)
    assert any(not kept for kept in attended) and not any(
        kept < both for kept, both in zip(attended, full, strict=True)
    )
    cache = byhand.Cache(model, "self", lambda points, at: ramp(points, at), attended)
    assert step.policy.guidance is not None
    weights = step.policy.guidance.weigh(TIMES, full)
    added = np.zeros(0)
    for index, (cond, uncond) in enumerate(zip(conds, unconds, strict=True)):
        torch.testing.assert_close(cond, cache(*feed(index, True)), atol=1e-5, rtol=1e-4)
        if full[index]:
            assert torch.equal(uncond, model(*feed(index, False)))
            added = as_frames((uncond - cond).double().numpy(), LAYOUT)
            continue
        low = low_pass(added)
        parts = weights[index][0] * low + weights[index][1] * (added - low)
        np.testing.assert_allclose(uncond.numpy(), cond.numpy() + as_returned(parts, LAYOUT), rtol=1e-4, atol=1e-5)
    assert ck.summary(state).steps == len(TIMES)


def ramp(points: dict[int, Tensor], at: int) -> Tensor:
    """Two points, with a weight that rises from 0 to 1."""
    values = [value.double() for value in points.values()]
    return values[-1] + at / (len(TIMES) - 1) * (values[-1] - values[-2]) if len(values) > 1 else values[-1]


def test_one_call_is_two_calls():
    model = byhand.net()
    for cfg, order in (("batched", -1), ("batched_cond_first", 1)):
        step = ck.cache(model, ck.faster_cache(uncond=3, cfg=cfg, layout=LAYOUT, uncond_range=(-1, 850)))

        def both(index, order=order):
            x, t, text = feed(index, True)
            return [torch.cat(pair[::order]) for pair in ((x, x), (t, t), (text, 0.1 * text))]

        one = ck.cache(model, policy())
        state, other = step.init(TIMES, *both(0)), one.init(TIMES, *feed(0, True))
        for index in range(len(TIMES)):
            out, state = step(state, *both(index))
            cond, other = one(other, *feed(index, True))
            x, t, text = feed(index, True)
            uncond, other = one.uncond(other, x, t, 0.1 * text)
            torch.testing.assert_close(out, torch.cat((cond, uncond)[::order]), atol=1e-5, rtol=1e-4)


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@pytest.mark.parametrize("way", ["one graph", "programs"])
def test_two_calls_compiled(way):
    step = ck.cache(byhand.shared(), policy())
    wanted = separate(step)
    counters.clear()

    def both(state, prompted, without):
        cond, state = step(state, *prompted)
        uncond, state = step.uncond(state, *without)
        return cond, uncond, state

    if way == "programs":
        compiled = step.compile(backend="aot_eager")
        got = [separate(compiled), separate(compiled)][-1]
        assert counters["stats"]["unique_graphs"] == 5  # both calls compute or not, and attention may be computed alone
    else:
        whole = torch.compile(both, fullgraph=True, backend="aot_eager")
        got = [separate(step, whole), separate(step, whole)][-1]
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for one, other in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_second_trajectory_and_bytes():
    step = ck.cache(byhand.shared(), policy())
    first = separate(step)
    again = separate(step, state=step.init_like(first[2]))
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    assert f"({ck.summary(first[2]).state_bytes} bytes)" in str(step.explain(TIMES, *feed(0, True)))


def test_what_does_not_fit():
    model = byhand.net()
    x, t, text = feed(0, True)
    cases = [
        (lambda: ck.faster_cache(cfg="both"), r"`cfg` must be one of .* got 'both'"),
        (lambda: ck.faster_cache(0), r"`attention` must be an int >= 1, got 0"),
        (lambda: ck.faster_cache(uncond=0), r"`uncond` must be an int >= 1, got 0"),
        (lambda: ck.faster_cache(attention_range=(9, 1)), r"`attention_range` must be \(low, high\) with low < high"),
        (lambda: ck.faster_cache(low_range=(9, 1)), r"`low_range` must be \(low, high\) with low < high"),
        (lambda: ck.faster_cache(layout="HWC"), r"`layout` must be one of 'BCHW'.* got 'HWC'"),
        (lambda: ck.faster_cache(layout=ck.Tokens(0, 1, 1)), r"`layout` must count at least one frame.*frames=0"),
        (lambda: ck.faster_cache(alpha_low="1"), r"`alpha_low` must be a number, got '1'"),
        (lambda: ck.faster_cache(weight="up"), r"`weight` must be a number, .* got 'up'"),
    ]
    for call, words in cases:
        with pytest.raises(ck.CacheError, match=words):
            call()
    step = ck.cache(model, ck.faster_cache(layout="BCFHW"))
    with pytest.raises(ck.ArgumentError, match=r"`layout` 'BCFHW' does not fit what the model returns, \[1, 6, 4\]"):
        step.init(TIMES, x, t, text)
    step = ck.cache(model, ck.faster_cache(layout=LAYOUT))
    with pytest.raises(ck.StateError, match=r"The batch is 3\. With batched guidance"):
        step.init(TIMES, *(torch.cat((given, given[:1])) for given in (x, t, text)))
    whole = byhand.net()
    whole.register_forward_pre_hook(lambda _, given: (given[0].unflatten(0, (2, -1)).flatten(0, 1), *given[1:]))
    guided = ck.cache(whole, ck.faster_cache(layout=LAYOUT))
    with pytest.raises(ck.StructureError, match=r"(?s)half of the batch alone, and its forward fails.*Use cfg=None"):
        guided.init(TIMES, x, t, text)
    with pytest.raises(ck.ArgumentError, match="`timesteps` must hold the values"):
        step.init(10, x, t, text)
    with pytest.raises(ck.ArgumentError, match=r'`uncond` is for policies .* cfg="separate"'):
        step.uncond(step.init(TIMES, x, t, text), x, t, text)
    apart = ck.cache(model, policy())
    with pytest.raises(ck.StateError, match=r"`state` has done no step since .* Call step\(state, \.\.\.\) with the"):
        apart.uncond(apart.init(TIMES, x, t, text), x, t, text)
    _, state = apart(apart.init(TIMES, x, t, text), x, t, text)
    with pytest.raises(ck.StateError, match=r"At guidance the state holds \[2, 6, 4\].* the call brings \[1, 6, 4\]"):
        apart.uncond(state, x[:1], t[:1], text[:1])


@pytest.mark.parametrize("way", ["eager", "programs", "one graph"])
def test_an_unconditional_call_with_nothing_to_answer_from_computes(way):
    """Guidance that begins late, or was left out on a full step, is no delta of zero."""
    model = byhand.net(depth=2)
    step = ck.cache(model, ck.faster_cache(uncond=4, cfg="separate", layout=LAYOUT, uncond_range=(-1, 2000)))
    if way == "programs":
        step = step.compile(backend="eager")

    def uncond(state, *without):
        return step.uncond(state, *without)

    if way == "one graph":
        uncond = torch.compile(uncond, fullgraph=True, backend="eager")
    state = step.init(TIMES, *feed(0, True))
    for index in range(7):  # full at 0 and 4
        cond, state = step(state, *feed(index, True))
        if index in (0, 1, 4):
            continue
        out, state = uncond(state, *feed(index, False))
        right = model(*feed(index, False))
        computed = torch.allclose(out, right, atol=1e-5, rtol=1e-4)
        assert computed == (index in (2, 5)), "the first call after a full one that was left out"
        assert not torch.equal(out, cond)


def test_an_answered_state_is_refused():
    step = ck.cache(byhand.shared(), policy())
    _, first = step(step.init(TIMES, *feed(0, True)), *feed(0, True))
    out, state = step.uncond(first, *feed(0, False))
    assert torch.equal(step.uncond(first, *feed(0, False))[0], out), "the same state again is the same answer"
    with pytest.raises(ck.StateError, match=r"`state` has done no step since its last unconditional call"):
        step.uncond(state, *feed(1, False))


def test_the_unconditional_program_follows_the_model():
    model = byhand.net(depth=2)
    model.scale = torch.nn.Parameter(torch.tensor(1.0)) if hasattr(model, "scale") else 1.0
    forward = type(model).forward

    class Scaled(type(model)):
        def forward(self, *args):
            """The output, scaled by an attribute."""
            return forward(self, *args) * self.scale

    model.__class__ = Scaled
    step = ck.cache(model, policy()).compile(backend="eager")
    for scale in (1.0, 3.0):
        model.scale = scale
        state = step.init(TIMES, *feed(0, True))
        _, state = step(state, *feed(0, True))
        out, _ = step.uncond(state, *feed(0, False))
        torch.testing.assert_close(out, model(*feed(0, False)), atol=1e-5, rtol=1e-4)
    with pytest.raises(ck.StateError, match=r"At guidance the state holds .* the call brings"):
        step.uncond(state, *(each[:1] for each in feed(0, False)))


def test_explain_counts_the_programs_of_both_calls():
    step = ck.cache(byhand.shared(depth=2), policy())
    text = str(step.explain(TIMES, *feed(0, True)))
    counters.clear()
    separate(step.compile(backend="eager"))
    assert f"programs of step.compile(): {counters['stats']['unique_graphs']}" in text


def test_half_a_batch_holds_no_more_than_half():
    step = ck.cache(byhand.shared(), ck.faster_cache(layout=LAYOUT, uncond=3))
    x, t, text = feed(0, True)
    both = [torch.cat(pair) for pair in ((x, x), (t, t), (0.1 * text, text))]
    state = step.init(TIMES, *both)
    for index in range(4):
        _, state = step(state, *both)
        for leaf in torch.utils._pytree.tree_leaves(state.sites):
            assert leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size(), index
