"""The strong view: colour operations and the mixtures of the papers.

Each takes (B, 3, H, W) float in [0, 1] and returns the same; `draw` draws its parameters, one per sample.
Deviations from released MKD: RGB (theirs BGR); after padding, which takes colour too (theirs before).
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from .boxes import send
from .weak import constant

Draw = Callable[[Tensor, float, float], Tensor]


def uniform(images: Tensor, low: float, high: float) -> Tensor:
    """Draw (B, 1, 1, 1) values U(low, high) on the device of the images."""
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)


def _grey(images: Tensor) -> Tensor:
    return (images * constant((0.299, 0.587, 0.114), images.device)).sum(1, keepdim=True)


def _blend(images: Tensor, other: Tensor, amount: Tensor) -> Tensor:
    return (amount * images + (1 - amount) * other).clamp(0, 1)


def brightness(images: Tensor, draw: Draw = uniform) -> Tensor:
    return (images * draw(images, 0.5, 1.5)).clamp(0, 1)


def contrast(images: Tensor, draw: Draw = uniform) -> Tensor:
    return _blend(images, _grey(images).mean((2, 3), keepdim=True), draw(images, 0.5, 1.5))


def saturation(images: Tensor, draw: Draw = uniform) -> Tensor:
    return _blend(images, _grey(images), draw(images, 0.5, 1.5))


def hue(images: Tensor, strength: float = 0.25, draw: Draw = uniform) -> Tensor:
    """Rotate the chroma plane of YIQ by up to `strength` of a full turn: one 3x3 matrix per sample."""
    turn = draw(images, -strength, strength).flatten(1)[..., None] * 2 * math.pi  # (B, 1, 1)
    luma, chroma, turned = _rotation(images.device)
    matrix = luma + turn.cos() * chroma + turn.sin() * turned
    return torch.einsum("bij,bjhw->bihw", matrix, images).clamp(0, 1)


@cache
def _rotation(device: torch.device) -> Tensor:
    """(3, 3, 3): RGB matrices of the luma, of the chroma plane, and of that plane turned by a quarter."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    parts = torch.zeros(3, 3, 3)
    parts[0, 0, 0] = parts[1, 1, 1] = parts[1, 2, 2] = parts[2, 2, 1] = 1
    parts[2, 1, 2] = -1
    return (torch.linalg.inv(to_yiq) @ parts @ to_yiq).to(device)


def colour_jitter(images: Tensor, draw: Draw = uniform) -> Tensor:
    """Brightness, contrast, saturation +-0.5, hue +-0.25 of a turn.

    Deviations: in this order (released: in a random one); hue in YIQ (released: HSV).
    """
    for operation in (brightness, contrast, saturation, hue):
        images = operation(images, draw=draw)
    return images


def blur(images: Tensor, low: float = 0.1, high: float = 2.0, draw: Draw = uniform) -> Tensor:
    """Gaussian blur, sigma U(low, high) per sample, kernel 7 (released MKD: 3 to 7; FixMatch: no limit)."""
    sigma = draw(images, low, high).flatten(1)
    tap = torch.arange(-3, 4, device=images.device)
    kernel = torch.softmax(-(tap**2) / (2 * sigma**2), 1)  # (B, 7)
    kernel = kernel.repeat_interleave(3, 0)[:, None]
    stack = F.pad(images, (3, 3, 3, 3), mode="reflect").flatten(0, 1)[None]  # (1, 3B, H+6, W+6)
    stack = F.conv2d(stack, kernel[..., None], groups=len(kernel))
    return F.conv2d(stack, kernel[:, :, None], groups=len(kernel))[0].unflatten(0, images.shape[:2])


def greyscale(images: Tensor, draw: Draw = uniform) -> Tensor:
    return _grey(images).expand_as(images)


equalize, solarize = TF.equalize, partial(TF.solarize, threshold=0.5)  # solarize inverts what is brighter


def _shift(images: Tensor, draw: Draw = uniform) -> Tensor:
    return (images + draw(images, -32 / 255, 32 / 255)).clamp(0, 1)


def distort(images: Tensor) -> Tensor:
    """Photometric distortion of the released MKD weak view, each part with probability 0.5.

    Brightness +-32/255, contrast and saturation x U(0.5, 1.5), hue +-0.1 turn.
    Contrast, about black, is our `brightness`. Deviations: it comes before saturation (released: or last);
    saturation by blending with grey, hue in YIQ (released: both in HSV).
    """
    for operation in (_shift, brightness, saturation, partial(hue, strength=0.1)):
        images = _sometimes(images, operation, 0.5)
    return images


def _sometimes(images: Tensor, operation: Callable[..., Tensor], probability: float) -> Tensor:
    """Apply the operation to a random part of the batch; its parameters are drawn for the whole batch.

    Only that part is computed. It is drawn on the host: asking a device how large it is would wait.
    """
    chosen = (torch.rand(len(images), 1, 1, 1) < probability).flatten().nonzero().flatten()
    if not len(chosen):
        operation(images)  # for its draws
        return images
    chosen, out = send(chosen, images.device), images.clone()
    out[chosen] = operation(images[chosen], draw=lambda _, low, high: uniform(images, low, high)[chosen])
    return out


def one_of(images: Tensor) -> Tensor:
    """MKD: exactly one operator per image.

    Weights of the released code: jitter 0.3, blur 0.5, equalize 0.1, solarize 0.1, grey 0.5.
    """
    operations = (colour_jitter, blur, equalize, solarize, greyscale)
    weights = torch.tensor([0.3, 0.5, 0.1, 0.1, 0.5])  # on the host: no waiting for the device
    choice = torch.multinomial(weights, len(images), replacement=True)
    return apply_chosen(operations, choice[:, None], images)


def apply_chosen(operations: Sequence[Callable[[Tensor], Tensor]], choice: Tensor, images: Tensor) -> Tensor:
    """Apply to each image the operations whose numbers are in its row of `choice`, (B, n) on the host.

    They are applied in the order of `operations`.
    """
    out = images.clone()
    for k, operation in enumerate(operations):
        chosen = send((choice == k).any(1).nonzero().flatten(), images.device)
        if len(chosen):
            out[chosen] = operation(out[chosen])
    return out


def chain(images: Tensor) -> Tensor:
    """FixMatch / UniMatch: jitter with probability 0.8, grey 0.2, blur 0.5."""
    for operation, probability in ((colour_jitter, 0.8), (greyscale, 0.2), (blur, 0.5)):
        images = _sometimes(images, operation, probability)
    return images


# By name, for a run's `strong`; SimpleBaseline adds its own (methods/noise.py).
STRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "one_of": one_of,
    "chain": chain,
    "none": lambda images: images,
}
