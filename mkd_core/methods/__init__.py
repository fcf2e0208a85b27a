"""METHODS: every method by name, a plain dict. A new method is one file and one line here."""

from .advsemseg import AdvSemSeg
from .base import Batch, Build, Method, Terms
from .cps import CPS
from .cutmix_seg import CutMixSeg
from .mean_teacher import MeanTeacher
from .mkd import MKD
from .supervised import Supervised

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "mean_teacher": MeanTeacher,
    "cutmix_seg": CutMixSeg,
    "cps": CPS,
    "mkd": MKD,
    "advsemseg": AdvSemSeg,
}

__all__ = ["METHODS", "Batch", "Build", "Method", "Terms"]
