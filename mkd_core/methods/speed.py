"""SPEED, a RECONSTRUCTION: FixMatch on EntropyMix images, self-distillation of the relations between pixels.

Lu et al. 2024, doi:10.1109/TCSVT.2024.3375789; only the abstract was at hand, no code was published.
e: each patch of the crop from the strong view, s1 or s2, whose prediction has the higher mean entropy there
L = 1/2 CE(f(x), y_x) + 1/4 CE_T(f(s1), y) + 1/4 CE_T(f(e), y)        y, q, CE_T as FixMatch
    + sum_(v = s1, e) [ a mean (R_v - R_w)^2 + b mean KL(Q_w || Q_v) ]     w: the weak view
R: cosine similarities of the features of pixels drawn at random; Q: row-wise softmax of their z z^T / tau
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import parallel
from ..data.base import IGNORE
from ..losses import cross_entropy, entropy, masked_mean, pseudo_label
from ..models import nearest, resize
from .base import Batch, Build, Method, Positive, PositiveCount, Share, Terms, Weight

Pair = tuple[Tensor, Tensor]


class SPEED(Method):
    """From the abstract: patches of several views combined by prediction entropy; a linear combination of a
    feature-level and a logit-level loss that aligns relations of pixels across views; no auxiliary head, no
    teacher. Reconstruction (our choice): everything else, every number included; threshold, halved terms and
    joint forward are FixMatch's, the two quarters UniMatch's.

    grid         patches along each side of the crop
    feature, logit   a and b; 0 removes the part
    pixels       drawn at the same places of all views, on half of the decoder's resolution (1/8 of the image
                 for DeepLabV3+)
    Deviations: unknown; results must be called SPEED-like. The relations are between pixels of one image,
    inside it only.
    """

    label, colour, passes = "SPEED-like", "#e69f00", (4, 1)
    terms = ("sup", "strong", "entropymix", "relation")
    views = 2

    def __init__(
        self, build: Build, *, threshold: Share = 0.95, grid: PositiveCount = 8, feature: Weight = 0.5,
        logit: Weight = 0.5, temperature: Positive = 1.0, pixels: PositiveCount = 1024,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        self.threshold, self.grid, self.feature, self.logit = threshold, grid, feature, logit
        self.temperature, self.pixels = temperature, pixels

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        n, size = len(batch.x), batch.weak.shape[-2:]
        features, logits = self._look(torch.cat((batch.x, batch.weak)))
        labeled, weak = resize(logits[:n], size), resize(logits[n:], size)
        label = pseudo_label(weak, self.threshold, batch.valid)

        first, second = batch.strong
        looks = [self._look(first)]
        with torch.no_grad():
            gain = entropy(looks[0][1]) - entropy(self._look(second)[1])
            from_first = nearest(F.adaptive_avg_pool2d(gain, self.grid) > 0, size)  # (U, H, W)
        looks.append(self._look(torch.where(from_first[:, None], first, second)))

        strong, mixed = (cross_entropy(resize(z, size), label, over=batch.valid) / 4 for _, z in looks)
        terms = {"sup": self.supervised(labeled, batch.y) / 2, "strong": strong, "entropymix": mixed}
        if self.feature or self.logit:
            half = torch.Size(side // 2 for side in features.shape[-2:])
            place = torch.randperm(half.numel(), device=label.device)[: self.pixels]
            valid = nearest(batch.valid, half).flatten(1)[:, place]  # (U, K)
            target = self._relations(features[n:].detach(), logits[n:].detach(), half, place, valid)
            found = [self._relations(*look, half, place, valid) for look in looks]
            terms["relation"] = torch.stack([self._distance(one, target, valid) for one in found]).sum()
        kept = masked_mean((label != IGNORE).float(), batch.valid)
        return terms, {"kept": kept, "from first": parallel.average(from_first.float().mean())}

    def _look(self, images: Tensor) -> Pair:
        """Features (B, D, h, w) and logits (B, C, h, w) at the decoder's resolution."""
        features = self.net.features(images)
        return features, self.net.classifier(features)

    def _relations(
        self, features: Tensor, logits: Tensor, half: torch.Size, place: Tensor, valid: Tensor
    ) -> Pair:
        """R and log Q, each (U, K, K); columns of padding have no weight in Q."""
        f, z = (resize(maps.float(), half).flatten(2)[..., place] for maps in (features, logits))
        with torch.autocast(f.device.type, enabled=False):
            f = F.normalize(f, dim=1)
            products = (z.mT @ z / self.temperature).masked_fill(~valid[:, None], -1e9)
            return f.mT @ f, products.log_softmax(2)

    def _distance(self, relations: Pair, target: Pair, valid: Tensor) -> Tensor:
        (r, log_q), (r_weak, log_q_weak) = relations, target
        feature = masked_mean((r - r_weak).square(), valid[:, None] & valid[:, :, None])
        logit = masked_mean(F.kl_div(log_q, log_q_weak, reduction="none", log_target=True).sum(2), valid)
        return self.feature * feature + self.logit * logit
