"""What a run leaves: runs/<id>/{config.json, history.jsonl, record.json, checkpoint.pt}; and files of many records."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

ROOT = (
    Path(__file__).resolve().parents[1]
)  # notebooks and papermill start in different folders; the project root is where the package lies
RUNS = Path(os.path.expanduser(os.environ.get("MKD_RUNS") or ROOT / "runs")).resolve()


def below_root(name: str | Path) -> Path:
    """A path by its name relative to the project's root; an absolute one, or one from "~", stays as it is."""
    return ROOT / os.path.expanduser(name)


def folder(name: str | Path) -> Path:
    """A folder of the project by its name relative to the root, e.g. "runs/demo"; made where it does not exist."""
    path = below_root(name)
    path.mkdir(parents=True, exist_ok=True)
    return path


def nearest(path: Path) -> Path:
    """The path itself, or of the folders above it the first that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


class Record(BaseModel):
    """The result of one run, plain JSON. mIoU and IoU in percent; `miou` is the last step's, never the best's."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    id: str
    config: dict[str, Any]
    miou: float  # of the first predictor, after the last step
    miou_best: float  # over the evaluations made: optimistic, since it is chosen on the images that it is measured on
    step_best: int
    iou: list[
        float | None
    ]  # per class, first predictor, last step; None where a class neither occurs nor is predicted
    classes: list[str]
    predictors: dict[str, float]  # mIoU of each, last step
    predictors_best: dict[str, float]
    pseudo_labels: dict[str, Any] | None  # quality against withheld labels, last step
    evaluations: list[
        dict[str, Any]
    ]  # one an evaluation: step, mIoU and pseudo-label quality of each predictor
    confusion: list[list[int]]  # pixels by (truth, prediction), first predictor, last step
    seconds: float  # training and evaluation, all parts of an interrupted run together
    images_per_second: float  # labeled and unlabeled, training alone
    peak_memory_mb: float  # of the GPU during the run, or of the whole process on a CPU
    device: str
    threads: int
    precision: str
    seed: int
    split: dict[str, Any]  # name, counts, hashes of the labeled, unlabeled and evaluated ids
    weights: dict[str, str]  # name, sha256
    protocol: str
    evaluated: dict[str, Any]  # number of images
    versions: dict[str, str]
    commit: str


Rows = Mapping[str, Sequence[Record]]
Cells = Mapping[str, Mapping[str, Sequence[Record]]]  # row -> column -> one record a seed


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
    """Read the record of a run folder; None where the run is not finished."""
    path = Path(folder) / "record.json"
    if not path.exists():
        return None
    try:
        return Record.model_validate_json(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged; delete it and the run is finished from its checkpoint. {str(error)[:300]}"
        ) from error


def history(folder: str | Path) -> list[dict[str, Any]]:
    """Rows of history.jsonl; a line that is still being written is left out."""
    path = Path(folder) / "history.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise ValueError("a row without a step")
        return rows
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete it, and a run that goes on writes it anew from its checkpoint"
        ) from error


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
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", "mkd_core") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def as_cells(cells: Rows | Cells) -> Cells:
    """Rows alone stand in one column without a name."""
    return {row: of if isinstance(of, Mapping) else {"": of} for row, of in cells.items()}


def dump(cells: Rows | Cells, path: Path) -> None:
    """records.jsonl: one record a line, led by its row and column (these alone where a cell is empty); folders by their last name only."""
    lines = [
        json.dumps({"row": row, "column": title} | record, ensure_ascii=False) + "\n"
        for row, of in as_cells(cells).items()
        for title, found in of.items()
        for record in ([_portable(r).model_dump(mode="json") for r in found] or [{}])
    ]
    write_atomically(path, "".join(lines))


def read_cells(path: str | Path) -> dict[str, dict[str, list[Record]]]:
    """Row -> column -> records of a records.jsonl file, in its order."""
    cells: dict[str, dict[str, list[Record]]] = {}
    for number, text in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
            row, title = (line.pop(key) for key in ("row", "column"))
            if not isinstance(row, str) or not isinstance(title, str):
                raise ValueError("row and column are names")
            cells.setdefault(row, {}).setdefault(title, []).extend([Record(**line)] if line else [])
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is cut or damaged, no record with its row and column: {str(error)[:300]}"
            ) from error
    return cells


def evidence(source: str) -> dict[str, dict[str, dict[str, list[Record]]]]:
    """The cells of every <source>/<name>/records.jsonl, by name; source is relative to the root. ValueError where there is none."""
    place = below_root(source)
    if not (found := sorted(place.glob("*/records.jsonl"))):
        raise ValueError(f"{place} holds no folder with a records.jsonl")
    return {path.parent.name: read_cells(path) for path in found}


def _portable(record: Record) -> Record:
    """Without the folders of the machine that made it; the hashes say what the files were."""
    own = {key: Path(record.config[key]).name for key in ("root", "weights")}
    return record.model_copy(update={"config": record.config | own})
