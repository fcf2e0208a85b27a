"""Tables: means by hand, nothing compared that was not measured alike, quoted numbers beside ours; and the published numbers themselves."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from decimal import Decimal

import pytest
import yaml
from tiny import record

from mkd_core.data.splits import published_splits
from mkd_core.records import ROOT
from mkd_core.suite.tables import Published, published, refuse_unlike_configs, save, table

TABLES = ("table1", "table2_vocaug", "table2_cityscapes", "table3", "table4", "table5", "table6")


def on(title: str, miou: float, seed: int = 0, name: str = "table4", **keys):
    """A record of a run that a published column allows."""
    source = published(name)
    column = source.columns[title]
    config = record().config | {"dataset": source.dataset, "encoder": column.backbone.lower().replace("-", "")}
    split = {"name": column.split, "sha256": f"{column.split}, seed {seed}", "labeled": column.labeled, "unlabeled": 1}
    keys = {"evaluated": {"images": 1449, "set": "val"}} | keys
    return record(config=config | keys.pop("config", {}), split=split, miou=miou, seed=seed, **keys)


def test_rows_alone_are_mean_and_sample_deviation():
    rows = {"SupOnly": [record(miou=40.0, seed=0), record(miou=44.0, seed=1)], "MKD": [record(miou=60.0)], "later": []}
    made = table(rows)
    (part,) = made.parts
    assert [*part.text.index] == ["SupOnly", "MKD", "later"]
    assert [*part.text["mIoU last"]] == ["42.0 ± 2.8", "60.0", "missing"]  # sqrt(8) = 2.83
    assert [*part.text["mIoU best"]] == ["43.0 ± 2.8", "61.0", "missing"]
    assert [*part.text["runs"]] == ["2", "1", "0"] and part.text["seeds"]["SupOnly"] == "0, 1"
    assert "60.0" in made.markdown() and "**" not in made.markdown()  # whole numbers keep their decimal


@pytest.mark.parametrize(
    "keys, words",
    [({"protocol": "sliding"}, "evaluation protocols: sliding, whole"), ({"evaluated": {"images": 7, "set": "val"}}, "evaluated images"),
     ({"evaluated": {"images": 6, "set": "test"}}, "evaluated images"), ({"split": {"sha256": "others", "labeled": 6}}, "labeled images"),
     ({"config": record().config | {"dataset": "voc"}}, "data sets: shapes, voc"),
     ({"config": record().config | {"dataset_options": {"val_size": 9}}}, "options of the data set"), ({"classes": ["x", "z"]}, "classes: x, y, x, z")],
    ids=str,
)  # fmt: skip
def test_a_column_refuses_what_was_not_measured_alike(keys, words):
    for column in ("", "1/16"):
        where = "column '1/16'" if column else "one table"
        with pytest.raises(ValueError, match=f"{where}, .*{words}"):
            table({"a": {column: [record()]}, "b": {column: [record(**keys)]}})
    table({"a": {"1/16": [record()]}, "b": {"1/8": [record(**keys)]}})  # two columns may differ
    table({"a": [record()], "b": [record()]})


@pytest.mark.parametrize(
    "keys, words", [({"evaluated": {"images": 6, "set": "val"}}, "6 evaluated images.* 1449"),
                    ({"split": {"name": "cps/1_16", "sha256": "", "labeled": 5}}, "5 labeled images.* 662")], ids=str)  # fmt: skip
def test_no_difference_from_the_paper_on_fewer_images(keys, words):
    title = "1/16 (662)"
    with pytest.raises(ValueError, match=words):
        table({"MKD": {title: [on(title, 50.0).model_copy(update=keys)]}}, published("table4"))


def test_a_column_refuses_other_unlabeled_images_of_one_data_set():
    with pytest.raises(ValueError, match="different unlabeled images"):
        table({row: [record(split=record().split | {"sha256_unlabeled": row})] for row in "ab"})


def test_a_seed_counts_once():
    with pytest.raises(ValueError, match=r"row 'a' holds the seeds \[1\] more than once"):
        table({"a": [record(seed=0), record(seed=1), record(seed=1)], "b": [record(seed=1)]})


def test_a_file_of_several_published_tables_names_them():
    with pytest.raises(ValueError, match="no section of newer ''.*There are: voc"):
        published("newer")


def test_folders_of_ones_own_are_data_sets_by_their_names():
    street, forest = (record(config=record().config | {"dataset": "folder", "root": f"data/{name}"}) for name in ("street", "forest"))
    with pytest.raises(ValueError, match="data sets: folder forest, folder street"):
        table({"a": [street], "b": [forest]})
    table({"a": [street], "b": [record(config=street.config | {"root": "elsewhere/street"})]})


def test_voc_and_vocaug_share_a_column():
    """Table 1's rows with and without a dagger: the same labeled and evaluated images."""
    found = {row: {"R50 1/16 (92)": [on("R50 1/16 (92)", 50.0, name="table1", config={"dataset": data})]} for row, data in
             {"MKD": "voc", "MKD †": "voc_aug"}.items()}  # fmt: skip
    assert table(found, published("table1")).parts[0].text["R50 1/16 (92)", "difference"]["MKD"] == "-10.6"


