"""CCT: decoders that see perturbed features must reproduce what the main decoder says about the clean ones.

Ouali et al. 2020, arXiv:2003.09005.
L = abCE(g(h(x)), y) + w r(t) 1/K sum_k mean (softmax g_k(P_k(h(u))) - softmax g(h(u)))^2
abCE: mean over the pixels whose probability of the label is below T(t), which grows from 1/C to 0.99
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import parallel
from ..data.base import IGNORE
from ..losses import masked_mean, ramp, squared_distance
from ..models import nearest, resize
from .base import Batch, Build, Method, PositiveCount, Share, Terms, Weight, both

# Perturbations: features (B, D, h, w), predicted classes (B, h, w), number of classes -> features.


def dropout(features: Tensor, label: Tensor, classes: int) -> Tensor:
    """Half of the channels."""
    return F.dropout2d(features, 0.5)


def feature_drop(features: Tensor, label: Tensor, classes: int) -> Tensor:
    """The most active places: channel mean from u times its maximum on, u ~ U(0.7, 0.9)."""
    attention = features.mean(1, keepdim=True)
    share = 0.7 + 0.2 * torch.rand((), device=features.device)
    return features * (attention < share * attention.amax((2, 3), keepdim=True))


def feature_noise(features: Tensor, label: Tensor, classes: int) -> Tensor:
    """Times 1 + U(-0.3, 0.3), the same for every image of the batch."""
    return features * (1 + torch.empty_like(features[:1]).uniform_(-0.3, 0.3))


def context(features: Tensor, label: Tensor, classes: int) -> Tensor:
    """Context masked: only what is predicted as foreground (not class 0) stays."""
    return features * (label > 0)[:, None]


def objects(features: Tensor, label: Tensor, classes: int) -> Tensor:
    """Objects masked: only what is predicted as background (class 0) stays."""
    return features * (label == 0)[:, None]


def guided_cutout(features: Tensor, label: Tensor, classes: int) -> Tensor:
    """Of the box around each predicted class but 0, a rectangle with 0.4 of its sides is erased."""
    seen = label[..., None] == torch.arange(1, classes, device=label.device)  # (B, h, w, C - 1)
    inside = []
    for axis in (1, 2):
        place = torch.arange(label.shape[axis], device=label.device)[:, None]
        occupied = seen.any(3 - axis)  # (B, side, C - 1)
        first = torch.where(occupied, place, len(place)).amin(1, keepdim=True)
        last = torch.where(occupied, place, -1).amax(1, keepdim=True)
        extent = last - first  # negative where the class is absent: an empty rectangle
        drawn = parallel.share(torch.rand_like(parallel.like(first), dtype=torch.float32))
        start = first + (drawn * ((0.6 * extent).floor() + 1)).floor()
        inside.append((place >= start) & (place < start + (0.4 * extent).floor()))
    erased = (inside[0][:, :, None] & inside[1][:, None]).any(-1)
    return features * ~erased[:, None]


PERTURBATIONS = (dropout, guided_cutout, context, objects, feature_drop, feature_noise)


class CCT(Method):
    """Defaults of the CPS authors' released version, MKD's Table 2: two auxiliary decoders, 1x1 like the main
    one, for each of six perturbations of the last feature map, weight 30 without ramp, abCE over the first
    0.4 of training. The main decoder is evaluated.

    copies      auxiliary decoders per perturbation
    bootstrap   share of training in which abCE's T grows; 0: plain cross-entropy
    Deviations: consistency on the features' grid and inside the image (theirs: after upsampling, padding
    counts); guided CutOut takes the box of a predicted class (theirs: of a connected contour, found on the
    CPU); abCE may keep no pixel (theirs: one an image at least).
    """

    label, colour, passes, terms = "CCT", "#8a8a8a", (2, 0), ("sup", "consistency")
    evaluated = ("main",)

    def __init__(
        self, build: Build, *, weight: Weight = 30.0, copies: PositiveCount = 2, bootstrap: Share = 0.4,
        rampup: Share = 0.0, joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        shape = self.net.classifier.in_channels, self.net.classifier.out_channels
        self.auxiliary = nn.ModuleList([nn.Conv2d(*shape, 1) for _ in range(copies * len(PERTURBATIONS))])
        self.weight, self.copies, self.bootstrap = weight, copies, bootstrap
        self.rampup, self.joint = rampup, joint

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        labeled, unlabeled = both(self.net.features, batch.x, batch.weak, self.joint)
        logits = resize(self.net.classifier(labeled), batch.y.shape[-2:])
        with torch.no_grad():
            main = self.net.classifier(unlabeled)
        target, label, classes = main.softmax(1), main.max(1).indices, main.shape[1]
        valid = nearest(batch.valid, main.shape[-2:])
        distances = []
        for decoder, perturb in zip(self.auxiliary, PERTURBATIONS * self.copies, strict=True):
            prob = decoder(perturb(unlabeled, label, classes)).softmax(1)
            distances.append(masked_mean(squared_distance(prob, target), valid))
        sup = self.supervised(logits, batch.y)
        if self.bootstrap:
            sup = annealed_cross_entropy(logits, self._hard(logits, batch.y), progress / self.bootstrap)
        weight = self.weight * ramp(progress, self.rampup)
        return {"sup": sup, "consistency": weight * torch.stack(distances).mean()}, {}


def annealed_cross_entropy(logits: Tensor, label: Tensor, progress: float) -> Tensor:
    """abCE: mean cross-entropy over the pixels whose probability of the label is below T; else 0."""
    share = 1 - math.exp(-5 * min(1.0, progress))
    threshold = 1 / logits.shape[1] + share * (0.99 - 1 / logits.shape[1])
    # Where the label is IGNORE the loss is 0: a probability of 1.
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    return masked_mean(loss, loss.detach() > -math.log(threshold))
