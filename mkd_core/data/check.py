"""Look at the data before training: counts, hashes, and everything that is wrong with the files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

from .base import IGNORE, DataError, SegDataset, some
from .splits import Split, as_published


@dataclass(frozen=True)
class Report:
    """rows: (what, finding); problems: one line per kind; shares: percent of the labeled pixels of each class, and of 255 (deep only)."""

    rows: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    shares: dict[str, float]

    def __str__(self) -> str:
        rows = [*self.rows]
        if self.shares:
            rows += [("", ""), ("class", "% of the labeled pixels"), *((name, f"{share:6.2f}") for name, share in self.shares.items())]
        width = max(len(what) for what, _ in rows)
        verdict = [f"PROBLEM: {problem}" for problem in self.problems] or ["no problems found"]
        return "\n".join([f"{what:<{width}}  {finding}".rstrip() for what, finding in rows] + ["", *verdict])

    def raise_if_bad(self) -> None:
        """DataError that names every problem."""
        if self.problems:
            raise DataError("\n".join(self.problems))


def check(dataset: SegDataset, split: Split, deep: bool = True, progress: Callable[[int, int], None] | None = None) -> Report:
    """Examine a split and the files of its images and of the validation set; problems are collected, not raised.

    deep=False looks at the lists and at which files exist; deep=True also opens every image and mask.
    `progress(done, total)` is called after each file that is opened.
    """
    labeled, val = set(split.labeled), set(dataset.val)
    ids = sorted({*split.labeled, *split.unlabeled, *dataset.val})
    required = labeled | val
    problems = _list_problems(dataset, split)

    missing: dict[str, list[str]] = {"images": [], "masks": []}
    for id in ids:
        image, mask = dataset.files(id)
        if image is not None and not image.is_file():
            missing["images"].append(str(image))
        if id in required and image is not None and (mask is None or not mask.is_file()):
            missing["masks"].append(str(mask or id))
    problems += [f"{some(paths, kind)} missing. {dataset.where}" for kind, paths in missing.items() if paths]

    shares: dict[str, float] = {}
    if deep:
        pixels, evaluated = np.zeros(256, np.int64), 0
        faults: list[str] = []
        absent = {path for paths in missing.values() for path in paths}
        todo = [id for id in ids if not absent & {str(path) for path in dataset.files(id)}]
        with ThreadPoolExecutor() as pool:
            for done, (id, fault, counts) in enumerate(pool.map(lambda id: _examine(dataset, id), todo), 1):
                faults += [fault] if fault else []
                pixels += counts if id in labeled else 0
                evaluated += int(counts[:IGNORE].sum()) if id in val else 0
                if progress:
                    progress(done, len(todo))
        if faults:
            problems.append(f"{len(faults)} faulty files:\n  " + "\n  ".join(faults[:5] + ["..."] * (len(faults) > 5)))
        elif np.count_nonzero(pixels[:IGNORE]) < 2:
            hint = f" {IGNORE} means ignored: an object needs a class value of its own, 1 for example." if pixels[IGNORE] else ""
            problems.append(
                f"the labeled masks hold {np.count_nonzero(pixels[:IGNORE])} of {len(dataset.classes)} classes, at least 2 are needed.{hint}"
            )
        if val and not faults and not absent and not evaluated:
            problems.append("the masks of the validation set hold no class at all, so there is nothing to evaluate")
        values = {**dict(enumerate(dataset.classes)), IGNORE: "ignored"}
        shares = {name: 100 * int(pixels[value]) / max(1, int(pixels.sum())) for value, name in values.items()}

    rows = (
        ("data set", f"{dataset.name}, {len(dataset.classes)} classes" + (f", {dataset.root}" if dataset.root else "")),
        ("training images", _count(f"{dataset.name}/train", dataset.train)),
        ("val", _count(f"{dataset.name}/val", dataset.val)),
        ("split", split.name),
        ("labeled", f"{len(split.labeled)}, sha256 {split.sha256}"),
        ("unlabeled", f"{len(split.unlabeled)}, sha256 {split.sha256_unlabeled}"),
    )
    return Report(rows, tuple(problems), shares)


def _count(key: str, ids: tuple[str, ...]) -> str:
    verdict = {True: ", the published set", False: ", not the published set", None: ""}
    return f"{len(ids)}{verdict[as_published(key, ids)]}"


def _list_problems(dataset: SegDataset, split: Split) -> list[str]:
    problems = []
    for kind, ids in (("labeled", split.labeled), ("unlabeled", split.unlabeled), ("val", dataset.val)):
        if not ids:
            problems.append(f"the {kind} list is empty")
        if twice := [id for id, count in Counter(ids).items() if count > 1]:
            problems.append(f"{some(twice, f'{kind} images')} listed more than once")
    reused = split.name == "full" or set(split.labeled) == set(dataset.train)  # all are labeled, so all serve as unlabeled too
    if not reused and (overlap := sorted(set(split.labeled) & set(split.unlabeled))):
        problems.append(f"{some(overlap, 'images')} both labeled and unlabeled")

    folder = cache(os.path.realpath)  # there are few of them, and files by the hundred thousand

    def picture(id: str) -> str:  # by links, one may have two names
        file = dataset.files(id)[0]
        if file is None:
            return id
        return os.path.realpath(file) if os.path.islink(file) else os.path.join(folder(file.parent), file.name)

    val = set(map(picture, dataset.val))
    if leak := sorted(id for id in {*split.labeled, *split.unlabeled} if picture(id) in val):
        problems.append(f"{some(leak, 'images')} of the validation set in training")
    return problems


def _examine(dataset: SegDataset, id: str) -> tuple[str, str, np.ndarray]:
    """(id, what is wrong or "", pixels of each label value)."""
    counts = np.zeros(256, np.int64)
    try:
        image = dataset.image(id)
        if dataset.has_label(id):
            label = dataset.label(id)
            if label.shape != image.shape[1:]:
                return id, f"{id}: the image has {tuple(image.shape[1:])} pixels, its mask {tuple(label.shape)}", counts
            counts = np.bincount(label.numpy().ravel(), minlength=256)
            if counts[len(dataset.classes) : IGNORE].any():
                return id, f"{id}: label values outside 0..{len(dataset.classes) - 1} and {IGNORE}", counts
    except DataError as error:
        return id, str(error), counts
    return id, "", counts
