"""Records: all or nothing under concurrent writers, collected, and refused in one table where they were not measured alike."""

import errno
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from tiny import record

from mkd_core import records
from mkd_core.records import dump, history, load, read_cells, save, write_atomically

server = multiprocessing.get_context("forkserver")


def test_save_and_load(tmp_path):
    assert load(tmp_path) is None
    save(record(), tmp_path)
    assert load(tmp_path) == record()
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    with pytest.raises(ValueError, match="extra"):
        record(extra=1)
    # Where nothing could be scored (every validation pixel ignored), the record is still readable.
    nothing = record(miou=float("nan"))
    save(nothing, tmp_path)
    assert load(tmp_path) is not None
    json.loads((tmp_path / "record.json").read_text())


def write_often(path: str, letter: str, times: int) -> None:
    for _ in range(times):
        write_atomically(Path(path), letter * 200_000)


POOLS = {"processes": partial(ProcessPoolExecutor, mp_context=server), "threads": ThreadPoolExecutor}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_a_reader_never_sees_half_of_a_text(tmp_path, pool):
    path, seen = tmp_path / "record.json", set()
    path.write_text("a" * 200_000)
    with pool(3) as workers:
        writers = [workers.submit(write_often, str(path), letter, 40) for letter in "bcd"]
        while not all(writer.done() for writer in writers):
            text = path.read_text()
            assert len(text) == 200_000 and len(set(text)) == 1
            seen.add(text[0])
    assert not any(writer.exception() for writer in writers)
    assert len(seen) > 1, "nothing was written while the file was read"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_text(tmp_path, monkeypatch, fails):
    path = tmp_path / "record.json"
    write_atomically(path, "old")
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, fails, mock.Mock(side_effect=full))
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_cells_come_back_in_their_order_missing_ones_too(tmp_path):
    found = [record(id) for id in "abc"]
    cells = {"second": {"1/8": [], "1/4": found[2:], "1/16": found[:1]}, "first": {"1/16": found[1:2]}}
    path = tmp_path / "records.jsonl"
    dump(cells, path)
    kept = read_cells(path)
    assert kept == cells and [*kept] == ["second", "first"] and [*kept["second"]] == ["1/8", "1/4", "1/16"]
    dump({"alone": found}, path)
    assert read_cells(path) == {"alone": {"": found}}
    places = {"root": "/data/of/mine", "weights": "/w/resnet.pth", "cache": "/c"}
    dump({"a": [record(config=record().config | places)]}, path)
    assert {"mine", "resnet.pth", "c"} <= {*map(str, read_cells(path)["a"][""][0].config.values())}


@pytest.mark.parametrize("line", ['{"id": "a"', '{"id": "a"}', '{"row": "a", "column": "", "id": 3}'])
def test_a_file_of_records_names_the_line_that_is_none(tmp_path, line):
    dump({"a": [record()]}, tmp_path / "records.jsonl")
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="records.jsonl, line 2 is not a record with its row and column"):
        read_cells(tmp_path / "records.jsonl")


def test_evidence_that_is_not_there_is_an_error_and_no_folder(tmp_path):
    with pytest.raises(ValueError, match="figurs holds no folder with a records.jsonl"):
        records.evidence(str(tmp_path / "figurs"))
    assert not (tmp_path / "figurs").exists()
    (tmp_path / "mine").mkdir()
    dump({"a\u2028b": [record()]}, tmp_path / "mine/records.jsonl")  # a line end to some, to JSON none
    assert records.evidence(str(tmp_path)) == {"mine": {"a\u2028b": {"": [record()]}}}


def test_a_frame_has_a_line_a_run_and_every_row_and_column_in_order():
    two = [record(seed=1, miou=7.0), record()]
    cells = {"b": {"y": two, "x": []}, "a": {"x": [record()]}, "c": {"x": []}}
    table = records.frame(cells)
    assert [*table.row.cat.categories] == ["b", "a", "c"] and [*table.column.cat.categories] == ["y", "x"]
    lines = [["b", "y", 1, 7], ["b", "y", 0, 50], ["a", "x", 0, 50]]
    assert table[["row", "column", "seed", "miou"]].values.tolist() == lines
    assert [*table.columns] == [*records.COLUMNS] and table.notna().all(None) and not table.all_labels.any()
    assert records.frame(table) is table
    assert records.frame({"a": {"x": []}}).empty and records.evaluations(records.frame({"a": []})).empty
    full = record().config | {"split": "full"}
    upper = records.frame({"all": [record(config=full)], "mkd": [record(config=full | {"method": "mkd"})]})
    assert [*upper.all_labels] == [True, False]
    config = record().config | {"dataset": "folder", "root": "/data/street"}
    assert records.frame({"a": [record(config=config)]}).data[0] == "folder street"


def test_evaluations_have_a_line_a_predictor():
    quality = {"threshold": 0.95, "kept": 10.0, "accuracy": None, "accuracy_all": 50.0}
    found = {"step": 2, "miou": {"student 1": 3.0, "teacher 1": 4.0}, "pseudo_labels": {"teacher 1": quality}}
    table = records.evaluations(records.frame({"a": [record(evaluations=[found])], "b": [record()]}))
    lines = [["a", "student 1", 3], ["a", "teacher 1", 4]]
    assert table[["row", "predictor", "miou"]].values.tolist() == lines
    assert [*table.reported] == [True, False] and [*table.labeler] == [False, True]
    assert table.kept.isna().tolist() == [True, False] and table.accuracy.isna().all()


def test_history_leaves_out_the_line_that_is_being_written(tmp_path):
    assert history(tmp_path) == []
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert history(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("content", [b"{}\n", b"5\n", b"\xff\n", b"{\n"])
def test_a_damaged_history_is_named(tmp_path, content):
    (tmp_path / "history.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="history.jsonl is damaged"):
        history(tmp_path)


def test_environment_names_what_can_change_a_result():
    found = records.environment()
    assert {"python", "torch", "torchvision", "numpy", "timm", "segmentation-models-pytorch"} <= set(found)
    assert found["torch"][0].isdigit()
    assert records.commit() == "unknown" or len(records.commit().split("+")[0]) == 40
