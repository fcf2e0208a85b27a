"""The files around the package: README numbers come from committed records, recipes and parameters are valid, both lists of pins agree."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from measures import measures

from mkd_core import RunConfig, published, table
from mkd_core.records import read_cells

ROOT = Path(__file__).parents[1]
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "RESULTS.md"))
EVIDENCE = sorted(path.parent for path in ROOT.glob("figures/*/records.jsonl"))


@pytest.mark.parametrize("folder", EVIDENCE, ids=lambda folder: folder.name)
def test_committed_tables_and_the_readme_show_the_committed_records(folder):
    """Row and column names stand in the records; the paper's table in the folder's name: 30_table4_components."""
    text = (folder / "table.md").read_text()
    quoted = next((path.stem for path in ROOT.glob("published/table*.yaml") if path.stem in folder.name), "")
    made = table(read_cells(folder / "records.jsonl"), published(quoted) if quoted else None)
    assert text == made.markdown() + "\n"
    # rows alone are one table; else the overview is the second paragraph
    shown = text.split("\n\n")[0 if text.startswith("|") else 1]
    assert shown.strip() in RESULTS, f"RESULTS.md does not hold figures/{folder.name}/table.md"
    assert shown.strip() in README or folder.name != "00_quickstart"


def test_the_embedded_data_set_meets_its_target_over_five_seeds():
    """MKD above SupOnly by 10 points and above co-training by 5, each by more than two standard errors of the paired difference."""
    cells = read_cells(ROOT / "figures/00_quickstart/records.jsonl")
    scores = {name: {r.seed: r.miou for r in of[""]} for name, of in cells.items()}
    assert scores["MKD"].keys() == scores["SupOnly"].keys() == scores["co-training"].keys()
    assert len(scores["MKD"]) == 5
    for other, margin in {"SupOnly": 10, "co-training": 5}.items():
        gains = [scores["MKD"][seed] - scores[other][seed] for seed in scores["MKD"]]
        mean = sum(gains) / 5
        error = (sum((g - mean) ** 2 for g in gains) / 4 / 5) ** 0.5
        assert mean > margin and mean > 2 * error


@pytest.mark.parametrize("path", sorted(ROOT.glob("parameters/recipes/*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_complete_configurations(path):
    values = yaml.safe_load(path.read_text())
    config, own = RunConfig(**values), path.stem == "own_images"
    assert config.method in ("mkd", "mkd_ablation") and config.dataset == ("folder" if own else "voc_aug")
    # 10_run's smoke defaults must not leak in: a recipe states every field but the user's files and the seed
    left = RunConfig.model_fields.keys() - values.keys() | {"weights"}
    assert left == {"root", "weights", "weights2", "seed", "device", "devices", "cache", "tensorboard"} | {
        "activation_checkpointing"
    }
    named = set(re.findall(r"^  (\w+):", path.read_text(), re.M))
    assert named <= set(config.options), "every option of a recipe is one of the method's"


def test_every_parameters_file_says_how_it_is_run():
    for path in set(ROOT.glob("parameters/*/*.yaml")) - set(ROOT.glob("parameters/bases/*")):
        head = path.read_text().split("\n", 12)[:12]
        assert any("Command:" in line for line in head) and any("Expected:" in line for line in head), path


def test_the_tree_in_the_readme_is_the_tree():
    """A newcomer finds the equation, the loop, the evaluation and the EMA there; what it names exists, and no folder is left out."""
    tree = README.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"mkd_core/[\w./]+|^[a-z]+/", tree, re.M))
    assert all((ROOT / name).exists() for name in named)
    assert {f"mkd_core/{name}" for name in ("methods/", "train.py", "evaluate.py", "ema.py")} <= named
    folders = {f"mkd_core/{path.parent.name}/" for path in (ROOT / "mkd_core").glob("*/__init__.py")}
    assert folders <= named


def test_the_suite_stays_thin():
    """`python tests/measures.py` prints all of them."""
    large = {what: found for what, found in measures().items() if found[0] > found[1]}
    assert not large


def test_what_is_installed_and_cited_is_one_everywhere():
    def pins(name):
        return set(re.findall(r"^([\w.\-\[\]]+==[^\s;\\]+)", (ROOT / name).read_text(), re.M))

    assert pins("requirements.txt") == pins("requirements.lock") and len(pins("requirements.txt")) > 50
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {pin.split("==")[0] for pin in pins("requirements.txt")}
    assert {re.split(r"[><=]", want)[0] for want in wanted} <= names
    assert "://" not in (ROOT / "requirements.lock").read_text()
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.txt"]}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "authors", "preferred-citation"} <= citation.keys()
