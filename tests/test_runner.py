"""The loop: killed and resumed equals uninterrupted, bit for bit; what stops it; how networks are evaluated."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, Pointwise, build, child, config, save
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mkd_core import checkpoints, records, runner
from mkd_core.augment import normalise
from mkd_core.config import RunConfig
from mkd_core.data import load_split, open_dataset
from mkd_core.data.stream import Steps, Stream
from mkd_core.evaluate import PROTOCOLS, Predictor, evaluate
from mkd_core.methods import METHODS
from mkd_core.methods.mean_teacher import MeanTeacher
from mkd_core.metrics import miou
from mkd_core.models import SegNet
from mkd_core.runner import run
from mkd_core.train import NonFiniteLoss, build_method, make_batch, make_optimizers, poly
from mkd_core.trained import open_run

# Children are forked from a clean process that has imported torch once.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["mkd_core.runner", "mkd_core.suite.batch"])

LONG = dict(steps=12, checkpoint_every=4, log_every=2, evaluate_every=6, batch=2, channels=8)
OPTIONS = {"cps": {"boxes": 3, "weight": 1.0}, "mkd": {"threshold": 0.3, "fda": 1.0, "rampup": 0.5}, "cutmix_seg": {"threshold": 0.3},
           "st_plus_plus": {"scales": [1.0]}, "simple_baseline": {"scales": [1.0]}}  # fmt: skip
MOVING = {"seconds", "images_per_second", "peak_memory_mb", "commit"}  # of a checkout that others may work in


def long(method: str, **keys) -> RunConfig:
    return config(method, **LONG | {"options": OPTIONS.get(method, {})} | keys)


def outcome(folder: Path) -> tuple[dict, dict, str]:
    """(weights and optimiser state, record without clocks, history) of a finished run."""
    names = ("checkpoint.pt", "checkpoint-best.pt")
    state, best = (torch.load(folder / name, weights_only=True) for name in names)
    record = json.loads((folder / "record.json").read_text())
    assert best["step"] == record["step_best"]
    tensors = {k: state[k] for k in ("step", "method", "optimizers")} | {"best": best["method"]}
    still = {k: v for k, v in record.items() if k not in MOVING}
    return tensors, still, (folder / "history.jsonl").read_text()


def assert_same(a: Path, b: Path, also_config: bool = True) -> None:
    (state, record, history), (other, other_record, other_history) = outcome(a), outcome(b)
    if not also_config:
        record.pop("config"), other_record.pop("config")
    assert record == other_record
    assert history == other_history
    (ours, form), (theirs, other_form) = (tree_flatten(of) for of in (state, other))
    assert form == other_form and [type(x) for x in ours] == [type(x) for x in theirs]
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, Tensor) else x == y
    tensors = [x for x in ours if isinstance(x, Tensor)]
    assert len(tensors) > 100  # weights, buffers, momenta were there to be compared
    usual = {"lock", "config.json", "history.jsonl", "history.csv", "record.json"}
    assert {p.name for p in b.iterdir()} <= usual | {"checkpoint.pt", "checkpoint-best.pt"}


def rows(folder: Path) -> int:
    return len(records.history(folder))


def start(c: RunConfig, runs: Path, **how) -> multiprocessing.Process:
    process = server.Process(target=child, args=(c.model_dump(mode="json"), str(runs)), kwargs=how)
    process.start()
    return process


def finish(process: multiprocessing.Process) -> None:
    process.join(120)
    assert process.exitcode == 0


VIT = {"arch": "dpt", "encoder": "tu-test_vit"}
UNLIKE = VIT | {"encoder2": "tu-test_resnet", "arch2": "deeplabv3plus_mmseg"}


@pytest.mark.parametrize("method, keys", [
    *(pytest.param(method, {}, id=method) for method in METHODS if method != "mkd_ablation"),  # it is MKD here
    pytest.param("unimatch_v2", VIT, id="vit"), pytest.param("mkd", UNLIKE, id="unlike")])  # fmt: skip
def test_killed_at_random_moments_and_resumed_is_the_uninterrupted_run(method, keys, tmp_path):
    c = long(method, **keys)
    run(c, tmp_path / "whole", quiet=True)
    total = rows(tmp_path / "whole" / c.id)
    folder, chance = tmp_path / "killed" / c.id, random.Random(method)
    # Somewhere in the middle: after a certain number of rows, plus up to three steps.
    targets = [chance.randint(1, total // 2), chance.randint(total // 2, total - 2)]
    for target in targets if method in ("mkd", "st_plus_plus") else chance.sample(targets, 1):
        process = start(c, tmp_path / "killed", delay=0.04, wait=True)
        deadline = time.monotonic() + 60
        while (rows(folder) if folder.exists() else 0) < target:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.12))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the child ended before it was killed"
        assert not (folder / "record.json").exists() and target <= rows(folder) < total
    finish(start(c, tmp_path / "killed"))
    assert_same(tmp_path / "whole" / c.id, folder)


def test_killed_while_writing_is_the_uninterrupted_run(tmp_path):
    """Checkpoint half written, complete but not renamed, just renamed; record complete but not renamed; config; nothing is half there."""
    c = long("mean_teacher", steps=8, checkpoint_every=2, evaluate_every=4)
    run(c, tmp_path / "whole", quiet=True)
    folder = tmp_path / "killed" / c.id
    # Every child saves its first checkpoint two steps after the one it found.
    for die, step in (
        ("full config.json 0", None), ("half checkpoint 1", None), ("full checkpoint.pt 1", None), ("renamed checkpoint.pt 1", 2),
        ("full checkpoint-best.pt 1", 2), ("renamed checkpoint-best.pt 1", 2),
        ("half checkpoint 2", 4), ("full history.jsonl 0", 4), ("renamed checkpoint.pt 2", 8), ("full record.json 2", 8),
    ):  # fmt: skip
        process = start(c, tmp_path / "killed", die=die)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, die
        path = folder / "checkpoint.pt"
        assert (torch.load(path, weights_only=True)["step"] if path.exists() else None) == step, die
        assert not (folder / "record.json").exists()
    finish(start(c, tmp_path / "killed"))
    for leftover in [*folder.glob(".*.tmp")]:
        leftover.unlink()  # of killed processes; never read, and the next check is about everything else
    assert_same(tmp_path / "whole" / c.id, folder)


def test_loader_processes_change_nothing(tmp_path):
    c, d = long("mkd", steps=4), long("mkd", steps=4, workers=2)
    assert c.id == d.id
    run(c, tmp_path / "0", quiet=True)
    run(d, tmp_path / "2", quiet=True)
    assert_same(tmp_path / "0" / c.id, tmp_path / "2" / c.id, also_config=False)


def test_the_same_id_never_runs_again(tmp_path, monkeypatch):
    c = config(steps=2)
    record = run(c, tmp_path, quiet=True)
    monkeypatch.setattr(runner, "_Run", lambda *args: pytest.fail("it ran again"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / c.id).iterdir()}
    assert run(config(steps=2, device="auto", workers=3, log_every=7), tmp_path, quiet=True) == record
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / c.id).iterdir()}


def test_a_second_process_at_the_same_run_is_told_so(tmp_path):
    c = long("supervised")
    process = start(c, tmp_path, wait=True)
    try:
        while not (tmp_path / c.id / "config.json").exists():
            assert process.is_alive()
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match=f"another process is at run {c.id}"):
            run(c, tmp_path, quiet=True)
        assert process.is_alive()
    finally:
        process.kill()
        process.join()


def poison(monkeypatch, step: int) -> None:
    """The loss of this step, of 8, is no number."""
    forward = MeanTeacher.forward

    def poisoned(self, batch, progress):
        terms, stats = forward(self, batch, progress)
        factor = float("nan") if round(progress * 8) == step else 1
        return {k: factor * t for k, t in terms.items()}, stats

    monkeypatch.setattr(MeanTeacher, "forward", poisoned)


@pytest.mark.parametrize("log_every", [1, 4, 50])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, log_every):
    c = config("mean_teacher", steps=8, log_every=log_every, checkpoint_every=3)
    run(c, tmp_path / "healthy", quiet=True)
    folder = tmp_path / "ill" / c.id
    with monkeypatch.context() as m:
        poison(m, 4)
        with pytest.raises(NonFiniteLoss) as error:
            run(c, tmp_path / "ill", quiet=True)
    message = str(error.value)
    # Which images step 4 sees, counted on independently: samples 12, 13, 14 of both streams.
    labeled, unlabeled = seen_in_step(c, 4)
    assert "step 4" in message
    assert f"Labeled images: {', '.join(labeled)}; unlabeled images: {', '.join(unlabeled)}" in message
    assert not (folder / "record.json").exists()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3 and all(v.isfinite().all() for v in state["method"].values())
    assert all(np.isfinite(row["loss"]) for row in records.history(folder))
    run(c, tmp_path / "ill", quiet=True)  # the cause removed, it goes on from there
    assert_same(tmp_path / "healthy" / c.id, folder)


def seen_in_step(c: RunConfig, step: int) -> tuple[list[str], list[str]]:
    """Ids whose image is read while the tensors of a step are made."""
    dataset = open_dataset(c.dataset, c.root, **c.dataset_options)
    split = load_split(dataset, c.split, c.seed)
    read: list[str] = []
    image = dataset.image
    dataset.image = lambda id: (read.append(id), image(id))[1]  # type: ignore[method-assign]
    of_both(c, dataset, split)[step]
    labeled, unlabeled = read[: c.batch], read[c.batch :]
    assert {*labeled} <= {*split.labeled} and {*unlabeled} <= {*split.unlabeled} and len(unlabeled) == c.batch
    return labeled, unlabeled


def of_both(c: RunConfig, dataset, split) -> Steps:
    view = dict(seed=c.seed, crop=c.crop, scale=c.scale, base=c.base)
    labeled = Stream(dataset, split.labeled, name="labeled", labeled=True, **view)
    return Steps(labeled, Stream(dataset, split.unlabeled, name="unlabeled", labeled=False, **view), c.batch)


def test_a_bad_loss_before_the_first_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, 0)
    with pytest.raises(NonFiniteLoss, match="step 0"):
        run(config("mean_teacher", steps=8), tmp_path, quiet=True)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    """Whichever write fails (config, history, checkpoints, record): no temporary, what was there stays, and the run can go on."""
    c = config(steps=4, checkpoint_every=1)
    run(c, tmp_path / "whole", quiet=True)
    for after in range(7):
        folder = tmp_path / f"{after}" / c.id
        full = [OSError(errno.ENOSPC, "No space left on device")] * 99  # from the `after`-th time on
        with monkeypatch.context() as m:
            m.setattr(os, "fsync", mock.Mock(side_effect=[None] * after + full))
            with pytest.raises(OSError, match="No space left"):
                run(c, folder.parent, quiet=True)
        assert not [*folder.glob(".*")] and not (folder / "record.json").exists()
        if after > 2:  # config and history; then a checkpoint and a table at each step
            assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == (after - 1) // 2
        run(c, folder.parent, quiet=True)
        assert_same(tmp_path / "whole" / c.id, folder)


@pytest.mark.parametrize(
    "keys, word",
    [({"split": "random/99"}, "99"), ({"split": "cps/1_61"}, "split"), ({"dataset": "voc", "root": "/nowhere", "dataset_options": {}}, "nowhere"),
     ({"method": "mkd", "norm": "group", "batch": 1}, "batch"), ({"device": "cuda:77"}, "cuda:77"), ({"base": 1}, "from 16 on"),
     ({"encoder": "tu-hrnet_w18_small"}, "deeplabv3plus on tu-hrnet_w18_small cannot be built"),
     ({"method": "gct", "crop": (16, 16)}, "gct with these options needs a crop of at least 32"),
     ({"method": "advsemseg", "crop": (16, 48)}, "needs a crop of"),
     ({"method": "st_plus_plus", "steps": 2}, "2 steps are too few"), ({"root": "~nosuchuser/x", "dataset": "voc", "dataset_options": {}}, "~nosuchuser"), ({"encoder": "resnet5"}, "resnet5")],
)  # fmt: skip
def test_bad_input_is_refused_before_training(tmp_path, keys, word):
    with pytest.raises((ValueError, KeyError), match=word):
        run(config(**keys), tmp_path, quiet=True)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"]


def test_the_first_network_of_a_seed_is_the_same_for_every_method():
    first = {}
    for seed in (0, 1):
        methods = [build_method(config(name, seed=seed), 5) for name in METHODS]
        nets = [next(m for m in method.modules() if isinstance(m, SegNet)) for method in methods]
        states = [net.state_dict() for net in nets]
        first[seed] = states[0]
        assert all(torch.equal(state[key], first[seed][key]) for state in states for key in first[seed])
    assert not any(torch.equal(first[0][k], first[1][k]) for k in first[0] if k.endswith("conv1.weight"))


def test_schedule_and_optimisers():
    c = config(steps=5, lr=0.02, weight_decay=0.003)
    method = build_method(c, 5)
    (sgd,) = make_optimizers(c, method)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.9, 0.003)
    (adamw,) = make_optimizers(config(optimizer="adamw", lr=0.02, weight_decay=0.003), method)
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["weight_decay"] == 0.003
    mkd = build_method(config("mkd"), 5)
    found = {id(p) for o in make_optimizers(config("mkd"), mkd) for g in o.param_groups for p in g["params"]}
    assert found == {id(p) for p in mkd.students.parameters()}
    for t in range(5):
        assert poly(c, t) == pytest.approx((1 - t / 5) ** 0.9)


def test_the_head_learns_at_a_multiple_of_the_encoders_rate(tmp_path):
    for method in ("mkd", "gct", "cct"):
        c = config(method, lr=0.02, head_lr=10.0, batch=4, crop=(64, 64))
        found = build_method(c, 5)
        rate = {id(p): g["lr"] for g in make_optimizers(c, found)[0].param_groups for p in g["params"]}
        rates = {name: rate[id(p)] for name, p in found.named_parameters() if id(p) in rate}
        assert {lr for name, lr in rates.items() if ".encoder." in name} == {0.02} and len(rates) > 100
        assert {lr for name, lr in rates.items() if ".encoder." not in name} == {0.2}
    run(config(lr=0.02, head_lr=10.0), tmp_path, quiet=True)  # both follow the schedule
    (state,) = torch.load(next(tmp_path.glob("*/checkpoint.pt")), weights_only=True)["optimizers"]
    encoder, head = (group["lr"] for group in state["param_groups"])
    assert head == pytest.approx(10 * encoder) and encoder < 0.02


def test_one_step_is_plain_sgd(tmp_path, monkeypatch):
    """Two steps of the loop against two steps written out: data, learning rates, momentum, sum of terms, teacher's step numbers."""
    c = config("mean_teacher", steps=2, options={"weight": 5.0}, weight_decay=0.01)
    method, dataset = build_method(c, 5).train(), open_dataset("shapes", "", **c.dataset_options)
    split = load_split(dataset, c.split, c.seed)
    steps = of_both(c, dataset, split)
    parameters = [*method.net.parameters()]
    momenta = [torch.zeros_like(p) for p in parameters]
    teacher = [p.detach().clone() for p in parameters]
    for t in range(2):
        terms, _ = method(make_batch(steps[t], c, method.views, torch.device("cpu")), t / 2)
        gradients = torch.autograd.grad(terms["sup"] + terms["consistency"], parameters)
        with torch.no_grad():
            for p, g, m in zip(parameters, gradients, momenta, strict=True):
                m.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(c.lr * (1 - t / 2) ** 0.9 * m)
            for own, p, mine in zip(teacher, parameters, method.teacher.module.parameters(), strict=True):
                own.mul_(0.99).add_(0.01 * p)
                mine.copy_(own)
    run(c, tmp_path, quiet=True)
    state = outcome(tmp_path / c.id)[0]["method"]
    for name, p in method.named_parameters():
        torch.testing.assert_close(state[name], p, rtol=1e-3, atol=1e-5)


