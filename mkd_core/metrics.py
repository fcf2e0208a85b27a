"""Confusion matrix, IoU, and how good pseudo-labels are. Counts stay on the device until the end."""

from typing import Any

import torch
from torch import Tensor

from .data.base import IGNORE


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (truth, prediction): two int maps of equal shape -> (C, C) int64 on their device.

    IGNORE is left out. One scatter-add never waits for the device, as bincount does, and integers add
    up alike in any order.
    """
    ignored = num_classes**2
    index = torch.where(label == IGNORE, ignored, label.long() * num_classes + prediction.long())
    counts, index = torch.zeros(ignored + 1, dtype=torch.int64, device=label.device), index.flatten()
    counts.scatter_add_(0, index, torch.ones_like(index))
    return counts[:ignored].view(num_classes, num_classes)


def iou(confusion: Tensor) -> Tensor:
    """Intersection over union in percent: (C, C) counts -> (C,) float64; NaN for a class nowhere seen."""
    confusion = confusion.double()
    hit = confusion.diagonal()
    return 100 * hit / (confusion.sum(0) + confusion.sum(1) - hit)


def miou(confusion: Tensor) -> float:
    """Mean IoU in percent over the classes that occur or are predicted."""
    return iou(confusion).nanmean().item()


class PseudoLabelQuality:
    """Measure how many pixels reach the confidence `threshold`, and how many of those labels are right."""

    def __init__(self, num_classes: int, threshold: float, device: torch.device | str = "cpu"):
        self.threshold = threshold
        self.all = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.kept = torch.zeros_like(self.all)

    def update(self, prob: Tensor, label: Tensor) -> None:
        """prob (B, C, H, W), label (B, H, W) with IGNORE left out."""
        confidence, prediction = prob.max(1)
        classes = len(self.all)
        self.all += confusion_matrix(prediction, label, classes)
        kept = torch.where(confidence >= self.threshold, label, IGNORE)
        self.kept += confusion_matrix(prediction, kept, classes)

    def summary(self) -> dict[str, Any]:
        """Return kept and accuracy in percent, accuracy_all at threshold 0, and both per predicted class."""
        everything, kept = self.all.double(), self.kept.double()

        def share(part: Tensor, whole: Tensor) -> list[float | None]:
            pairs = zip(part.tolist(), whole.tolist(), strict=True)
            return [round(100 * p / w, 3) if w else None for p, w in pairs]

        return {
            "threshold": self.threshold,
            "kept": share(kept.sum()[None], everything.sum()[None])[0],
            "accuracy": share(kept.trace()[None], kept.sum()[None])[0],
            "accuracy_all": share(everything.trace()[None], everything.sum()[None])[0],
            "kept_per_class": share(kept.sum(0), everything.sum(0)),
            "accuracy_per_class": share(kept.diagonal(), kept.sum(0)),
        }
