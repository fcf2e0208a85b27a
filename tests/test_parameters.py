"""parameters/{paper,quick,demo}: every grid is valid, says what it is, agrees with the paper's tables and with the others;
and the paper's configurations train: three steps of each with its real networks, on synthetic images in the real layouts.

The whole sweep of the last part takes half an hour or more on a CPU: MKD_SLOW=1. Without it, one configuration for each
encoder and layout is trained.
"""

import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from test_notebooks import NOTEBOOKS
from test_notebooks import parameters as cell_of
from tiny import save

from mkd_core import METHODS, Grid, RunConfig, load_split, open_dataset, records, run, runner
from mkd_core.config import NOT_IDENTITY, with_bases
from mkd_core.data import DATASETS
from mkd_core.data.splits import parse_ids, published_splits
from mkd_core.parameters import read_parameters
from mkd_core.suite import batch
from mkd_core.suite.cli import main

PARAMETERS = Path(__file__).parents[1] / "parameters"
PAPER = {path.stem: path for path in sorted((PARAMETERS / "paper").glob("*.yaml"))}
FILES = sorted(path for tier in ("paper", "quick", "demo") for path in (PARAMETERS / tier).glob("*.yaml"))
SIZED = [path for path in FILES if "# Size:" in path.read_text()]
TABLES = [stem for stem in PAPER if stem[:2] in ("20", "21", "22", "23", "30", "31", "32")]


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@cache
def whole(path: Path) -> dict[str, Any]:
    """A file's values on its bases, without the user's files: the data's folder and the weights."""
    values = with_bases(read_parameters(path))
    rows = {name: keys | {"root": "", "weights": "", "weights2": ""} for name, keys in values["rows"].items()}
    return {key: value for key, value in values.items() if key in Grid.model_fields} | {"rows": rows}


@cache
def cells(path: Path) -> dict[str, dict[str, list[RunConfig]]]:
    """Row -> column -> configurations of a file's grid."""
    return Grid(**whole(path)).cells


def runs(path: Path) -> list[RunConfig]:
    """The runs of a file, each once."""
    every = [config for of in cells(path).values() for configs in of.values() for config in configs]
    return list({config.model_dump_json(): config for config in every}.values())


def cell(stem: str, row: str, column: str, tier: str = "paper") -> RunConfig:
    return cells(PARAMETERS / tier / f"{stem}.yaml")[row][column][0]


def recipe(name: str) -> RunConfig:
    return RunConfig(**read_parameters(PARAMETERS / f"recipes/{name}.yaml"))


@pytest.mark.parametrize("stem", PAPER)
def test_a_dry_run_plans_the_full_protocol_without_its_files(stem, monkeypatch, capsys):
    """The networks themselves are built by the tests that train below."""
    monkeypatch.setattr(batch, "build_method", lambda config, classes: METHODS[config.method])
    assert main(["batch", str(PAPER[stem]), "--dry-run"]) == 2
    out, err = capsys.readouterr()
    count = len(runs(PAPER[stem]))
    assert len(out.splitlines()) == count + 1 and f"0 done, 0 running now, {count} to run" in out
    faults = err.removeprefix("mkd batch: ").splitlines()
    assert 2 <= len(faults) <= 4 and all("weights file" in f or "is not a folder" in f for f in faults), err


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_leaves_nothing_to_the_defaults_of_its_notebook(path):
    """A notebook's own common, rows and columns are the smoke run: they would lie over the file's bases."""
    stated, known = set(read_parameters(path)), set(cell_of(NOTEBOOKS / f"{path.stem}.ipynb"))
    assert {"out", "seeds", "common", "rows", "columns"} & known <= stated
    assert runs(path)


@pytest.mark.parametrize("path", SIZED, ids=named)
def test_the_size_in_the_head_is_counted_not_remembered(path):
    steps = sum(c.steps for c in runs(path))
    images = sum(c.steps * c.batch * (1 + METHODS[c.method].unlabeled) for c in runs(path))
    size = f"# Size:     {len(runs(path))} runs, {steps:,} steps, {images:,} images (labeled and unlabeled"
    assert size in path.read_text() and len(SIZED) > 20


