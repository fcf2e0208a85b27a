"""What the two panes show and say of an image: maps, numbers, and pictures of them."""

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image

from ..data.base import IGNORE
from ..suite.predict import count, indexed, save_png, shares
from .study import VIEWS, Array, Checkpoint, Prediction, Study, mean_iou

HEAT = (matplotlib.colormaps["cividis"](np.linspace(0, 1, IGNORE))[:, :3] * 255).astype(np.uint8)
WRONG = np.array([[213, 30, 60], [255, 170, 120]], np.uint8)  # kept, not kept
MARK = np.array([[190, 40, 200]], np.uint8)


class Choice(NamedTuple):
    """What is chosen for a pane."""

    run: int
    checkpoint: Checkpoint
    source: str  # "image", "truth", a predictor or one of VIEWS
    layer: str  # of LAYERS, for a predictor


@dataclass(frozen=True)
class Shown:
    """What a pane shows."""

    image: Array  # (h, w, 3) uint8
    mask: Array | None  # (h, w) uint8: indices of `colours`, IGNORE where the image stays free
    colours: Array  # (n, 3) uint8
    key: Sequence[tuple[str, str]]  # colours, "" for none, and what they mean
    found: Prediction | None
    labels: Array | None  # (h, w) uint8: classes of the prediction or the truth


# Numbers.


