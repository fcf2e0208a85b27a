"""Every run of a table: what there is, what is missing, and how it gets done.

A run is done when its folder holds its record; whatever was killed, the same call goes on.
"""

import math
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import records
from ..choices import choose
from ..config import Grid, RunConfig
from ..models import weights_file
from ..parameters import parse_values
from ..prepare import check_data, data_now, open_data, refuse_other_data
from ..progress import Progress
from ..runner import Busy, run
from ..train import build_method
from .execution import PROCESSES, execute, executor, pick_slots

DATA = {"dataset", "root", "dataset_options", "split", "seed"}
SAME_STEP_TIME = ("dataset", "method", "options", "arch", "encoder", "crop", "batch", "precision", "devices")


@dataclass(frozen=True, eq=False)
class Run:
    """A run and its place in the table."""

    row: str
    column: str
    config: RunConfig

    @property
    def folder(self) -> Path | None:
        """runs/<id>; None where a file that the id takes in is missing: `check` may fetch it."""
        return records.RUNS / self.config.id if self.config.named else None

    @property
    def record(self) -> records.Record | None:
        return records.load(self.folder) if self.folder else None

    @property
    def busy(self) -> bool:
        return bool(self.folder and records.is_busy(self.folder))

    @property
    def step(self) -> int:
        """The last step in its history, 0 where it has none."""
        rows = records.history(self.folder) if self.folder else []
        return rows[-1]["step"] if rows else 0

    def value(self, key: str) -> Any:
        return {"row": self.row, "column": self.column, **self.config.model_dump(mode="json")}[key]

    def __str__(self) -> str:
        return ", ".join(part for part in (self.row, self.column, f"seed {self.config.seed}") if part)


def run_table(grid: Grid, slots: int = 1, train: bool = True) -> records.Cells:
    """Run what has no record and return row -> column -> records, one a seed.

    slots: runs at a time, each in a process of its own; 1: in this process.
    train: False runs nothing and returns the records that there are.
    """
    runs = expand(grid)
    missing = [one for one in runs if train and not one.record]
    check(runs if train else [])
    if slots < 2 or len(missing) < 2:
        for one in missing:
            run(one.config)
    else:
        with executor((pick_slots("") * slots)[:slots]) as pool:
            if failed := run_batch(missing, pool, slots):
                raise RuntimeError("\n".join(f"{r} failed: {failed[r]}" for r in missing if r in failed))
    done = {one.config.id: one.record for one in runs if one.folder}
    return {
        row: {column: [r for c in configs if c.named and (r := done[c.id])] for column, configs in of.items()}
        for row, of in grid.cells.items()
    }


def expand(grid: Grid) -> list[Run]:
    """List the runs of a grid, each once, in the order of its rows, columns and seeds."""
    places = [Run(row, c, config) for row, of in grid.cells.items() for c in of for config in of[c]]
    return list({one.folder or one: one for one in places}.values())


def select(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """Choose runs by key=value words: row, column, or a key of RunConfig; of one key, any value."""
    wanted: dict[str, set[str]] = {}
    for word in only:
        key, _, text = word.partition("=")
        choose("key for --only", key, ["row", "column", *RunConfig.model_fields])
        there = dict.fromkeys(str(one.value(key)) for one in runs)
        text = text if text in there else str(parse_values([word])[key])  # lr=1e-3 is 0.001
        wanted.setdefault(key, set()).add(choose(f"run in this file with {key}", text, there))
    return [one for one in runs if all(str(one.value(key)) in values for key, values in wanted.items())]


def check(runs: Sequence[Run]) -> None:
    """Look at all that runs need before any begins; ValueError with every fault, each once.

    Equal data are looked through once, and equal networks built once; where weights or data are
    missing, from random weights and for two classes. Of a run that is done, the data must be what they were.
    """
    place = next(place for place in (records.RUNS, *records.RUNS.parents) if place.exists())
    records_of = {one: one.record for one in runs}
    if not all(records_of.values()) and not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"{place} is no folder that can be written: runs are kept in {records.RUNS}")
    found: dict[str, list[Run]] = {}
    seen: dict[Any, tuple[Any, str]] = {}

    def once(one: Run, key: Any, look: Callable[..., Any], *args: Any) -> Any:
        if key not in seen:
            try:
                seen[key] = look(*args), ""
            except ValueError as error:
                seen[key] = None, str(error)
        value, fault = seen[key]
        if fault and one not in (of := found.setdefault(fault, [])):
            of.append(one)
        return value

    for one in runs:
        config = one.config
        data, network = config.model_dump_json(include=DATA), config.model_dump_json(exclude=DATA)
        if record := records_of[one]:
            now = once(one, (data, "now"), data_now, config) or {}
            once(one, one.folder, refuse_other_data, one.folder, record.split, now)
            continue
        files = {"weights": config.weights, "weights2": config.weights2}
        gone = [key for key, path in files.items() if path and not once(one, path, weights_file, path)]
        config = config.model_copy(update=dict.fromkeys(gone, ""))
        opened = once(one, data, open_data, config)
        classes = len(opened[0].classes) if opened else 2
        method = once(one, (network, classes), lambda *args: build_method(*args).min_batch, config, classes)
        if opened and method:
            once(one, (data, method > 1 and config.batch), check_data, config, *opened, method)
    if found:
        others = {fault: f" and {len(of) - 1} more" * (len(of) > 1) for fault, of in found.items()}
        raise ValueError("\n".join(f"{of[0]}{others[fault]}: {fault}" for fault, of in found.items()))


