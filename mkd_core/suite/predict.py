"""A trained run at work on images of any size: masks of one's own pictures, and pseudo-labels as a data set."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from .. import records
from ..augment import normalise
from ..choices import choose
from ..config import RunConfig, read_config
from ..data import DATASETS, IGNORE, DataError, load_split, open_dataset
from ..data.base import colormap, local, read_image, some
from ..evaluate import pick_device, probabilities, starts
from ..models import nearest, resize
from ..progress import Progress
from ..runner import load_method
from .figures import Array, overlay, to_image

LARGE = 2**21  # pixels, those of a Cityscapes image: what is larger is predicted in pieces (our choice)
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Predictor:
    """A trained network of a run, for images of any size: `predictor(image)` -> (label, confidence).

    run        a run folder, or the id of one under runs/
    name       one of the method's predictors, or "mean", their averaged probabilities; default: the first, which the record reports
    step       "best" (of the reported predictor's evaluations), or of a checkpoint-<step>.pt that the run kept; default: the last
    protocol   "whole", "long512" or "sliding" (evaluate.PROTOCOLS) with the run's crop as window; default: the run's own, where "whole"
               becomes "sliding" for images of more than LARGE pixels

    ValueError for a run, predictor, checkpoint, protocol or device that does not exist, or is damaged.
    """

    def __init__(self, run: str | Path, name: str = "", step: int | str | None = None, protocol: str = "", device: str = "auto"):
        self.folder, self.device = _run_folder(run), pick_device(device)
        self.config = read_config(self.folder)
        self.protocol = protocol and choose("protocol", protocol, ("whole", "long512", "sliding"))
        kept = sorted(path.name for path in self.folder.glob("checkpoint-*.pt"))
        self.checkpoint = "checkpoint.pt" if step is None else choose("checkpoint", f"checkpoint-{step}.pt", kept)
        try:
            nets = load_method(self.folder, self.device, self.checkpoint).predictors
        except (RuntimeError, StopIteration) as error:
            raise ValueError(f"{self.folder / self.checkpoint} does not fit config.json beside it: {str(error)[:300]}") from error
        self.name = choose("predictor", name or next(iter(nets)), [*nets, "mean"] if len(nets) > 1 else nets)
        self.nets = list(nets.values()) if self.name == "mean" else [nets[self.name]]
        self.classes, self.palette = _classes(self.config, self.folder)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (3, H, W) uint8 RGB -> label (H, W) uint8, and its probability (H, W) float32, on the host.

        Bounded memory: "sliding" goes in bands of the window's height; of images above LARGE pixels, "long512" sees a copy of LARGE pixels.
        """
        height, width = image.shape[1:]
        large = height * width > LARGE
        protocol = self.protocol or ("sliding" if large and self.config.protocol == "whole" else self.config.protocol)
        if large and protocol == "long512":
            factor = (LARGE / (height * width)) ** 0.5
            small = resize(image[None].float(), (max(1, int(height * factor)), max(1, int(width * factor))))
            label, confidence = self(small[0].round().byte())
            return nearest(label[None], (height, width))[0], resize(confidence[None, None], (height, width))[0, 0]
        parts = self._bands(image) if protocol == "sliding" else [self._probabilities(image, protocol)]
        found = [(label.byte().cpu(), confidence.cpu()) for confidence, label in (part.max(1) for part in parts)]
        return torch.cat([label for label, _ in found], 1)[0], torch.cat([confidence for _, confidence in found], 1)[0]

    def _probabilities(self, image: Tensor, protocol: str) -> Tensor:
        x = normalise(image[None].to(self.device).float() / 255)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return torch.stack([probabilities(net, x, protocol, self.config.crop) for net in self.nets]).mean(0)

    def _bands(self, image: Tensor) -> Iterator[Tensor]:
        """The probabilities of "sliding", finished rows (1, C, rows, W) from top to bottom: a row's mean over the bands that cover it."""
        height, window = image.shape[1], self.config.crop[0]
        tops = starts(height, window)
        total, count = torch.zeros(1, device=self.device), torch.zeros(0, 1, device=self.device)  # of the rows begun
        for top, following in zip(tops, [*tops[1:], height], strict=True):
            band = self._probabilities(image[:, top : top + window], "sliding")
            band[:, :, : len(count)] += total
            count = 1 + nn.functional.pad(count, (0, 0, 0, band.shape[2] - len(count)))
            rows = following - top
            yield band[:, :, :rows] / count[:rows]
            total, count = band[:, :, rows:], count[rows:]


def predict(
    run: str | Path, images: Sequence[str | Path], out: str | Path | None = None, *, predictor: str = "", step: int | str | None = None, protocol: str = "",
    device: str = "auto", overwrite: bool = False, quiet: bool = False,
) -> list[Path]:  # fmt: skip
    """Predict images, given as files or as folders with all below them; returns the masks written. run .. device: see Predictor.

    out: default runs/predictions/<run>. For each image: out/masks/<name>.png (class indices, the data set's colours as palette), out/overlays/<name>.png and
    out/confidence/<name>.png (8 bits, 255 = certain); <name> is its path below the deepest folder that holds all of them. Sizes are those
    of the stored pixels: EXIF orientation is not applied.

    Checked before the first prediction: DataError that names every image that cannot be read; ValueError where files would be overwritten,
    unless that is wanted. A file appears whole or not at all; an error such as a full disk leaves those that were finished.
    """
    model, progress = Predictor(run, predictor, step, protocol, device), Progress("predict", quiet)
    out = _absolute(records.RUNS / "predictions" / model.folder.name if out is None else out)
    files = _named(_find(images, out))
    made = {name: [out / kind / name for kind in ("masks", "confidence", "overlays")] for name in files}
    _check([path for paths in made.values() for path in paths], files.values(), overwrite, progress)
    for k, (name, file) in enumerate(files.items(), 1):
        image = read_image(file)
        label, confidence = model(image)
        strips = zip(image.split(512, 1), label.split(512), strict=True)  # colours are floats: a strip at a time
        painted = [np.rint(255 * overlay(to_image(part), below, model.palette, model.classes)).astype(np.uint8) for part, below in strips]
        _save(made[name][0], label.numpy(), model.palette)
        _save(made[name][1], (255 * confidence).round().byte().numpy())
        _save(made[name][2], np.concatenate(painted))
        progress(f"{k:,} of {len(files):,} images", now=k == len(files))
    return [paths[0] for paths in made.values()]


def pseudo_label(
    run: str | Path, out: str | Path, images: Sequence[str | Path] = (), *, threshold: float = 0.95, predictor: str = "",
    step: int | str | None = None, protocol: str = "", device: str = "auto", overwrite: bool = False, quiet: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Write pseudo-labels of `images`, or of the run's unlabeled ones, as a `folder` data set: open_dataset("folder", out, val="").

    out/masks/<name>.png: class indices, 255 where the confidence is below threshold (0..1); out/classes.txt: the names; out/train.txt,
    written last: "image<tab>mask" lines. Images stay where they are, named relative to out; generated ones are written to out/images.
    Names, checks and errors as in `predict`.

    Returns percentages, a row for each class and one for all: share of the pixels, how many of these are kept, and the accuracy of the
    kept ones where the truth is known (NaN where there is nothing to count).
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1]; got {threshold}")
    out, progress = _absolute(out), Progress("pseudo-label", quiet)
    model = Predictor(run, predictor, step, protocol, device)
    dataset = None if images else open_dataset(model.config.dataset, model.config.root, **model.config.dataset_options)
    generated = dataset is not None and dataset.root is None
    if dataset is None:
        files = _named(_find(images, out))
        ids = [""] * len(files)
    else:
        ids = list(load_split(dataset, model.config.split, model.config.seed).unlabeled)
        files = {f"{id}.png": out / f"images/{id}.png" for id in ids} if generated else _named(str(dataset.files(id)[0]) for id in ids)
    lines = {name: f"{_relative(file, out)}\tmasks/{name}" for name, file in files.items()}
    # A name in bytes that are no text is read with letters that cannot be encoded again.
    writable = {name: line.encode(errors="ignore").decode() == line for name, line in lines.items()}
    if bad := [name for name, line in lines.items() if line.count("\t") > 1 or len(line.splitlines()) > 1 or not writable[name]]:
        raise DataError(
            f"{some(map(ascii, bad), 'images')}: paths with a tab, a line break or bytes that are not UTF-8 cannot stand in a list; rename them"
        )
    made = [out / "train.txt", out / "classes.txt", *(out / "masks" / name for name in files), *(files.values() if generated else [])]
    _check(made, [] if generated else files.values(), overwrite, progress)
    (out / "train.txt").unlink(missing_ok=True)  # where it stands, the masks are complete
    counts = np.zeros((4, len(model.classes)), np.int64)  # pixels by predicted class: all, kept, kept and judged, kept and right
    for k, ((name, file), id) in enumerate(zip(files.items(), ids, strict=True), 1):
        image = dataset.image(id) if dataset and generated else read_image(file)
        label, confidence = model(image)
        truth = dataset.label(id) if dataset and dataset.has_label(id) else torch.full_like(label, IGNORE)
        kept = confidence >= threshold
        for row, where in zip(counts, (label >= 0, kept, kept & (truth != IGNORE), kept & (truth == label)), strict=True):
            row += np.bincount(label[where], minlength=len(row))
        _save(out / "masks" / name, torch.where(kept, label, IGNORE).numpy(), model.palette)
        if generated:
            _save(file, image.permute(1, 2, 0).numpy())
        progress(f"{k:,} of {len(files):,} images", now=k == len(files))
    records.write_atomically(out / "classes.txt", "".join(f"{name}\n" for name in model.classes))
    records.write_atomically(out / "train.txt", "".join(f"{line}\n" for line in lines.values()))
    every, kept, judged, right = np.column_stack((counts, counts.sum(1))).astype(float)
    with np.errstate(invalid="ignore"):
        columns = {"share": every / every[-1], "kept": kept / every, "accuracy": right / judged}
    return 100 * pd.DataFrame(columns, index=pd.Index([*model.classes, "all"], name="class"))


def _run_folder(run: str | Path) -> Path:
    for folder in (local(run), records.RUNS / run):
        if (folder / "config.json").is_file():
            return folder
    known = sorted(path.parent.name for path in records.RUNS.glob("*/config.json"))
    return records.RUNS / choose("run (a folder, or an id under runs/)", str(run), known)


def _classes(config: RunConfig, folder: Path) -> tuple[list[str], Array]:
    """Class names and colours: the data set's own; a person's folder may have gone, so the record's names come before those found there."""
    if config.dataset != "folder":
        made: Any = DATASETS[config.dataset]
        return list(made.classes), made.palette
    record, colours = records.load(folder), config.dataset_options["palette"]
    names = record.classes if record else open_dataset(config.dataset, config.root, **config.dataset_options).classes
    return list(names), colormap(len(names)) if colours is None else np.array(colours, np.uint8)


def _absolute(path: str | Path) -> Path:
    if path == "":
        raise ValueError("an empty path: name a file or a folder")
    return Path(os.path.abspath(local(path)))


def _relative(file: Path, folder: Path) -> str:
    """The way from folder to file, as the system goes it through links; the file itself may be a link."""
    return os.path.join(os.path.relpath(file.parent.resolve(), folder.resolve()), file.name)


def _find(images: Sequence[str | Path], out: Path) -> list[Path]:
    """Files as they are; in folders, every picture at any depth, but nothing hidden and nothing below out."""
    files: list[Path] = []
    for path in map(_absolute, images):
        if path.is_dir():
            below = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and out not in file.parents]
            files += (seen := [file for file in below if "/." not in f"/{file.relative_to(path)}"])
            if not seen:
                raise DataError(f"{path}: no picture ({' '.join(SUFFIXES)}) in this folder or below it")
        else:
            files.append(path)
    if not files:
        raise DataError("no images given: name files or folders")
    return list(dict.fromkeys(files))