def percent(part: Any, whole: Any) -> Any:
    """Return 100 part / whole, NaN where there is nothing to count."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.asarray(part, float) / np.asarray(whole, float)


def number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1f}"


def by_class(found: Prediction, truth: Array | None, threshold: float, classes: int) -> dict[str, Array]:
    """Count per predicted class and, last, over all: (C + 1,) each, in percent, NaN where nothing is there.

    pixels: share of the image. kept: share of these whose confidence reaches the threshold.
    right: share of the kept ones whose label is the truth, where the truth is known.
    """
    counts = count(found.label, found.confidence >= threshold, truth, classes)
    return dict(zip(("pixels", "kept", "right"), shares(counts), strict=True))


def accuracy_curve(found: Prediction, truth: Array) -> Array:
    """Return (257, 3): thresholds j / 256, the share of the known pixels that each keeps, their accuracy.

    Both in percent; the accuracy is NaN where nothing is kept.
    """
    known = truth != IGNORE
    level = (found.confidence[known] * 256).astype(np.intp)  # exact: a power of two
    right = (found.label == truth)[known]
    counts = (np.bincount(level, weights=w, minlength=257)[:257] for w in (None, right))
    kept, good = (count[::-1].cumsum()[::-1] for count in counts)
    return np.stack([np.arange(257) / 256, percent(kept, known.sum()), percent(good, kept)], 1)


def describe(shown: Shown, truth: Array | None, threshold: float, classes: int) -> tuple[dict[str, Any], Any]:
    """Return what the browser says of a pane (summary, accuracy curve, its point at T), and `by_class`."""
    says: dict[str, Any] = {"size": shown.image.shape[1::-1], "key": shown.key, "numbers": ""}
    found, nothing = shown.found, np.full(classes, np.nan)
    if found is None:
        labels = np.zeros(0, np.uint8) if shown.labels is None else shown.labels
        pixels = percent(np.bincount(labels.ravel(), minlength=256), labels.size)
        return says, {"pixels": pixels, "kept": nothing, "right": nothing}
    table = by_class(found, truth, threshold, classes)
    says["numbers"] = f"kept {number(table['kept'][-1])} %"
    if truth is not None:
        iou, known = mean_iou(found.label, truth, classes), truth != IGNORE
        says["numbers"] += f" · right {number(table['right'][-1])} % of the kept · mIoU {number(iou)}"
        points = accuracy_curve(found, truth)[:, 1:]
        says["curve"] = np.round(points[~np.isnan(points).any(1)], 2).tolist()
        if (kept := (known & (found.confidence >= threshold)).sum()) > 0:
            says["now"] = [float(percent(kept, known.sum())), float(table["right"][-1])]
    return says, table


def legend(study: Study, tables: Sequence[dict[str, Array]]) -> list[dict[str, Any]]:
    """Return a row for each class that a pane shows, the largest first."""
    columns = [table[what][: len(study.classes)] for what in ("pixels", "kept", "right") for table in tables]
    size = np.nansum(columns[:2], 0)
    order = [c for c in np.argsort(-size, kind="stable") if size[c] > 0]
    cells = [[number(of[c]) for of in columns] for c in order]
    names = [{"name": study.classes[c], "colour": colour(study.palette[c])} for c in order]
    return [name | {"cells": of} for name, of in zip(names, cells, strict=True)]


def pixel(study: Study, shown: Sequence[Shown], truth: Array | None, x: int, y: int) -> str:
    """Say what a pixel of the image is in both panes."""
    parts = [f"x {x}, y {y}"]
    for letter, pane in zip("AB", shown, strict=True):
        if pane.found:
            likely = zip(pane.found.classes[:, y, x], 100 * pane.found.probs[:, y, x], strict=True)
            first, *rest = (f"{study.classes[c]} {p:.1f}" for c, p in likely)
            parts.append(f"{letter}: {first} % ({', '.join(rest)})")
    if truth is not None:
        parts.append(f"truth: {'none' if truth[y, x] == IGNORE else study.classes[truth[y, x]]}")
    return "   ".join(parts)


# Maps.


def layer(
    name: str, found: Prediction, other: Array | None, truth: Array | None, threshold: float, palette: Array
) -> tuple[Array, Array]:
    """Draw one of LAYERS: (H, W) uint8 indices, IGNORE where nothing is shown, and their (n, 3) colours.

    errors: 0 wrong and kept, 1 wrong and not kept. A ≠ B: 0 where `other`, the label map of the other
    pane, differs. confidence: 0 .. 254.
    """
    if name == "confidence":
        return np.round(found.confidence * (IGNORE - 1)).astype(np.uint8), HEAT
    if name in ("errors", "A ≠ B"):
        reference = truth if name == "errors" else other
        reference = found.label if reference is None else reference
        differ = (reference != IGNORE) & (found.label != reference)
        mark = (found.confidence < threshold).astype(np.uint8) if name == "errors" else np.uint8(0)
        return np.where(differ, mark, np.uint8(IGNORE)), WRONG if name == "errors" else MARK
    return (found.label if name == "labels" else found.pseudo_label(threshold)), palette


def colour(rgb: Array) -> str:
    return "#" + bytes(rgb.tolist()).hex()


LAYERS = {  # and what their colours mean
    "pseudo-labels": [("", "untinted: confidence below T")],
    "labels": [],
    "confidence": [(colour(HEAT[k]), text) for k, text in ((0, "0"), (127, "0.5"), (254, "1"))],
    "errors": [(colour(WRONG[0]), "wrong, kept"), (colour(WRONG[1]), "wrong, not kept")],
    "A ≠ B": [(colour(MARK[0]), "labels differ")],
}


def predicted(study: Study, choice: Choice, id: str) -> Prediction | None:
    """Return the chosen network's prediction, None where something else is chosen."""
    if choice.source in ("image", "truth", *VIEWS):
        return None
    found = study.predict(choice.run, choice.checkpoint, id)
    if choice.source not in found:
        raise ValueError(f"{study.names[choice.run]} has no {choice.source}; it has {', '.join(found)}")
    return found[choice.source]


