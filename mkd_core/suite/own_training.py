"""A person's own photos: methods trained on a prepared folder, and their report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..choices import choose
from ..config import Grid
from ..data import SegDataset, open_dataset
from ..data.layouts import DONE
from ..data.pictures import absolute
from ..evaluate import evaluate
from ..methods import METHODS
from ..metrics import miou
from ..parameters import merge, read_parameters
from ..records import Cells
from ..trained import open_run
from . import figures, report
from .batch import run_table
from .notebook import holds_other_runs
from .own_images import TEXT, prepare_folder

QUICK = {"steps": 120, "batch": 4, "evaluate_every": 60, "quality_images": 16}


def train_folder(
    folder: str | Path, methods: Sequence[str] = ("supervised", "mkd"), *, quick: bool = False,
    out: str | Path | None = None, classes: Sequence[str] | int | None = None, **keys: Any,
) -> Cells:  # fmt: skip
    """Train methods on one's own photos, write their report, return their records by row and column.

    The folder is prepared where that was not done; `classes`, and all else about that: `prepare_folder`.
    out       where the folder was prepared, default <folder>/mkd; the report lies in <out>/report, or in report-2 ... beside that of other settings
    quick     few steps, minutes on two cores
    keys      of RunConfig over <out>/mkd.yaml; "options.alpha": 2.0 reaches into MKD's options

    Where there is a test.txt, the trained runs are evaluated on it too.
    """
    out = absolute(out or absolute(folder) / "mkd")
    if not (out / DONE).exists():
        prepare_folder(folder, out, classes=classes)
    elif classes:
        raise ValueError(f"{out} is prepared already; give the classes to mkd prepare --overwrite")
    values = read_parameters(out / DONE, TEXT)
    values = merge(values, (QUICK if quick else {}) | keys, values)
    own, options, seed = values.pop("method"), values.pop("options"), values.pop("seed")
    for name in methods:
        choose("method", name, METHODS)
    if own not in methods and any(key.startswith("options") for key in keys):
        raise ValueError(f"options are {own}'s, which is not among the methods")
    rows: dict[str, Any] = {
        METHODS[name].label: {"method": name, "options": options if name == own else {}} for name in methods
    }
    table: dict[str, Any] = {"common": values, "rows": rows, "seeds": [seed]}
    grid = Grid(**table)
    places = (out / f"report{'-quick' * quick}{k}" for k in ("", *(f"-{k}" for k in range(2, 1000))))
    place = next(place for place in places if not holds_other_runs(place, grid))
    cells = run_table(grid)
    place.mkdir(exist_ok=True)
    made, _ = report.write(cells, place)
    dataset = open_dataset("folder", str(out), **values.get("dataset_options", {}))
    figures.save(_comparison(cells, dataset), place / "predictions.png")
    print("", made.markdown(), *_on_test(cells, out), "", sep="\n")
    best = max((record for of in cells.values() for record in of[""]), key=lambda record: record.miou)
    print(f"Report: {place}\nNext: mkd predict {best.id} PHOTOS --out predictions")
    return cells


def _comparison(cells: Cells, dataset: SegDataset) -> figures.Picture:
    """Draw photos of val, their masks and what the runs predict."""
    ids = dataset.val[:64]
    images, truth = [dataset.image(id) for id in ids], [dataset.label(id) for id in ids]
    found = {}
    for name, of in cells.items():
        model = open_run(of[""][0].id).predictor()
        found[name] = [model.label(image)[0] for image in images]
    if len(found) > 1:
        return figures.figure2(images, truth, found, dataset.palette, dataset.classes)
    rows: dict[str, Any] = {"photo": [*map(figures.to_image, images[:8])], "mask": truth[:8]}
    rows |= {name: labels[:8] for name, labels in found.items()}
    return figures.sheet(rows, palette=dataset.palette, classes=dataset.classes)


def _on_test(cells: Cells, out: Path) -> list[str]:
    """Evaluate the runs on the images of test.txt, which no run has seen."""
    if not (out / "test.txt").is_file():
        return []
    lines = []
    for name, of in cells.items():
        opened = open_run(of[""][0].id)
        dataset = open_dataset("folder", str(out), **opened.config.dataset_options | {"val": "test.txt"})
        model = opened.predictor()
        confusion, _ = evaluate(model, dataset, dataset.val)
        lines.append(f"  {name}: {miou(confusion[model.names[0]]):.1f}")
    return ["", f"mIoU on the {len(dataset.val)} images of test.txt:", *lines]
