"""Configurations: what is unknown or out of range is refused with the list of what there is; equal runs have equal ids."""

import inspect
import json
from pathlib import Path

import pytest
import yaml
from tiny import config

from mkd_core import config as module
from mkd_core.choices import complete_options
from mkd_core.config import NOT_IDENTITY, OPTIONS, Grid, RunConfig, drop_foreign_options, lay_over, with_bases
from mkd_core.methods import METHODS
from mkd_core.records import ROOT, read_cells

INF, SEEDS = float("inf"), {"seeds": [0]}

OUT_OF_RANGE = {
    "seed": -1, "dropout": 1.0, "bn_momentum": 0, "power": -1, "weight_decay": -1, "channels": 0, "encoder_depth": 2,
    "workers": -2, "quality_images": -1, "evaluate_every": -5, "checkpoint_every": 0, "log_every": 0,
}  # fmt: skip

# What is wrong with a run: its keys, and part of the one message.
BAD = [
    ({"stepz": 5}, "no option 'stepz'; did you mean 'steps'? It has: dataset, root"),
    ({"LR": 0.1}, "did you mean 'lr'"),
    ({"dataset": "shape"}, "no data set 'shape'; did you mean 'shapes'? There are: shapes, folder, voc"),
    ({"method": "mdk"}, "no method 'mdk'; did you mean 'mkd'? There are: supervised, mean_teacher"),
    ({"method": "Mean-Teacher"}, "did you mean 'mean_teacher'"),
    ({"encoder": "resnet5"}, "no encoder 'resnet5'; did you mean 'resnet50'"),
    ({"encoder": "tu-resnet5"}, "no timm model 'resnet5'"),
    ({"arch": "unet"}, "'arch': input should be 'deeplabv3plus', 'pspnet', 'deeplabv3plus_mmseg' or 'dpt'; got 'unet'"),
    ({"encoder2": "resnet5"}, "no encoder 'resnet5'; did you mean 'resnet50'"),
    ({"weights2": "w.pth"}, "weights2 are of encoder2"),
    ({"supervised_loss": "ohm"}, "'cross_entropy' or 'ohem'"),
    ({"ohem_keep": 9}, "ohem_keep is of supervised_loss 'ohem'"),
    ({"ohem_keep": 0}, "'ohem_keep': input should be greater than 0"),
    ({"protocol": "slide"}, "'whole', 'long512' or 'sliding'"), ({"strong": "oneof"}, "'one_of', 'chain'"),
    ({"precision": "fp16"}, "'float32' or 'bfloat16'"), ({"norm": "layer"}, "'batch' or 'group'"),
    ({"optimizer": "adam"}, "'sgd' or 'adamw'"), ({"device": "gpu"}, "'device'"),
    ({"options": {"treshold": 0.9}}, "mkd has no option 'treshold'; did you mean 'threshold'? It has: alpha, beta"),
    ({"method": "supervised", "options": {"alpha": 1}}, "supervised has no option 'alpha'. It has: no options"),
    ({"options": {"alpha": "strong"}}, "mkd, 'alpha': input should be a valid number"),
    ({"options": {"alpha": INF}}, "mkd, 'alpha': input should be a finite number"),
    ({"options": {"alpha": True}}, "'alpha' cannot be true or false"),
    ({"options": {"decay": 1.5}}, "less than or equal to 1; got 1.5"),
    ({"options": {"threshold": 1.5}}, "'threshold'"),
    ({"options": {"boxes": -1}}, "greater than or equal to 0; got -1"),
    ({"options": {"boxes": 2.5}}, "'boxes': input should be a valid integer"),
    ({"options": {"ema_buffers": "some"}}, "'none' or 'all'"),
    ({"options": 5}, "'options': input should be a valid dictionary"),
    ({"method": "mkd_ablation", "options": {"denominator": "vaild"}}, "'selected' or 'valid'"),
    ({"method": "mkd_ablation", "options": {"teacher_mode": "trian"}}, "'train' or 'eval'"),
    ({"method": "mkd_ablation", "options": {"fda_own": "ownn"}}, "'fda_own': input should be a valid boolean"),
    ({"method": "mkd_ablation", "options": {"arch2": "pspnet"}}, "mkd_ablation has no option 'arch2'"),
    ({"method": "mkd_ablation", "options": {"stride": 0}}, "'stride': input should be 1, 2, 4, 8 or 16"),
    ({"method": "mkd_ablation", "options": {"stride": True}}, "'stride' cannot be true or false"),
    ({"dataset_options": {"train_sice": 9}}, "data set 'shapes' has no option 'train_sice'; did you mean 'train_size'"),
    ({"dataset_options": {"size": "large"}}, "data set 'shapes', 'size': input should be a valid integer"),
    ({"split": 116}, "'split': input should be a valid string; got 116; in YAML, text that reads as a number"),
    ({"root": None}, "'root': input should be a valid string; got None; in YAML"),
    ({"weights": 1e3}, "needs quotes"), ({"method": True}, "'method' cannot be true or false"),
    ({"steps": 0}, "'steps': input should be greater than 0"),
    ({"steps": 1.5}, "'steps': input should be a valid integer"),
    ({"steps": True}, "'steps' cannot be true or false"),
    ({"batch": 0}, "'batch': input should be greater than 0"), ({"batch": 1}, "batch must be at least 2"),
    ({"lr": 0}, "'lr': input should be greater than 0"),
    ({"lr": "fast"}, "'lr': input should be a valid number"),
    ({"lr": INF}, "'lr': input should be a finite number"),
    ({"crop": (500, 512)}, "'crop': sides must be multiples of 16; got (500, 512)"),
    ({"crop": (0, 16)}, "'crop.0': input should be greater than 0"),
    ({"crop": 512}, "'crop': input should be a valid tuple; got 512; several values are a list: [32, 32]"),
    ({"scale": (2.0, 0.5)}, "scale is (low, high)"),
    ({"scale": (1e-6, 1e-6)}, "'scale.0': input should be greater than or equal to 0.05"),
    ({"scale": (True, 2.0)}, "'scale' cannot be true or false"),
    ({"base": 8}, "base must be 0 or the long side of an image"),
    *[({key: value}, f"'{key}': input should be") for key, value in OUT_OF_RANGE.items()],
    ({"keep_every": 1_500}, "keep_every must be a multiple of checkpoint_every, 1000")]  # fmt: skip


