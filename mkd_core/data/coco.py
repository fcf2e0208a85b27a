"""`coco`, COCO 2017 with 81 classes; masks are rendered once from the instance annotations."""

import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from ..progress import Progress
from .base import IGNORE, DataError, FileDataset, colormap, find_root, some

Objects = dict[Any, list[tuple[dict[str, Any], str]]]  # annotation and class name, by the image's id
NAMES = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]  # in the order of their ids
CLASSES = ("background", *(name for name in NAMES if name != "N/A"))


class COCO(FileDataset):
    """118,287 training and 5,000 validation images, background and 80 things.

    The images on disk are the lists.
    masks: folder under root with <id>.png of both parts (255 = crowd), as `render_masks` writes them.
    """

    name = "coco"
    classes = CLASSES
    palette = colormap(81)
    pattern = r"\d{12}"
    where = (
        "Images: http://images.cocodataset.org/zips/train2017.zip, val2017.zip (in train2017, val2017); masks: "
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip, then "
        "mkd_core.data.coco.render_masks on both json files."
    )

    def __init__(self, root: str, masks: str = "masks"):
        self.root = find_root(self.name, root, ["train2017", "val2017"], self.where)
        self.masks = self.root / masks
        folders = (self.root / "train2017", self.root / "val2017")
        self.train, self.val = (tuple(sorted(p.stem for p in folder.glob("*.jpg"))) for folder in folders)
        self._val = frozenset(self.val)

    def files(self, id: str) -> tuple[Path, Path]:
        part = "val2017" if id in self._val else "train2017"
        return self.root / part / f"{id}.jpg", self.masks / f"{id}.png"


def render_masks(annotations: Path, out: Path) -> int:
    """Write out/<id>.png (grey, 0..80, 255) for each image of an instances_*.json; return their number.

    Masks that exist are kept, so that a second call continues a first.
    """
    content = json.loads(Path(annotations).read_text(encoding="utf-8"))
    names, images, objects = read_instances(annotations, content)
    if own := [name for name in names.values() if name not in CLASSES[1:]]:
        what = f"{some(own, 'categories')} not of COCO's 80"
        raise DataError(f"{annotations}: {what}; own classes belong in data set 'folder'")
    out.mkdir(parents=True, exist_ok=True)
    written, say = 0, Progress("masks")
    for done, image in enumerate(images, 1):
        path = out / f"{int(image['id']):012d}.png"
        if not path.exists():
            part = path.with_suffix(".part")
            try:
                mine = [(each, CLASSES.index(name)) for each, name in objects[image["id"]]]
                mask = paint(mine, image["height"], image["width"])
            except DataError as error:
                raise DataError(f"{annotations}: image {image['id']}, {error}") from error
            Image.fromarray(mask).save(part, "png")
            os.replace(part, path)  # a killed run leaves no half mask under a final name
            written += 1
        say(f"{done:,} of {len(images):,}")
    return written


def read_instances(path: Path, content: dict[str, Any]) -> tuple[dict[Any, str], list[Any], Objects]:
    """Read names by category id, images, and (annotation, name) by image id; DataError where a key is missing."""
    objects: Objects = defaultdict(list)
    try:
        names = {each["id"]: str(each["name"]) for each in content["categories"]}
        for each in content["annotations"]:
            objects[each["image_id"]].append((each, names[each["category_id"]]))
        for each in content["images"]:
            each["id"], each["height"], each["width"]
    except KeyError as error:
        raise DataError(f"{path}: there is no {error}; an instances_*.json is needed") from error
    if lost := objects.keys() - {each["id"] for each in content["images"]}:
        raise DataError(f"{path}: {some(sorted(map(str, lost)), 'annotated images')} are not in its list")
    return names, content["images"], objects


def paint(objects: list[tuple[dict[str, Any], int]], height: int, width: int) -> np.ndarray:
    """Paint (annotation, class) of each object: (H, W) uint8.

    Rule (our choice, none is standard): in decreasing order of area, so that small ones stay on top;
    crowds, and the boxes of objects without outline, become 255, the rest 0.
    """
    parts = []
    for number, (each, index) in enumerate(objects):
        try:
            mask = _decode(each["segmentation"], height, width)
            if each.get("iscrowd"):
                index = IGNORE
            if not mask.any():  # no outline: somewhere in its box
                left, top, wide, high = each["bbox"]
                ends = int(top), math.ceil(top + high), int(left), math.ceil(left + wide)
                first, last, start, end = (max(0, place) for place in ends)
                mask[first:last, start:end] = True
                index = IGNORE
        except (KeyError, TypeError, ValueError) as error:
            what = f"annotation {each.get('id', number)}"
            raise DataError(f"{what}: no readable outline or box ({error!r})") from error
        parts.append((-(each.get("area") or mask.sum()), each.get("id", number), mask, index))
    label = np.zeros((height, width), np.uint8)
    for *_, mask, index in sorted(parts, key=lambda part: part[:2]):
        label[mask] = index
    return label


def _decode(outline: Any, height: int, width: int) -> np.ndarray:
    """(H, W) bool of COCO's polygons or run lengths; all False where there is no outline."""
    from pycocotools import mask as rle  # compiled code that only rendering needs

    if isinstance(outline, list):
        polygons = [polygon for polygon in outline if len(polygon) >= 6]  # the library takes four for a box
        if not all(abs(value) < 2**20 for polygon in polygons for value in polygon):
            raise ValueError("coordinates that are no numbers, or far outside")
        if not polygons:
            return np.zeros((height, width), bool)
        return rle.decode(rle.merge(rle.frPyObjects(polygons, height, width))).astype(bool)
    counts = outline["counts"]
    listed = isinstance(counts, list)
    mask = rle.decode(
        rle.frPyObjects(outline, *outline["size"]) if listed else {**outline, "counts": counts.encode()}
    )
    # where run lengths are too few the library leaves the rest of the mask as it finds it
    whole = sum(counts) == mask.size if listed else rle.encode(mask)["counts"] == counts.encode()
    if not whole or mask.shape != (height, width):
        raise ValueError(f"run lengths do not add up to {height} x {width} pixels")
    return mask.astype(bool)
