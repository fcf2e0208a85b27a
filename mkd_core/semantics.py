"""ClassMoments: per-class mean and variance of features, and FDA's logit shift as one C x C table.

FDA (MKD Eq. (4), after ISDA, Wang et al. 2019, arXiv:1909.12220) adds to logit j of a pixel labelled c
    (strength / 2) (w_j - w_c)^T Sigma_c (w_j - w_c).
It depends on the pixel only through c, so it is a row of a C x C table: N x C memory, not N x C x A.
"""

import torch
from torch import Tensor, nn

from . import parallel
from .data.base import IGNORE


class ClassMoments(nn.Module):
    """Exact running count (C,), mean (C, A) and diagonal population variance (C, A) of each class.

    They are computed in float32 outside autocast, without gradient, over all features seen. The count
    is float64, since pixels reach 1e10.
    """

    count: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(num_classes, channels))
        self.register_buffer("var", torch.zeros(num_classes, channels))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Merge features (B, A, h, w) float of pixels labelled (B, h, w) int64 (Chan's parallel update).

        Also (N, A) and (N,). Pixels whose label is IGNORE are left out. Matrix products with the one-hot
        labels are deterministic on a GPU and wait for nothing. The variance is taken about the batch
        mean of the class before squaring: E[f^2] - E[f]^2 in float32 would cancel.
        """
        with torch.autocast(features.device.type, enabled=False):
            features, labels = features.detach().float().movedim(1, -1).flatten(0, -2), labels.flatten()
            classes = torch.arange(len(self.count), device=labels.device)
            one_hot = (labels[:, None] == classes).to(features.dtype)  # (N, C), zero rows for IGNORE
            seen = parallel.total(one_hot.sum(0, dtype=torch.float64))
            per_class = seen.clamp_min(1).to(features.dtype)[:, None]
            mean = parallel.total(one_hot.T @ features) / per_class
            centred = features - one_hot @ mean  # (N, A); rows of IGNORE carry weight 0 below
            var = parallel.total(one_hot.T @ centred.square()) / per_class
            share = (seen / (seen + self.count).clamp_min(1)).to(features.dtype)[:, None]  # w of the batch
            apart = share * (1 - share) * (self.mean - mean).square()
            self.var.copy_((1 - share) * self.var + share * var + apart)
            self.mean.lerp_(mean, share)
            self.count.add_(seen)

    def table(self, weight: Tensor, strength: float) -> Tensor:
        """Return the shifts (C, C): entry [c, j] is added to logit j of a pixel labelled c.

        weight (C, A) is the classifier's. The diagonal is exactly 0 and no entry is negative: FDA only
        ever raises the competitors of the label.
        """
        with torch.autocast(weight.device.type, enabled=False):
            weight = weight.float()
            return 0.5 * strength * ((weight[None] - weight[:, None]).square() * self.var[:, None]).sum(-1)

    @staticmethod
    def shift(logits: Tensor, label: Tensor, table: Tensor) -> Tensor:
        """Add row table[label] to the logits (B, C, H, W) of each pixel, and nothing at IGNORE."""
        rows = torch.cat((table, table.new_zeros(1, table.shape[1])))
        rows = rows[label.masked_fill(label == IGNORE, len(table))]  # (B, H, W, C): the size of the logits
        return logits + rows.permute(0, 3, 1, 2)