def _named(files: Iterable[str | Path]) -> dict[str, Path]:
    """Output name -> file: the path below the deepest folder that holds all of them, ending in .png."""
    paths = [_absolute(file) for file in files]
    top = os.path.commonpath([path.parent for path in paths])
    names: dict[str, Path] = {}
    for path in paths:
        name = str(path.relative_to(top).with_suffix(".png"))
        if name in names:
            raise DataError(f"{names[name]} and {path} would both be written as {name}: give one of them")
        names[name] = path
    return names


def refuse_existing(made: Sequence[Path], overwrite: bool) -> None:
    """ValueError that names the files in the way, unless they may be overwritten."""
    if there := [path for path in made if path.exists() and not overwrite]:
        raise ValueError(f"{some(there, 'files')} exist already: choose another folder, or overwrite them")


def _check(made: Sequence[Path], images: Collection[Path], overwrite: bool, progress: Progress) -> None:
    """Everything that can be wrong before work starts: files in the way, pictures that cannot be read, folders that cannot be made."""
    refuse_existing(made, overwrite)
    if own := {path.resolve() for path in made} & {path.resolve() for path in images}:
        raise ValueError(f"{some(sorted(own), 'images')} would be overwritten by output: choose another folder")
    bad = []
    for k, image in enumerate(images, 1):
        progress(f"checking image {k:,} of {len(images):,}")
        try:
            read_image(image)
        except DataError as error:
            bad.append(str(error))
    if bad:
        raise DataError("\n".join([f"{len(bad)} of {len(images)} images cannot be read, nothing was written:", *bad]))
    for folder in {path.parent for path in made}:
        folder.mkdir(parents=True, exist_ok=True)


def _save(path: Path, array: Array, palette: Array | None = None) -> None:
    """A PNG of (H, W) or (H, W, 3) uint8, whole or not at all; with a palette (C, 3), an indexed one, its other colours VOC's."""
    picture = Image.fromarray(array)
    if palette is not None:
        picture.putpalette(np.concatenate((palette, colormap(256)[len(palette) :])).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    records.write_atomically(path, buffer.getvalue())
