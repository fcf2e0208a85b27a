"""UniMatch: FixMatch with two strong views, and one view whose features are dropped.

Yang et al. 2023, arXiv:2208.09910.   y, q as FixMatch; f = g o h
L = 1/2 CE(f(x), y_x) + phi/2 CE_T(g(drop h(weak)), y) + (1 - phi)/2 mean_k CE_T(f(mix_k(strong_k)), mix_k(y))
CE_T: sum over pixels with q >= T / number of all inside the image
"""

from typing import Literal

import torch
import torch.nn.functional as F

from ..augment import mix, ratio_box
from ..data.base import IGNORE
from ..losses import cross_entropy, masked_mean, pseudo_label
from ..models import resize
from .base import Batch, Build, Method, Share, Terms


class UniMatch(Method):
    """Defaults of the released code, V1: two streams, phi = 1/2, channels dropped with probability 1/2,
    otherwise as FixMatch.

    streams     strong views, each with a box of its own
    feature     phi, the share of the term on dropped features; 0: no such branch, which with one stream is
                FixMatch
    cutmix      probability of a box; 0: nothing is mixed
    Deviations: those of FixMatch; the decoder's pass over dropped features holds the weak images only
    (theirs: the labeled ones too, which it throws away); all maps from 1/4 of the image down are dropped
    (theirs: the two that the decoder of DeepLabV3+ reads; no other counts).
    """

    label, colour, passes, terms = "UniMatch", "#cc79a7", (4, 0), ("sup", "strong", "feature")

    def __init__(
        self, build: Build, *, streams: Literal[1, 2] = 2, feature: Share = 0.5, threshold: Share = 0.95,
        cutmix: Share = 0.5,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        self.views, self.feature, self.threshold, self.cutmix = streams, feature, threshold, cutmix
        self.min_batch = 2 if cutmix else 1

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        n, size = len(batch.x), batch.weak.shape[-2:]
        maps = self.net.encoder(torch.cat((batch.x, batch.weak)))
        if self.feature:  # [labeled; weak; weak, dropped], in one decoder pass as released
            maps = [torch.cat((m, m[n:] if i < 2 else F.dropout2d(m[n:], 0.5))) for i, m in enumerate(maps)]
        logits = resize(self.net.classifier(self.net.decoder(maps)), size)
        labeled, weak, dropped = logits.tensor_split((n, n + len(batch.weak)))
        label = pseudo_label(weak, self.threshold, batch.valid)

        masks = [ratio_box(len(batch.weak), size, batch.weak.device, self.cutmix) for _ in range(self.views)]
        views = [mix(view, mask) for view, mask in zip(batch.strong, masks, strict=False)]
        pairs = zip(self.net(torch.cat(views)).chunk(self.views), masks, strict=True)
        mixed = [cross_entropy(z, mix(label, mask), over=mix(batch.valid, mask)) for z, mask in pairs]
        strong = (1 - self.feature) / 2 * torch.stack(mixed).mean()
        terms = {"sup": self.supervised(labeled, batch.y) / 2, "strong": strong}
        if self.feature:
            terms["feature"] = self.feature / 2 * cross_entropy(dropped, label, over=batch.valid)
        return terms, {"kept": masked_mean((label != IGNORE).float(), batch.valid)}
