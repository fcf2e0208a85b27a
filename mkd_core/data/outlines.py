"""Outlines that people drew, in labelme's JSON files or in one of COCO's kind, as masks of class indices."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .base import IGNORE, DataError, some
from .coco import paint, read_instances
from .masks import VOID, Meaning
from .pictures import absolute


class Drawing(NamedTuple):
    """The outlines of one photo."""

    place: Path  # of the photo as the file has it, below the folder of all
    size: tuple[int, int]  # its height and width
    objects: list[tuple[dict[str, Any], str]]  # as COCO writes them, and the names of their classes


def read_drawings(path: Path, root: Path) -> dict[Path, Drawing]:
    """Read the drawings of a JSON file below `root`, {} where it is neither labelme's nor COCO's.

    The keys are the file itself or, in one of COCO's kind, the names of photos below it. labelme's shapes
    cover those before them in the file, as its own exporter has it; COCO's are painted as `coco.paint` does,
    small ones on top. Both are filled by pycocotools.
    DataError for a file that is damaged or holds what is no area.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict) or content.keys() >= {"images", "annotations", "categories"}:
            return _coco(path, root, content) if isinstance(content, dict) else {}
        if "shapes" not in content:
            return {}
        objects = [_shape(k, each) for k, each in enumerate(content["shapes"], 1)]
        size = int(content["imageHeight"]), int(content["imageWidth"])
        place = _place(path, root, content.get("imagePath") or "")
    except DataError as error:
        raise DataError(f"{path}: {error}".replace(f"{path}: {path}: ", f"{path}: ")) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not JSON as labelme or COCO has it ({error!r})") from error
    # A file that was renamed with its photo names the one of before.
    return {path: Drawing(place if (root / place).is_file() else path.relative_to(root), size, objects)}


def _place(path: Path, root: Path, name: str) -> Path:
    place = absolute(path.parent / name.replace("\\", "/"))
    return place.relative_to(root) if place.is_relative_to(root) else Path(place.name)


def _coco(path: Path, root: Path, content: dict[str, Any]) -> dict[Path, Drawing]:
    drawings, (_, images, objects) = {}, read_instances(path, content)
    for image in images:
        file, size = str(image["file_name"]), (image["height"], image["width"])
        drawings[path / file.lstrip("/")] = Drawing(_place(path, root, file), size, objects[image["id"]])
    return drawings


def _shape(number: int, shape: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """One of labelme's shapes as COCO's object; its area puts it above those before it."""
    kind, points = shape.get("shape_type") or "polygon", [(float(x), float(y)) for x, y in shape["points"]]
    if kind not in ("polygon", "rectangle", "circle") or len(points) < 2 + (kind == "polygon"):
        ways = "outlines are polygons of 3 points or more, rectangles and circles"
        raise DataError(f"shape {number} is a {kind} of {len(points)} points: {ways}")
    if kind == "circle":
        (x, y), radius = points[0], math.dist(points[0], points[1])
        turns = np.linspace(0, 2 * math.pi, 90).tolist()
        points = [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]
    elif kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    (left, right), (top, bottom) = ((min(side), max(side)) for side in zip(*points, strict=True))
    box = (left, top, right - left, bottom - top)  # for an outline that covers no pixel
    found = {"id": number, "segmentation": [sum(points, ())], "bbox": box, "area": -number}
    return found, str(shape["label"]).strip()


def understand_drawings(drawings: Mapping[Path, Drawing], classes: Sequence[str] | int | None) -> Meaning:
    """Say which classes the outlines are; classes: their names, default all labels, COCO's by their ids.

    What no outline covers is background, before them. Labels called as `masks.VOID` become 255.
    """
    objects = [each for drawing in drawings.values() for each in drawing.objects]
    ids = {name: each.get("category_id", 0) for each, name in objects}
    if isinstance(classes, int):
        raise DataError(f"outlines have names: {', '.join(sorted(ids))}; give these in your order, or none")
    index = {name: 0 for name in (*ids, *(classes or ())) if name.lower().strip("_") == "background"}
    index |= {name: IGNORE for name in (*ids, *(classes or ())) if name.lower() in VOID}
    ordered = classes or sorted(ids, key=lambda name: (str(ids[name]).zfill(9), name))
    names = [name for name in ordered if name not in index]
    index |= {name: k for k, name in enumerate(names, 1)}
    if other := ids.keys() - index.keys():
        file = next(file for file, of in drawings.items() if other & {name for _, name in of.objects})
        raise DataError(f"{some(sorted(other), 'labels')}, in {file} first, are not among {', '.join(names)}")

    def read(file: Path) -> np.ndarray:
        try:
            return paint([(each, index[name]) for each, name in drawings[file].objects], *drawings[file].size)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error

    notes = [f"outlines of {', '.join(names)}; what they leave free is background"]
    return Meaning(("background", *names), read, False, None, notes)
