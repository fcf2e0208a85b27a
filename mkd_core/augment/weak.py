"""The weak view: random scale, crop and flip of image, label and validity; normalising."""

import math
from functools import cache

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from ..data.base import IGNORE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in [0, 1]
FILL = tuple(round(255 * m) for m in MEAN)  # padding: the mean colour, zero after normalisation


def geometry(
    image: Tensor, label: Tensor | None, crop: tuple[int, int], scale: tuple[float, float], base: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weak view: random scale, random crop, padding, horizontal flip; the same for image, label and validity.

    image (3, H, W) uint8, label (H, W) uint8 or None
        -> image (3, h, w) uint8, label (h, w) uint8, valid (h, w) bool with (h, w) = crop
    scale   range of the factor r, uniform
    base    0: the image is scaled by r; else its long side becomes r * base (released MKD: 512,
            r in [0.5, 2])
    Padding is FILL in the image, IGNORE in the label (all IGNORE without a label), False in valid; its
    sides are random (released: right and below). Only the crop is resampled (released MKD: no antialias).
    """
    height, width = image.shape[-2:]
    factor = rng.uniform(*scale) * (base / max(height, width) if base else 1)
    scaled = [max(1, round(side * factor)) for side in (height, width)]
    # The window in the scaled image, then the same window in the source: at most the whole image.
    inside = [min(c, s) for c, s in zip(crop, scaled, strict=True)]
    top, left = (int(rng.integers(s - i + 1)) for s, i in zip(scaled, inside, strict=True))
    rows, tall, y = _source(top, inside[0], height, factor)
    columns, wide, x = _source(left, inside[1], width, factor)
    label = torch.full((height, width), IGNORE, dtype=torch.uint8) if label is None else label
    window, target = image[:, rows, columns], label[None, rows, columns]
    if window.shape[-2:] != (tall, wide):
        # "Exact" samples at pixel centres, as the image does; plain nearest shifts labels by half a pixel.
        window = TF.resize_image(window, [tall, wide], TF.InterpolationMode.BILINEAR, antialias=True)
        target = TF.resize_image(target, [tall, wide], TF.InterpolationMode.NEAREST_EXACT)
    window, target = (found[:, y : y + inside[0], x : x + inside[1]] for found in (window, target))
    if rng.random() < 0.5:
        window, target = window.flip(-1), target.flip(-1)
    room = [c - i for c, i in zip(crop, inside, strict=True)]
    above, before = (int(rng.integers(r + 1)) for r in room)
    place = (..., slice(above, above + inside[0]), slice(before, before + inside[1]))
    out = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, *crop)
    out_label = torch.full(crop, IGNORE, dtype=torch.uint8)
    valid = torch.zeros(crop, dtype=torch.bool)
    out[place], out_label[place], valid[place] = window, target[0], True
    return out, out_label, valid


def _source(start: int, length: int, side: int, factor: float) -> tuple[slice, int, int]:
    """Find, along one axis, the source pixels under `length` scaled ones from `start`.

    Returns the slice of them, their number once scaled, and where in these the crop begins.
    """
    first, last = int(start / factor), min(side, math.ceil((start + length) / factor))
    scaled = max(length, round((last - first) * factor))
    return slice(first, last), scaled, min(scaled - length, round(start - first * factor))


def normalise(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> zero mean, unit variance over ImageNet."""
    return (image - constant(MEAN, image.device)) / constant(STD, image.device)


@cache
def constant(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """(3, 1, 1) on the device, sent once: every later copy would wait for it."""
    return torch.tensor(values, device=device)[:, None, None]
