"""A trained run at work on images of any size: masks of one's own pictures, and pseudo-labels as a data set."""

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .. import records
from ..choices import choose
from ..config import RunConfig
from ..data import IGNORE, DataError
from ..data.base import colormap, read_image, some, visible
from ..data.pictures import absolute, find_pictures
from ..evaluate import LARGE, Predictor
from ..prepare import open_data
from ..progress import Progress
from ..trained import OpenRun, open_run
from .figures import overlay, to_image

Pixels = NDArray[np.uint8]


class Item(NamedTuple):
    """An image to work on: its file (where a generated one is written), its pixels, its mask if there is one."""

    file: Path
    image: Callable[[], Tensor]
    truth: Callable[[], Tensor] | None = None
    generated: bool = False


Items = Mapping[str, Item]  # by the name of what is written of it
Labeled = tuple[str, Tensor, Pixels, NDArray[np.float32]]  # name, image (3, H, W), label, confidence (H, W)


def predict(
    run: str | Path, images: Sequence[str | Path], out: str | Path, *, predictor: str = "", step: int | str | None = None,
    protocol: str = "", device: str = "auto", overwrite: bool = False, quiet: bool = False,
) -> list[Path]:  # fmt: skip
    """Predict images, given as files or as folders with all below them; return the masks written.

    out        for each image: out/masks/<name>.png (class indices, the data set's colours as palette),
               out/overlays/<name>.png and out/confidence/<name>.png (8 bits, 255 = certain). <name> is
               the image's path below the deepest folder that holds all of them. All lie as the photo is
               seen: EXIF orientation is applied.
    predictor  one of the method's predictors, or "mean"; default: the first, which the record reports
    step       "best", or of a checkpoint-<step>.pt that the run kept; default: the last
    protocol   a name of evaluate.PROTOCOLS; default: the run's own

    Links in folders are followed; what is left out there is printed with the reason.
    Everything is checked before the first prediction. DataError names every image that cannot be read;
    ValueError every file in the way, unless it may be overwritten. Files appear whole or not at all.
    """
    opened, model, net = open_predictor(run, predictor, step, protocol, device)
    out, progress = absolute(out), Progress("predict", quiet)
    items, colours = _named(_found(images, out, quiet)), visible(opened.palette, opened.classes)
    made = [out / kind / name for kind in ("masks", "confidence", "overlays") for name in items]
    _check(made, [*items.values()], overwrite, progress)
    for name, image, label, confidence in _labels(model, net, items, progress):
        save_png(indexed(label, opened.palette), out / "masks" / name)
        seen = overlay(to_image(image), label, colours, opened.classes)
        for kind, values in (("confidence", confidence), ("overlays", seen)):
            save_png(Image.fromarray((255 * values).round().astype(np.uint8)), out / kind / name)
    return made[: len(items)]


def pseudo_label(
    run: str | Path, out: str | Path, images: Sequence[str | Path] = (), *, threshold: float = 0.95,
    with_labeled: bool = False, val: bool = False, predictor: str = "", step: int | str | None = None,
    protocol: str = "", device: str = "auto", overwrite: bool = False, quiet: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Write pseudo-labels of `images`, or of the run's unlabeled ones, as a data set of kind `folder`.

    out/masks/    class indices, 255 where the confidence is below threshold (0..1)
    classes.txt   the names of the classes
    train.txt     "image<tab>mask" lines, written last. Images stay where they are and are named
                  relative to out; generated ones are written to out/images
    train.yaml    parameters of a run of SupOnly on train.txt, otherwise configured as this run
    with_labeled  the run's labeled images join train.txt with their true masks. The split "labeled",
                  out/labeled/{labeled,unlabeled}.txt, tells them from the pseudo-labeled ones
    val           val.txt lists the run's evaluated images with their masks

    Names, checks, errors and the other arguments are those of `predict`. The table, warnings and the
    next command are printed unless quiet.

    Returns percentages, a row for each class and one for all: share of the pixels, how many of these are
    kept, and the accuracy of the kept ones where the truth is known (NaN where nothing is counted).
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1]; got {threshold}")
    opened, model, net = open_predictor(run, predictor, step, protocol, device)
    out, progress = absolute(out), Progress("pseudo-label", quiet)
    parts = _parts(opened, images, out, with_labeled, val, quiet)
    items = _named([item for part in parts for item in part])
    new, texts = dict(zip(items, parts[0], strict=False)), _texts(opened, out, items, parts)
    pictures = [item.file for item in items.values() if item.generated]
    made = [*texts, *(out / "masks" / name for name in items), *pictures]
    _check(made, [item for item in items.values() if not item.generated], overwrite, progress)
    (out / "train.txt").unlink(missing_ok=True)  # only where the data set is complete
    for name, item in items.items():
        if item.generated:
            save_png(Image.fromarray(item.image().permute(1, 2, 0).numpy()), item.file)
        if name not in new and item.truth:
            save_png(indexed(item.truth().numpy(), opened.palette), out / "masks" / name)
    counts = np.zeros((4, len(opened.classes)), np.int64)
    for name, _, label, confidence in _labels(model, net, new, progress):
        read, kept = items[name].truth, confidence >= threshold
        counts += count(label, kept, read().numpy() if read else None, len(opened.classes))
        save_png(indexed(np.where(kept, label, np.uint8(IGNORE)), opened.palette), out / "masks" / name)
    for path, text in texts.items():
        records.write_atomically(path, text)
    index = pd.Index([*opened.classes, "all"], name="class")
    table = pd.DataFrame(shares(counts).T, index, ["share", "kept", "accuracy"])
    if not quiet:
        _report(table, threshold, out, with_labeled)
    return table