def plan(runs: Sequence[Run], slots: int = 1) -> str:
    """Say which runs are done, running and to run, and the hours that the records let expect."""
    known, lines, counts, total = list[records.Record](), list[str](), Counter[str](), 0.0
    for folder in records.RUNS.glob("*/"):
        with suppress(ValueError, OSError):  # damaged records of other work stop no batch
            known += filter(None, [records.load(folder)])
    for one in runs:
        state = "done" if one.record else "running" if one.busy else "to run"
        counts[state] += 1
        where = one.folder.name if one.folder else "(no id: its weights or lists are missing)"
        lines.append(f"{state:8} {one!s:40} {where}")
        if state != "done":
            wanted = {key: one.value(key) for key in SAME_STEP_TIME}
            alike = [r for r in known if all(r.config.get(key, 1) == value for key, value in wanted.items())]
            rate = statistics.median(r.seconds / r.config["steps"] for r in alike) if alike else math.nan
            total += (hours := rate * (one.config.steps - one.step) / 3600)
            begun = f"from step {one.step:,}, " if one.step else ""
            lines[-1] += f"  {begun}" + (f"{hours:.2f} h" if alike else "unknown time")
    summary = f"{counts['done']} done, {counts['running']} running now, {counts['to run']} to run"
    if math.isnan(total):
        summary += "; expected hours unknown: no record of a run like some of these"
    elif counts["done"] < len(runs):
        summary += f"; about {total:.1f} h" + f", {total / slots:.1f} h on {slots} slots" * (slots > 1)
    return "\n".join([*lines, summary])


def run_batch(runs: Sequence[Run], pool: Executor, slots: int = 0, retries: int = 1) -> dict[Run, str]:
    """Execute runs that have no record; return those that failed with their errors.

    slots: of this machine, which share its cores; 0: a cluster, where each worker has its own.
    A run that failed is tried again, `retries` times, from its checkpoint. One that another process
    holds is waited for.
    """
    threads, say = max(1, (os.cpu_count() or 1) // slots) if slots else 0, Progress("batch")
    tries, failed = Counter[Run](), dict[Run, str]()
    seen: dict[Run, tuple[float, int]] = {}  # when a run was first seen at work, and at which step

    def submit(one: Run) -> Future[None]:
        return pool.submit(execute, one.config.model_dump(mode="json"), str(one.folder), os.getcwd(), threads)

    futures = {submit(one): one for one in runs}
    try:
        while futures:
            for future in wait(futures, timeout=1, return_when=FIRST_COMPLETED).done:
                one, error = futures.pop(future), future.exception()
                busy = isinstance(error, Busy)
                tries[one] += not busy
                if error and (busy or tries[one] <= retries):
                    futures[submit(one)] = one
                elif error:
                    failed[one] = str(error)
                if not busy:
                    say(f"{one} failed, try {tries[one]}: {error}" if error else f"{one} is done", now=True)
            if say.due:
                active = [one for one in futures.values() if one.busy]
                done = len(runs) - len(futures) - len(failed)
                counts = f"{done} of {len(runs)} done, {len(active)} running, {len(failed)} failed"
                say("; ".join([counts, *(_progress(one, seen) for one in active)]))
    finally:
        while not all([future.cancel() or future.done() for future in futures]):
            for process in [*PROCESSES]:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the processes of a run with several devices too
            time.sleep(0.1)
    return failed


def _progress(one: Run, seen: dict[Run, tuple[float, int]]) -> str:
    step, steps, now = one.step, one.config.steps, time.monotonic()
    began, first = seen.setdefault(one, (now, step))
    left = (steps - step) * (now - began) / (step - first) if step > first else 0
    return f"{one}: {100 * step / steps:.0f} %" + f", {left / 60:.0f} min left" * (left > 0)
