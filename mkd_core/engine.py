"""run(config) -> Record: fit, evaluate, checkpoint and resume. One loop, which does not know which method it trains.

A step is a function of (weights, seed, step): samples, views and every random draw are derived from the seed and the step number, so a
run that was killed goes on from its last checkpoint and ends with the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import records
from .augment import STRONG, distort, normalise
from .config import RunConfig, read_config
from .data import SegDataset, open_dataset
from .data.base import DataError, read_label
from .data.check import check
from .data.splits import Split, load_split
from .data.stream import Steps, Stream
from .methods import METHODS, Batch, Method
from .metrics import PseudoLabelQuality, confusion_matrix, iou, miou
from .models import SegNet, file_sha256, load_encoder, resize, weights_file
from .records import Record

QUALITY_THRESHOLD = 0.95  # MKD's T: pseudo-label quality is reported at it and at 0


class Busy(RuntimeError):
    """Another process is at this run."""


class NonFiniteLoss(RuntimeError):
    """Training met a loss that is not finite; the message names the step and its images. The last checkpoint is from before."""


def build_net(config: RunConfig, num_classes: int, arch: str | None = None) -> SegNet:
    """A freshly initialised network, the encoder from config.weights where given. Two calls differ in what is random."""
    try:
        net = SegNet(
            num_classes, arch=arch or config.arch, encoder=config.encoder, encoder_depth=config.encoder_depth, channels=config.channels, dropout=config.dropout,
            norm=config.norm, bn_momentum=config.bn_momentum,
        )  # fmt: skip
    except (AssertionError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:  # of smp, timm and torch
        raise ValueError(
            f"{arch or config.arch} on the encoder {config.encoder} cannot be built: {type(error).__name__} {error}"
        ) from error
    if config.weights:
        load_encoder(net, config.weights)
    return net


def build_method(config: RunConfig, num_classes: int) -> Method:
    """The method with networks initialised from the seed: the first network is the same for every method."""
    seed_step(config.seed, -1)
    method = METHODS[config.method](partial(build_net, config, num_classes), **config.options)
    if min(config.crop) < method.min_side:
        raise ValueError(f"{config.method} needs a crop of at least {method.min_side} x {method.min_side} pixels; got {config.crop}")
    if config.batch < method.min_batch:
        raise ValueError(
            f"{config.method} with these options needs a batch of at least {method.min_batch} (its images need a partner); got {config.batch}"
        )
    stage_marks(config, method)
    return method


def stage_marks(config: RunConfig, method: Method) -> list[int]:
    """Steps at which the stages of a method begin, and the last step."""
    marks = [0, *(round(share * config.steps) for share in method.stages), config.steps]
    if any(start >= end for start, end in pairwise(marks)):
        raise ValueError(f"{config.method} trains in {len(marks) - 1} stages; {config.steps} steps are too few for them")
    return marks


def prepare(config: RunConfig, deep: bool = False, progress: Callable[[int, int], None] | None = None) -> tuple[SegDataset, Split, Method]:
    """Data set, split and method of a run, after all that can be found wrong with them (DataError, ValueError); deep: opens every file."""
    dataset, split = _open(config)
    method = build_method(config, len(dataset.classes))
    _check_data(config, dataset, split, method.min_batch, deep, progress)
    return dataset, split, method


def faults(configs: Sequence[RunConfig]) -> dict[str, list[int]]:
    """What is wrong with weights, data, splits and methods of runs that have not begun: each fault once, with the positions of its runs.

    As `prepare` of each, but equal networks are built once and equal data looked through once: a table's columns share the former, its rows
    the latter. Where weights or data are missing, the method is built all the same, from random weights and for two classes.
    """
    networks = {
        "method",
        "options",
        "arch",
        "encoder",
        "encoder_depth",
        "weights",
        "channels",
        "dropout",
        "norm",
        "bn_momentum",
        "crop",
        "batch",
        "steps",
    }
    data = {"dataset", "root", "dataset_options", "split", "seed"}
    found: dict[str, list[int]] = {}
    looked: dict[tuple[Any, ...], tuple[Any, str]] = {}

    def once(i: int, look: Callable[[], Any], *key: Any) -> Any:
        """What `look` returns, or None with its fault noted for run i; not called again for the same key."""
        if key not in looked:
            try:
                looked[key] = look(), ""
            except ValueError as error:
                looked[key] = None, str(error)
        value, fault = looked[key]
        if fault and i not in (places := found.setdefault(fault, [])):
            places.append(i)
        return value

    for i, config in enumerate(configs):
        if config.weights and not once(i, partial(weights_file, config.weights), config.weights):
            config = config.model_copy(update={"weights": ""})
        images, nets = config.model_dump_json(include=data), config.model_dump_json(include=networks)
        opened = once(i, partial(_open, config), images)
        classes = len(opened[0].classes) if opened else 2
        min_batch = once(i, lambda c=config, n=classes: build_method(c, n).min_batch, config.dataset, nets)  # type: ignore[misc]
        if opened and min_batch:
            once(i, partial(_check_data, config, opened[0], opened[1], min_batch), images, min_batch > 1 and config.batch)
    return found


def _open(config: RunConfig) -> tuple[SegDataset, Split]:
    dataset = open_dataset(config.dataset, config.root, **config.dataset_options)
    return dataset, load_split(dataset, config.split, config.seed)


def _check_data(
    config: RunConfig, dataset: SegDataset, split: Split, min_batch: int, deep: bool = False, progress: Callable[[int, int], None] | None = None
) -> None:  # fmt: skip
    if not dataset.val:
        raise DataError(f"data set {config.dataset!r} names no images to evaluate. {dataset.where}")
    if min_batch > 1 and (found := len(split.unlabeled)) < config.batch:
        raise DataError(
            f"{config.method} pairs the images of a batch: split {config.split} has {found} unlabeled ones, batch is {config.batch}"
        )
    check(dataset, split, deep, progress).raise_if_bad()


def load_method(run: RunConfig | str | Path, device: torch.device | str = "cpu", checkpoint: str = "checkpoint.pt") -> Method:
    """The trained method of a run (its configuration or its folder), in eval mode; its `predictors` are what was evaluated.

    Rebuilt from config.json with the weights of `checkpoint`, a file of the folder; no data are needed. Like every build, it seeds torch.
    """
    folder = records.RUNS / run.id if isinstance(run, RunConfig) else Path(run)
    config = read_config(folder)
    state = read_checkpoint(folder / checkpoint, device)["method"]
    classes = next(len(value) for name, value in state.items() if name.endswith("classifier.weight"))
    # The checkpoint holds the encoder too: its ImageNet file may be gone.
    method = build_method(config.model_copy(update={"weights": ""}), classes).to(device)
    method.load_state_dict(state)
    return method.eval()


def read_checkpoint(path: Path, device: torch.device | str) -> dict[str, Any]:
    """The state that a run left; nothing is unpickled. ValueError where there is none or it is damaged."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or not {"step", "method", "optimizers", "history"} <= state.keys():
            raise KeyError("step, method, optimizers, history")
        return state
    except FileNotFoundError as error:
        raise ValueError(f"there is no checkpoint {path}: the run has not come that far, or did not keep it (keep_every)") from error
    except (PermissionError, IsADirectoryError, MemoryError, torch.OutOfMemoryError):  # not the file's fault: nothing to delete
        raise
    except Exception as error:  # torch raises half a dozen unrelated classes here, with advice to unpickle that nobody should follow
        raise ValueError(
            f"{path} is damaged, or no checkpoint of this suite ({type(error).__name__}); delete it, and record.json where there is one, and the run starts anew"
        ) from error


