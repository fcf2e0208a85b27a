"""What a run leaves: runs/<id>/{config.json, history.{jsonl,csv}, record.json, checkpoint.pt}; and files of many records."""

import json
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

# Notebooks and papermill start in different folders; the project's root is where the package lies.
ROOT = Path(__file__).resolve().parents[1]
RUNS = Path(os.path.expanduser(os.environ.get("MKD_RUNS") or ROOT / "runs")).resolve()


def below_root(name: str | Path) -> Path:
    """A path by its name relative to the project's root; an absolute one, or one from "~", stays as it is."""
    return ROOT / os.path.expanduser(name)


def folder(name: str | Path) -> Path:
    """A folder of the project by its name relative to the root, e.g. "runs/demo"; made where it does not exist."""
    path = below_root(name)
    path.mkdir(parents=True, exist_ok=True)
    return path


class Record(BaseModel):
    """The result of one run, plain JSON. mIoU and IoU in percent; `miou` is the last step's, never the best's."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    id: str
    config: dict[str, Any]
    miou: float  # of the first predictor, after the last step
    miou_best: float  # of the evaluations: optimistic, chosen on the images that it is measured on
    step_best: int
    iou: list[float | None]  # per class, first predictor, last step; None: neither there nor predicted
    classes: list[str]
    predictors: dict[str, float]  # mIoU of each, last step
    predictors_best: dict[str, float]
    pseudo_labels: dict[str, Any] | None  # quality against withheld labels, last step
    evaluations: list[dict[str, Any]]  # step, mIoU and pseudo-label quality of each predictor
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
    commit: str  # of the code; where a run went on under another, all of them


Rows = Mapping[str, Sequence[Record]]
Cells = Mapping[str, Mapping[str, Sequence[Record]]]  # row -> column -> one record a seed


def is_busy(folder: Path) -> bool:
    """Does a process hold the lock of this run folder, here or on another host that shares it?"""
    if not (folder / "lock").exists():
        return False
    try:
        with FileLock(folder / "lock", timeout=0):
            return False
    except Timeout:
        return True


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], Any]) -> None:
    """Write all of the content or nothing: a temporary file beside it, flushed to disk, then renamed over it.

    content may be what writes into a binary file: partial(picture.save, format="PNG").
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
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
    try:
        return Record.model_validate_json(path.read_text()) if path.exists() else None
    except ValueError as error:
        advice = "delete it and the run is finished from its checkpoint"
        raise ValueError(f"{path} is damaged; {advice}. {str(error)[:300]}") from error


def history(folder: str | Path) -> list[dict[str, Any]]:
    """Rows of history.jsonl; a line that is still being written is left out."""
    path = Path(folder) / "history.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise ValueError("a row without a step")
        return rows
    except ValueError as error:
        advice = "delete it, and a run that goes on writes it anew from its checkpoint"
        raise ValueError(f"{path} is damaged ({error}); {advice}") from error


