"""The data sets by name, and how one is opened."""

from collections.abc import Callable
from typing import Any

from ..choices import choose, complete_options
from .base import IGNORE, DataError, SegDataset
from .check import check
from .cityscapes import Cityscapes
from .coco import COCO
from .folder import Folder
from .shapes import Shapes
from .splits import Split, load_split
from .voc import VOC, VOCAug

KINDS: tuple[type[SegDataset], ...] = (Shapes, Folder, VOC, VOCAug, Cityscapes, COCO)
DATASETS: dict[str, Callable[..., SegDataset]] = {kind.name: kind for kind in KINDS}

__all__ = ["DATASETS", "IGNORE", "DataError", "SegDataset", "Split", "check", "load_split", "open_dataset"]


def open_dataset(name: str, root: str = "", **options: Any) -> SegDataset:
    """The data set `name` under the folder `root`; `options` are the keyword arguments of its class.

    ValueError for a name or an option that does not exist, DataError where files are missing.

    >>> open_dataset("shapes", train_size=4).train[0]
    'train/0000'
    """
    make = DATASETS[choose("data set", name, DATASETS)]
    return make(root, **complete_options(f"data set {name!r}", make, options))
