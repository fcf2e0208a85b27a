"""Augmentation: one geometry for image, label and validity (the weak view), colour on top (the strong view), CutMix boxes.

Geometry runs on uint8 in the loader's workers, one random generator per sample; colour runs on float batches on the
training device with parameters drawn per sample; boxes are drawn on the host and cost one small transfer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from .data.base import IGNORE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in [0, 1]
FILL = tuple(round(255 * m) for m in MEAN)  # padding: the mean colour, zero after normalisation


def geometry(
    image: Tensor,
    label: Tensor | None,
    crop: tuple[int, int],
    scale: tuple[float, float],
    base: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weak view: random scale, random crop, padding, horizontal flip; the same for image, label and validity.

    image (3, H, W) uint8, label (H, W) uint8 or None -> image (3, h, w) uint8, label (h, w) uint8, valid (h, w) bool
    with (h, w) = crop. Padding is FILL in the image, IGNORE in the label (all IGNORE without a label), False in valid.
    scale: range of the factor r, uniform. base 0: the image is scaled by r; base > 0: its long side becomes r * base
    (released MKD: base 512, r in [0.5, 2]). The crop is taken first and only it is resampled.
    """
    height, width = image.shape[-2:]
    factor = rng.uniform(*scale) * (base / max(height, width) if base else 1)
    scaled = [max(1, round(side * factor)) for side in (height, width)]
    # The window in the scaled image, then the same window in the source: at most the whole image.
    inside = [min(c, s) for c, s in zip(crop, scaled, strict=True)]
    top, left = (int(rng.integers(s - i + 1)) for s, i in zip(scaled, inside, strict=True))
    (rows, tall, y), (columns, wide, x) = (
        _source(*axis, factor) for axis in ((top, inside[0], height), (left, inside[1], width))
    )
    window = image[:, rows, columns]
    target = (torch.full((height, width), IGNORE, dtype=torch.uint8) if label is None else label)[
        rows, columns
    ]
    if window.shape[-2:] != (tall, wide):
        window = TF.resize_image(
            window, [tall, wide], interpolation=TF.InterpolationMode.BILINEAR, antialias=True
        )
        # "Exact" samples at pixel centres as the image does; plain nearest would shift labels by up to half a pixel.
        target = TF.resize_image(
            target[None], [tall, wide], interpolation=TF.InterpolationMode.NEAREST_EXACT
        )[0]
    window, target = (
        window[:, y : y + inside[0], x : x + inside[1]],
        target[y : y + inside[0], x : x + inside[1]],
    )
    if rng.random() < 0.5:
        window, target = window.flip(-1), target.flip(-1)
    room = [c - i for c, i in zip(crop, inside, strict=True)]
    above, before = (int(rng.integers(r + 1)) for r in room)
    place = (slice(above, above + inside[0]), slice(before, before + inside[1]))
    out = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, *crop)
    out[:, place[0], place[1]] = window
    out_label = torch.full(crop, IGNORE, dtype=torch.uint8)
    out_label[place] = target
    valid = torch.zeros(crop, dtype=torch.bool)
    valid[place] = True
    return out, out_label, valid


def _source(start: int, length: int, side: int, factor: float) -> tuple[slice, int, int]:
    """Along one axis: the source pixels under `length` scaled ones from `start`, their number once scaled, and where the crop begins."""
    first, last = int(start / factor), min(side, math.ceil((start + length) / factor))
    scaled = max(length, round((last - first) * factor))
    return slice(first, last), scaled, min(scaled - length, round(start - first * factor))