def test_there_is_a_full_protocol_of_every_table_and_a_reduced_one():
    quick = {path.stem for path in (PARAMETERS / "quick").glob("[2-4]*.yaml")}
    tables = {*TABLES, "33_ablations", "40_figure2"}
    assert PAPER.keys() == tables | {"24_today_voc"} and quick == tables | {"35_photographs"}


def bases(path: Path) -> set[Path]:
    """The files below a file."""
    names = read_parameters(path).get("base", [])
    found = {PARAMETERS / name for name in ([names] if isinstance(names, str) else names or [])}
    return found.union(*(bases(below) for below in found if below.parent.name != "recipes"))


@pytest.mark.parametrize("stem", PAPER)
def test_the_full_protocol_leaves_no_value_to_a_default(stem):
    """All that can change a result stands in the file or its bases, with its origin."""
    values = whole(PAPER[stem])
    needed = RunConfig.model_fields.keys() - NOT_IDENTITY - {"seed", "options", "dataset_options", "method"}
    for column in values.get("columns", {"": {}}).values():
        assert (values["common"] | column).keys() >= needed
    free = {"dataset_options", "method", "options", "split", "weights", *NOT_IDENTITY}
    tag = re.compile(r"# .*\[(paper|released|code|ours)\]")
    released = PARAMETERS / "recipes/released.yaml"  # its head says that all of it is [released]
    for path in {PAPER[stem], *bases(PAPER[stem])} - {released}:
        stated = path.parent.name == "recipes"
        for line in path.read_text().splitlines():
            if re.match(r"[a-z]", line) and path.parent.name != "recipes":
                stated = line.startswith(("common:", "recipes:"))
            key = re.match(r" *([\w ]+?): *([^ {].*|\{\w.*)", line)
            fine = not (key and stated) or key[1] in free or tag.search(line)
            assert fine, f"{path.name}: origin of {line}?"


@pytest.mark.parametrize("stem", TABLES)
def test_the_full_protocol_is_the_published_table(stem):
    """Every row and column that the paper has, with its split and its backbone."""
    values = read_parameters(PAPER[stem])
    published = yaml.safe_load((PARAMETERS.parent / f"published/{values['published']}.yaml").read_text())
    assert published["rows"].keys() <= cells(PAPER[stem]).keys()
    backbones = {"ResNet-50": "tu-resnet50c", "ResNet-101": "tu-resnet101c", "Xception-65": "tu-xception65"}
    for of in cells(PAPER[stem]).values():
        assert list(of) == list(published["columns"])
        for title, about in published["columns"].items():
            first = of[title][0]
            assert (first.split, first.encoder) == (about["split"], backbones[about["backbone"]])


@pytest.mark.parametrize("dataset", ["voc", "voc_aug", "cityscapes", "coco"])
def test_the_splits_of_the_full_protocol_are_the_published_lists(dataset, tmp_path, mirror):
    for part in ("JPEGImages", "leftImg8bit/train", "leftImg8bit/val", "train2017", "val2017"):
        (tmp_path / part).mkdir(parents=True)
    if dataset in ("voc", "voc_aug"):
        data: Any = open_dataset(dataset, str(tmp_path))
    else:  # their lists are the images on disk: an object that has the published names instead
        city, pattern = mirror / "cps/DATA/city/config_new/train.txt", DATASETS[dataset].pattern
        lists = [city] if dataset == "cityscapes" else (mirror / "unimatch/coco").rglob("labeled.txt")
        train = sorted({i for path in lists for i in parse_ids(path.read_text(), pattern, path.name)})
        train += [f"9{i:011d}" for i in range(118_287 - len(train))] if dataset == "coco" else []
        data = SimpleNamespace(name=dataset, root=tmp_path, pattern=pattern, train=tuple(train), val=())
        data.files = lambda id: (0, 0)
    every = [of for stem in TABLES for of in cells(PAPER[stem]).values()]
    titles = {title: c for of in every for title, (c, *_) in of.items() if c.dataset == dataset}
    for title, config in titles.items():
        split = load_split(data, config.split)
        count, known = int(re.search(r"\((\d+)\)", title)[1]), published_splits(dataset)
        assert len(split.labeled) == count == known[config.split]
        # "Full" of the 1,464: the labeled images serve as unlabeled ones too
        assert len(split.unlabeled) == len(data.train) - (count if count < len(data.train) else 0)
    splits = {config.split for config in titles.values()}
    assert len(splits) == {"voc": 5, "voc_aug": 13, "cityscapes": 8, "coco": 5}[dataset]


