"""A grid as papermill executions of 10_run.ipynb, one a run: on the slots of this machine, or on a Dask cluster (hosts, Slurm, Kubernetes).

A run is done when its folder holds a record with its id. Nothing else is remembered: whatever was killed, the same command goes on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO
from zipfile import is_zipfile

import torch

from .. import records
from ..choices import choose
from ..config import YOUNGER, Grid, RunConfig
from ..evaluate import pick_device
from ..runner import Busy, faults, is_busy

NOTEBOOK = records.ROOT / "notebooks/10_run.ipynb"
PAUSE = 3.0  # seconds before a run that failed, or that another process is at, is looked at again
ALIKE = ("dataset", "method", "arch", "encoder", "crop", "batch", "precision")  # runs with these in common take about equally long a step
PROCESSES: set[subprocess.Popen[str]] = set()  # executions under way in this process


@dataclass(frozen=True, eq=False)
class Run:
    """A run and its place in the table."""

    row: str
    column: str
    config: RunConfig

    @cached_property
    def folder(self) -> Path:
        return records.RUNS / self.config.id

    def __str__(self) -> str:
        return ", ".join(part for part in (self.row, self.column, f"seed {self.config.seed}") if part)

    @cached_property
    def named(self) -> bool:
        """Whether it has a folder: without the files that the id takes in it has not begun."""
        return self.config.named

    @property
    def done(self) -> bool:
        record = records.load(self.folder) if self.named else None
        return record is not None and record.id == self.folder.name

    @property
    def step(self) -> int:
        """The last step in its history, 0 where it has none."""
        rows = records.history(self.folder) if self.named else []
        return rows[-1]["step"] if rows else 0

    def value(self, key: str) -> str:
        return str({"row": self.row, "column": self.column, **self.config.model_dump(mode="json")}[key])


def expand(grid: Grid) -> list[Run]:
    """Every run of the grid, in the order of its rows, columns and seeds."""
    return [Run(row, column, config) for row, columns in grid.cells.items() for column, configs in columns.items() for config in configs]


def select(runs: Sequence[Run], only: Mapping[str, Sequence[Any]]) -> list[Run]:
    """The runs that have, for every key (row, column, or a key of RunConfig), one of its values. ValueError where no run has a value."""
    for key, values in only.items():
        choose("key for --only", key, ["row", "column", *RunConfig.model_fields])
        wanted = {choose(f"run in this file with {key}", str(v), dict.fromkeys(run.value(key) for run in runs)) for v in values}
        runs = [run for run in runs if run.value(key) in wanted]
    return list(runs)


def parse_slots(text: str, cpus: int = 1) -> list[str]:
    """ "0,1,cpu" -> ["cuda:0", "cuda:1", "cpu"], one run at a time each; "": every GPU that torch sees, else `cpus` slots on the CPU."""
    words = [word.strip() for word in text.split(",")] if text else [str(i) for i in range(torch.cuda.device_count())] or ["cpu"] * cpus
    for word in words:
        if not (word.isdigit() or word == "cpu"):
            raise ValueError(f"slots are numbers of GPUs, or cpu, with commas between: 0,1,2,3 or cpu,cpu; got {text!r}")
    return [str(pick_device(word if word == "cpu" else f"cuda:{word}")) for word in words]


def check(runs: Sequence[Run]) -> None:
    """ValueError with every fault of weights, data, splits and methods, and where runs cannot be kept, before any has begun."""
    place = records.nearest(records.RUNS)
    if runs and not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"{place} is no folder that can be written: runs are kept in {records.RUNS}, or in what MKD_RUNS names")
    for run in (run for run in runs if run.named):
        if os.path.lexists(run.folder) and not run.folder.is_dir():
            raise ValueError(f"{run}: {run.folder} would be its folder, and is none")
        checkpoint = run.folder / "checkpoint.pt"
        for path in (run.folder / "config.json", run.folder / "lock", checkpoint):
            if path.exists() and not path.is_file():
                raise ValueError(f"{run}: {path} would be a file, and is none")
        if checkpoint.exists() and not is_zipfile(checkpoint):  # torch's format; whether all is in it is seen by the run alone
            raise ValueError(f"{run}: {checkpoint} is damaged; delete it and the run starts anew")
        if (record := records.load(run.folder)) and record.id != run.folder.name:
            raise ValueError(f"{run}: {run.folder / 'record.json'} is the record of another run ({record.id}); delete it")
    if found := faults([run.config for run in runs]):
        named = ((runs[of[0]], f" and {len(of) - 1} more" * (len(of) > 1), fault) for fault, of in found.items())
        raise ValueError("\n".join(f"{first}{others}: {fault}" for first, others, fault in named))


def plan(runs: Sequence[Run], slots: int) -> str:
    """What exists, what runs now, what will run, and the hours that it will take; slots 0: not known."""
    known = _readable_records()
    lines, counts, total = [], Counter[str](), 0.0
    for run in runs:
        state = "done" if run.done else "running" if run.named and is_busy(run.folder) else "to run"
        counts[state] += 1
        text = ""
        if state != "done":
            alike = [r for r in known if all(str(r.config.get(k)) == run.value(k) for k in ALIKE)]
            young = YOUNGER.get(run.config.method, {})
            # CPS with CutMix makes more passes than without.
            alike = [r for r in alike if young | r.config.get("options", {}) == run.config.options] or alike
            rate = statistics.median(r.seconds / r.config["steps"] for r in alike) if alike else float("nan")
            step = run.step
            hours = rate * (run.config.steps - step) / 3600
            text = (f"from step {step:,}, " if step else "") + (f"{hours:.2f} h" if alike else "unknown time")
            total += hours
        lines.append(
            f"{state:8} {run!s:40} {run.folder.name if run.named else '(no id: its weights or lists are missing)'}  {text}".rstrip()
        )
    summary = f"{counts['done']} done, {counts['running']} running now, {counts['to run']} to run"
    if counts["done"] < len(runs):
        spread = f", {total / slots:.1f} h on {slots} slots" if slots > 1 else ""
        summary += "; expected hours unknown: no record of a run like some of these" if total != total else f"; about {total:.1f} h{spread}"
    return "\n".join([*lines, summary])


def _readable_records() -> list[records.Record]:
    """For the expected time alone: a record of other work that is damaged, or of another version, stops no batch."""
    found = []
    for folder in records.RUNS.glob("*/"):
        with suppress(ValueError, OSError, TypeError, KeyError):
            record = records.load(folder)
            if (
                record
                and record.config.get("steps", 0) > 0
                and math.isfinite(record.seconds)
                and isinstance(record.config["options"], dict)
            ):
                found.append(record)
    return found


# One run, on whichever machine.


def execute(config: dict[str, Any], notebook: str, folder: str, where: str, threads: int = 0) -> tuple[str, str]:
    """Execute the notebook with a run's configuration into its folder, in a process that ends with this one (and its kernel with it).

    where: the working directory, which relative paths mean. threads: of torch, 0: its own choice.
    Returns ("done", ""), ("busy", "") where another process is at the run, or ("failed", the last lines of the error).
    """
    if is_busy(Path(folder)):
        return "busy", ""
    environment = ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | os.environ | {"MKD_RUNS": str(Path(folder).parent)}
    values = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in config.items()]
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "mkd_core.suite.cli", "run", notebook, "-o", folder, *values],
        cwd=where, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,  # Ctrl-C is for the batch, which then ends this one
    )  # fmt: skip
    PROCESSES.add(process)
    try:
        errors = process.communicate()[1]
    finally:
        PROCESSES.discard(process)
    if process.returncode == 0:
        return "done", ""
    if process.returncode < 0:
        errors += f"\nThe process was ended by signal {-process.returncode}."
        Path(folder, f".{Path(notebook).stem}.{process.pid}.tmp.ipynb").unlink(missing_ok=True)
    if f"{Busy.__name__}: " in errors:  # it came first while this kernel started
        return "busy", ""
    return "failed", "\n".join(errors.strip().split("\n")[-5:])


# All of them.


@contextmanager
def executor(engine: str, slots: int = 1, address: str = "", resources: Mapping[str, Any] | None = None) -> Iterator[Executor]:
    """Where runs are executed: "local" (threads of this process), "dask" (a scheduler's address), "slurm" (resources: SLURMCluster's keywords,
    and `jobs`, how many at most). Workers of a cluster share the runs folder and the project at the same paths.
    """
    if engine == "local":
        with ThreadPoolExecutor(slots) as pool:
            yield pool
        return
    try:
        from dask_jobqueue import SLURMCluster
        from distributed import Client
    except ImportError as error:
        raise ValueError(f"--engine {engine} needs the extra `cluster` (distributed, dask-jobqueue): {error}") from error
    if engine == "dask":
        with Client(address) as client:
            yield client.get_executor(pure=False)
        return
    keywords = dict(resources or {})
    jobs = keywords.pop("jobs", None)
    if not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"the resources need `jobs`, how many run at most at a time; got {jobs!r}")
    try:
        cluster = SLURMCluster(**keywords)
    except (TypeError, ValueError) as error:
        raise ValueError(f"resources that dask_jobqueue.SLURMCluster does not take: {error}") from error
    with cluster, Client(cluster) as client:
        test = subprocess.run(["sbatch", "--test-only"], input=cluster.job_script(), capture_output=True, text=True)
        if test.returncode:
            raise ValueError(f"Slurm refuses these resources: {test.stderr.strip()}")
        # A job for every run that waits; one that Slurm ended is replaced, one without work is given back.
        cluster.adapt(minimum_jobs=0, maximum_jobs=jobs, target_duration="1ms")
        yield client.get_executor(pure=False)


def run_batch(runs: Sequence[Run], pool: Executor, devices: Sequence[str], retries: int = 1) -> dict[Run, str]:
    """Execute what has no record; returns the runs that failed with the last lines of their errors.

    devices: one run at a time on each; "" leaves the run's own, for a cluster that sees to that.
    A run that failed is tried again, `retries` times, and goes on from its checkpoint; one that another process is at is waited for.
    """
    waiting = [run for run in runs if not run.done]
    free, tries, not_before = list(devices), Counter[Run](), dict.fromkeys(waiting, 0.0)
    threads = max(1, (os.cpu_count() or 1) // len(devices)) if devices and devices[0] else 0
    active: dict[Future[tuple[str, str]], tuple[Run, str]] = {}
    failed: dict[Run, str] = {}
    overview = Overview(runs, sys.stderr)
    try:
        while waiting or active:
            for run in [run for run in waiting if not_before[run] <= time.monotonic()][: len(free)]:
                waiting.remove(run)
                if run.done and not tries[run]:  # by another batch; after a failure here its notebook is still to be executed
                    continue
                device = free.pop(0)
                config = run.config.model_dump(mode="json") | ({"device": device} if device else {})
                future = pool.submit(execute, config, str(NOTEBOOK), str(run.folder), os.getcwd(), threads)
                active[future] = run, device
            if not active:
                time.sleep(1)
            for future in wait(active, timeout=1, return_when=FIRST_COMPLETED).done:
                run, device = active.pop(future)
                free.append(device)
                try:
                    state, error = future.result()
                except Exception as lost:  # of the engine: a worker that died too often, a scheduler that is gone
                    state, error = "failed", f"{type(lost).__name__}: {lost}"
                if state == "failed":
                    tries[run] += 1
                    if tries[run] > retries:
                        failed[run] = error
                        continue
                    overview.say(f"{run} failed and is tried again:\n{error}")
                if state != "done":
                    not_before[run] = time.monotonic() + PAUSE
                    waiting.append(run)
            overview.show(failed)
    finally:
        while not all([future.cancel() or future.done() for future in active]):
            while PROCESSES:
                PROCESSES.pop().terminate()
            time.sleep(0.1)
    overview.show(failed, last=True)
    return failed


class Overview:
    """Done, running with progress and time left, failed: redrawn on a terminal; in a log a line a minute."""

    def __init__(self, runs: Sequence[Run], out: TextIO):
        self.runs, self.out, self.live, self.lines, self.shown = runs, out, out.isatty(), 0, -60.0
        self.done: set[Run] = set()
        self.seen: dict[Run, tuple[float, int]] = {}  # when it was first seen, and at which step

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)
        self.lines = 0

    def show(self, failed: Mapping[Run, str], last: bool = False) -> None:
        """Print the state of the runs, unless that was done a moment ago; last: in any case."""
        if not last and time.monotonic() - self.shown < (1 if self.live else 60):
            return
        self.shown = time.monotonic()
        self.done |= {run for run in self.runs if run not in self.done and run.done}
        running = [run for run in self.runs if run not in self.done and is_busy(run.folder)]
        head = f"{len(self.done)} of {len(self.runs)} done, {len(running)} running, {len(failed)} failed"
        lines = [*map(self._progress, running), *(f"{run}: failed" for run in failed)]
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be redrawn
            text = "".join(f"{line[:width]}\n" for line in [head, *(f"  {line}" for line in lines)])
            print(f"\x1b[{self.lines}F\x1b[J" if self.lines else "", text, sep="", end="", file=self.out, flush=True)
            self.lines = len(lines) + 1
        else:
            print("; ".join([head, *lines]), file=self.out, flush=True)

    def _progress(self, run: Run) -> str:
        step, steps, now = run.step, run.config.steps, time.monotonic()
        begun, first = self.seen.setdefault(run, (now, step))
        left = f", {(steps - step) * (now - begun) / (step - first) / 60:.0f} min left" if step > first else ""
        return f"{run}: {100 * step / steps:.0f} %{left}"
