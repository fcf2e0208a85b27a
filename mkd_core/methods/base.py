"""Method: an nn.Module that returns the loss terms of a paper by name. Batch: what it may look at."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Interval, MinLen
from torch import Tensor, nn

from ..choices import choose
from ..losses import cross_entropy, hard_pixels
from ..models import SegNet

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
Labels = Iterator[tuple[int, Tensor]]
Prob = Callable[[nn.Module, Tensor], Tensor]
Build = Callable[[], SegNet]  # a freshly initialised network

# What can be evaluated: its name in records, and where a method keeps it.
NETWORKS = {
    "net": "net", "student": "net", "main": "net", "decoder": "net", "teacher": "teacher", "teachers": "teachers",
    "student 1": "students.0", "student 2": "students.1", "teacher 1": "teachers.0", "teacher 2": "teachers.1",
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """All that one step may look at. Weak and strong views of an unlabeled image share their geometry."""

    x: Tensor  # (B, 3, H, W) labeled images, weak view, normalised
    y: Tensor  # (B, H, W) labels, int64, IGNORE = 255
    weak: Tensor  # (U, 3, H, W) unlabeled images, weak view
    strong: tuple[Tensor, ...]  # `views` times (U, 3, H, W): the same crops under strong colour; empty at 0
    valid: Tensor  # (U, H, W) bool, False on padding
    label: Tensor  # (U, H, W) int64 pseudo-labels of the stage (see relabel), IGNORE where there are none


class Method(nn.Module):
    """Networks, teachers and the equation of one paper. All state is in submodules and buffers."""

    label: str  # its name in tables and figures
    colour: str  # "#rrggbb" in figures
    passes: tuple[int, int]  # encoder passes of a step in labeled batches, with and without gradient
    terms: tuple[str, ...]  # names of the loss terms that forward returns
    unlabeled = True  # False: no unlabeled image is loaded (U = 0) before a stage has pseudo-labels
    views = 0  # strong views of each unlabeled image
    min_batch = 1  # the smallest unlabeled batch: 2 where images need a partner
    min_side = 1  # the smallest side of a crop
    ohem_keep = 0  # pixels per labeled image that the supervised loss keeps at least; 0: all
    evaluated: tuple[str, ...] = ("net",)  # names of NETWORKS; the first one is reported
    stages: tuple[float, ...] = ()  # shares of training at which a further stage begins, see relabel

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        """Weighted loss terms, which the loop only sums; scalar tensors, which it only logs. progress: share done, < 1."""
        raise NotImplementedError

    def update(self, step: int) -> None:
        """Called after optimiser step number `step` (the first is 1): `teacher`, if any, follows `net`."""
        if teacher := getattr(self, "teacher", None):
            teacher.update(self.net, step)

    def supervised(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the supervised loss of the run: cross-entropy, with OHEM over the hard pixels alone."""
        return cross_entropy(logits, self._hard(logits, label))

    def _hard(self, logits: Tensor, label: Tensor) -> Tensor:
        return hard_pixels(logits, label, self.ohem_keep * len(label)) if self.ohem_keep else label

    @property
    def predictors(self) -> dict[str, nn.Module]:
        """The networks of `evaluated` by name."""
        places = {name: NETWORKS[choose("network", name, NETWORKS)] for name in self.evaluated}
        return {name: self.get_submodule(place) for name, place in places.items()}

    @property
    def critic(self) -> tuple[nn.Module, float] | None:
        """A network that judges the others (discriminator, flaw detector), and its own Adam's learning rate.

        One backward serves both: the critic's terms see detached predictions, and it is frozen in the others.
        """
        return None

    def relabel(self, stage: int, images: Sequence[Tensor], prob: Prob, labeled: Collection[int]) -> Labels:
        """Before stage 1, 2, ...: (position, label (H, W) integers or IGNORE) of images that it trains on.

        images   all unlabeled ones of the split, (1, 3, H, W) normalised, loaded when asked for
        prob     prob(net, images): class probabilities (B, C, H, W) of images of any size
        labeled  positions with a pseudo-label from the stage before: it stays unless a new one is yielded
        Called in eval mode without gradient. Optimiser and learning rate start anew; so may networks, here.
        """
        raise NotImplementedError


def both(net: nn.Module, x: Tensor, u: Tensor, joint: bool) -> tuple[Tensor, Tensor]:
    """net(x), net(u) in one forward (shared BatchNorm statistics) or in two (separate ones: CPS, MKD)."""
    if not joint:
        return net(x), net(u)
    out = net(torch.cat((x, u)))
    return out[: len(x)], out[len(x) :]
