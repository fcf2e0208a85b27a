"""Tables: means by hand, nothing compared that was not measured alike, quoted numbers beside ours; and the published numbers themselves."""

import re
from contextlib import nullcontext
from decimal import Decimal
from itertools import product

import pytest
import yaml
from tiny import record

from mkd_core.config import Grid
from mkd_core.data.splits import published_splits
from mkd_core.records import ROOT
from mkd_core.suite.tables import check, published, table


def on(title: str, miou: float, seed: int = 0, name: str = "table4", **keys):
    """A record of a run that a published column allows."""
    source = published(name)
    column = source.columns[title]
    config = record().config | {"dataset": source.dataset, "split": column["split"]}
    config["encoder"] = column["backbone"].lower().replace("-", "")
    split = {"name": column["split"], "sha256": f"seed {seed}", "unlabeled": 1}
    split["labeled"] = int(column["labeled"])
    keys = {"evaluated": {"images": 1449, "set": "val"}} | keys
    return record(config=config | keys.pop("config", {}), split=split, miou=miou, seed=seed, **keys)


def test_rows_alone_are_mean_and_sample_deviation():
    base = [record(miou=m, seed=i, seconds=s) for i, (m, s) in enumerate([(40, 9), (44, 1), (42, 2)])]
    rows = {"SupOnly": base, "MKD": [record(miou=60.0)], "later": []}
    made = table(rows)
    ((_, text),) = made.parts
    assert [*text.index] == ["SupOnly", "MKD", "later"]
    assert [*text["mIoU last"]] == ["42.0 ± 2.0", "**60.0**", "missing"]
    assert [*text["mIoU best"]] == ["43.0 ± 2.0", "**61.0**", "missing"]
    assert [*text["runs"]] == ["3", "1", "0"] and text["seeds"]["SupOnly"] == "0, 1, 2"
    assert text["seconds a run"]["SupOnly"] == "2"  # the median: one run may have waited for others
    assert "60.0" in made.markdown() and "**" not in made.markdown()  # whole numbers keep their decimal


@pytest.mark.parametrize(
    "keys, words",
    [({"protocol": "sliding"}, "evaluation protocols: sliding, whole"), ({"evaluated": {"images": 7, "set": "val"}}, "evaluated images"),
     ({"evaluated": {"images": 6, "set": "test"}}, "evaluated images"), ({"split": {"sha256": "others", "labeled": 6}}, "labeled images"),
     ({"split": record().split | {"sha256_val": "others"}}, "evaluated images: others, val"),
     ({"config": record().config | {"dataset": "voc"}}, "data sets: shapes, voc"),
     ({"config": record().config | {"dataset_options": {"val_size": 9}}}, "options of the data set"), ({"classes": ["x", "z"]}, "classes: x, y, x, z")],
    ids=str,
)  # fmt: skip
def test_a_column_refuses_what_was_not_measured_alike(keys, words):
    for column in ("", "1/16"):
        with pytest.raises(ValueError, match=f"column '{column}', different .*{words}"):
            table({"a": {column: [record()]}, "b": {column: [record(**keys)]}})
    table({"a": {"1/16": [record()]}, "b": {"1/8": [record(**keys)]}})  # two columns may differ
    table({"a": [record()], "b": [record()]})


@pytest.mark.parametrize("title, config, keys, words", [
    ("1/16 (662)", {"encoder": "resnet50"}, {}, "encoder is resnet50, not resnet101"),
    ("1/16 (662)", {"encoder": "tu-wide_resnet101_2"}, {}, "encoder is wide_resnet101_2"),
    ("1/16 (662)", {"encoder": "se_resnet101"}, {}, "encoder is se_resnet101"),
    ("1/16 (662)", {"encoder": "tu-resnet101d"}, {}, ""),  # another stem is the same backbone
    ("1/16 (662)", {"dataset": "cityscapes"}, {}, "data set is cityscapes, not voc_aug"),
    ("1/8 (1323)", {}, {}, "split is cps/1_8, not cps/1_16"),
    ("1/16 (662)", {}, {"evaluated": {"images": 6, "set": "val"}}, "number of evaluated images is 6, not 1449"),
    ("1/16 (662)", {}, {"split": {"name": "", "sha256": "", "labeled": 5}}, "number of labeled images is 5, not 662"),
])  # fmt: skip
def test_a_column_of_the_paper_holds_such_runs_alone(title, config, keys, words):
    run = on(title, 50.0, config=config).model_copy(update=keys)
    message = f"column '1/16 .662.', row 'co-training' holds a run whose {words}.* give it another title"
    with pytest.raises(ValueError, match=message) if words else nullcontext():
        table({"co-training": {"1/16 (662)": [run]}}, published("table4"))
    assert len(table({"co-training": {"mine": [run]}}, published("table4")).parts[0][1].columns) == 1


