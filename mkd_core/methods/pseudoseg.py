"""PseudoSeg: the strong view learns a soft label, fused from the decoder's prediction and an activation map.

Zou et al. 2021, arXiv:2010.09713.
L = CE(z(x), y) + CE(a(x), y) + BCE(image classes) + w r(t) mean_V [-sum_c p_c log softmax z(strong)_c]
a, the SGC map: cam_c = ReLU(w_c . f) / max, c present;  s = softmax(q k^T / sqrt(d)) cam + cam
                a = BN(1x1 [2 - max_c s; s])
p = sharpen( (softmax(z / n) + softmax(a / n)) / 2 ), of the weak view;  n = root mean square of [z; a]
sharpen(p) ~ p^(1/T)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import parallel
from ..augment import square
from ..data.base import IGNORE
from ..losses import cross_entropy, masked_mean, ramp
from ..models import nearest, resize
from .base import Batch, Build, Method, Positive, PositiveCount, Share, Terms, Weight


class PseudoSeg(Method):
    """Defaults of the released code: weight 1 without ramp, T = 0.5, CutOut of 100 in 513 pixels, keys and
    queries of width 128 from the last two encoder stages, losses on the decoder's grid. The decoder is
    evaluated.

    background  class 0 has no image-level label and is what the others leave (VOC, COCO); False: every class
                has a map of its own
    Deviations: the image classifier is one linear layer on pooled features, whose Grad-CAM is its weights
    times the features; the map comes from the forward pass of the decoder (theirs: a second one, BatchNorm in
    evaluation mode); labeled pixels that are IGNORE are no keys (theirs: padding); padded queries attend to
    the image (theirs: to everything); the strong view is the run's (theirs: colour jitter of every image).
    """

    label, colour, passes = "PseudoSeg", "#cc79a7", (2, 1)
    terms = ("sup", "attention", "image", "consistency")
    views, evaluated = 1, ("decoder",)

    def __init__(
        self, build: Build, *, weight: Weight = 1.0, temperature: Positive = 0.5, cutout: Share = 100 / 513,
        width: PositiveCount = 128, background: bool = True, rampup: Share = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        channels, classes = self.net.encoder.out_channels[-2:], self.net.classifier.out_channels
        self.image_classifier = nn.Linear(channels[-1], classes - background)
        self.key, self.query = (nn.Conv2d(sum(channels), width, 1, bias=False) for _ in range(2))
        self.calibrate = nn.Sequential(nn.Conv2d(classes, classes, 1, bias=False), nn.BatchNorm2d(classes))
        self.weight, self.temperature, self.cutout = weight, temperature, cutout
        self.background, self.rampup = background, rampup

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        size = batch.y.shape[-2:]
        maps, logits, scores = self.look(batch.x)
        present = self.classes_of(batch.y)
        attention = self.sgc(maps, present, batch.y != IGNORE)
        with torch.no_grad():
            weak_maps, weak, weak_scores = self.look(batch.weak)
            spread = self.sgc(weak_maps, (weak_scores >= 0).float(), batch.valid)  # sigmoid >= 0.5
            target = fuse(weak, resize(spread, weak.shape[-2:]), self.temperature)
        keep = square(len(batch.weak), size, batch.weak.device, self.cutout)
        strong = self.net.classifier(self.net.features(batch.strong[0] * keep[:, None]))  # 0: the mean colour
        counted = nearest(batch.valid & keep, strong.shape[-2:])
        soft = masked_mean(-(target * strong.log_softmax(1)).sum(1), counted)
        return {
            "sup": self.supervised(resize(logits, size), batch.y),
            "attention": cross_entropy(resize(attention, size), batch.y),
            "image": parallel.average(F.binary_cross_entropy_with_logits(scores, present)),
            "consistency": self.weight * ramp(progress, self.rampup) * soft,
        }, {"confidence": masked_mean(target.amax(1), counted)}

    def look(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Encoder maps, logits (B, C, h, w) on the decoder's grid, image scores (B, foreground classes)."""
        maps = self.net.encoder(x)
        return maps, self.net.classifier(self.net.decoder(maps)), self.image_classifier(maps[-1].mean((2, 3)))

    def classes_of(self, y: Tensor) -> Tensor:
        """(B, foreground classes): 1 where the class occurs in the labels."""
        occurs = torch.zeros(len(y), IGNORE + 1, device=y.device).scatter(1, y.flatten(1), 1.0)
        return occurs[:, self.background : self.net.classifier.out_channels]

    def sgc(self, maps: list[Tensor], present: Tensor, valid: Tensor) -> Tensor:
        """Logits (B, C, h, w) on the grid of the last encoder map, from which the network learns nothing."""
        last = maps[-1].detach()
        kernel = self.image_classifier.weight.detach()[:, :, None, None]
        cam = F.conv2d(last, kernel).float().relu() * present[:, :, None, None]
        cam = cam / cam.amax((2, 3), keepdim=True).clamp_min(1e-5)
        seen = torch.cat((resize(maps[-2].detach(), last.shape[-2:]), last), 1)
        query, key = self.query(seen).flatten(2), self.key(seen).flatten(2)
        similarity = query.mT @ key / math.sqrt(self.key.out_channels)  # (B, N, N)
        inside = nearest(valid, last.shape[-2:]).flatten(1)[:, None]
        attention = similarity.float().masked_fill(~inside, -1e9).softmax(-1)
        spread = (cam.flatten(2) @ attention.mT).view_as(cam) + cam  # in [0, 2]
        if self.background:
            spread = torch.cat((2 - spread.amax(1, keepdim=True), spread), 1)
        return self.calibrate(spread)


def fuse(decoder: Tensor, attention: Tensor, temperature: float) -> Tensor:
    """Two logit maps -> soft labels, all (B, C, h, w): one scale for both, softmax, mean, sharpened."""
    both = torch.cat((decoder, attention)).float()
    prob = (both * (parallel.average(both.square().mean()) + 1e-8).rsqrt()).softmax(1)
    mean = (prob[: len(decoder)] + prob[len(decoder) :]) / 2
    return mean.pow(1 / temperature) / mean.pow(1 / temperature).sum(1, keepdim=True)