def open_predictor(
    run: str | Path, predictor: str, step: int | str | None, protocol: str, device: str
) -> tuple[OpenRun, Predictor, str]:
    """Open a run, its Predictor and the name of the network that is asked for; ValueError for what there is not."""
    opened = open_run(run, step, device)
    model = opened.predictor(protocol)
    return opened, model, choose("predictor", predictor or model.names[0], model.names)


def _labels(model: Predictor, net: str, items: Items, progress: Progress) -> Iterator[Labeled]:
    """Label the items one after the other."""
    told = model.protocol != "whole"
    for k, (name, item) in enumerate(items.items(), 1):
        image = item.image()
        if not told and image.shape[1:].numel() > LARGE:
            print(f"images above {LARGE:,} pixels are predicted in windows of {model.window} (sliding)")
            told = True
        label, confidence = model.label(image, net)
        yield name, image, label.numpy(), confidence.numpy()
        progress(f"{k:,} of {len(items):,} images", now=k == len(items))


def _found(images: Sequence[str | Path], out: Path, quiet: bool) -> list[Item]:
    pictures, left_out = find_pictures(images, out)
    for line in left_out if not quiet else ():
        print(line)
    return [Item(file, partial(read_image, file)) for file in pictures]


def _parts(
    opened: OpenRun, images: Sequence[str | Path], out: Path, with_labeled: bool, val: bool, quiet: bool
) -> tuple[list[Item], list[Item], list[Item]]:
    """The images to label, the labeled and the evaluated ones of the new data set; none is in two of them."""
    if images and not (with_labeled or val):  # the run's own images may have gone
        return _found(images, out, quiet), [], []
    dataset, split = open_data(opened.config)

    def item(id: str) -> Item:
        file, truth = dataset.files(id)[0], partial(dataset.label, id) if dataset.has_label(id) else None
        place = absolute(file) if file else out / f"images/{id}.png"
        return Item(place, partial(dataset.image, id), truth, generated=file is None)

    labeled = [item(id) for id in split.labeled if with_labeled]
    evaluated = [item(id) for id in dataset.val if val]
    known = {item.file.resolve() for item in labeled + evaluated}
    found = _found(images, out, quiet) if images else [item(id) for id in split.unlabeled]
    new = [item for item in found if item.file.resolve() not in known]
    if not new:
        raise DataError(f"there is no image to label: split {split.name} has no unlabeled one beside them")
    return new, labeled, evaluated


def relative(file: Path, folder: Path) -> str:
    """The name of a file from a folder, the way that the system goes through links; the file itself may be one."""
    if odd := [c for c in str(file) if c == "\t" or c.splitlines() != [c] or "\ud800" <= c <= "\udfff"]:
        parted = f"lists are UTF-8 and part names by tabs and lines, this one holds {odd[0]!r}"
        raise ValueError(f"{str(file)!r}: {parted}: rename it")
    return os.path.join(os.path.relpath(file.parent.resolve(), folder.resolve()), file.name)


def _texts(opened: OpenRun, out: Path, items: Items, parts: Sequence[list[Item]]) -> dict[Path, str]:
    """The texts of a data set of pseudo-labels by their paths; train.txt comes last."""
    lines = {}
    for name, item in items.items():
        lines[item.file] = f"{relative(item.file, out)}\tmasks/{name}\n"
    new, labeled, evaluated = ("".join(lines[item.file] for item in part) for part in parts)
    keys = opened.config.model_dump() | {"dataset": "folder", "root": str(out), "split": "full"}
    keys |= {"dataset_options": {"palette": opened.palette.tolist()}, "method": "supervised", "options": {}}
    keys |= {"arch2": "", "encoder2": "", "weights2": ""}
    texts = {"classes.txt": "".join(f"{name}\n" for name in opened.classes)}
    texts |= {"train.yaml": yaml.safe_dump(RunConfig(**keys).model_dump(mode="json"), sort_keys=False)}
    texts |= {"val.txt": evaluated} if evaluated else {}
    texts |= {"labeled/labeled.txt": labeled, "labeled/unlabeled.txt": new} if labeled else {}
    return {out / name: text for name, text in (texts | {"train.txt": labeled + new}).items()}


