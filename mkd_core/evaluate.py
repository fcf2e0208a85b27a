"""Networks in, numbers and labels out: protocols, mIoU, pseudo-label quality."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import parallel
from .augment import normalise
from .choices import choose
from .config import DEVICE, RunConfig
from .data import SegDataset
from .data.base import upright
from .heads import ViT
from .metrics import PseudoLabelQuality, confusion_matrix
from .models import nearest, resize

LARGE = 2**21  # pixels, those of a Cityscapes image: what is larger is predicted in pieces (our choice)
QUALITY_THRESHOLD = 0.95  # MKD's T: pseudo-label quality is reported at it and at 0


def whole(net: nn.Module, images: Tensor, window: tuple[int, int]) -> Tensor:
    """The image at its own size; if a side is no multiple of 16, padded below and right to multiples of 32.

    Our choice for VOC and COCO. A vision transformer resizes instead (`ViT`). `Predictor.label` takes `sliding` for images above LARGE pixels.
    """
    return _padded(net, images).softmax(1)


def long512(net: nn.Module, images: Tensor, window: tuple[int, int]) -> Tensor:
    """Resized to a long side of 512, padded as `whole`; logits are resized back (released MKD, unpadded)."""
    size = images.shape[-2:]
    small = resize(images, torch.Size(max(1, round(side * 512 / max(size))) for side in size))
    return resize(_padded(net, small), size).softmax(1)


def sliding(net: nn.Module, images: Tensor, window: tuple[int, int]) -> Tensor:
    """Windows at a stride of ceil(2/3 window), the last one shifted back inside (CPS); their probabilities are averaged (our choice)."""
    return torch.cat([*bands(net, images, window)], 2)


PROTOCOLS = {"whole": whole, "long512": long512, "sliding": sliding}  # RunConfig.protocol lists them too


def bands(net: nn.Module, images: Tensor, window: tuple[int, int]) -> Iterator[Tensor]:
    """`sliding`, from top to bottom, a few rows (B, C, rows, W) at a time: memory does not grow with the height of an image."""
    height, width = images.shape[-2:]
    tops, lefts = starts(height, window[0]), starts(width, window[1])
    count = images.new_zeros(width)  # windows over a column
    for left in lefts:
        count[left : left + window[1]] += 1
    open_rows: Tensor | None = None  # sums of the rows that the next windows reach too
    times = images.new_zeros(0)
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        band = images[:, :, top : top + window[0]]
        total: Tensor | None = None
        for left in lefts:
            prob = _padded(net, band[..., left : left + window[1]]).softmax(1)
            total = prob.new_zeros(*prob.shape[:3], width) if total is None else total
            total[..., left : left + window[1]] += prob
        assert total is not None
        total /= count
        if open_rows is not None:
            total[:, :, : open_rows.shape[2]] += open_rows
        times = 1 + nn.functional.pad(times, (0, total.shape[2] - len(times)))
        rows = following - top
        yield total[:, :, :rows] / times[:rows, None]
        open_rows, times = total[:, :, rows:], times[rows:]


def _padded(net: nn.Module, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    fits = height % 16 == width % 16 == 0 or any(isinstance(part, ViT) for part in net.modules())
    pad = (0, 0, 0, 0) if fits else (0, -width % 32, 0, -height % 32)
    return net(nn.functional.pad(images, pad))[..., :height, :width].float()


def starts(side: int, window: int) -> list[int]:
    """Where the windows of the sliding protocol begin along a side."""
    stride, last = math.ceil(window * 2 / 3), max(0, side - window)
    return sorted({min(s, last) for s in range(0, last + stride, stride)})


class Predictor:
    """Networks at work: every score, picture, pseudo-label and explorer view is made through one of these.

    nets       by name; "mean", their averaged probabilities, joins where there are several
    protocol   a name of PROTOCOLS; window: (height, width) of "sliding"; precision: "float32" or "bfloat16" (autocast)

    Networks predict in eval mode and are put back into the mode that they were in.

    >>> Predictor(method.predictors, protocol="whole")(images)["student 1"]     # (B, 3, H, W) uint8 -> (B, C, H, W)
    """

    def __init__(
        self, nets: Mapping[str, nn.Module], *, protocol: str = "whole", window: tuple[int, int] = (512, 512),
        precision: str = "float32", device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.nets, self.protocol, self.window = dict(nets), choose("protocol", protocol, PROTOCOLS), window
        self.precision, self.device = precision, torch.device(device)
        self.names = [*self.nets, "mean"] if len(self.nets) > 1 else [*self.nets]

    @classmethod
    def of(
        cls, config: RunConfig, nets: Mapping[str, nn.Module], device: torch.device, protocol: str = ""
    ) -> Predictor:
        """Take protocol (unless another is named), window and precision from a run's configuration."""
        how: Any = {"window": config.crop, "precision": config.precision, "device": device}
        return cls(nets, protocol=protocol or config.protocol, **how)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """images (B, 3, H, W) uint8 RGB of any size -> name -> class probabilities (B, C, H, W) float32, on the device."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for _, name, prob in self.parts(images):
            found[name].append(prob)
        return {name: torch.cat(of, 2) if of[1:] else of[0] for name, of in found.items()}

    @torch.no_grad()
    def parts(self, images: Tensor) -> Iterator[tuple[slice, str, Tensor]]:
        """The same in pieces (rows, name, (B, C, rows, W)), each made when asked for: few lie in memory at a time."""
        with self.at_work():
            x, top = self.input(images), 0
            first, *others = (self._pieces(net, x) for net in self.nets.values())
            for total in first:
                rows = slice(top, top + total.shape[2])
                yield rows, self.names[0], total
                for name, pieces in zip(self.names[1:], others, strict=False):
                    prob = next(pieces)
                    yield rows, name, prob
                    total = total + prob
                if others:
                    yield rows, "mean", total / len(self.nets)
                top = rows.stop

    def _pieces(self, net: nn.Module, x: Tensor) -> Iterator[Tensor]:
        if self.protocol == "sliding":
            yield from bands(net, x, self.window)
        else:
            yield self.prob(net, x)

    def prob(self, net: nn.Module, x: Tensor) -> Tensor:
        """One network's probabilities (B, C, H, W) of normalised images (B, 3, H, W), by the protocol."""
        return PROTOCOLS[self.protocol](net, x, self.window)

    @torch.no_grad()
    def label(self, image: Tensor | np.ndarray | Image.Image, name: str = "") -> tuple[Tensor, Tensor]:
        """Label one image: label (H, W) uint8 and its probability (H, W) float32, on the host.

        image: a tensor (3, H, W), an array (H, W, 3) or a PIL picture; uint8 RGB of any size.
        name: one of `names`; default: the first.

        Memory is bounded: "sliding" goes in bands, so that only labels and confidences grow with the
        image; of images above LARGE pixels, "long512" sees a copy of LARGE pixels.
        """
        image, name = as_tensor(image), choose("predictor", name or self.names[0], self.names)
        size, protocol = image.shape[1:], self.protocol
        if protocol == "whole" and math.prod(size) > LARGE:  # pictures only: scores keep their protocol
            protocol = "sliding"
        if protocol == "long512" and (factor := (LARGE / math.prod(size)) ** 0.5) < 1:
            small = resize(image[None].float(), torch.Size(max(1, int(side * factor)) for side in size))
            label, confidence = self.label(small[0].round().byte(), name)
            return nearest(label[None], size)[0], resize(confidence[None, None], size)[0, 0]
        nets = self.nets if name == "mean" else {name: self.nets[name]}
        how: Any = {"window": self.window, "precision": self.precision, "device": self.device}
        parts = Predictor(nets, protocol=protocol, **how).parts(image[None])
        found = [prob[0].max(0) for _, of, prob in parts if of == name]
        return torch.cat([f.indices.byte().cpu() for f in found]), torch.cat([f.values.cpu() for f in found])

    def input(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 RGB on the device, normalised."""
        return normalise(images.to(self.device).float() / 255)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Networks in eval mode, and in the precision, until the block ends."""
        modes = {net: net.training for net in self.nets.values()}
        for net in modes:
            net.eval()
        try:
            with autocast(self.precision, self.device, cache=True):
                yield
        finally:
            for net, mode in modes.items():
                net.train(mode)


def as_tensor(image: Tensor | np.ndarray | Image.Image) -> Tensor:
    """A picture as (3, H, W) uint8 RGB: tensors of that shape, arrays (H, W, 3), or PIL's, turned upright by EXIF."""
    if isinstance(image, Image.Image):
        image = upright(image)
    if not isinstance(image, Tensor):
        image = torch.tensor(np.ascontiguousarray(image)).movedim(-1, 0)
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        found = f"{image.dtype}, {tuple(image.shape)}"
        raise ValueError(f"an image is uint8 RGB, a tensor (3, H, W) or an array (H, W, 3); got {found}")
    return image


class Each(Dataset[Any], Sequence[Any]):
    """What a function makes of each id, by position, when it is asked for."""

    def __init__(self, function: Callable[[str], Any], ids: Sequence[str]):
        self.function, self.ids = function, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: Any) -> Any:
        return self.function(self.ids[i])


