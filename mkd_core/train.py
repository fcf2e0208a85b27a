"""Configuration in, weights out: networks, batches, optimisers, the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .augment import STRONG, distort, normalise
from .config import RunConfig
from .data import SegDataset
from .data.base import read_label
from .data.stream import Crops
from .methods import METHODS, Batch, Method
from .models import SegNet, load_encoder


class NonFiniteLoss(RuntimeError):
    """Training met a loss that is not finite; the message names the step and its images. The last checkpoint is from before."""


def build_net(config: RunConfig, num_classes: int, arch: str | None = None) -> SegNet:
    """A freshly initialised network, the encoder from config.weights where given. Two calls differ in what is random."""
    try:
        net = SegNet(
            num_classes, arch=arch or config.arch, encoder=config.encoder, encoder_depth=config.encoder_depth, channels=config.channels, dropout=config.dropout,
            norm=config.norm, bn_momentum=config.bn_momentum,
        )  # fmt: skip
    except (AssertionError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:  # of smp, timm and torch
        raise ValueError(
            f"{arch or config.arch} on the encoder {config.encoder} cannot be built: {type(error).__name__} {error}"
        ) from error
    if config.weights:
        load_encoder(net, config.weights)
    return net


def build_method(config: RunConfig, num_classes: int) -> Method:
    """The method with networks initialised from the seed: the first network is the same for every method."""
    seed_step(config.seed, -1)
    method = METHODS[config.method](partial(build_net, config, num_classes), **config.options)
    if min(config.crop) < method.min_side:
        raise ValueError(f"{config.method} needs a crop of at least {method.min_side} x {method.min_side} pixels; got {config.crop}")
    if config.batch < method.min_batch:
        raise ValueError(
            f"{config.method} with these options needs a batch of at least {method.min_batch} (its images need a partner); got {config.batch}"
        )
    stage_marks(config, method)
    return method


def stage_marks(config: RunConfig, method: Method) -> list[int]:
    """Steps at which the stages of a method begin, and the last step."""
    marks = [0, *(round(share * config.steps) for share in method.stages), config.steps]
    if any(start >= end for start, end in pairwise(marks)):
        raise ValueError(f"{config.method} trains in {len(marks) - 1} stages; {config.steps} steps are too few for them")
    return marks


def seed_step(seed: int, step: int, *stage: int) -> None:
    """Make torch's random draws on every device a function of (seed, step); step -1: what comes before the first, or before a stage."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step + 1, *stage]).generate_state(1, np.uint64)[0] >> 1))


def make_batch(crops: Crops, config: RunConfig, views: int, device: torch.device) -> Batch:
    """Send the crops of a step to the device, draw the colour views there, normalise."""
    x, y, u, valid, label = (t.to(device, non_blocking=True) for t in crops)
    x, u = x.float() / 255, u.float() / 255
    # From the geometric view alone, as released.
    strong = tuple(normalise(STRONG[config.strong](u)) for _ in range(views if len(u) else 0))
    if config.weak_photometric:
        x, u = distort(x), distort(u)
    return Batch(normalise(x), y.long(), normalise(u), strong, valid, label.long())


def poly(config: RunConfig, step: int, start: int = 0, end: int = 0) -> float:
    """Share of the initial learning rate at a step of the stage [start, end); end 0: of the whole run."""
    return (1 - (step - start) / ((end or config.steps) - start)) ** config.power


def make_optimizers(config: RunConfig, method: Method) -> list[torch.optim.Optimizer]:
    """That of the networks, all but the encoders at head_lr times the rate, and, where the method has a critic, the critic's: Adam with betas (0.9, 0.99), as AdvSemSeg and GCT have it."""
    judges = list(method.critic[0].parameters()) if method.critic else []
    parameters: Any = [p for p in method.parameters() if p.requires_grad and not any(p is judge for judge in judges)]
    if config.head_lr != 1:
        inside = {p for net in method.modules() if isinstance(net, SegNet) for p in net.encoder.parameters()}
        parts = [[p for p in parameters if (p in inside) == encoder] for encoder in (True, False)]
        parameters = [{"params": part, "lr": lr} for part, lr in zip(parts, (config.lr, config.lr * config.head_lr), strict=True) if part]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "adamw":
        optimizers.append(torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True))
    else:
        optimizers.append(torch.optim.SGD(parameters, config.lr, momentum=0.9, weight_decay=config.weight_decay, fused=True))
    if method.critic:
        optimizers.append(torch.optim.Adam(judges, method.critic[1], betas=(0.9, 0.99), fused=True))
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


class _Images(Sequence[Tensor]):
    """Normalised images (1, 3, H, W) on the device by position, loaded when asked for, which `progress` is told."""

    def __init__(self, dataset: SegDataset, ids: Sequence[str], device: torch.device, progress: Callable[[str], None]):
        self.dataset, self.ids, self.device, self.progress = dataset, ids, device, progress

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: Any) -> Any:
        self.progress(f"image {i + 1:,} of {len(self):,}")
        return normalise(self.dataset.image(self.ids[i])[None].to(self.device).float() / 255)


class _Relabeled(SegDataset):
    """The images of a stage with the pseudo-labels that were written for it."""

    def __init__(self, dataset: SegDataset, ids: Sequence[str], folder: Path):
        self.dataset, self.folder = dataset, folder
        self.places = {id: i for i, id in enumerate(ids) if (folder / f"{i}.png").exists()}
        self.ids = tuple(self.places)
        if not self.ids:
            raise ValueError(f"the stage has no pseudo-labelled image in {folder}")

    def image(self, id: str) -> Tensor:
        return self.dataset.image(id)

    def label(self, id: str) -> Tensor:
        return read_label(self.folder / f"{self.places[id]}.png")

    def has_label(self, id: str) -> bool:
        return id in self.places
