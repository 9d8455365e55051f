"""Guidance in pipelines: which calls are its halves, whatever their names, and what becomes of a policy for them."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import diffusers
import piping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cachekit as ck
import cachekit.diffusers as ckd
from cachekit.diffusers import zoo
from cachekit.diffusers.calls import tokens_of

ALWAYS = (-1, 1001)
EVERY_OTHER = (True, False) * (piping.STEPS // 2)


def halving(**more: Any) -> ck.Policy:
    """Every second unconditional half is left out, and no attention."""
    return ck.faster_cache(1, uncond=2, uncond_range=ALWAYS, **more)


# How tokens lie ----------------------------------------------------------------------------------------------


def places(frames: int, rows: int, columns: int) -> Tensor:
    """[S, 3]: frame, row and column of every token."""
    return torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).float()


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


@given(size=SIZES, far=st.floats(0.5, 3), batched=st.booleans(), wide=st.booleans())
def test_tokens_are_told_by_their_places(size, far, batched, wide):
    ids = far * places(*size)
    ids = torch.cat([ids, torch.zeros(len(ids), 1)], 1) if wide else ids
    ids = ids.expand(2, *ids.shape) if batched else ids
    hidden = torch.zeros(2, ids.shape[-2], 4)
    assert tokens_of({"hidden_states": hidden, "img_ids": ids}) == ck.Tokens(*size)
    f, h, w = size
    assert tokens_of({"hidden_states": hidden, "img_shapes": [[size]] * 2}) == ck.Tokens(*size)
    assert tokens_of({"hidden_states": hidden, "num_frames": f, "height": h, "width": w}) == ck.Tokens(*size)


@given(size=SIZES, seed=st.integers(0, 99))
def test_tokens_in_another_order_are_not_known(size, seed):
    ids = places(*size)
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    found = tokens_of({"hidden_states": torch.zeros(1, len(ids), 4), "img_ids": shuffled})
    assert found == (ck.Tokens(*size) if torch.equal(shuffled, ids) else None)


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"img_shapes": [[(1, 2, 3), (1, 2, 2)]]},  # a second picture, to be edited
        {"img_shapes": [[(1, 2, 3)], [(1, 3, 2)]]},
        {"img_ids": torch.cat([places(1, 2, 3), places(1, 2, 2) + 9])},
        {"num_frames": 1, "height": 16, "width": 24},  # in pixels
        {"num_frames": None, "height": 2, "width": 3},
    ],
)
def test_tokens_that_are_no_one_block_are_not_known(told):
    count = 10 if "img_shapes" in told or "img_ids" in told else 6
    assert tokens_of({"hidden_states": torch.zeros(1, count, 4), **told}) is None
    assert tokens_of({"hidden_states": torch.zeros(1, 4, 2, 3), "img_shapes": [[(1, 2, 3)]]}) is None


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("flux_guided", ck.Tokens(1, 4, 4)),
        ("qwen", ck.Tokens(1, 4, 4)),
        ("ltx", ck.Tokens(2, 4, 4)),
        ("wan", "BCFHW"),
        ("cogvideox", "BFCHW"),
        ("sd3", "BCHW"),
    ],
)
def test_the_layout_is_found(name, layout):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, run = piping.cached(name, halving())
    stated, _ = piping.cached(name, halving(layout=layout))
    assert torch.equal(found, stated)
    assert 0 < piping.gap(found, piping.plain(name)) < 0.5
    kinds = [state.plan for state in run.states.values()]
    assert any(not plan["guidance"].all() for plan in kinds)


def test_a_layout_that_nothing_tells_is_asked_for():
    step = ck.cache(zoo.specimen("Flux").model, halving(cfg="separate"))
    with pytest.raises(
        ck.ArgumentError, match=r"`layout` is not known: the model returns \[2, 16, 8\], .*Give layout=cachekit.Tokens"
    ):
        step.init([900, 800], **zoo.specimen("Flux").inputs(0))


# What a policy has lost --------------------------------------------------------------------------------------


def test_a_pipeline_without_guidance_says_once_what_is_not_left_out():
    made = piping.piped("flux")
    with ckd.cached(made.pipe, ck.faster_cache()) as run:  # with its defaults
        with pytest.warns(UserWarning, match=r"'faster_cache\(attention 2, uncond 5\)' leaves the unconditional half"):
            image = piping.image(made)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(piping.image(made), image)
    assert [stream.skipped > 0 for stream in run.summary().streams.values()] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        piping.cached("flux", ck.faster_cache(cfg=None))


def test_a_kind_of_attention_that_the_model_has_not_is_said_once():
    made = piping.piped("flux")
    policy = ck.pyramid_attention_broadcast(2, cross=4, spatial_range=ALWAYS)
    with ckd.cached(made.pipe, policy):
        with pytest.warns(UserWarning, match=r"decides about cross, and no block of FluxTransformer2DModel has that"):
            image = piping.image(made)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(piping.image(made), image)
    assert torch.equal(image, piping.cached("flux", ck.pyramid_attention_broadcast(2, spatial_range=ALWAYS))[0])


# Guiders ------------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """What the pipeline asks of one."""

    dtype, device = torch.float32, torch.device("cpu")
    temporal_compression_ratio, spatial_compression_ratio = 4, 16
    config = SimpleNamespace(latent_channels=1, scaling_factor=1.0)


def guided(guider: Any) -> piping.Piped:
    """HunyuanVideo 1.5, whose branches are named by its guider."""
    specimen = zoo.specimen("HunyuanVideo15")
    sizes = {name: value for name, value in specimen.model.config.items() if name[0] != "_"}
    torch.manual_seed(0)
    model = diffusers.HunyuanVideo15Transformer3DModel(**{**sizes, "in_channels": 3, "out_channels": 1}).eval()
    parts = dict.fromkeys(inspect.signature(diffusers.HunyuanVideo15Pipeline).parameters)
    parts |= {"vae": Autoencoder(), "transformer": zoo.wake(model, zoo.Draw(2)), "scheduler": piping.flow(shift=5.0)}
    pipe = diffusers.HunyuanVideo15Pipeline(**{**parts, "guider": guider})
    pipe.set_progress_bar_config(disable=True)
    words = {name: value[:1] for name, value in specimen.inputs(0).items() if isinstance(value, Tensor)}
    given: dict[str, Any] = {}
    for prefix, scale in (("", 1.0), ("negative_", 0.3)):
        for ours, theirs in (
            ("prompt_embeds", "encoder_hidden_states"),
            ("prompt_embeds_mask", "encoder_attention_mask"),
        ):
            given |= {f"{prefix}{ours}{n}": scale * words[f"{theirs}{n}"] for n in ("", "_2")}
    given |= {"num_inference_steps": piping.STEPS, "output_type": "latent", "return_dict": False}
    return piping.Piped(pipe, {**given, "num_frames": 5, "height": 128, "width": 128})


GUIDERS = {
    "CFG": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    "APG": lambda: diffusers.AdaptiveProjectedGuidance(guidance_scale=3.0),
    "CFG-zero": lambda: diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=3.0),
    "CFG that stops": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_the_halves_of_a_guider_are_halves(name):
    made = guided(GUIDERS[name]())
    plain = piping.image(made)
    with ckd.cached(made.pipe, ck.step_mask([1] * piping.STEPS)):
        assert torch.equal(piping.image(made), plain)
    with ckd.cached(made.pipe, halving()) as run:
        image = piping.image(made)
    assert 0 < piping.gap(image, plain) < 0.3
    streams = {key.partition("/")[2]: stream.computed for key, stream in run.summary().streams.items()}
    asked = piping.STEPS // 2 if "stops" in name else piping.STEPS
    assert streams == {"pred_cond": EVERY_OTHER, "pred_uncond": EVERY_OTHER[:asked]}


def test_a_policy_of_its_own_for_every_half_of_a_guider():
    made = guided(GUIDERS["CFG"]())
    policies = {"pred_cond": ck.step_mask([1, 1, 0, 1, 1, 0, 1, 1]), "pred_uncond": ck.step_mask([1, 0] * 4)}
    with ckd.cached(made.pipe, policies) as run:
        piping.image(made)
    skipped = {key.partition("/")[2]: stream.skipped for key, stream in run.summary().streams.items()}
    assert skipped == {"pred_cond": 2, "pred_uncond": 4}
