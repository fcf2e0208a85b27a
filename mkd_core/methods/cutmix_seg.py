"""CutMix-Seg: Mean Teacher whose student sees a CutMix and must reproduce the equally mixed teacher prediction.

French et al. 2020, arXiv:1906.01916.   L = CE(s(x), y) + w mean[ sum_c (softmax s(mix(u)) - softmax mix(t(u)))^2 ] mean 1[q >= T]
"""

from __future__ import annotations

import torch
from torch import nn

from ..augment import mix, xor_boxes
from ..ema import EMA
from ..losses import confidence, cross_entropy, masked_mean, squared_distance
from .base import Batch, Build, Count, EMABuffers, Method, Share, TeacherMode, Terms, Weight, both


class CutMixSeg(Method):
    """Defaults of the released code: one box of half the area, EMA 0.99 of parameters and buffers without warm start, weight 1 on the
    squared distance summed over classes, times the share of pixels with teacher confidence of at least 0.97 (one scalar a batch).

    boxes 0: no mixing, which is Mean Teacher with this distance. The teacher is evaluated.
    Deviations: the partner is the next sample of the batch (theirs: a second stream); SGD and trained BatchNorm as the other methods
    (theirs: Adam, frozen BatchNorm); means over pixels inside the image (theirs: over all); the strong view is the run's.
    """

    views = 1

    def __init__(
        self, build: Build, *, weight: Weight = 1.0, decay: Share = 0.99, threshold: Share = 0.97, boxes: Count = 1, colour: bool = True,
        ema_buffers: EMABuffers = "all", teacher_mode: TeacherMode = "train", warmup: bool = False, joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        self.teacher = EMA(self.net, decay, buffers=ema_buffers, mode=teacher_mode, warmup=warmup)
        self.weight, self.threshold, self.boxes, self.colour, self.joint = weight, threshold, boxes, colour, joint
        self.min_batch = 2 if boxes else 1

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        mask = xor_boxes(len(batch.weak), batch.weak.shape[-2:], batch.weak.device, self.boxes, area=(0.5, 0.5))
        mixed = mix(self.teacher(batch.weak), mask)
        valid = mix(batch.valid, mask)
        confident = (
            masked_mean((confidence(mixed) >= self.threshold).float(), valid) if self.threshold > 0 else torch.ones_like(mixed[0, 0, 0, 0])
        )
        labeled, unlabeled = both(self.net, batch.x, mix(batch.strong[0] if self.colour else batch.weak, mask), self.joint)
        distance = masked_mean(squared_distance(unlabeled.softmax(1), mixed.softmax(1)), valid) * mixed.shape[1]
        return {"sup": cross_entropy(labeled, batch.y), "consistency": self.weight * confident * distance}, {"confident": confident}

    def update(self, step: int) -> None:
        self.teacher.update(self.net, step)

    @property
    def predictors(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher, "student": self.net}
