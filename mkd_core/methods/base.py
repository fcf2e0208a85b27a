"""What a method is: an nn.Module that returns the paper's loss terms by name; and what it may look at: a Batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from ..models import SegNet

# Types of options: a value of another type or outside its range is refused when a run is configured.
Weight = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Count = Annotated[int, Ge(0)]
TeacherMode = Literal["train", "eval"]
EMABuffers = Literal["none", "all"]

Terms = dict[str, Tensor]
Build = Callable[..., SegNet]  # build() or build(arch="pspnet"): a freshly initialised network


@dataclass(frozen=True)
class Batch:
    """Everything that one step may look at. The weak and the strong views of an unlabeled image share their geometry."""

    x: Tensor  # (B, 3, H, W) labeled images, weak view, normalised
    y: Tensor  # (B, H, W) labels, int64, IGNORE = 255
    weak: Tensor  # (U, 3, H, W) unlabeled images, weak view
    strong: tuple[Tensor, ...]  # `views` times (U, 3, H, W): the same crops under strong colour
    valid: Tensor  # (U, H, W) bool, False on padding


class Method(nn.Module):
    """Networks, teachers and the equation of one paper. State is submodules and buffers, so checkpoints and devices need no code here.

    views        how many strong colour views of each unlabeled image it wants
    min_batch    the smallest unlabeled batch it accepts (2 where CutMix needs a partner)
    forward      (terms, stats): weighted loss terms, which the loop only sums, and scalars that are only logged
    update       called after optimiser step number `step` (the first is 1): teachers
    predictors   what is evaluated, by name; the first is the reported one
    """

    views = 0
    min_batch = 1

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        raise NotImplementedError

    def update(self, step: int) -> None:
        pass

    @property
    def predictors(self) -> dict[str, nn.Module]:
        raise NotImplementedError


def both(net: nn.Module, x: Tensor, u: Tensor, joint: bool) -> tuple[Tensor, Tensor]:
    """net(x), net(u) in one forward (shared BatchNorm statistics) or in two (separate ones: CPS, MKD)."""
    if not joint:
        return net(x), net(u)
    out = net(torch.cat((x, u)))
    return out[: len(x)], out[len(x) :]
