"""What the explorer shows of an image, without any widget: predictions of runs, made lazily and kept within a bound; maps and numbers of them."""

from __future__ import annotations

import copy
import io
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .. import records
from ..augment import geometry, normalise
from ..config import RunConfig, read_config
from ..data import open_dataset
from ..data.base import IGNORE
from ..data.splits import load_split
from ..data.stream import Crops
from ..evaluate import pick_device, probabilities
from ..methods import METHODS, Batch, Method
from ..metrics import confusion_matrix, miou
from ..models import SegNet
from ..runner import load_method
from ..suite.figures import to_image
from ..train import make_batch, seed_step

Array = NDArray[Any]
Runs = RunConfig | str | Path | Sequence[RunConfig | str | Path]
LAYERS = ("pseudo-labels", "labels", "confidence", "errors", "A ≠ B")
VIEWS = ("weak view", "strong view", "partner", "what the student sees")
HEAT = (matplotlib.colormaps["cividis"](np.linspace(0, 1, IGNORE))[:, :3] * 255).astype(np.uint8)
WRONG = np.array([[213, 30, 60], [255, 170, 120]], np.uint8)  # kept, not kept
MARK = np.array([[190, 40, 200]], np.uint8)


# Maps and numbers of one image.


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

    @property
    def nbytes(self) -> int:
        return self.classes.nbytes + self.probs.nbytes

    def pseudo_label(self, threshold: float) -> Array:
        """(H, W) uint8: the label where the confidence reaches the threshold, IGNORE elsewhere."""
        return np.where(self.confidence >= threshold, self.label, np.uint8(IGNORE))


def percent(part: Any, whole: Any) -> Any:
    """100 part / whole, NaN where there is nothing to count."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.asarray(part, float) / np.asarray(whole, float)


def by_class(prediction: Prediction, truth: Array | None, threshold: float, classes: int) -> dict[str, Array]:
    """Per predicted class and, last, over all: (C + 1,) float each, in percent, NaN where there is nothing to count.

    pixels of the image that are predicted so; those kept of them, confidence >= threshold; those right of the kept whose truth is known.
    """

    def count(mask: Array | None = None) -> Array:
        found = np.bincount((prediction.label if mask is None else prediction.label[mask]).ravel(), minlength=classes)
        return np.append(found, found.sum())

    keep = prediction.confidence >= threshold
    known = np.zeros_like(keep) if truth is None else keep & (truth != IGNORE)
    total, kept = count(), count(keep)
    right = percent(count(known & (prediction.label == truth)), count(known))
    return {"pixels": percent(total, total[-1]), "kept": percent(kept, total), "right": right}


def accuracy_curve(prediction: Prediction, truth: Array) -> Array:
    """(257, 3): thresholds j / 256, the share of the pixels of known truth that each keeps, their accuracy, in percent; NaN where none is kept."""
    known = truth != IGNORE
    level = (prediction.confidence[known] * 256).astype(np.intp)  # exact: a power of two
    right = (prediction.label == truth)[known]
    kept, good = (np.bincount(level, weights=w, minlength=257)[:257][::-1].cumsum()[::-1] for w in (None, right))
    return np.stack([np.arange(257) / 256, percent(kept, known.sum()), percent(good, kept)], 1)


def layer(name: str, found: Prediction, other: Array | None, truth: Array | None, threshold: float, palette: Array) -> tuple[Array, Array]:
    """A layer of LAYERS as (H, W) uint8 indices, IGNORE where nothing is shown, and their colours (n, 3) uint8.

    "errors": 0 wrong and kept, 1 wrong and not kept. "A ≠ B": 0 where `other`, the other pane's label map, differs. "confidence": 0 .. 254.
    """
    nothing = np.full(found.label.shape, IGNORE, np.uint8)
    if name == "confidence":
        return np.round(found.confidence * (IGNORE - 1)).astype(np.uint8), HEAT
    if name == "errors":
        wrong = nothing != IGNORE if truth is None else (truth != IGNORE) & (found.label != truth)
        return np.where(wrong, (found.confidence < threshold).astype(np.uint8), nothing), WRONG
    if name == "A ≠ B":
        differ = nothing != IGNORE if other is None else (other != IGNORE) & (found.label != other)
        return np.where(differ, np.uint8(0), nothing), MARK
    return (found.label if name == "labels" else found.pseudo_label(threshold)), palette


def palette_picture(mask: Array, colours: Array) -> Image.Image:
    """(H, W) uint8 indices as a palette picture; the colours (n, 3) uint8 are filled up, so that IGNORE has one too: light grey."""
    picture = Image.fromarray(mask)
    picture.putpalette(colours.tobytes().ljust(3 * IGNORE, b"\0") + bytes([224] * 3))
    return picture


def mask_png(mask: Array, colours: Array) -> bytes:
    """(H, W) uint8 indices -> a palette PNG in which IGNORE is clear."""
    buffer = io.BytesIO()
    palette_picture(mask, colours).save(buffer, "PNG", compress_level=1, transparency=bytes([255] * IGNORE + [0]))
    return buffer.getvalue()


def image_bytes(image: Array) -> bytes:
    """(H, W, 3) uint8 -> PNG where it is small, JPEG where PNG would take the time of several frames."""
    buffer = io.BytesIO()
    small = image.size < 3 * 256**2
    Image.fromarray(image).save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 92}))
    return buffer.getvalue()


def write_new(folder: Path, stem: str, picture: Image.Image) -> Path:
    """folder/stem.png, or stem-2.png, ... where that is taken: nothing is overwritten, and a file appears whole or not at all."""
    stem = re.sub(r"[^\w.-]+", "_", stem)
    names = (folder / f"{stem}{'' if k == 1 else f'-{k}'}.png" for k in itertools.count(1))
    path = next(name for name in names if not name.exists())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    records.write_atomically(path, buffer.getvalue())
    return path


# Runs, opened read-only.


class Recent:
    """The values used last, as many as fit into `limit`, in whatever unit `cost` counts."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.items: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any], cost: Callable[[Any], int] = lambda value: 1) -> Any:
        """The value of `key`, made where it is not kept; the least recently used ones go until the rest fits."""
        if key in self.items:
            self.items.move_to_end(key)
            return self.items[key][0]
        value = make()
        self.items[key] = value, cost(value)
        self.used += self.items[key][1]
        while self.used > self.limit:
            self.used -= self.items.popitem(last=False)[1][1]
        return value


