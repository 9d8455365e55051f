"""Calibrated ratios are the published formula, and diffusers' own; a file of them says what it is."""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.hooks import MagCacheConfig, apply_mag_cache
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from torch import Tensor, nn

import cachekit as ck
from cachekit.diffusers import zoo

STEPS = 12
TOLERANCE = 1e-4  # diffusers adds 1e-8 to every norm it divides by


class Ends(NamedTuple):
    """Where a chain of blocks begins and ends, and where its denoised tokens are there."""

    first: str
    takes: Callable[[tuple, dict[str, Any]], Tensor]
    last: str
    gives: Callable[[Any], Tensor]


CHAINS = {
    "Flux": [
        Ends(
            "transformer_blocks.0",
            lambda args, kwargs: kwargs["hidden_states"],
            "single_transformer_blocks.2",
            lambda out: out[1],
        )
    ],
    "Wan": [Ends("blocks.0", lambda args, kwargs: args[0], "blocks.2", lambda out: out)],
    # Text and image are joined in between, so the second chain carries both.
    "Flux2": [
        Ends(
            "transformer_blocks.0",
            lambda args, kwargs: kwargs["hidden_states"],
            "transformer_blocks.2",
            lambda out: out[1],
        ),
        Ends(
            "single_transformer_blocks.0",
            lambda args, kwargs: kwargs["hidden_states"],
            "single_transformer_blocks.2",
            lambda out: out,
        ),
    ],
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """At this size a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def calibrated(name: str) -> tuple[ck.State, list[Tensor]]:
    """The state after a calibration, and what the model returned."""
    specimen, outputs = zoo.specimen(name), []
    step = ck.cache(specimen.model, ck.mag_calibration())
    state = step.init(specimen.timesteps, **specimen.inputs(0))
    for at in range(STEPS):
        out, state = step(state, **specimen.inputs(at))
        outputs.append(out.sample)
    return state, outputs


def by_hand(name: str) -> list[float]:
    """The mean over all tokens of `||r_s|| / ||r_{s-1}||`, from what goes in and out of the chains of the model."""
    specimen = zoo.specimen(name)
    bases: list[Tensor] = []
    residuals: list[list[Tensor]] = []

    def watch(ends: Ends) -> None:
        first, last = specimen.model.get_submodule(ends.first), specimen.model.get_submodule(ends.last)
        first.register_forward_pre_hook(
            lambda module, args, kwargs: bases.append(ends.takes(args, kwargs)), with_kwargs=True
        )
        last.register_forward_hook(lambda module, args, out: residuals[-1].append(ends.gives(out) - bases.pop()))

    for ends in CHAINS[name]:
        watch(ends)
    for at in range(STEPS):
        residuals.append([])
        specimen.model(**specimen.inputs(at))
    norms = [torch.cat([residual.norm(dim=-1).flatten() for residual in step]) for step in residuals]
    return [1.0, *((now / before).mean().item() for before, now in itertools.pairwise(norms))]


def test_calibration_leaves_the_output_alone():
    specimen = zoo.specimen("Flux")
    state, outputs = calibrated("Flux")
    assert all(ck.summary(state).computed)
    for at, out in enumerate(outputs):
        assert torch.equal(out, specimen.model(**specimen.inputs(at)).sample)


@pytest.mark.parametrize("name", CHAINS)
def test_the_ratios_are_the_mean_over_tokens_of_the_growth_of_the_residual(name: str):
    ratios = ck.MagRatios.from_state(calibrated(name)[0], model=name, scheduler="falling").ratios
    expected = by_hand(name)
    assert ratios[0] == 1.0
    assert ratios == pytest.approx(expected, rel=1e-5)
    assert max(abs(ratio - 1) for ratio in expected) > 10 * TOLERANCE  # or any ratios would do


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_the_ratios_are_those_of_diffusers(name: str, capsys: pytest.CaptureFixture[str]):
    specimen = zoo.specimen(name)
    apply_mag_cache(specimen.model, MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    for at in range(STEPS):
        with specimen.model.cache_context("cond"):
            specimen.model(**specimen.inputs(at))
    theirs = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    ratios = ck.MagRatios.from_state(calibrated(name)[0]).ratios
    assert len(theirs) == len(ratios) == STEPS
    assert ratios == pytest.approx(theirs, rel=TOLERANCE)


def test_calibrated_ratios_are_a_policy():
    state, _ = calibrated("Wan")
    policy = ck.mag_cache(ck.MagRatios.from_state(state), threshold=0.1)
    same = ck.mag_cache(by_hand("Wan"), threshold=0.1)
    plan = ck.deciders.plan(policy.decider, STEPS)
    assert plan == ck.deciders.plan(same.decider, STEPS) and len(set(plan)) == 2


def test_ratios_need_a_finished_calibration():
    specimen = zoo.specimen("Wan")
    step = ck.cache(specimen.model, ck.mag_calibration())
    state = step.init(2, **specimen.inputs(0))
    for _ in range(2):
        with pytest.raises(ck.StateError, match=r"of 2 steps\. Calibrate over the whole trajectory"):
            ck.MagRatios.from_state(state)
        _, state = step(state, **specimen.inputs(0))
    assert ck.MagRatios.from_state(state).ratios == (1.0, 1.0)  # twice the same input


def test_ratios_need_a_calibration():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    x = torch.ones(1, 2, 4)
    for policy in (ck.step_mask([True, True]), ck.step_mask([True, False])):
        step = ck.cache(Halves(), policy)
        state = step.init(2, x)
        for _ in range(2):
            _, state = step(state, x)
        with pytest.raises(ck.StateError, match=r"under mag_calibration\(\)"):
            ck.MagRatios.from_state(state)


# Files -------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_saved(tmp_path: Path):
    state, _ = calibrated("Wan")
    ratios = ck.MagRatios.from_state(state, model="a Wan, naïve", scheduler="UniPC, 12 steps")
    ratios.save(tmp_path / "ratios.json")
    assert ck.MagRatios.load(tmp_path / "ratios.json") == ratios
    assert ck.MagRatios.load(str(tmp_path / "ratios.json")) == ratios


def test_a_file_says_what_it_is(tmp_path: Path):
    ck.MagRatios(ratios=(1.0, 1.25, 0.5), model="M", scheduler="S").save(tmp_path / "ratios.json")
    assert json.loads((tmp_path / "ratios.json").read_text(encoding="utf-8")) == {
        "version": 1,
        "model": "M",
        "scheduler": "S",
        "steps": 3,
        "ratios": [1.0, 1.25, 0.5],
    }


BAD = {
    "empty": b"",
    "no json": b"[MagCache] Calibration Complete",
    "cut off": b'{"version": 1, "ratios": [1.0, 1.0',
    "no text": b"\xff\xfe\x00\x01",
    "a list": b"[1.0, 1.0]",
    "a number": b"1.0",
    "null": b"null",
    "no ratios": b'{"version": 1, "model": "", "scheduler": "", "steps": 2}',
    "no version": b'{"ratios": [1.0, 1.0], "model": "", "scheduler": "", "steps": 2}',
    "another version": b'{"version": 2, "ratios": [1.0, 1.0], "model": "", "scheduler": "", "steps": 2}',
    "one ratio": b'{"version": 1, "ratios": 1.0, "model": "", "scheduler": "", "steps": 1}',
    "words": b'{"version": 1, "ratios": ["one"], "model": "", "scheduler": "", "steps": 1}',
    "digits": b'{"version": 1, "ratios": "121"}',
    "a table": b'{"version": 1, "ratios": {"1": 0, "2": 0}}',
    "nothing": b'{"version": 1, "ratios": []}',
    "not a number": b'{"version": 1, "ratios": [1.0, NaN]}',
    "negative": b'{"version": 1, "ratios": [1.0, -3]}',
    "another length": b'{"version": 1, "ratios": [1.0, 1.0], "steps": 5}',
    "a true version": b'{"version": true, "ratios": [1.0, 1.0]}',
    "holes": b'{"version": 1, "ratios": [1.0, null], "model": "", "scheduler": "", "steps": 2}',
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_bad_file_is_an_argument_error_that_names_it(tmp_path: Path, content: bytes):
    path = tmp_path / "ratios.json"
    path.write_bytes(content)
    with pytest.raises(ck.ArgumentError, match=r"ratios\.json"):
        ck.MagRatios.load(path)


def test_the_published_ratios_of_flux():
    flux = ck.MagRatios.flux()
    assert flux.steps == len(flux.ratios) == 28
    assert flux.ratios[0] == 1.0 and flux.ratios[1] == 1.21094 and flux.ratios[-1] == 0.89062
    assert torch.equal(torch.tensor(flux.ratios), FLUX_MAG_RATIOS)


def test_a_reference_that_is_not_a_number_makes_a_ratio_that_is_none():
    value, reference = torch.ones(3, 4), torch.ones(3, 4)
    assert ck.signals.norm_ratio(value, torch.zeros(3, 4)) == (3.0, 3.0)
    reference[1, 2] = float("nan")
    assert ck.signals.norm_ratio(value, reference).numerator.isnan()
    assert ck.signals.norm_ratio(reference, value).numerator.isnan()