def test_a_column_refuses_other_unlabeled_images_seeds_twice_and_other_folders():
    with pytest.raises(ValueError, match="different unlabeled images"):
        table({row: [record(split=record().split | {"sha256_unlabeled": row})] for row in "ab"})
    with pytest.raises(ValueError, match="row 'a' holds seed 1 more than once"):
        table({"a": [record(seed=0), record(seed=1), record(seed=1)], "b": [record(seed=1)]})
    own = record().config | {"dataset": "folder"}
    street, forest = (record(config=own | {"root": f"data/{name}"}) for name in ("street", "forest"))
    with pytest.raises(ValueError, match="data sets: folder forest, folder street"):
        table({"a": [street], "b": [forest]})
    table({"a": [street], "b": [record(config=street.config | {"root": "elsewhere/street"})]})


def test_voc_and_vocaug_share_a_column():
    """Table 1's rows with and without a dagger: the same labeled and evaluated images."""
    found = {row: {"R50 1/16 (92)": [on("R50 1/16 (92)", 50.0, name="table1", config={"dataset": data})]} for row, data in
             {"MKD": "voc", "MKD †": "voc_aug"}.items()}  # fmt: skip
    assert table(found, published("table1")).parts[0][1]["R50 1/16 (92)", "difference"]["MKD"] == "-10.6"


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
    text = made.parts[0][1]
    assert [*text.columns] == [*product(("1/16 (662)", "1/8 (1323)"), ("mIoU", "paper", "difference"))]
    assert [*text["1/16 (662)", "mIoU"]] == ["71.0 ± 1.4", "**76.5 ± 0.7**", "76.0"]
    assert [*text["1/16 (662)", "paper"]] == ["72.18", "75.19", ""]
    assert [*text["1/16 (662)", "difference"]] == ["-1.2", "+1.3", ""]
    assert [*text["1/8 (1323)", "mIoU"]] == ["75.0", "missing", "missing"]
    assert [*text["1/8 (1323)", "difference"]] == ["-0.8", "", ""]
    for form in (made.markdown(), made.html(), made.latex()):
        said = ("quoted, not measured here", "doi:10.1145/3581783.3611906", "copied, not run")
        assert all(words in form for words in said)
    what = "voc_aug cps/1_16, 662 labeled images, resnet101, from scratch, 6 steps, 1449 images evaluated (whole)"
    assert what in made.parts[1][0]


def test_the_best_of_ours_is_bold_and_text_escaped_in_every_form(made):
    # one measured row in 1/8: nothing is best
    assert re.findall(r"\*\*(.*?)\*\*", made.markdown().split("\n\n")[1]) == ["76.5 ± 0.7"]
    assert re.findall(r"\\textbf{(.*?)}", made.latex().split("\n\n")[1]) == ["76.5 ± 0.7"]
    # overview, and last and best of 1/16
    assert "<b" not in made.markdown() and made.html().count("<b>") == 3
    made = table({"a & b <1%>": {"50 %_#": [record()]}})
    assert "a &amp; b &lt;1%&gt;" in made.html()
    assert r"a \& b" in made.latex() and r"50 \%\_\#" in made.latex()
    text = table({"a | b": {"x": [record()]}, "c": {"x": [record(miou=60.0)]}}).markdown()
    assert r"| a \| b" in text and "**60.0**" in text


