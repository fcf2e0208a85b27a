"""AdvSemSeg: a discriminator D tells label maps from predictions; what it takes for real is trained on.

Hung et al. 2018, arXiv:1802.07934.   p = softmax f(.), BCE(., 1) = "real"
L   = CE(f(x), y) + a BCE(D(p_x), 1) + a_u BCE(D(p_u), 1) + w CE(f(u), argmax p_u where sigmoid D(p_u) >= T)
L_D = 1/2 BCE(D([p_x; p_u]), 0) + 1/2 BCE(D(one-hot y), 1)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.base import IGNORE
from ..losses import cross_entropy, masked_mean, pseudo_label
from .base import Batch, Build, Method, PositiveCount, Share, Terms, Weight, both
from .critics import Discriminator, frozen


class AdvSemSeg(Method):
    """Defaults of the released code and its published command.

    adversarial            a, labeled images: 0.01 in the command, 0.1 in the script
    adversarial_unlabeled  a_u: 0.001, from the first step
    weight, threshold      w 0.1 and T 0.2 of the self-training term
    start                  its beginning: step 5,000 of 20,000
    critic_lr, width       of D: Adam with 1e-4; 64, 128, 256, 512 channels (from scratch on small images
                           fewer do)
    Deviations: all three terms leave out the padding of unlabeled images (theirs: it counts); the label maps
    that D sees are those of the batch (theirs: drawn by a loader of their own); strides, weights and
    augmentation are the run's (theirs: DeepLabV2 trained on COCO, lr 2.5e-4).
    """

    label, colour, passes = "AdvSemSeg", "#009e73", (2, 0)
    terms = ("sup", "adversarial", "adversarial_unlabeled", "self_training", "critic")
    min_side = 32  # of its critic

    def __init__(
        self, build: Build, *, adversarial: Weight = 0.01, adversarial_unlabeled: Weight = 0.001,
        weight: Weight = 0.1, threshold: Share = 0.2, start: Share = 0.25, critic_lr: Weight = 1e-4,
        width: PositiveCount = 64, joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        self.discriminator = Discriminator(self.net.classifier.out_channels, width)
        self.adversarial, self.adversarial_unlabeled, self.weight = adversarial, adversarial_unlabeled, weight
        self.threshold, self.start, self.critic_lr, self.joint = threshold, start, critic_lr, joint

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        inside = batch.y != IGNORE
        labeled, unlabeled = both(self.net, batch.x, batch.weak, self.joint)
        prob, prob_u = labeled.softmax(1), unlabeled.softmax(1)
        with frozen(self.discriminator):
            judged, judged_u = self.discriminator(prob), self.discriminator(prob_u)
        trusted = batch.valid & (judged_u.detach().sigmoid() >= self.threshold)
        classes = torch.arange(prob.shape[1], device=prob.device)[:, None, None]
        truth = (batch.y[:, None] == classes).to(prob.dtype)  # IGNORE: zero vector
        fake = self.discriminator(torch.cat((prob, prob_u)).detach())
        own = cross_entropy(unlabeled, pseudo_label(unlabeled, valid=trusted))
        wrong = bce(fake, 0, torch.cat((inside, batch.valid)))
        right = bce(self.discriminator(truth), 1, inside)
        return {
            "sup": self.supervised(labeled, batch.y),
            "adversarial": self.adversarial * bce(judged, 1, inside),
            "adversarial_unlabeled": self.adversarial_unlabeled * bce(judged_u, 1, batch.valid),
            "self_training": self.weight * (progress >= self.start) * own,
            "critic": (wrong + right) / 2,
        }, {"trusted": masked_mean(trusted.float(), batch.valid)}

    @property
    def critic(self) -> tuple[nn.Module, float]:
        return self.discriminator, self.critic_lr


def bce(logits: Tensor, real: int, over: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits (B, H, W) against one answer, 0 or 1, over the True pixels of
    `over`."""
    return masked_mean(F.softplus(-logits if real else logits), over)
