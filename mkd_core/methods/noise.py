"""SimpleBaseline's strong view, `strong: three_of`: three of seventeen operators, seven of them its own.

Each takes (B, 3, H, W) float in [0, 1] and returns the same; "per channel" draws for each channel
of each image.
"""

from functools import partial

import torch
from torch import Tensor

from ..augment.colour import apply_chosen, blur, equalize, solarize, uniform


def gaussian_noise(images: Tensor, deviation: float = 14 / 255) -> Tensor:
    return (images + deviation * torch.randn_like(images)).clamp(0, 1)


def poisson_noise(images: Tensor, mean: float = 12.6) -> Tensor:
    """Plus or minus a Poisson count of grey levels, one for the three channels."""
    count = torch.poisson(torch.full_like(images[:, :1], mean))
    return (images + torch.where(torch.rand_like(count) < 0.5, count, -count) / 255).clamp(0, 1)


def channel_shuffle(images: Tensor) -> Tensor:
    order = torch.rand(len(images), 3, device=images.device).argsort(1)
    return images.gather(1, order[..., None, None].expand_as(images))


def dropout(images: Tensor) -> Tensor:
    """Each pixel of a channel is black with probability p ~ U(0.2, 0.5)."""
    return images * (torch.rand_like(images) >= uniform(images, 0.2, 0.5))


def coarse_dropout(images: Tensor) -> Tensor:
    """Each of 4 x 4 rectangles of a channel is black with probability 0.2 (released: 2 to 5 a side)."""
    kept = (torch.rand(len(images), 3, 4, 4, device=images.device) >= 0.2).to(images.dtype)
    return images * torch.nn.functional.interpolate(kept, images.shape[-2:])


def multiply(images: Tensor) -> Tensor:
    """Per channel, by U(0.25, 2.5)."""
    return (images * torch.empty(len(images), 3, 1, 1, device=images.device).uniform_(0.25, 2.5)).clamp(0, 1)


def salt_and_pepper(images: Tensor) -> Tensor:
    """Each pixel of a channel is black or white with probability p ~ U(0, 0.1)."""
    hit = torch.rand_like(images) < uniform(images, 0, 0.1)
    return torch.where(hit, torch.rand_like(images).round(), images)


def three_of(images: Tensor) -> Tensor:
    """Three of 17 operators per image, in the order of the list, at the released magnitude (20 of 40).

    At that magnitude gamma (1.01) and the hue shift (0) change nothing visible and both kinds of
    brightness are one. They keep their places in the draw, as does JPEG compression (quality 85 to
    95), which has no device version here.
    """
    same, brighter = (lambda x: x), (lambda x: (x + 16 / 255).clamp(0, 1))
    operations = (
        same, lambda x: (0.5 + 1.27 * (x - 0.5)).clamp(0, 1), brighter, brighter, equalize, same,
        lambda x: x.flip(1), partial(blur, low=1.76, high=1.76), gaussian_noise, poisson_noise, channel_shuffle,
        dropout, coarse_dropout, multiply, salt_and_pepper, solarize, same,
    )  # fmt: skip
    return apply_chosen(operations, torch.rand(len(images), len(operations)).argsort(1)[:, :3], images)