@pytest.mark.parametrize("keys, words", BAD, ids=lambda value: str(value)[:60])
def test_what_is_wrong_with_a_run_is_one_message(keys, words):
    with pytest.raises(ValueError) as error:
        RunConfig(**keys)
    text = str(error.value)
    assert words in text and "pydantic" not in text and "Value error" not in text and "\n" not in text


def test_an_option_without_a_type_is_refused():
    untyped = type("Untyped", (), {"__init__": lambda self, build, alpha=1: None})
    with pytest.raises(ValueError, match="mine: option 'alpha' needs a type"):
        complete_options("mine", untyped, {})


def test_all_faults_are_told_at_once_and_what_is_valid_is_frozen():
    with pytest.raises(ValueError) as error:
        RunConfig(lr=-1, steps=0, crop=(5, 5))
    for words in ("'lr': input should be greater than 0; got -1", "'steps'", "'crop'"):
        assert words in str(error.value)
    for value in (True, False, None):
        assert RunConfig(method="cps", options={"on_labeled": value}).options["on_labeled"] is value
    with pytest.raises(ValueError):
        config().lr = 1.0


def test_numbers_may_be_written_in_several_ways_and_records_state_them_all():
    """PyYAML reads 1e-3 as text. The same run has one id, and the method gets a number."""
    c = RunConfig(lr="1e-3", steps="200", crop=[512, 1024])
    assert (c.lr, c.steps, c.crop) == (0.001, 200, (512, 1024))
    assert c.id == RunConfig(lr=0.001, steps=200, crop=(512, 1024)).id
    written = ((1, 2), (1.0, 2.0), ("1.0", "2e0"))
    assert len({RunConfig(method="mkd", options={"alpha": a, "fda": f}).id for a, f in written}) == 1
    for name, method in METHODS.items():
        expected = {n: p.default for n, p in inspect.signature(method).parameters.items() if n != "build"}
        assert RunConfig(method=name).options == json.loads(json.dumps(expected))  # a tuple is a list there
    c = config("mkd", options={"alpha": 0.5})
    assert c.options["alpha"] == 0.5 and RunConfig(**c.model_dump(mode="json")).id == c.id


