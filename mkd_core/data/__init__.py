"""The data sets by name, and how one is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..choices import choose, complete_options
from .base import IGNORE, DataError, SegDataset
from .check import Report, check
from .cityscapes import Cityscapes
from .coco import COCO
from .folder import Folder
from .shapes import Shapes
from .splits import Split, load_split
from .voc import VOC, VOCAug

DATASETS: dict[str, Callable[..., SegDataset]] = {
    "shapes": Shapes,
    "folder": Folder,
    "voc": VOC,
    "voc_aug": VOCAug,
    "cityscapes": Cityscapes,
    "coco": COCO,
}

__all__ = [
    "DATASETS",
    "IGNORE",
    "DataError",
    "Report",
    "SegDataset",
    "Split",
    "check",
    "load_split",
    "open_dataset",
]


def open_dataset(name: str, root: str = "", **options: Any) -> SegDataset:
    """The data set `name` under the folder `root`; `options` are the keyword arguments of its class.

    ValueError for a name or an option that does not exist, DataError where files are missing.

    >>> open_dataset("shapes", train_size=4).train[0]
    'train/0000'
    """
    make = DATASETS[choose("data set", name, DATASETS)]
    return make(root, **complete_options(f"data set {name!r}", make, options, "root"))