def seed_step(seed: int, step: int, *stage: int) -> None:
    """Make torch's random draws on every device a function of (seed, step); step -1: what comes before the first, or before a stage."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step + 1, *stage]).generate_state(1, np.uint64)[0] >> 1))


def make_batch(tensors: Sequence[Tensor], config: RunConfig, views: int, device: torch.device) -> Batch:
    """uint8 tensors of a step -> Batch on the device: colour views drawn there, normalised."""
    x, y, *unlabeled = (t.to(device, non_blocking=True) for t in tensors)
    u, valid, label = unlabeled or (x[:0], y[:0].bool(), y[:0])
    x, u = x.float() / 255, u.float() / 255
    # From the geometric view alone, as released.
    strong = tuple(normalise(STRONG[config.strong](u)) for _ in range(views if len(u) else 0))
    if config.weak_photometric:
        x, u = distort(x), distort(u)
    return Batch(normalise(x), y.long(), normalise(u), strong, valid, label.long())


def poly(config: RunConfig, step: int, start: int = 0, end: int = 0) -> float:
    """Share of the initial learning rate at a step of the stage [start, end); end 0: of the whole run."""
    return (1 - (step - start) / ((end or config.steps) - start)) ** config.power


def make_optimizers(config: RunConfig, method: Method) -> list[torch.optim.Optimizer]:
    """That of the networks, all but the encoders at head_lr times the rate, and, where the method has a critic, the critic's: Adam with betas (0.9, 0.99), as AdvSemSeg and GCT have it."""
    judges = list(method.critic[0].parameters()) if method.critic else []
    parameters: Any = [p for p in method.parameters() if p.requires_grad and not any(p is judge for judge in judges)]
    if config.head_lr != 1:
        inside = {p for net in method.modules() if isinstance(net, SegNet) for p in net.encoder.parameters()}
        parts = [[p for p in parameters if (p in inside) == encoder] for encoder in (True, False)]
        parameters = [{"params": part, "lr": lr} for part, lr in zip(parts, (config.lr, config.lr * config.head_lr), strict=True) if part]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "adamw":
        optimizers.append(torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True))
    else:
        optimizers.append(torch.optim.SGD(parameters, config.lr, momentum=0.9, weight_decay=config.weight_decay, fused=True))
    if method.critic:
        optimizers.append(torch.optim.Adam(judges, method.critic[1], betas=(0.9, 0.99), fused=True))
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


