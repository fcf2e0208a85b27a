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
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from . import records
from .choices import choose
from .config import RunConfig, read_config
from .data import DATASETS, SegDataset, open_dataset
from .data.base import DataError, colormap, local
from .data.check import check
from .data.splits import Split, load_split
from .data.stream import Steps, Stream
from .evaluate import PROTOCOLS, QUALITY_THRESHOLD, Predictor, evaluate, pick_device
from .methods import Method
from .metrics import iou, miou
from .models import file_sha256, weights_file
from .progress import Progress
from .records import Record
from .train import NonFiniteLoss, _Images, _Relabeled, build_method, make_batch, make_optimizers, poly, seed_step, stage_marks


class Busy(RuntimeError):
    """Another process is at this run."""


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
            alone = config.method == "supervised"
            once(i, partial(_check_data, config, opened[0], opened[1], min_batch), images, alone, min_batch > 1 and config.batch)
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
    if not split.unlabeled and config.method != "supervised":
        raise DataError(f"{config.method} needs unlabeled images: split {config.split} has none")
    report = check(dataset, split, deep, progress)
    report.raise_if_bad()
    for warning in report.warnings if deep else ():
        print(f"WARNING: {warning}", flush=True)


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
            self.method.predictors, protocol=protocol or config.protocol, window=config.crop, precision=config.precision, device=self.device
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
    names = record.classes if record else open_dataset(config.dataset, config.root, **config.dataset_options).classes
    return list(names), colormap(len(names)) if colours is None else np.array(colours, np.uint8)


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
            protocol = PROTOCOLS[config.protocol]
            prob = lambda net, images: protocol(net, images, config.crop)  # noqa: E731
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
        predictor = Predictor(
            self.method.predictors, protocol=config.protocol, window=config.crop, precision=config.precision, device=self.device
        )
        measure = partial(evaluate, predictor, self.dataset, workers=self.workers)
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