def test_views_of_a_batch():
    torch.manual_seed(0)
    tensors = (torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), torch.full((2, 32, 32), 255, dtype=torch.uint8),
               torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), torch.ones(2, 32, 32, dtype=torch.bool),
               torch.full((2, 32, 32), 3, dtype=torch.uint8))  # fmt: skip
    plain = make_batch(tensors, config(strong="none"), 2, torch.device("cpu"))
    expected = normalise(tensors[2].float() / 255)
    assert len(plain.strong) == 2 and all(torch.equal(s, expected) for s in (plain.weak, *plain.strong))
    assert torch.equal(plain.x, normalise(tensors[0].float() / 255))
    assert (plain.y.dtype, plain.valid.dtype) == (torch.int64, torch.bool)
    coloured = make_batch(tensors, config(strong="chain"), 2, torch.device("cpu"))
    assert torch.equal(coloured.weak, expected) and not torch.equal(coloured.strong[0], coloured.strong[1])
    released = make_batch(tensors, config(strong="none", weak_photometric=True), 1, torch.device("cpu"))
    assert torch.equal(released.strong[0], expected)  # strong colour is applied to the geometric view alone
    assert not torch.equal(released.weak, expected) and not torch.equal(released.x, plain.x)
    assert released.label.dtype == torch.int64 and (released.label == 3).all()
    none = [t[:0] for t in tensors[2:]]
    alone = make_batch((*tensors[:2], *none), config(strong="chain"), 0, torch.device("cpu"))
    assert torch.equal(alone.x, plain.x)
    assert not any(map(len, (alone.weak, alone.strong, alone.valid, alone.label)))