def numbers(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Lay out the numbers of a history, not its lists: a row each, a column each, as in "miou/student 1"."""
    return pd.json_normalize(rows, sep="/").select_dtypes("number")


def board(folder: Path, step: int) -> Callable[[dict[str, Any]], None]:
    """Open TensorBoard's event files of a run that goes on after `step`; return what adds a row of the history."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(row: dict[str, Any]) -> None:
        for name, value in numbers([row]).iloc[0].items():
            writer.add_scalar(name, value, row["step"])
        writer.flush()

    return add


def environment() -> dict[str, str]:
    """Versions of what can change a result."""
    machine = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    names = ("torch", "torchvision", "segmentation-models-pytorch", "timm", "numpy")
    found = {name: [of.version for of in distributions(name=name)] for name in names}
    return machine | {name: of[0] if of else "not installed" for name, of in found.items()}


def commit() -> str:
    """The project's git commit, with "+changes" where the working tree differs; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.PIPE).strip()

    try:
        return git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain", "--", "mkd_core"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# Many records.

PLACES = ("root", "weights", "weights2", "cache")  # keys of a configuration: where things lie on a machine
COLUMNS = (
    "row", "column", "seed", "method", "dataset", "data", "dataset_options", "split", "all_labels", "protocol",
    "encoder", "steps", "weights", "labeled", "sha256", "sha256_unlabeled", "sha256_val", "evaluated", "images",
    "classes", "iou", "miou", "miou_best", "seconds", "confusion", "evaluations",
)  # fmt: skip


def as_cells(cells: Rows | Cells) -> Cells:
    """Give rows alone one column without a name."""
    return {row: of if isinstance(of, Mapping) else {"": of} for row, of in cells.items()}


def describe(config: Mapping[str, Any], record: Record | None = None) -> dict[str, Any]:
    """Make a run's line of `frame` from its configuration in plain JSON, and from its record where there is one."""
    dataset, root = config["dataset"], Path(config["root"]).name
    keys = ("seed", "method", "dataset", "split", "protocol", "encoder", "steps")
    line = {key: config[key] for key in keys}
    # VOC and VOCAug differ in their unlabeled images only; a folder is known by its name.
    line["data"] = {"voc_aug": "voc", "folder": f"folder {root}"}.get(dataset, dataset)
    line["dataset_options"] = json.dumps(config["dataset_options"], sort_keys=True)
    line["all_labels"] = line["method"] == "supervised" and line["split"] == "full"
    if record:
        line |= {key: getattr(record, key) for key in COLUMNS if key in Record.model_fields}
        of, split = record.evaluated, record.split
        line |= {key: split.get(key) for key in ("labeled", "sha256", "sha256_unlabeled", "sha256_val")}
        line |= {"split": config["split"], "weights": record.weights["name"]}
        line |= {"images": of["images"], "evaluated": json.dumps(of, sort_keys=True)}
    return line


def frame(cells: Rows | Cells | pd.DataFrame) -> pd.DataFrame:
    """Lay out records in one tidy table, a line a run; a table stays as it is. All tables and figures are made from it.

    row, column        categories in the order of `cells`; those without runs are among them
    seed .. weights    of the configuration; data: whose images are evaluated; all_labels: whether the run is
                       SupOnly on every label (split "full"), the upper bound of the methods
    labeled, sha256 .. sha256_val   number of labeled images, hashes of the three sets of ids
    evaluated, images  the images of the evaluation and their number
    classes, iou       C names, and IoU in percent (None where a class does not occur): `explode` both
    miou, miou_best    in percent, of the last step and of the best evaluation
    confusion, evaluations   as in the record
    """
    if isinstance(cells, pd.DataFrame):
        return cells
    cells = as_cells(cells)
    titles = dict.fromkeys(title for of in cells.values() for title in of)
    places = [(row, title, record) for row, of in cells.items() for title in of for record in of[title]]
    lines = [{"row": row, "column": title, **describe(r.config, r)} for row, title, r in places]
    table = pd.DataFrame(lines, columns=list(COLUMNS)).astype({"all_labels": bool})
    table["row"] = pd.Categorical(table.row, list(cells))
    table["column"] = pd.Categorical(table.column, list(titles))
    return table


def labeler(names: Sequence[str]) -> str:
    """Return the predictor that labels unlabeled images: the first teacher, else the first of all."""
    return next((name for name in names if name.startswith("teacher")), names[0])


def evaluations(runs: pd.DataFrame) -> pd.DataFrame:
    """Lay out the evaluations of the runs of a `frame`, a line an evaluated predictor.

    row, column, seed, step, predictor; miou, kept, accuracy, accuracy_all in percent, NaN where not measured;
    classes, kept_per_class, accuracy_per_class (of the class that is predicted): C of each, to `explode`.
    reported marks the predictor whose mIoU counts, the first; labeler the one that labels (`labeler`).
    A run whose record holds no evaluations has no lines.
    """
    numbers, lines = ("miou", "kept", "accuracy", "accuracy_all"), []
    measured = (*numbers, "kept_per_class", "accuracy_per_class")
    for run in runs.itertuples():
        for found in run.evaluations:
            quality = found.get("pseudo_labels", {})
            names = list(dict.fromkeys([*found["miou"], *quality]))
            for name in names:
                of = {"miou": found["miou"].get(name)} | quality.get(name, {})
                place = [run.row, run.column, run.seed, found["step"], name, run.classes, name == names[0]]
                lines.append([*place, name == labeler(names), *map(of.get, measured)])
    keys = ["row", "column", "seed", "step", "predictor", "classes", "reported", "labeler", *measured]
    kinds = dict.fromkeys(numbers, float) | {"row": runs.row.dtype, "reported": bool, "labeler": bool}
    return pd.DataFrame(lines, columns=keys).astype(kinds)


def dump(cells: Rows | Cells, path: Path) -> None:
    """Write records.jsonl: one record a line, led by its row and column; these alone where a cell is empty.

    Folders keep their last name only: where they lay on the machine says nothing, the hashes say what they held.
    """
    lines = []
    for row, of in as_cells(cells).items():
        for title, found in of.items():
            kept: list[dict[str, Any]] = [record.model_dump(mode="json") for record in found]
            for line in kept:
                line["config"] |= {key: Path(line["config"].get(key, "")).name for key in PLACES}
            lines += [{"row": row, "column": title} | line for line in kept or [{}]]
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_cells(path: str | Path) -> dict[str, dict[str, list[Record]]]:
    """Read row -> column -> records of a records.jsonl file, in its order."""
    cells: dict[str, dict[str, list[Record]]] = {}
    for number, text in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
            found = cells.setdefault(line.pop("row"), {}).setdefault(line.pop("column"), [])
            found += [Record(**line)] if line else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fault = f"line {number} is not a record with its row and column: {str(error)[:300]}"
            raise ValueError(f"{path}, {fault}") from error
    return cells


def evidence(source: str) -> dict[str, dict[str, dict[str, list[Record]]]]:
    """Read the cells of every <source>/<name>/records.jsonl, by name; `source` is relative to the root."""
    place = below_root(source)
    if not (found := sorted(place.glob("*/records.jsonl"))):
        raise ValueError(f"{place} holds no folder with a records.jsonl")
    return {path.parent.name: read_cells(path) for path in found}
