"""A person's own photos and masks: made a data set, with a sheet to look at; methods trained on it, and their report."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .. import records
from ..choices import choose
from ..config import PARAMETERS, Grid, RunConfig
from ..data import DataError, SegDataset, check, load_split, open_dataset
from ..data.base import colormap, local, open_mask, picture_size, refuse_faulty, visible
from ..data.folder import read_classes
from ..data.layouts import CLASS_FILES, DONE, TABLE_FILES, Pair, draw_parts, find_pairs
from ..data.masks import Meaning, each, read_table, understand
from ..data.outlines import understand_drawings
from ..data.pictures import absolute
from ..evaluate import Predictor, evaluate
from ..methods import METHODS
from ..metrics import miou
from ..parameters import merge, read_parameters
from ..trained import open_run
from . import figures, report
from .batch import run_table
from .notebook import holds_other_runs
from .predict import indexed, relative, save_png

RECIPE = PARAMETERS / "recipes/own_images.yaml"
QUICK = {"steps": 120, "batch": 4, "evaluate_every": 60, "quality_images": 16, "checkpoint_every": 20, "crop": 112}  # fmt: skip
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
    classes   names in the order of the numbers (or sorted colours) in the masks, also "a,b,c", or their count;
              default: a list of names in the folder
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
    if not (fraction := re.fullmatch(r"(1/)?([1-9]\d*)|all|", labeled)):
        raise ValueError(f"labeled is 1/4, 40 or all; got {labeled!r}")
    recipe = read_parameters(RECIPE, TEXT)
    RunConfig(**recipe | {"weights": ""} | keys)  # what is wrong is told before a list is written
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
    _draw(out, dataset, fraction, seed)
    values = recipe | values | keys
    config, split = RunConfig(**values), load_split(dataset, "labeled")
    figures.save(_sheet(dataset, split.labeled), out / "sheet.png")
    found = check(dataset, split)
    say("", found, "", f"Look at {out / 'sheet.png'}: do the masks fit?")
    found.raise_if_bad()
    records.write_atomically(out / DONE, yaml.safe_dump(values, sort_keys=False))
    say(f"Next: {shlex.join(['mkd', 'train', str(folder)] + ['--out', str(out)] * (out != root / 'mkd'))}")
    return config


def _understand(root: Path, pairs: list[Pair], classes: Classes, colours: str | Path) -> Meaning:
    """Judge the masks, by the class names and the colour table that are given or found in the folder."""

    def first(names: str) -> Path | None:
        return next((root / name for name in names.split() if (root / name).is_file()), None)

    table = local(colours) if colours else first(TABLE_FILES)
    listed = first(CLASS_FILES) if classes in (None, "") else None
    if isinstance(classes, str) and classes:
        classes = int(classes) if classes.strip().isdigit() else [name.strip() for name in classes.split(",")]
    classes = read_classes(listed) if listed else classes
    if drawings := {pair.mask: pair.drawing for pair in pairs if pair.mask and pair.drawing}:
        meaning, table = understand_drawings(drawings, classes), None
    else:
        meaning = understand([p.mask for p in pairs if p.mask], classes, read_table(table) if table else {})
    found = [f"classes of {listed}"] * bool(listed and not table) + [f"colours of {table}"] * bool(table)
    if odd := [n for n in map(str, meaning.classes) if n[:1] == "#" or len(n.strip().splitlines()) != 1]:
        raise DataError(f"{odd[0]!r} is no class name: classes.txt holds one in a line")
    return replace(meaning, notes=found + meaning.notes)


def _fault(pair: Pair) -> str:
    """Say why a photo and its mask cannot be used, "" where they can."""
    try:
        found = size = picture_size(pair.image)
        if pair.drawing:
            size = pair.drawing.size
        elif pair.mask:
            with open_mask(pair.mask) as mask:
                mask.load()  # all of it can be read
                size = mask.size[::-1]
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
                save_png(indexed(meaning.read(mask), palette), written)
                mask = written
            files = [relative(file, out) for file in (pair.image, mask) if file]
            lines[part or "train"].append("\t".join(files))
    for part, text in lines.items():
        (out / f"{part}.txt").unlink(missing_ok=True)  # of an earlier draw
        if text:
            records.write_atomically(out / f"{part}.txt", "".join(f"{line}\n" for line in text))
    records.write_atomically(out / "classes.txt", "".join(f"{name}\n" for name in meaning.classes))
    height, width = np.median([picture_size(pair.image) for pairs in parts.values() for pair in pairs], 0)
    large = max(height, width) > 768  # native crops would show too little of it
    factor = 512 / max(height, width) if large else 1
    crop = [int(min(320, max(32, side * factor // 16 * 16))) for side in (height, width)]
    values: dict[str, Any] = {"dataset": "folder", "root": str(out), "split": "labeled", "crop": crop}
    values |= {"base": 512 if large else 0, "protocol": "long512" if large else "whole"}
    return values | {"dataset_options": {"palette": palette.tolist()}}


def _draw(out: Path, dataset: SegDataset, fraction: re.Match[str], seed: int) -> None:
    """Write the split "labeled"."""
    masked = [id for id in dataset.train if dataset.has_label(id)]
    if fraction[2]:
        counts = [-(-len(masked) // int(fraction[2])) if fraction[1] else int(fraction[2])]
    else:
        whole = fraction[0] == "all" or len(masked) < len(dataset.train)
        counts = [len(masked)] if whole else [-(-len(masked) // part) for part in (4, 2, 1)]
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
    colours = visible(dataset.palette, dataset.classes)
    for id in ids[:: max(1, len(ids) // 8)][:8]:
        image, label = dataset.image(id), dataset.label(id)
        step = max(1, max(label.shape) // 400)
        photo, label = figures.to_image(image[:, ::step, ::step]), label[::step, ::step]
        rows["photo"].append(photo)
        rows["mask over it"].append(figures.overlay(photo, label, colours, dataset.classes, 0.6))
    return figures.sheet(rows, palette=dataset.palette, classes=dataset.classes, side=1.6)


def train_folder(
    folder: str | Path, methods: Sequence[str] = ("supervised", "mkd"), *, quick: bool = False,
    out: str | Path | None = None, classes: Classes = None, **keys: Any,
) -> records.Cells:  # fmt: skip
    """Train methods on one's own photos, write their report, return their records by row and column.

    The folder is prepared where that was not done; `classes`, and all else about that: `prepare_folder`.
    out       where the folder was prepared, default <folder>/mkd; the report lies in <out>/report, or in
              report-2 ... beside that of other settings
    quick     few steps on small crops, minutes on two cores
    keys      of RunConfig over <out>/mkd.yaml; "options.alpha": 2.0 reaches into MKD's options

    Where there is a test.txt, the trained runs are evaluated on it too.
    """
    out = absolute(out or absolute(folder) / "mkd")
    if not (out / DONE).exists():
        prepare_folder(folder, out, classes=classes)
    elif classes:
        raise ValueError(f"{out} is prepared already; give the classes to mkd prepare --overwrite")
    read = read_parameters(RECIPE, TEXT) | read_parameters(out / DONE, TEXT) | {"root": str(out)}
    weights = {key: read.get(key, "") for key in ("weights", "weights2")}  # gone, maybe, in a copy
    given = RunConfig(**read | dict.fromkeys(weights, "")).model_dump(mode="json") | weights
    small = {key: np.minimum(most, given[key]).tolist() for key, most in QUICK.items()} if quick else {}
    values = merge(given, small | keys, given)
    if "steps" in keys and "evaluate_every" not in keys and isinstance(values["steps"], int):
        values["evaluate_every"] = min(given["evaluate_every"], max(1, values["steps"] // 4))  # for curves
    own, options, seed = values.pop("method"), values.pop("options"), values.pop("seed")
    if own not in methods and any(key.startswith("options") for key in keys):
        raise ValueError(f"options are {own}'s, which is not among the methods")
    row = {m: METHODS[choose("method", m, METHODS)].label for m in methods}
    rows: Any = {row[m]: {"method": m, "options": options if m == own else {}} for m in methods}
    grid = Grid(**dict[str, Any](common=values, rows=rows, seeds=[seed]))
    places = (out / f"report{'-quick' * quick}{k}" for k in ("", *(f"-{k}" for k in range(2, 1000))))
    place = next(place for place in places if not holds_other_runs(place, grid))
    cells = run_table(grid)
    place.mkdir(exist_ok=True)
    made, _ = report.write(cells, place)
    models = {name: open_run(of[""][0].id).predictor() for name, of in cells.items()}
    of_data: dict[str, Any] = values.get("dataset_options", {})
    figures.save(_comparison(models, open_dataset("folder", str(out), **of_data)), place / "predictions.png")
    print("", made.markdown(), "", sep="\n")
    if (out / "test.txt").is_file():  # images that no run has seen
        dataset = open_dataset("folder", str(out), **of_data | {"val": "test.txt"})
        print(f"mIoU on the {len(dataset.val)} images of test.txt:")
        for name, model in models.items():
            confusion, _ = evaluate(model, dataset, dataset.val)
            print(f"  {name}: {miou(confusion[model.names[0]]):.1f}")
    found = [record for of in cells.values() for record in of[""]]
    print(f"Report: {place}\nNext: mkd predict {max(found, key=lambda r: r.miou).id} PHOTOS -o predictions")
    if quick:
        full, made = (of["steps"] * of["batch"] * np.prod(of["crop"]) for of in (given, values))
        minutes = full / made * sum(record.seconds for record in found) / 60
        print(f"Too short to compare. Without --quick: {given['steps']:,} steps, about {minutes:.0f} minutes")
    return cells


def _comparison(models: Mapping[str, Predictor], dataset: SegDataset) -> figures.Picture:
    """Draw photos of val, their masks and what the models predict."""
    ids = dataset.val[: 64 if len(models) > 1 else 8]
    images, truth = [dataset.image(id) for id in ids], [dataset.label(id) for id in ids]
    found = {name: [model.label(image)[0] for image in images] for name, model in models.items()}
    if len(found) > 1:
        return figures.figure2(images, truth, found, dataset.palette, dataset.classes)
    rows: dict[str, Any] = {"photo": [*map(figures.to_image, images)], "mask": truth, **found}
    return figures.sheet(rows, palette=dataset.palette, classes=dataset.classes)
