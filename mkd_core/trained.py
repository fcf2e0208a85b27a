"""What a run has trained, at hand: its method with the weights of a checkpoint, its classes and colours, a Predictor of its networks."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from . import checkpoints, records
from .choices import choose
from .config import RunConfig, read_config
from .data import DATASETS
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
        return Predictor.of(self.config, self.method.predictors, self.device, protocol)


def open_run(run: RunConfig | str | Path, step: int | str | None = None, device: str = "auto") -> OpenRun:
    """A run by its configuration, its folder, or its id under runs/, with the weights of a checkpoint; no training images are needed.

    step: "best" (of the reported predictor's evaluations), or of a checkpoint-<step>.pt that the run kept; default: the last.
    ValueError for a run or a checkpoint that does not exist or is damaged. Torch's random state is left as it was.
    """
    folder = find_run(run)
    config, where = read_config(folder), pick_device(device)
    kept = sorted(path.name for path in folder.glob("checkpoint-*.pt"))
    name = "checkpoint.pt" if step is None else choose("checkpoint", f"checkpoint-{step}.pt", kept)
    saved = checkpoints.read(folder / name, where)
    state, names = saved["method"], saved["classes"]  # kept there: a person's folder may have gone
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            # The checkpoint holds the encoder too: its ImageNet file may be gone.
            bare = {"weights": "", "weights2": "", "activation_checkpointing": False}
            method = build_method(config.model_copy(update=bare), len(names)).to(where)
        method.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{folder / name} does not fit config.json beside it: {str(error)[:300]}") from error
    colours = getattr(DATASETS[config.dataset], "palette", config.dataset_options.get("palette"))
    palette = colormap(len(names)) if colours is None else np.array(colours, np.uint8)
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
