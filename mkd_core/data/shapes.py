"""`shapes`, the embedded data set: textures told apart by pattern, made from a seed.

Every region is painted with one of five textures in two random colours. Colour misleads, and only the
local pattern names the class: few labels overfit and unlabeled images help. Recipe and numbers: our choice.
"""

from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from .base import SegDataset

CLASSES = ("smooth", "stripes", "checker", "dots", "rings")
# Okabe and Ito's
PALETTE = np.array([[86, 180, 233], [213, 94, 0], [204, 121, 167], [240, 228, 66], [0, 158, 115]], np.uint8)
SUPERSAMPLING = 2
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=16, multiple_of=16)]


class Shapes(SegDataset):
    """`train_size` + `val_size` labeled images of `size` x `size` pixels; image k depends on (set, k) alone.

    >>> Shapes(train_size=4, val_size=2).image("train/0003").shape
    torch.Size([3, 48, 48])
    """

    name = "shapes"
    classes = CLASSES
    palette = PALETTE

    def __init__(self, root: str = "", *, train_size: Count = 512, val_size: Count = 256, size: Side = 48):
        self.size = size
        self.train = tuple(f"train/{i:04d}" for i in range(train_size))
        self.val = tuple(f"val/{i:04d}" for i in range(val_size))

    def image(self, id: str) -> Tensor:
        return torch.from_numpy(_draw(id, self.size)[0])

    def label(self, id: str) -> Tensor:
        return torch.from_numpy(_draw(id, self.size)[1])


@lru_cache(maxsize=8192)  # 8 kB an image at 48 pixels: drawn once a process, then free
def _draw(id: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(image (3, size, size) uint8, label (size, size) uint8)."""
    subset, index = id.split("/")
    rng = np.random.default_rng([("train", "val").index(subset), int(index)])
    side = size * SUPERSAMPLING
    y, x = np.mgrid[:side, :side] / SUPERSAMPLING  # pixels
    order = rng.permutation(len(CLASSES))

    # Two grounds, parted by a wavy line.
    angle, wave = rng.uniform(0, 2 * np.pi, 2)
    across = (x - size / 2) * np.cos(angle) + (y - size / 2) * np.sin(angle)
    along = (y - size / 2) * np.cos(angle) - (x - size / 2) * np.sin(angle)
    middle, height = rng.uniform(-0.12, 0.12) * size, rng.uniform(2, 5)
    line = middle + height * np.sin(along * rng.uniform(0.12, 0.25) + wave)
    regions = [np.ones((side, side), bool), across > line]
    # One or two objects on top.
    for _ in range(rng.integers(1, 3)):
        regions.append(_object(x, y, rng, size))

    image, label = np.zeros((side, side, 3)), np.zeros((side, side), np.uint8)
    for region, kind in zip(regions, order, strict=False):
        image = np.where(region[..., None], _texture(int(kind), x, y, rng), image)
        label[region] = kind

    # Light: overall, a gradient, and sensor noise after averaging down.
    turn = rng.uniform(0, 2 * np.pi)
    light, slope = rng.uniform(0.6, 1.2), rng.uniform(0, 0.4)
    light = light * (1 + slope * ((x - size / 2) * np.cos(turn) + (y - size / 2) * np.sin(turn)) / size)
    image = (image * light[..., None]).reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean((1, 3))
    image = np.clip(image + rng.normal(0, 0.03, image.shape), 0, 1)
    label = label[::SUPERSAMPLING, ::SUPERSAMPLING].copy()
    return (image.transpose(2, 0, 1) * 255).round().astype(np.uint8), label


def _object(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """One of seven outlines, rotated, at a random place: (side, side) bool."""
    radius = rng.uniform(0.2, 0.32) * size
    cx, cy = rng.uniform(0.2, 0.8, 2) * size
    turn = rng.uniform(0, 2 * np.pi)
    u = ((x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)) / radius
    v = ((y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)) / radius
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    outlines = (
        lambda: r < 0.95,  # disk
        lambda: np.maximum(abs(u), abs(v)) < 0.8,  # square
        lambda: r * np.cos(theta % (2 * np.pi / 3) - np.pi / 3) < 0.55,  # triangle
        lambda: r < 0.75 + 0.35 * np.cos(5 * theta),  # star
        lambda: (np.minimum(abs(u), abs(v)) < 0.38) & (np.maximum(abs(u), abs(v)) < 1),  # cross
        lambda: (r < 1) & (r > 0.45),  # ring
        lambda: (r < 1) & (np.hypot(u - 0.5, v) > 0.7),  # crescent
    )
    return outlines[rng.integers(len(outlines))]()


def _texture(kind: int, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint a class's pattern of random period, turn and phase in two colours: (side, side, 3) in [0, 1]."""
    period, turn = rng.uniform(5, 7), rng.uniform(0, 2 * np.pi)
    u = 2 * np.pi * (x * np.cos(turn) + y * np.sin(turn)) / period + rng.uniform(0, 2 * np.pi)
    v = 2 * np.pi * (y * np.cos(turn) - x * np.sin(turn)) / period + rng.uniform(0, 2 * np.pi)
    if CLASSES[kind] == "smooth":
        wave = sum(_noise(cells, len(x), rng) / 2**octave for octave, cells in enumerate((3, 6, 12)))
    elif CLASSES[kind] == "stripes":
        wave = np.sin(u)
    elif CLASSES[kind] == "checker":
        wave = np.sin(u) * np.sin(v) * 1.5
    elif CLASSES[kind] == "dots":
        wave = 1.6 * (np.cos(u) + np.cos(v) - 0.55)
    else:
        cx, cy = rng.uniform(0, x.max(), 2)
        wave = np.sin(2 * np.pi * np.hypot(x - cx, y - cy) / period + rng.uniform(0, 2 * np.pi))
    mixing = 0.5 + 0.5 * np.tanh(2.5 * wave if kind else wave)
    first, second = _two_colours(kind, rng)
    return first + (second - first) * mixing[..., None]


def _two_colours(kind: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw two RGB colours at least 0.15 apart in mean brightness.

    Hues scatter by 0.12 turn about one that the class shares: a weak hint.
    """
    while True:
        hue = (kind / len(CLASSES) + rng.normal(0, 0.12, 2))[:, None]
        saturation, value = rng.uniform(0.25, 0.85, (2, 1)), rng.uniform(0.25, 1, (2, 1))
        sector = (np.array([0, 2 / 3, 1 / 3]) + hue) % 1 * 6
        colours = value * (1 - saturation * (1 - np.clip(abs(sector - 3) - 1, 0, 1)))
        if abs(colours[0].mean() - colours[1].mean()) >= 0.15:
            return colours[0], colours[1]


def _noise(cells: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """(side, side) smooth noise about 0 with `cells` bumps a side."""
    grid = Image.fromarray(rng.normal(0, 0.8, (cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))
