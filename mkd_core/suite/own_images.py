"""A person's own photos: from a folder to lists, and from lists to trained runs with their report."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .. import records
from ..choices import choose
from ..config import PARAMETERS, Grid, RunConfig
from ..data import DataError, SegDataset, check, load_split, open_dataset
from ..data.base import local, picture_size, read_text
from ..data.layouts import DONE, Pair, find_pairs
from ..data.masks import Meaning, read_table, sizes, understand
from ..data.pictures import absolute
from ..evaluate import evaluate
from ..methods import METHODS
from ..metrics import miou
from ..parameters import merge, read_parameters
from ..trained import open_run
from . import figures, report
from .batch import Table, run_table
from .predict import relative, save_png

RECIPE = PARAMETERS / "recipes/own_images.yaml"
QUICK = {"steps": 120, "batch": 4, "evaluate_every": 40}
CLASS_FILES = "classes.txt class_names.txt labels.txt names.txt codes.txt"
TABLE_FILES = "labelmap.txt label_colors.txt label_colours.txt colors.txt colours.txt class_dict.csv"
TEXT = {name for name, field in RunConfig.model_fields.items() if isinstance(field.default, str)}


def prepare_folder(
    folder: str | Path, out: str | Path | None = None, *, classes: Sequence[str] | int | None = None,
    colours: str | Path = "", images: str = "", masks: str = "", val: float = 0.2, test: float = 0.0, labeled: str = "",
    group_by: str = "", seed: int = 0, overwrite: bool = False, quiet: bool = False, **keys: Any,
) -> RunConfig:  # fmt: skip
    """Make a data set of kind `folder` from photos and masks as they lie; return the configuration of a run on it.

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

    DataError, ValueError for what cannot be understood. What is left out is printed, and so is the check of the data.
    """
    root = absolute(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder")
    out = absolute(out or root / "mkd")
    if (out / DONE).exists() and not overwrite:
        raise ValueError(f"{out} is prepared already; --overwrite prepares it anew, --out elsewhere")
    say = (lambda *lines: None) if quiet else (lambda *lines: print(*lines, sep="\n"))
    pairs, left_out = find_pairs(root, out, images, masks)
    pairs, unfit = _fitting(pairs)
    say(*left_out, *unfit)
    table = _found(root, TABLE_FILES) if not colours else local(colours)
    listed = _found(root, CLASS_FILES) if classes is None else None
    names = read_text(listed).splitlines() if listed else classes
    names = (
        [name.strip() for name in names if name.strip() and name.strip() != "__ignore__"]
        if isinstance(names, list | tuple)
        else names
    )
    meaning = understand(
        [pair.mask for pair in pairs if pair.mask], names, read_table(table) if table else {}
    )
    say(
        f"Masks: {'; '.join(meaning.notes)}; "
        + ("read as they lie" if meaning.as_is else f"converted to {out}/masks")
    )
    parts, apart = _parts(pairs, val, test, group_by, seed)
    say(*apart)
    values = _write(out, parts, meaning) | {"seed": seed}
    dataset = open_dataset("folder", str(out), **values["dataset_options"])
    _draw(out, dataset, labeled, seed)
    config = RunConfig(**(read_parameters(RECIPE, TEXT) | values | keys))
    text = yaml.safe_dump(read_parameters(RECIPE, TEXT) | values | keys, sort_keys=False)
    split = load_split(dataset, "labeled")
    figures.save(_sheet(dataset, split.labeled), out / "sheet.png")
    found = check(dataset, split)
    say("", found, "", f"Look at {out / 'sheet.png'}: do the masks fit?")
    found.raise_if_bad()
    records.write_atomically(out / DONE, text)
    say(f"Next: {shlex.join(['mkd', 'train', str(folder)] + ['--out', str(out)] * (out != root / 'mkd'))}")
    return config


def _found(root: Path, names: str) -> Path | None:
    return next((root / name for name in names.split() if (root / name).is_file()), None)


def _fitting(pairs: list[Pair]) -> tuple[list[Pair], list[str]]:
    """The pairs whose mask can be read and has the size of its photo; the others with the reason."""
    size, faults = sizes([pair.mask for pair in pairs if pair.mask])
    for pair in pairs:
        try:
            found = picture_size(pair.image)
            if pair.mask in size and size[pair.mask] != found:
                faults[pair.mask] = (
                    f"{pair.mask}: a mask of {size[pair.mask]} pixels, its photo (upright) has {found}"
                )
        except DataError as error:
            faults[pair.mask or pair.image] = str(error)
    kept = [pair for pair in pairs if pair.mask not in faults and pair.image not in faults]
    lines = [f"Left out: {fault}" for fault in [*faults.values()][:5]]
    lines += [f"Left out: {len(faults) - 5} more like these"] * (len(faults) > 5)
    if not any(pair.mask for pair in kept):
        raise DataError("\n".join(["no mask can be used", *lines]))
    return kept, lines


def _parts(
    pairs: list[Pair], val: float, test: float, group_by: str, seed: int
) -> tuple[dict[str, list[Pair]], list[str]]:
    """The pairs of train, val, test and "" (photos without mask), and what is left out for the sake of groups."""
    pattern = f"^.{{{group_by}}}" if group_by.isdigit() else group_by

    def group(pair: Pair) -> str:
        found = re.search(pattern, pair.image.name) if pattern else None
        return found[0] if found else pair.name

    parts: dict[str, list[Pair]] = {"train": [], "val": [], "test": []}
    for pair in pairs:
        if pair.mask:
            parts[pair.part or "train"].append(pair)
    every = sum(map(len, parts.values()))
    for part, share in (("test", test), ("val", val)):
        if not parts[part] and share:
            groups = defaultdict(list)
            for pair in parts["train"]:
                groups[group(pair)].append(pair)
            for name in sorted(groups, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
                if len(parts[part]) < share * every:
                    parts[part] += groups[name]
            drawn = set(parts[part])
            parts["train"] = [pair for pair in parts["train"] if pair not in drawn]
    if not parts["train"] or not parts["val"]:
        counts = ", ".join(f"{part} {len(of)}" for part, of in parts.items())
        raise DataError(
            f"photos with masks: {counts}; train and val need some. Are there enough, and enough groups?"
        )
    held = {group(pair) for pair in parts["val"] + parts["test"]} if pattern else set()
    bare = [pair for pair in pairs if not pair.mask]
    parts[""] = [pair for pair in bare if group(pair) not in held]
    lost = len(bare) - len(parts[""])
    return parts, [f"Left out, of a group in val or test: {lost} photos without mask"] * bool(lost)


def _write(out: Path, parts: dict[str, list[Pair]], meaning: Meaning) -> dict[str, Any]:
    """Write masks, class names and lists; return the parameters of a run that belong to these data."""
    out.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for part, pairs in parts.items():
        for pair in pairs:
            mask = pair.mask
            if mask and not meaning.as_is:
                mask = out / "masks" / f"{pair.name}.png"
                mask.parent.mkdir(parents=True, exist_ok=True)
                save_png(
                    mask, meaning.read(pair.mask), meaning.palette and np.array(meaning.palette, np.uint8)
                )
            lines[part or "train"].append(
                "\t".join(relative(file, out) for file in (pair.image, mask) if file)
            )
    for part, text in lines.items():
        if text or part != "test":
            records.write_atomically(out / f"{part}.txt", "".join(f"{line}\n" for line in text))
    records.write_atomically(out / "classes.txt", "".join(f"{name}\n" for name in meaning.classes))
    shapes = np.array([picture_size(pair.image) for pairs in parts.values() for pair in pairs])
    height, width = np.median(shapes, 0)
    large = max(height, width) > 768  # native crops would show too little of it
    factor = 512 / max(height, width) if large else 1
    crop = [int(min(320, max(32, side * factor // 16 * 16))) for side in (height, width)]
    values = {
        "dataset": "folder",
        "root": str(out),
        "dataset_options": {"palette": meaning.palette},
        "split": "labeled",
    }
    return values | {"crop": crop, "base": 512 if large else 0, "protocol": "long512" if large else "whole"}


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


def train_folder(
    folder: str | Path, methods: Sequence[str] = ("supervised", "mkd"), *, quick: bool = False,
    out: str | Path | None = None, classes: Sequence[str] | int | None = None, **keys: Any,
) -> Table:  # fmt: skip
    """Train methods on one's own photos, write their report, return their records by row and column.

    The folder is prepared where that was not done; `classes`, and all else about that: `prepare_folder`.
    out       where the folder was prepared, default <folder>/mkd; the report lies in <out>/report
    quick     few steps, minutes on two cores
    keys      of RunConfig over <out>/mkd.yaml; "options.alpha": 2.0 reaches into MKD's options

    Where there is a test.txt, the trained runs are evaluated on it too.
    """
    out = absolute(out or absolute(folder) / "mkd")
    if not (out / DONE).exists():
        prepare_folder(folder, out, classes=classes)
    elif classes:
        raise ValueError(f"{out} is prepared already; give the classes to mkd prepare --overwrite")
    values = merge(read_parameters(out / DONE, TEXT), (QUICK if quick else {}) | keys)
    own, options, seed = values.pop("method"), values.pop("options"), values.pop("seed")
    for name in methods:
        choose("method", name, METHODS)
    if own not in methods and any(key.startswith("options") for key in keys):
        raise ValueError(f"options are {own}'s, which is not among the methods")
    rows = {
        METHODS[name].label: {"method": name, "options": options if name == own else {}} for name in methods
    }
    grid = Grid(common=values, rows=rows, seeds=[seed])
    cells = run_table(grid)
    place = out / ("report-quick" if quick else "report")
    place.mkdir(exist_ok=True)
    made, _ = report.write(cells, place)
    dataset = open_dataset("folder", str(out), **values.get("dataset_options", {}))
    figures.save(_comparison(cells, dataset), place / "predictions.png")
    print("", made.markdown(), *_on_test(cells, out), "", sep="\n")
    best = max((record for of in cells.values() for record in of[""]), key=lambda record: record.miou)
    print(f"Report: {place}\nNext: mkd predict {best.id} PHOTOS --out predictions")
    return cells


def _comparison(cells: Table, dataset: SegDataset) -> figures.Picture:
    """Draw photos of val, their masks and what the runs predict."""
    ids = dataset.val[:64]
    images, truth = [dataset.image(id) for id in ids], [dataset.label(id) for id in ids]
    found = {}
    for name, of in cells.items():
        model = open_run(of[""][0].id).predictor()
        found[name] = [model.label(image)[0] for image in images]
    if len(found) > 1:
        return figures.figure2(images, truth, found, dataset.palette, dataset.classes)
    rows = {"photo": [*map(figures.to_image, images[:8])], "mask": truth[:8]} | {
        n: of[:8] for n, of in found.items()
    }
    return figures.sheet(rows, palette=dataset.palette, classes=dataset.classes)


def _on_test(cells: Table, out: Path) -> list[str]:
    """Evaluate the runs on the images of test.txt, which no run has seen."""
    if not (out / "test.txt").is_file():
        return []
    lines = []
    for name, of in cells.items():
        opened = open_run(of[""][0].id)
        dataset = open_dataset("folder", str(out), **opened.config.dataset_options | {"val": "test.txt"})
        model = opened.predictor()
        confusion, _ = evaluate(model, dataset, dataset.val)
        lines.append(f"  {name}: {miou(confusion[model.names[0]]):.1f}")
    return ["", f"mIoU on the {len(dataset.val)} images of test.txt:", *lines]
