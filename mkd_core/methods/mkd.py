"""MKD: two co-trained students and their mean teachers; teacher 1 labels for student 2 and teacher 2 for student 1.

Yuan et al. 2023, arXiv:2208.11499.   L = L_s + alpha L_st + beta L_ss                                   Eq. (5)
L_s  = sum_i CE(s_i(x), y)                       L_st = sum_i CE(s_i(strong), argmax t_j(weak)), j != i   Eq. (6), (2)
L_ss = sum_i CE(s_i(strong), argmax s_j(strong)), j != i                                                 Eq. (7)
"""

from __future__ import annotations

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
from .base import Batch, Build, Count, EMABuffers, Method, Share, TeacherMode, Terms, Weight


class MKD(Method):
    """Defaults are the recipe *paper*; parameters/recipes/released.yaml holds the released configuration. Zero removes a term.

    Table 4's five switches: co-training is the base (beta, released code 1.0);
      alpha      weight of L_st, mutual mean teachers (released code 1.5); 0: no teachers at work
      sda        strong colour and CutMix for the students; False: everybody sees the weak view, nothing is mixed
      threshold  T of knowledge selection (paper 0.95); 0: off. `select` places it: "st" (paper), "ss" or "both" (Table 5)
      fda        lambda_0 of feature augmentation (released code 1.5); 0: off
    fda_ramp     how lambda grows to lambda_0 over training: "cosine" (released code), "linear" (ISDA), "constant"; the paper does not say
    fda_detach   no gradient of FDA's shift to the classifier's weights (released code); False: they get it, as in ISDA
    mutual       False: each teacher labels for its own student, the "naive MT" that the paper reports as unstable
    arch2        architecture of the second branch, student and teacher (Table 6: "pspnet"); None: as the first
    decay        EMA cap, Eq. (1)'s gamma: not in the paper, 0.6 in the released code; 0.99 is our choice
    boxes        of the CutMix mask (released code 3); 0: no CutMix
    law          of the CutMix mask: "xor" of the boxes (CPS, released code), or one box as U2PL ("half" the area, on half the batches),
                 UniMatch ("ratio", on half the images) or PS-MT ("beta") draw it
    rampup       alpha and beta grow as (progress / rampup)^2 (our choice for networks from scratch; 0: constant, as published)
    stride       of the loss grid of L_st and L_ss: 1 full resolution (paper says nothing), 8 as released
    on_labeled   L_st and L_ss on labeled pixels too (released code; the paper's superscript u says no)
    ignore_padding  padded pixels carry no pseudo-label (released code: they do)
    denominator  "selected": mean over the pixels that T keeps (released code); "valid": over all pixels inside the image
    fda_label    the class c of a pixel in Eq. (4): "target" of the loss (the paper's y_i) or the prediction of its "own" logits (released)
    fda_on_teacher, target_after_fda   as released, with fda_label "own" only: teachers are shifted too; argmax after the shift
    teacher_mode, ema_buffers   BatchNorm of the teachers, see EMA
    joint        labeled and unlabeled images in one forward (shared BatchNorm statistics); both recipes keep them apart

    Deviations: Eq. (3) prints the student's probability; the text and Table 5 select on the teacher, and so do we.
    With a threshold that keeps nothing the term is 0 (released code: 0 / 0).
    """

    views = 1

    def __init__(
        self, build: Build, *, alpha: Weight = 1.5, beta: Weight = 1.0, sda: bool = True, threshold: Share = 0.95,
        select: Literal["st", "ss", "both"] = "st", fda: Weight = 0.0,
        fda_ramp: Literal["cosine", "linear", "constant"] = "cosine", fda_detach: bool = True, mutual: bool = True,
        arch2: Literal["deeplabv3plus", "pspnet"] | None = None, decay: Share = 0.99, boxes: Count = 3,
        law: Literal["xor", "half", "ratio", "beta"] = "xor", rampup: Share = 0.0,
        stride: Literal[1, 2, 4, 8, 16] = 1, on_labeled: bool = False, ignore_padding: bool = True,
        denominator: Literal["selected", "valid"] = "selected", fda_label: Literal["target", "own"] = "target",
        fda_on_teacher: bool = False, target_after_fda: bool = False, teacher_mode: TeacherMode = "train",
        ema_buffers: EMABuffers = "none", joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        if fda_label == "target" and (fda_on_teacher or target_after_fda):
            raise ValueError("mkd: fda_on_teacher and target_after_fda need fda_label='own': a target cannot depend on itself")
        # What has no effect would only give the run another id.
        if not sda and (law != "xor" or boxes != 3):
            raise ValueError("mkd: law and boxes belong to sda: true")
        if not fda and (fda_ramp != "cosine" or not fda_detach):
            raise ValueError("mkd: fda_ramp and fda_detach belong to an fda above 0")
        if not threshold and select != "st":
            raise ValueError("mkd: select belongs to a threshold above 0")
        if law != "xor" and boxes != 3:
            raise ValueError(f"mkd: boxes belongs to law='xor', law={law!r} has a box of its own; got boxes={boxes}")
        self.students = nn.ModuleList([build(), build(arch=arch2) if arch2 else build()])
        self.teachers = nn.ModuleList([EMA(s, decay, buffers=ema_buffers, mode=teacher_mode) for s in self.students if alpha])
        nets = [*self.students, *(t.module for t in self.teachers)][: 4 if fda_on_teacher else 2]
        self.moments = nn.ModuleList([ClassMoments(*net.classifier.weight.shape[:2]) for net in nets if fda])
        self.alpha, self.beta, self.threshold, self.select, self.fda = alpha, beta, threshold, select, fda
        self.fda_ramp, self.fda_detach = fda_ramp, fda_detach
        self.sda, self.mutual, self.boxes, self.law, self.rampup, self.stride = sda, mutual, boxes, law, rampup, stride
        self.on_labeled, self.ignore_padding, self.denominator = on_labeled, ignore_padding, denominator
        self.fda_label, self.fda_on_teacher, self.target_after_fda = fda_label, fda_on_teacher, target_after_fda
        self.joint = joint
        self.min_batch = 2 if sda and boxes else 1

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        size = batch.weak.shape[-2:]
        grid = torch.Size(side // self.stride for side in size)
        draw = {"xor": partial(xor_boxes, boxes=self.boxes), "half": half_box, "ratio": ratio_box, "beta": beta_box}[self.law]
        mask = draw(len(batch.weak), size, batch.weak.device) if self.sda else None
        strong = batch.weak if mask is None else mix(batch.strong[0], mask)
        inside = self._inside(batch, mask, grid)

        students = [Look(s, [batch.x, strong], self.joint) for s in self.students]
        with torch.no_grad():
            seen = [batch.x, batch.weak] if self.on_labeled else [batch.weak]
            teachers = [Look(t.module, seen, self.joint).mixed(mask, grid) for t in self.teachers]
        sup = torch.stack([cross_entropy(resize(look.logits[0], size), batch.y) for look in students]).sum()

        # Networks 0 and 1 are the students, 2 and 3 their teachers. N pixels: unlabeled ones, or [labeled; unlabeled] with on_labeled.
        looks = students + teachers
        raw = [torch.cat([resize(z, grid) for z in look.logits[0 if self.on_labeled else -1 :]]) for look in looks]  # (N, C, grid)
        threshold = [self.threshold * (self.select != "st")] * 2 + [self.threshold * (self.select != "ss")] * 2
        kept = [inside & (confidence(z) >= t) if t else inside for z, t in zip(raw, threshold, strict=False)]
        labels = [pseudo_label(z) for z in raw]
        targets = [label.masked_fill(~k, IGNORE) for label, k in zip(labels, kept, strict=True)]
        labeler = ([3, 2] if self.mutual else [2, 3]) if self.alpha else [1, 0]  # who labels for student 0 and 1

        # FDA: the logits of a pixel of class c rise by row c of its network's table.
        logits, tables, y = list(raw), [], nearest(batch.y, grid)
        for i, moments in enumerate(self.moments):
            label = labels[i] if self.fda_label == "own" else targets[labeler[i]]
            moments.update(*looks[i].pixels([y, label[-len(strong) :]], grid))
            weight = looks[i].net.classifier.weight[:, :, 0, 0]
            tables.append(moments.table(weight.detach() if self.fda_detach else weight, self.strength(progress)))
            if self.fda_label == "own":
                label = torch.cat((y, label[len(y) :])) if self.on_labeled else label  # the truth, where it is known
                logits[i] = moments.shift(raw[i], label, tables[i])
        if self.target_after_fda:
            targets = [pseudo_label(z, valid=k) for z, k in zip(logits, kept, strict=True)]

        def distil(student: int, by: int) -> Tensor:
            z = logits[student]
            if tables and self.fda_label == "target":
                z = ClassMoments.shift(z, targets[by], tables[student])
            return cross_entropy(z, targets[by], over=inside if self.denominator == "valid" else None)

        grown = ramp(progress, self.rampup)
        terms, stats = {"sup": sup}, {"agreement": masked_mean((labels[0] == labels[1]).float(), inside)}
        if tables:
            stats["shift"] = torch.stack(tables).detach().mean()  # mean entry of FDA's tables
        if self.beta:
            terms["ss"] = self.beta * grown * (distil(0, by=1) + distil(1, by=0))
        if self.alpha:
            terms["st"] = self.alpha * grown * (distil(0, by=labeler[0]) + distil(1, by=labeler[1]))
            stats["kept"] = masked_mean(torch.stack([k.float() for k in kept[2:]]), torch.stack([inside] * 2))
        return terms, stats

    def strength(self, progress: float) -> float:
        """lambda of Eq. (4) at a share of the run."""
        return self.fda * {"cosine": cosine(progress), "linear": progress, "constant": 1.0}[self.fda_ramp]

    def update(self, step: int) -> None:
        for teacher, student in zip(self.teachers, self.students, strict=False):
            teacher.update(student, step)

    @property
    def predictors(self) -> dict[str, nn.Module]:
        students = {f"student {i}": s for i, s in enumerate(self.students, 1)}
        return students | {f"teacher {i}": t for i, t in enumerate(self.teachers, 1)}

    def _inside(self, batch: Batch, mask: Tensor | None, grid: torch.Size) -> Tensor:
        """(N, grid) bool: the pixels that L_st and L_ss may use, labeled ones first where they count."""
        unlabeled, labeled = batch.valid, batch.y != IGNORE
        if not self.ignore_padding:
            unlabeled, labeled = torch.ones_like(unlabeled), torch.ones_like(labeled)
        unlabeled = unlabeled if mask is None else mix(unlabeled, mask)
        return nearest(torch.cat((labeled, unlabeled)) if self.on_labeled else unlabeled, grid)


class Look:
    """A network's features (n, D, h, w) and logits (n, C, h, w), at the decoder's resolution, of one or two batches of images.

    The last batch is the unlabeled one. One forward a batch, so BatchNorm statistics of their own, or one for all (joint).
    """

    def __init__(self, net: SegNet, batches: list[Tensor], joint: bool = False):
        self.net = net
        if joint:
            self.features = list(net.features(torch.cat(batches)).split([len(images) for images in batches]))
        else:
            self.features = [net.features(images) for images in batches]
        self.logits = [net.classifier(f) for f in self.features]

    def mixed(self, mask: Tensor | None, grid: torch.Size) -> Look:
        """Of a teacher: the unlabeled batch mixed, on the loss grid, as the mask (n, H, W) mixed the students' images."""
        if mask is not None:
            small = min(grid, self.features[-1].shape[-2:])
            self.logits[-1] = mix(resize(self.logits[-1], grid), nearest(mask, grid))
            self.features[-1] = mix(resize(self.features[-1], small), nearest(mask, small))
        return self

    def pixels(self, labels: list[Tensor], grid: torch.Size) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) for the class moments, on the coarser of the loss grid and the decoder's grid."""
        small = [resize(f.detach(), min(grid, f.shape[-2:])) for f in self.features]
        pixels = [f.movedim(1, -1).flatten(0, -2) for f in small]
        found = [nearest(label, f.shape[-2:]).flatten() for label, f in zip(labels[-len(small) :], small, strict=True)]
        return torch.cat(pixels), torch.cat(found)