@pytest.fixture
def made():
    first, second = "1/16 (662)", "1/8 (1323)"
    cells = {
        "co-training": {first: [on(first, 70.0, 0), on(first, 72.0, 1)], second: [on(second, 75.0)]},
        "+ mutual MT": {first: [on(first, 76.0, 0), on(first, 77.0, 1)], second: []},
        "MKD (released)": {first: [on(first, 76.0)]},
    }
    return table(cells, published("table4"))


def test_the_papers_number_stands_in_a_column_of_its_own(made):
    text = made.parts[0].text
    assert [*text.columns] == [(title, kind) for title in ("1/16 (662)", "1/8 (1323)") for kind in ("mIoU", "paper", "difference")]
    assert [*text["1/16 (662)", "mIoU"]] == ["71.0 ± 1.4", "76.5 ± 0.7", "76.0"]
    assert [*text["1/16 (662)", "paper"]] == ["72.18", "75.19", ""]
    assert [*text["1/16 (662)", "difference"]] == ["-1.2", "+1.3", ""]
    assert [*text["1/8 (1323)", "mIoU"]] == ["75.0", "missing", "missing"] and [*text["1/8 (1323)", "difference"]] == ["-0.8", "", ""]
    for form in (made.markdown(), made.html(), made.latex()):
        assert "quoted, not measured here" in form and "doi:10.1145/3581783.3611906" in form and "copied, not run" in form
    assert "voc_aug random/6, 662 labeled images, resnet101, from scratch, 6 steps, 1449 images evaluated (whole)" in made.parts[1].heading


def test_the_best_of_ours_is_bold_in_every_form(made):
    assert re.findall(r"\*\*(.*?)\*\*", made.markdown().split("\n\n")[1]) == ["76.5 ± 0.7"]  # one measured row in 1/8: nothing is best
    assert re.findall(r"\\bfseries (.*?) &", made.latex().split("\n\n")[0]) == ["76.5 ± 0.7"]
    assert "<b" not in made.markdown() and made.html().count("font-weight: bold") == 2  # overview, and detail of 1/16
    assert made.html() == replace(made).html(), "equal tables, equal files"


def test_text_is_escaped():
    made = table({"a & b <1%>": {"50 %_#": [record()]}})
    assert "a &amp; b &lt;1%&gt;" in made.html() and r"a \& b" in made.latex() and r"50 \%\_\#" in made.latex()
    text = table({"a | b": {"x": [record()]}, "c": {"x": [record(miou=60.0)]}}).markdown()
    assert r"| a \| b" in text and "**60.0**" in text


