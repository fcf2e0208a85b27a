"""mkd_core: Mutual Knowledge Distillation and the methods that it is compared with, in one loop.

A name is imported when it is first used: a command that trains nothing does not wait for torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "METHODS": "methods",
    "Grid": "config",
    "Record": "records",
    "RunConfig": "config",
    "explore": "explorer",
    "load_split": "data.splits",
    "open_dataset": "data",
    "open_run": "trained",
    "run": "runner",
    "prepare_folder": "suite.own_images",
    "pseudo_label": "suite.predict",
    "published": "suite.published",
    "report": "suite.report",
    "run_table": "suite.batch",
    "table": "suite.tables",
    "train_folder": "suite.own_images",
}
__all__ = list(_HOME)


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
