"""CutMix-Seg: Mean Teacher whose student sees a CutMix and must reproduce the equally mixed prediction.

French et al. 2020, arXiv:1906.01916.
L = CE(s(x), y) + w mean[ sum_c (softmax s(mix(u)) - softmax mix(t(u)))^2 ] mean 1[q >= T]
"""

import torch

from ..augment import mix, xor_boxes
from ..ema import EMA
from ..losses import confidence, masked_mean, squared_distance
from .base import Batch, Build, Count, EMABuffers, Method, Share, TeacherMode, Terms, Weight, both


class CutMixSeg(Method):
    """Defaults of the released code: one box of half the area, EMA 0.99 of parameters and buffers without
    warm start, weight 1 on the squared distance summed over classes, times the share of pixels with teacher
    confidence of at least 0.97 (one scalar a batch).

    boxes 0: no mixing, which is Mean Teacher with this distance. The teacher is evaluated.
    Deviations: the partner is the next sample of the batch (theirs: a second stream); SGD and trained
    BatchNorm as the other methods (theirs: Adam, frozen BatchNorm); means over pixels inside the image
    (theirs: over all); the strong view is the run's.
    """

    label, colour, passes, terms = "CutMix-Seg", "#cc79a7", (2, 1), ("sup", "consistency")
    views, evaluated = 1, ("teacher", "student")

    def __init__(
        self, build: Build, *, weight: Weight = 1.0, decay: Share = 0.99, threshold: Share = 0.97,
        boxes: Count = 1, colour: bool = True, ema_buffers: EMABuffers = "all",
        teacher_mode: TeacherMode = "train", warmup: bool = False, joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        self.teacher = EMA(self.net, decay, buffers=ema_buffers, mode=teacher_mode, warmup=warmup)
        self.weight, self.threshold, self.boxes = weight, threshold, boxes
        self.strong, self.joint = colour, joint
        self.min_batch = 2 if boxes else 1

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        size, device = batch.weak.shape[-2:], batch.weak.device
        mask = xor_boxes(len(batch.weak), size, device, self.boxes, area=(0.5, 0.5))
        target, valid = mix(self.teacher(batch.weak), mask), mix(batch.valid, mask)
        confident = torch.ones((), device=device)
        if self.threshold:
            confident = masked_mean((confidence(target) >= self.threshold).float(), valid)
        seen = mix(batch.strong[0] if self.strong else batch.weak, mask)
        labeled, unlabeled = both(self.net, batch.x, seen, self.joint)
        distance = squared_distance(unlabeled.softmax(1), target.softmax(1))
        summed = masked_mean(distance, valid) * target.shape[1]  # over classes
        terms = {"sup": self.supervised(labeled, batch.y), "consistency": self.weight * confident * summed}
        return terms, {"confident": confident}
