"""Runs where something is scarce: memory, shared memory, patience."""

import re
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_runner import assert_same
from tiny import config

from mkd_core import evaluate as evaluation
from mkd_core import open_dataset, prepare, records, runner
from mkd_core import train as train_module
from mkd_core.runner import run


def test_an_evaluation_that_fails_at_the_end_costs_no_step(tmp_path, monkeypatch):
    """Out of memory after the last step: the second try evaluates, trains nothing again, and names both commits."""
    c = config("mkd", steps=4, checkpoint_every=100)
    whole = run(c, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as m:
        m.setattr(runner, "evaluate", Mock(side_effect=RuntimeError("can't allocate memory")))
        with pytest.raises(RuntimeError, match="allocate"):
            run(c, tmp_path, quiet=True)
    monkeypatch.setattr(runner, "train", None)
    monkeypatch.setattr(records, "commit", lambda: "later")
    assert run(c, tmp_path, quiet=True).commit == f"{whole.commit}, later"
    assert_same(tmp_path / "whole" / c.id, tmp_path / c.id)


def test_memory_for_the_largest_image_is_tried_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for k, size in enumerate([(32, 32), (96, 64), (32, 32)]):
        noise = np.random.default_rng(k).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{k}.png")
        Image.fromarray(noise[..., 0] // 128).save(tmp_path / f"m{k}.png")
    (tmp_path / "train.txt").write_text("0.png m0.png\n")
    (tmp_path / "val.txt").write_text("1.png m1.png\n2.png m2.png\n")
    own = dict(dataset="folder", root=str(tmp_path), dataset_options={}, split="full", batch=2, steps=2)
    plain = run(config(**own), tmp_path / "plain", quiet=True)
    monkeypatch.setattr(prepare, "LARGE", 32 * 33)
    assert run(config(**own), tmp_path / "runs", quiet=True).confusion == plain.confusion

    def full(net, images, window):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory") if images.shape[2] == 96 else None

    monkeypatch.setitem(evaluation.PROTOCOLS, "whole", full)
    message = "does not suffice to evaluate 1.png, 0 megapixels: protocol=sliding.*can't allocate"
    with pytest.raises(ValueError, match=message):
        run(config(**own, seed=1), tmp_path / "runs", quiet=True)


def test_what_a_run_says(tmp_path, capsys, monkeypatch):
    """After the first step its time and what is left; one class everywhere; nothing kept."""
    run(config("mkd", steps=3, log_every=100, lr=1e-9), tmp_path)
    text = capsys.readouterr().out
    assert re.search(r"\[#+ +\] step 1 of 3, [\d.e-]+ s a step, .*images/s, .*min left", text)
    assert "WARNING: no pixel has a confidence of 0.95" in text
    run(config("mean_teacher", steps=2, lr=1e-9), tmp_path)  # has no T
    assert "0.95" not in capsys.readouterr().out
    c = config(steps=2, log_every=100)
    spread, one = torch.eye(5, dtype=torch.int64), torch.zeros(5, 5, dtype=torch.int64)
    one[:, 1] = 7
    for counts, seed in ((spread, 1), (one, 0)):
        monkeypatch.setattr(runner, "evaluate", lambda p, d, ids, counts=counts, **how: ({"net": counts}, {}))
        run(config(steps=2, log_every=100, seed=seed), tmp_path)
        name = open_dataset("shapes").classes[1]
        assert (f"WARNING: every pixel is predicted as {name}" in capsys.readouterr().out) == (counts is one)
    assert [row["step"] for row in records.history(tmp_path / c.id)] == [2]


def test_shared_memory_that_is_too_small_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(ValueError, match="/dev/shm has 0 MB free, 1 workers need .* workers=0"):
        run(config(workers=1), tmp_path, quiet=True)
    assert train_module.loaders(config(workers=-1)) == 0
