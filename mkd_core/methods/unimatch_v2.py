"""UniMatch V2: a teacher labels two strong views, each of which has the feature channels that the other lacks.

Yang et al. 2024, arXiv:2410.10777.   f = g o h, t its EMA; y = argmax t(weak), q = max softmax t(weak)
M_1 = 2 Bernoulli(1/2) for each channel, M_2 = 2 - M_1; both 1 on a random half of the images
L = (CE(f(x), y_x) + mean_k CE_T(g(M_k h(mix_k(strong_k))), mix_k(y))) / 2
CE_T: sum over pixels with q >= T / number of all inside the image
"""

import torch
from torch import Tensor

from .. import parallel
from ..augment import mix, ratio_box
from ..data.base import IGNORE
from ..ema import EMA
from ..losses import cross_entropy, masked_mean, pseudo_label
from ..models import resize
from .base import Batch, Build, Method, Share, Terms


class UniMatchV2(Method):
    """Defaults of the released code: T 0.95, EMA 0.996 with warm start, buffers too, the teacher in eval mode,
    both views in one forward. Its runs: AdamW 5e-6 with the head at 40 times that, weight decay 0.01, batch 16, DINOv2
    at crop 518 (Cityscapes 798, OHEM). The student is the one reported.

    drop        share of the images whose channels are split between the views; 0: none, which with equal views
                and boxes is FixMatch with this teacher and separate forwards
    cutmix      probability of a box; 0: nothing is mixed
    Deviations: the partner is the next sample of the batch (theirs: the batch reversed); maps of a
    convolutional encoder, which have no common width, have masks of their own from 1/4 of the image down
    (theirs: one mask for the four maps of a ViT, as here).
    """

    label, colour, passes, terms = "UniMatch V2", "#e69f00", (3, 1), ("sup", "strong")
    views, evaluated = 2, ("student", "teacher")

    def __init__(
        self, build: Build, *, threshold: Share = 0.95, drop: Share = 0.5, decay: Share = 0.996,
        cutmix: Share = 0.5,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        self.teacher = EMA(self.net, decay, buffers="all", mode="eval")
        self.threshold, self.drop, self.cutmix = threshold, drop, cutmix
        self.min_batch = 2 if cutmix else 1

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        size, device = batch.weak.shape[-2:], batch.weak.device
        label = pseudo_label(self.teacher(batch.weak), self.threshold, batch.valid)
        masks = [ratio_box(len(batch.weak), size, device, self.cutmix) for _ in range(2)]
        mixed = [mix(view, mask) for view, mask in zip(batch.strong, masks, strict=True)]
        labeled = self.net(batch.x)
        maps = complementary(self.net.encoder(torch.cat(mixed)), self.drop)
        logits = resize(self.net.classifier(self.net.decoder(maps)), size).chunk(2)
        pairs = zip(logits, masks, strict=True)
        strong = [cross_entropy(z, mix(label, mask), over=mix(batch.valid, mask)) for z, mask in pairs]
        terms = {"sup": self.supervised(labeled, batch.y) / 2, "strong": torch.stack(strong).mean() / 2}
        return terms, {"kept": masked_mean((label != IGNORE).float(), batch.valid)}


def complementary(maps: list[Tensor], share: float) -> list[Tensor]:
    """Multiply channels of maps (2n, D, h, w) of two views by 0 or 2 in the first, 2 or 0 in the second.

    Only a random `share` of the n images; maps of one width share their draws. Maps above 1/4 stay.
    """
    n, device, drawn = len(maps[0]) // 2 * parallel.world(), maps[0].device, dict[int, Tensor]()
    chosen = (torch.rand(n, device=device).argsort() < n - int(n * (1 - share)))[:, None]
    for width in {m.shape[1]: None for m in maps[2:]}:
        first = torch.where(chosen, 2.0 * torch.randint(2, (n, width), device=device), 1.0)
        drawn[width] = torch.cat((mine := parallel.share(first), 2 - mine))[..., None, None]
    return [m if i < 2 else m * drawn[m.shape[1]].to(m.dtype) for i, m in enumerate(maps)]
