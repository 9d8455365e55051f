"""What a run of the demo multiplies, against numbers worked out by hand from the shapes of the digits model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import flop_registry

import cachekit as ck
from cachekit.demo.runs import Sampler, run
from cachekit.demo.sample import GUIDANCE, sample, timesteps
from cachekit.demo.settings import Setting
from cachekit.demo.work import multiplications
from cachekit.diffusers import digits

# 64 patches of 2x2 pixels, width 128, feed-forward networks of 512, 4 tokens of text of 15 numbers, 6 blocks.
PATCHES, PIXELS, WIDTH, HIDDEN, TOKENS, TEXT, BLOCKS, FREQUENCIES = 64, 4, 128, 512, 4, 15, 6, 64
SELF = 4 * PATCHES * WIDTH**2 + 2 * PATCHES**2 * WIDTH  # query, key, value, out; scores, and values by scores
CROSS = 2 * PATCHES * WIDTH**2 + 2 * TOKENS * WIDTH**2 + 2 * PATCHES * TOKENS * WIDTH
MLP = 2 * PATCHES * WIDTH * HIDDEN
BLOCK = SELF + CROSS + MLP
TIME = FREQUENCIES * WIDTH + WIDTH**2 + WIDTH * 6 * WIDTH
AROUND = 2 * PATCHES * PIXELS * WIDTH + TIME + TOKENS * TEXT * WIDTH + TOKENS * WIDTH**2  # in and out, time, text
MODEL = AROUND + BLOCKS * BLOCK
STEPS, MASK = 10, (True, False, False, True, False, True, False, False, False, True)
LABELS = torch.arange(2)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return digits.load()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_forward_of_the_digits_model(model, batch):
    x, labels = torch.zeros(batch, 1, 1, digits.SIZE, digits.SIZE), torch.arange(batch)
    assert multiplications(model, **digits.inputs(x, 0.5, labels)) == batch * MODEL == batch * 95_813_120


def test_attention_counts_whatever_torch_knows_of_it(monkeypatch):
    """Releases count the fused operator of the CPU differently, or not at all; here one counts too much."""
    heads = torch.zeros(2, 4, 64, 32)
    text = torch.zeros(2, 4, 5, 32)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setitem(flop_registry, fused, lambda *args, **kwargs: 10**12)
    assert multiplications(scaled_dot_product_attention, heads, text, text) == 2 * (2 * 4 * 64 * 5 * 32)


def test_convolutions_and_products_count_and_sums_do_not():
    image = torch.zeros(1, 3, 8, 8)
    assert multiplications(torch.nn.Conv2d(3, 5, 3, padding=1), image) == 5 * 8 * 8 * 3 * 9
    assert multiplications(torch.add, image, image) == 0


@pytest.mark.parametrize(
    ("setting", "reused"),
    [
        (Setting("step_mask", "output", STEPS, ck.step_mask(MASK, sites="output")), 0),
        (Setting("step_mask", "chain", STEPS, ck.step_mask(MASK)), AROUND),
        (Setting("step_mask", "attention", STEPS, ck.step_mask(MASK, sites="attention")), AROUND + BLOCKS * MLP),
        (Setting("step_mask", "mlp", STEPS, ck.step_mask(MASK, sites="mlp")), AROUND + BLOCKS * (SELF + CROSS)),
        (Setting("step_mask", "both", STEPS, ck.step_mask(MASK, sites="attention+mlp")), AROUND),
    ],
    ids=lambda each: getattr(each, "detail", ""),
)
def test_work_of_a_mask(model, setting, reused):
    assert run(model, setting, LABELS, 0).work == pytest.approx(4 + 6 * reused / MODEL)


def test_work_without_a_cache_is_the_number_of_steps(model):
    assert run(model, Setting("fewer steps", "7", 7), LABELS, 0).work == 7


def test_work_of_a_probe_that_runs_in_every_step(model):
    """A threshold that nothing reaches computes the first step alone, and the first block in all."""
    made = run(model, Setting("first_block_cache", "", STEPS, ck.first_block_cache(1e9)), LABELS, 0)
    assert made.work == pytest.approx(1 + 9 * (AROUND + BLOCK) / MODEL)


def test_work_of_kinds_that_are_left_out_at_steps_of_their_own(model):
    policy = ck.pyramid_attention_broadcast(2, cross=5, spatial_range=(-1, 1001), cross_range=(-1, 1001))
    made = run(model, Setting("pyramid_attention_broadcast", "", STEPS, policy), LABELS, 0)
    plan = ck.cache(model, policy).plan(1000 * timesteps(STEPS)[:-1])
    skipped = (
        sum(not each for each in plan.kinds["spatial"]) * SELF + sum(not each for each in plan.kinds["cross"]) * CROSS
    )
    assert skipped > 0
    assert made.work == pytest.approx(STEPS - BLOCKS * skipped / MODEL)


@pytest.mark.parametrize(
    "policy",
    [
        ck.first_block_cache(0.3),
        ck.faster_cache(cfg="separate", layout="BCFHW", attention_range=(-1, 1001), uncond_range=(-1, 1001)),
        ck.taylorseer(3, warmup=2),
    ],
    ids=lambda policy: policy.name,
)
def test_one_forward_of_every_action_tells_of_the_whole_run(model, policy):
    """With decisions made on the way, and with the unconditional half of guidance left out."""
    setting = Setting("", "", STEPS, policy)
    sampler = Sampler(model, setting, LABELS, lambda: None)
    counted = multiplications(sample, sampler, LABELS, STEPS, GUIDANCE, seed=0)
    whole = 2 * len(LABELS) * MODEL
    made = run(model, setting, LABELS, 0)
    assert 1 < made.work < STEPS
    assert made.work == pytest.approx(counted / whole)