def test_no_difference_across_split_families():
    """The paper's ST++ row is on lists of its own, whatever the caption says."""
    title = "R50 1/16 (662)"
    cells = {row: {title: [on(title, 75.0, name="table2_vocaug")]} for row in ("ST++", "PS-MT")}
    made = table(cells, published("table2_vocaug"))
    text = made.parts[0].text
    assert "ST++ is on other lists" in made.markdown() and "PS-MT is on other" not in made.markdown()
    assert [*text[title, "paper"]] == ["73.20", "72.83"] and [*text[title, "difference"]] == ["", "+2.2"]


def test_no_difference_where_the_list_of_one_column_is_another():
    """CPS's 732 labeled images of Table 1 are not those of the column; its 366 are."""
    titles = ("R101 1/4 (366)", "R101 1/2 (732)")
    made = table({"CPS": {title: [on(title, 75.0, name="table1")] for title in titles}}, published("table1"))
    assert [made.parts[0].text[title, "difference"]["CPS"] for title in titles] == ["+3.3", ""]
    assert "CPS is on other lists in R101 1/2 (732), so without a difference" in made.markdown()


def test_a_row_of_other_unlabeled_images_is_refused():
    """The paper's rows with and without a dagger share their labeled images alone; for a method without unlabeled ones it is all the same."""
    title = "R101 1/16 (92)"
    with pytest.raises(ValueError, match="row 'MKD' .*voc_aug classic/92 resnet101, .* is voc classic/92 ResNet-101"):
        table({"MKD": {title: [on(title, 70.0, name="table1", config={"dataset": "voc_aug"})]}}, published("table1"))
    with pytest.raises(ValueError, match="row 'MKD †'"):
        table({"MKD †": {title: [on(title, 70.0, name="table1")]}}, published("table1"))
    for dataset in ("voc", "voc_aug"):
        table({"SupOnly": {title: [on(title, 70.0, name="table1", config={"dataset": dataset})]}}, published("table1"))


def test_a_newer_number_is_shown_with_the_decimals_of_its_source():
    frame = published("newer", "voc").frame()
    assert frame["1/16 (92)"]["UniMatch, ResNet-101 @321"] == "75.2" and frame["1/4 (366)"]["AugSeg, ResNet-101 @512"] == "78.80"


@pytest.mark.parametrize("encoder, same", [("tu-resnet101d", True), ("tu-wide_resnet101_2", False), ("se_resnet101", False)])
def test_other_stems_are_the_backbone_other_networks_are_not(encoder, same):
    cells = {"co-training": {"1/16 (662)": [on("1/16 (662)", 70.0, config={"encoder": encoder})]}}
    with nullcontext() if same else pytest.raises(ValueError, match=encoder):
        table(cells, published("table4"))


@pytest.mark.parametrize("keys", [{"config": {"encoder": "resnet50"}}, {"config": {"dataset": "cityscapes"}}, {"other": "split"}], ids=str)
def test_the_papers_title_is_refused_for_other_runs(keys):
    other = on("1/8 (1323)" if keys.pop("other", "") else "1/16 (662)", 50.0, **keys)
    with pytest.raises(ValueError, match="column '1/16 \\(662\\)' holds a run on .*give it another title"):
        table({"co-training": {"1/16 (662)": [other]}}, published("table4"))
    assert len(table({"co-training": {"mine": [other]}}, published("table4")).parts[0].text.columns) == 1


@pytest.mark.parametrize("split, same", [("cps/1_16", True), ("cps/1_8", False)])
def test_a_planned_run_is_the_published_ones_by_either_name_of_its_split(split, same):
    config = {"dataset": "voc_aug", "root": "", "dataset_options": {}, "protocol": "whole", "encoder": "resnet101", "split": split}
    with nullcontext() if same else pytest.raises(ValueError, match="give it another title"):
        refuse_unlike_configs("1/16 (662)", {"co-training": [config]}, published("table4"))


