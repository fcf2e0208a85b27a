"""PS-MT: two mean teachers take turns in following the student, whose features are under attack.

Liu et al. 2022, arXiv:2111.12903.
z = 1/2 core + 1/2 (assistant in its top 7 classes, core elsewhere), logits of t_1 and t_2 on the weak view
y = argmax mix(z), q = max softmax mix(z)
L = CE(s~(x), y_x) + w r(t) sum 1[q >= T] q CE(s~(mix(strong)), y) / sum 1[q >= T]
s~: the student with its features f moved by eps g / |g|,
g = gradient in a small random d of KL(mean teacher decoder (f) || (f + d))
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import parallel
from ..augment import beta_box, mix
from ..data.base import IGNORE
from ..ema import EMA
from ..losses import confidence, cosine, kl_divergence, masked_mean, pseudo_label, unit
from ..models import resize
from .base import Batch, Build, Method, Positive, PositiveCount, Share, Terms, Weight, both

PROBE = 0.01  # |d|


class PSMT(Method):
    """Defaults of the released code for VOC with the augmented lists: weight 1.5 (few labels: 0.06 for 92,
    0.6 for 183 to 732; Cityscapes 3), cosine ramp over 12 of 80 epochs, T 0.6, EMA 0.996 of parameters and
    buffers without warm start, teachers in train mode, one box a sample.

    period      share of training after which the teachers change roles (one of 80 epochs); only the core one
                follows the student
    vat         eps, length of the attack on the features of an image; 0: none
    top         classes in which the assistant counts
    Deviations: the teachers start as copies of the student (theirs: three networks, trained on the labels for
    5 epochs); labeled images in the weak view (theirs: strong); attacked is the deepest map of the encoder
    (theirs: the input of the decoder's last layers, hence `vat` is 2 for 304 x 128 x 128 numbers: a small
    network wants less); divergence and roles at the decoder's resolution; |d| = 0.01, our choice (theirs:
    1e-6, whose gradient is rounding in float32, as a test shows); the partner is the next sample of the batch
    (theirs: a random one); pixels inside only; no boxes of Cityscapes; the run's `strong` (theirs: chain).
    """

    label, colour, passes, terms = "PS-MT", "#8a8a8a", (2, 2), ("sup", "consistency")
    views = 1
    evaluated = ("teachers", "teacher 1", "student")  # reported on VOC the first, on Cityscapes the second

    def __init__(
        self, build: Build, *, weight: Weight = 1.5, rampup: Share = 0.15, threshold: Share = 0.6,
        decay: Share = 0.996, period: Positive = 0.0125, vat: Weight = 2.0, top: PositiveCount = 7,
        cutmix: bool = True, joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        self.teachers = Mean(EMA(self.net, decay, buffers="all", warmup=False) for _ in range(2))
        self.weight, self.rampup, self.threshold, self.period = weight, rampup, threshold, period
        self.vat, self.top, self.cutmix, self.joint = vat, top, cutmix, joint
        self.min_batch = 2 if cutmix else 1
        self.core = 0  # the teacher that follows the student

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        self.core = int(progress / self.period) % 2
        seen, valid = batch.strong[0], batch.valid
        target = resize(self._target(batch.weak), seen.shape[-2:])
        if self.cutmix:
            mask = beta_box(len(seen), seen.shape[-2:], seen.device)
            target, seen, valid = mix(target, mask), mix(seen, mask), mix(valid, mask)
        label = pseudo_label(target, self.threshold, valid)
        labeled, unlabeled = both(self._attacked, batch.x, seen, self.joint)
        loss = F.cross_entropy(unlabeled, label, ignore_index=IGNORE, reduction="none")
        weight = self.weight * (cosine(min(1.0, progress / self.rampup)) if self.rampup else 1.0)
        return {
            "sup": self.supervised(labeled, batch.y),
            "consistency": weight * masked_mean(confidence(target) * loss, label != IGNORE),
        }, {"kept": masked_mean((label != IGNORE).float(), valid)}

    def update(self, step: int) -> None:
        self.teachers[self.core].update(self.net, step)

    @torch.no_grad()
    def _target(self, images: Tensor) -> Tensor:
        """Logits (U, C, h, w) of the two teachers together, at the decoder's resolution."""
        logits = [t.module.classifier(t.module.features(images)) for t in self.teachers]
        core, assistant = logits[self.core], logits[1 - self.core]
        if self.top < core.shape[1]:
            assistant = torch.where(assistant >= assistant.topk(self.top, 1).values[:, -1:], assistant, core)
        return (core + assistant) / 2

    def _attacked(self, images: Tensor) -> Tensor:
        """The student's logits (B, C, H, W), its deepest features under attack (T-VAT)."""
        *maps, deep = self.net.encoder(images)
        if self.vat:
            fixed = [m.detach().float() for m in maps]
            deep = deep + self.vat * self._direction(fixed, deep.detach().float())
        return resize(self.net.classifier(self.net.decoder([*maps, deep])), images.shape[-2:])

    def _direction(self, maps: list[Tensor], deep: Tensor) -> Tensor:
        """One step of the power iteration, in float32, BatchNorm in eval mode: unit vectors (B, D, h, w)."""
        nets = [t.module for t in self.teachers]

        def logits(deep: Tensor) -> Tensor:
            return torch.stack([net.classifier(net.decoder([*maps, deep])) for net in nets]).mean(0)

        for net in nets:
            net.decoder.eval()
        with torch.autocast(deep.device.type, enabled=False):
            d = (PROBE * unit(parallel.share(torch.rand_like(parallel.like(deep))) - 0.5)).requires_grad_()
            with torch.no_grad():
                target = logits(deep)
            (g,) = torch.autograd.grad(kl_divergence(logits(deep + d), target).sum(), d)
        for net in nets:
            net.decoder.train(net.training)
        return unit(g)


class Mean(nn.ModuleList):
    """The average of its networks' logits."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self]).mean(0)