TITLES = [f"R101 {part}" for part in ("1/16 (662)", "1/8 (1323)", "1/4 (2646)", "1/2 (5291)")]
CLASSIC = ("1/16 (92)", "Full (1464)")
T1, T2, T4 = "20_table1_voc", "21_table2_vocaug", "30_table4_components"
T5, T6, ABL, FIG = "31_table5_selection", "32_table6_heterogeneous", "33_ablations", "40_figure2"
SAME = [  # tier, cells (file, row, column) that are one run
    *[("paper", [(T4, a, title[5:]), (T2, b, title)]) for title in TITLES for a, b in (
        ("co-training", "CPS"), ("+ SDA", "CPS with CutMix"), ("+ mutual MT + SDA + KS", "MKD"), ("MKD (released)",) * 2)],
    *[("paper", [(T5, "KS on L_st", title), (T6, "SN", title),
                 (T1, "MKD †*", f"R101 {title}")]) for title in CLASSIC],
    ("paper", [(T2, "MKD", "R50 1/16 (662)"), (ABL, "MKD", "R50 1/16 (662)"), (FIG, "MKD", "")]),
    ("paper", [(T2, "CPS", "R50 1/16 (662)"), (FIG, "co-training", "")]),
    ("paper", [(T2, "MKD (released)", "R50 1/16 (662)"), (ABL, "MKD (released)", "R50 1/16 (662)")]),
    ("demo", [("00_quickstart", "MKD", ""), ("03_methods", "MKD", ""), (T1, "MKD", "random/32"), (FIG, "MKD", ""),
              (T4, "+ mutual MT + SDA + KS", "random/32"), (T5, "KS on L_st", "random/32"),
              (T6, "SN", "random/32"), (ABL, "MKD", "random/32")]),
    ("demo", [("00_quickstart", "co-training", ""), ("03_methods", "co-training", ""), (T1, "CPS", "random/32"),
              (FIG, "co-training", ""), (T4, "co-training", "random/32")]),
    ("demo", [("00_quickstart", "SupOnly", ""), ("03_methods", "SupOnly", ""), (T1, "SupOnly", "random/32")]),
    ("demo", [("34_fda", "detached", ""), (T4, "+ mutual MT + FDA", "random/32")]),
    ("demo", [("34_fda", "not detached", ""), (T4, "+ mutual MT + FDA, not detached", "random/32")]),
]  # fmt: skip


@pytest.mark.parametrize("tier, same", SAME, ids=lambda value: str(value)[:60])
def test_what_tables_share_is_one_run(tier, same):
    """Equal rows have equal ids, so they are trained once."""
    assert len({cell(*place, tier).id for place in same}) == 1 < len(same)


@pytest.mark.parametrize("path", [p for p in FILES if p.stem == ABL], ids=named)
def test_an_ablation_is_one_switch(path):
    """Each row differs from the first, or from another above it, in exactly one value; the released recipe is no ablation."""

    def values(config: RunConfig) -> dict[str, Any]:
        every = RunConfig(method="mkd_ablation", options=config.options).options
        dumped = config.model_dump(mode="json", exclude={"method", "options"})
        return {f"options.{k}": v for k, v in every.items()} | dumped

    rows = {name: values(next(iter(of.values()))[0]) for name, of in cells(path).items()}
    del rows["MKD (released)"]
    names = [*rows]
    for place, (name, row) in enumerate(rows.items()):
        above = {other: len([k for k in row if row[k] != rows[other][k]]) for other in names[:place]}
        assert not place or 1 in above.values(), (name, above)
    assert len(rows) > 20


