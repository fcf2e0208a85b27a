"""SimpleBaseline: self-training with very strong augmentation, BatchNorm of its own and a robust loss.

Yuan et al. 2021, arXiv:2104.07256.
L = CE(f(x), y) + mean (1 - q) CE_i + beta mean q RCE_i + w (|W - W_0|^2 + |v|^2)
CE_i = -log p_y, RCE_i = (1 - p_y) log 10^4 at pixel i of f'(strong(u)), y its offline label;
q = max p (1 above 0.8), not differentiated
f' = f with another set of BatchNorm layers (DSBN)
W_0 = kernels of the network that labeled, v = biases and BatchNorm (L2-SP)
"""

import copy
import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..augment import STRONG
from ..data.base import IGNORE
from ..losses import confidence, masked_mean
from .base import Batch, Build, Labels, Method, PositiveCount, Prob, Scales, Share, Terms, Weight
from .noise import three_of
from .st_plus_plus import tta

STRONG["three_of"] = three_of  # its strong view, which any method may be given


class SimpleBaseline(Method):
    """Defaults of the released configuration: beta 1, q = 1 above 0.8, L2-SP 1e-4 in place of weight decay
    (the run's weight_decay is to be 0), separate BatchNorm; its strong view is `three_of`. Scales of
    test-time augmentation: ST++'s (our choice).

    rounds   how often the network labels all unlabeled images and is trained on, the stages being equally
             long (our choice)
    dsbn     False: one set of BatchNorm layers. It is evaluated with that of the labeled images
    Deviations: the robust loss is a mean over labeled pixels, not all; the strong view is drawn after scale,
    flip and crop; no weight decay in the first stage either, since a run has one. As released, the surer a
    pixel the more of its loss is RCE.
    """

    label, colour, passes, terms = "SimpleBaseline", "#0072b2", (2, 0), ("sup", "pseudo", "l2sp")
    unlabeled = False
    views = 1

    def __init__(
        self, build: Build, *, rounds: PositiveCount = 1, beta: Weight = 1.0, sure: Share = 0.8,
        l2sp: Weight = 1e-4, dsbn: bool = True, scales: Scales = (0.5, 0.75, 1.0, 1.5, 2.0),
    ):  # fmt: skip
        super().__init__()
        self.net = build()
        self.stages = tuple(k / (rounds + 1) for k in range(1, rounds + 1))
        norms = {name: m for name, m in self.net.named_modules() if isinstance(m, nn.BatchNorm2d) and dsbn}
        self.names, self.norms = list(norms), nn.ModuleList([copy.deepcopy(m) for m in norms.values()])
        self.labeler = copy.deepcopy(self.net).requires_grad_(False)
        self.beta, self.sure, self.l2sp, self.scales = beta, sure, l2sp, scales

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        terms = {"sup": self.supervised(self.net(batch.x), batch.y)}
        if not len(batch.weak):  # the first stage
            return terms, {}
        strong = functional_call(self.net, self.other_norms(), (batch.strong[0],))
        loss = F.cross_entropy(strong, batch.label, ignore_index=IGNORE, reduction="none")
        reverse = -math.log(1e-4) * (1 - (-loss).exp())
        q = confidence(strong)
        q = torch.where(q > self.sure, 1.0, q)
        terms["pseudo"] = masked_mean((1 - q) * loss + self.beta * q * reverse, batch.label != IGNORE)
        if self.l2sp:
            terms["l2sp"] = self.l2sp * self.distance()
        return terms, {"confidence": masked_mean(q, batch.label != IGNORE)}

    def other_norms(self) -> dict[str, Tensor]:
        """Parameters and buffers of the other BatchNorm layers under the names that they replace."""
        pairs = zip(self.names, self.norms, strict=True)
        return {f"{n}.{key}": t for n, m in pairs for key, t in m.state_dict(keep_vars=True).items()}

    def distance(self) -> Tensor:
        """Squared distance of the kernels from the labeler's, plus the squares of biases and BatchNorm."""
        kernels, anchors = ([p for p in net.parameters() if p.ndim > 1] for net in (self.net, self.labeler))
        rest = [p for net in (self.net, self.norms) for p in net.parameters() if p.ndim == 1]
        moved = torch._foreach_sub(kernels, anchors)
        return torch.stack([*torch._foreach_norm(moved), *torch._foreach_norm(rest)]).square().sum()

    def relabel(self, stage: int, images: Sequence[Tensor], prob: Prob, labeled: Collection[int]) -> Labels:
        for i in range(len(images)):
            yield i, tta(prob, self.net, images[i], self.scales).max(1).indices[0]
        self.labeler.load_state_dict(self.net.state_dict())
        for name, norm in zip(self.names, self.norms, strict=True):
            norm.load_state_dict(self.net.get_submodule(name).state_dict())