def test_no_difference_across_split_families_and_no_other_unlabeled_images():
    """The paper's ST++ row is on lists of its own, whatever the caption says."""
    title = "R50 1/16 (662)"
    cells = {row: {title: [on(title, 75.0, name="table2_vocaug")]} for row in ("ST++", "PS-MT")}
    made = table(cells, published("table2_vocaug"))
    text = made.parts[0][1]
    assert "ST++ is on other lists" in made.markdown() and "PS-MT is on other" not in made.markdown()
    assert [*text[title, "paper"]] == ["73.20", "72.83"] and [*text[title, "difference"]] == ["", "+2.2"]
    # CPS's 732 labeled images of Table 1 are not those of the column; its 366 are.
    titles = ("R101 1/4 (366)", "R101 1/2 (732)")
    made = table({"CPS": {title: [on(title, 75.0, name="table1")] for title in titles}}, published("table1"))
    assert [made.parts[0][1][title, "difference"]["CPS"] for title in titles] == ["+3.3", ""]
    assert "CPS is on other lists in R101 1/2 (732), so without a difference" in made.markdown()
    # The paper's rows with and without a dagger share their labeled images alone; without unlabeled ones it is all the same.
    title = "R101 1/16 (92)"
    for row, dataset, other in (("MKD", "voc_aug", "voc"), ("MKD †", "voc", "voc_aug")):
        run = on(title, 70.0, name="table1", config={"dataset": dataset})
        message = f"row '{row}' holds a run whose data set is {dataset}, not {other}"
        with pytest.raises(ValueError, match=message):
            table({row: {title: [run]}}, published("table1"))
        table({"SupOnly": {title: [run]}}, published("table1"))


def test_newer_numbers_keep_their_decimals_and_other_tables_are_named():
    frame = published("newer", "voc").frame()
    assert frame["1/16 (92)"]["UniMatch, ResNet-101 @321"] == "75.2"
    assert frame["1/4 (366)"]["AugSeg, ResNet-101 @512"] == "78.80"
    with pytest.raises(ValueError, match="there is no published table 'table7'"):
        published("table7")
    with pytest.raises(ValueError, match="no section of newer ''.*There are: voc"):
        published("newer")


