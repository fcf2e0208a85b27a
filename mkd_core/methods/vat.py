"""VAT: Mean Teacher whose student sees each image moved where the teacher's prediction changes most.

Miyato et al. 2018, arXiv:1704.03976; for segmentation French et al. 2020, arXiv:1906.01916.
D = KL(softmax t(weak) || softmax . ), per pixel
g = gradient in d of sum D(t(strong + d)) at a small random d
r = (radius / 2) |spatial differences of strong| g / |g|,   per image
L = CE(s(x), y) + w mean D(s(strong + r)) mean 1[q >= T],   q = max softmax t(weak)
"""

import torch
from torch import Tensor

from .. import parallel
from ..ema import EMA
from ..losses import confidence, kl_divergence, masked_mean, unit
from .base import Batch, Build, Method, Share, Terms, Weight, both

PROBE = 0.01  # |d|, of a normalised image


class VAT(Method):
    """Defaults of French et al.'s released code: EMA 0.99 of parameters and buffers without warm start,
    weight 0.1 on the KL divergence summed over classes, times the share of pixels with teacher confidence of
    at least 0.97 (one scalar a batch), adaptive radius 1.

    radius 0: no direction is sought, which is Mean Teacher with this divergence and strong colour. The
    teacher is evaluated, and always runs in eval mode (so does theirs: it is set for the direction and not
    set back before the target is made).
    Deviations: |d| = 0.01, our choice (theirs: HW / 10^9, whose gradient is mostly rounding in float32 where
    both views are equal, as a test shows); the teacher in float32 whatever the precision, for the same
    reason; pixels inside the image only; SGD and trained BatchNorm as the other methods; the strong view is
    the run's.
    """

    label, colour, passes, terms = "VAT", "#0072b2", (3, 1), ("sup", "consistency")
    views, evaluated = 1, ("teacher", "student")

    def __init__(
        self, build: Build, *, weight: Weight = 0.1, radius: Weight = 1.0, decay: Share = 0.99,
        threshold: Share = 0.97, joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        self.teacher = EMA(self.net, decay, buffers="all", mode="eval", warmup=False)
        self.weight, self.radius, self.threshold, self.joint = weight, radius, threshold, joint

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        seen = batch.strong[0]
        with torch.autocast(seen.device.type, enabled=False):
            target = self.teacher(batch.weak)
            if self.radius:
                seen = seen + self._perturbation(seen, target, batch.valid)
        labeled, unlabeled = both(self.net, batch.x, seen, self.joint)
        confident = masked_mean((confidence(target) >= self.threshold).float(), batch.valid)
        distance = masked_mean(kl_divergence(unlabeled, target), batch.valid)
        terms = {"sup": self.supervised(labeled, batch.y), "consistency": self.weight * confident * distance}
        return terms, {"confident": confident}

    def _perturbation(self, images: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """r (U, 3, H, W): direction by one step of the power iteration, length by the image's contrast."""
        d = (PROBE * unit(parallel.share(torch.randn_like(parallel.like(images))))).requires_grad_()
        divergence = (kl_divergence(self.teacher.module(images + d), target) * valid).sum()
        (g,) = torch.autograd.grad(divergence, d)
        down, across = images[:, :, 2:] - images[:, :, :-2], images[..., 2:] - images[..., :-2]
        length = (down.square().sum((1, 2, 3), True) + across.square().sum((1, 2, 3), True)).sqrt()
        return self.radius / 2 * length * unit(g)
