"""parameters/{paper,quick,demo}: every grid is valid, says what it is, agrees with the paper's tables and with the other grids; and the
paper's configurations train: three steps of each with its real networks, on synthetic images in the real layouts.

The whole sweep of the last part takes half an hour or more on a CPU: MKD_SLOW=1. Without it, one configuration for each encoder and layout is trained.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mkd_core import METHODS, Grid, RunConfig, load_split, open_dataset, records, run, runner
from mkd_core.config import NOT_IDENTITY
from mkd_core.data import DATASETS
from mkd_core.data.splits import published_splits
from mkd_core.suite.cli import main

PARAMETERS = Path(__file__).parents[1] / "parameters"
PAPER = {path.stem: path for path in sorted((PARAMETERS / "paper").glob("*.yaml"))}
FILES = [*PAPER.values(), *sorted((PARAMETERS / "quick").glob("[1-9]*.yaml")), *sorted((PARAMETERS / "demo").glob("[1-9]*.yaml"))]
TABLES = [stem for stem in PAPER if stem[:2] in ("20", "21", "22", "23", "30", "31", "32")]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")


@cache
def cells(path: Path) -> dict[str, dict[str, list[RunConfig]]]:
    """Row -> column -> configurations of a file's grid, without the user's files: the data's folder and the weights."""
    values = yaml.safe_load(path.read_text())
    columns = values["columns"] if isinstance(values.get("columns"), dict) else {"": {}}
    rows, columns = ({name: keys | {"weights": ""} for name, keys in part.items()} for part in (values["rows"], columns))
    return Grid(common=values["common"] | {"root": ""}, rows=rows, columns=columns, seeds=values["seeds"]).cells


def runs(path: Path) -> list[RunConfig]:
    return [config for of in cells(path).values() for configs in of.values() for config in configs]


def cell(stem: str, row: str, column: str, tier: str = "paper") -> RunConfig:
    return cells(PARAMETERS / tier / f"{stem}.yaml")[row][column][0]


def recipe(name: str) -> RunConfig:
    return RunConfig(**yaml.safe_load((PARAMETERS / f"recipes/{name}.yaml").read_text()))


@pytest.mark.parametrize("stem", PAPER)
def test_a_dry_run_plans_the_full_protocol_without_its_files(stem, monkeypatch, capsys):
    """The networks themselves are built by the tests that train below."""
    monkeypatch.setattr(runner, "build_method", lambda config, classes: METHODS[config.method])
    assert main(["batch", str(PAPER[stem]), "--dry-run"]) == 2
    out, err = capsys.readouterr()
    count = len(runs(PAPER[stem]))
    assert len(out.splitlines()) == count + 1 and f"0 done, 0 running now, {count} to run" in out
    faults = err.removeprefix("mkd batch: ").splitlines()
    assert all("weights file" in fault or "is not a folder" in fault for fault in faults) and 2 <= len(faults) <= 4, err


@each_file
def test_the_head_says_what_the_grid_is(path):
    """Every configuration is valid, and the size in the head is counted, not remembered."""
    steps = sum(c.steps for c in runs(path))
    images = sum(c.steps * c.batch * (1 + METHODS[c.method].unlabeled) for c in runs(path))
    assert f"# Size:     {len(runs(path))} runs, {steps:,} steps, {images:,} images (labeled and unlabeled" in path.read_text()


def test_there_is_a_full_protocol_of_every_table_and_a_reduced_one():
    quick = {path.stem for path in (PARAMETERS / "quick").glob("[2-4]*.yaml")}
    assert len(TABLES) == 7 and {*TABLES, "33_ablations", "40_figure2"} == PAPER.keys() == quick


@pytest.mark.parametrize("stem", PAPER)
def test_the_full_protocol_leaves_no_value_to_a_default(stem):
    """All that can change a result stands in the file, with its origin."""
    values = yaml.safe_load(PAPER[stem].read_text())
    for row in values["rows"].values():
        for column in values.get("columns", {"": {}}).values():
            assert (values["common"] | row | column).keys() >= RunConfig.model_fields.keys() - NOT_IDENTITY - {"seed", "options"}
    common = PAPER[stem].read_text().split("common:\n")[1].split("\nrows:")[0].splitlines()
    free = ("root", "weights", "dataset_options", *NOT_IDENTITY)
    for line in common:
        assert line.split(":")[0].strip() in free or re.search(r"# \[(paper|released|ours)\]", line), f"{stem}: origin of {line.strip()}?"
    for line in re.findall(r"options: &mkd\n((?:      .*\n|    {2,}.*\n)+)", PAPER[stem].read_text())[0].splitlines():
        assert re.search(r"# \[(paper|released|ours)\]", line), f"{stem}: origin of {line.strip()}?"


