"""METHODS: every method by name, a plain dict. A new method is one file and one line here."""

from .advsemseg import AdvSemSeg
from .base import Batch, Build, Method, Terms
from .cct import CCT
from .cps import CPS
from .cutmix_seg import CutMixSeg
from .fixmatch import FixMatch
from .gct import GCT
from .mean_teacher import MeanTeacher
from .mkd import MKD
from .mkd_ablation import MKDAblation
from .pc2seg import PC2Seg
from .ps_mt import PSMT
from .pseudoseg import PseudoSeg
from .simple_baseline import SimpleBaseline
from .speed import SPEED
from .st_plus_plus import STPlusPlus
from .supervised import Supervised
from .u2pl import U2PL
from .unimatch import UniMatch
from .unimatch_v2 import UniMatchV2
from .vat import VAT

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "mean_teacher": MeanTeacher,
    "cutmix_seg": CutMixSeg,
    "cps": CPS,
    "mkd": MKD,
    "mkd_ablation": MKDAblation,
    "fixmatch": FixMatch,
    "unimatch": UniMatch,
    "unimatch_v2": UniMatchV2,
    "speed": SPEED,
    "vat": VAT,
    "ps_mt": PSMT,
    "advsemseg": AdvSemSeg,
    "gct": GCT,
    "u2pl": U2PL,
    "pc2seg": PC2Seg,
    "st_plus_plus": STPlusPlus,
    "cct": CCT,
    "pseudoseg": PseudoSeg,
    "simple_baseline": SimpleBaseline,
}

__all__ = ["METHODS", "Batch", "Build", "Method", "Terms"]
