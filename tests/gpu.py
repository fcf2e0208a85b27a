"""make gpu: what this suite does on a GPU, in one folder: checks, speed, then training for the time that is left.

    python tests/gpu.py --out FOLDER [--minutes 8] [--runs FILE.yaml] [--data ROOT] [--weights FILE] [--slots 4]
        [--parts methods,bench] [--dry]

results.jsonl has a line for each result as soon as it is there, report.md the same for reading, log.txt what the parts
printed, history.jsonl the training curves. Each part is a process with a time limit: one that fails or hangs is put down, the
others go on; one that has lost CUDA is begun again behind what it lost it by. The minutes begin when torch is imported, which
may take one. --runs: a table as `mkd batch` takes it, of runs on a data set in list files at ROOT; they run side by side, those
of the first seed and column first, until the time is up, and what is unfinished is put down too. --dry: everything at toy size on a CPU
(with --runs: these on the CPU).
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from gpu_checks import CHECKS, LOST, NAMES, Put, attempt
from memory import counter
from tiny import config
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mkd_core import Grid, RunConfig, records, run
from mkd_core.augment import STRONG
from mkd_core.methods import Batch
from mkd_core.parameters import read_parameters
from mkd_core.suite.cost import Step
from mkd_core.train import make_optimizers

# Side by side, then one after the other: parts and the seconds that each may take; the last has what is left.
METHODS = "mkd", "supervised", "unimatch"
ROUNDS = (dict.fromkeys(("versions", *CHECKS), 150), {"bench": 200}, {"train": 3600})
# Imports are made once; nothing here touches the GPU before the fork.
FORK = multiprocessing.get_context("fork")
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for the exact resume
TINY = {"encoder": "tu-test_resnet", "channels": 16, "crop": (32, 32), "batch": 2, "device": "cpu"}


def bench(device: torch.device, put: Put, args: argparse.Namespace) -> None:
    """Steps of a whole method at the paper's size, the most wanted first; the batch halves until it fits."""
    ceiling = {p: matmul(device, p, 256 if args.dry else 8192) for p in ("bfloat16", "tf32", "float32")}
    for precision, value in ceiling.items():
        put(f"matrix product {precision}", True, tflops=value / 1e12)
    size = {"crop": (512, 512), "batch": 16, "device": device.type}
    wanted = [(e, m, p) for e in ("resnet50", "resnet101") for p in ("bfloat16", "tf32") for m in METHODS]
    wanted += [("resnet50", method, "float32") for method in METHODS]
    if args.dry:
        wanted = [("tu-test_resnet", "mkd", "bfloat16"), ("tu-test_resnet", "supervised", "float32")]
    else:
        torch.set_num_threads(os.cpu_count() or 1)  # networks are drawn on the host
    for encoder, method, precision in wanted:
        for last in (False, True)[: 1 + (precision != "float32")]:
            name = f"{encoder} {method} {precision}{' channels_last' * last}"
            if name in args.done:
                continue
            with attempt(put, name):
                of = TINY if args.dry else size | {"encoder": encoder}
                stored = "bfloat16" if precision == "bfloat16" else "float32"
                c = RunConfig(method=method, precision=stored, **of)
                put(name, **measure(c, device, precision, last, ceiling[precision]))
    for name in ("one_of", "chain"):
        with attempt(put, f"colour {name}"):
            images = torch.rand(*(2, 3, 64, 64) if args.dry else (16, 3, 512, 512), device=device)
            put(f"colour {name}", True, ms=1e3 * seconds(partial(STRONG[name], images), device))


