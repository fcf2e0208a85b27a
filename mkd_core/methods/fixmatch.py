"""FixMatch: what the network is sure of on the weak view is the label of its strong view, cut and mixed.

Sohn et al. 2020, arXiv:2001.07685; for segmentation as released with UniMatch.
y = argmax f(weak),   q = max softmax f(weak);   with a decay, the EMA teacher of f in its place
L = 1/2 CE(f(x), y_x) + w/2 sum 1[q >= T] CE(f(mix(strong)), mix(y)) / (number of pixels inside the image)
"""

from ..augment import mix, ratio_box
from ..data.base import IGNORE
from ..ema import EMA
from ..losses import cross_entropy, masked_mean, pseudo_label
from .base import Batch, Build, Method, Share, Terms, Weight, both


class FixMatch(Method):
    """Defaults of UniMatch's released code: threshold 0.95 (Cityscapes 0), a CutMix box with probability 0.5,
    both terms halved, labeled and weak images in one forward, the strong ones in another. An unsure pixel
    still counts in the mean: the term grows with confidence.

    cutmix      probability of a box; 0: nothing is mixed
    decay       of a teacher in eval mode that labels the weak view, as in UniMatch V2's baseline (0.996); the
                forward is then of labeled and strong images. 0: the network labels for itself
    Deviations: the partner is the next sample of the batch, labelled by the forward that labels everything
    (theirs: a second pass over the loader, predicted in eval mode in a forward of its own).
    """

    label, colour, passes, terms = "FixMatch", "#009e73", (3, 0), ("sup", "strong")
    views = 1

    def __init__(
        self, build: Build, *, weight: Weight = 1.0, threshold: Share = 0.95, cutmix: Share = 0.5,
        joint: bool = True, decay: Share = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        self.teacher = EMA(self.net, decay, buffers="all", mode="eval") if decay else None
        self.weight, self.threshold, self.cutmix, self.joint = weight, threshold, cutmix, joint
        self.min_batch, self.evaluated = 2 if cutmix else 1, ("student", "teacher") if decay else ("net",)

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        mask = ratio_box(len(batch.weak), batch.weak.shape[-2:], batch.weak.device, self.cutmix)
        mixed = mix(batch.strong[0], mask)
        if self.teacher:
            weak = self.teacher(batch.weak)
            labeled, seen = both(self.net, batch.x, mixed, self.joint)
        else:
            labeled, weak = both(self.net, batch.x, batch.weak, self.joint)
            seen = self.net(mixed)
        label = pseudo_label(weak, self.threshold, batch.valid)
        strong = cross_entropy(seen, mix(label, mask), over=mix(batch.valid, mask))
        terms = {"sup": self.supervised(labeled, batch.y) / 2, "strong": self.weight / 2 * strong}
        return terms, {"kept": masked_mean((label != IGNORE).float(), batch.valid)}
