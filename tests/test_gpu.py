"""tests/gpu.py: its dry run does every part and leaves a report; what fails or hangs is put down; its comparisons can fail."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_checks
import pytest
import torch

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_the_dry_run_does_every_part_and_none_fails(tmp_path):
    words = [sys.executable, str(HERE / "gpu.py"), "--dry", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = rows(tmp_path)
    parts = {name for stage in gpu.ROUNDS for name in stage}
    assert {row["part"] for row in found} == parts and all(row["ok"] for row in found)
    steps = [row for row in found if "mfu" in row]
    assert len(steps) >= 3 and all(row["costs"].count("%") == 3 for row in steps)
    assert min(min(row["ms"], row["tflop"]) for row in steps) > 0
    runs = [row for row in found if row["part"] == "train"]
    assert len(runs) == 2 and all(row["state"] == "done" and row["miou"] >= 0 for row in runs)
    curves = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert len({row["run"] for row in curves}) == 2 and max(row["step"] for row in curves) == 4
    text = (tmp_path / "report.md").read_text()
    assert text.startswith(f"# {len(found)} results, 0 failed") and all(
        f"## {name}" in text for name in parts
    )
    files = {"results.jsonl", "report.md", "log.txt", "history.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_a_part_that_fails_or_hangs_is_put_down_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(device, put, *names):
        put("before", True, value=1.0)
        raise RuntimeError("no such kernel")

    def hangs(device, put):
        time.sleep(600)

    def works(device, put, *names):
        time.sleep(1)
        with gpu.attempt(put, "one of two"):
            raise ValueError("a case")
        put("two of two", True)

    monkeypatch.setattr(gpu, "CHECKS", {"methods": fails, "kernels": hangs, "resume": works})
    args = argparse.Namespace(out=tmp_path, dry=True)
    began = time.time()
    gpu.work_through({"methods": 60, "kernels": 6, "resume": 60}, args, began + 60)
    assert time.time() - began < 40
    found = {(row["part"], row["name"]): row for row in rows(tmp_path)}
    assert found["methods", "before"]["ok"] and found["resume", "two of two"]["ok"]
    bad, whole = {key: row["error"] for key, row in found.items() if not row["ok"]}, "the whole part"
    assert bad.keys() == {("methods", whole), ("kernels", whole), ("resume", "one of two")}
    assert "time" in bad["kernels", whole] and bad["resume", "one of two"] == "ValueError: a case"
    assert "no such kernel" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "report.md").read_text().count("FAILED") == 3


def test_what_loses_the_gpu_ends_its_process_and_the_rest_is_done_in_another(tmp_path, monkeypatch):
    def each(device, put, names):
        for name in names:
            with gpu.attempt(put, f"{name} float32"):
                if name == "b":
                    raise RuntimeError("an index out of range")
                put(f"{name} float32", True)

    monkeypatch.setattr(gpu_checks, "lost", lambda: True)
    monkeypatch.setattr(gpu, "CHECKS", {"methods": each})
    monkeypatch.setattr(gpu, "NAMES", {"methods": ("a", "b", "c")})
    monkeypatch.setattr(gpu.torch, "device", lambda name: CPU)
    gpu.work_through({"methods": 60}, argparse.Namespace(out=tmp_path, dry=False), time.time() + 60)
    assert [(row["name"][0], row["ok"]) for row in rows(tmp_path)] == [("a", True), ("b", False), ("c", True)]


def test_runs_that_are_not_done_in_time_are_put_down_with_how_far_they_came(tmp_path, monkeypatch):
    endless = {"workers": 0, "steps": 100_000, "evaluate_every": 2, "log_every": 1}
    make = gpu.config
    monkeypatch.setattr(gpu, "config", lambda method, **_: make(method, **endless))
    args = argparse.Namespace(dry=True, runs=None, data=None, slots=1, out=tmp_path, until=time.time() + 15)
    found = []
    gpu.train(CPU, lambda name, ok, **about: found.append(about), args)
    assert [row["state"] for row in found] == ["cut off", "not begun"]
    assert found[0]["step"] > 0 and found[0]["of"] == 100_000 and found[0]["best_predictor_so_far"] >= 0


def test_each_run_of_a_table_is_begun_once_all_rows_of_a_column_first(tmp_path):
    rows, columns = {"all": {"split": "full"}, "few": {}}, {k: {"split": f"random/{k}"} for k in ("6", "8")}
    table = {"common": {"method": "supervised"}, "rows": rows, "columns": columns, "seeds": [0, 1]}
    (tmp_path / "table.yaml").write_text(json.dumps(table))
    found = [(name, c.split) for name, c in gpu.planned(tmp_path / "table.yaml", {}).items()]
    each = {"all, 6": "full", "few, 6": "random/6", "few, 8": "random/8"}  # rows of one method, told apart
    assert found == [(f"{name}, seed {seed}", split) for seed in (0, 1) for name, split in each.items()]


def test_the_comparison_of_steps_can_fail():
    def step() -> tuple:
        return gpu_checks.one_step("mean_teacher", {}, CPU, "float32")

    terms, gradient, method = step()
    exact = step()
    assert gpu_checks.compare("mean_teacher", "float32", exact, (terms, gradient, method))["ok"]
    wrong = {"sup": terms["sup"] * 1.01}
    for found in ((terms | wrong, gradient, method), (terms, 1.1 * gradient, method), ({}, gradient, method)):
        with pytest.raises(KeyError) if not found[0] else gpu_checks.nullcontext():
            assert not gpu_checks.compare("mean_teacher", "float32", found, exact)["ok"]
    method.net.classifier.weight.grad = method.net.classifier.bias.grad = None
    assert not gpu_checks.compare("mean_teacher", "float32", (terms, gradient, method), exact)["students"]


def test_draws_are_the_same_in_every_precision():
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        with gpu_checks.SameDraws():
            a = torch.randn(50, dtype=dtype)
            b = torch.empty(50, dtype=dtype).uniform_(1, 2)
            c = torch.nn.functional.dropout2d(torch.ones(1, 50, 2, 2, dtype=dtype), 0.5)
        assert a.dtype == b.dtype == c.dtype == dtype
        found.append(torch.cat([a, b, c.flatten()]).float())
    torch.testing.assert_close(*found, rtol=1e-2, atol=0)
    assert not torch.equal(*found)
