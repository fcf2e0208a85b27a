"""CPS: two networks, differently initialised, teach each other with hard pseudo-labels (co-training).

Chen et al. 2021, arXiv:2106.01226.
L = sum_i CE(f_i(x), y) + w r(t) sum_i CE(f_i(u), argmax f_j(u)),  j != i
With CutMix: f_i sees mix(u) and the label is argmax mix(f_j(u)) with the same mask.
"""

import torch
from torch import nn

from ..augment import mix, xor_boxes
from ..data.base import IGNORE
from ..losses import cross_entropy, masked_mean, pseudo_label, ramp
from .base import Batch, Build, Count, Method, Share, Terms, Weight, both


class CPS(Method):
    """Defaults of the released VOC configuration without CutMix (weight 1.5; with CutMix 1.0 and boxes 3;
    Cityscapes 6 and 5).

    boxes       0: students see the weak image and label the image that they see; 3: CPS with CutMix
    on_labeled  the cross term on labeled pixels too; None: as released, with boxes 0 only
    ignore_padding  padded pixels are left out of the cross term (released: they count)
    Deviations: padding ignored; the CutMix partner is the next sample of the batch (theirs: a second stream
    that under DDP yields the same image); the optimiser has one learning rate, without their double scaling.
    """

    label, colour, passes, terms = "CPS", "#d55e00", (4, 0), ("sup", "cross")
    evaluated = ("student 1", "student 2")

    def __init__(
        self, build: Build, *, weight: Weight = 1.5, boxes: Count = 0, on_labeled: bool | None = None,
        ignore_padding: bool = True, rampup: Share = 0.0, joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.students = nn.ModuleList([build(), build()])
        self.weight, self.boxes, self.rampup, self.joint = weight, boxes, rampup, joint
        self.on_labeled = boxes == 0 if on_labeled is None else on_labeled
        self.ignore_padding = ignore_padding
        self.min_batch = 2 if boxes else 1

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        valid = batch.valid if self.ignore_padding else torch.ones_like(batch.valid)
        seen = batch.weak
        if self.boxes:
            mask = xor_boxes(len(batch.weak), batch.weak.shape[-2:], batch.weak.device, self.boxes)
            with torch.no_grad():
                valid = mix(valid, mask)
                labels = [pseudo_label(mix(net(batch.weak), mask), valid=valid) for net in self.students]
            seen = mix(batch.weak, mask)
        (x1, u1), (x2, u2) = (both(net, batch.x, seen, self.joint) for net in self.students)
        if not self.boxes:
            labels = [pseudo_label(u, valid=valid) for u in (u1, u2)]
        y1, y2 = labels
        if self.on_labeled:  # released CPS: every pixel of the batch, labeled ones and their padding included
            inside = batch.y != IGNORE if self.ignore_padding else None
            u1, u2 = torch.cat((x1, u1)), torch.cat((x2, u2))
            y1, y2 = (torch.cat((pseudo_label(x, valid=inside), y)) for x, y in ((x1, y1), (x2, y2)))
        weight = self.weight * ramp(progress, self.rampup)
        return {
            "sup": self.supervised(x1, batch.y) + self.supervised(x2, batch.y),
            "cross": weight * (cross_entropy(u1, y2) + cross_entropy(u2, y1)),
        }, {"agreement": masked_mean((y1 == y2).float(), y1 != IGNORE)}
