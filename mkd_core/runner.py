"""run(config) -> Record: check, train, evaluate, checkpoint, resume."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from contextlib import nullcontext, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from . import checkpoints, parallel, records
from .config import RunConfig
from .evaluate import QUALITY_THRESHOLD, Predictor, evaluate, pick_device
from .metrics import iou, miou
from .models import file_sha256
from .prepare import data_identity, data_now, prepare, refuse_other_data, try_largest
from .progress import Progress
from .records import Record
from .train import loaders, make_optimizers, stage_marks, streams, train, write_labels


class Busy(RuntimeError):
    """Another process is at this run."""


def run(config: RunConfig, runs: Path | None = None, quiet: bool = False) -> Record:
    """Train and evaluate one configuration; go on where it was interrupted; return its record at once where it exists.

    All that can be wrong with the input is found before the first step: DataError, ValueError. Raises NonFiniteLoss, and
    Busy where another process is at the same run. Processes that share the batch all call it, and the first one writes;
    of processes that `devices` starts, these two come as RuntimeError.
    """
    folder, first = (runs or records.RUNS) / config.id, parallel.rank() == 0
    if config.devices > parallel.world() and not (folder / "record.json").exists():
        pick_device(config.device, config.devices)
        return parallel.launch(run, config.devices, config, folder.parent, quiet)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", timeout=1)  # is_busy() of another process holds it for a moment
    try:
        with lock if first else nullcontext():
            parallel.meet()
            try:
                if found := records.load(folder):
                    if found.id != config.id:
                        raise ValueError(f"{folder}/record.json is of another run ({found.id}); delete it")
                    refuse_other_data(folder, found.split, data_now(config))
                    if not quiet and found.commit != (now := records.commit()):
                        known = f"not run again, its record is of commit {found.commit}"
                        print(f"{config.id}: {known}; the code is at {now}")
                    return found
                return _Run(config, folder, quiet).finish()
            finally:
                # Refused before it began; other files may lie here.
                if first and not (folder / "config.json").exists():
                    (folder / "lock").unlink(missing_ok=True)
                    with suppress(OSError):
                        folder.rmdir()
    except Timeout as error:
        raise Busy(f"another process is at run {config.id}: it holds {folder}/lock") from error


class _Run:
    """One run at work. What a checkpoint holds is in `_save`; of processes that share the batch, the first one writes."""

    def __init__(self, config: RunConfig, folder: Path, quiet: bool):
        self.first = parallel.rank() == 0
        self.config, self.folder, self.progress = config, folder, Progress(config.id, quiet or not self.first)
        if config.threads or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(config.threads or parallel.free_cores())
        self.device = pick_device(config.device)
        # Every file is opened before the first step; a run that goes on has been through that.
        new, say = not (folder / "checkpoint.pt").exists(), "checking file {:,} of {:,}".format
        self.dataset, self.split, self.method = prepare(
            config, new and self.first, lambda *counts: self.progress(say(*counts))
        )
        parallel.meet()
        self.data = data_identity(self.dataset, self.split)
        self.method.to(self.device)
        if self.device.type == "cuda":  # only now: torch resets nothing before its first use of a GPU
            torch.cuda.reset_peak_memory_stats(self.device)
        if new:
            try_largest(self.dataset, Predictor.of(config, self.method.predictors, self.device))
        self.optimizers = make_optimizers(config, self.method)
        self.marks = stage_marks(config, self.method)
        withheld = [i for i in self.split.unlabeled if self.dataset.has_label(i)]
        rng = np.random.default_rng(config.seed)
        self.withheld = [withheld[i] for i in sorted(rng.permutation(len(withheld))[: config.quality_images])]
        self.history: list[dict[str, Any]] = []
        self.unfinished: dict[str, Any] | None = None  # the last step's row, not evaluated yet
        self.step, self.seconds, self.seconds_training = 0, 0.0, 0.0
        self.commit = records.commit()  # of all code that trained it, in its order
        self._restore()
        self.board = records.board(folder, self.step) if config.tensorboard and self.first else lambda _: None
        self._write("config.json", config.absolute().model_dump_json(indent=1) + "\n")
        start = Path(config.weights).name or "random weights"
        about = f"{config.method} on {config.dataset}, {self.split}; {config.encoder} from {start}"
        self.progress(f"{about}; {self.device}", now=True)

    def finish(self) -> Record:
        for stage, (start, end) in enumerate(pairwise(self.marks)):
            if self.step < end:
                self._train(stage, start, end)
        if self.unfinished:
            self._keep(self.unfinished)
        record = self._record()
        if self.first:
            for labels in self.folder.glob("labels-*"):
                shutil.rmtree(labels)
            records.save(record, self.folder)
        self.progress(f"done, mIoU {record.miou:.1f} in {record.seconds:.0f} s", now=True)
        return record

    def _train(self, stage: int, start: int, end: int) -> None:
        config = self.config
        labels = self._labels(stage, anew=self.step == start) if stage else None
        unlabeled = self.split.unlabeled if self.method.unlabeled or stage else ()
        steps = streams(config, self.dataset, self.split.labeled, unlabeled, labels)
        span, first = (self.step, start, end), self.step + 1

        def due(step: int) -> bool:  # rows beyond those of the history are only said
            return self._due(step) or self.progress.due or (step == first and not self.progress.quiet)

        for row in train(config, self.method, self.optimizers, steps, span, due):
            self.step = step = int(row["step"])
            self.seconds_training += (spent := row.pop("seconds"))
            self.seconds += spent
            self._say(row, now=step == first)
            if self._due(step) or step == end:
                self._keep(row)

    def _keep(self, row: dict[str, Any]) -> None:
        """Evaluate after a step where it is due, log it, save what has to be."""
        config, step, last = self.config, self.step, self.step == self.config.steps
        self.history.append(row)
        if last:  # should the evaluation fail, no step is lost
            self._save("checkpoint.pt")
        if evaluating := self._evaluates(step):
            began = time.perf_counter()
            row |= self._evaluate()
            self.seconds += time.perf_counter() - began
        self._log(row)
        names = {
            "checkpoint-best.pt": evaluating and step == self._best()["step"],
            f"checkpoint-{step}.pt": config.keep_every and step % config.keep_every == 0,
            "checkpoint.pt": last or step % config.checkpoint_every == 0,  # last: a run goes on from here
        }
        if due := [name for name, is_due in names.items() if is_due]:
            self._save(*due)

    def _evaluates(self, step: int) -> bool:
        every = self.config.evaluate_every
        return step == self.config.steps or (every > 0 and step % every == 0)

    def _due(self, step: int) -> bool:
        every = self.config.log_every, self.config.checkpoint_every
        return self._evaluates(step) or 0 in (step % n for n in every)

    def _labels(self, stage: int, anew: bool) -> Path:
        """The folder with the pseudo-labels of a stage, written before its first step."""
        before, folder = self.folder / f"labels-{stage - 1}", self.folder / f"labels-{stage}"
        needed = before if anew else folder
        if (stage > 1 or not anew) and not needed.is_dir():
            raise ValueError(
                f"{needed}, pseudo-labels of the run, is gone; delete {self.folder} to start anew"
            )
        if anew:
            began = time.perf_counter()
            self.progress(f"labels {len(self.split.unlabeled):,} images for stage {stage}", now=True)
            images = self.dataset, self.split.unlabeled
            if self.first:
                write_labels(self.config, self.method, stage, *images, folder, before)
            parallel.broadcast(self.method)
            self.optimizers = make_optimizers(self.config, self.method)
            self.seconds += time.perf_counter() - began
        return folder

    def _images(self, steps: int) -> int:
        """Count the images that so many steps train on; without `unlabeled`, a method meets them from stage 1 on."""
        return self.config.batch * (steps + max(0, steps - (0 if self.method.unlabeled else self.marks[1])))

    def _say(self, row: dict[str, Any], now: bool) -> None:
        done, steps = self._images(self.step), self.config.steps
        speed = done / self.seconds_training
        left = (self._images(steps) - done) / speed / 60
        self.progress(
            f"[{'#' * (20 * self.step // steps):20}] step {self.step:,} of {steps:,}, {self.seconds_training / self.step:.2g} s a step, loss {row['loss']:.3f}, "
            f"{speed:.3g} images/s, {left:.1f} min left" + ", evaluating" * self._evaluates(self.step), now
        )  # fmt: skip

    def _evaluate(self) -> dict[str, Any]:
        predictor = Predictor.of(self.config, self.method.predictors, self.device)
        measure = partial(evaluate, predictor, self.dataset, workers=loaders(self.config))
        confusion, _ = measure(self.dataset.val)
        found: dict[str, Any] = {"miou": {name: miou(c) for name, c in confusion.items()}}
        predicted = confusion[predictor.names[0]].sum(0)
        if int((predicted > 0).sum()) == 1:
            only = f"every pixel is predicted as {self.dataset.classes[int(predicted.argmax())]}"
            self.progress(f"WARNING: {only}: train longer, or look at lr", now=True)
        found["confusion"] = confusion[predictor.names[0]].tolist()  # (truth, prediction)
        found["iou"] = {n: [v if v == v else None for v in iou(c).tolist()] for n, c in confusion.items()}
        if self.withheld:
            _, quality = measure(self.withheld, quality=QUALITY_THRESHOLD)
            found["pseudo_labels"] = {name: q.summary() for name, q in quality.items()}
            kept = any(q["kept"] for q in found["pseudo_labels"].values())
            if not kept and self.config.options.get("threshold"):
                text = f"WARNING: no pixel has a confidence of {QUALITY_THRESHOLD} yet: such a T keeps none"
                self.progress(text, now=True)
        return found

    # What survives a kill.

    def _log(self, row: dict[str, Any]) -> None:
        if self.first:
            with open(self.folder / "history.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.board(row)

    def _best(self) -> dict[str, Any]:
        """The evaluation with the highest mIoU of the reported predictor; of several, the first."""
        rows = [row for row in self.history if "miou" in row]
        return max(rows, key=lambda row: next(iter(row["miou"].values())))

    def _save(self, *names: str) -> None:
        if not self.first:
            return
        state = {
            "step": self.step, "method": self.method.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers], "history": json.dumps(self.history),
            "data": json.dumps(self.data), "classes": list(self.dataset.classes), "commit": self.commit, "id": self.config.id,
            "seconds": self.seconds, "seconds_training": self.seconds_training,
        }  # fmt: skip
        checkpoints.write(state, self.folder, names)
        self._write("history.csv", records.numbers(self.history).to_csv(index=False))

    def _write(self, name: str, text: str) -> None:
        if self.first:
            records.write_atomically(self.folder / name, text)

    def _restore(self) -> None:
        for left in self.folder.glob(".*.tmp") if self.first else ():  # by a kill
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = checkpoints.read(path, self.device)
            refuse_other_data(self.folder, json.loads(state["data"]), self.data)
            try:
                if state["id"] not in ("unknown", self.config.id):
                    raise ValueError(state["id"])
                self.method.load_state_dict(state["method"])
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
            except (KeyError, RuntimeError, ValueError) as error:
                raise ValueError(f"{path} is of another run; delete it to start anew: {error}") from error
            self.step, self.history = state["step"], json.loads(state["history"])
            if self._evaluates(self.step) and "miou" not in self.history[-1]:  # it ended while evaluating
                self.unfinished = self.history.pop()
            self.seconds, self.seconds_training = state["seconds"], state["seconds_training"]
            made, now = state["commit"], self.commit
            self.commit = made if made.endswith(now) else f"{made}, {now}"
            self.progress(f"goes on from step {self.step:,}" + f" of commit {made}" * (made != now), now=True)
        # Rows after the checkpoint will be written again.
        self._write("history.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))

    def _record(self) -> Record:
        config, evaluations = self.config, [row for row in self.history if "miou" in row]
        last, best = evaluations[-1], self._best()
        first, cuda = next(iter(last["miou"])), self.device.type == "cuda"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else peak
        return Record(
            id=config.id, config=config.model_dump(mode="json"), seed=config.seed, protocol=config.protocol, precision=config.precision,
            miou=last["miou"][first], miou_best=best["miou"][first], step_best=best["step"], iou=last["iou"][first],
            classes=list(self.dataset.classes), predictors=last["miou"], confusion=last["confusion"],
            predictors_best={name: max(row["miou"][name] for row in evaluations) for name in last["miou"]},
            pseudo_labels=last.get("pseudo_labels"),
            evaluations=[{key: row[key] for key in ("step", "miou", "pseudo_labels") if key in row} for row in evaluations],
            seconds=round(self.seconds, 2), images_per_second=round(self._images(config.steps) / self.seconds_training, 2),
            peak_memory_mb=round(peak / 2**20, 1), device=torch.cuda.get_device_name(self.device) if cuda else "cpu",
            threads=torch.get_num_threads(), split=self.data,
            weights={"name": Path(config.weights).name, "sha256": file_sha256(config.weights) if config.weights else ""},
            evaluated={"images": len(self.dataset.val), "set": config.dataset_options.get("val", "val")},
            versions=records.environment(), commit=self.commit,
        )  # fmt: skip
