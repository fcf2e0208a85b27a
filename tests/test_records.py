"""Records: all or nothing under concurrent writers, collected, and refused in one table where they were not measured alike."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
from tiny import config

from mkd_core import records
from mkd_core.records import Record, collect, dump, history, load, save, table, write_atomically

server = multiprocessing.get_context("forkserver")


def record(id: str = "a", miou: float = 50.0, seed: int = 0, **keys) -> Record:
    c = config(seed=seed)
    return Record(
        **{
            "id": id, "status": "done", "config": c.model_dump(mode="json"), "miou": miou, "miou_best": miou + 1, "step_best": 3,
            "iou": [miou, None], "classes": ["x", "y"], "predictors": {"net": miou}, "predictors_best": {"net": miou + 1}, "pseudo_labels": None,
            "seconds": 2.0, "images_per_second": 3.0, "peak_memory_mb": 4.0, "device": "cpu", "threads": 1, "precision": "float32", "seed": seed,
            "split": {"name": "random/6@0", "sha256": f"labeled by seed {seed}", "labeled": 6, "unlabeled": 18}, "weights": {"name": "", "sha256": ""},
            "protocol": "whole", "evaluated": {"images": 6, "set": "val"}, "versions": {}, "commit": "unknown",
        }
        | keys
    )  # fmt: skip


def test_save_and_load(tmp_path):
    assert load(tmp_path) is None
    save(record(), tmp_path)
    assert load(tmp_path) == record()
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="extra"):
        record(extra=1)


def write_often(path: str, letter: str, times: int) -> None:
    for _ in range(times):
        write_atomically(Path(path), letter * 200_000)


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_a_reader_never_sees_half_of_a_text(tmp_path, kind):
    path = tmp_path / "record.json"
    path.write_text("a" * 200_000)
    errors: list[BaseException] = []
    if kind == "processes":
        workers = [server.Process(target=write_often, args=(str(path), letter, 40)) for letter in "bcd"]
    else:

        def guarded(letter: str) -> None:
            try:
                write_often(str(path), letter, 40)
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=guarded, args=(letter,)) for letter in "bcd"]
    for worker in workers:
        worker.start()
    seen = set()
    while any(w.is_alive() for w in workers):
        text = path.read_text()
        assert len(text) == 200_000 and len(set(text)) == 1
        seen.add(text[0])
    for worker in workers:
        worker.join()
        assert kind == "threads" or worker.exitcode == 0
    assert not errors
    assert len(seen) > 1, "nothing was written while the file was read"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_text(tmp_path, monkeypatch, fails):
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, fails, full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_collect_takes_the_finished_runs_of_a_folder_and_a_file_alike(tmp_path):
    for id in ("b", "a", "c"):
        (tmp_path / id).mkdir()
        save(record(id), tmp_path / id)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "history.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "note.txt").write_text("not a run")
    found = collect(tmp_path)
    assert [r.id for r in found] == ["a", "b", "c"]
    dump(found, tmp_path / "records.jsonl")
    assert collect(tmp_path / "records.jsonl") == found
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 3
    assert collect(str(tmp_path / "unfinished")) == []


def test_history_leaves_out_the_line_that_is_being_written(tmp_path):
    assert history(tmp_path) == []
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert history(tmp_path) == [{"step": 1}, {"step": 2}]


def test_table_is_mean_and_sample_deviation():
    rows = {"SupOnly": [record(miou=40.0, seed=0), record(miou=44.0, seed=1)], "MKD": [record(miou=60.0)], "later": []}
    found = table(rows)
    assert [*found.index] == ["SupOnly", "MKD", "later"]
    assert [*found["mIoU last"]] == ["42.0 ± 2.8", "60.0", "missing"]  # sqrt(8) = 2.83
    assert [*found["mIoU best"]] == ["43.0 ± 2.8", "61.0", "missing"]
    assert [*found["runs"]] == [2, 1, 0] and found["seeds"]["SupOnly"] == "0, 1"


@pytest.mark.parametrize(
    "keys, words",
    [({"protocol": "sliding"}, "evaluation protocols: sliding, whole"), ({"evaluated": {"images": 7, "set": "val"}}, "evaluated images"),
     ({"evaluated": {"images": 6, "set": "test"}}, "evaluated images"), ({"split": {"sha256": "others"}}, "labeled images"),
     ({"config": {"dataset": "voc"}}, "data sets: shapes, voc")],
    ids=str,
)  # fmt: skip
def test_table_refuses_what_was_not_measured_alike(keys, words):
    with pytest.raises(ValueError, match=words):
        table({"a": [record()], "b": [record(**keys)]})
    table({"a": [record()], "b": [record()]})


def test_a_score_that_does_not_exist_survives_the_disk(tmp_path):
    """Where nothing could be scored (every validation pixel ignored), the record is still readable."""
    nothing = record(miou=float("nan"))
    save(nothing, tmp_path)
    assert load(tmp_path) is not None
    json.loads((tmp_path / "record.json").read_text())


def test_environment_names_what_can_change_a_result():
    found = records.environment()
    assert {"python", "torch", "torchvision", "numpy", "timm", "segmentation-models-pytorch"} <= set(found)
    assert found["torch"][0].isdigit()
    assert records.commit() == "unknown" or len(records.commit().split("+")[0]) == 40
