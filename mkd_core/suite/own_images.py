"""A person's own photos and masks made a data set: lists, masks of class indices, a sheet to look at."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .. import records
from ..config import PARAMETERS, RunConfig
from ..data import DataError, SegDataset, check, load_split, open_dataset
from ..data.base import colormap, local, mask_size, picture_size, refuse_faulty
from ..data.folder import read_classes
from ..data.layouts import CLASS_FILES, DONE, TABLE_FILES, Pair, draw_parts, find_pairs
from ..data.masks import Meaning, each, read_table, understand
from ..data.outlines import understand_drawings
from ..data.pictures import absolute
from ..parameters import read_parameters
from . import figures
from .predict import relative, save_png

RECIPE = PARAMETERS / "recipes/own_images.yaml"
Classes = Sequence[str] | int | None
TEXT = {name for name, field in RunConfig.model_fields.items() if isinstance(field.default, str)}


def prepare_folder(
    folder: str | Path, out: str | Path | None = None, *, classes: Classes = None,
    colours: str | Path = "", images: str = "", masks: str = "", val: float = 0.2, test: float = 0.0, labeled: str = "",
    group_by: str = "", seed: int = 0, overwrite: bool = False, quiet: bool = False, **keys: Any,
) -> RunConfig:  # fmt: skip
    """Make a data set of kind `folder` from photos and masks, or outlines in JSON, as they lie; return the configuration of a run on it.

    out       default <folder>/mkd: train.txt, val.txt, test.txt where asked for, the split "labeled", classes.txt, a
              sheet.png to look at, mkd.yaml (parameters of a run), and masks/ where masks had to be converted. Nothing
              outside it is touched
    classes   names in the order of the numbers (or sorted colours) in the masks, or their count; default: a list of
              names in the folder
    colours   file of a colour table, lines "r g b name"; default: one in the folder
    images, masks  folders below, where their names tell nothing
    val, test shares of the photos with masks, drawn from `seed`; folders called val and test come first
    labeled   "1/4", "40" or "all" of the other photos with masks; default all, or 1/4 where no photo lacks a mask
    group_by  regular expression of a name, or a number of characters from its start: photos alike in it stay together
    keys      of RunConfig, over recipes/own_images.yaml

    DataError, ValueError for what cannot be understood or read. What is left out is printed, and so is the check of the data.
    """
    root = absolute(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder")
    out = absolute(out or root / "mkd")
    if (out / DONE).exists() and not overwrite:
        raise ValueError(f"{out} is prepared already; --overwrite prepares it anew, --out elsewhere")
    say = (lambda *lines: None) if quiet else (lambda *lines: print(*lines, sep="\n") if lines else None)
    pairs, left_out = find_pairs(root, out, images, masks)
    say(*left_out)
    refuse_faulty([*filter(None, each(_fault, pairs))])
    meaning = _understand(root, pairs, classes, colours)
    done = "read as they lie" if meaning.as_is else f"converted to {out}/masks"
    say(f"Masks: {'; '.join([*meaning.notes, done])}")
    parts, apart = draw_parts(pairs, val, test, group_by, seed)
    say(*apart)
    values = _write(out, parts, meaning) | {"seed": seed}
    dataset = open_dataset("folder", str(out), **values["dataset_options"])
    _draw(out, dataset, labeled, seed)
    values = read_parameters(RECIPE, TEXT) | values | keys
    config, split = RunConfig(**values), load_split(dataset, "labeled")
    figures.save(_sheet(dataset, split.labeled), out / "sheet.png")
    found = check(dataset, split)
    say("", found, "", f"Look at {out / 'sheet.png'}: do the masks fit?")
    found.raise_if_bad()
    records.write_atomically(out / DONE, yaml.safe_dump(values, sort_keys=False))
    say(f"Next: {shlex.join(['mkd', 'train', str(folder)] + ['--out', str(out)] * (out != root / 'mkd'))}")
    return config


def _found(root: Path, names: str) -> Path | None:
    return next((root / name for name in names.split() if (root / name).is_file()), None)


def _understand(root: Path, pairs: list[Pair], classes: Classes, colours: str | Path) -> Meaning:
    """Judge the masks, by the class names and the colour table that are given or found in the folder."""
    table = local(colours) if colours else _found(root, TABLE_FILES)
    listed = _found(root, CLASS_FILES) if classes is None else None
    classes = read_classes(listed) if listed else classes
    if drawings := {pair.mask: pair.drawing for pair in pairs if pair.mask and pair.drawing}:
        meaning, table = understand_drawings(drawings, classes), None
    else:
        meaning = understand([p.mask for p in pairs if p.mask], classes, read_table(table) if table else {})
    found = [f"classes of {listed}"] * bool(listed and not table) + [f"colours of {table}"] * bool(table)
    return replace(meaning, notes=found + meaning.notes)


def _fault(pair: Pair) -> str:
    """Say why a photo and its mask cannot be used, "" where they can."""
    try:
        found = picture_size(pair.image)
        size = pair.drawing.size if pair.drawing else mask_size(pair.mask) if pair.mask else found
    except DataError as error:
        return str(error)
    what = f"{pair.mask}: a mask of {size} pixels, its photo {pair.image.name} (upright) has {found}"
    return what if size != found else ""


def _write(out: Path, parts: dict[str, list[Pair]], meaning: Meaning) -> dict[str, Any]:
    """Write masks, class names and lists; return the parameters of a run that belong to these data."""
    out.mkdir(parents=True, exist_ok=True)
    (out / DONE).unlink(missing_ok=True)
    count, first = len(meaning.classes), meaning.classes[0] != "background"  # VOC's first colour is black
    palette = np.array(meaning.palette or colormap(count + first)[first:], np.uint8)
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for part, pairs in parts.items():
        for pair in pairs:
            mask = pair.mask
            if mask and not meaning.as_is:
                written = out / "masks" / f"{pair.name}.png"
                written.parent.mkdir(parents=True, exist_ok=True)
                save_png(written, meaning.read(mask), palette)
                mask = written
            files = [relative(file, out) for file in (pair.image, mask) if file]
            lines[part or "train"].append("\t".join(files))
    for part, text in lines.items():
        if not text:
            (out / f"{part}.txt").unlink(missing_ok=True)  # of an earlier draw
        else:
            records.write_atomically(out / f"{part}.txt", "".join(f"{line}\n" for line in text))
    records.write_atomically(out / "classes.txt", "".join(f"{name}\n" for name in meaning.classes))
    shapes = np.array([picture_size(pair.image) for pairs in parts.values() for pair in pairs])
    height, width = np.median(shapes, 0)
    large = max(height, width) > 768  # native crops would show too little of it
    factor = 512 / max(height, width) if large else 1
    crop = [int(min(320, max(32, side * factor // 16 * 16))) for side in (height, width)]
    values: dict[str, Any] = {"dataset": "folder", "root": str(out), "split": "labeled", "crop": crop}
    values |= {"base": 512 if large else 0, "protocol": "long512" if large else "whole"}
    return values | {"dataset_options": {"palette": palette.tolist()}}


def _draw(out: Path, dataset: SegDataset, labeled: str, seed: int) -> None:
    """Write the split "labeled"."""
    masked = [id for id in dataset.train if dataset.has_label(id)]
    whole = len(masked) < len(dataset.train) or labeled == "all"
    fraction = re.fullmatch(r"(1/)?([1-9]\d*)", labeled)
    if not fraction and labeled not in ("", "all"):
        raise ValueError(f"labeled is 1/4, 40 or all; got {labeled!r}")
    counts = [len(masked)] if whole else [-(-len(masked) // part) for part in (4, 2, 1)]
    if fraction:
        counts = [-(-len(masked) // int(fraction[2])) if fraction[1] else int(fraction[2])]
    for count in counts:
        try:
            chosen = masked if count == len(masked) else load_split(dataset, f"random/{count}", seed).labeled
            break
        except DataError:  # too few for every class
            if count == counts[-1]:
                raise
    rest = sorted(set(dataset.train) - set(chosen)) or list(dataset.train)
    (out / "labeled").mkdir(exist_ok=True)
    for name, ids in (("labeled", chosen), ("unlabeled", rest)):
        records.write_atomically(out / f"labeled/{name}.txt", "".join(f"{id}\n" for id in ids))


def _sheet(dataset: SegDataset, ids: Sequence[str]) -> figures.Picture:
    """Draw eight photos and their masks laid over them."""
    rows: dict[str, list[Any]] = {"photo": [], "mask over it": []}
    for id in ids[:: max(1, len(ids) // 8)][:8]:
        image, label = dataset.image(id), dataset.label(id)
        step = max(1, max(label.shape) // 400)
        photo, label = figures.to_image(image[:, ::step, ::step]), label[::step, ::step]
        rows["photo"].append(photo)
        rows["mask over it"].append(figures.overlay(photo, label, dataset.palette, dataset.classes, 0.6))
    return figures.sheet(rows, palette=dataset.palette, classes=dataset.classes, side=1.6)