def test_the_id_does_not_depend_on_how_the_run_is_written():
    plain = config("mkd")
    assert plain.id == config("mkd", options={"alpha": 1.5}).id  # an explicit default
    assert plain.id == RunConfig(**dict(reversed(plain.model_dump().items()))).id
    options = {"alpha": 0.1, "beta": 0.2}
    a, b = (config("mkd", options=o).id for o in (options, dict(reversed(options.items()))))
    assert a == b != plain.id and plain.id.startswith("shapes-random_6-mkd-s0-") and "/" not in plain.id


SAME = {
    "device": "cuda", "workers": 4, "threads": 8, "checkpoint_every": 7, "keep_every": 5_000, "log_every": 9, "root": "/tmp",
    "tensorboard": True, "devices": 3, "cache": "decoded", "activation_checkpointing": True,
}  # fmt: skip
DIFFERENT = {
    "dataset": "voc", "split": "random/5", "method": "cps", "arch": "pspnet", "encoder": "resnet18", "channels": 24,
    "dropout": 0.1, "norm": "group", "bn_momentum": 0.2, "crop": (48, 32), "scale": (0.5, 2.0), "base": 64,
    "strong": "chain", "weak_photometric": True, "steps": 7, "batch": 4, "optimizer": "adamw", "lr": 0.02,
    "weight_decay": 0.1, "power": 1.0, "precision": "bfloat16", "seed": 5, "protocol": "sliding", "evaluate_every": 3,
    "quality_images": 5, "dataset_options": {"size": 48}, "encoder_depth": 4, "head_lr": 10.0, "options": {"alpha": 1.0}, "encoder2": "resnet18", "arch2": "pspnet",
    "supervised_loss": "ohem", "ohem_keep": 7,
}  # fmt: skip


def test_the_id_changes_with_all_that_matters_and_with_nothing_else(tmp_path):
    ids = {config("mkd").id}
    assert {config("mkd", **{key: value}).id for key, value in SAME.items()} == ids
    for key, value in DIFFERENT.items():
        also = {"dataset": {"dataset_options": {}}, "ohem_keep": {"supervised_loss": "ohem"}}.get(key, {})
        ids.add(config(**{"method": "mkd", key: value} | also).id)
    assert len(ids) == 1 + len(DIFFERENT)
    # Every field is either in this test or declared as one that does not matter: a new one must be decided upon.
    assert {*SAME, "weights", "weights2"} == NOT_IDENTITY
    assert set(RunConfig.model_fields) == set(DIFFERENT) | NOT_IDENTITY


def test_weights_are_known_by_content(tmp_path):
    for name, content in {"a.pth": b"the same", "b.pth": b"the same", "c.pth": b"others"}.items():
        (tmp_path / name).write_bytes(content)
    for keys in ({}, {"weights": "a.pth", "encoder2": "resnet18"}):
        field = "weights2" if keys else "weights"
        keys = {k: str(tmp_path / v) if k == "weights" else v for k, v in keys.items()}
        a, b, c = (config(**keys | {field: str(tmp_path / f"{name}.pth")}).id for name in "abc")
        assert a == b != c
    with pytest.raises(ValueError, match=r"no\.pth"):
        assert config(weights=str(tmp_path / "no.pth")).id


def test_own_data_in_folders_of_one_name_are_not_one_run(tmp_path):
    """/a/photos and /b/photos are different data: the record of one must not be taken for the other's."""
    ids = []
    for parent in ("a", "b"):
        root = tmp_path / parent / "photos"
        root.mkdir(parents=True)
        (root / "train.txt").write_text(f"{parent}.png {parent}_mask.png\n")
        ids.append(RunConfig(dataset="folder", root=str(root), dataset_options={"classes": ["x", "y"]}).id)
    assert ids[0] != ids[1]


