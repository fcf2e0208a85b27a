"""MKD with the switches of the paper's Tables 4 to 6, of our own ablations and of the released code.

Equations and notation: mkd.py, this equals it at its defaults, bit for bit.
Table 4: alpha 0 removes the mean teachers, threshold 0 knowledge selection, fda 0 FDA; boxes 0 with
the run's strong "none" removes SDA. Table 5: threshold, threshold_ss. Table 6: the run's arch2.
Released code: parameters/recipes/released.yaml; not here: its update="liner", FDA network by network.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..augment import beta_box, half_box, mix, ratio_box, xor_boxes
from ..data.base import IGNORE
from ..ema import EMA
from ..losses import confidence, cosine, cross_entropy, masked_mean, pseudo_label, ramp
from ..models import SegNet, nearest, resize
from ..semantics import ClassMoments
from .base import Batch, Build, Count, EMABuffers, Method, Share, TeacherMode, Terms, Weight, both


class MKDAblation(Method):
    """MKD's options, a weight of 0 removing its term, and these; "released" is what the released code does:

    threshold_ss   T of L_ss, on the other student's confidence (Table 5); 0: every pixel
    fda_ramp       how lambda grows: "cosine" (released), "linear" (ISDA), "constant"; the paper does not say
    fda_detach     no gradient of FDA's shift to the classifier's weights (released); False: as in ISDA
    fda_own        False: a pixel's class in Eq. (4) is the loss's target. True (released): its true label,
                   whose shift misses the step's unlabeled images, or the network's own argmax; teachers are
                   shifted too; targets are argmax after the shift
    mutual         False: each teacher labels for its own student, the paper's "naive MT"
    law            of the CutMix mask: "xor" of the boxes (CPS, released), or one box as U2PL ("half" the
                   area, on half the batches), UniMatch ("ratio", on half the images) or PS-MT ("beta") draw
                   it
    stride         of the grid of L_st and L_ss: 1 full resolution; 8 released, teachers' maps mixed before
    on_labeled     L_st and L_ss on labeled pixels too (released; the paper's superscript u says no)
    ignore_padding padded pixels carry no pseudo-label (released: they do)
    denominator    "selected": mean over the pixels that T keeps (released); "valid": all inside the image
    teacher_mode   BatchNorm of the teachers: statistics of the batch ("train", released) or running ones
    joint          labeled and unlabeled images in one forward; False: BatchNorm statistics apart (released)
    """

    label, colour, passes, terms, views = "MKD (ablation)", "#56b4e9", (4, 2), ("sup", "ss", "st"), 1

    def __init__(
        self, build: Build, *, alpha: Weight = 1.5, beta: Weight = 1.0, threshold: Share = 0.95,
        threshold_ss: Share = 0.0, fda: Weight = 0.0,
        fda_ramp: Literal["cosine", "linear", "constant"] = "cosine", fda_detach: bool = True,
        fda_own: bool = False, mutual: bool = True,
        decay: Share = 0.99, boxes: Count = 3,
        law: Literal["xor", "half", "ratio", "beta"] = "xor", rampup: Share = 0.0,
        stride: Literal[1, 2, 4, 8, 16] = 1, on_labeled: bool = False, ignore_padding: bool = True,
        denominator: Literal["selected", "valid"] = "selected", teacher_mode: TeacherMode = "train",
        ema_buffers: EMABuffers = "none", joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        # What has no effect would only give the run another id.
        if not fda and (fda_ramp, fda_detach, fda_own) != ("cosine", True, False):
            raise ValueError("mkd_ablation: fda_ramp, fda_detach and fda_own belong to an fda above 0")
        if law != "xor" and boxes != 3:
            raise ValueError(f"mkd_ablation: boxes belongs to law='xor', law={law!r} has a box of its own")
        students = [build(), build()]
        teachers = [EMA(s, decay, buffers=ema_buffers, mode=teacher_mode) for s in students if alpha]
        self.students, self.teachers = nn.ModuleList(students), nn.ModuleList(teachers)
        # Networks 0 and 1 are the students, 2 and 3 their teachers.
        last = [net.classifier for net in [*students, *(t.module for t in teachers)][: 4 if fda_own else 2]]
        self.moments = nn.ModuleList([ClassMoments(c.out_channels, c.in_channels) for c in last if fda])
        self.evaluated = ("student 1", "student 2", *(("teacher 1", "teacher 2") if alpha else ()))
        self.labeler = ([3, 2] if mutual else [2, 3]) if alpha else [1, 0]  # who labels for student 0 and 1
        self.alpha, self.beta, self.threshold, self.threshold_ss = alpha, beta, threshold, threshold_ss
        self.fda, self.fda_ramp, self.fda_detach, self.fda_own = fda, fda_ramp, fda_detach, fda_own
        self.law, self.boxes, self.min_batch = law, boxes, 2 if boxes else 1
        self.rampup, self.stride, self.on_labeled = rampup, stride, on_labeled
        self.ignore_padding, self.denominator, self.joint = ignore_padding, denominator, joint

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        size = batch.weak.shape[-2:]
        grid = torch.Size(side // self.stride for side in size)
        xor = partial(xor_boxes, boxes=self.boxes)
        law = {"xor": xor, "half": half_box, "ratio": ratio_box, "beta": beta_box}[self.law]
        mask = law(len(batch.weak), size, batch.weak.device)
        mixed = mix(batch.strong[0], mask)

        # Teachers see labeled images where these count.
        nets = [*self.students, *(t.module for t in self.teachers)]
        looks = [self._look(s, batch.x, mixed) for s in self.students]
        with torch.no_grad():
            x = batch.x if self.on_labeled else None
            looks += [self._look(t.module, x, batch.weak) for t in self.teachers]
        sup = torch.stack([self.supervised(resize(z[0], size), batch.y) for _, z in looks[:2]]).sum()

        # N pixels carry L_st and L_ss: unlabeled ones, or [labeled; unlabeled].
        inside, masks = self._inside(batch, mask, grid), [None, None, mask, mask]
        parts = [z if self.on_labeled else z[-1:] for _, z in looks]
        raw = [_on_grid(z, grid, m) for z, m in zip(parts, masks, strict=False)]  # (N, C, grid)
        least = [self.threshold_ss] * 2 + [self.threshold] * 2
        kept = [inside & (confidence(z) >= t) if t else inside for z, t in zip(raw, least, strict=False)]
        labels = [pseudo_label(z) for z in raw]
        targets = [label.masked_fill(~k, IGNORE) for label, k in zip(labels, kept, strict=True)]

        rise = {"cosine": cosine(progress), "linear": progress, "constant": 1.0}[self.fda_ramp]
        logits, tables, y, n = list(raw), [], nearest(batch.y, grid), len(mixed)
        for i, moments in enumerate(self.moments):
            features, label = looks[i][0], labels[i] if self.fda_own else targets[self.labeler[i]]
            coarser = min(grid, features[0].shape[-2:])
            pixels = _on_grid([f.detach() for f in features], coarser, masks[i])
            label = torch.cat((y, label[-n:]))[-len(pixels) :]  # the truth, where it is known
            weight = nets[i].classifier.weight.flatten(1)
            weight = weight.detach() if self.fda_detach else weight
            seen, own, shifted = nearest(label, coarser), label[-len(raw[i]) :], []
            for part in (slice(-n), slice(-n, None)) if self.fda_own else (slice(None),):
                moments.update(pixels[part], seen[part])
                table = moments.table(weight, self.fda * rise)
                if self.fda_own:
                    shifted.append(moments.shift(raw[i][part], own[part], table))
            tables.append(table)
            logits[i] = torch.cat(shifted) if shifted else raw[i]
        if self.fda_own:
            targets = [pseudo_label(z, valid=k) for z, k in zip(logits, kept, strict=True)]

        def ce(i: int, by: int) -> Tensor:
            shifted = bool(tables) and not self.fda_own
            z = ClassMoments.shift(logits[i], targets[by], tables[i]) if shifted else logits[i]
            return cross_entropy(z, targets[by], over=inside if self.denominator == "valid" else None)

        grown = ramp(progress, self.rampup)
        terms, stats = {"sup": sup}, {"agreement": masked_mean((labels[0] == labels[1]).float(), inside)}
        if tables:
            stats["shift"] = torch.stack(tables).detach().mean()  # mean entry of FDA's tables
        if self.beta:
            terms["ss"] = self.beta * grown * (ce(0, by=1) + ce(1, by=0))
        if self.alpha:
            terms["st"] = self.alpha * grown * (ce(0, by=self.labeler[0]) + ce(1, by=self.labeler[1]))
            stats["kept"] = masked_mean(torch.stack(kept[2:]).float().mean(0), inside)
        return terms, stats

    def update(self, step: int) -> None:
        for teacher, student in zip(self.teachers, self.students, strict=False):
            teacher.update(student, step)

    def _inside(self, batch: Batch, mask: Tensor, grid: torch.Size) -> Tensor:
        """(N, grid) bool: the pixels that L_st and L_ss may use."""
        inside = mix(batch.valid, mask)
        inside = torch.cat((batch.y != IGNORE, inside)) if self.on_labeled else inside
        return nearest(inside if self.ignore_padding else torch.ones_like(inside), grid)

    def _look(self, net: SegNet, x: Tensor | None, u: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features (n, D, h, w) and logits (n, C, h, w) of labeled, if any, and unlabeled images."""
        features = [net.features(u)] if x is None else [*both(net.features, x, u, self.joint)]
        return features, [net.classifier(f) for f in features]


def _on_grid(maps: list[Tensor], grid: torch.Size, mask: Tensor | None) -> Tensor:
    """Maps (n, K, h, w) of one or two batches, resized and joined; the last, unlabeled ones mixed where finer."""
    if mask is not None:
        finer = max(grid, maps[-1].shape[-2:])
        maps = [*maps[:-1], mix(resize(maps[-1], finer), nearest(mask, finer))]
    return torch.cat([resize(m, grid) for m in maps])
