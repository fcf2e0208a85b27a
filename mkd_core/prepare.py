"""What must be right before a run begins: data, split and method; and which data it began with."""

import hashlib
import math
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .config import RunConfig
from .data import SegDataset, open_dataset
from .data.base import DataError, FileDataset, local, picture_size
from .data.check import Progress, check
from .data.splits import Split, load_split, set_hash
from .evaluate import LARGE, Predictor
from .methods import Method
from .train import build_method, loaders


def prepare(
    config: RunConfig, deep: bool = False, report: Progress | None = None
) -> tuple[SegDataset, Split, Method]:
    """Open the data and build the method of a run. DataError, ValueError for all that is wrong; deep: opens all files."""
    if config.tensorboard and not find_spec("tensorboard"):
        raise ValueError("tensorboard=true needs a package that is missing: pip install tensorboard")
    dataset, split = open_data(config)
    method = build_method(config, len(dataset.classes))
    _check_shared_memory(config)
    check_data(config, dataset, split, method.min_batch, deep, report)
    if config.cache:
        if not isinstance(dataset, FileDataset):
            raise ValueError(f"cache keeps files decoded: {config.dataset} has none, it is made in memory")
        dataset.cache = local(config.cache)  # from here on: the check has seen the files themselves
        dataset.cache.mkdir(parents=True, exist_ok=True)
    return dataset, split, method


def open_data(config: RunConfig) -> tuple[SegDataset, Split]:
    """Open the data set and load the split of a run."""
    dataset = open_dataset(config.dataset, config.root, **config.dataset_options)
    return dataset, load_split(dataset, config.split, config.seed)


def check_data(
    config: RunConfig, dataset: SegDataset, split: Split, min_batch: int, deep: bool = False, report: Progress | None = None
) -> None:  # fmt: skip
    """Raise DataError for all that is wrong with the data of a run, and print what may be."""
    if not dataset.val:
        raise DataError(f"data set {config.dataset!r} names no images to evaluate. {dataset.where}")
    found = len(split.unlabeled)
    if min_batch > 1 and found < config.batch:
        has = f"split {config.split} has {found} unlabeled ones, batch is {config.batch}"
        raise DataError(f"{config.method} pairs the images of a batch: {has}")
    if not found and config.method != "supervised":
        raise DataError(f"{config.method} needs unlabeled images: split {config.split} has none")
    result = check(dataset, split, deep and isinstance(dataset, FileDataset), report)
    result.raise_if_bad()
    for warning in result.warnings if deep else ():
        print(f"WARNING: {warning}", flush=True)


def _check_shared_memory(config: RunConfig) -> None:
    """ValueError where loaders, which send a step's images through shared memory, would wait for ever for want of it."""
    count, place = loaders(config), Path("/dev/shm")
    needed = count * 2 * 9 * config.batch * math.prod(config.crop) / 2**20  # each has two steps ready
    if count and place.is_dir() and (free := shutil.disk_usage(place).free / 2**20) < needed:
        how = "workers=0, or more of it (docker run --shm-size=8g)"
        has = f"{place} has {free:,.0f} MB free"
        raise ValueError(f"{has}, {count} workers need up to {needed:,.0f} MB: {how}")


def try_largest(dataset: SegDataset, predictor: Predictor) -> None:
    """Evaluate the largest image once where it is a large one; ValueError, before any step, where memory does not suffice."""
    files = {id: file for id in dataset.val if (file := dataset.files(id)[0])}
    pixels, id = max(((math.prod(picture_size(file)), id) for id, file in files.items()), default=(0, ""))
    if pixels > LARGE:
        try:
            for _ in predictor.parts(dataset.image(id)[None]):
                pass
        except (MemoryError, RuntimeError) as error:  # of torch, on either device
            what = f"memory does not suffice to evaluate {id}, {pixels / 1e6:.0f} megapixels"
            raise ValueError(f"{what}: protocol=sliding or long512, or smaller images. {error}") from error


def data_identity(dataset: SegDataset, split: Split) -> dict[str, Any]:
    """Say what data a run has: kept from its start, compared when it goes on and when its record is asked for.

    contents: hex sha256 of the sizes and last 64 bytes, where a PNG has its check sums, of every image and mask of
    one's own folder: cheap, and other images under the same names show. "" where a file is missing, and for data sets whose names say what they hold.
    """
    digest, complete = hashlib.sha256(), dataset.name == "folder"
    for id in (*split.labeled, *split.unlabeled, *dataset.val) if complete else ():
        for file in filter(None, dataset.files(id)):
            if complete := complete and file.is_file():
                with open(file, "rb") as content:
                    size = content.seek(0, os.SEEK_END)
                    content.seek(max(0, size - 64))
                    digest.update(f"{size}\n".encode() + content.read())
    return {
        "name": split.name, "sha256": split.sha256, "sha256_unlabeled": split.sha256_unlabeled,
        "sha256_val": set_hash(dataset.val), "labeled": len(split.labeled), "unlabeled": len(split.unlabeled),
        "contents": digest.hexdigest() if complete else "",
    }  # fmt: skip


def data_now(config: RunConfig) -> dict[str, Any]:
    """Say what data a run would have now; {} where they are gone, which proves nothing."""
    try:
        return data_identity(*open_data(config))
    except ValueError:  # a list that has gone is the name of no split
        return {}


def refuse_other_data(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError where two identities differ in what both know."""
    if changed := [key for key, value in then.items() if value and now.get(key) and now[key] != value]:
        what = f"{folder} holds a run on other data than there is now (different: {', '.join(changed)})"
        raise ValueError(f"{what}; delete it, or keep the new runs apart (MKD_RUNS)")
