"""Train the digits model by flow matching: `python -m cachekit.demo.train`.

An image x0 and noise e are joined by the line x_t = (1 - t) x0 + t e; the model learns its velocity e - x0.
"""

import argparse
import copy
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

from cachekit.demo.data import recognised, splits
from cachekit.demo.sample import Stream, sample
from cachekit.diffusers import digits

BATCH = 64
DROPOUT = 0.1  # share of labels replaced by `NULL`, so that the model learns both streams of guidance
RATE = 1e-3
WARMUP = 100
DECAY = 0.999  # of the averaged weights, a step
SAVE_EVERY = 250


def learning_rate(step: int, steps: int) -> float:
    """Rate of step 0..steps - 1: a linear warm-up, then half a cosine down to zero."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    return RATE * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP))) / 2


def flow_loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """[] float32: mean squared error of the velocity on images [B, 1, 1, 16, 16] at random times."""
    noise = torch.randn(images.shape, generator=generator)
    # Logit-normal: most of what is hard to predict lies between the ends.
    t = torch.randn(len(images), generator=generator).sigmoid()
    dropped = torch.rand(len(labels), generator=generator) < DROPOUT
    mixed = torch.lerp(images, noise, t.view(-1, 1, 1, 1, 1))
    velocity = model(**digits.inputs(mixed, t, labels.masked_fill(dropped, digits.NULL)))[0]
    return mse_loss(velocity, noise - images)


def train(steps: int, seed: int, checkpoint: Path) -> nn.Module:
    """The model of averaged weights after `steps` steps in all, those of an existing `checkpoint` included."""
    data, _ = splits()
    torch.manual_seed(seed)
    model = digits.build().train()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    start = 0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start = state["step"]

    progress = tqdm(range(start, steps), initial=start, total=steps, unit="step", mininterval=1)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = torch.randint(len(data.images), (BATCH,), generator=generator)
        loss = flow_loss(model, data.images[batch], data.labels[batch], generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # A short memory at first: the random start would weigh on the average for thousands of steps.
        decay = min(DECAY, (1 + step) / (10 + step))
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new.detach(), 1 - decay)
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
            }
            _save(state, checkpoint)
    return average


def _save(state: dict[str, Any], path: Path) -> None:
    """Write beside, then rename: an interrupted write leaves the previous checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".part")
    torch.save(state, beside)
    os.replace(beside, path)


def main() -> None:
    """Read the command line, train, write the weights and print how many samples are recognised."""
    parser = argparse.ArgumentParser(
        prog="python -m cachekit.demo.train",
        description="Train the digits model. A run that was interrupted goes on from its checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=3000, help="training steps in all")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches")
    parser.add_argument("--out", type=Path, default=Path("demo_output/digits.safetensors"), help="weights, float32")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("demo_output/train.pt"), help="resumed from when it exists"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = train(args.steps, args.seed, args.checkpoint)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.out)
    print(f"Wrote {args.out} ({args.out.stat().st_size / 1e6:.2f} MB).")

    def velocity(x: Tensor, t: Tensor, labels: Tensor, stream: Stream) -> Tensor:
        return model(**digits.inputs(x, t, labels))[0]

    labels = torch.arange(100) % digits.CLASSES
    share = recognised(sample(velocity, labels), labels)
    print(f"Recognised {share:.0%} of {len(labels)} samples.")


if __name__ == "__main__":
    main()
