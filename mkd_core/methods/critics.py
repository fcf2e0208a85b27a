"""Critics, networks that judge predictions: AdvSemSeg's discriminator and GCT's flaw detector."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..models import resize


class Discriminator(nn.Sequential):
    """Class probabilities (B, C, H, W), sides of at least 32 -> logits (B, H, W) of "this is a label map";
    five 4x4 convolutions of stride 2."""

    def __init__(self, num_classes: int, width: int):
        widths = [num_classes, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, stride=2, padding=1))

    def forward(self, prob: Tensor) -> Tensor:
        return resize(super().forward(prob), prob.shape[-2:])[:, 0].float()


class FlawDetector(nn.Module):
    """Images (B, 3, H, W) and class probabilities (B, C, H, W), sides of at least 32 -> flaw (B, H, W), not
    bounded."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        shapes = ((1, 4, 2), (2, 4, 2), (2, 3, 1), (4, 4, 2), (4, 3, 1), (8, 4, 2), (8, 3, 1))
        for after, kernel, stride in shapes:
            after *= width
            layers += [nn.Conv2d(channels, after, kernel, stride, padding=1), HalfInstanceNorm(after)]
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            channels = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, stride=2, padding=1))

    def forward(self, images: Tensor, prob: Tensor) -> Tensor:
        return resize(self.layers(torch.cat((images, prob), 1)), images.shape[-2:])[:, 0].float()


class HalfInstanceNorm(nn.Module):
    """BatchNorm for the first half of the channels, InstanceNorm without affine part for the rest."""

    def __init__(self, channels: int):
        super().__init__()
        self.batch, self.instance = nn.BatchNorm2d(channels - channels // 2), nn.InstanceNorm2d(channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x.split([self.batch.num_features, self.instance.num_features], 1)
        return torch.cat((self.batch(first), self.instance(rest)), 1)


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Gradients pass through `net` and do not reach its parameters: a critic while it judges for the
    networks."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
