"""Training in stages: killed in the middle of one, or of its labels, equals uninterrupted; what a stage trains on; what a new one resets."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from test_runner import assert_same, finish, start
from tiny import config
from torch import Tensor

from mkd_core import records
from mkd_core.augment import normalise
from mkd_core.config import RunConfig
from mkd_core.data import open_dataset
from mkd_core.data.splits import load_split
from mkd_core.losses import cross_entropy
from mkd_core.methods import METHODS, Method
from mkd_core.runner import run
from mkd_core.train import NonFiniteLoss, poly


class Stopped(Exception):
    pass


class Staged(Method):
    """Three equal stages; image number i gets the constant label i, or i + 100 from the second labeling."""

    stages = (1 / 3, 2 / 3)
    stop = -1
    choice: tuple[tuple[int, ...], ...] = ((1, 4, 8, 13), (4, 7))

    def __init__(self, build):
        super().__init__()
        self.net = build()
        self.batches, self.given = [], []

    def forward(self, batch, progress):
        if len(self.batches) == self.stop:
            raise Stopped
        self.batches.append(batch)
        return {"sup": cross_entropy(self.net(batch.x), batch.y)}, {}

    def relabel(self, stage, images, prob, labeled) -> Iterator[tuple[int, Tensor]]:
        assert not self.training and not torch.is_grad_enabled()
        self.given.append(set(labeled))
        for i in self.choice[stage - 1]:
            assert prob(self.net, images[i]).shape == (1, 5, 32, 32)
            yield i, torch.full((32, 32), i + 100 * (stage - 1))

    @property
    def predictors(self):
        return {"net": self.net}


class StagedLabeled(Staged):
    """The same without unlabeled images in the first stage."""

    unlabeled = False


def staged(
    monkeypatch: pytest.MonkeyPatch, kind: type[Staged] = Staged, **keys
) -> tuple[RunConfig, list[Staged]]:
    """A configuration of the method and the list that the methods of its runs end up in. Images are whole: at most flipped."""
    made: list[Staged] = []

    class Kept(kind):
        def __init__(self, build):
            super().__init__(build)
            made.append(self)

    monkeypatch.setitem(METHODS, "staged", Kept)
    small = {"steps": 12, "scale": (1.0, 1.0), "strong": "none", "checkpoint_every": 3}
    return config("staged", **small | keys), made


# Killed.


# The stages begin at 4 and 8: between two checkpoints, or at one.
@pytest.mark.parametrize("checkpoint_every, deaths", [(3, [
    ("half label 4", 3, ".labels-1.tmp"), ("renamed labels-1 0", 3, "labels-1"),
    ("renamed checkpoint.pt 1", 6, "labels-1"), ("half label 3", 6, ".labels-2.tmp"),
    ("renamed checkpoint.pt 1", 9, "labels-2"),
]), (4, [("full labels-1 1", 4, ".labels-1.tmp"), ("renamed checkpoint.pt 1", 8, "labels-1"), ("half label 3", 8, ".labels-2.tmp"), ("renamed labels-2 0", 8, "labels-2")])], ids=["between", "at"])  # fmt: skip
def test_killed_in_a_stage_or_at_its_labels_is_the_uninterrupted_run(checkpoint_every, deaths, tmp_path):
    often = {"checkpoint_every": checkpoint_every, "evaluate_every": 4}
    c = config("st_plus_plus", options={"scales": [1.0]}, steps=12, lr=0.05, **often)
    run(c, tmp_path / "whole", quiet=True)
    folder = tmp_path / "killed" / c.id
    for die, step, labels in deaths:
        process = start(c, tmp_path / "killed", die=die)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, die
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == step, die
        assert (folder / labels).is_dir() and not (folder / "record.json").exists(), die
    finish(start(c, tmp_path / "killed"))
    assert_same(tmp_path / "whole" / c.id, folder)  # and no labels-* are left


# In stage 1; at the door of stage 2, which keeps the labels of stage 1; in stage 2.
@pytest.mark.parametrize("stop, checkpoint_every, gone", [(7, 3, 1), (8, 4, 1), (10, 3, 2)])
def test_labels_that_are_gone_are_an_error(stop, checkpoint_every, gone, tmp_path, monkeypatch):
    c, _ = staged(monkeypatch, checkpoint_every=checkpoint_every)
    with monkeypatch.context() as m:
        m.setattr(Staged, "stop", stop)
        with pytest.raises(Stopped):
            run(c, tmp_path, quiet=True)
    folder = tmp_path / c.id
    assert [(folder / f"labels-{k}").is_dir() for k in (1, 2)] == [True, stop >= 8]
    shutil.rmtree(folder / f"labels-{gone}")
    kept = (folder / "checkpoint.pt").read_bytes()
    message = f"labels-{gone}, pseudo-labels of the run, is gone; delete .* to start anew"
    with pytest.raises(ValueError, match=message):
        run(c, tmp_path, quiet=True)
    assert (folder / "checkpoint.pt").read_bytes() == kept


@pytest.mark.parametrize("kind", [Staged, StagedLabeled])
def test_a_stage_streams_the_selected_images_with_their_labels(kind, tmp_path, monkeypatch):
    """An image that is not labeled again keeps its label of the stage before; the others are not seen."""
    c, made = staged(monkeypatch, kind, steps=30)
    record = run(c, tmp_path, quiet=True)
    (method,) = made
    assert method.given == [set(), {1, 4, 8, 13}]
    dataset = open_dataset(c.dataset, c.root, **c.dataset_options)
    ids = load_split(dataset, c.split, c.seed).unlabeled
    images = [normalise(dataset.image(i)[None].float() / 255)[0] for i in ids]
    assert len(images) == 18 and len(method.batches) == 30
    first, second, third = (method.batches[k : k + 10] for k in (0, 10, 20))
    count = 3 if kind is Staged else 0
    assert all(len(b.weak) == len(b.label) == count and (b.label == 255).all() for b in first)
    known = {1: 1, 4: 4, 8: 8, 13: 13}
    for batches, labels in ((second, known), (third, known | {4: 104, 7: 107})):
        seen = set()
        for b in batches:
            for image, label in zip(b.weak, b.label, strict=True):
                views = [(own, own.flip(-1)) for own in images]
                (i,) = (i for i, both in enumerate(views) if any(torch.equal(v, image) for v in both))
                assert (label == labels[i]).all()
                seen.add(i)
        assert seen == labels.keys()
    seconds = torch.load(tmp_path / c.id / "checkpoint.pt", weights_only=True)["seconds_training"]
    assert record.images_per_second * seconds == pytest.approx(3 * (60 if kind is Staged else 50), rel=1e-2)


def test_labels_follow_the_geometry_of_their_image(tmp_path, monkeypatch):
    """A label that is the image's green channel is still that after scaling, cropping, padding and flipping."""

    def relabel(self, stage, images, prob, labeled):
        for i in range(len(images)):
            yield i, (images[i][0, 1] * 0.224 + 0.456).clamp(0, 0.99).mul(255).round().long()

    c, made = staged(monkeypatch, scale=(0.6, 1.6))
    monkeypatch.setattr(Staged, "relabel", relabel)
    run(c, tmp_path, quiet=True)
    for b in made[0].batches[4:]:
        assert torch.equal(b.label == 255, ~b.valid)
        green = (b.weak[:, 1] * 0.224 + 0.456) * 255
        assert torch.corrcoef(torch.stack((green[b.valid], b.label[b.valid].float())))[0, 1] > 0.9