def test_bfloat16_trains_float32_weights(tmp_path):
    c = long("mkd", steps=3, precision="bfloat16")
    record = run(c, tmp_path, quiet=True)
    state = outcome(tmp_path / c.id)[0]["method"]
    assert record.precision == "bfloat16"
    fresh = build_method(c, 5).state_dict()
    for key, value in state.items():
        assert value.dtype == fresh[key].dtype and value.isfinite().all()
    ends = [k for k in state if k.endswith(("classifier.weight", "conv1.weight"))]
    assert sum(not torch.equal(state[k], fresh[k]) for k in ends) >= 2
    assert all(np.isfinite(row["loss"]) for row in records.history(tmp_path / c.id))


class Position(nn.Module):
    """Logits that depend on the place inside the window: tells windows apart."""

    def forward(self, x: Tensor) -> Tensor:
        y, z = torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")
        return torch.stack([y / 10 + x[0, 0], z / 7 - x[0, 1], (y + z) / 20 + x[0, 2]])[None]


@pytest.mark.parametrize("size", [(64, 48), (37, 50)])
def test_whole_is_one_window_that_covers_the_image(size):
    net, image = build().eval(), torch.randn(2, 3, *size)
    whole = PROTOCOLS["whole"](net, image, (32, 32))
    assert whole.shape == (2, CLASSES, *size)
    torch.testing.assert_close(PROTOCOLS["sliding"](net, image, (64, 64)), whole)
    torch.testing.assert_close(whole.sum(1), torch.ones(2, *size))
    if size == (64, 48):
        torch.testing.assert_close(whole, net(image).softmax(1))  # multiples of the stride: nothing is padded
    else:
        torch.testing.assert_close(whole, net(F.pad(image, (0, 14, 0, 27)))[..., :37, :50].softmax(1))


