"""n processes with one global batch are one process with that batch: every method; and runs of several processes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
import yaml
from joint import die, train
from test_methods import CASES, METHODS

from mkd_core import parallel, records
from mkd_core.config import RunConfig
from mkd_core.records import ROOT
from mkd_core.runner import run
from mkd_core.suite import execution

SIZES = {"advsemseg": 64, "gct": 64}  # what a critic says of less is rounding
CASES = CASES | {name + " alone": (name, {"contrast": 0.0, "dim": 16}) for name in ("u2pl", "pc2seg")}
CASES |= {"mit_b0": ("mean_teacher", {"encoder": "mit_b0"})}  # has DropPath
CASES = {name: (*case, SIZES.get(name, 32)) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def alone():
    return train(CASES, 2)  # with the draws of two processes: of DropPath, which METHODS have not


@pytest.mark.parametrize("processes, names", [(2, CASES), (4, METHODS)], ids=["2", "4"])
def test_n_processes_give_the_losses_and_weights_of_one(processes, names, alone):
    ours, wrong = parallel.launch(train, processes, {name: CASES[name] for name in names}), []
    for case in names:
        (values, state), (wanted, other) = ours[case], alone[case]
        near = {key: values[key] == pytest.approx(wanted[key], rel=1e-6, abs=1e-9) for key in wanted}
        near |= {key: np.allclose(state[key], other[key], rtol=1e-5, atol=1e-8) for key in other}
        wrong += [f"{case}: {key}" for key, is_near in near.items() if not is_near]
    assert not wrong, wrong[:20]


def test_a_killed_process_ends_the_run_which_goes_on_with_another_number(tmp_path):
    config = tiny.config("st_plus_plus", steps=6, batch=4, devices=2, checkpoint_every=1, workers=1)
    with pytest.raises(RuntimeError, match="process 1 of 2 failed: Signal 9"):
        parallel.launch(die, 2, config, tmp_path, 4)
    steps = [row["step"] for row in records.history(tmp_path / config.id)]
    assert 3 <= len(steps) < 6 and not (tmp_path / config.id / "record.json").exists()
    alone, losses = config.model_copy(update={"devices": 1}), {}
    for folder in (tmp_path, tmp_path / "whole"):
        run(alone, folder, quiet=True)
        losses[folder] = [row["loss"] for row in records.history(folder / config.id)]
    assert losses[tmp_path] == pytest.approx(losses[tmp_path / "whole"], rel=1e-4)


def test_a_slot_of_several_devices_and_wrong_input(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "SLOT", type("Slot", (), {"device": "cpu+cpu"}))
    monkeypatch.setattr(execution, "PAUSE", 0.0)
    config = tiny.config("mkd", steps=2, batch=4, device="auto", log_every=1)
    alone = run(config.model_copy(update={"device": "cpu"}), tmp_path / "alone", quiet=True)
    execution.execute(config.model_dump(mode="json"), str(tmp_path / config.id), os.getcwd(), 1)
    found = records.load(tmp_path / config.id)
    assert found.config["devices"] == 2 and found.confusion == alone.confusion
    wrong = config.model_copy(update={"device": "cpu", "devices": 2, "split": "random/30"})
    with pytest.raises(ValueError, match="process . of 2 failed: DataError: random: 30"):
        run(wrong, tmp_path, quiet=True)


def test_devices_are_refused_where_they_cannot_share_the_batch():
    for keys in ({"batch": 3}, {"batch": 4, "device": "cuda:1"}):
        with pytest.raises(ValueError, match="devices share a batch equally"):
            tiny.config(devices=2, **keys)
    with pytest.raises(ValueError, match="devices"):
        RunConfig(devices=0)


def test_torchrun_starts_a_run_with_the_parameters_of_10_run(tmp_path):
    config = tiny.config("mkd", steps=2, batch=4).model_dump(mode="json", exclude={"devices", "weights2"})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    words = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0"
    done = subprocess.run(
        [sys.executable, *words.split(), "-m", "mkd_core.suite.joined", str(tmp_path / "tiny.yaml"), "steps=3"],
        capture_output=True, text=True, env=os.environ | {"MKD_RUNS": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    (folder,) = tmp_path.glob("shapes-*")
    found = records.load(folder)
    assert (found.config["devices"], found.config["steps"]) == (2, 3), done.stderr