def measure(c: RunConfig, device: torch.device, precision: str, last: bool, ceiling: float) -> dict[str, Any]:
    """Measure one step, at half the batch where it does not fit.

    ms, images_per_s; memory_gib, the peak; tflop, and mfu against the matrix product's; over, the step beside as many
    passes through its first network alone; costs.
    """
    with arithmetic(precision):
        while c.batch >= 2:
            try:
                return {"ok": True, "batch": c.batch, **_measure(Step(c), c, device, last, ceiling)}
            except torch.OutOfMemoryError as error:
                why = str(error)[:200]
            c = c.model_copy(update={"batch": c.batch // 2})
            gc.collect()
            torch.cuda.empty_cache()
    return {"ok": False, "error": why}


def _measure(step: Step, c: RunConfig, device: torch.device, last: bool, ceiling: float) -> dict[str, Any]:
    def turned(v: Any) -> Any:
        return v.contiguous(memory_format=torch.channels_last) if isinstance(v, Tensor) and v.ndim == 4 else v

    if last:
        step.method.to(memory_format=torch.channels_last)
        parts = vars(step.batch).items()
        step.batch = Batch(**{k: tuple(map(turned, v)) if k == "strong" else turned(v) for k, v in parts})
    optimizers = make_optimizers(c, step.method)

    def whole() -> None:
        with step.autocast():
            terms, _ = step.method(step.batch, 0.5)
        torch.stack([t.float() for t in terms.values()]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step.method.update(10)

    with counter() as flops:  # warms up too
        whole()
    torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None
    time_s, work = seconds(whole, device), flops.get_total_flops()
    found = {"ms": 1e3 * time_s, "images_per_s": (len(step.batch.x) + len(step.batch.weak)) / time_s}
    found |= {"tflop": work / 1e12, "mfu": work / time_s / ceiling}
    if device.type == "cuda":
        found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    gradient, plain = step.passes()
    found["over"] = time_s / seconds(partial(step.networks, gradient, plain), device)
    with suppress(RuntimeError):  # a profiler that does not start takes no timing away
        found["costs"] = costliest(whole, device)
    return found


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """float32 is exact where it is asked for: cuDNN and cuBLAS use TF32 only under "tf32"."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def seconds(f: Callable[[], Any], device: torch.device, most: float = 1.0) -> float:
    """Median seconds of f, the device waited for: 3 to 20 calls after two, for about `most` seconds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    for call in range(22):
        wait()
        began = time.perf_counter()
        f()
        wait()
        times += [time.perf_counter() - began] * (call > 1)
        if len(times) >= 3 and sum(times) > most:
            break
    return statistics.median(times)


def matmul(device: torch.device, precision: str, n: int) -> float:
    """FLOP/s of an n x n x n matrix product of random numbers."""
    with arithmetic(precision):
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        return 2 * n**3 / seconds(lambda: a @ b, device, 0.5)


def costliest(f: Callable[[], Any], device: torch.device) -> str:
    """The three operations that take most of the device's time, with their shares."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as found:
        f()
    events = [e for e in found.key_averages() if e.key.startswith("aten::")]
    rows = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    total = sum(rows.values()) or 1
    top = sorted(rows, key=rows.__getitem__, reverse=True)[:3]
    return ", ".join(f"{key.removeprefix('aten::')} {100 * rows[key] / total:.0f} %" for key in top)


def versions(device: torch.device, put: Put, args: argparse.Namespace) -> None:
    about = {"device": "cpu", "commit": records.commit(), **records.environment()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        about |= {"device": card.name, "memory_gib": card.total_memory / 2**30}
        about |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    put("versions", True, **about)


def train(device: torch.device, put: Put, args: argparse.Namespace) -> None:
    """Runs side by side until the time is up: mIoU of what is done, the last state of what is not."""
    if args.dry and not args.runs:
        configs = {method: config(method, steps=4, evaluate_every=2) for method in ("supervised", "cps")}
    elif not args.runs:
        return put("no --runs", True)
    else:
        configs = args.configs
    where = {"device": str(device)}  # as `mkd batch` names it
    waiting = [(name, c.model_copy(update=where)) for name, c in configs.items()][::-1]
    with tempfile.TemporaryDirectory() as place:
        active: list[tuple[BaseProcess, str, RunConfig]] = []
        while (waiting or active) and time.time() < args.until - 5:
            while waiting and len(active) < args.slots:
                name, c = waiting.pop()
                active.append((FORK.Process(target=run, args=(c, Path(place), True)), name, c))
                active[-1][0].start()
            for process, name, c in [one for one in active if not one[0].is_alive()]:
                active.remove((process, name, c))
                leave(name, c, Path(place), args.out, put, process.exitcode)
            time.sleep(0.1)
        for process, name, c in active:
            process.kill()
            process.join()
            leave(name, c, Path(place), args.out, put, None)
        for name, _ in waiting:
            put(name, True, state="not begun")


def planned(file: Path, given: dict[str, str]) -> dict[str, RunConfig]:
    """The runs of a table by name, each once: every row of the first column with the first seed, then of the next column."""
    values = read_parameters(file)
    values["common"] = values.get("common", {}) | given
    grid = Grid(**{key: value for key, value in values.items() if key in Grid.model_fields})
    runs: dict[str, tuple[str, RunConfig]] = {}
    for k, seed in enumerate(grid.seeds):
        for column in grid.columns:
            for row, cells in grid.cells.items():
                runs.setdefault(cells[column][k].id, (f"{row}, {column}, seed {seed}", cells[column][k]))
    return dict(runs.values())


def leave(name: str, c: RunConfig, runs: Path, out: Path, put: Put, status: int | None) -> None:
    """Put down a run: its record, or how far it came."""
    rows = records.history(runs / c.id)
    with open(out / "history.jsonl", "a") as file:
        for row in rows:
            row.pop("confusion", None)
            file.write(json.dumps({"run": c.id, **row}) + "\n")
    scores = [max(row["miou"].values()) for row in rows if "miou" in row]
    state = "done" if status == 0 else "failed" if status else "cut off"
    about = {"state": state, "step": rows[-1]["step"] if rows else 0, "of": c.steps}
    if record := records.load(runs / c.id):
        about |= record.model_dump(
            include={"miou", "predictors", "seconds", "images_per_second", "peak_memory_mb"}
        )
    elif scores:
        about |= {"best_predictor_so_far": max(scores)}
    put(name, not status, id=c.id, **about)


def put(out: Path, part: str, name: str, ok: bool, **measures: Any) -> None:
    line = json.dumps({"part": part, "name": name, "ok": bool(ok), **measures}, default=str) + "\n"
    with open(out / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(line)


def results(out: Path) -> list[dict[str, Any]]:
    source = out / "results.jsonl"
    return [json.loads(line) for line in source.read_text().splitlines()] if source.exists() else []


def report(out: Path) -> int:
    """Write report.md where results.jsonl is newer; the number of failures."""
    source, target, rows = out / "results.jsonl", out / "report.md", results(out)
    if not rows:
        return 0
    bad = [row for row in rows if not row["ok"]]
    if target.exists() and target.stat().st_mtime > source.stat().st_mtime:
        return len(bad)
    text = [f"# {len(rows)} results, {len(bad)} failed\n"]
    text += [f"- FAILED {r['part']}: {r['name']}: {r.get('error', r)} {r.get('where', '')}" for r in bad]
    shown = [{k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [{k: v for k, v in row.items() if k != "part"} for row in shown if row["part"] == part]
        columns = dict.fromkeys(key for row in mine for key in row)
        table = [columns, dict.fromkeys(columns, "---"), *mine]
        lines = [" | ".join(columns), *(" | ".join(row.get(c, "") for c in columns) for row in table[1:])]
        text.append(f"\n## {part}\n\n" + "\n".join(f"| {line} |" for line in lines))
    records.write_atomically(target, "\n".join(text) + "\n")
    return len(bad)


def part(name: str, args: argparse.Namespace) -> None:
    """One part, in a process of its own, which leads a group so that nothing of it is left behind."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout = sys.stderr = open(args.out / "log.txt", "a", buffering=1)  # noqa: SIM115
    for stream in (1, 2):  # of libraries too
        os.dup2(sys.stdout.fileno(), stream)
    device, write = torch.device("cpu" if args.dry else "cuda:0"), partial(put, args.out, name)
    args.done = {row["name"] for row in results(args.out) if row["part"] == name}
    if name in CHECKS:
        CHECKS[name](device, write, *[left(name, args)] * (name in NAMES))
    else:
        {"versions": versions, "bench": bench, "train": train}[name](device, write, args)


def left(name: str, args: argparse.Namespace) -> tuple[str, ...]:
    """Of NAMES, those that no result of the part is about yet."""
    done = {row["name"].split()[0] for row in results(args.out) if row["part"] == name}
    return tuple(n for n in (("mkd",) if args.dry else NAMES[name]) if n not in done)


def work_through(parts: dict[str, int], args: argparse.Namespace, end: float) -> None:
    """The parts side by side, none longer than its limit; the report follows them."""
    active: dict[str, tuple[BaseProcess, float]] = {}

    def begin(name: str, until: float) -> None:
        args.until = until
        process = FORK.Process(target=part, args=(name, args))
        process.start()
        active[name] = process, until

    try:
        for name, limit in parts.items():
            begin(name, min(time.time() + limit, end))
        while active:
            time.sleep(0.2)
            for name, (process, until) in [*active.items()]:
                if process.is_alive() and time.time() < until:
                    continue
                if process.exitcode == LOST and (name == "bench" or (name in NAMES and left(name, args))):
                    stop(process)
                    begin(name, until)
                    continue
                error = f"ended with {process.exitcode}, see log.txt" if process.exitcode else ""
                if error := "its time was up" if process.is_alive() else error:
                    put(args.out, name, "the whole part", False, error=error)
                stop(active.pop(name)[0])
            report(args.out)
    finally:
        for process, _ in active.values():
            stop(process)


def stop(process: BaseProcess) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join(10)  # what hangs in the driver is left behind


def found_gpu() -> bool:
    """Asked in a process of its own: once this one has touched the GPU, its forks cannot."""
    process = FORK.Process(target=lambda: sys.exit(not torch.cuda.is_available()))
    process.start()
    process.join()
    return process.exitcode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--parts", default=",".join(name for of in ROUNDS for name in of))
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    args.out = args.out.resolve()
    given = {"dataset": "folder", "root": str(args.data)} if args.data else {}
    given |= {"weights": str(args.weights)} if args.weights else {}
    args.configs = planned(args.runs, given) if args.runs else {}  # what is wrong with them shows at once
    if not args.dry and not found_gpu():
        parser.error("torch sees no GPU; --dry does everything at toy size on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "report.md", "log.txt", "history.jsonl"):
        (args.out / name).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the parts end too
    end = time.time() + 60 * args.minutes - 5
    for stage in ROUNDS:
        wanted = {name: limit for name, limit in stage.items() if name in args.parts.split(",")}
        work_through(wanted, args, end)
    print((args.out / "report.md").read_text())
    return min(report(args.out), 1)


if __name__ == "__main__":
    sys.exit(main())