def normalise(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> zero mean, unit variance over ImageNet."""
    return (image - _constant(MEAN, image.device)) / _constant(STD, image.device)


@cache
def _constant(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """(3, 1, 1) on the device, sent once: every later copy would wait for it."""
    return torch.tensor(values, device=device)[:, None, None]


# Colour operations: (B, 3, H, W) float in [0, 1] -> the same; parameters are (B, 1, 1, 1) and drawn per sample.


def _uniform(images: Tensor, low: float, high: float) -> Tensor:
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)


def _grey(images: Tensor) -> Tensor:
    return (images * _constant((0.299, 0.587, 0.114), images.device)).sum(1, keepdim=True)


def _blend(images: Tensor, other: Tensor, amount: Tensor) -> Tensor:
    return (amount * images + (1 - amount) * other).clamp(0, 1)


def brightness(images: Tensor, strength: float = 0.5) -> Tensor:
    return (images * _uniform(images, 1 - strength, 1 + strength)).clamp(0, 1)


def contrast(images: Tensor, strength: float = 0.5) -> Tensor:
    return _blend(
        images, _grey(images).mean((2, 3), keepdim=True), _uniform(images, 1 - strength, 1 + strength)
    )


def saturation(images: Tensor, strength: float = 0.5) -> Tensor:
    return _blend(images, _grey(images), _uniform(images, 1 - strength, 1 + strength))


def hue(images: Tensor, strength: float = 0.25) -> Tensor:
    """Turn the hue by up to `strength` of a full turn: a rotation of the chroma plane of YIQ, one 3x3 matrix per sample."""
    turn = _uniform(images, -strength, strength).flatten(1)[..., None] * 2 * math.pi  # (B, 1, 1)
    luma, chroma, turned = _rotation(images.device)
    matrix = luma + turn.cos() * chroma + turn.sin() * turned
    return torch.einsum("bij,bjhw->bihw", matrix, images).clamp(0, 1)


@cache
def _rotation(device: torch.device) -> Tensor:
    """(3, 3, 3): RGB matrices of the luma, of the chroma plane, and of that plane turned by a quarter; made once a device."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    parts = torch.zeros(3, 3, 3)
    parts[0, 0, 0] = parts[1, 1, 1] = parts[1, 2, 2] = parts[2, 2, 1] = 1
    parts[2, 1, 2] = -1
    return (torch.linalg.inv(to_yiq) @ parts @ to_yiq).to(device)


def colour_jitter(images: Tensor) -> Tensor:
    """Brightness, contrast, saturation +-0.5, hue +-0.25 of a turn. Deviation: in this order (FixMatch, PseudoSeg: in a random one)."""
    return hue(saturation(contrast(brightness(images))))


def blur(images: Tensor, low: float = 0.1, high: float = 2.0) -> Tensor:
    """Gaussian blur, sigma U(low, high) per sample, kernel 7."""
    sigma = _uniform(images, low, high).flatten(1)
    tap = torch.arange(-3, 4, device=images.device)
    kernel = torch.softmax(-(tap**2) / (2 * sigma**2), 1)  # (B, 7)
    stack = torch.nn.functional.pad(images, (3, 3, 3, 3), mode="reflect").flatten(0, 1)[
        None
    ]  # (1, 3B, H+6, W+6)
    kernel = kernel.repeat_interleave(3, 0)[:, None]
    stack = torch.nn.functional.conv2d(stack, kernel[..., None], groups=len(kernel))
    return torch.nn.functional.conv2d(stack, kernel[:, :, None], groups=len(kernel))[0].unflatten(
        0, images.shape[:2]
    )


def greyscale(images: Tensor) -> Tensor:
    return _grey(images).expand_as(images)


def equalize(images: Tensor) -> Tensor:
    return TF.equalize(images)


def solarize(images: Tensor) -> Tensor:
    """Invert what is brighter than one half."""
    return torch.where(images >= 0.5, 1 - images, images)


def distort(images: Tensor) -> Tensor:
    """Photometric distortion of the released MKD weak view: brightness, contrast, saturation, hue, each with probability 0.5.

    Ranges: +-32/255, x U(0.5, 1.5) twice, +-0.1 turn. Deviation: RGB (the released code works on BGR arrays), contrast before HSV only.
    """
    images = _sometimes(lambda x: (x + _uniform(x, -32 / 255, 32 / 255)).clamp(0, 1), 0.5)(images)
    for operation, strength in ((contrast, 0.5), (saturation, 0.5), (hue, 0.1)):
        images = _sometimes(partial(operation, strength=strength), 0.5)(images)
    return images


def _sometimes(operation: Callable[[Tensor], Tensor], probability: float) -> Callable[[Tensor], Tensor]:
    """The operation on a random part of the batch."""

    def apply(images: Tensor) -> Tensor:
        return torch.where(
            torch.rand(len(images), 1, 1, 1, device=images.device) < probability, operation(images), images
        )

    return apply


def one_of(images: Tensor) -> Tensor:
    """MKD: exactly one operator per image. Weights of the released code: jitter 0.3, blur 0.5, equalize 0.1, solarize 0.1, grey 0.5."""
    operations = (colour_jitter, blur, equalize, solarize, greyscale)
    choice = torch.multinomial(
        torch.tensor([0.3, 0.5, 0.1, 0.1, 0.5]), len(images), replacement=True
    )  # on the host: no sync
    return _apply(operations, choice[:, None], images)


def _apply(operations: Sequence[Callable[[Tensor], Tensor]], choice: Tensor, images: Tensor) -> Tensor:
    """To each image the operations whose numbers are in its row of `choice` (B, n), on the host, in the order of `operations`."""
    out = images.clone()
    for k, operation in enumerate(operations):
        chosen = _send((choice == k).any(1).nonzero().flatten(), images.device)
        if len(chosen):
            out[chosen] = operation(out[chosen])
    return out


def chain(images: Tensor) -> Tensor:
    """FixMatch / UniMatch: jitter with probability 0.8, grey 0.2, blur 0.5."""
    for operation, probability in ((colour_jitter, 0.8), (greyscale, 0.2), (blur, 0.5)):
        images = _sometimes(operation, probability)(images)
    return images


# What SimpleBaseline adds; "per channel" draws for each channel of each image.


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
    return images * (torch.rand_like(images) >= _uniform(images, 0.2, 0.5))


def coarse_dropout(images: Tensor) -> Tensor:
    """Each of 4 x 4 rectangles of a channel is black with probability 0.2 (released: 2 to 5 rectangles a side)."""
    kept = (torch.rand(len(images), 3, 4, 4, device=images.device) >= 0.2).to(images.dtype)
    return images * torch.nn.functional.interpolate(kept, images.shape[-2:])


def multiply(images: Tensor) -> Tensor:
    """Per channel, by U(0.25, 2.5)."""
    return (images * torch.empty(len(images), 3, 1, 1, device=images.device).uniform_(0.25, 2.5)).clamp(0, 1)


def salt_and_pepper(images: Tensor) -> Tensor:
    """Each pixel of a channel is black or white with probability p ~ U(0, 0.1)."""
    return torch.where(
        torch.rand_like(images) < _uniform(images, 0, 0.1), torch.rand_like(images).round(), images
    )


def three_of(images: Tensor) -> Tensor:
    """SimpleBaseline: three of its 17 operators per image, in the order of the list, at the released magnitude (20 of 40).

    At that magnitude gamma (1.01) and the hue shift (0) change nothing visible and both kinds of brightness are one. They keep their
    places in the draw, as does JPEG compression (quality 85 to 95), which has no device version here.
    """
    same, brighter = (lambda x: x), (lambda x: (x + 16 / 255).clamp(0, 1))
    operations = (
        same, lambda x: (0.5 + 1.27 * (x - 0.5)).clamp(0, 1), brighter, brighter, equalize, same, lambda x: x.flip(1),
        partial(blur, low=1.76, high=1.76), gaussian_noise, poisson_noise, channel_shuffle, dropout, coarse_dropout, multiply,
        salt_and_pepper, solarize, same,
    )  # fmt: skip
    return _apply(operations, torch.rand(len(images), len(operations)).argsort(1)[:, :3], images)


STRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "one_of": one_of,
    "chain": chain,
    "three_of": three_of,
    "none": lambda images: images,
}


