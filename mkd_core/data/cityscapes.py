"""`cityscapes` in the layout of its archives: leftImg8bit and gtFine."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import Cityscapes as Official

from .base import IGNORE, DataError, FileDataset, find_root, read_label

# In the order of their train ids.
LABELS = [each for each in Official.classes if 0 <= each.train_id < IGNORE]
TRAIN_ID = torch.full((256,), IGNORE, dtype=torch.uint8)
TRAIN_ID[[each.id for each in LABELS]] = torch.arange(len(LABELS), dtype=torch.uint8)


class Cityscapes(FileDataset):
    """2,975 training and 500 validation images of 2048 x 1024 pixels, 19 classes.

    The images on disk are the lists. Masks are gtFine's labelTrainIds where the official script has
    made them, else labelIds mapped to the 19 classes. Other data sets in
    this layout may name their images as they like, each name once.
    """

    name = "cityscapes"
    classes = tuple(each.name for each in LABELS)
    palette = np.array([each.color for each in LABELS], np.uint8)
    pattern = r"[^\s/]+?(?=_leftImg8bit\b|_gtFine|\.png|\s|$)"
    where = (
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, after registration: "
        "https://www.cityscapes-dataset.com/downloads/; expected are "
        "leftImg8bit/{train,val}/<city>/<id>_leftImg8bit.png and "
        "gtFine/{train,val}/<city>/<id>_gtFine_labelIds.png."
    )

    def __init__(self, root: str):
        self.root = find_root(self.name, root, ["leftImg8bit"], self.where)
        self._place: dict[str, Path] = {}  # id -> <part>/<city>
        self.train, self.val = (self._ids(part) for part in ("train", "val"))
        if not self._place:
            raise DataError(f"no images in {self.root / 'leftImg8bit'}/{{train,val}}/<city>. {self.where}")

    def _ids(self, part: str) -> tuple[str, ...]:
        ids = []
        for path in (self.root / "leftImg8bit" / part).glob("*/*_leftImg8bit.png"):
            id, place = path.name.removesuffix("_leftImg8bit.png"), Path(part, path.parent.name)
            if self._place.setdefault(id, place) != place:
                raise DataError(f"{self.root}: two images are called {id}, in {self._place[id]} and {place}")
            ids.append(id)
        return tuple(sorted(ids))

    def files(self, id: str) -> tuple[Path, Path]:
        place = self._place.get(id, Path("train/*"))  # an id that is only listed is in no city
        mask = self.root / "gtFine" / place / f"{id}_gtFine_labelTrainIds.png"
        raw = mask.with_name(f"{id}_gtFine_labelIds.png")
        image = self.root / "leftImg8bit" / place / f"{id}_leftImg8bit.png"
        return image, mask if mask.is_file() else raw

    def read_mask(self, path: Path) -> Tensor:
        if path.name.endswith("_labelTrainIds.png"):
            return read_label(path, len(self.classes))
        return TRAIN_ID[read_label(path).long()]