def show(study: Study, id: str, choices: Sequence[Choice], threshold: float, draw: int) -> list[Shown]:
    """Make what each pane shows. draw: number of the random views."""
    image, truth = study.load(id)
    found = [predicted(study, choice, id) for choice in choices]
    pairs = zip(found, choices, strict=True)
    maps = [one.label if one else truth if choice.source == "truth" else None for one, choice in pairs]
    shown = []
    for choice, one, labels, other in zip(choices, found, maps, maps[::-1], strict=True):
        view = study.views(choice.run, id, draw)[choice.source] if choice.source in VIEWS else image
        mask, colours, key = labels, study.palette, LAYERS[choice.layer] if one else []
        if one:
            mask, colours = layer(choice.layer, one, other, truth, threshold, study.palette)
            if choice.layer == "pseudo-labels" and one.confidence.max() < threshold:
                key = [("", f"T keeps nothing: the highest confidence is {one.confidence.max():.2f}")]
            if choice.layer == "A ≠ B" and other is None:
                key = [("", "the other pane shows no labels")]
        if truth is None and (choice.source == "truth" or (one and choice.layer == "errors")):
            key = [("", "this image has no truth")]
        shown.append(Shown(view, mask, colours, key, one, labels))
    return shown


SORTS = {  # what of `score`, and by which sign: the smallest comes first
    "file order": ("", 1), "A and B differ most": ("differ", -1), "A least confident": ("confidence", 1),
    "A most confident": ("confidence", -1), "A worst mIoU": ("miou", 1), "A best mIoU": ("miou", -1),
}  # fmt: skip


def score(study: Study, id: str, a: Choice, b: Choice) -> dict[str, Any]:
    """Return what images are ordered by: of A's prediction, and the share of pixels where B differs.

    NaN where B shows no labels, or the image has no truth.
    """
    one, other, truth = predicted(study, a, id), predicted(study, b, id), study.load(id)[1]
    if one is None:
        raise RuntimeError("images are ordered by what pane A predicts: choose a network there")
    labels = other.label if other else truth if b.source == "truth" else None
    return {
        "differ": np.nan if labels is None else (one.label != labels).mean(),
        "confidence": one.confidence.mean(),
        "miou": np.nan if truth is None else mean_iou(one.label, truth, len(study.classes)),
        "classes": set(np.unique(one.label).tolist()),
    }


# Pictures.


def mask_png(shown: Shown) -> bytes:
    """Encode the mask as a palette PNG in which IGNORE is clear; b"" where there is none."""
    if shown.mask is None:
        return b""
    buffer, clear = io.BytesIO(), bytes([255] * IGNORE + [0])
    indexed(shown.mask, shown.colours).save(buffer, "PNG", compress_level=1, transparency=clear)
    return buffer.getvalue()


def image_bytes(image: Array, side: int = 0) -> bytes:
    """Encode (H, W, 3) uint8, at most `side` pixels large: PNG where small, else JPEG, which is faster."""
    buffer, picture = io.BytesIO(), Image.fromarray(image)
    if side:
        picture.thumbnail((2 * side, side))
    picture.save(buffer, "PNG" if picture.width * picture.height < 256**2 else "JPEG", quality=92)
    return buffer.getvalue()


def side_by_side(shown: Sequence[Shown], alpha: float) -> Image.Image:
    """Draw the panes as one picture of at least 480 rows."""
    tall = max(len(pane.image) for pane in shown)
    gap, times = max(1, tall // 48), max(1, 480 // tall)
    whole = Image.new("RGB", (sum(p.image.shape[1] + gap for p in shown) - gap, tall), "white")
    left = 0
    for pane in shown:
        whole.paste(Image.fromarray(pane.image), (left, 0))
        if pane.mask is not None:
            share = np.where(pane.mask == IGNORE, 0, round(255 * alpha)).astype(np.uint8)
            tint = indexed(pane.mask, pane.colours).convert("RGB")
            whole.paste(tint, (left, 0), Image.fromarray(share))
        left += pane.image.shape[1] + gap
    return whole.resize((whole.width * times, tall * times), Image.Resampling.NEAREST)


def write_new(folder: Path, stem: str, picture: Image.Image) -> Path:
    """Write folder/stem.png, or stem-2.png, ... where that exists: nothing is overwritten."""
    stem = re.sub(r"[^\w.-]+", "_", stem)
    names = (folder / f"{stem}{'' if k == 1 else f'-{k}'}.png" for k in itertools.count(1))
    path = next(name for name in names if not name.exists())
    save_png(picture, path)
    return path