def test_three_whole_files(tmp_path, made):
    save(made, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table.html", "table.md", "table.tex"]
    assert (tmp_path / "table.md").read_text() == made.markdown() + "\n"
    assert (tmp_path / "table.tex").read_text().count(r"\end{tabular}") == 3


# The published numbers.

GAINS = {  # what the paper prints in brackets behind its own rows, in the order of the columns: an independent copy of each number
    ("table1", "MKD"): "19.58 15.26 8.56 4.21 7.46",
    ("table1", "MKD †*"): "30.35 22.91 14.52 10.44 11.28",
    ("table2_vocaug", "MKD"): "14.48 10.05 6.93 8.05 6.99 4.40 4.51 12.18 9.80 6.50 3.47",
    ("table2_cityscapes", "MKD"): "7.27 6.25 14.23 9.39 6.57 3.58 9.57 3.45 3.85 2.91",
    ("table3", "MKD"): "13.8 15.7 15.3 13.2 11.9",
}


@pytest.mark.parametrize("name, row", GAINS, ids=str)
def test_gains_over_the_supervised_row_are_the_printed_ones(name, row):
    source = published(name)
    both = [title for title in source.columns if title in source.rows["SupOnly"].values and title in source.rows[row].values]
    both = [title for title in both if name != "table1" or title.startswith("R101")]  # Table 1 prints none for R50
    gains = [source.rows[row].values[title] - source.rows["SupOnly"].values[title] for title in both]
    assert gains == [Decimal(gain) for gain in GAINS[name, row].split()]


def test_what_the_text_says_about_the_tables_holds():
    one, four, six = (published(name).rows for name in ("table1", "table4", "table6"))
    gains = [one["MKD"].values[f"R101 {t}"] - one["CPS"].values[f"R101 {t}"] for t in ("1/16 (92)", "1/8 (183)", "1/4 (366)")]
    assert [*map(str, gains)] == ["1.28", "2.76", "2.73"]
    first = [row.values["1/16 (662)"] - four["co-training"].values["1/16 (662)"] for row in four.values()]
    assert [*map(str, first)] == ["0.00", "3.01", "5.34", "2.30", "5.82", "6.47"]
    assert six["SN"].values["1/16 (92)"] - six["HN"].values["1/16 (92)"] == Decimal("1.23")
    cps, cutmix, mkd = (published("table2_vocaug").rows[row] for row in ("CPS", "CPS with CutMix", "MKD"))
    for row, copy in {"co-training": cps, "+ SDA": cutmix, "+ mutual MT + SDA + KS": mkd}.items():
        assert four[row].values == {title: copy.values[f"R101 {title}"] for title in four[row].values}
    assert {f"R101 {title}": value for title, value in six["SN"].values.items()} == one["MKD †*"].values


@pytest.mark.parametrize("name", TABLES)
def test_published_columns_are_splits_of_this_suite(name):
    source = published(name)
    known = published_splits(source.dataset)
    for title, column in source.columns.items():
        assert known[column.split] == column.labeled and f"({column.labeled})" in title and column.backbone
    counts = {"table1": 86, "table2_vocaug": 93, "table2_cityscapes": 84, "table3": 20, "table4": 24, "table5": 15, "table6": 10}
    assert sum(len(row.values) for row in source.rows.values()) == counts[name]
    assert all(0 < value < 100 and row.source for row in source.rows.values() for value in row.values.values())


def test_every_newer_number_says_its_backbone_and_split_family():
    sections = yaml.safe_load((ROOT / "published/newer.yaml").read_text())
    for section in sections:
        for row in published("newer", section).rows.values():
            assert row.backbone and row.family and row.source
        frame = published("newer", section).frame()
        assert [*frame.columns[:2]] == ["backbone", "split family"] and (frame["split family"] != "").all()


def test_published_data_are_checked():
    with pytest.raises(ValueError, match="there is no column of T"):
        Published(title="T", source="s", dataset="voc", columns={"a": {"labeled": 1}}, rows={"r": {"source": "s", "values": {"b": 1.0}}})
    with pytest.raises(ValueError, match="there is no published table 'table7'"):
        published("table7")