def _pair(dataset: SegDataset, id: str) -> tuple[Tensor, Tensor]:
    return dataset.image(id), dataset.label(id)


def _equal_sizes(items: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of consecutive images of one size, up to about 2^18 numbers: the same whatever the machine."""
    for size, equal in groupby(items, lambda item: item[0].shape):
        while batch := [*islice(equal, math.ceil(2**18 / size.numel()))]:
            images, labels = zip(*batch, strict=True)
            yield torch.stack(images), torch.stack(labels)


@torch.no_grad()
def evaluate(
    predictor: Predictor, dataset: SegDataset, ids: Sequence[str], *, workers: int = 0, quality: float | None = None
) -> tuple[dict[str, Tensor], dict[str, PseudoLabelQuality]]:  # fmt: skip
    """Confusion matrices (C, C) of each of the predictor's names over the images `ids`.

    quality: a confidence threshold in [0, 1]; with it, the pseudo-label quality of each name too.
    """
    classes, device, names = len(dataset.classes), predictor.device, predictor.names
    confusion = {name: torch.zeros(classes, classes, dtype=torch.int64, device=device) for name in names}
    asked = names if quality is not None else ()
    qualities = {name: PseudoLabelQuality(classes, quality or 0.0, device) for name in asked}
    mine = Each(partial(_pair, dataset), ids[parallel.rank() :: parallel.world()])
    for images, labels in _equal_sizes(DataLoader(mine, batch_size=None, num_workers=workers)):
        labels = labels.to(device)
        for rows, name, prob in predictor.parts(images):
            if qualities:
                qualities[name].update(prob, labels[:, rows])
            else:
                confusion[name] += confusion_matrix(prob.max(1).indices, labels[:, rows], classes)
    for of in qualities.values():
        of.all, of.kept = parallel.total(of.all), parallel.total(of.kept)
    if qualities:
        return {name: of.all for name, of in qualities.items()}, qualities
    return {name: parallel.total(counts) for name, counts in confusion.items()}, {}


def autocast(precision: str, device: torch.device, cache: bool = False) -> torch.autocast:
    """Compute in bfloat16 where the precision is that; cache: weights that stay as they are are cast once."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=cache)


def pick_device(name: str, count: int = 1) -> torch.device:
    """Turn "auto" into the first GPU where there is one, else the CPU; ValueError where there are not `count` from it on."""
    if not re.match(DEVICE, name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>; got {name!r}")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) + count > torch.cuda.device_count():
        wanted = f"{count} devices" if count > 1 else f"device {name}"
        raise ValueError(f"{wanted} asked for, but torch sees {torch.cuda.device_count()} GPUs")
    return device
