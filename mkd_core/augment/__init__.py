"""Augmentation: geometry (the weak view), colour on top of it (the strong view), CutMix boxes.

Geometry runs on uint8 in the loader's workers, with one random generator per sample.
Colour runs on float batches on the training device, with parameters drawn per sample.
Boxes are drawn on the host and cost one small transfer.
"""

from .boxes import beta_box, half_box, mix, partner, ratio_box, square, xor_boxes
from .colour import STRONG, chain, distort, one_of
from .weak import FILL, MEAN, STD, geometry, normalise

__all__ = [
    "FILL", "MEAN", "STD", "STRONG", "beta_box", "chain", "distort", "geometry", "half_box", "mix",
    "normalise", "one_of", "partner", "ratio_box", "square", "xor_boxes",
]  # fmt: skip
