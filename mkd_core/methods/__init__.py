"""METHODS: every method by name, a plain dict. A new method is one file and one line here."""

from .base import Batch, Build, Method, Terms
from .cps import CPS
from .cutmix_seg import CutMixSeg
from .fixmatch import FixMatch
from .mean_teacher import MeanTeacher
from .mkd import MKD
from .ps_mt import PSMT
from .speed import SPEED
from .supervised import Supervised
from .unimatch import UniMatch
from .vat import VAT

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "mean_teacher": MeanTeacher,
    "cutmix_seg": CutMixSeg,
    "cps": CPS,
    "mkd": MKD,
    "fixmatch": FixMatch,
    "unimatch": UniMatch,
    "speed": SPEED,
    "vat": VAT,
    "ps_mt": PSMT,
}

__all__ = ["METHODS", "Batch", "Build", "Method", "Terms"]
