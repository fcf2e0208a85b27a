"""What a run leaves: runs/<id>/{config.json, history.jsonl, record.json, checkpoint.pt}; and tables made from records."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import threading
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict

ROOT = Path(__file__).resolve().parents[1]  # notebooks and papermill start in different folders; the project root is where the package lies
RUNS = Path(os.environ.get("MKD_RUNS") or ROOT / "runs").expanduser().resolve()


def folder(name: str | Path) -> Path:
    """A folder of the project by its name relative to the root, e.g. "runs/demo"; made where it does not exist."""
    path = ROOT / name  # an absolute path stays as it is
    path.mkdir(parents=True, exist_ok=True)
    return path


class Record(BaseModel):
    """The result of one run, plain JSON. mIoU and IoU in percent; `miou` is the last step's, never the best's."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    id: str
    status: str  # "done"
    config: dict[str, Any]
    miou: float  # of the first predictor, after the last step
    miou_best: float  # over the evaluations made: optimistic, since it is chosen on the images that it is measured on
    step_best: int
    iou: list[float | None]  # per class, first predictor, last step; None where a class neither occurs nor is predicted
    classes: list[str]
    predictors: dict[str, float]  # mIoU of each, last step
    predictors_best: dict[str, float]
    pseudo_labels: dict[str, Any] | None  # quality against withheld labels, last step
    seconds: float  # training and evaluation, all parts of an interrupted run together
    images_per_second: float  # labeled and unlabeled, training alone
    peak_memory_mb: float  # of the GPU during the run, or of the whole process on a CPU
    device: str
    threads: int
    precision: str
    seed: int
    split: dict[str, Any]  # name, sha256 of the labeled ids, counts
    weights: dict[str, str]  # name, sha256
    protocol: str
    evaluated: dict[str, Any]  # number of images
    versions: dict[str, str]
    commit: str


def write_atomically(path: Path, content: str | bytes) -> None:
    """All of the content or nothing: a temporary file beside it, flushed to disk, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(record: Record, folder: Path) -> None:
    write_atomically(folder / "record.json", record.model_dump_json(indent=1) + "\n")


def load(folder: str | Path) -> Record | None:
    """The record of a run folder, None where the run is not finished."""
    path = Path(folder) / "record.json"
    if not path.exists():
        return None
    try:
        return Record.model_validate_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged; delete it and the run is finished from its checkpoint. {str(error)[:300]}") from error


def history(folder: str | Path) -> list[dict[str, Any]]:
    """Rows of history.jsonl; a line that is still being written is left out."""
    path = Path(folder) / "history.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def environment() -> dict[str, str]:
    """Versions of what can change a result."""
    names = ("torch", "torchvision", "segmentation-models-pytorch", "timm", "numpy")
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The project's git commit, with "+changes" where the working tree differs; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "mkd_core") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def dump(records: Iterable[Record], path: Path) -> None:
    """records.jsonl: one record a line, data set and weights by their last name only."""
    write_atomically(path, "".join(_portable(r).model_dump_json() + "\n" for r in records))


def _portable(record: Record) -> Record:
    """Without the folders of the machine that made it; the hashes say what the files were."""
    own = {key: Path(record.config[key]).name for key in ("root", "weights")}
    return record.model_copy(update={"config": record.config | own})


def collect(source: str | Path) -> list[Record]:
    """Records of a runs folder (its finished runs) or of a records.jsonl file."""
    source = Path(source)
    if source.is_file():
        return [Record.model_validate_json(line) for line in source.read_text().splitlines()]
    return [r for r in map(load, sorted(source.glob("*/"))) if r]


def table(rows: dict[str, list[Record]]) -> pd.DataFrame:
    """One row a name: mIoU last and best as mean +- sample standard deviation over seeds, their number, the seeds, seconds a run.

    Refused where the rows were not measured alike: other evaluation protocols, other evaluated sets, or, seed by seed, other labeled images.
    """
    every = [r for records in rows.values() for r in records]
    for what, of in {
        "data sets": lambda r: r.config["dataset"],
        "evaluation protocols": lambda r: r.protocol,
        "evaluated images": lambda r: json.dumps(r.evaluated, sort_keys=True),
    }.items():
        if len(found := {of(r) for r in every}) > 1:
            raise ValueError(f"one table, different {what}: {', '.join(sorted(found))}")
    for seed in {r.seed for r in every}:
        if len({r.split["sha256"] for r in every if r.seed == seed}) > 1:
            raise ValueError(f"one table, different labeled images (split hashes) for seed {seed}")

    def spread(values: list[float]) -> str:
        series = pd.Series(values)
        return f"{series.mean():.1f}" + (f" ± {series.std():.1f}" if len(values) > 1 else "")

    return pd.DataFrame(
        {
            "mIoU last": [spread([r.miou for r in records]) if records else "missing" for records in rows.values()],
            "mIoU best": [spread([r.miou_best for r in records]) if records else "missing" for records in rows.values()],
            "runs": [len(records) for records in rows.values()],
            "seeds": [", ".join(str(r.seed) for r in records) for records in rows.values()],
            "seconds a run": [f"{pd.Series([r.seconds for r in records]).mean():.0f}" if records else "" for records in rows.values()],
        },
        index=pd.Index(rows, name="method"),
    )
