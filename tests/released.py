"""What one step of the released MKD code does, re-enacted on the networks of an `mkd_ablation` with the released switches.

Read off its source (commit 63afda8 of semi-mmseg), written anew: teachers moved parameter by parameter into new tensors; eight
forwards, each with a cross-entropy at full resolution, of which two are used, and its count asked from the device; statistics of
features expanded to (pixels, classes, channels), labeled and unlabeled images apart; FDA of every pixel by tensors of that size;
every loss read for the log. In its order: teachers' maps are mixed before they are halved, labeled pixels shifted before unlabeled
ones enter the statistics. The terms are the method's, to rounding (tests/test_bench.py). Left out: reductions, fp16, loader.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mkd_core.augment import mix, xor_boxes
from mkd_core.data.base import IGNORE
from mkd_core.losses import cosine
from mkd_core.methods import Batch
from mkd_core.methods.mkd_ablation import MKDAblation
from mkd_core.models import nearest

SWITCHES = {"decay": 0.6, "threshold": 0.0, "fda": 1.5, "fda_own": True, "stride": 8, "on_labeled": True,
            "ignore_padding": False}  # fmt: skip


class Released:
    """step(): forward and backward, teachers included; terms: of the last one."""

    def __init__(self, method: MKDAblation, batch: Batch, progress: float = 0.5):
        self.method, self.batch, self.progress = method, batch, progress
        shape = method.moments[0].mean.shape
        self.moments = [[torch.zeros(shape[0]), torch.zeros(shape), torch.zeros(shape)] for _ in range(4)]
        self.moments = [[t.to(batch.x.device) for t in of] for of in self.moments]
        self.terms: dict[str, Tensor] = {}

    def step(self, momentum: float = 0.6) -> None:
        method, batch = self.method, self.batch
        for student, teacher in zip(method.students, method.teachers, strict=True):
            for own, other in zip(teacher.module.parameters(), student.parameters(), strict=True):
                own.data = momentum * own.data + (1 - momentum) * other.data
        mask = xor_boxes(len(batch.weak), batch.weak.shape[-2:], batch.weak.device)
        images = mix(batch.strong[0], mask), batch.weak
        nothing = torch.zeros_like(batch.y)  # the labels of unlabeled images, overwritten
        looks, sup = [], 0.0
        for i, net in enumerate([*method.students, *(t.module for t in method.teachers)]):
            with torch.set_grad_enabled(i < 2):
                known, loss = self._forward(net, batch.x, batch.y)
                unknown, _ = self._forward(net, images[i // 2], nothing)
                sup = sup + loss if i < 2 else sup
                looks.append(self._shifted(i, net, known, unknown, mask))
        labels = [look.detach().max(1).indices for look in looks]
        st = self._loss(looks[0], labels[3]) + self._loss(looks[1], labels[2])
        ss = self._loss(looks[0], labels[1]) + self._loss(looks[1], labels[0])
        self.terms = {"sup": sup, "ss": method.beta * ss, "st": method.alpha * st}
        torch.stack([*self.terms.values()]).sum().backward()
        self.log = [term.item() for term in self.terms.values()]
        method.zero_grad(set_to_none=True)

    def _forward(self, net: nn.Module, images: Tensor, label: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        features = net.features(images)
        logits = net.classifier(features)
        full = F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=False)
        return (features, logits), self._loss(full, label)

    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        count = (label != IGNORE).sum().item()
        return F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none").sum() / max(count, 1)

    def _shifted(self, i: int, net: nn.Module, known: tuple, unknown: tuple, mask: Tensor) -> Tensor:
        """Logits (2 B, C, h, w) of labeled and unlabeled images at half the decoder's resolution after FDA."""
        weight, out = net.classifier.weight.detach().flatten(1), []
        if i > 1:
            unknown = [mix(t, nearest(mask, t.shape[-2:])) for t in unknown]
        pairs = [
            [F.interpolate(t, scale_factor=0.5, mode="bilinear", align_corners=False) for t in pair]
            for pair in (known, unknown)
        ]
        grid = pairs[0][0].shape[-2:]
        labels = [nearest(self.batch.y, grid), pairs[1][1].detach().max(1).indices]
        for (features, logits), label in zip(pairs, labels, strict=True):
            self._update(self.moments[i], features.detach(), label)
            y, inside = label.flatten(), (label != IGNORE).flatten()
            c = y.masked_fill(~inside, 0)
            v = weight[None] - weight[c][:, None]  # (pixels, C, A)
            s = v.square() * self.moments[i][2][c][:, None]
            shift = 0.5 * self.method.fda * cosine(self.progress) * s.sum(-1) * inside[:, None]
            out.append(logits + shift.view(*label.shape, -1).movedim(-1, 1))
        return torch.cat(out)

    @torch.no_grad()
    def _update(self, moments: list[Tensor], features: Tensor, label: Tensor) -> None:
        count, mean, var = moments
        features, y = features.movedim(1, -1).flatten(0, -2), label.flatten()
        features, y = features[y != IGNORE], y[y != IGNORE]
        one_hot = F.one_hot(y, len(count)).to(features.dtype)[..., None]  # (pixels, C, 1)
        by_class = features[:, None].expand(-1, len(count), -1) * one_hot
        amount = one_hot.sum(0)
        own = by_class.sum(0) / amount.clamp_min(1)
        spread = ((by_class - own.expand_as(by_class) * one_hot).square()).sum(0) / amount.clamp_min(1)
        share = amount / (amount + count[:, None]).clamp_min(1)
        moments[2] = (1 - share) * var + share * spread + share * (1 - share) * (mean - own).square()
        moments[1] = (1 - share) * mean + share * own
        moments[0] = count + amount[:, 0]