@pytest.mark.parametrize("stem", TABLES)
def test_the_full_protocol_is_the_published_table(stem):
    """Every row and column that the paper has, with its split and its backbone."""
    values = yaml.safe_load(PAPER[stem].read_text())
    published = yaml.safe_load((PARAMETERS.parent / f"published/{values['published']}.yaml").read_text())
    assert published["rows"].keys() <= cells(PAPER[stem]).keys()
    backbones = {"ResNet-50": "resnet50", "ResNet-101": "resnet101", "Xception-65": "tu-xception65"}
    for of in cells(PAPER[stem]).values():
        assert list(of) == list(published["columns"])
        for title, about in published["columns"].items():
            assert of[title][0].split == about["split"] and of[title][0].encoder == backbones[about["backbone"]]


@pytest.mark.parametrize("dataset", ["voc", "voc_aug", "cityscapes", "coco"])
def test_the_splits_of_the_full_protocol_are_the_published_lists(dataset, tmp_path, mirror):
    for part in ("JPEGImages", "leftImg8bit/train", "leftImg8bit/val", "train2017", "val2017"):
        (tmp_path / part).mkdir(parents=True)
    if dataset in ("voc", "voc_aug"):
        data: Any = open_dataset(dataset, str(tmp_path))
    else:  # their lists are the images on disk: an object that has the published names instead
        lists = (
            [mirror / "cps/DATA/city/config_new/train.txt"] if dataset == "cityscapes" else (mirror / "unimatch/coco").rglob("labeled.txt")
        )
        train = sorted(set(re.findall(DATASETS[dataset].pattern, "".join(path.read_text() for path in lists))))
        train += [f"9{i:011d}" for i in range(118_287 - len(train))] if dataset == "coco" else []
        data = SimpleNamespace(
            name=dataset, root=tmp_path, pattern=DATASETS[dataset].pattern, train=tuple(train), val=(), files=lambda id: (0, 0)
        )
    titles = {title: c for stem in TABLES for of in cells(PAPER[stem]).values() for title, (c, *_) in of.items() if c.dataset == dataset}
    for title, config in titles.items():
        split = load_split(data, config.split)
        assert len(split.labeled) == int(re.search(r"\((\d+)\)", title)[1]) == published_splits(dataset)[config.split]
        everything = len(split.labeled) == len(data.train)  # "Full" of the 1,464: the labeled images serve as unlabeled ones too
        assert len(split.unlabeled) == len(data.train) - (0 if everything else len(split.labeled))
    assert len({config.split for config in titles.values()}) == {"voc": 5, "voc_aug": 13, "cityscapes": 8, "coco": 5}[dataset]


def test_what_tables_share_is_one_run():
    """Equal rows have equal ids, so they are trained once."""
    fractions = {"1/16 (662)", "1/8 (1323)", "1/4 (2646)", "1/2 (5291)"}
    for row, same in {
        "co-training": "CPS",
        "+ SDA": "CPS with CutMix",
        "+ mutual MT + SDA + KS": "MKD",
        "MKD (released)": "MKD (released)",
    }.items():
        for title in fractions:
            assert cell("30_table4_components", row, title).id == cell("21_table2_vocaug", same, f"R101 {title}").id
    for title in ("1/16 (92)", "Full (1464)"):
        ids = {cell("31_table5_selection", "KS on L_st", title).id, cell("32_table6_heterogeneous", "SN", title).id}
        assert ids == {cell("20_table1_voc", "MKD †*", f"R101 {title}").id}
    base = cell("21_table2_vocaug", "MKD", "R50 1/16 (662)")
    assert base.id == recipe("paper").id == cell("33_ablations", "MKD", "R50 1/16 (662)").id == cell("40_figure2", "MKD", "").id
    assert cell("40_figure2", "co-training", "").id == cell("21_table2_vocaug", "CPS", "R50 1/16 (662)").id
    released = cell("33_ablations", "MKD (released)", "R50 1/16 (662)")
    assert released.id == cell("21_table2_vocaug", "MKD (released)", "R50 1/16 (662)").id
    assert released.model_copy(update={"protocol": "long512"}).id == recipe("released").id


def test_the_demo_takes_over_the_runs_of_the_quickstart():
    mkd, cps, sup = (cell("00_quickstart", row, "", "demo").id for row in ("MKD", "co-training", "SupOnly"))
    column = "random/32"
    assert (
        cell("30_table4_components", "+ mutual MT + SDA + KS", column, "demo").id == cell("20_table1_voc", "MKD", column, "demo").id == mkd
    )
    assert cell("30_table4_components", "co-training", column, "demo").id == cell("20_table1_voc", "CPS", column, "demo").id == cps
    assert cell("20_table1_voc", "SupOnly", column, "demo").id == sup
    for stem, row in {"31_table5_selection": "KS on L_st", "32_table6_heterogeneous": "SN", "33_ablations": "MKD"}.items():
        assert cell(stem, row, column, "demo").id == mkd
    assert [cell("40_figure2", row, "", "demo").id for row in ("co-training", "MKD")] == [cps, mkd]


