"""What smp does not have: the decoders of released MKD and of UniMatch V2, and vision transformers as encoders.

As in smp an encoder gives a list of maps, of which decoders read those from index 2 (1/4 of the image) on.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 1, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias that keeps the map's size, BatchNorm, ReLU."""
    padding = dilation * (size // 2)
    layer = nn.Conv2d(inputs, outputs, size, 1, padding, dilation, groups, bias=False)
    return nn.Sequential(OrderedDict(conv=layer, bn=nn.BatchNorm2d(outputs), relu=nn.ReLU(inplace=True)))


def separable(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
    """3x3 on each channel alone, then 1x1; both with BatchNorm and ReLU."""
    depthwise = conv(inputs, inputs, 3, dilation, groups=inputs)
    return nn.Sequential(OrderedDict(depthwise_conv=depthwise, pointwise_conv=conv(inputs, outputs)))


class SeparableASPP(nn.Module):
    """DeepLabV3+ as in MMSegmentation, by its names: ASPP 1, 6, 12, 18, low level 48, two separable fusions.

    low, deep: channels of the maps at 1/4 and of the last one -> (B, channels, H/4, W/4).
    """

    def __init__(self, low: int, deep: int, channels: int, dropout: float):
        super().__init__()
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(deep, channels))
        dilated = [separable(deep, channels, rate) for rate in (6, 12, 18)]
        self.aspp_modules = nn.ModuleList([conv(deep, channels), *dilated])
        self.bottleneck = conv(5 * channels, channels, 3)
        self.c1_bottleneck = conv(low, 48)
        self.sep_bottleneck = nn.Sequential(separable(channels + 48, channels), separable(channels, channels))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        low, deep = maps[2], maps[-1]
        pooled = self.image_pool(deep).expand(-1, -1, *deep.shape[-2:])
        context = self.bottleneck(torch.cat([pooled, *(branch(deep) for branch in self.aspp_modules)], 1))
        context = F.interpolate(context, low.shape[-2:], mode="bilinear", align_corners=False)
        return self.dropout(self.sep_bottleneck(torch.cat((context, self.c1_bottleneck(low)), 1)))


class DPT(nn.Module):
    """Dense prediction transformer (Ranftl et al. 2021, arXiv:2103.13413) as in UniMatch V2: no BatchNorm, no class token.

    Four maps (B, width, h, w) of a ViT are brought to 4, 2, 1 and 1/2 times their grid and fused from the
    coarsest on -> (B, channels, 8 h, 8 w).
    """

    def __init__(self, width: int, channels: int, dropout: float):
        super().__init__()
        first = width // (8 if width < 1024 else 4)  # small and base; large
        sides = [min(width, first << i) for i in range(4)]
        self.projects = nn.ModuleList([nn.Conv2d(width, side, 1) for side in sides])
        self.scales = nn.ModuleList([
            nn.ConvTranspose2d(sides[0], sides[0], 4, 4), nn.ConvTranspose2d(sides[1], sides[1], 2, 2),
            nn.Identity(), nn.Conv2d(sides[3], sides[3], 3, 2, 1),
        ])  # fmt: skip
        self.narrows = nn.ModuleList([nn.Conv2d(side, channels, 3, padding=1, bias=False) for side in sides])
        self.skips = nn.ModuleList([Residual(channels) for _ in range(3)])
        self.paths = nn.ModuleList([Residual(channels) for _ in range(4)])
        self.outs = nn.ModuleList([nn.Conv2d(channels, channels, 1) for _ in range(4)])
        last = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Sequential(last, nn.ReLU(inplace=True), nn.Dropout2d(dropout))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        layers = zip(maps[2:], self.projects, self.scales, self.narrows, strict=True)
        maps = [narrow(scale(project(m))) for m, project, scale, narrow in layers]
        path = maps[3]
        for i in (3, 2, 1, 0):
            path = self.paths[i](path if i == 3 else path + self.skips[i](maps[i]))
            size = maps[i - 1].shape[-2:] if i else [2 * side for side in path.shape[-2:]]
            path = self.outs[i](F.interpolate(path, size, mode="bilinear", align_corners=True))
        return self.last(path)


class Residual(nn.Module):
    """x plus two 3x3 convolutions of it, each after a ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x.relu()).relu())


class ViT(nn.Module):
    """A vision transformer of timm ("tu-...") as an encoder: [x, x, four maps (B, width, H/patch, W/patch)].

    The maps come after each quarter of the blocks, through the last LayerNorm. Position embeddings are
    interpolated to the image (bicubic; DINOv3's are rotary). An image whose sides are no multiples of
    the patch is resized to the nearest ones, as UniMatch V2 evaluates. ValueError for other models.
    """

    model: Any

    def __init__(self, name: str):
        super().__init__()
        try:
            free: Any = {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}
            self.model = timm.create_model(name.removeprefix("tu-"), **free)
            blocks, self.patch = len(self.model.blocks), self.model.patch_embed.patch_size[0]
        except (AttributeError, RuntimeError, TypeError) as error:
            needs = "a vision transformer of timm, as tu-vit_small_patch14_dinov2"
            raise ValueError(f"arch 'dpt' needs {needs}; got {name}") from error
        self.indices = [blocks * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        self.out_channels = [3, 3, *[self.model.embed_dim] * 4]

    def forward(self, x: Tensor) -> list[Tensor]:
        half, sides = self.patch // 2, x.shape[-2:]
        size = [max(1, (side + half) // self.patch) * self.patch for side in sides]
        if size != [*sides]:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        maps = self.model.forward_intermediates(x, self.indices, norm=True, intermediates_only=True)
        return [x, x, *maps]

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name the tensors of a file of timm's or of Meta's as here, without a classification head.

        Position embeddings of another grid are interpolated; KeyError where the patch is another one.
        """
        own, key = self.model.patch_embed.proj.weight.shape, "patch_embed.proj.weight"
        if state[key].shape != own:
            raise KeyError(f"{key} is {(*state[key].shape,)} in the file, {(*own,)} here")
        renamed = sys.modules[type(self.model).__module__].checkpoint_filter_fn(dict(state), self.model)
        return {f"model.{name}": t for name, t in renamed.items() if not name.startswith(("head.", "fc."))}
