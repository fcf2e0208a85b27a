"""ST++ and plain self-training: label the rest offline, start anew; ST++ takes the reliable half first.

Yang et al. 2022, arXiv:2106.05095.
L    = CE over the pixels of x and of strong(u) alike, u with its offline label
r(u) = 1/2 sum_k mIoU(argmax f_k(u), argmax f(u)), f_1, f_2 = f after 1/3 and 2/3 of the first stage;
       the better half of r is reliable
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from .. import parallel
from ..augment import normalise, ratio_box
from ..data.base import IGNORE
from ..ema import EMA
from ..losses import cross_entropy
from ..metrics import confusion_matrix, miou
from ..models import resize
from .base import Batch, Build, Labels, Method, Prob, Scales, Share, Terms, both


class STPlusPlus(Method):
    """Defaults of the released code: three stages, ten-fold test-time augmentation for the labels, CutOut
    filled with noise for half of the pseudo-labeled images (whose strong view is `chain`), one mean over the
    labeled and the pseudo-labeled pixels of a batch.

    selection   False: plain self-training (ST), two stages, all images labeled at once
    joint       both kinds of images in one forward, as released
    Deviations: stages of equal length (theirs: equal epochs over lists that grow); the last network of a
    stage labels (theirs: the best on the validation images); half of a batch is labeled (theirs: one list
    with the labeled images repeated as often).
    """

    label, colour, passes, terms = "ST++", "#56b4e9", (2, 0), ("sup", "pseudo")
    unlabeled = False
    views = 1

    def __init__(
        self, build: Build, *, selection: bool = True, cutout: Share = 0.5,
        scales: Scales = (0.5, 0.75, 1.0, 1.5, 2.0), joint: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.net, self.build = build(), build
        self.stages = (1 / 3, 2 / 3) if selection else (1 / 2,)
        # A checkpoint is a copy that follows the network until its part of the first stage is over.
        copies = [EMA(self.net, 0.0, buffers="all", warmup=False) for _ in range(2 if selection else 0)]
        self.checkpoints = nn.ModuleList(copies)
        self.cutout, self.scales, self.joint = cutout, scales, joint
        self.progress = 0.0

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        self.progress = progress
        if not len(batch.weak):  # the first stage
            return {"sup": self.supervised(self.net(batch.x), batch.y)}, {}
        keep = ratio_box(len(batch.weak), batch.weak.shape[-2:], batch.weak.device, self.cutout)
        noise = parallel.share(torch.rand_like(parallel.like(batch.weak)))
        strong = torch.where(keep[:, None], batch.strong[0], normalise(noise))
        labeled, unlabeled = both(self.net, batch.x, strong, self.joint)
        label = batch.label.masked_fill(~keep, IGNORE)
        truth = self._hard(labeled, batch.y)
        counted = torch.cat((truth, label)) != IGNORE
        parts = {"sup": (labeled, truth), "pseudo": (unlabeled, label)}
        return {name: cross_entropy(*part, over=counted) for name, part in parts.items()}, {}

    def update(self, step: int) -> None:
        for k, checkpoint in enumerate(self.checkpoints, 1):
            if self.progress < self.stages[0] * k / 3:
                checkpoint.update(self.net, step)

    def relabel(self, stage: int, images: Sequence[Tensor], prob: Prob, labeled: Collection[int]) -> Labels:
        chosen = [i for i in range(len(images)) if i not in labeled]
        if stage < len(self.stages):
            reliability = {i: self.reliability(images[i], prob) for i in chosen}
            chosen = sorted(chosen, key=reliability.__getitem__, reverse=True)[: (len(chosen) + 1) // 2]
        for i in chosen:
            yield i, tta(prob, self.net, images[i], self.scales).max(1).indices[0]
        self.net.load_state_dict(self.build().state_dict())

    def reliability(self, image: Tensor, prob: Prob) -> float:
        """Mean over the checkpoints of the mIoU in percent with the last prediction, absent classes apart."""
        last = prob(self.net, image)
        label, classes = last.max(1).indices, last.shape[1]
        found = [prob(checkpoint, image).max(1).indices for checkpoint in self.checkpoints]
        return sum(miou(confusion_matrix(f, label, classes)) for f in found) / len(found)


def tta(prob: Prob, net: nn.Module, image: Tensor, scales: Scales) -> Tensor:
    """Class probabilities (B, C, H, W), averaged over scaled images and their mirror images.

    Under the protocol long512, which scales every image to one size, the scales differ in resampling only.
    """
    total = torch.zeros((), device=image.device)
    for scale in scales:
        scaled = resize(image, torch.Size(max(1, int(side * scale)) for side in image.shape[-2:]))
        straight, mirrored = prob(net, torch.cat((scaled, scaled.flip(-1)))).chunk(2)
        total = total + resize(straight + mirrored.flip(-1), image.shape[-2:])
    return total / (2 * len(scales))