@pytest.mark.parametrize("size", [(80, 112), (32, 33), (64, 100), (20, 70)])
def test_sliding_is_the_loop_s(size):
    """Stride ceil(2/3 window), the last window shifted back inside, probabilities averaged where windows overlap."""
    image, window = torch.randn(1, 3, *size), 32
    total, count = torch.zeros(1, 3, *size), torch.zeros(1, 1, *size)
    stride = -(-2 * window // 3)
    tops, lefts = [], []
    for starts, side in ((tops, size[0]), (lefts, size[1])):
        start = 0
        while True:
            starts.append(min(start, max(0, side - window)))
            if starts[-1] + window >= side:
                break
            start += stride
    for top in tops:
        for left in lefts:
            part = image[..., top : top + window, left : left + window]
            h, w = part.shape[-2:]
            total[..., top : top + h, left : left + w] += Position()(part).softmax(1)
            count[..., top : top + h, left : left + w] += 1
    assert count.min() >= 1
    torch.testing.assert_close(PROTOCOLS["sliding"](Position(), image, (32, 32)), total / count)


@pytest.mark.parametrize("size, small", [
    ((375, 500), (384, 512)), ((500, 333), (512, 341)), ((100, 64), (512, 328)), ((700, 1024), (350, 512))])  # fmt: skip
def test_long512(size, small):
    image, shapes = torch.randn(1, 3, *size), []
    net = Pointwise(0)
    net.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape[-2:]))
    prob = PROTOCOLS["long512"](net, image, (32, 32))
    padded = zip(shapes[0], small, strict=True)  # to the network's stride
    assert all(abs(a - b) <= 31 for a, b in padded)
    logits = net(F.interpolate(image, small, mode="bilinear", align_corners=False))
    expected = F.interpolate(logits, size, mode="bilinear", align_corners=False).softmax(1)
    torch.testing.assert_close(prob, expected, rtol=1e-4, atol=1e-5)