def test_the_same_run_from_another_folder(tmp_path, monkeypatch):
    """config.json holds absolute places, so that relative ones mean the same from anywhere; neither enters the id."""
    (tmp_path / "my_data").mkdir()
    (tmp_path / "my_data/train.txt").write_text("a.png a_mask.png\n")
    (tmp_path / "w.pth").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    about = {"dataset": "folder", "dataset_options": {"classes": ["x", "y"]}}
    here = RunConfig(**about, root="my_data", weights="w.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    there = here.absolute()
    assert (there.root, there.weights) == (str(tmp_path / "my_data"), str(tmp_path / "w.pth"))
    assert there.id == here.id and there.absolute() == there and RunConfig().absolute() == RunConfig()
    assert RunConfig(root="~/my_data").absolute().root == there.root
    monkeypatch.chdir("/")
    assert there.named and there.id and not here.named


def test_grid():
    rows = {"SupOnly": {"method": "supervised", "lr": 0.1}, "CPS": {"method": "cps"}}
    runs = Grid(common={"steps": 9, "lr": 0.5, "split": "random/8@{seed}"}, rows=rows, seeds=[3, 4]).runs
    assert [*runs] == ["SupOnly", "CPS"] and [[c.seed for c in r] for r in runs.values()] == [[3, 4], [3, 4]]
    assert runs["SupOnly"][0].lr == 0.1 and runs["CPS"][0].lr == 0.5 and runs["CPS"][1].steps == 9
    assert [c.split for c in runs["CPS"]] == ["random/8@3", "random/8@4"]


@pytest.mark.parametrize("keys, words", [
    ({"common": {"stepz": 9}, "rows": {"a": {}}} | SEEDS, "a, seed 0: RunConfig has no option 'stepz'"),
    ({"common": {"seed": 1}, "rows": {"a": {}}} | SEEDS, "seed stands in `seeds`"),
    ({"common": {"split": 116}, "rows": {"a": {}}} | SEEDS, "'split': input should be a valid string"),
    ({"rows": {"a": {}, "b": {"options": {"alpha": 1.5}}}} | SEEDS, "rows 'a' and 'b' hold the same run, shapes-"),
    ({"rows": {"a": {}}, "seeds": [1, 1]}, "seeds [1, 1] hold the same run twice"),
    ({"rows": {}} | SEEDS, "'rows': dictionary should have at least 1 item"),
    ({"rows": {"a": {}}, "columns": {}} | SEEDS, "'columns'"),
    ({"rows": {"a": 5}} | SEEDS, "'rows.a': input should be a valid dictionary"),
    ({"rows": {1: {}}} | SEEDS, "rows.1.[key]': input should be a valid string; got 1; in YAML"),
    ({"rows": {"a": {}}, "seeds": []}, "'seeds'"), ({"rows": {"a": {}}, "seeds": [True]}, "'seeds'"),
    ({"rows": {"a": {}}}, "Grid needs the option 'seeds'"),
    ({"rows": {"a": {}}, "extra": 1} | SEEDS, "Grid has no option 'extra'"),
    ({"rows": {"a": {"recipe": "papr"}}, "recipes": {"paper": {}}} | SEEDS, "no recipe 'papr'; did you mean 'paper'"),
    ({"rows": {"a": {}}, "base": "none.yaml"} | SEEDS, "base: there is no file 'none.yaml' in"),
    ({"rows": {"a": {}}, "base": {"a": 1}} | SEEDS, "base: there is no file 'a'"),
], ids=lambda value: str(value)[:60])  # fmt: skip
def test_what_is_wrong_with_a_table_is_one_message(keys, words):
    with pytest.raises(ValueError) as error:
        Grid(**keys)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PARAMETERS", tmp_path)

    def write(name: str, **values) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def test_a_file_lies_over_its_bases(write):
    """Own keys win, mappings merge deeply, of two bases the later wins, a base has bases, null takes a row away."""
    rows = {"a": {"options": {"alpha": 1.0, "beta": 1.0}}, "b": {}}
    write("one.yaml", common={"lr": 0.1, "steps": 1}, rows=rows)
    write("sub/two.yaml", common={"steps": 2, "batch": 2}, columns={"x": {"crop": [32, 32]}})
    write("sub/three.yaml", base="two.yaml", common={"batch": 3})  # its neighbour
    rows = {"a": {"options": {"beta": 0.0}}, "b": None, "c": {"method": "cps"}}
    grid = Grid(base=["one.yaml", "sub/three.yaml"], common={"batch": 4}, rows=rows, seeds=[0])
    assert grid.common == {"lr": 0.1, "steps": 2, "batch": 4} and [*grid.rows] == ["a", "c"]
    (a,) = grid.cells["a"]["x"]
    assert (a.lr, a.steps, a.batch, a.crop) == (0.1, 2, 4, (32, 32))
    assert (a.options["alpha"], a.options["beta"]) == (1.0, 0.0)


def test_a_row_starts_from_a_recipe_and_a_single_run_is_one(write):
    keys = {"lr": 0.1, "bn_momentum": 0.5, "base": 512, "method": "mkd"}
    keys["options"] = {"alpha": 0.5, "decay": 0.9}
    write("mine.yaml", **keys)
    rows = {"MKD": {"recipe": "mine", "options": {"decay": 0.8}}, "CPS": {"method": "cps"}}
    grid = Grid(base="mine.yaml", common={"steps": 9, "bn_momentum": 0.2}, rows=rows, seeds=[0])
    mkd, cps = (grid.runs[row][0] for row in rows)
    assert (mkd.method, mkd.options["alpha"], mkd.options["decay"]) == ("mkd", 0.5, 0.8)
    assert (mkd.bn_momentum, cps.bn_momentum) == (0.5, 0.2)  # the recipe is the row's
    assert [(c.lr, c.steps, c.base) for c in (mkd, cps)] == [(0.1, 9, 512)] * 2
    # The file of a single run may have one too; as a number, base is a key of the run.
    assert with_bases({"base": "mine.yaml", "lr": 0.2}) == keys | {"lr": 0.2}
    assert with_bases({"base": 64, "lr": 0.2}) == {"base": 64, "lr": 0.2} and with_bases({"base": ""}) == {}


def test_bases_in_a_circle_are_refused_and_laying_over_changes_neither_mapping(write):
    write("a.yaml", base="b.yaml", lr=1.0)
    write("b.yaml", base="a.yaml")
    with pytest.raises(ValueError, match="base: a.yaml -> b.yaml -> a.yaml is a circle"):
        Grid(base="a.yaml", rows={"a": {}}, seeds=[0])
    below, above = {"a": {"x": 1}, "b": 1, "c": {"y": 1}}, {"a": {"z": 2}, "b": None, "c": None}
    assert lay_over(below, above) == {"a": {"x": 1, "z": 2}, "b": None}
    assert below == {"a": {"x": 1}, "b": 1, "c": {"y": 1}} and above["a"] == {"z": 2}


@pytest.mark.parametrize("values, typed, left", [
        ({"method": "supervised", "options": {"alpha": 1}}, {"method"}, {"options": {}}),
        ({"method": "cutmix_seg", "options": {"alpha": 1, "decay": 0.5}}, {"method"}, {"options": {}}),  # decay is MKD's too
        ({"method": "mkd_ablation", "options": {"alpha": 1}}, {"method"}, {"options": {"alpha": 1}}),
        ({"method": "supervised", "options": {"alpha": 1}}, {"method", "options.alpha"}, {"options": {"alpha": 1}}),
        ({"method": "supervised", "options": {"alpha": 1}}, {"lr"}, {"options": {"alpha": 1}}),  # a slip in the file
        ({"method": "none", "options": {"alpha": 1}}, {"method"}, {"options": {"alpha": 1}}),
        ({"dataset": "folder", "dataset_options": {"train_size": 1}}, {"dataset"}, {"dataset_options": {}}),
        ({"dataset": "shapes", "dataset_options": {"size": 48}}, {"dataset"}, {"dataset_options": {"size": 48}})])  # fmt: skip
def test_options_of_another_method_or_data_set_are_dropped_where_one_is_typed(values, typed, left):
    before = json.dumps(values)
    assert drop_foreign_options(values, typed) == values | left and json.dumps(values) == before


def test_the_defaults_are_those_that_ids_mean():
    """An id leaves out what is at its default, so none may change its meaning; what is new joins the list."""
    found = {"RunConfig": RunConfig().model_dump(mode="json", exclude=NOT_IDENTITY | OPTIONS.keys())}
    for key, (owner, known) in OPTIONS.items():
        found |= {name: RunConfig(**{owner: name}).model_dump(mode="json")[key] for name in known}
    then = json.loads((ROOT / "tests/defaults.json").read_text())
    what = "a default changed: ids of old runs would now mean another run; add an option instead, or migrate "
    for name, options in then.items():
        changed = [key for key in options.keys() & found.get(name, {}) if options[key] != found[name][key]]
        assert not changed, f"{what}figures/*/records.jsonl and renew this: {name}, {changed}"
    assert then == found, f"options came or went; write this into tests/defaults.json:\n{json.dumps(found)}"


def test_committed_records_have_the_ids_of_their_configurations():
    tables = [read_cells(path) for path in ROOT.glob("figures/*/records.jsonl")]
    records = [r for found in tables for of in found.values() for group in of.values() for r in group]
    records = [record for record in records if not record.weights["name"]]  # whose file is needed for the id
    assert len(records) > 60 and all(RunConfig(**record.config).id == record.id for record in records)
