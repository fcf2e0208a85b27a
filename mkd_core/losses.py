"""Verbs of the methods: cross-entropy, pseudo-labels, distances, ramps. Nothing here waits for the device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.base import IGNORE


def cross_entropy(logits: Tensor, label: Tensor, over: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the pixels whose label is not IGNORE; 0 (with a graph) where there are none.

    logits (B, C, H, W), label (B, H, W) int64 -> scalar. `over`, a (B, H, W) bool map, makes the denominator
    the pixels of `over` instead of the labelled ones: FixMatch's "selected over valid", which shrinks as
    fewer pixels are confident.
    """
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none").sum()
    return loss / ((label != IGNORE) if over is None else over).sum().clamp_min(1)


@torch.no_grad()
def pseudo_label(logits: Tensor, threshold: float = 0.0, valid: Tensor | None = None) -> Tensor:
    """Hard labels of logits (B, C, H, W) -> (B, H, W) int64; IGNORE where confidence < threshold or valid (B,
    H, W) is False.

    Threshold 0 keeps every pixel (MKD Eq. (2)); 0.95 is MKD's knowledge selection (Eq. (3)).
    """
    label = logits.max(1).indices  # argmax(1) takes five times as long on a CPU
    if threshold > 0:
        label = label.masked_fill(confidence(logits) < threshold, IGNORE)
    return label if valid is None else label.masked_fill(~valid, IGNORE)


@torch.no_grad()
def confidence(logits: Tensor) -> Tensor:
    """Largest class probability: (B, C, H, W) -> (B, H, W) in [1/C, 1]."""
    logits = logits.to(
        torch.promote_types(logits.dtype, torch.float32)
    )  # bfloat16 could not tell 0.95 from its neighbours
    return (logits.amax(1) - logits.logsumexp(1)).exp()


def entropy(logits: Tensor) -> Tensor:
    """Of the class probabilities, in nats: (B, C, H, W) -> (B, H, W) in [0, log C]."""
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    return -(logs.exp() * logs).sum(1)


def kl_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Per-pixel KL(softmax target || softmax logits), summed over classes, in nats: logits (B, C, H, W) twice
    -> (B, H, W)."""
    logs, target = (
        z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(1) for z in (logits, target)
    )
    return F.kl_div(logs, target, reduction="none", log_target=True).sum(1)


def squared_distance(prob: Tensor, target: Tensor) -> Tensor:
    """Per-pixel mean over classes of (prob - target)^2: (B, C, H, W) twice -> (B, H, W). Its mean is "MSE" of
    the CPS authors' MT."""
    return (prob - target).square().mean(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values over the True pixels of mask, 0 where there are none."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def unit(tensor: Tensor) -> Tensor:
    """Each sample (first axis) scaled to length 1: a direction for adversarial noise; zeros stay zeros."""
    return tensor / tensor.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (tensor.ndim - 1))


def percentiles(values: Tensor, mask: Tensor, shares: tuple[float, ...]) -> list[Tensor]:
    """Of the values where mask is True, the one with share a of them below it, interpolated
    (numpy.percentile), for any number of values.

    torch.quantile stops at 2^24 values, and the number of values is not known on the host. No value: infinite
    or not a number.
    """
    ordered = values.masked_fill(~mask, float("inf")).flatten().sort().values
    found = []
    for share in shares:
        place = share * (mask.sum(dtype=torch.float64) - 1).clamp_min(0)
        below, above = (ordered.gather(0, i.long()[None])[0] for i in (place.floor(), place.ceil()))
        found.append(
            torch.where(
                below == above, below, below + (above - below) * (place - place.floor()).to(below.dtype)
            )
        )
    return found


def draw(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` True places of each row of mask (R, N), at random and without replacement, without asking
    the host how many there are.

    -> (R, k) int64 places and (R, k) bool, with k = min(count, N): which of them are True places; these come
    first.
    """
    score, place = (
        torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0).topk(min(count, mask.shape[1]), 1)
    )
    return place, score >= 0


def ramp(progress: float, length: float) -> float:
    """Quadratic ramp 0 -> 1 over the first `length` of training, progress in [0, 1); length 0: always 1. Our
    choice, for nets from scratch."""
    return 1.0 if length <= 0 else min(1.0, progress / length) ** 2


def sigmoid(progress: float, length: float) -> float:
    """The "sigmoid" ramp exp(-5 (1 - t)^2) with t = progress / length: e^-5 -> 1, then 1 (Laine & Aila,
    arXiv:1610.02242; Mean Teacher)."""
    return 1.0 if progress >= length else math.exp(-5 * (1 - progress / length) ** 2)


def cosine(progress: float) -> float:
    """Cosine ramp 0 -> 1 over the whole training (released MKD's strength of FDA)."""
    return 0.5 - 0.5 * math.cos(math.pi * progress)