class Odd:
    """Images of different sizes."""

    classes = tuple("abcd")
    sizes = ((32, 32), (32, 32), (48, 32), (20, 37), (32, 32), (32, 32), (32, 32))
    ids = tuple(str(i) for i in range(len(sizes)))

    def image(self, id: str) -> Tensor:
        g = torch.Generator().manual_seed(int(id))
        return torch.randint(0, 256, (3, *self.sizes[int(id)]), generator=g, dtype=torch.uint8)

    def label(self, id: str) -> Tensor:
        label = (self.image(id).float().mean(0) / 64).to(torch.uint8)
        label[:2] = 255
        return label


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluate_counts_every_pixel_of_every_image_once(workers):
    nets = {"a": Pointwise(0).train(), "b": Pointwise(1).eval()}
    data = Odd()
    confusion, quality = evaluate(Predictor(nets), data, data.ids, quality=0.4, workers=workers)
    assert nets["a"].training and not nets["b"].training
    expected = {name: torch.zeros(4, 4, dtype=torch.int64) for name in ("a", "b", "mean")}
    kept = {name: 0 for name in expected}
    for id in data.ids:
        image, label = normalise(data.image(id)[None].float() / 255), data.label(id)
        prob = {name: net(image).softmax(1)[0] for name, net in nets.items()}
        prob["mean"] = (prob["a"] + prob["b"]) / 2
        for name, p in prob.items():
            for y, z, q in zip(*(t.flatten().tolist() for t in (label, p.argmax(0), p.amax(0))), strict=True):
                if y != 255:
                    expected[name][y, z] += 1
                    kept[name] += q >= 0.4
    for name in expected:
        assert torch.equal(confusion[name], expected[name])
        assert quality[name].kept.sum() == kept[name] and torch.equal(quality[name].all, expected[name])
    assert [*confusion] == ["a", "b", "mean"]
    assert [*evaluate(Predictor({"a": nets["a"]}), data, data.ids)[0]] == ["a"]