def labeler(names: Sequence[str]) -> str:
    """The network that labels: the first teacher, else the first predictor."""
    return next((name for name in names if name.startswith("teacher")), names[0])


class Study:
    """Runs on the same data, their predictions made when asked for and kept while `memory` bytes suffice. Nothing is written.

    runs: folders (absolute, or under the runs folder or the project), configurations, or a list of them; finished or still training.
    ValueError where a run or its first checkpoint is not there, or where the data sets differ.
    """

    def __init__(self, runs: Runs, memory: int = 2**29, device: str = "auto"):
        named = [runs] if isinstance(runs, RunConfig | str | Path) or not isinstance(runs, Sequence) else list(runs)
        for run in named:
            if not isinstance(run, RunConfig | str | Path):
                raise ValueError(f"a run is named by its folder or its configuration, not by {run!r}")
        self.folders = [self._find(run) for run in named]
        if not self.folders:
            raise ValueError("there is no run to explore: name a run folder, or train one first (make demo)")
        self.configs = [read_config(folder) for folder in self.folders]
        for k, config in enumerate(self.configs):
            self.checkpoints(k)
            if self._data_of(config) != self._data_of(self.configs[0]):
                raise ValueError(
                    f"runs are compared on the same data; {self.folders[0].name} and {self.folders[k].name} have different ones"
                )
        methods = [config.method for config in self.configs]
        self.names = [m if methods.count(m) == 1 else f.name for m, f in zip(methods, self.folders, strict=True)]
        first = self.configs[0]
        self.data = open_dataset(first.dataset, first.root, **first.dataset_options)
        self.palette = self.data.palette
        split = load_split(self.data, first.split, first.seed)
        sets = {"unlabeled": split.unlabeled, "labeled": split.labeled, "val": self.data.val}
        self.sets = {name: ids for name, ids in sets.items() if ids}
        self.device = pick_device(device)
        self.cache, self.methods, self.scores = Recent(memory), Recent(2), Recent(100_000)

    @staticmethod
    def _find(run: RunConfig | str | Path) -> Path:
        if isinstance(run, RunConfig):
            return records.RUNS / run.id
        return next((p for p in (Path(run), records.RUNS / run, records.ROOT / run) if (p / "config.json").is_file()), Path(run))

    @staticmethod
    def _data_of(config: RunConfig) -> tuple[Any, ...]:
        return config.dataset, Path(config.root).name, config.dataset_options

    def checkpoints(self, run: int) -> dict[str, str]:
        """What there is now, in the order of training: "step 500" -> file name; "last" is the newest or the final one."""
        folder, config = self.folders[run], self.configs[run]
        kept = {int(m[1]): p.name for p in folder.glob("checkpoint-*.pt") if (m := re.fullmatch(r"checkpoint-(\d+)\.pt", p.name))}
        found = {f"step {step:,}": kept[step] for step in sorted(kept) if step != config.steps}
        found |= {"last": "checkpoint.pt"} if (folder / "checkpoint.pt").exists() else {}
        if not found:
            raise ValueError(
                f"{folder} has no checkpoint yet: the first one comes after {min(config.checkpoint_every, config.steps):,} steps"
            )
        return found

    def _key(self, run: int, checkpoint: str) -> tuple[Hashable, ...]:
        path = self.folders[run] / checkpoint  # its time too: a run that still trains replaces it
        return path, path.stat().st_mtime_ns if path.exists() else 0

    def method(self, run: int, checkpoint: str) -> Method:
        def load() -> Method:
            with torch.random.fork_rng(devices=[]):
                return load_method(self.folders[run], self.device, checkpoint)

        return self.methods.get(self._key(run, checkpoint), load)

    def predictors(self, run: int, checkpoint: str) -> list[str]:
        names = list(self.method(run, checkpoint).predictors)
        return [*names, "mean"] if len(names) > 1 else names

    def image(self, id: str) -> Array:
        """(H, W, 3) uint8."""
        return self.cache.get(("image", id), lambda: self.data.image(id).permute(1, 2, 0).numpy(), lambda image: image.nbytes)

    def truth(self, id: str) -> Array | None:
        """(H, W) uint8, None where there is none; ValueError where it has not the size of its image."""
        if not self.data.has_label(id):
            return None
        label = self.cache.get(("truth", id), lambda: self.data.label(id).numpy(), lambda label: label.nbytes)
        if label.shape != (size := self.image(id).shape[:2]):
            raise ValueError(f"{id}: its mask has {label.shape} pixels (height, width), the image {size}; mkd check names all such files")
        return label

    def predict(self, run: int, checkpoint: str, id: str) -> dict[str, Prediction]:
        """Every predictor of a run on an image, by the run's own protocol and precision; "mean": of their probabilities."""
        return self.cache.get(
            (self._key(run, checkpoint), id),
            lambda: self._predict(run, checkpoint, id),
            lambda found: sum(p.nbytes for p in found.values()),
        )

    @torch.no_grad()
    def _predict(self, run: int, checkpoint: str, id: str) -> dict[str, Prediction]:
        config = self.configs[run]
        image = normalise(self.data.image(id)[None].to(self.device).float() / 255)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            nets = self.method(run, checkpoint).predictors
            found = {name: probabilities(net, image, config.protocol, config.crop)[0] for name, net in nets.items()}
        if len(found) > 1:
            found["mean"] = torch.stack(list(found.values())).mean(0)
        classes = len(self.data.classes)
        if any(len(prob) != classes for prob in found.values()):
            raise ValueError(f"{self.folders[run].name} was trained on another number of classes than the {classes} of its data set now")
        best = {name: prob.topk(min(3, classes), 0) for name, prob in found.items()}
        return {name: Prediction(b.indices.to("cpu", torch.uint8).numpy(), b.values.float().cpu().numpy()) for name, b in best.items()}

    def score(self, a: tuple[int, str, str], b: tuple[int, str, str], id: str) -> dict[str, Any]:
        """What images are found by, of (run, checkpoint, predictor) a: mean confidence, mIoU in percent (None without truth), classes that it
        predicts; and the share of pixels on which b has another label."""

        def make() -> dict[str, Any]:
            one, other, truth = self.predict(*a[:2], id)[a[2]], self.predict(*b[:2], id)[b[2]], self.truth(id)
            return {
                "differ": float((one.label != other.label).mean()), "confidence": float(one.confidence.mean()),
                "miou": None if truth is None else self.miou(one, truth), "classes": frozenset(np.unique(one.label).tolist()),
            }  # fmt: skip

        return self.scores.get((self._key(*a[:2]), a[2], self._key(*b[:2]), b[2], id), make)

    def miou(self, found: Prediction, truth: Array) -> float:
        return miou(confusion_matrix(torch.from_numpy(found.label), torch.from_numpy(truth), len(self.data.classes)))

    def view(self, name: str, run: int, checkpoint: str, id: str, draw: int) -> tuple[Array, Array, str]:
        """One of VIEWS in draw number `draw` of the run's augmentation: (h, w, 3) uint8; the CutMix mask (h, w) bool, True where the image
        keeps its own pixels; the partner's id.

        What the student sees: the method itself makes a step's losses on the image and its partner, and what its first student is fed for
        the image last is shown; the weak view where that is nothing, as with SupOnly.
        """
        return self.cache.get(
            (self._key(run, checkpoint), id, draw, name),
            lambda: self._view(name, run, checkpoint, id, draw),
            lambda found: found[0].nbytes + found[1].nbytes,
        )

    def _view(self, name: str, run: int, checkpoint: str, id: str, draw: int) -> tuple[Array, Array, str]:
        config, method = self.configs[run], self.method(run, checkpoint)
        rng = np.random.default_rng([config.seed, draw])
        others = [i for i in self.sets.get("unlabeled", ()) if i != id]
        if not others:
            raise ValueError("the split has no other unlabeled image that could be the CutMix partner")
        partner = others[rng.integers(len(others))]

        def crops(ids: Sequence[str], labels: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
            found = [geometry(self.data.image(i), y, config.crop, config.scale, config.base, rng) for i, y in zip(ids, labels, strict=True)]
            return tuple(torch.stack(part) for part in zip(*found, strict=True))

        images, unknown, valid = crops((id, partner), (None, None))
        known = rng.choice(self.sets["labeled"], 2).tolist()
        x, y, _ = crops(known, [self.data.label(i) for i in known])
        with torch.random.fork_rng():
            seed_step(config.seed, draw)
            batch = make_batch(Crops(x, y, images, valid, unknown), config, max(1, method.views), self.device)
            shown = {"weak view": batch.weak[0], "strong view": batch.strong[0][0], "partner": batch.weak[1]}
            view = shown[name] if name in shown else _fed(copy.deepcopy(method), batch)
        pasted = [(view[None] == torch.stack([of[k] for of in (batch.weak, *batch.strong)])).all(1).any(0) for k in (0, 1)]
        own = (pasted[0] | ~pasted[1]).cpu().numpy() if name == VIEWS[-1] else np.ones(config.crop, bool)
        return np.round(255 * to_image(view)).astype(np.uint8), own, partner


def _fed(method: Method, batch: Batch) -> Tensor:
    """(3, H, W): what the first student of a method, which this changes, is fed with gradient for the first unlabeled image, the last time."""
    student = next(net for net in method.predictors.values() if isinstance(net, SegNet))
    fed: list[Tensor] = []
    student.encoder.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].detach()) if torch.is_grad_enabled() else None)
    method.train()(batch, 1.0)
    unlabeled = ([row for row in rows if not any(torch.equal(row, labeled) for labeled in batch.x)] for rows in reversed(fed))
    return next(filter(None, unlabeled), batch.weak)[0]


def newest_runs(place: Path | None = None) -> list[Path]:
    """The run with the newest checkpoint and those on the same data, split and seed for as many steps: MKD, then what it is compared with."""
    found: dict[Path, RunConfig] = {}
    for path in sorted((place or records.RUNS).glob("*/checkpoint.pt"), key=lambda p: -p.stat().st_mtime):
        try:
            found[path.parent] = read_config(path.parent)
        except ValueError:  # of another version of the suite: not comparable
            continue
    alike = [(c.dataset, c.root, c.dataset_options, c.split, c.seed, c.steps) for c in found.values()]
    same = [folder for folder, what in zip(found, alike, strict=True) if what == alike[0]]
    return sorted(same, key=lambda folder: ["mkd", "cps", *METHODS].index(found[folder].method))