@pytest.mark.parametrize("path", [p for p in FILES if p.stem == "33_ablations"], ids=lambda path: path.parent.name)
def test_an_ablation_is_one_switch(path):
    """Each row differs from the first, or from another above it, in exactly one value; the released recipe is no ablation."""

    def values(config: RunConfig) -> dict[str, Any]:
        dumped = config.model_dump(mode="json")
        return {f"options.{k}": v for k, v in dumped.pop("options").items()} | dumped

    rows = {name: values(next(iter(of.values()))[0]) for name, of in cells(path).items() if name != "MKD (released)"}
    names = [*rows]
    for place, (name, row) in enumerate(rows.items()):
        above = {other: len([k for k in row if row[k] != rows[other][k]]) for other in names[:place]}
        assert not place or 1 in above.values(), (name, above)
    assert len(rows) > 20


# Training.


def configurations() -> dict[str, RunConfig]:
    """The distinct configurations of the full protocol, but for splits and seeds, by name."""
    found: dict[str, RunConfig] = {}
    names: dict[str, str] = {}
    for stem, path in PAPER.items():
        for row, of in cells(path).items():
            for config, *_ in of.values():
                name = names.setdefault(
                    config.model_dump_json(exclude={"split", "seed"}), f"{config.dataset} {config.encoder} {stem[:2]} {row}"
                )
                found.setdefault(name, config)
    return found


CONFIGURATIONS = configurations()
ALWAYS = ("voc_aug resnet50 21 MKD (released)", "cityscapes resnet50 22 CPS", "coco tu-xception65 23 SupOnly", "voc resnet101 20 SupOnly")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, Path]:
    """Six synthetic images, every class among them, in the layout of each data set."""
    top = tmp_path_factory.mktemp("layouts")
    rng = np.random.default_rng(0)

    def write(image: Path, mask: Path, classes: int) -> None:
        for path, array in ((image, rng.integers(0, 256, (64, 80, 3))), (mask, rng.integers(0, classes, (64, 80)))):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(path)

    for i in range(6):
        part = "val" if i == 5 else "train"
        write(top / f"voc/JPEGImages/2007_{i:06d}.jpg", top / f"voc/SegmentationClass/2007_{i:06d}.png", 21)
        city = f"{part}/ulm/ulm_{i:06d}_000019"
        write(top / f"cityscapes/leftImg8bit/{city}_leftImg8bit.png", top / f"cityscapes/gtFine/{city}_gtFine_labelTrainIds.png", 19)
        write(top / f"coco/{part}2017/{i:012d}.jpg", top / f"coco/masks/{i:012d}.png", 81)
    lists = top / "voc/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for name, ids in {"train": range(5), "train_aug": range(5), "val": [5]}.items():
        (lists / f"{name}.txt").write_text("".join(f"2007_{i:06d}\n" for i in ids))
    return {"voc": top / "voc", "voc_aug": top / "voc", "cityscapes": top / "cityscapes", "coco": top / "coco"}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_paper_configuration_trains(name, layouts, tmp_path, monkeypatch):
    """Three steps with the real networks: everything but size, split and length is the file's."""
    if name not in ALWAYS and not os.environ.get("MKD_SLOW"):
        pytest.skip("MKD_SLOW=1 trains every configuration")
    config = CONFIGURATIONS[name]
    small = {"root": str(layouts[config.dataset]), "split": "random/2", "crop": (64, 64), "batch": 2, "steps": 3, "evaluate_every": 0}
    machine = {"device": "cpu", "threads": 1, "workers": 0, "log_every": 1, "quality_images": 0}
    monkeypatch.setattr(runner._Run, "_save", lambda self, name: None)  # a gigabyte for nothing: checkpoints are tested elsewhere
    record = run(RunConfig(**config.model_dump() | small | machine), tmp_path, quiet=True)
    rows = records.history(tmp_path / record.id)
    assert record.status == "done" and len(rows) == 3 and len(record.classes) == {"cityscapes": 19, "coco": 81}.get(config.dataset, 21)
    assert all(np.isfinite(value) for row in rows for key, value in row.items() if key == "loss" or key.startswith(("term/", "stat/")))
    assert {key for key in rows[0] if key.startswith("term/")} >= {"term/sup"}


def test_the_configurations_that_are_always_trained_exist():
    assert set(ALWAYS) <= CONFIGURATIONS.keys() and len(CONFIGURATIONS) > 60
