"""MKD: two students teach each other, and the mean teacher of each one teaches the other.

Yuan et al. 2023, arXiv:2208.11499. Students s_1, s_2, teachers t_1, t_2; x, y labeled images; u_w, u_s weak
and strong views of unlabeled ones; mix: CutMix of `boxes`; j != i. No gradient into y_si, y_ti, t_i, w, Sigma.

p_si = s_i(mix(u_s)),   p_ti = mix(t_i(u_w))                                                        logits
y_si = argmax p_si,     y_ti = argmax p_ti  where max softmax p_ti >= T;  none on padding           Eq. (3)
CE': logit k of a pixel labelled c rises by lambda/2 (w_k - w_c)^T Sigma_c (w_k - w_c), then CE    Eq. (4)
L_st = sum_i CE'(p_si, y_tj),  L_ss = sum_i CE'(p_si, y_sj),  L_s = sum_i CE(s_i(x), y)  Eq. (2), (7), (6)
L    = L_s + alpha L_st + beta L_ss;    after each step  t_i <- gamma t_i + (1 - gamma) s_i   Eq. (5), (1)
"""

import torch
from torch import Tensor, nn

from ..augment import mix, xor_boxes
from ..data.base import IGNORE
from ..ema import EMA
from ..losses import cosine, cross_entropy, masked_mean, pseudo_label, ramp
from ..models import nearest, resize
from ..semantics import ClassMoments
from .base import Batch, Build, Count, EMABuffers, Method, Share, Terms, Weight


class MKD(Method):
    """The paper's recipe, FDA off as in Table 4's last row. Ablations, the released recipe: mkd_ablation.py.

    threshold    T (paper), on the teacher as text and Table 5 say; Eq. (3) prints the student. 0 keeps all
    fda          lambda at the end of training, reached by a cosine (released code 1.5); 0: no FDA
    decay        gamma = min(1 - 1 / (step + 1), decay): no value in the paper, 0.6 in the released code
    alpha, beta  no values in the paper, the default ones in the released code
    rampup       alpha and beta grow as (progress / rampup)^2: ours, from scratch; 0: constant, as released
    ema_buffers  "all": teachers average BatchNorm statistics too (ours); "none": they gather their own
    """

    label, colour, passes, terms, views = "MKD", "#0072b2", (4, 2), ("sup", "ss", "st"), 1
    evaluated = ("student 1", "student 2", "teacher 1", "teacher 2")

    def __init__(self, build: Build, *, alpha: Weight = 1.5, beta: Weight = 1.0, threshold: Share = 0.95,
                 fda: Weight = 0.0, decay: Share = 0.99, boxes: Count = 3, rampup: Share = 0.0,
                 ema_buffers: EMABuffers = "none"):  # fmt: skip
        super().__init__()
        self.students = nn.ModuleList([build(), build()])
        self.teachers = nn.ModuleList([EMA(s, decay, buffers=ema_buffers) for s in self.students])
        last = [s.classifier for s in (self.students if fda else ())]
        self.moments = nn.ModuleList([ClassMoments(c.out_channels, c.in_channels) for c in last])
        self.alpha, self.beta, self.threshold, self.fda, self.rampup = alpha, beta, threshold, fda, rampup
        self.boxes, self.min_batch = boxes, 2 if boxes else 1

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        mask = xor_boxes(len(batch.weak), batch.weak.shape[-2:], batch.weak.device, self.boxes)
        mixed, inside = mix(batch.strong[0], mask), mix(batch.valid, mask)
        f = [(s.features(batch.x), s.features(mixed)) for s in self.students]
        p_x = [resize(s.classifier(a), mask.shape[1:]) for s, (a, _) in zip(self.students, f, strict=True)]
        p_s = [resize(s.classifier(u), mask.shape[1:]) for s, (_, u) in zip(self.students, f, strict=True)]
        p_t = [mix(t(batch.weak), mask) for t in self.teachers]
        y_s = [pseudo_label(p, valid=inside) for p in p_s]
        y_t = [pseudo_label(p, self.threshold, inside) for p in p_t]
        tables = []
        for i, moments in enumerate(self.moments):  # Sigma of true and of the other teacher's labels
            moments.update(torch.cat(f[i]), nearest(torch.cat((batch.y, y_t[1 - i])), f[i][0].shape[-2:]))
            weight = self.students[i].classifier.weight.detach().flatten(1)
            tables.append(moments.table(weight, self.fda * cosine(progress)))

        def ce(i: int, y: Tensor) -> Tensor:
            return cross_entropy(ClassMoments.shift(p_s[i], y, tables[i]) if tables else p_s[i], y)

        st = ce(0, y_t[1]) + ce(1, y_t[0])
        ss = ce(0, y_s[1]) + ce(1, y_s[0])
        sup = self.supervised(p_x[0], batch.y) + self.supervised(p_x[1], batch.y)
        grown = ramp(progress, self.rampup)
        terms = {"sup": sup, "ss": self.beta * grown * ss, "st": self.alpha * grown * st}
        return terms, {"kept": masked_mean((torch.stack(y_t) != IGNORE).float().mean(0), inside)}

    def update(self, step: int) -> None:  # Algorithm 1: at the start of the next step, which is the same
        for teacher, student in zip(self.teachers, self.students, strict=True):
            teacher.update(student, step)
