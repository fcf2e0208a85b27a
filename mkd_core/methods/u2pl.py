"""U2PL: the teacher's reliable pixels are pseudo-labels; unreliable ones tell which classes they are *not*.

Wang et al. 2022, arXiv:2203.03884.
H   = entropy of t(mix(u)),  P_a = its a-th percentile,  a = drop (1 - progress),  R = {H <= P_(100 - a)}
L   = CE(s(x), y) + w N / |R| mean over R of CE(s(mix(u)), mix(argmax t(u))) + v L_c,  of N pixels
L_c = mean over classes c present and 256 anchors z each of
      -log [ e^<z, m_c>/T / (e^<z, m_c>/T + sum over 50 keys k of e^<z, k>/T) ],  <,>: cosine similarity
z   : student's representation of a reliable pixel of c (H <= P_a, or labeled), t's probability of c > 0.3
m_c : mean of the teacher's over all reliable pixels of c
k   : from a memory of the teacher's at pixels that are probably not c
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import parallel
from ..augment import half_box, mix
from ..data.base import IGNORE
from ..ema import EMA
from ..losses import cross_entropy, draw, entropy, masked_mean, percentiles, pseudo_label, ramp
from ..models import nearest, resize
from .base import Batch, Build, Count, Method, Positive, PositiveCount, Share, Terms, Weight, both


class U2PL(Method):
    """Defaults of the released VOC configuration.

    weight, contrast   w 1 and v 1 (the paper's text: v 0.1). The released code divides the gradient of L_c
                       by the number of GPUs, so its v is in effect 1/4 on VOC, 1/8 on Cityscapes
    drop               0.2, falling to 0: the share of pixels that is unreliable, and that is reliable enough
                       to be an anchor
    decay              EMA cap, parameters only, with warm start; the teacher labels in eval mode, everything
                       else of it is in train mode
    cutmix             probability that the batch is mixed, boxes of half the area
    dim                of the representations; anchors, negatives a class; bank: keys kept a class;
                       temperature T; confidence of an anchor
    low_rank, high_rank  an unlabeled unreliable pixel is a negative of the classes at places [3, 20) of the
                         teacher's order (0 is the likeliest), a labeled one of the other classes among its
                         first 3
    rampup             w and v grow as (progress / rampup)^2: ours, for networks from scratch; 0: constant
    Deviations: negatives as in the paper (the released mask also asks that the pseudo-label be c, which
    leaves next to none); the memory takes at most a tenth of its size a step and has one size for all classes
    (released: everything; 50,000 for class 0), the anchors of a class share their keys (released: 50 each;
    the same expectation), anchors are drawn without replacement; padding is no pixel; the head sits on the
    decoder's output (released: on the fused 512 channels); no supervised first epoch (see rampup).
    """

    label, colour, passes, terms = "U2PL", "#d55e00", (2, 3), ("sup", "unsup", "contrast")
    evaluated = ("teacher", "student")
    bank: Tensor  # (C, size, dim) keys of unit length: 0.6 GB with VOC's 21 classes, 2.5 GB with COCO's 81
    seen: Tensor  # (C,) keys ever put in; slot number modulo size is the next one

    def __init__(
        self, build: Build, *, weight: Weight = 1.0, contrast: Weight = 1.0, drop: Share = 0.2,
        decay: Share = 0.99, cutmix: Share = 0.5, dim: PositiveCount = 256, anchors: PositiveCount = 256,
        negatives: PositiveCount = 50, bank: PositiveCount = 30_000, temperature: Positive = 0.5,
        confidence: Share = 0.3, low_rank: Count = 3, high_rank: Count = 20, rampup: Share = 0.0,
        joint: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        classes, channels = self.net.classifier.weight.shape[:2]
        layers: list[nn.Module] = []
        for inputs in (channels, dim):
            layers += [nn.Conv2d(inputs, dim, 3, padding=1), nn.BatchNorm2d(dim)]
            layers += [nn.ReLU(inplace=True), nn.Dropout2d(0.1)]
        self.head = nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))
        self.teacher, self.head_teacher = EMA(self.net, decay), EMA(self.head, decay)
        self.register_buffer("bank", torch.zeros(classes, bank, dim))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.int64))
        self.weight, self.contrast, self.drop, self.cutmix = weight, contrast, drop, cutmix
        self.rampup, self.joint = rampup, joint
        self.anchors, self.negatives = anchors, negatives
        self.temperature, self.confidence = temperature, confidence
        self.low_rank, self.high_rank, self.min_batch = low_rank, high_rank, 2 if cutmix else 1

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        size, n = batch.weak.shape[-2:], len(batch.x)
        self.teacher.eval()
        label = pseudo_label(self.teacher(batch.weak), valid=batch.valid)
        self.teacher.train(self.training)
        mask = half_box(len(label), size, label.device, self.cutmix)
        mixed, label, valid = mix(batch.weak, mask), mix(label, mask), mix(batch.valid, mask)
        features = torch.cat(both(self.net.features, batch.x, mixed, self.joint))
        logits = resize(self.net.classifier(features), size)
        with torch.no_grad():
            theirs = torch.cat(both(self.teacher.module.features, batch.x, mixed, self.joint))
            judged = self.teacher.module.classifier(theirs)
            unsure = entropy(resize(judged[n:], size))
            unreliable = self.drop * (1 - progress)
            low, high = percentiles(unsure, valid, (unreliable, 1 - unreliable))
            kept = valid & (unsure <= high)

        grown = ramp(progress, self.rampup)
        terms = {"sup": self.supervised(logits[:n], batch.y)}
        if self.weight:
            unsup = cross_entropy(logits[n:], label.masked_fill(~kept, IGNORE))
            pixels, reliable = parallel.total(torch.stack((valid.sum(), kept.sum())))
            terms["unsup"] = self.weight * grown * unsup * pixels / reliable.clamp_min(1)
        if self.contrast:
            known, grid = batch.y != IGNORE, features.shape[-2:]
            target = nearest(torch.cat((batch.y, label)), grid)
            sure = nearest(torch.cat((known, valid & (unsure <= low))), grid)
            doubtful = nearest(torch.cat((known, valid & (unsure >= high))), grid)
            own, keys, prob = self.head(features), self.head_teacher(theirs), judged.float().softmax(1)
            own, keys, prob = (_whole(t, n) for t in (own, keys, prob))
            target, sure, doubtful = (_whole(t, n) for t in (target, sure, doubtful))
            contrast = self.contrastive(own, keys, prob, target, sure, doubtful, n * parallel.world())
            terms["contrast"] = contrast * self.contrast * grown
        stored = self.seen.clamp_max(self.bank.shape[1]).float().mean()
        return terms, {"kept": masked_mean(kept.float(), valid), "bank": stored}

    def contrastive(
        self, own: Tensor, theirs: Tensor, prob: Tensor, label: Tensor,
        sure: Tensor, doubtful: Tensor, labeled: int,
    ) -> Tensor:  # fmt: skip
        """L_c of a batch whose first `labeled` images have true labels; its negatives enter the memory first.

        own, theirs (B, dim, h, w) representations by student and teacher; prob (B, C, h, w) the teacher's;
        label, sure, doubtful (B, h, w). Every shape is fixed: which pixels are chosen is a matter of masks
        (C, N), N = B h w, and the host never asks.
        """
        classes = torch.arange(prob.shape[1], device=prob.device)
        is_c = label[:, None] == classes[:, None, None]
        rank = prob.argsort(1, descending=True).argsort(1)  # (B, C, h, w): the place of every class
        of_labeled = ~is_c & (rank < self.low_rank)
        of_unlabeled = (rank >= self.low_rank) & (rank < self.high_rank)
        not_c = doubtful[:, None] & torch.cat((of_labeled[:labeled], of_unlabeled[labeled:]))
        member = is_c & sure[:, None]
        chosen = (member & (prob > self.confidence), member, not_c)
        anchor, member, not_c = (m.movedim(1, 0).flatten(1) for m in chosen)  # (C, N)
        own, theirs = (r.float().movedim(1, -1).flatten(0, -2) for r in (own, theirs))  # (N, dim)

        self._remember(theirs, not_c)
        place, found = draw(anchor, self.anchors)
        stored = self.seen.clamp_max(self.bank.shape[1])[:, None]
        key = (torch.rand(len(classes), self.negatives, device=own.device) * stored).long()
        key = key.clamp_max(self.bank.shape[1] - 1)
        with torch.autocast(own.device.type, enabled=False):
            # (C, 1, dim): the mean but for its length.
            positive = F.normalize(member.float() @ theirs, dim=1)[:, None]
            keys = torch.cat((positive, self.bank[classes[:, None], key]), 1)
            similarity = F.normalize(own[place], dim=2) @ keys.mT / self.temperature  # (C, A, 1 + 50)
        loss = similarity.logsumexp(2) - similarity[..., 0]
        found = found & (stored > 0)
        by_class = (loss * found).sum(1) / found.sum(1).clamp_min(1)
        return by_class.sum() / member.any(1).sum().clamp_min(1)

    @torch.no_grad()
    def _remember(self, representations: Tensor, chosen: Tensor) -> None:
        """Put chosen pixels (C, N) of representations (N, dim), a tenth of the memory at most, in the oldest
        keys' place."""
        size = self.bank.shape[1]
        place, found = draw(chosen, max(1, size // 10))
        slot = (self.seen[:, None] + torch.arange(place.shape[1], device=place.device)) % size
        row = torch.arange(len(self.bank), device=place.device)[:, None]
        keys = F.normalize(representations[place], dim=2)
        self.bank[row, slot] = torch.where(found[..., None], keys, self.bank[row, slot])
        self.seen += found.sum(1)

    def update(self, step: int) -> None:
        self.teacher.update(self.net, step)
        self.head_teacher.update(self.head, step)


def _whole(tensor: Tensor, labeled: int) -> Tensor:
    """The rows of all processes, labeled ones first as in one process."""
    return torch.cat([parallel.gather(part) for part in (tensor[:labeled], tensor[labeled:])])
