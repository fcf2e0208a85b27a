"""PC2Seg, a reconstruction: both views of a pixel agree in their prediction and in their representation.

Zhong et al. 2021, arXiv:2108.09025.
L   = CE(f(x), y) + w mean [1 - cos(p_s, p_w)] + v mean_i L_i,     p = softmax f(.)
L_i = -log [ e^<z_i, k_i>/T / (e^<z_i, k_i>/T + sum over negatives j of e^<z_i, k_j>/T) ]
z_i, k_i: unit projections of pixel i in the strong and the weak view; j: of another image, drawn with
probability ~ 1 - <p_i, p_j>
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import parallel
from ..losses import draw, masked_mean, ramp
from ..models import nearest, resize
from .base import Batch, Build, Method, Positive, PositiveCount, Share, Terms, Weight, both


class PC2Seg(Method):
    """A reconstruction: no code is public. The paper states the pixel-wise L2 and contrastive losses and that
    negatives are sampled against cost and false negatives; the rest is ours: the form of the terms (L2
    between unit vectors is 1 - cos but for the factor 2), weights w 1 and v 0.1, temperature T 0.1, two 1x1
    convolutions to `dim` 128, 256 anchors an image on a grid of 1/8, 200 negatives an anchor.

    The weak view is the target of both terms (no gradient); candidates for negatives are the anchors of the
    other images.
    rampup  w and v grow as (progress / rampup)^2, for networks from scratch; 0: constant
    Deviations: no CutOut in the strong view (PseudoSeg's augmentation, which the paper follows, has it).
    """

    label, colour, passes, terms = "PC2Seg-like", "#e69f00", (2, 1), ("sup", "consistency", "contrast")
    views = 1
    min_batch = 2

    def __init__(
        self, build: Build, *, weight: Weight = 1.0, contrast: Weight = 0.1, temperature: Positive = 0.1,
        dim: PositiveCount = 128, anchors: PositiveCount = 256, negatives: PositiveCount = 200,
        rampup: Share = 0.0, joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        channels = self.net.classifier.in_channels
        self.projector = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(inplace=True))
        self.projector.append(nn.Conv2d(channels, dim, 1))
        self.weight, self.contrast, self.temperature = weight, contrast, temperature
        self.rampup, self.joint = rampup, joint
        self.anchors, self.negatives = anchors, negatives

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        size = batch.weak.shape[-2:]
        grid = torch.Size(side // 8 for side in size)
        with torch.no_grad():
            weak = self.net.features(batch.weak)
            target = resize(self.net.classifier(weak), size).float().softmax(1)
            keys = self.projector(resize(weak, grid))
        labeled, strong = both(self.net.features, batch.x, batch.strong[0], self.joint)
        prob = resize(self.net.classifier(strong), size).float().softmax(1)
        grown = ramp(progress, self.rampup)
        distance = masked_mean(1 - F.cosine_similarity(prob, target, dim=1), batch.valid)
        sup = self.supervised(resize(self.net.classifier(labeled), size), batch.y)
        terms = {"sup": sup, "consistency": self.weight * grown * distance}
        if self.contrast:
            own, valid = self.projector(resize(strong, grid)), nearest(batch.valid, grid)
            contrast = self.contrastive(own, keys, resize(target, grid), valid)
            terms["contrast"] = self.contrast * grown * contrast
        return terms, {}

    def contrastive(self, own: Tensor, keys: Tensor, prob: Tensor, valid: Tensor) -> Tensor:
        """Mean L_i of anchors drawn from valid (U, h, w).

        own, keys (U, dim, h, w) projections of the strong and the weak view, prob (U, C, h, w).
        """
        own, keys, prob, valid = (parallel.gather(t) for t in (own, keys, prob, valid))
        place, found = draw(valid.flatten(1), self.anchors)  # (U, A)
        maps = [m.float().flatten(2) for m in (own, keys, prob)]
        maps = [m.gather(2, place[:, None].expand(-1, m.shape[1], -1)) for m in maps]
        own, keys, prob = (m.movedim(1, 2).flatten(0, 1) for m in maps)  # (U A, .)
        image = torch.arange(len(place), device=own.device).repeat_interleave(place.shape[1])
        candidate = (image[:, None] != image) & found.flatten()
        with torch.autocast(own.device.type, enabled=False):
            different = (1 - prob @ prob.T).clamp_min(1e-6)
            # The last summand gives rows without a candidate something to draw; the mean leaves them out.
            drawn = torch.multinomial(different * candidate + 1e-30, self.negatives, replacement=True)
            similarity = F.normalize(own, dim=1) @ F.normalize(keys, dim=1).T / self.temperature  # (U A, U A)
        positive = similarity.diagonal()
        loss = torch.cat((positive[:, None], similarity.gather(1, drawn)), 1).logsumexp(1) - positive
        return masked_mean(loss, found.flatten() & candidate.any(1))
