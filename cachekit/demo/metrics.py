"""How close two sets of images are: PSNR and SSIM."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cachekit.planning import choosing

RANGE = 2.0
"""Of the data: images live in [-1, 1]."""
WINDOW = 7


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image, `10 log10(RANGE^2 / MSE)` in dB: [B] float64, infinite where equal.

    The demo shows the mean over the images, and the least. The error of all images pooled would be that of the one
    image that went another way: of 40 digits a single one can hold two thirds of it. Nothing is clamped to [-1, 1]
    first: that would forgive whatever happens beyond the ends.

    Args:
        images, reference: [B, ...] of equal shape, [-1, 1].
    """
    return choosing.psnr(images, reference, RANGE)


def ssim(images: Tensor, reference: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) over uniform 7x7 windows inside the images; 1 where all is equal.

    Args:
        images, reference: [..., H, W] of equal shape, [-1, 1], H and W at least 7.
    """
    x, y = (batch.double().flatten(0, -3)[:, None] for batch in (images, reference))
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    mean_x, mean_y = _mean(x), _mean(y)
    var_x, var_y = _mean(x * x) - mean_x**2, _mean(y * y) - mean_y**2
    covariance = _mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return torch.mean(luminance * structure).item()


def _mean(images: Tensor) -> Tensor:
    """Of every window: [B, 1, H, W] -> [B, 1, H - 6, W - 6]."""
    return avg_pool2d(images, WINDOW, stride=1)
