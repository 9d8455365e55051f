"""Handwritten digits as the demo's images, and the judge of the samples drawn from them."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import interpolate

from cachekit.diffusers.digits import SIZE


class Digits(NamedTuple):
    """A set of labelled images."""

    images: Tensor  # [N, 1, 1, 16, 16] float32 in [-1, 1]: channel, frame, height, width
    labels: Tensor  # [N] int64, 0..9


@cache
def splits() -> tuple[Digits, Digits]:
    """The training set (1,497 digits) and the held-out set (300): always the same, each class in proportion."""
    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    # Bicubic overshoots next to sharp strokes, hence the clamp.
    images = interpolate(small, size=(SIZE, SIZE), mode="bicubic").clamp(-1, 1)[:, :, None]
    train, held_out = train_test_split(range(len(labels)), test_size=300, random_state=0, stratify=labels)
    targets = torch.from_numpy(labels).long()
    return Digits(images[train], targets[train]), Digits(images[held_out], targets[held_out])


def recognised(samples: Tensor, labels: Tensor) -> float:
    """Share of the samples [N, 1, 1, 16, 16] that a classifier of real digits reads as their labels [N]."""
    return float(_judge().score(_features(samples), labels.numpy(force=True)))


@cache
def _judge() -> SVC:
    train, _ = splits()
    return SVC(kernel="rbf", C=10).fit(_features(train.images), train.labels.numpy())


def _features(images: Tensor) -> np.ndarray:
    """[N, 256] float32 of the pixels of images [N, 1, 1, 16, 16]."""
    return images.flatten(1).float().clamp(-1, 1).numpy(force=True)
