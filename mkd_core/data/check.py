"""Look at the data before training: counts, hashes, and everything that is wrong with lists and files."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .base import IGNORE, DataError, SegDataset, faulty, read_palette, read_turned, some
from .splits import Split, as_published

Progress = Callable[[int, int], None]  # (files looked at, of so many)
Files = dict[str, tuple[Path | None, Path | None]]  # image and mask


@dataclass
class Report:
    """What a check found."""

    rows: list[tuple[str, str]] = field(default_factory=list)  # (what, finding)
    problems: list[str] = field(default_factory=list)  # to be mended before a run, one entry per kind
    warnings: list[str] = field(default_factory=list)  # what is probably wrong and does not stop a run
    # deep only: part ("labeled", "val") -> class name, or "ignored" -> percent of its pixels
    shares: dict[str, dict[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = list(self.rows)
        if self.shares:
            rows += [("", ""), ("% of the pixels", "".join(f"{part:>8}" for part in self.shares))]
            for name in self.shares["labeled"]:
                rows.append((name, "".join(f"{shares[name]:8.2f}" for shares in self.shares.values())))
        width = max(len(what) for what, _ in rows)
        verdict = [f"PROBLEM: {problem}" for problem in self.problems] or ["no problems found"]
        verdict += [f"WARNING: {warning}" for warning in self.warnings]
        return "\n".join([f"{what:<{width}}  {finding}".rstrip() for what, finding in rows] + ["", *verdict])

    def raise_if_bad(self) -> None:
        """Raise a DataError that names every problem, if there are any."""
        if self.problems:
            raise DataError("\n".join(self.problems))


def check(dataset: SegDataset, split: Split, deep: bool = True, progress: Progress | None = None) -> Report:
    """Examine a split and the files of its images and of the validation set; nothing is raised.

    deep=False looks at the lists and at which files exist; deep=True also opens every image and
    mask, and calls `progress(done, total)` after each.
    """
    report, place = Report(), f", {dataset.root}" if dataset.root else ""
    report.rows = [
        ("data set", f"{dataset.name}, {len(dataset.classes)} classes{place}"),
        ("training images", _count(f"{dataset.name}/train", dataset.train)),
        ("val", _count(f"{dataset.name}/val", dataset.val)),
        ("split", split.name),
        ("labeled", f"{len(split.labeled)}, sha256 {split.sha256}"),
        ("unlabeled", f"{len(split.unlabeled)}, sha256 {split.sha256_unlabeled}"),
    ]
    files = {id: dataset.files(id) for id in sorted({*split.labeled, *split.unlabeled, *dataset.val})}
    _check_lists(report, dataset, split, files)
    there = _check_files(report, dataset, split, files)
    if deep:
        _check_contents(report, dataset, split, there, progress)
    return report


def _count(key: str, ids: tuple[str, ...]) -> str:
    verdict = {True: ", the published set", False: ", not the published set", None: ""}
    return f"{len(ids)}{verdict[as_published(key, ids)]}"


def _check_lists(report: Report, dataset: SegDataset, split: Split, files: Files) -> None:
    for part, ids in (("labeled", split.labeled), ("unlabeled", split.unlabeled), ("val", dataset.val)):
        if not ids:
            (report.warnings if part == "unlabeled" else report.problems).append(f"the {part} list is empty")
        if twice := [id for id, count in Counter(ids).items() if count > 1]:
            report.problems.append(f"{some(twice, f'{part} images')} listed more than once")
    # where all are labeled, all serve as unlabeled images too
    reused = split.name == "full" or set(split.labeled) == set(dataset.train)
    if not reused and (overlap := sorted(set(split.labeled) & set(split.unlabeled))):
        report.problems.append(f"{some(overlap, 'images')} both labeled and unlabeled")
    folder = cache(os.path.realpath)  # there are few of them, and files by the hundred thousand

    def picture(id: str) -> str:  # by links, one may have two names
        place, name = os.path.split(file := files[id][0] or id)
        return os.path.realpath(file) if os.path.islink(file) else os.path.join(folder(place), name)

    val = set(map(picture, dataset.val))
    if leak := sorted(id for id in {*split.labeled, *split.unlabeled} if picture(id) in val):
        report.problems.append(f"{some(leak, 'images')} of the validation set in training")


def _check_files(report: Report, dataset: SegDataset, split: Split, files: Files) -> list[str]:
    """Report files that are missing; return the ids of the others."""
    required = {*split.labeled, *dataset.val}
    images = {id: image for id, (image, _) in files.items() if image and not image.is_file()}
    wanted = {id: mask for id, (image, mask) in files.items() if image and id in required}
    masks = {id: mask or id for id, mask in wanted.items() if not (mask and mask.is_file())}
    for kind, missing in (("images", images), ("masks", masks)):
        if missing:
            report.problems.append(f"{some(missing.values(), kind)} missing. {dataset.where}")
    return [id for id in files if id not in images and id not in masks]


class _Content(NamedTuple):
    """What one image and its mask hold."""

    fault: str
    pixels: bytes = b""  # a hash of the image as it is trained on
    turned: bool = False  # by EXIF orientation
    counts: np.ndarray = np.zeros(256, np.int64)  # pixels of each label value
    palette: bytes = b""  # of the mask, three bytes an index


def _look(dataset: SegDataset, id: str) -> _Content:
    try:
        file, mask = dataset.files(id)
        image, turned = read_turned(file) if file else (dataset.image(id), False)
        varied = image.min() < image.max()  # pictures of one colour are alike and no copies
        pixels = hashlib.sha256(image.numpy().tobytes()).digest() if varied else b""
        if not dataset.has_label(id):
            return _Content("", pixels, turned)
        label, size = dataset.label(id), tuple(image.shape[1:])
        if label.shape != size:
            why = " (its EXIF orientation is applied, so the mask must be upright too)" * turned
            raise DataError(f"{id}: the image has {size} pixels{why}, its mask {tuple(label.shape)}")
        counts = np.bincount(label.numpy().ravel(), minlength=256)
        return _Content("", pixels, turned, counts, read_palette(mask) if mask else b"")
    except DataError as error:
        return _Content(str(error))


def _check_contents(
    report: Report, dataset: SegDataset, split: Split, ids: Sequence[str], progress: Progress | None
) -> None:
    parts = {"labeled": set(split.labeled), "val": set(dataset.val)}
    counts = {part: np.zeros(256, np.int64) for part in parts}
    faults, turned = [], []
    pictures: dict[bytes, list[str]] = defaultdict(list)
    colours: dict[int, dict[bytes, list[str]]] = defaultdict(lambda: defaultdict(list))
    with ThreadPoolExecutor() as pool:
        looks = zip(ids, pool.map(lambda id: _look(dataset, id), ids), strict=True)
        for done, (id, found) in enumerate(looks, 1):
            faults += [found.fault] if found.fault else []
            turned += [id] if found.turned else []
            pictures[found.pixels or id.encode()].append(id)
            for part, members in parts.items():
                counts[part] += found.counts if id in members else 0
            for index in np.flatnonzero(found.counts).tolist() if found.palette else ():
                colours[index][found.palette[3 * index : 3 * index + 3]].append(id)
            if progress:
                progress(done, len(ids))
    names = {**dict(enumerate(dataset.classes)), IGNORE: "ignored"}
    for part, count in counts.items():
        percent = (100 * count / max(1, int(count.sum()))).tolist()
        report.shares[part] = {name: percent[value] for value, name in names.items()}
    if faults:
        report.problems.append(faulty(faults))
    elif len(ids) == len({*split.labeled, *split.unlabeled, *dataset.val}):
        _check_classes(report, dataset, counts)

    val = parts["val"]
    twins = [same for same in pictures.values() if val.intersection(same) and not val.issuperset(same)]
    if copies := [" = ".join(same) for same in twins]:
        # the published sets are what they are
        known = as_published(f"{dataset.name}/val", dataset.val)
        where = report.warnings if known else report.problems
        where.append(f"{some(copies, 'photos')} both in training and in the validation set")
    if turned:
        images = some(turned, "images")
        report.warnings.append(f"{images} turned by EXIF orientation when read: are the masks upright too?")
    if odd := {id for of in colours.values() for ids in sorted(of.values(), key=len)[:-1] for id in ids}:
        report.warnings.append(
            f"{some(sorted(odd), 'masks')} whose palettes have other colours for the same class: "
            "did a program re-order them? A palette is never applied, indices are classes"
        )


def _check_classes(report: Report, dataset: SegDataset, counts: dict[str, np.ndarray]) -> None:
    """At least two classes in each part; classes that are not learned, or not measured, are told."""
    names = dataset.classes
    held = {part: [name for k, name in enumerate(names) if count[k]] for part, count in counts.items()}
    for part, found in held.items():
        if len(found) < 2 and counts[part].any():
            hint = f" {IGNORE} means ignored: an object needs a class value of its own, 1 for example."
            needed = f"{len(found)} of {len(names)} classes, at least 2 are needed."
            report.problems.append(f"the {part} masks hold {needed}{hint * bool(counts[part][IGNORE])}")
        elif (share := report.shares[part]["ignored"]) > 90:
            report.warnings.append(f"{share:.0f} % of the pixels of the {part} masks are ignored ({IGNORE})")
    labeled, val, hint = {*held["labeled"]}, {*held["val"]}, "a line of the class list that is no class?"
    for of, why in (
        (val - labeled, "of the validation set in no labeled mask: they cannot be learned"),
        (labeled - val, "in no mask of the validation set: how well they are learned shows nowhere"),
        ({*names} - labeled - val, f"in no mask: do the labels start from 1, or is there {hint}"),
    ):
        report.warnings += [f"{some(sorted(of, key=names.index), 'classes')} {why}"] * bool(of)