@pytest.mark.parametrize("protocol, precision", [
    *((protocol, "float32") for protocol in PROTOCOLS), ("whole", "bfloat16"), ("sliding", "bfloat16")])  # fmt: skip
def test_all_ways_through_a_predictor_agree(protocol, precision):
    """`__call__` makes probabilities, `parts` scores, `label` pictures; in bands where windows slide."""
    assert config(protocol=protocol).protocol == protocol  # RunConfig lists them too
    nets = {"a": build(), "b": build()}
    predictor = Predictor(nets, protocol=protocol, window=(32, 48), precision=precision)
    image = torch.randint(0, 256, (3, 84, 70), dtype=torch.uint8)
    found = predictor(image[None])
    torch.testing.assert_close(found["mean"], (found["a"] + found["b"]) / 2)
    for rows, name, prob in predictor.parts(image[None]):
        assert torch.equal(prob, found[name][:, :, rows])
    for name, prob in found.items():
        label, confidence = predictor.label(image, name)
        assert torch.equal(label.long(), prob[0].max(0).indices) and torch.equal(confidence, prob[0].amax(0))
    exact = Predictor(nets, protocol=protocol, window=(32, 48))(image[None])["a"]
    assert torch.equal(found["a"], exact) == (precision == "float32")
    assert all(net.training for net in nets.values())


