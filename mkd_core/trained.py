"""What a run has trained, at hand: its method with the weights of a checkpoint, its classes and colours, a Predictor of its networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import records
from .choices import choose
from .config import RunConfig, read_config
from .data import DATASETS, open_dataset
from .data.base import colormap, local
from .evaluate import Predictor, pick_device
from .methods import Method
from .train import build_method


@dataclass(frozen=True)
class OpenRun:
    """A trained run: configuration, method in eval mode (its `predictors` are what was evaluated), class names, colours (C, 3) uint8."""

    folder: Path
    config: RunConfig
    checkpoint: str
    method: Method
    classes: list[str]
    palette: NDArray[np.uint8]
    device: torch.device

    def predictor(self, protocol: str = "") -> Predictor:
        """All its networks, by the run's protocol (or another), window and precision."""
        config = self.config
        return Predictor(
            self.method.predictors,
            protocol=protocol or config.protocol,
            window=config.crop,
            precision=config.precision,
            device=self.device,
        )


def open_run(run: RunConfig | str | Path, step: int | str | None = None, device: str = "auto") -> OpenRun:
    """A run by its configuration, its folder, or its id under runs/, with the weights of a checkpoint; no training images are needed.

    step: "best" (of the reported predictor's evaluations), or of a checkpoint-<step>.pt that the run kept; default: the last.
    ValueError for a run or a checkpoint that does not exist or is damaged. Torch's random state is left as it was.
    """
    folder = find_run(run)
    config, where = read_config(folder), pick_device(device)
    kept = sorted(path.name for path in folder.glob("checkpoint-*.pt"))
    name = "checkpoint.pt" if step is None else choose("checkpoint", f"checkpoint-{step}.pt", kept)
    state = read_checkpoint(folder / name, where)["method"]
    names, palette = _classes(config, folder)
    try:
        with torch.random.fork_rng():
            classes = next(len(value) for key, value in state.items() if key.endswith("classifier.weight"))
            # The checkpoint holds the encoder too: its ImageNet file may be gone.
            method = build_method(config.model_copy(update={"weights": ""}), classes).to(where)
        method.load_state_dict(state)
    except (RuntimeError, StopIteration) as error:
        raise ValueError(f"{folder / name} does not fit config.json beside it: {str(error)[:300]}") from error
    return OpenRun(folder, config, name, method.eval(), names, palette, where)


def find_run(run: RunConfig | str | Path) -> Path:
    """The folder of a run: given itself, below the project or by its id under runs/. ValueError that lists the runs there are."""
    if isinstance(run, RunConfig):
        run = records.RUNS / run.id
    for folder in (local(run), records.RUNS / run, records.ROOT / run):
        if (folder / "config.json").is_file():
            return folder
    known = sorted(path.parent.name for path in records.RUNS.glob("*/config.json"))
    return records.RUNS / choose("run (a folder, or an id under runs/)", str(run), known)


def _classes(config: RunConfig, folder: Path) -> tuple[list[str], NDArray[np.uint8]]:
    """Class names and colours: the data set's own; a person's folder may have gone, so the record's names come before those found there."""
    if config.dataset != "folder":
        made: Any = DATASETS[config.dataset]
        return list(made.classes), made.palette
    record, colours = records.load(folder), config.dataset_options["palette"]
    names = (
        record.classes
        if record
        else open_dataset(config.dataset, config.root, **config.dataset_options).classes
    )
    return list(names), colormap(len(names)) if colours is None else np.array(colours, np.uint8)


def read_checkpoint(path: Path, device: torch.device | str) -> dict[str, Any]:
    """The state that a run left; nothing is unpickled. ValueError where there is none or it is damaged."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if (
            not isinstance(state, dict)
            or not {"step", "method", "optimizers", "history", "data"} <= state.keys()
        ):
            raise KeyError("data")
        return state
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no checkpoint {path}: the run has not come that far, or did not keep it (keep_every)"
        ) from error
    except (
        PermissionError,
        IsADirectoryError,
        MemoryError,
        torch.OutOfMemoryError,
    ):  # not the file's fault: nothing to delete
        raise
    except Exception as error:  # torch raises half a dozen unrelated classes here, with advice to unpickle that nobody should follow
        raise ValueError(
            f"{path} is damaged, or no checkpoint of this suite ({type(error).__name__}); delete it, and record.json where there is one, and the run starts anew"
        ) from error