# CutMix. A mask is True where an image keeps its own pixel and False where its partner's is pasted.


def partner(tensor: Tensor) -> Tensor:
    """Sample i's partner is sample i + 1 of the batch, the last one's is the first (released MKD): never itself for B >= 2."""
    return tensor.roll(-1, 0)


def mix(tensor: Tensor, mask: Tensor) -> Tensor:
    """Own value where mask (B, H, W) holds, the partner's elsewhere, for (B, H, W) or (B, C, H, W): images, logits, labels, validity."""
    return torch.where(mask if tensor.ndim == 3 else mask[:, None], tensor, partner(tensor))


def xor_boxes(
    batch: int,
    size: Sequence[int],
    device: torch.device | str = "cpu",
    boxes: int = 3,
    area: tuple[float, float] = (0.25, 0.5),
) -> Tensor:
    """CutMix mask (batch, H, W) bool of CPS and MKD ("BOX-3"): `boxes` boxes toggle, True inside an odd number of them.

    Each box draws an area fraction p ~ U(area), a log-uniform aspect y = p ** U(0, 1), x = p / y, both sides times sqrt(1 / boxes), and
    a place inside the image. French et al. use one box of area 0.5: boxes=1, area=(0.5, 0.5). 0 boxes: all True, no mixing.
    Released MKD mixes M * own + (1 - M) * partner with this M: own pixels are the smaller part (mean 0.252).
    Drawn from torch's global generator on the host.
    """
    height, width = size
    if boxes == 0:
        return torch.ones(batch, height, width, dtype=torch.bool, device=device)
    p = torch.empty(batch, boxes).uniform_(*area)
    y = p ** torch.rand(batch, boxes)
    sides = torch.stack((y, p / y), -1) * math.sqrt(1 / boxes)
    extent = (sides * torch.tensor([height, width])).round()  # (batch, boxes, 2)
    start = ((torch.tensor([height, width]) - extent) * torch.rand(batch, boxes, 2)).round()
    return _inside(start, start + extent, size, device).sum(1) % 2 == 1