def count(label: Pixels, kept: NDArray[np.bool_], truth: Pixels | None, classes: int) -> NDArray[np.int64]:
    """Count the pixels of each label, (4, C): all, kept, kept whose truth is known, right ones of these."""
    known = np.zeros_like(kept) if truth is None else kept & (truth != IGNORE)
    cases = (np.ones_like(kept), kept, known, known & (label == truth))
    return np.stack([np.bincount(label[case], minlength=classes) for case in cases])


def shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Make percent of `count`, (3, C + 1), last over all: of the pixels, kept of these, right of the kept."""
    every, kept, known, right = np.column_stack((counts, counts.sum(1))).astype(float)
    with np.errstate(invalid="ignore"):  # NaN where nothing is counted
        return 100 * np.stack((every / every[-1], kept / every, right / known))


def _report(table: pd.DataFrame, threshold: float, out: Path, with_labeled: bool) -> None:
    """Print what was kept, what is suspicious about it, and the next command."""
    print(f"In percent: share of the pixels, kept of these (confidence >= {threshold}), accuracy of the kept")
    print(table.to_string(float_format="{:.1f}".format, na_rep="-"))
    if table["kept"].iloc[-1] < 1:
        print("WARNING: under 1 % of the pixels are kept; lower the threshold or train longer")
    if gone := list(table.index[:-1][table["kept"][:-1].fillna(0) == 0]):
        lost = "" if with_labeled else ": trained on these alone, a network forgets it (--with-labeled)"
        print(f"WARNING: no pixel is pseudo-labeled as {', '.join(gone)}{lost}")
    command = ["mkd", "run", str(records.ROOT / "notebooks/10_run.ipynb"), "-f", str(out / "train.yaml")]
    lacks = "" if (out / "val.txt").exists() else ", once there is a val.txt (--val writes the run's own)"
    print(f"Data set: {out}\nNext{lacks}: {shlex.join(command)}")


def _named(items: Sequence[Item]) -> dict[str, Item]:
    """Output name -> item: the path below the deepest folder that holds all of them, ending in .png."""
    top = os.path.commonpath([item.file.parent for item in items])
    names: dict[str, Item] = {}
    for item in items:
        name = str(item.file.relative_to(top).with_suffix(".png"))
        if name in names:
            raise DataError(f"{names[name].file} and {item.file} would both be written as {name}: give one")
        names[name] = item
    return names


def refuse_existing(made: Sequence[Path], overwrite: bool) -> None:
    """ValueError that names the files in the way, unless they may be overwritten."""
    if there := [path for path in made if path.exists() and not overwrite]:
        raise ValueError(f"{some(there, 'files')} exist already: choose another folder, or overwrite them")


def _check(made: Sequence[Path], items: Sequence[Item], overwrite: bool, progress: Progress) -> None:
    """Find everything that can be wrong before work starts, then make the folders of `made`."""
    refuse_existing(made, overwrite)
    if own := {path.resolve() for path in made} & {item.file.resolve() for item in items}:
        raise ValueError(f"{some(sorted(own), 'images')} would be overwritten: choose another folder")
    bad = []
    for k, item in enumerate(items, 1):
        progress(f"checking image {k:,} of {len(items):,}")
        try:
            size = item.image().shape[1:]
            if item.truth and (found := item.truth().shape) != size:
                bad.append(f"{item.file}: an image of {tuple(size)} pixels, its mask has {tuple(found)}")
        except DataError as error:
            bad.append(str(error))
    if bad:
        what = f"{len(bad)} of {len(items)} images or their masks cannot be read:"
        raise DataError("\n".join([what, *bad]))
    for folder in {path.parent for path in made}:
        folder.mkdir(parents=True, exist_ok=True)


def indexed(mask: Pixels, palette: Pixels) -> Image.Image:
    """Make a palette picture of class indices (H, W) in colours (C, 3), the other ones VOC's."""
    picture = Image.fromarray(mask)
    picture.putpalette(np.concatenate((palette, colormap(256)[len(palette) :])).tobytes())
    return picture


def save_png(picture: Image.Image, path: Path) -> None:
    records.write_atomically(path, partial(picture.save, format="PNG"))
