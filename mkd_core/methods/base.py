"""What a method is: an nn.Module that returns the paper's loss terms by name; and what it may look at: a Batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Interval, MinLen
from torch import Tensor, nn

from ..models import SegNet, resize

# Types of options: a value of another type or outside its range is refused when a run is configured.
Weight = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Count = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
PositiveCount = Annotated[int, Gt(0)]
Scales = Annotated[tuple[Positive, ...], MinLen(1)]
TeacherMode = Literal["train", "eval"]
EMABuffers = Literal["none", "all"]

Terms = dict[str, Tensor]
Prob = Callable[[nn.Module, Tensor], Tensor]
Build = Callable[..., SegNet]  # build() or build(arch="pspnet"): a freshly initialised network


@dataclass(frozen=True)
class Batch:
    """Everything that one step may look at. The weak and the strong views of an unlabeled image share their geometry."""

    x: Tensor  # (B, 3, H, W) labeled images, weak view, normalised
    y: Tensor  # (B, H, W) labels, int64, IGNORE = 255
    weak: Tensor  # (U, 3, H, W) unlabeled images, weak view
    strong: tuple[Tensor, ...]  # `views` times (U, 3, H, W): the same crops under strong colour; none where U = 0
    valid: Tensor  # (U, H, W) bool, False on padding
    label: Tensor  # (U, H, W) pseudo-labels of the stage (see Method.relabel), int64; all IGNORE where there are none


class Method(nn.Module):
    """Networks, teachers and the equation of one paper. State is submodules and buffers, so checkpoints and devices need no code here.

    unlabeled    False: no unlabeled image is loaded (U = 0) before a stage has pseudo-labels for them
    views        how many strong colour views of each unlabeled image it wants
    min_batch    the smallest unlabeled batch it accepts (2 where images need a partner)
    min_side     the smallest side of a crop that it accepts
    stages       where in progress a further stage begins (self-training): before it `relabel` is called, learning rate and optimiser start anew
    forward      (terms, stats): weighted loss terms, which the loop only sums, and scalars that are only logged
    update       called after optimiser step number `step` (the first is 1): teachers
    predictors   what is evaluated, by name; the first is the reported one
    """

    unlabeled = True
    views = 0
    min_batch = 1
    min_side = 1
    stages: tuple[float, ...] = ()

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        raise NotImplementedError

    def update(self, step: int) -> None:
        pass

    @property
    def predictors(self) -> dict[str, nn.Module]:
        raise NotImplementedError

    @property
    def critic(self) -> tuple[nn.Module, float] | None:
        """A network that judges the others (discriminator, flaw detector) and its learning rate: it has an Adam of its own.

        One backward serves both: what trains the critic sees detached predictions, and it is frozen in what trains the networks.
        """
        return None

    def relabel(self, stage: int, images: Sequence[Tensor], prob: Prob, labeled: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Before stage 1, 2, ...: (position, label (H, W) integers, IGNORE = 255) of unlabeled images that the stage trains on.

        images   all of the split, (1, 3, H, W) normalised, loaded when asked for
        prob     prob(net, images): class probabilities (B, C, H, W) of images of any size, by the run's protocol
        labeled  positions with a pseudo-label from the stage before: it stays and is trained on unless a new one is yielded
        Called in eval mode without gradient; networks that shall start anew are drawn anew here, after the last label.
        """
        raise NotImplementedError


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Gradients pass through `net` and do not reach its parameters: a critic while it judges for the networks."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def both(net: nn.Module, x: Tensor, u: Tensor, joint: bool) -> tuple[Tensor, Tensor]:
    """net(x), net(u) in one forward (shared BatchNorm statistics) or in two (separate ones: CPS, MKD)."""
    if not joint:
        return net(x), net(u)
    out = net(torch.cat((x, u)))
    return out[: len(x)], out[len(x) :]


def tta(prob: Prob, net: nn.Module, image: Tensor, scales: Scales) -> Tensor:
    """Class probabilities (B, C, H, W), averaged over scaled images and their mirror images: test-time augmentation of ST++'s labels.

    Under the protocol long512, which scales every image to one size, the scales differ in resampling only.
    """
    total = torch.zeros((), device=image.device)
    for scale in scales:
        scaled = resize(image, torch.Size(max(1, int(side * scale)) for side in image.shape[-2:]))
        straight, mirrored = prob(net, torch.cat((scaled, scaled.flip(-1)))).chunk(2)
        total = total + resize(straight + mirrored.flip(-1), image.shape[-2:])
    return total / (2 * len(scales))
