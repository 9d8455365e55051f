"""Programs that are replayed as CUDA graphs are, shown without a GPU.

A captured program writes its results into the same memory at every replay. The compiler here does the worst that this
allows: what a program has returned is overwritten as soon as another step begins.
"""

import math

import byhand
import pytest
import torch
from specimens import shared
from torch.utils import _pytree as pytree

import cachekit as ck

pytestmark = pytest.mark.compiles

STEPS = 24
CAPTURE = {"options": {"triton.cudagraphs": True}}
POLICIES = {
    "first_block_cache": ck.first_block_cache(0.05, max_skips=3, forecaster=ck.forecasters.newton(1)),
    "mag_cache": ck.mag_cache([1.0] * STEPS, max_skips=3),
    "taylorseer": ck.taylorseer(4, warmup=2, order=2),
    "pyramid_attention_broadcast": ck.pyramid_attention_broadcast(3),
    "faster_cache": ck.faster_cache(3, cfg=None),
    "output": ck.step_mask([i % 3 == 0 for i in range(STEPS)], sites="output"),
    "calibration": ck.mag_calibration(),
}


class Replays:
    """A compiler of programs whose results last until the next step."""

    def __init__(self, monkeypatch):
        self.returned, self.steps = [], 0
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", self.begin)

    def __call__(self, graph, inputs, options=None):
        def run(*values):
            given = [value for value in values if isinstance(value, torch.Tensor)]
            before = [value._version for value in given]
            outs = graph(*values)
            assert before == [value._version for value in given], "a program that writes to its inputs is not captured"
            held = {value.untyped_storage().data_ptr() for value in given}
            fresh = [out for out in outs if isinstance(out, torch.Tensor)]
            self.returned += [out for out in fresh if out.untyped_storage().data_ptr() not in held]
            return outs

        return run

    def begin(self):
        self.steps += 1
        for value in self.returned:
            value.fill_(math.nan if value.is_floating_point() else 1)
        self.returned.clear()


def trajectory(step, sp, state=None, start=0):
    times = torch.linspace(999, 1, STEPS)
    state = step.init(times, **sp.inputs(0)) if state is None else state
    outs, states = [], [state]
    for i in range(start, STEPS):
        out, state = step(state, **sp.inputs(i))
        outs.append(out)
        states.append(state)
    return outs, states


def alike(found, wanted):
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True) for one, other in pairs)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("method", POLICIES)
def test_what_outlives_a_step_lies_where_no_replay_writes(method, donate, monkeypatch):
    sp, policy = shared("Wan"), POLICIES[method]
    replays = Replays(monkeypatch)
    with torch.no_grad():
        wanted, right = trajectory(ck.cache(sp.model, policy), sp)
        assert method == "calibration" or {*ck.summary(right[-1]).computed} == {True, False}
        step = ck.cache(sp.model, policy, donate=donate).compile(backend=replays, **CAPTURE)
        outs, states = trajectory(step, sp)
        assert replays.steps == STEPS
        assert alike(outs, wanted) and alike(states[-1], right[-1])
        if donate:
            first, last = (pytree.tree_leaves(state.sites) for state in (states[0], states[-1]))
            big = [n for n, leaf in enumerate(first) if leaf.numel() > 1]
            assert big and all(first[n].data_ptr() == last[n].data_ptr() for n in big), "in the memory given away"
        else:  # a state from long ago is as good as a new one
            outs, states = trajectory(step, sp, states[10], start=10)
            assert alike(outs, wanted[10:]) and alike(states[-1], right[-1])


def test_the_unconditional_call_too(monkeypatch):
    net, replays = byhand.net(), Replays(monkeypatch)
    layout = ck.Tokens(1, 2, 3)
    policy = ck.faster_cache(
        2, cfg="separate", uncond=3, layout=layout, attention_range=(-1, 2000), uncond_range=(-1, 2000)
    )
    x, text = torch.randn(1, byhand.IMAGE, byhand.CHANNELS), torch.randn(1, byhand.WORDS, byhand.CHANNELS)
    results = []
    with torch.no_grad():
        for compiled in (False, True):
            step = ck.cache(net, policy)
            step = step.compile(backend=replays, **CAPTURE) if compiled else step
            times = torch.linspace(999, 1, 12)
            state, outs = step.init(times, x, times[:1], text), []
            for i, t in enumerate(times):
                cond, state = step(state, x + 0.1 * i, t.reshape(1), text)
                uncond, state = step.uncond(state, x + 0.1 * i, t.reshape(1), 0 * text)
                outs += [cond, uncond]
            results.append(outs)
    assert alike(*results)


def test_other_modes_are_not_copied(monkeypatch):
    sp, replays = shared("Wan"), Replays(monkeypatch)
    with torch.no_grad():
        trajectory(ck.cache(sp.model, POLICIES["mag_cache"]).compile(backend=replays), sp)
    assert replays.steps == 0


def test_block_by_block_is_refused_with_the_way_to_go():
    step = ck.cache(byhand.net(), ck.step_mask([1, 0]))
    with pytest.raises(ck.ArgumentError, match=r'mode="max-autotune-no-cudagraphs"'):
        step.compile(regional=True, mode="reduce-overhead")
    step.compile(regional=True, mode="max-autotune-no-cudagraphs")