def test_what_a_table_would_refuse_is_told_before_anything_runs():
    small = {"encoder": "tu-test_resnet", "crop": [16, 16], "dataset_options": {"train_size": 8}}
    columns = {"1/16 (662)": {"split": "random/4"}}
    rows = {"MKD": {"method": "mkd"}, "SupOnly": {"method": "supervised"}}
    grid = Grid(common=small, rows=rows, columns=columns, seeds=[0])
    check(grid, shown="1/16 (662)", against="SupOnly")
    for names, words in (({"shown": "1/8"}, "column '1/8'"), ({"against": "CPS"}, "row 'CPS'"), ({"published_name": "table7"}, "table7"),
                         ({"published_name": "table4"}, "row 'MKD' holds a run whose data set is shapes, not voc as in Table 4")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            check(grid, **names)
    rows = {"MKD": {"method": "mkd"}, "other": {"method": "mkd", "protocol": "sliding"}}
    with pytest.raises(ValueError, match="column 'a', different evaluation protocols: sliding, whole"):
        check(Grid(common=small, rows=rows, columns={"a": {"split": "random/4"}}, seeds=[0]))


def headroom(base, full, method):
    """Rows of one column from the mIoU of each seed."""
    split = record().config | {"split": "full"}
    mkd, all_labels = record().config | {"method": "mkd"}, record().split | {"sha256": "all"}
    rows = {
        "MKD": [record(miou=m, seed=s, config=mkd) for s, m in enumerate(method)],
        "SupOnly": [record(miou=m, seed=s) for s, m in enumerate(base)],
        "all labels": [record(miou=m, seed=s, config=split, split=all_labels) for s, m in enumerate(full)],
    }
    return table(rows).parts[0][1], table({row: {"1/16": of} for row, of in rows.items()})


def test_the_share_of_the_gap_closed_is_paired_by_seed_and_needs_headroom():
    text, made = headroom([40, 44], [60, 64], [50, 56])  # gains 10 and 12 of a gap of 20
    assert [*text["gap closed (%)"]] == ["55 ± 7", "", ""]
    assert [*text["mIoU last"]] == ["**53.0 ± 4.2**", "42.0 ± 2.8", "62.0 ± 2.8"]  # all labels do not compete
    assert "gap closed (%)" in made.parts[1][1] and any("Gap closed" in note for note in made.notes)
    assert "32 labeled" not in made.parts[1][0] and "6 labeled images, " in made.parts[1][0]
    assert [*headroom([40], [60], [35, 90])[0]["gap closed (%)"]] == ["-25", "", ""]  # seed 1 has no base
    for base, full in (([40, 44], [41, 43]), ([40, 44], [60, 25]), ([40], [39]), ([40], []), ([], [60])):
        text, made = headroom(base, full, [50, 56])
        assert "gap closed (%)" not in text and len(made.notes) == 1, (base, full)


GAINS = {  # what the paper prints in brackets behind its own rows: an independent copy of each number
    ("table1", "MKD"): "19.58 15.26 8.56 4.21 7.46",
    ("table1", "MKD †*"): "30.35 22.91 14.52 10.44 11.28",
    ("table2_vocaug", "MKD"): "14.48 10.05 6.93 8.05 6.99 4.40 4.51 12.18 9.80 6.50 3.47",
    ("table2_cityscapes", "MKD"): "7.27 6.25 14.23 9.39 6.57 3.58 9.57 3.45 3.85 2.91",
    ("table3", "MKD"): "13.8 15.7 15.3 13.2 11.9",
}


def numbers(name: str, row: str) -> dict[str, Decimal]:
    return {title: Decimal(text) for title, text in published(name).rows[row]["values"].items()}


@pytest.mark.parametrize("name, row", GAINS, ids=str)
def test_gains_over_the_supervised_row_are_the_printed_ones(name, row):
    base, ours = numbers(name, "SupOnly"), numbers(name, row)
    both = [title for title in published(name).columns if title in base and title in ours]
    # Table 1 prints none for R50
    both = [title for title in both if name != "table1" or title.startswith("R101")]
    assert [ours[title] - base[title] for title in both] == [*map(Decimal, GAINS[name, row].split())]


def test_what_the_text_says_about_the_tables_holds():
    mkd, cps = numbers("table1", "MKD"), numbers("table1", "CPS")
    gains = [mkd[f"R101 {title}"] - cps[f"R101 {title}"] for title in ("1/16 (92)", "1/8 (183)", "1/4 (366)")]
    assert [*map(str, gains)] == ["1.28", "2.76", "2.73"]
    four = {row: numbers("table4", row) for row in published("table4").rows}
    first = [values["1/16 (662)"] - four["co-training"]["1/16 (662)"] for values in four.values()]
    assert [*map(str, first)] == ["0.00", "3.01", "5.34", "2.30", "5.82", "6.47"]
    sn = numbers("table6", "SN")
    assert sn["1/16 (92)"] - numbers("table6", "HN")["1/16 (92)"] == Decimal("1.23")
    copies = {"co-training": "CPS", "+ SDA": "CPS with CutMix", "+ mutual MT + SDA + KS": "MKD"}
    for row, copy in copies.items():
        assert four[row] == {title: numbers("table2_vocaug", copy)[f"R101 {title}"] for title in four[row]}
    assert {f"R101 {title}": value for title, value in sn.items()} == numbers("table1", "MKD †*")


COUNTS = {"table1": 86, "table2_vocaug": 93, "table2_cityscapes": 84}
COUNTS |= {"table3": 20, "table4": 24, "table5": 15, "table6": 10}
NEWER = yaml.safe_load((ROOT / "published/newer.yaml").read_text())


@pytest.mark.parametrize(
    "name, section", [*((name, "") for name in COUNTS), *(("newer", name) for name in NEWER)]
)
def test_published_tables_are_complete(name, section):
    """Columns are splits of this suite, every number has its source, and no key is misspelt."""
    known = {"source", "values", "printed", "backbone", "family", "family_in", "dataset", "unlabeled", "note"}
    source = published(name, section)
    splits = published_splits(source.dataset)
    for title, column in source.columns.items():
        assert column.keys() <= {"labeled", "split", "backbone"} and f"({column['labeled']})" in title
        assert section or (splits[column["split"]] == int(column["labeled"]) and column["backbone"])
    for row in source.rows.values():
        assert row.keys() <= known and row["source"]
        assert {*row["values"], *row.get("family_in", ())} <= source.columns.keys()
        assert all(0 < Decimal(value) < 100 for value in row["values"].values())
        assert not section or (row["backbone"] and row["family"])
    assert section or sum(len(row["values"]) for row in source.rows.values()) == COUNTS[name]
    frame = source.frame()
    assert [*frame.columns[:2]] == ["backbone", "split family"] and (frame["split family"] != "").all()
