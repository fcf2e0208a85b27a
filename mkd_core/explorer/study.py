"""Runs as the explorer sees them: opened read-only, their predictions made when asked for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import records
from ..augment import geometry, mix, xor_boxes
from ..config import RunConfig, read_config
from ..data.base import IGNORE, folder_name, visible
from ..data.stream import Crops
from ..methods import METHODS
from ..metrics import confusion_matrix, miou
from ..prepare import open_data
from ..suite.figures import to_image
from ..train import make_batch
from ..trained import OpenRun, find_run, open_run

Array = NDArray[Any]
Runs = RunConfig | str | Path | Sequence[RunConfig | str | Path]
# its step, 0 for the last one; the time of its file: a run that still trains replaces it
Checkpoint = tuple[int, int]
VIEWS = ("weak view", "strong view", "partner", "CutMix")


@dataclass(frozen=True)
class Prediction:
    """One network on one image: the (up to) three likeliest classes of each pixel, best first."""

    classes: Array  # (k, H, W) uint8
    probs: Array  # (k, H, W) float32

    @property
    def label(self) -> Array:
        return self.classes[0]

    @property
    def confidence(self) -> Array:
        return self.probs[0]

    def pseudo_label(self, threshold: float) -> Array:
        """Return (H, W) uint8: the label where the confidence reaches the threshold, else IGNORE."""
        return np.where(self.confidence >= threshold, self.label, np.uint8(IGNORE))


def mean_iou(label: Array, truth: Array, classes: int) -> float:
    """Return the mIoU of one image in percent."""
    return miou(confusion_matrix(torch.from_numpy(label), torch.from_numpy(truth), classes))


def tell_apart(configs: Sequence[RunConfig], folders: Sequence[Path]) -> list[str]:
    """Name runs by their method, and those of one method by what differs between them too."""
    flat: list[dict[str, Any]] = [c.model_dump(exclude={"root", "options"}) | c.options for c in configs]
    names = []
    for mine in flat:
        others = [of for of in flat if of["method"] == mine["method"]]
        differ = [key for key in mine if any(of.get(key) != mine[key] for of in others)]
        names.append(" ".join([mine["method"], *(f"{key}={mine[key]}" for key in differ)]))
    return [n if names.count(n) == 1 else f"{n} {f.name}" for n, f in zip(names, folders, strict=True)]


class Study:
    """Runs on the same data, finished or still training. Nothing is written.

    ValueError where a run or its first checkpoint is missing, or where the data sets differ.
    """

    def __init__(self, runs: Runs, device: str = "auto"):
        named: Any = runs if isinstance(runs, list | tuple) else [runs]
        self.folders = [find_run(run) for run in named]
        if not self.folders:
            raise ValueError("there is no run to explore: name a run folder, or train one first (make demo)")
        self.configs, self.device = [read_config(folder) for folder in self.folders], device
        self.names = tell_apart(self.configs, self.folders)
        first = self.configs[0]
        data = [(c.dataset, folder_name(c.root), c.dataset_options) for c in self.configs]
        if odd := [folder for folder, its in zip(self.folders, data, strict=True) if its != data[0]]:
            raise ValueError(f"runs are compared on equal data; {odd[0].name} has other data than the first")
        self.data, split = open_data(first)
        self.classes = self.data.classes
        self.palette = visible(self.data.palette, self.classes)
        sets = {"unlabeled": split.unlabeled, "labeled": split.labeled, "val": self.data.val}
        self.sets = {name: list(ids) for name, ids in sets.items() if ids}
        # What was used last stays in memory: two networks, and what two panes show of six images.
        self.open, self.load = lru_cache(2)(self._open), lru_cache(32)(self._load)
        self.predict = lru_cache(12)(self._predict)

    def checkpoints(self, run: int) -> dict[str, Checkpoint]:
        """Return what there is now by name, in the order of training: "step 500", ..., "last"."""
        folder, config = self.folders[run], self.configs[run]
        times = {path.stem: path.stat().st_mtime_ns for path in folder.glob("checkpoint*.pt")}
        steps = sorted(int(m[1]) for name in times if (m := re.fullmatch(r"checkpoint-(\d+)", name)))
        kept = [step for step in steps if step != config.steps]
        found = {f"step {step:,}": (step, times[f"checkpoint-{step}"]) for step in kept}
        if "checkpoint" in times:
            found["last"] = 0, times["checkpoint"]
        if not found:
            first = min(config.checkpoint_every, config.steps)
            raise ValueError(f"{folder} has no checkpoint yet: the first one comes after {first:,} steps")
        return found

    def _open(self, run: int, checkpoint: Checkpoint) -> OpenRun:
        return open_run(self.folders[run], checkpoint[0] or None, self.device)

    def _load(self, id: str) -> tuple[Array, Array | None]:
        """Return an image, (H, W, 3) uint8, and its truth, (H, W) uint8, None where there is none."""
        image = self.data.image(id).permute(1, 2, 0).numpy()
        truth = self.data.label(id).numpy() if self.data.has_label(id) else None
        if truth is not None and truth.shape != image.shape[:2]:
            raise ValueError(f"{id}: its mask has {truth.shape} pixels, the image {image.shape[:2]}")
        return image, truth

    def _predict(self, run: int, checkpoint: Checkpoint, id: str) -> dict[str, Prediction]:
        """Return what each network of a run predicts, as the run is evaluated; "mean" where several."""
        probs = self.open(run, checkpoint).predictor()(self.data.image(id)[None])
        # A stable sort decides ties as max does, by which pictures and scores are made.
        found = {}
        for name, prob in probs.items():
            best = prob[0].sort(dim=0, descending=True, stable=True)
            found[name] = Prediction(best.indices[:3].byte().cpu().numpy(), best.values[:3].cpu().numpy())
        return found

    def views(self, run: int, id: str, draw: int) -> dict[str, Array]:
        """Augment an image as the run does, in random draw number `draw`: VIEWS, (h, w, 3) uint8 each.

        CutMix mixes the image with a random partner, in the view that the method's students see: the
        strong one, or the weak one where it has none.
        """
        config = self.configs[run]
        rng = np.random.default_rng([config.seed, draw])
        others = [i for i in self.sets.get("unlabeled", []) if i != id] or [id]
        pair = [self.data.image(i) for i in (id, others[rng.integers(len(others))])]
        crops = [geometry(image, None, config.crop, config.scale, config.base, rng) for image in pair]
        u, label, valid = map(torch.stack, zip(*crops, strict=True))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**31)))
            batch = make_batch(Crops(u[:0], label[:0], u, valid, label), config, 1, torch.device("cpu"))
            own = xor_boxes(2, config.crop, boxes=config.options.get("boxes", 0))
        mixed = mix(batch.strong[0] if METHODS[config.method].views else batch.weak, own)
        views = zip(VIEWS, (batch.weak[0], batch.strong[0][0], batch.weak[1], mixed[0]), strict=True)
        return {name: (255 * to_image(view)).round().astype(np.uint8) for name, view in views}


def newest_runs(place: Path | None = None) -> list[Path]:
    """Find the run with the newest checkpoint and all that are comparable with it, MKD first.

    Comparable: the same data, split and seed, and as many steps. Runs on all labels count where none has few.
    """
    found: dict[Path, RunConfig] = {}
    for path in sorted((place or records.RUNS).glob("*/checkpoint.pt"), key=lambda p: -p.stat().st_mtime):
        try:
            found[path.parent] = read_config(path.parent)
        except (ValueError, OSError):  # of another version of the suite, or half removed
            continue
    alike = {f: (c.dataset, c.root, c.dataset_options, c.split, c.seed, c.steps) for f, c in found.items()}
    newest = min(found, key=lambda folder: found[folder].split == "full", default=None)
    same = [folder for folder in found if newest and alike[folder] == alike[newest]]
    return sorted(same, key=lambda folder: ["mkd", "cps", *METHODS].index(found[folder].method))