def test_the_record_tells_what_was_measured(tmp_path):
    c = long("mkd", steps=8, evaluate_every=4)
    record = run(c, tmp_path, quiet=True)
    evaluations = [row for row in records.history(tmp_path / c.id) if "miou" in row]
    assert [row["step"] for row in evaluations] == [4, 8]
    names = ["student 1", "student 2", "teacher 1", "teacher 2", "mean"]
    scores = [row["miou"]["student 1"] for row in evaluations]
    assert [*record.predictors] == names and record.miou == record.predictors["student 1"] == scores[-1]
    assert record.miou_best == max(scores) and record.step_best in (4, 8)
    assert record.miou == pytest.approx(np.nanmean([np.nan if v is None else v for v in record.iou]))
    assert len(record.iou) == len(record.classes) == 5 and record.protocol == "whole"
    assert (record.evaluated["images"], record.split["labeled"], record.split["unlabeled"]) == (6, 6, 18)
    parts = ("step", "miou", "pseudo_labels")
    assert record.evaluations == [{key: row[key] for key in parts} for row in evaluations]
    assert record.evaluations[-1]["pseudo_labels"] == record.pseudo_labels
    assert record.confusion == evaluations[-1]["confusion"] and len(record.split["sha256"]) == 64
    assert [*record.pseudo_labels] == names and record.pseudo_labels["student 1"]["threshold"] == 0.95
    assert min(record.seconds, record.peak_memory_mb, record.images_per_second) > 0
    assert RunConfig(**record.config).id == record.id == c.id  # the record states the whole configuration
    # The number is that of the saved weights.
    method = build_method(c, 5)
    method.load_state_dict(outcome(tmp_path / c.id)[0]["method"])
    data = open_dataset("shapes", "", **c.dataset_options)
    matrix = evaluate(Predictor({"net": method.students[0]}), data, data.val)[0]["net"]
    assert miou(matrix) == record.miou


def test_a_gpu_is_in_use_before_its_peak_memory_is_reset(tmp_path, monkeypatch):
    """torch refuses to reset what it has not begun to count: "Invalid device argument", where the GPU has a number."""
    calls = []
    monkeypatch.setattr(runner, "pick_device", lambda *_: torch.device("cuda:0"))
    monkeypatch.setattr(nn.Module, "to", lambda module, device: calls.append(f"to {device}"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(f"reset {device}"))
    runner._Run(config(), tmp_path, True)
    assert calls == ["to cuda:0", "reset cuda:0"]


def test_records_and_checkpoints_of_another_run_and_damaged_ones_are_refused(tmp_path):
    mine, *others = config(steps=2), config("cps", steps=2), config(steps=2, lr=0.02)
    for c in (mine, *others):
        run(c, tmp_path, quiet=True)
    path = tmp_path / mine.id / "record.json"
    text = path.read_text()
    for wrong, word in ((text.replace(mine.id, "other"), "another run"), (text[:99], "damaged")):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=word):
            run(mine, tmp_path, quiet=True)
    path.unlink()
    path = tmp_path / mine.id / "checkpoint.pt"
    for other in others:
        path.write_bytes((tmp_path / other.id / "checkpoint.pt").read_bytes())
        with pytest.raises(ValueError, match="checkpoint.pt is of another run; delete it"):
            run(mine, tmp_path, quiet=True)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.read(path, "cpu")
    with pytest.raises(ValueError, match="no run"):
        open_run(tmp_path)