# Evaluation.


@torch.no_grad()
def probabilities(net: nn.Module, images: Tensor, protocol: str, window: tuple[int, int]) -> Tensor:
    """Class probabilities of normalised images (B, 3, H, W) of any size -> (B, C, H, W), by a named protocol.

    whole    the image at its own size, padded at the bottom and right where a side is no multiple of 16 (our choice for VOC and COCO)
    long512  resized so that the long side is 512, logits resized back (released MKD)
    sliding  windows of the crop's size, stride ceil(2/3 window), the last one shifted back inside (CPS); probabilities averaged (our choice)
    """
    size = images.shape[-2:]
    if protocol == "long512":
        factor = 512 / max(size)
        small = resize(images, (max(1, round(size[0] * factor)), max(1, round(size[1] * factor))))
        return resize(_padded(net, small), size).softmax(1)
    if protocol == "whole":
        return _padded(net, images).softmax(1)
    total: Tensor | float = 0.0
    count = images.new_zeros(1, 1, *size)
    for top in starts(size[0], window[0]):
        for left in starts(size[1], window[1]):
            where = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            prob = _padded(net, images[where]).softmax(1)
            if isinstance(total, float):
                total = images.new_zeros(len(images), prob.shape[1], *size)
            total[where] += prob
            count[where] += 1
    return total / count


def _padded(net: nn.Module, images: Tensor, multiple: int = 32) -> Tensor:
    height, width = images.shape[-2:]
    pad = (0, -width % multiple, 0, -height % multiple) if (height % 16 or width % 16) else (0, 0, 0, 0)
    return net(nn.functional.pad(images, pad))[..., :height, :width].float()


def starts(side: int, window: int) -> list[int]:
    """Where the windows of the sliding protocol begin along a side."""
    stride = math.ceil(window * 2 / 3)
    last = max(0, side - window)
    return sorted({min(s, last) for s in range(0, last + stride, stride)})


class _Items(Dataset):
    """(image, label) by position, for a loader."""

    def __init__(self, dataset: SegDataset, ids: Sequence[str]):
        self.dataset, self.ids = dataset, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.dataset.image(self.ids[i]), self.dataset.label(self.ids[i])


class _Images(Sequence[Tensor]):
    """Normalised images (1, 3, H, W) on the device by position, loaded when asked for, which `progress` is told."""

    def __init__(self, dataset: SegDataset, ids: Sequence[str], device: torch.device, progress: Callable[[str], None]):
        self.dataset, self.ids, self.device, self.progress = dataset, ids, device, progress

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: Any) -> Any:
        self.progress(f"image {i + 1:,} of {len(self):,}")
        return normalise(self.dataset.image(self.ids[i])[None].to(self.device).float() / 255)


