"""GCT: two networks and a flaw detector D; each network follows the other where that one has less flaw.

Ke et al. 2020, arXiv:2008.05258.
p_i = softmax f_i(.),  F_i = D(image, p_i),  H_i = F_i blurred and scaled to [0, 1], 1 where above T
L   = sum_i CE(f_i(x), y) + w r(t) mean (p_i - q_i)^2 + v mean 1[both H > T] F_i^2
q_i = p_i where H_i <= H_j, else p_j;  j != i
L_D = c/2 sum_i mean (F_i - G_i)^2 on x,  G_i = sum_c |onehot y - p_i| / 2, blurred, dilated, blurred, scaled
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.base import IGNORE
from ..losses import masked_mean, sigmoid, squared_distance
from .base import Batch, Build, Method, PositiveCount, Share, Terms, Weight, both
from .critics import FlawDetector, frozen


class GCT(Method):
    """Defaults: the re-implementation behind MKD's Table 2 (CPS authors' released code); constants of the
    maps as in the authors' release.

    weight     w 100 of the dynamic consistency, after a sigmoid ramp over `rampup` (3 of 34 epochs)
    correction v 1 of the flaw correction
    detection  c 10 of the detector's loss; critic_lr, width: Adam with 1e-4; 64 to 512 channels (fewer do for
               small images)
    threshold  T 0.6: a flaw above it is a bad pixel
    Deviations: pixels without label and padding are left out of every mean and of G (theirs: they count); one
    forward of each network (theirs: three of the same images); stride-1 convolutions of D are 3x3 (theirs:
    4x4, each loses a row and a column); D's learning rate follows the run's schedule (theirs: constant by
    oversight).
    """

    label, colour, passes, terms = "GCT", "#d55e00", (4, 0), ("sup", "consistency", "correction", "critic")
    evaluated = ("student 1", "student 2")
    min_side = 32  # of its critic

    def __init__(
        self, build: Build, *, weight: Weight = 100.0, correction: Weight = 1.0, detection: Weight = 10.0,
        threshold: Share = 0.6, rampup: Share = 0.09, critic_lr: Weight = 1e-4, width: PositiveCount = 64,
        joint: bool = False,
    ):  # fmt: skip
        super().__init__()
        first = build()
        self.students = nn.ModuleList([first, build()])
        self.detector = FlawDetector(3 + first.classifier.out_channels, width)
        self.weight, self.correction = weight, correction
        self.detection, self.threshold = detection, threshold
        self.rampup, self.critic_lr, self.joint = rampup, critic_lr, joint

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        images, n = torch.cat((batch.x, batch.weak)), len(batch.x)
        inside = torch.cat((batch.y != IGNORE, batch.valid))
        logits = [torch.cat(both(net, batch.x, batch.weak, self.joint)) for net in self.students]
        probs = [z.float().softmax(1) for z in logits]
        with frozen(self.detector):
            flaws = [self.detector(images, p) for p in probs]
        handled = [handle(f) for f in flaws]
        bad = [h > self.threshold for h in handled]
        own, other = (h.masked_fill(b, 1.0) for h, b in zip(handled, bad, strict=True))
        both_bad = bad[0] & bad[1]

        p, q = (p.detach() for p in probs)
        targets = [torch.where((other >= own)[:, None], p, q), torch.where((own >= other)[:, None], q, p)]
        distances = [masked_mean(squared_distance(p, t), inside) for p, t in zip(probs, targets, strict=True)]
        corrections = [masked_mean(f.square() * both_bad, inside) for f in flaws]
        errors = [(self.detector(batch.x, p[:n]) - flaw_map(p[:n], batch.y)).square() for p in (p, q)]
        return {
            "sup": self.supervised(logits[0][:n], batch.y) + self.supervised(logits[1][:n], batch.y),
            "consistency": self.weight * sigmoid(progress, self.rampup) * (distances[0] + distances[1]),
            "correction": self.correction * (corrections[0] + corrections[1]),
            "critic": self.detection * masked_mean((errors[0] + errors[1]) / 2, inside[:n]),
        }, {"both_bad": masked_mean(both_bad.float(), inside)}

    @property
    def critic(self) -> tuple[nn.Module, float]:
        return self.detector, self.critic_lr


@torch.no_grad()
def handle(flaw: Tensor) -> Tensor:
    """D's output (B, H, W) -> flaw in [0, 1]: blurred, each map scaled; 0 where its peak is at most 0.1."""
    flaw = blur(flaw.relu(), flaw.shape[-2] // 16)
    return scaled(flaw) * (flaw.amax((1, 2), keepdim=True) > 0.1)


@torch.no_grad()
def flaw_map(prob: Tensor, label: Tensor) -> Tensor:
    """What D shall say of probabilities (B, C, H, W) with truth label (B, H, W): (B, H, W) in [0, 1]."""
    right = prob.gather(1, label.masked_fill(label == IGNORE, 0)[:, None])[:, 0]
    flaw = (1 - right).masked_fill(label == IGNORE, 0)  # = sum_c |onehot - p| / 2
    flaw = blur(flaw, label.shape[-2] // 8)
    return scaled(blur(F.max_pool2d(flaw, 3, stride=1, padding=1), label.shape[-2] // 4))


def scaled(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low + 1e-9)


def blur(maps: Tensor, side: int) -> Tensor:
    """Gaussian blur of (B, H, W): kernel of `side` pixels or one more, sigma 0.3 (side - 1) / 2 + 0.5."""
    half = side // 2
    place = torch.arange(-half, half + 1, device=maps.device)
    kernel = torch.softmax(-((place / (0.3 * half + 0.5)) ** 2) / 2, 0)
    with torch.autocast(maps.device.type, enabled=False):
        maps = F.pad(maps[:, None].float(), (0, 0, half, half), mode="reflect")
        maps = F.conv2d(maps, kernel[None, None, :, None])
        return F.conv2d(F.pad(maps, (half, half, 0, 0), mode="reflect"), kernel[None, None, None])[:, 0]
