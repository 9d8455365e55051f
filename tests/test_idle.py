"""A policy that has skipped nothing in a whole call of a pipeline says so once, with the number that changes it."""

from __future__ import annotations

import re
import warnings

import piping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cachekit as ck
import cachekit.diffusers as ckd

IDLE = "has skipped nothing in"
EVERY_OTHER = [step % 2 == 0 for step in range(piping.STEPS)]


def said(policy, name: str = "flux", calls: int = 1, **changed) -> tuple[list[str], ckd.Run]:
    """What is said of a policy in so many calls, and the run."""
    piped = piping.piped(name, **changed)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad(), ckd.cached(piped.pipe, policy) as run:
        warnings.simplefilter("always")
        for _ in range(calls):
            piping.image(piped)
    return [str(each.message) for each in caught if IDLE in str(each.message)], run


def skipped(run: ckd.Run) -> int:
    return sum(stream.skipped for stream in run.summary().streams.values())


@settings(max_examples=6, deadline=None)
@given(
    warmup=st.integers(1, piping.STEPS - 2),
    forecaster=st.sampled_from([ck.forecasters.hold(), ck.forecasters.newton(1)]),
)
def test_the_number_it_names_is_the_least_that_skips(warmup, forecaster):
    def policy(threshold: float) -> ck.Policy:
        decider = ck.deciders.warmup(warmup, ck.deciders.drift(threshold))
        return ck.Policy("mine", decider, forecaster, signal=ck.signals.change, front=1)

    (message,), run = said(policy(1e-9))
    assert skipped(run) == 0
    named = re.search(r"that it may skip was (\S+), at step (\d+) of transformer/", message)
    assert named is not None
    number, step = named.groups()
    assert int(step) >= warmup
    assert float(number) == pytest.approx(
        min(float(state.signal[warmup:].min()) for state in run.states.values()), rel=1e-3
    )
    messages, run = said(policy(float(number) * 1.001))
    assert not messages and skipped(run) > 0
    messages, run = said(policy(float(number) * 0.999))
    assert len(messages) == 1 and skipped(run) == 0


def test_it_says_where_no_number_helps():
    (message,), _ = said(ck.first_block_cache(0.0))
    assert "No signal would have changed that" in message
    (message,), _ = said(ck.taylorseer(2, warmup=piping.STEPS))
    assert "Its plan" in message and "computes every one of them" in message


def test_it_is_said_once_a_run():
    messages, _ = said(ck.first_block_cache(0.0), calls=3)
    assert len(messages) == 1


@pytest.mark.parametrize("policy", [ck.recording(), ck.mag_calibration(), ck.step_mask(EVERY_OTHER)])
def test_it_is_not_said_of_what_records_or_skips(policy):
    messages, _ = said(policy)
    assert not messages


def test_it_is_not_said_of_one_step():
    messages, _ = said(ck.first_block_cache(0.0), num_inference_steps=1)
    assert not messages


def test_an_interrupted_call_tells_nothing():
    def stop(pipe, step, timestep, values):
        pipe._interrupt = step >= 1
        return values

    messages, _ = said(ck.first_block_cache(0.0), callback_on_step_end=stop)
    assert not messages


def test_each_policy_of_a_mapping_is_looked_at_alone():
    messages, _ = said({"cond": ck.first_block_cache(0.0), "uncond": ck.step_mask(EVERY_OTHER)}, "wan")
    assert len(messages) == 1 and "transformer/cond" in messages[0] and "uncond" not in messages[0]