def ratio_box(
    batch: int,
    size: Sequence[int],
    device: torch.device | str = "cpu",
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
) -> Tensor:
    """CutMix mask (batch, H, W) bool of FixMatch and UniMatch ("BOX-UM"), ST++'s CutOut too: False inside one box, the partner's.

    With `probability` (else all True) a sample draws an area fraction ~ U(area), height / width ~ U(0.3, 1 / 0.3) and a place inside.
    Released: ratio and place are drawn again until the box lies inside. That favours ratios with much room; here the ratio comes at once
    from 128 equal steps weighted by that room, which is the same law. Drawn from torch's global generator on the host.
    """
    height, width = size
    pixels = torch.empty(batch, 1).uniform_(*area) * height * width
    ratio = 0.3 + (1 / 0.3 - 0.3) * (torch.arange(128) + torch.rand(batch, 128)) / 128
    extents = torch.stack(
        ((pixels * ratio).sqrt(), (pixels / ratio).sqrt()), -1
    ).floor()  # (batch, 128, 2): height, width
    sides = torch.tensor(size)
    none_fits = (
        ~(extents <= sides).all(-1).any(1)[:, None, None]
    )  # a box of that area has no place in a long crop: it is cut off
    extents = torch.where(none_fits, torch.minimum(extents, sides), extents)
    room = (sides - extents + 1).clamp_min(0)
    chosen = torch.multinomial(room.prod(-1), 1)[..., None].expand(-1, -1, 2)
    start = (torch.rand(batch, 1, 2) * room.gather(1, chosen)).floor()
    extent = extents.gather(1, chosen) * (torch.rand(batch, 1, 1) < probability)
    return ~_inside(start, start + extent, size, device)[:, 0]


def beta_box(batch: int, size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """CutMix mask (batch, H, W) bool of PS-MT on VOC ("BOX-B"): False inside one box, the partner's.

    The batch draws one p ~ Beta(4, 4); both sides are sqrt(1 - p) of the image's, the centre of each sample lies anywhere but in the first
    eighth, and what reaches over the border is cut off (mean area 0.36). Drawn from torch's global generator on the host.
    """
    sides = torch.tensor(size)
    half = ((1 - torch.distributions.Beta(4.0, 4.0).sample()).sqrt() * sides).floor() // 2
    first = sides // 8
    centre = (first + torch.rand(batch, 1, 2) * (sides - first)).floor()
    return ~_inside(centre - half, centre + half, size, device)[:, 0]


def half_box(
    batch: int, size: Sequence[int], device: torch.device | str = "cpu", probability: float = 0.5
) -> Tensor:
    """CutMix mask (batch, H, W) bool of U2PL ("BOX-U2"): False, the partner's, inside one box of half the area.

    Width ~ U{floor(W / 2) + 1, ..., W - 1}, height = round(H W / 2 / width), any place inside. One coin for the whole batch: with
    `probability` it is mixed, else all True. Drawn from torch's global generator on the host.
    """
    height, width = size
    mixed = torch.rand(()) < probability
    wide = torch.randint(width // 2 + 1, width, (batch, 1))
    extent = torch.stack(((height * width / 2 / wide).round(), wide), -1)
    start = ((torch.tensor([height, width]) - extent + 1) * torch.rand(batch, 1, 2)).floor()
    return ~_inside(start, start + extent * mixed, size, device)[:, 0]


def square(
    batch: int, size: Sequence[int], device: torch.device | str = "cpu", share: float = 100 / 513
) -> Tensor:
    """CutOut mask (batch, H, W) bool of PseudoSeg: False inside one square, `share` of the shorter side wide, anywhere in the image.

    The released square is 100 pixels of a crop of 513. Drawn from torch's global generator on the host.
    """
    side = round(share * min(size))
    start = (torch.rand(batch, 1, 2) * (torch.tensor(size) - side + 1)).floor()
    return ~_inside(start, start + side, size, device)[:, 0]


def _inside(start: Tensor, end: Tensor, size: Sequence[int], device: torch.device | str) -> Tensor:
    """Corners (batch, boxes, 2), top and left, on the host -> (batch, boxes, H, W) bool on the device; only the corners are sent over."""
    corners = _send(torch.stack((start, end)), device)
    inside = []
    for axis, side in enumerate(size):
        place = torch.arange(side, device=device)
        inside.append((place >= corners[0, ..., axis, None]) & (place < corners[1, ..., axis, None]))
    return inside[0][..., :, None] & inside[1][..., None, :]


def _send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """To the device without waiting for it: pageable memory would."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if torch.device(device).type == "cuda"
        else tensor.to(device)
    )
