"""Networks in, numbers and labels out: protocols, mIoU, pseudo-label quality."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import parallel
from .augment import normalise
from .choices import choose
from .config import RunConfig
from .data import SegDataset
from .data.base import upright
from .metrics import PseudoLabelQuality, confusion_matrix
from .models import nearest, resize

LARGE = 2**21  # pixels, those of a Cityscapes image: what is larger is predicted in pieces (our choice)
QUALITY_THRESHOLD = 0.95  # MKD's T: pseudo-label quality is reported at it and at 0


def whole(net: nn.Module, images: Tensor, window: tuple[int, int]) -> Tensor:
    """The image at its own size, padded below and right to multiples of 32 unless both sides are multiples of 16.

    Our choice for VOC and COCO. `Predictor.label` takes `sliding` for images above LARGE pixels.
    """
    return _padded(net, images).softmax(1)


def long512(net: nn.Module, images: Tensor, window: tuple[int, int]) -> Tensor:
    """Resized so that the long side is 512; the logits are resized back (released MKD)."""
    size = images.shape[-2:]
    small = resize(images, torch.Size(max(1, round(side * 512 / max(size))) for side in size))
    return resize(_padded(net, small), size).softmax(1)


def sliding(net: nn.Module, images: Tensor, window: tuple[int, int]) -> Tensor:
    """Windows at a stride of ceil(2/3 window), the last one shifted back inside (CPS); their probabilities are averaged (our choice)."""
    return torch.cat([*bands(net, images, window)], 2)


PROTOCOLS = {"whole": whole, "long512": long512, "sliding": sliding}


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


def _padded(net: nn.Module, images: Tensor, multiple: int = 32) -> Tensor:
    height, width = images.shape[-2:]
    pad = (0, -width % multiple, 0, -height % multiple) if (height % 16 or width % 16) else (0, 0, 0, 0)
    return net(nn.functional.pad(images, pad))[..., :height, :width].float()


def starts(side: int, window: int) -> list[int]:
    """Where the windows of the sliding protocol begin along a side."""
    stride = math.ceil(window * 2 / 3)
    last = max(0, side - window)
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
        precision, window = config.precision, config.crop
        return cls(
            nets, protocol=protocol or config.protocol, window=window, precision=precision, device=device
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """images (B, 3, H, W) uint8 RGB of any size -> name -> class probabilities (B, C, H, W) float32, on the device."""
        with self._at_work():
            x = self._input(images)
            found = {name: PROTOCOLS[self.protocol](net, x, self.window) for name, net in self.nets.items()}
        if "mean" in self.names:
            found["mean"] = torch.stack([*found.values()]).mean(0)
        return found

    @torch.no_grad()
    def parts(self, images: Tensor) -> Iterator[tuple[slice, str, Tensor]]:
        """The same in pieces (rows, name, (B, C, rows, W)): of images above LARGE pixels few lie in memory at a time."""
        if images.shape[-2:].numel() <= LARGE:
            yield from ((slice(None), name, prob) for name, prob in self(images).items())
            return
        with self._at_work():
            x, total, top = self._input(images), torch.zeros(()), 0
            if self.protocol == "sliding":
                for found in zip(*(bands(net, x, self.window) for net in self.nets.values()), strict=True):
                    rows = slice(top, top + found[0].shape[2])
                    yield from ((rows, name, prob) for name, prob in zip(self.nets, found, strict=True))
                    if "mean" in self.names:
                        yield rows, "mean", torch.stack(found).mean(0)
                    top = rows.stop
                return
            for name, net in self.nets.items():
                prob = PROTOCOLS[self.protocol](net, x, self.window)
                total = total.to(prob) + prob if "mean" in self.names else total
                yield slice(None), name, prob
            if "mean" in self.names:
                yield slice(None), "mean", total / len(self.nets)

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
        nets = [*self.nets.values()] if name == "mean" else [self.nets[name]]
        with self._at_work():
            x = self._input(image[None])
            if protocol == "sliding":
                each = [bands(net, x, self.window) for net in nets]
                parts: Iterable[Sequence[Tensor]] = zip(*each, strict=True)
            else:
                parts = [[PROTOCOLS[protocol](net, x, self.window) for net in nets]]
            found = [torch.stack([*part]).mean(0).max(1) for part in parts]
        labels, confidences = [f.indices[0].byte().cpu() for f in found], [f.values[0].cpu() for f in found]
        return torch.cat(labels), torch.cat(confidences)

    def _input(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.device).float() / 255)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        modes = {net: net.training for net in self.nets.values()}
        for net in modes:
            net.eval()
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
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


class _Items(Dataset):
    """(image, label) by position, for a loader."""

    def __init__(self, dataset: SegDataset, ids: Sequence[str]):
        self.dataset, self.ids = dataset, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.dataset.image(self.ids[i]), self.dataset.label(self.ids[i])


def _equal_sizes(items: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of consecutive images of one size, up to about a quarter of a megapixel: the same whatever the machine."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for image, label in items:
        if images and (image.shape != images[0].shape or len(images) * image[0].numel() >= 2**18):
            yield torch.stack(images), torch.stack(labels)
            images, labels = [], []
        images.append(image)
        labels.append(label)
    if images:
        yield torch.stack(images), torch.stack(labels)


@torch.no_grad()
def evaluate(
    predictor: Predictor,
    dataset: SegDataset,
    ids: Sequence[str],
    *,
    workers: int = 0,
    quality: float | None = None,
) -> tuple[dict[str, Tensor], dict[str, PseudoLabelQuality]]:
    """Confusion matrices (C, C) of each of the predictor's names over the images `ids`.

    quality: a confidence threshold in [0, 1]; with it, the pseudo-label quality of each name too.
    """
    classes, device = len(dataset.classes), predictor.device
    names, qualities = predictor.names, dict[str, PseudoLabelQuality]()
    confusion = {name: torch.zeros(classes, classes, dtype=torch.int64, device=device) for name in names}
    if quality is not None:
        qualities = {name: PseudoLabelQuality(classes, quality, device) for name in names}
    mine = _Items(dataset, ids[parallel.rank() :: parallel.world()])
    for images, labels in _equal_sizes(DataLoader(mine, batch_size=None, num_workers=workers)):
        labels = labels.to(device)
        for rows, name, prob in predictor.parts(images):
            if qualities:
                qualities[name].update(prob, labels[:, rows])
            else:
                confusion[name] += confusion_matrix(prob.max(1).indices, labels[:, rows], classes)
    for of in qualities.values():
        of.all, of.kept = parallel.total(of.all), parallel.total(of.kept)
    confusion = {
        name: qualities[name].all if qualities else parallel.total(c) for name, c in confusion.items()
    }
    return confusion, qualities


def pick_device(name: str, count: int = 1) -> torch.device:
    """Turn "auto" into the first GPU where there is one, else the CPU; ValueError where there are not `count` from it on."""
    allowed = "device must be auto, cpu, cuda or cuda:<number>"
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"{allowed}; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{allowed}; got {name!r}")
    if device.type == "cuda" and (device.index or 0) + count > torch.cuda.device_count():
        wanted = f"{count} devices" if count > 1 else f"device {name}"
        raise ValueError(f"{wanted} asked for, but torch sees {torch.cuda.device_count()} GPUs")
    return device