def test_learning_rate_and_optimiser_start_anew(tmp_path, monkeypatch):
    c, _ = staged(monkeypatch, optimizer="adamw", steps=13)  # stages begin at 4 and 9
    run(c, tmp_path, quiet=True)
    steps = [(t - a) / (b - a) for a, b in ((0, 4), (4, 9), (9, 13)) for t in range(a, b)]
    rates = [0.01 * (1 - share) ** 0.9 for share in steps]
    assert [row["lr"] for row in records.history(tmp_path / c.id)] == pytest.approx(rates)
    assert [poly(c, t, 4, 9) for t in (4, 8)] == pytest.approx([1, 0.2**0.9])
    (optimizer,) = torch.load(tmp_path / c.id / "checkpoint.pt", weights_only=True)["optimizers"]
    assert {state["step"].item() for state in optimizer["state"].values()} == {4}


def test_labeling_counts_as_time_and_the_end_of_a_stage_without_a_log_there_too(tmp_path, monkeypatch):
    def forward(self, batch, progress, f=Staged.forward):
        time.sleep(0.1 * (progress < 2 / 3))
        return f(self, batch, progress)

    def relabel(self, *args, f=Staged.relabel):
        time.sleep(0.5)
        yield from f(self, *args)

    c, _ = staged(monkeypatch, checkpoint_every=50, log_every=50)
    monkeypatch.setattr(Staged, "forward", forward)
    monkeypatch.setattr(Staged, "relabel", relabel)
    record = run(c, tmp_path, quiet=True)
    images, training = 12 * 2 * c.batch, 0.8
    assert record.seconds > training + 2 * 0.5  # the rate is that of training
    assert images / (record.seconds - 0.9) < record.images_per_second < images / training


def test_a_loss_that_is_not_finite_at_the_end_of_a_stage_is_found(tmp_path, monkeypatch):
    def forward(self, batch, progress, f=Staged.forward):
        terms, stats = f(self, batch, progress)
        return {"sup": terms["sup"] * (float("nan") if progress == 3 / 12 else 1)}, stats

    def relabel(self, *args, f=Staged.relabel):
        yield from f(self, *args)
        self.net.load_state_dict({name: torch.zeros_like(t) for name, t in self.net.state_dict().items()})

    c, _ = staged(monkeypatch, checkpoint_every=50, log_every=50)
    monkeypatch.setattr(Staged, "forward", forward)
    monkeypatch.setattr(Staged, "relabel", relabel)
    with pytest.raises(NonFiniteLoss, match="not finite at step 3,"):
        run(c, tmp_path, quiet=True)


def test_a_stage_without_images_says_so(tmp_path, monkeypatch):
    c, _ = staged(monkeypatch)
    monkeypatch.setattr(Staged, "choice", ((), ()))
    with pytest.raises(ValueError, match="no pseudo-labelled image in .*labels-1"):
        run(c, tmp_path, quiet=True)
