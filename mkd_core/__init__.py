"""mkd_core: Mutual Knowledge Distillation and the methods that it is compared with, in one loop."""

from .config import Grid, RunConfig
from .data import open_dataset
from .data.splits import load_split
from .engine import evaluate, run, run_all, segment
from .methods import METHODS
from .records import Record, collect
from .tables import published, table

__all__ = [
    "METHODS",
    "Grid",
    "Record",
    "RunConfig",
    "collect",
    "evaluate",
    "load_split",
    "open_dataset",
    "published",
    "run",
    "run_all",
    "segment",
    "table",
]
