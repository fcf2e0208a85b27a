"""ST++ and plain self-training: train on labels, label the rest offline, start anew on both; ST++ takes the reliable half first.

Yang et al. 2022, arXiv:2106.05095.   L = CE over the pixels of x and of strong(u) alike, u with its offline label
r(u) = 1/2 sum_k mIoU(argmax f_k(u), argmax f(u)),  f_1, f_2 = f after 1/3 and 2/3 of the first stage:   the better half of r is reliable
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..augment import normalise, ratio_box
from ..data.base import IGNORE
from ..ema import EMA
from ..losses import cross_entropy
from ..metrics import confusion_matrix, miou
from .base import Batch, Build, Method, Prob, Scales, Share, Terms, both, tta


class STPlusPlus(Method):
    """Defaults of the released code: three stages, ten-fold test-time augmentation for the labels, CutOut filled with noise for half of
    the pseudo-labeled images (whose strong view is `chain`), one mean over the labeled and the pseudo-labeled pixels of a batch.

    selection   False: plain self-training (ST), two stages, all images labeled at once
    joint       both kinds of images in one forward, as released
    Deviations: stages of equal length (theirs: equal epochs over lists that grow); the last network of a stage labels (theirs: the best on
    the validation images); half of a batch is labeled (theirs: one list with the labeled images repeated as often).
    """

    unlabeled = False
    views = 1

    def __init__(
        self, build: Build, *, selection: bool = True, cutout: Share = 0.5, scales: Scales = (0.5, 0.75, 1.0, 1.5, 2.0), joint: bool = True
    ):
        super().__init__()
        self.net, self.build = build(), build
        self.stages = (1 / 3, 2 / 3) if selection else (1 / 2,)
        # A checkpoint is a copy that follows the network until its part of the first stage is over.
        self.checkpoints = nn.ModuleList([EMA(self.net, 0.0, buffers="all", warmup=False) for _ in range(2 if selection else 0)])
        self.cutout, self.scales, self.joint = cutout, scales, joint
        self.progress = 0.0

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        self.progress = progress
        if not len(batch.weak):  # the first stage
            return {"sup": cross_entropy(self.net(batch.x), batch.y)}, {}
        keep = ratio_box(len(batch.weak), batch.weak.shape[-2:], batch.weak.device, self.cutout)
        noise = normalise(torch.rand_like(batch.weak))
        labeled, unlabeled = both(self.net, batch.x, torch.where(keep[:, None], batch.strong[0], noise), self.joint)
        label = batch.label.masked_fill(~keep, IGNORE)
        counted = torch.cat((batch.y, label)) != IGNORE
        return {"sup": cross_entropy(labeled, batch.y, over=counted), "pseudo": cross_entropy(unlabeled, label, over=counted)}, {}

    def update(self, step: int) -> None:
        for k, checkpoint in enumerate(self.checkpoints, 1):
            if self.progress < self.stages[0] * k / 3:
                checkpoint.update(self.net, step)

    def relabel(self, stage: int, images: Sequence[Tensor], prob: Prob, labeled: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        chosen = [i for i in range(len(images)) if i not in labeled]
        if stage < len(self.stages):
            reliability = {i: self.reliability(images[i], prob) for i in chosen}
            chosen = sorted(chosen, key=reliability.__getitem__, reverse=True)[: (len(chosen) + 1) // 2]
        for i in chosen:
            yield i, tta(prob, self.net, images[i], self.scales).max(1).indices[0]
        self.net.load_state_dict(self.build().state_dict())

    def reliability(self, image: Tensor, prob: Prob) -> float:
        """Mean over the checkpoints of the mIoU in percent with the last prediction; a class that neither predicts is left out."""
        last = prob(self.net, image)
        agreement = [confusion_matrix(prob(c, image).max(1).indices, last.max(1).indices, last.shape[1]) for c in self.checkpoints]
        return sum(map(miou, agreement)) / len(agreement)

    @property
    def predictors(self) -> dict[str, nn.Module]:
        return {"net": self.net}
