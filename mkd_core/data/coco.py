"""`coco`, COCO 2017 with 81 classes; masks are rendered once from the instance annotations."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from .base import IGNORE, DataError, FileDataset, colormap, find_root

THINGS = [
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
]
# the official category ids are 1..90 without these; index 0 is background, a class like the others
CATEGORIES = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
CLASS_OF = {category: index for index, category in enumerate(CATEGORIES, 1)}


class COCO(FileDataset):
    """118,287 training and 5,000 validation images, background and 80 things; the images on disk are the lists.

    masks: folder under root with <id>.png of both parts (255 = crowd), as `render_masks` writes them.
    """

    name = "coco"
    classes = ("background", *THINGS)
    palette = colormap(81)
    pattern = r"\d{12}"
    where = (
        "Images: http://images.cocodataset.org/zips/train2017.zip and val2017.zip (expected in train2017, val2017); masks: "
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip, then mkd_core.data.coco.render_masks on both json files."
    )

    def __init__(self, root: str, masks: str = "masks"):
        self.root = find_root(self.name, root, ["train2017", "val2017"], self.where)
        self.masks = self.root / masks
        self.train, self.val = (tuple(sorted(p.stem for p in (self.root / part).glob("*.jpg"))) for part in ("train2017", "val2017"))
        self._val = frozenset(self.val)

    def files(self, id: str) -> tuple[Path, Path]:
        return self.root / ("val2017" if id in self._val else "train2017") / f"{id}.jpg", self.masks / f"{id}.png"


def render_masks(annotations: Path, out: Path, progress: Callable[[int, int], None] | None = None) -> int:
    """Write out/<id>.png (grey, 0..80, 255) for each image of an instances_*.json; returns how many were written.

    Rule (our choice, none is standard): objects are painted in decreasing order of area, so that small ones stay on top;
    crowds become 255, everything else 0. Masks that exist are kept, so that a second call continues a first.
    `progress(done, total)` is called after each image.
    """
    content = json.loads(Path(annotations).read_text())
    objects = defaultdict(list)
    for each in content["annotations"]:
        objects[each["image_id"]].append(each)
    Path(out).mkdir(parents=True, exist_ok=True)
    written = 0
    for done, image in enumerate(content["images"], 1):
        path = Path(out, f"{image['id']:012d}.png")
        if not path.exists():
            part = path.with_suffix(".part")
            Image.fromarray(_render(objects[image["id"]], image["height"], image["width"])).save(part, "png")
            os.replace(part, path)  # a killed run leaves no half mask under a final name
            written += 1
        if progress:
            progress(done, len(content["images"]))
    return written


def _render(objects: list[dict], height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    for each in sorted(objects, key=lambda each: (-each["area"], each["id"])):
        shape = each["segmentation"]
        parts = [decode_rle(shape)] if isinstance(shape, dict) else [fill_polygon(polygon, height, width) for polygon in shape]
        for part in parts:
            mask[part] = IGNORE if each["iscrowd"] else CLASS_OF[each["category_id"]]
    return mask


def fill_polygon(polygon: list[float], height: int, width: int) -> np.ndarray:
    """(H, W) bool: the pixels whose centre lies inside [x0, y0, x1, y1, ...], by the even-odd rule.

    On outlines it may differ from COCO's own rasteriser by a pixel; unlike PIL's polygon it has no bias in area.
    """
    x, y = np.reshape(polygon, (-1, 2)).T
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    centre = np.arange(height)[:, None] + 0.5
    row, edge = np.nonzero((y <= centre) != (next_y <= centre))
    crossing = x[edge] + (row + 0.5 - y[edge]) / (next_y - y)[edge] * (next_x - x)[edge]
    toggles = np.zeros((height, width + 1), np.int64)
    np.add.at(toggles, (row, np.ceil(crossing - 0.5).clip(0, width).astype(np.int64)), 1)
    return toggles.cumsum(1)[:, :width] % 2 == 1


def decode_rle(rle: dict) -> np.ndarray:
    """(H, W) bool from COCO's run lengths {"size": [H, W], "counts": list or compressed string}, column by column, off first."""
    counts = rle["counts"] if isinstance(rle["counts"], list) else _decompress(rle["counts"])
    height, width = rle["size"]
    if sum(counts) != height * width:
        raise DataError(f"run lengths add up to {sum(counts)}, not to {height} x {width} pixels")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def _decompress(text: str) -> list[int]:
    """COCO's strings: 5 bits a character, low ones first, bit 6 for "more follows"; from the 4th on, differences to two before."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return counts