class _Relabeled(SegDataset):
    """The images of a stage with the pseudo-labels that were written for it."""

    def __init__(self, dataset: SegDataset, ids: Sequence[str], folder: Path):
        self.dataset, self.folder = dataset, folder
        self.places = {id: i for i, id in enumerate(ids) if (folder / f"{i}.png").exists()}
        self.ids = tuple(self.places)
        if not self.ids:
            raise ValueError(f"the stage has no pseudo-labelled image in {folder}")

    def image(self, id: str) -> Tensor:
        return self.dataset.image(id)

    def label(self, id: str) -> Tensor:
        return read_label(self.folder / f"{self.places[id]}.png")

    def has_label(self, id: str) -> bool:
        return id in self.places


def _equal_sizes(items: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of consecutive images of one size, up to about a quarter of a megapixel: the same whatever the machine."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for image, label in items:
        if images and (image.shape != images[0].shape or len(images) * image[0].numel() >= 2**18):
            yield torch.stack(images), torch.stack(labels)
            images, labels = [], []
        images.append(image)
        labels.append(label)
    if images:
        yield torch.stack(images), torch.stack(labels)


@torch.no_grad()
def evaluate(
    nets: dict[str, nn.Module], dataset: SegDataset, ids: Sequence[str], *, protocol: str = "whole", window: tuple[int, int] = (512, 512),
    device: torch.device | str = "cpu", workers: int = 0, precision: str = "float32", quality: float | None = None,
) -> tuple[dict[str, Tensor], dict[str, PseudoLabelQuality]]:  # fmt: skip
    """Confusion matrices (C, C) of each network over the images `ids`, and of "mean", their averaged probabilities, where there are several.

    quality: a confidence threshold; with it, the pseudo-label quality of each network too. Networks are evaluated in eval mode and put
    back into the mode that they were in.
    """
    modes = {name: net.training for name, net in nets.items()}
    for net in nets.values():
        net.eval()
    classes = len(dataset.classes)
    names = [*nets, "mean"] if len(nets) > 1 else [*nets]
    confusion = {name: torch.zeros(classes, classes, dtype=torch.int64, device=device) for name in names}
    qualities = {name: PseudoLabelQuality(classes, quality, device) for name in names} if quality is not None else {}
    for images, labels in _equal_sizes(DataLoader(_Items(dataset, ids), batch_size=None, num_workers=workers)):
        images, labels = normalise(images.to(device).float() / 255), labels.to(device)
        found: dict[str, Tensor] = {}
        for name, net in nets.items():
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
                found[name] = probabilities(net, images, protocol, window)
        if "mean" in names:
            found["mean"] = torch.stack(list(found.values())).mean(0)
        for name, prob in found.items():
            confusion[name] += confusion_matrix(prob.max(1).indices, labels, classes)
            if qualities:
                qualities[name].update(prob, labels)
    for name, net in nets.items():
        net.train(modes[name])
    return confusion, qualities


@torch.no_grad()
def segment(
    net: nn.Module, dataset: SegDataset, ids: Sequence[str], *, protocol: str = "whole", window: tuple[int, int] = (512, 512),
    device: torch.device | str = "cpu",
) -> list[Tensor]:  # fmt: skip
    """Predicted labels (H, W) uint8 on the host, one map an image, at the image's own size."""
    mode = net.training
    net.eval()
    images = (normalise(dataset.image(id)[None].to(device).float() / 255) for id in ids)
    labels = [probabilities(net, image, protocol, window).max(1).indices[0].to("cpu", torch.uint8) for image in images]
    net.train(mode)
    return labels


# Running.


class Progress:
    """One line about the run: a single notebook output that is updated, or a line every few seconds in a terminal. Quiet: nothing."""

    def __init__(self, title: str, quiet: bool = False):
        self.title, self.quiet, self.handle, self.last = title, quiet, None, 0.0
        self.notebook = not quiet and "ipykernel" in sys.modules

    def __call__(self, text: str, now: bool = False) -> None:
        if self.quiet or (not now and time.monotonic() - self.last < (0.5 if self.notebook else 10)):
            return
        self.last = time.monotonic()
        line = f"{self.title}: {text}"
        if not self.notebook:
            print(line, flush=True)
            return
        from IPython.display import Pretty, display

        if self.handle is None:
            self.handle = display(Pretty(line), display_id=True)
        else:
            self.handle.update(Pretty(line))
        if path := os.environ.get("MKD_PROGRESS"):  # `mkd run` shows it in its terminal: papermill passes no updates on
            Path(path).write_text(line)


def pick_device(name: str) -> torch.device:
    """ "auto": the first GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>; got {name!r}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} asked for, but torch sees {torch.cuda.device_count()} GPUs")
    return device


def run(config: RunConfig, runs: Path | None = None, quiet: bool = False) -> Record:
    """Train and evaluate one configuration; resume it where it was interrupted; return its record at once where it exists.

    Everything that can be wrong with the input is checked before the first step. Raises DataError, ValueError, NonFiniteLoss; Busy where
    another process is at the same run.
    """
    folder = (runs or records.RUNS) / config.id
    if found := records.load(folder):
        if found.id != config.id or found.status != "done":
            raise ValueError(f"{folder / 'record.json'} is the record of another run ({found.id}, {found.status}); delete it")
        _refuse_other_images(config, found, folder)
        return found
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=1):  # is_busy() of another process holds it for a moment
            try:
                return records.load(folder) or _Run(config, folder, quiet).finish()
            finally:
                if not (folder / "config.json").exists():  # refused before it began; a notebook that is being executed may lie here
                    (folder / "lock").unlink(missing_ok=True)
                    with suppress(OSError):
                        folder.rmdir()
    except Timeout as error:
        raise Busy(f"another process is at run {config.id} (it holds {folder / 'lock'}); wait for it or stop it") from error


def _refuse_other_images(config: RunConfig, record: Record, folder: Path) -> None:
    """An id does not name the folder of the data: other images under the same names and lists are another run. Absent data prove nothing."""
    try:
        dataset, split = _open(config)
    except DataError:
        return
    now = {"labeled images": split.sha256, "unlabeled images": split.sha256_unlabeled, "number of evaluated images": len(dataset.val)}
    then = [record.split["sha256"], record.split["sha256_unlabeled"], record.evaluated["images"]]
    if (before := record.split.get("files")) and (found := file_sizes(dataset, split)):  # records from before they were kept have none
        now["sizes of files"] = found
        then.append(before)
    if changed := [what for (what, value), old in zip(now.items(), then, strict=True) if value != old]:
        raise ValueError(
            f"{folder} holds the record of a run with other data ({', '.join(changed)}) than {config.root or config.dataset} has now; "
            f"delete it, or keep the new runs apart (MKD_RUNS)"
        )


def file_sizes(dataset: SegDataset, split: Split) -> str:
    """Hex sha256 of the sizes in bytes of every image and mask of a run on one's own folder: cheap, and others under the same names show.

    "" where a file is missing, and for the paper's data sets, whose names say what is in them.
    """
    if dataset.name != "folder":
        return ""
    digest = hashlib.sha256()
    for id in (*split.labeled, *split.unlabeled, *dataset.val):
        for file in filter(None, dataset.files(id)):
            if not file.is_file():
                return ""
            digest.update(f"{file.stat().st_size}\n".encode())
    return digest.hexdigest()


def is_busy(folder: Path) -> bool:
    """Does a process hold the lock of this run folder, here or on another host that shares it?"""
    if not (folder / "lock").exists():
        return False
    try:
        with FileLock(folder / "lock", timeout=0):
            return False
    except Timeout:
        return True


def run_all(configs: Sequence[RunConfig], slots: int = 1, runs: Path | None = None) -> list[Record]:
    """run() for each configuration, `slots` at a time, each in a fresh process; what has a record is not run. The longest should come first.

    The first error stops the runs that have not begun and is raised.
    """
    if slots < 1:
        raise ValueError(f"slots must be at least 1; got {slots}")
    place = runs or records.RUNS
    missing = [config for config in configs if not records.load(place / config.id)]
    if bad := faults(missing):  # what is wrong with the last is found before the first has trained
        raise ValueError("\n".join(bad))
    if slots == 1 or len(missing) < 2:
        return [run(config, runs) for config in configs]
    show, started = Progress(f"{len(missing)} runs"), time.monotonic()
    with ProcessPoolExecutor(
        slots, multiprocessing.get_context("spawn"), max_tasks_per_child=1, initializer=_worker, initargs=(slots,)
    ) as pool:
        futures = [pool.submit(run, config, runs, True) for config in missing]
        while not all(f.done() for f in futures):
            if error := next((e for f in futures if f.done() and not f.cancelled() and (e := f.exception())), None):
                show(f"a run failed, those that run now are finished first: {error}", now=True)
                pool.shutdown(cancel_futures=True)
                raise error
            active = [config for config, f in zip(missing, futures, strict=True) if f.running()][:slots]
            lines = [f"{c.method} seed {c.seed} {_share(place / c.id, c)}" for c in active]
            done = sum(f.done() for f in futures)
            show(f"{done} done; {'; '.join(lines)}; {time.monotonic() - started:.0f} s")
            time.sleep(0.5)
        show(f"{len(missing)} done in {time.monotonic() - started:.0f} s", now=True)
    return [run(config, runs) for config in configs]


def _share(folder: Path, config: RunConfig) -> str:
    rows = records.history(folder)
    return f"{100 * rows[-1]['step'] / config.steps:.0f} %" if rows else "starts"


def _worker(slots: int) -> None:
    """A worker takes its share of the cores, and ends when its parent is killed; its run goes on from the checkpoint next time."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // slots))

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Run:
    """Set-up, loop and record of one run; what a checkpoint must hold is in `state`."""

    def __init__(self, config: RunConfig, folder: Path, quiet: bool):
        self.config, self.folder = config, folder
        self.progress = Progress(config.id, quiet)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = pick_device(config.device)
        self.workers = min(config.workers, os.cpu_count() or 1)  # results do not depend on them
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # Every file is opened before the first step; a run that goes on has been through that.
        deep = not (folder / "checkpoint.pt").exists()
        self.dataset, self.split, self.method = prepare(config, deep, lambda done, of: self.progress(f"checking file {done:,} of {of:,}"))
        self.method.to(self.device)
        self.optimizers = make_optimizers(config, self.method)
        self.stream = partial(Stream, seed=config.seed, crop=config.crop, scale=config.scale, base=config.base)
        self.labeled = self.stream(self.dataset, self.split.labeled, name="labeled", labeled=True)
        unlabeled = self.stream(self.dataset, self.split.unlabeled, name="unlabeled", labeled=False, block=config.batch)
        self.steps = Steps(self.labeled, unlabeled if self.method.unlabeled else None, config.batch)
        self.marks = stage_marks(config, self.method)
        withheld = [i for i in self.split.unlabeled if self.dataset.has_label(i)]
        rng = np.random.default_rng(config.seed)
        self.withheld = [withheld[i] for i in sorted(rng.permutation(len(withheld))[: config.quality_images])]
        self.history: list[dict[str, Any]] = []
        self.step, self.seconds, self.seconds_training = 0, 0.0, 0.0
        records.write_atomically(folder / "config.json", config.model_dump_json(indent=1) + "\n")
        self._restore()

    def finish(self) -> Record:
        self._fit()
        record = self._record()
        records.save(record, self.folder)
        for labels in self.folder.glob("labels-*"):
            shutil.rmtree(labels)
        self.progress(f"done, mIoU {record.miou:.1f} in {record.seconds:.0f} s", now=True)
        return record

    # The loop.

    def _fit(self) -> None:
        for stage, (start, end) in enumerate(pairwise(self.marks)):
            if self.step < end:
                if stage:
                    self._enter(stage, anew=self.step == start)
                self._train(start, end)

    def _enter(self, stage: int, anew: bool) -> None:
        """Pseudo-labels of a stage, written before its first step and read back through the loader: they share the image's geometry."""
        config, before, folder = self.config, self.folder / f"labels-{stage - 1}", self.folder / f"labels-{stage}"
        if (stage > 1 or not anew) and not (needed := before if anew else folder).is_dir():
            raise ValueError(f"{needed}, the pseudo-labels of stage {stage - anew}, is gone; delete {self.folder} and the run starts anew")
        if anew:
            began, temporary = time.perf_counter(), self.folder / f".labels-{stage}.tmp"
            for old in (folder, temporary):
                shutil.rmtree(old, ignore_errors=True)
            if stage > 1:
                shutil.copytree(before, temporary)
            else:
                temporary.mkdir()
            kept = {int(path.stem) for path in temporary.iterdir()}
            seed_step(config.seed, -1, stage)
            self.method.eval()
            prob = partial(probabilities, protocol=config.protocol, window=config.crop)
            images = _Images(
                self.dataset, self.split.unlabeled, self.device, lambda text: self.progress(f"pseudo-labels, stage {stage}: {text}")
            )
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                for i, label in self.method.relabel(stage, images, prob, kept):
                    Image.fromarray(label.to("cpu", torch.uint8).numpy()).save(temporary / f"{i}.png")
            os.replace(temporary, folder)
            self.optimizers = make_optimizers(config, self.method)
            self.seconds += time.perf_counter() - began
        labeled = _Relabeled(self.dataset, self.split.unlabeled, folder)
        self.steps = Steps(
            self.labeled, self.stream(labeled, labeled.ids, name="unlabeled", labeled=True, block=config.batch), config.batch
        )

    def _train(self, start: int, end: int) -> None:
        config, method = self.config, self.method
        method.train()
        batches = self.steps.batches(self.step, end, self.workers, pin=self.device.type == "cuda")
        bad = torch.full((), -1, device=self.device)  # the first step with a loss that is not finite: read only at logging
        clock = _Clock()
        for tensors in batches:
            seed_step(config.seed, self.step)
            rate = poly(config, self.step, start, end)
            for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
                group["lr"] = group["initial_lr"] * rate
            batch = make_batch(tensors, config, method.views, self.device)  # colour stays in float32
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16", cache_enabled=False):
                terms, stats = method(batch, self.step / config.steps)
            loss = torch.stack([t.float() for t in terms.values()]).sum()
            bad = torch.where((bad < 0) & ~loss.detach().isfinite(), self.step, bad)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            method.update(self.step)

            last = self.step == config.steps
            evaluating = last or (config.evaluate_every and self.step % config.evaluate_every == 0)
            # At the end of a stage too: the next one may start from new weights, and the time since the last row is this one's.
            if self.step % config.log_every == 0 or evaluating or self.step % config.checkpoint_every == 0 or self.step == end:
                self._stop_if_bad(bad)
                row = {"step": self.step, "lr": config.lr * rate, "loss": loss.item()}
                row |= {f"term/{k}": v.item() for k, v in terms.items()} | {f"stat/{k}": v.item() for k, v in stats.items()}
                self.seconds_training += clock.lap()
                speed = self._images(self.step) / self.seconds_training
                if evaluating:
                    self.progress(f"step {self.step:,} of {config.steps:,}, evaluating", now=last)
                    row |= self._evaluate()
                self.seconds += clock.since()
                self._log(row)
                left = (self._images(config.steps) - self._images(self.step)) / speed
                self.progress(
                    f"step {self.step:,} of {config.steps:,}, loss {row['loss']:.3f}, {speed:.0f} images/s, {left / 60:.1f} min left"
                )
                if evaluating and self.step == self._best()["step"]:
                    self._save("checkpoint-best.pt")
                if config.keep_every and self.step % config.keep_every == 0:
                    self._save(f"checkpoint-{self.step}.pt")
                if self.step % config.checkpoint_every == 0 or last:
                    self._save("checkpoint.pt")

    def _images(self, steps: int) -> int:
        """Images that so many steps train on; a method that wants no unlabeled ones meets them from its second stage on."""
        return self.config.batch * (steps + max(0, steps - (0 if self.method.unlabeled else self.marks[1])))

    def _stop_if_bad(self, bad: Tensor) -> None:
        """At logging, evaluation, checkpoints and the end of a stage only, since it waits for the device: was every loss finite, and is every weight?"""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.method.parameters()]))
        step = int(torch.where((bad < 0) & ~norms.isfinite().all(), self.step - 1, bad))
        if step >= 0:
            labeled, unlabeled = self.steps.ids(step)
            kept = self.folder / "checkpoint.pt"
            raise NonFiniteLoss(
                f"run {self.config.id}: the loss was not finite at step {step}, or the weights after it. Labeled images: {', '.join(labeled)}; unlabeled images: "
                f"{', '.join(unlabeled) or 'none'}. "
                + (f"The last good checkpoint is {kept}." if kept.exists() else "There is no checkpoint yet.")
            )

    def _evaluate(self) -> dict[str, Any]:
        config = self.config
        measure = partial(
            evaluate, self.method.predictors, self.dataset, protocol=config.protocol, window=config.crop, device=self.device,
            workers=self.workers, precision=config.precision,
        )  # fmt: skip
        confusion, _ = measure(self.dataset.val)
        found: dict[str, Any] = {"miou": {name: miou(c) for name, c in confusion.items()}}
        found["confusion"] = next(iter(confusion.values())).tolist()  # (truth, prediction), of the reported predictor
        found["iou"] = {name: [None if math.isnan(v) else v for v in iou(c).tolist()] for name, c in confusion.items()}
        if self.withheld:
            _, quality = measure(self.withheld, quality=QUALITY_THRESHOLD)
            found["pseudo_labels"] = {name: q.summary() for name, q in quality.items()}
        self.method.train()
        return found

    # What survives a kill.

    def _log(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        with open(self.folder / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _best(self) -> dict[str, Any]:
        """The evaluation with the highest mIoU of the reported predictor; of several, the first."""
        return max((row for row in self.history if "miou" in row), key=lambda row: next(iter(row["miou"].values())))

    def _save(self, name: str) -> None:
        state = {
            "step": self.step, "method": self.method.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers], "history": json.dumps(self.history),
            "seconds": self.seconds, "seconds_training": self.seconds_training,
        }  # fmt: skip
        temporary = self.folder / f".{name}.tmp"
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)

    def _restore(self) -> None:
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = read_checkpoint(path, self.device)
            try:
                self.method.load_state_dict(state["method"])
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
                self.step, self.history = state["step"], json.loads(state["history"])
                self.seconds, self.seconds_training = state["seconds"], state["seconds_training"]
            except torch.OutOfMemoryError:  # a RuntimeError too, and not the file's fault
                raise
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path} is the checkpoint of another run; delete it and this one starts anew: {str(error)[:300]}"
                ) from error
            self.progress(f"goes on from step {self.step:,}", now=True)
        # Rows after the checkpoint will be written again.
        records.write_atomically(self.folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))

    def _record(self) -> Record:
        config, split = self.config, self.split
        evaluations = [row for row in self.history if "miou" in row]
        last, best = evaluations[-1], self._best()
        first = next(iter(last["miou"]))
        cuda = self.device.type == "cuda"
        memory = (
            torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        )
        return Record(
            id=config.id,
            status="done",
            config=config.model_dump(mode="json"),
            miou=last["miou"][first],
            miou_best=best["miou"][first],
            step_best=best["step"],
            iou=last["iou"][first],
            classes=list(self.dataset.classes),
            predictors=last["miou"],
            predictors_best={name: max(row["miou"][name] for row in evaluations) for name in last["miou"]},
            pseudo_labels=last.get("pseudo_labels"),
            **records.measured(self.history),
            seconds=round(self.seconds, 2),
            images_per_second=round(self._images(config.steps) / self.seconds_training, 2),
            peak_memory_mb=round(memory, 1),
            device=torch.cuda.get_device_name(self.device) if cuda else "cpu",
            threads=torch.get_num_threads(),
            precision=config.precision,
            seed=config.seed,
            split={
                "name": split.name,
                "sha256": split.sha256,
                "sha256_unlabeled": split.sha256_unlabeled,
                "labeled": len(split.labeled),
                "unlabeled": len(split.unlabeled),
                "files": file_sizes(self.dataset, split),
            },
            weights={"name": Path(config.weights).name, "sha256": file_sha256(config.weights)}
            if config.weights
            else {"name": "", "sha256": ""},
            protocol=config.protocol,
            evaluated={"images": len(self.dataset.val), "set": config.dataset_options.get("val", "val")},
            versions=records.environment(),
            commit=records.commit(),
        )


class _Clock:
    def __init__(self) -> None:
        self.mark = self.part = time.perf_counter()

    def lap(self) -> float:
        """Seconds of training since the last whole interval ended."""
        self.part = time.perf_counter()
        return self.part - self.mark

    def since(self) -> float:
        """Seconds since the last call, evaluation included."""
        now = time.perf_counter()
        elapsed, self.mark = now - self.mark, now
        return elapsed
