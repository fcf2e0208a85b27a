"""Verbs of the methods: cross-entropy, pseudo-labels, distances, ramps. Nothing waits for the device."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import parallel
from .data.base import IGNORE


def cross_entropy(logits: Tensor, label: Tensor, over: Tensor | None = None) -> Tensor:
    """Average the cross-entropy of logits (B, C, H, W) over the pixels of label that are not IGNORE.

    label (B, H, W) int64 -> scalar, 0 (with a graph) where no pixel is labelled. `over`, a (B, H, W)
    bool map, replaces the denominator by its number of pixels: FixMatch's "selected over valid",
    which shrinks as fewer pixels are confident.
    """
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none").sum()
    return parallel.mean(loss, ((label != IGNORE) if over is None else over).sum())


@torch.no_grad()
def hard_pixels(logits: Tensor, label: Tensor, keep: int, threshold: float = 0.7) -> Tensor:
    """Set all pixels to IGNORE but the hard ones (OHEM), on which the probability of the label is low.

    logits (B, C, H, W), label (B, H, W) int64 -> (B, H, W). A pixel is hard if that probability is
    at most the threshold, or among the `keep` smallest. 0.7 is the threshold of every released code.
    """
    prob = (-F.cross_entropy(_precise(logits), label, ignore_index=IGNORE, reduction="none")).exp()
    prob = prob.masked_fill(label == IGNORE, float("inf"))
    every = parallel.gather(prob).flatten()
    limit = every.kthvalue(min(keep * parallel.world(), every.numel())).values.clamp_min(threshold)
    return label.masked_fill(prob > limit, IGNORE)


@torch.no_grad()
def pseudo_label(logits: Tensor, threshold: float = 0.0, valid: Tensor | None = None) -> Tensor:
    """Take the class of the largest logit: (B, C, H, W) -> (B, H, W) int64.

    A pixel is IGNORE where its confidence is below the threshold or valid (B, H, W) is False.
    Threshold 0 keeps every pixel (MKD Eq. (7)); 0.95 is MKD's knowledge selection (Eq. (3)).
    """
    label = logits.max(1).indices  # argmax(1) takes five times as long on a CPU
    if threshold > 0:
        label = label.masked_fill(confidence(logits) < threshold, IGNORE)
    return label if valid is None else label.masked_fill(~valid, IGNORE)


def _precise(tensor: Tensor) -> Tensor:
    """At least float32: bfloat16 could not tell 0.95 from its neighbours."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def confidence(logits: Tensor) -> Tensor:
    """Return the largest class probability: (B, C, H, W) -> (B, H, W) in [1/C, 1]."""
    logits = _precise(logits)
    return (logits.amax(1) - logits.logsumexp(1)).exp()


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the class probabilities in nats: (B, C, H, W) -> (B, H, W)."""
    logs = _precise(logits).log_softmax(1)
    return -(logs.exp() * logs).sum(1)


def kl_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Return KL(softmax target || softmax logits) per pixel in nats: (B, C, H, W) twice -> (B, H, W)."""
    logs, target = (_precise(z).log_softmax(1) for z in (logits, target))
    return F.kl_div(logs, target, reduction="none", log_target=True).sum(1)


def squared_distance(prob: Tensor, target: Tensor) -> Tensor:
    """Average (prob - target)^2 over the classes: (B, C, H, W) twice -> (B, H, W)."""
    return (prob - target).square().mean(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average values over the True pixels of mask; 0 where there are none."""
    return parallel.mean((values * mask).sum(), mask.sum())


def unit(tensor: Tensor) -> Tensor:
    """Scale each sample (first axis) to length 1, for adversarial noise; zeros stay zeros."""
    return tensor / tensor.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (tensor.ndim - 1))


def percentiles(values: Tensor, mask: Tensor, shares: tuple[float, ...]) -> list[Tensor]:
    """Return the interpolated percentiles (as numpy.percentile) of the values where mask is True.

    shares in [0, 1]. torch.quantile stops at 2^24 values, and the host does not know how many there
    are. Where there is none, a percentile is infinite or not a number.
    """
    values, mask = parallel.gather(values), parallel.gather(mask)
    ordered = values.masked_fill(~mask, float("inf")).flatten().sort().values
    found = []
    for share in shares:
        place = share * (mask.sum(dtype=torch.float64) - 1).clamp_min(0)
        below, above = (ordered.gather(0, i.long()[None])[0] for i in (place.floor(), place.ceil()))
        between = below + (above - below) * (place - place.floor()).to(below.dtype)
        found.append(torch.where(below == above, below, between))
    return found


def draw(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw up to `count` True places of each row of mask (R, N), without replacement.

    -> (R, k) int64 places and (R, k) bool, with k = min(count, N): which of them are True places;
    these come first. The host need not know how many there are.
    """
    noise = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
    score, place = noise.topk(min(count, mask.shape[1]), 1)
    return place, score >= 0


def ramp(progress: float, length: float) -> float:
    """Rise as a square from 0 to 1 over the first `length` of training; length 0: always 1 (ours)."""
    return 1.0 if length <= 0 else min(1.0, progress / length) ** 2


def sigmoid(progress: float, length: float) -> float:
    """Rise as exp(-5 (1 - progress / length)^2) to 1 (Laine & Aila 2017, arXiv:1610.02242)."""
    return 1.0 if progress >= length else math.exp(-5 * (1 - progress / length) ** 2)


def cosine(progress: float) -> float:
    """Rise as a cosine from 0 to 1 over the whole training (released MKD's strength of FDA)."""
    return 0.5 - 0.5 * math.cos(math.pi * progress)