@cache
def configurations() -> dict[str, RunConfig]:
    """The distinct configurations of the full protocol, but for splits and seeds, by name."""
    found: dict[str, tuple[str, RunConfig]] = {}
    for stem, path in PAPER.items():
        for row, of in cells(path).items():
            for config, *_ in of.values():
                name = f"{config.dataset} {config.encoder} {stem[:2]} {row}"
                found.setdefault(config.model_dump_json(exclude={"split", "seed"}), (name, config))
    return dict(found.values())


ALWAYS = ["voc_aug tu-resnet50c 21 MKD (released)", "cityscapes tu-resnet50c 22 CPS", "coco tu-xception65 23 SupOnly",
          "voc tu-resnet101c 20 SupOnly"]  # fmt: skip


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, Path]:
    """Six synthetic images, every class among them, in the layout of each data set."""
    top = tmp_path_factory.mktemp("layouts")
    rng = np.random.default_rng(0)

    def write(image: Path, mask: Path, classes: int) -> None:
        save(image, rng.integers(0, 256, (64, 80, 3)))
        save(mask, rng.integers(0, classes, (64, 80)))

    for i in range(6):
        part = "val" if i == 5 else "train"
        write(top / f"voc/JPEGImages/2007_{i:06d}.jpg", top / f"voc/SegmentationClass/2007_{i:06d}.png", 21)
        place, city = top / "cityscapes", f"{part}/ulm/ulm_{i:06d}_000019"
        label = place / f"gtFine/{city}_gtFine_labelTrainIds.png"
        write(place / f"leftImg8bit/{city}_leftImg8bit.png", label, 19)
        write(top / f"coco/{part}2017/{i:012d}.jpg", top / f"coco/masks/{i:012d}.png", 81)
    lists = top / "voc/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for name, ids in {"train": range(5), "train_aug": range(5), "val": [5]}.items():
        (lists / f"{name}.txt").write_text("".join(f"2007_{i:06d}\n" for i in ids))
    return {name: top / name for name in ("voc", "cityscapes", "coco")} | {"voc_aug": top / "voc"}


@pytest.mark.parametrize("name", configurations() if os.environ.get("MKD_SLOW") else ALWAYS)
def test_a_paper_configuration_trains(name, layouts, tmp_path, monkeypatch):
    """Three steps with the real networks: everything but size, split and length is the file's. MKD_SLOW=1: all of them."""
    config = configurations()[name]
    small = {"split": "random/2", "crop": [112 if "dinov2" in name else 64] * 2, "batch": 2, "steps": 3}
    machine = {"device": "cpu", "threads": 1, "workers": 0, "log_every": 1, "quality_images": 0}
    where = {"root": str(layouts[config.dataset]), "evaluate_every": 0}
    monkeypatch.setattr(runner._Run, "_save", lambda self, *names: None)  # a gigabyte, and tested elsewhere
    record = run(RunConfig(**config.model_dump() | small | machine | where), tmp_path, quiet=True)
    rows = records.history(tmp_path / record.id)
    assert len(rows) == 3
    assert len(record.classes) == {"cityscapes": 19, "coco": 81}.get(config.dataset, 21)
    numbers = {k: v for row in rows for k, v in row.items() if k.startswith(("loss", "term/", "stat/"))}
    assert "term/sup" in numbers and np.isfinite([*numbers.values()]).all()


def test_recipes_are_rows_and_what_is_always_trained_exists():
    assert set(ALWAYS) <= configurations().keys() and len(configurations()) > 60
    column = "R50 1/16 (662)"
    assert cell(T2, "MKD", column).id == recipe("paper").id
    own = {"protocol": "long512", "dataset_options": {"prefer_aug_masks": True}}
    assert RunConfig(**cell(T2, "MKD (released)", column).model_dump() | own).id == recipe("released").id