def test_checkpoints_stay_at_the_stride_that_was_asked_for(tmp_path):
    """keep_every 4: the weights after steps 4 and 8 stay and are those of a run stopped there; they change nothing about the run."""
    kept, plain = (run(config(steps=10, checkpoint_every=2, **keys), tmp_path / name, quiet=True)
                   for name, keys in {"kept": {"keep_every": 4}, "plain": {}}.items())  # fmt: skip
    assert kept.id == plain.id and kept.miou == plain.miou
    folder = tmp_path / "kept" / kept.id
    names, usual = [f"checkpoint{k}.pt" for k in ("-4", "-8", "")], {"checkpoint-best.pt", "checkpoint.pt"}
    assert {p.name for p in folder.glob("*checkpoint*")} == {*names} | usual
    assert {p.name for p in (tmp_path / "plain" / plain.id).glob("*checkpoint*")} == usual
    states = [torch.load(folder / name, weights_only=True) for name in names]
    assert [state["step"] for state in states] == [4, 8, 10]
    loaded = open_run(folder, 4).method.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in states[0]["method"].items())
    assert any(not torch.equal(loaded[key], value) for key, value in states[1]["method"].items())


def test_a_history_is_a_csv_and_tensorboard_is_refused_where_it_is_missing(tmp_path, monkeypatch):
    folder = tmp_path / run(long("supervised"), tmp_path, quiet=True).id
    table, rows = pd.read_csv(folder / "history.csv", float_precision="round_trip"), records.history(folder)
    assert table["term/sup"].tolist() == [row["term/sup"] for row in rows]
    assert table["miou/net"].dropna().tolist() == [row["miou"]["net"] for row in rows if "miou" in row]
    monkeypatch.setattr("mkd_core.prepare.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        run(long("supervised", tensorboard=True), tmp_path / "none", quiet=True)
    assert not [*tmp_path.glob("none/*")]


def test_tensorboard_reads_a_resumed_run_as_one(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / run(long("supervised", tensorboard=True), tmp_path, quiet=True).id
    rows = records.history(folder)
    records.board(folder, 8)({"step": 10, "loss": 5.0})  # what came after step 8 is void
    found = events.EventAccumulator(str(folder)).Reload()
    losses = [(row["step"], row["loss"]) for row in rows if row["step"] <= 8] + [(10, 5.0)]
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(s, pytest.approx(v)) for s, v in losses]
    assert "miou/net" in found.Tags()["scalars"] and "iou/net" not in found.Tags()["scalars"]


def test_a_record_of_other_data_of_the_same_name_is_not_handed_out(tmp_path):
    """a/photos and b/photos have the same lists and, since the root is no part of it, the same id: the files differ."""
    configs = []
    for seed, place in enumerate((tmp_path / "a/photos", tmp_path / "b/photos")):
        rng = np.random.default_rng(seed)
        for name in "uvwx":
            save(place / f"{name}.png", rng.integers(0, 256, (32, 32, 3)))
            save(place / f"{name}_.png", rng.integers(0, 2, (2, 4)).repeat(16, 0).repeat(8, 1))
        for name, ids in {"train": "uvw", "val": "x"}.items():
            (place / f"{name}.txt").write_text("".join(f"{id}.png {id}_.png\n" for id in ids))
        own = {"dataset": "folder", "dataset_options": {"classes": ["no", "yes"]}, "split": "random/2"}
        configs.append(config(**own, root=str(place), steps=1, batch=2))
    first, other = configs
    assert first.id == other.id
    record = run(first, tmp_path, quiet=True)
    assert run(first, tmp_path, quiet=True) == record and len(record.split["contents"]) == 64
    with pytest.raises(ValueError, match="other data .*contents.*MKD_RUNS"):
        run(other, tmp_path, quiet=True)
    (tmp_path / "b/photos/u.png").unlink()
    assert run(other, tmp_path, quiet=True) == record  # absent data prove nothing
    assert runner.data_now(first.model_copy(update={"split": "lists/gone"})) == {}
    (tmp_path / first.id / "record.json").unlink()  # as if it had been stopped; then a mask is changed
    mask = tmp_path / "a/photos/u_.png"
    mask.write_bytes(mask.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="other data .*contents"):
        run(first, tmp_path, quiet=True)
