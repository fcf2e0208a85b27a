"""What the explorer shows: numbers and maps against slow references, views, broken and growing runs."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import config

from mkd_core import runner, trained
from mkd_core.config import read_config
from mkd_core.data.base import read_label
from mkd_core.explorer import explore, panes
from mkd_core.explorer.panes import LAYERS, Shown, accuracy_curve, by_class, layer, write_new
from mkd_core.explorer.study import VIEWS, Prediction, Study, newest_runs, tell_apart

OPTIONS = {"mkd": {"threshold": 0.8}, "cps": {"boxes": 3}, "cutmix_seg": {"threshold": 0.0}, "supervised": {}}
PRECISION = "float32", "bfloat16"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Method -> folder of a run of six steps on whole images, checkpoints kept after 2 and 4."""
    place, made = tmp_path_factory.mktemp("runs"), {}
    for name, options in OPTIONS.items():
        how = {"keep_every": 2, "quality_images": 0, "scale": (1, 1), "precision": PRECISION[name == "cps"]}
        made[name] = place / runner.run(config(name, options=options, **how), place, quiet=True).id
    return made


def last(study, run=0):
    return study.checkpoints(run)["last"]


def copy(run, folder, *names):
    """A run folder with some files of another one; damaged ones are named with a "!" before them."""
    folder.mkdir()
    for name in ("config.json", *names):
        content = (run / name.strip("!")).read_bytes()
        (folder / name.strip("!")).write_bytes(content[:1000] if name[0] == "!" else content)
    return folder


def random_case(seed, classes=4, side=5):
    rng = np.random.default_rng(seed)
    prob = rng.dirichlet(np.full(classes, 0.3), (side, side)).astype(np.float32).transpose(2, 0, 1)
    order = np.argsort(-prob, 0, kind="stable")[:3]
    truth = rng.choice([*range(classes), 255], (side, side)).astype(np.uint8)
    return Prediction(order.astype(np.uint8), np.take_along_axis(prob, order, 0)), truth


def share(part, whole):
    return 100 * len(part) / len(whole) if whole else float("nan")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_numbers_are_those_of_a_loop_over_pixels(seed, threshold):
    found, truth = random_case(seed)
    values = zip(found.label.flat, found.confidence.flat, truth.flat, strict=True)
    pixels = [(int(p), float(c), int(t)) for p, c, t in values]
    table = by_class(found, truth, threshold, 4)
    limit = float(np.float32(threshold))
    for c in range(5):
        mine = [x for x in pixels if c == 4 or x[0] == c]
        kept = [x for x in mine if x[1] >= limit]
        known = [x for x in kept if x[2] != 255]
        expected = share(mine, pixels), share(kept, mine), share([x for x in known if x[0] == x[2]], known)
        np.testing.assert_allclose([table[what][c] for what in ("pixels", "kept", "right")], expected)
    known = [x for x in pixels if x[2] != 255]
    for level, coverage, accuracy in accuracy_curve(found, truth):
        kept = [x for x in known if x[1] >= level]
        expected = [share(kept, known), share([x for x in kept if x[0] == x[2]], kept)]
        np.testing.assert_allclose([coverage, accuracy], expected)
    without = by_class(found, None, threshold, 4)
    assert np.isnan(without["right"]).all() and np.array_equal(without["kept"], table["kept"], equal_nan=True)


@pytest.mark.parametrize("threshold", [0, 0.6, 1])
def test_layers_mark_the_pixels_that_they_name(threshold):
    found, truth = random_case(1)
    other, palette = random_case(2)[0].label, np.arange(12, dtype=np.uint8).reshape(4, 3)
    masks = {name: layer(name, found, other, truth, threshold, palette)[0] for name in LAYERS}
    for at in np.ndindex(5, 5):
        label, confidence, y = found.label[at], found.confidence[at], truth[at]
        kept = confidence >= np.float32(threshold)
        assert masks["pseudo-labels"][at] == (label if kept else 255) and masks["labels"][at] == label
        assert masks["errors"][at] == (255 if y in (255, label) else 0 if kept else 1)
        assert masks["A ≠ B"][at] == (255 if other[at] == label else 0)
        assert abs(masks["confidence"][at] / 254 - confidence) < 1 / 254
    for name in ("errors", "A ≠ B"):
        alone = layer(name, found, None, None, threshold, palette)[0]  # there is nothing to compare with
        assert (alone == 255).all()


def test_masks_and_images_arrive_as_they_are():
    found, _ = random_case(3, classes=150, side=40)
    rng = np.random.default_rng(0)
    palette, image = (rng.integers(0, 256, size).astype(np.uint8) for size in ((150, 3), (40, 40, 3)))
    mask = found.pseudo_label(0.5)
    shown = Shown(image, mask, palette, [], found, found.label)
    picture = Image.open(io.BytesIO(panes.mask_png(shown)))
    assert np.array_equal(np.array(picture), mask)
    rgba, free = np.array(picture.convert("RGBA")), mask == 255
    assert ((rgba[..., 3] == 0) == free).all() and (rgba[~free, :3] == palette[mask[~free]]).all()
    assert np.array_equal(np.array(Image.open(io.BytesIO(panes.image_bytes(image)))), image)
    small = Shown(image[:20], None, palette, [], None, None)
    both = np.array(panes.side_by_side([shown, small], 0.4))[::12, ::12]
    expected = np.where(free[..., None], image, 0.6 * image + 0.4 * palette[np.minimum(mask, 149)])
    assert both.shape == (40, 81, 3) and np.abs(both[:, :40] - expected).max() <= 1
    assert (both[:20, 41:] == image[:20]).all() and (both[20:, 41:] == 255).all()


@pytest.mark.parametrize("method", OPTIONS)
def test_predictions_are_those_of_the_evaluation(runs, method):
    study = Study(runs[method])
    id, found = study.sets["unlabeled"][3], study.checkpoints(0)
    assert [(name, step) for name, (step, _) in found.items()] == [("step 2", 2), ("step 4", 4), ("last", 0)]
    for name, step in (("last", None), ("step 2", 2)):
        predictor = trained.open_run(runs[method], step).predictor()
        shown = study.predict(0, found[name], id)
        assert list(shown) == predictor.names
        for network, prediction in shown.items():
            label, confidence = predictor.label(study.data.image(id), network)
            assert np.array_equal(prediction.label, label.numpy())
            assert np.array_equal(prediction.confidence, confidence.numpy())


@pytest.mark.parametrize("name, mixed", [("mkd", "strong view"), ("cps", "weak view"), ("supervised", None)])
def test_views_are_those_of_the_runs_augmentation(runs, name, mixed):
    study, shown = Study(runs[name]), explore(runs[name])
    id, *others = study.sets["unlabeled"]
    views, state = study.views(0, id, 5), torch.get_rng_state()
    image = study.load(id)[0]
    assert any(np.array_equal(views["weak view"], flipped) for flipped in (image, image[:, ::-1]))
    partners = [study.load(i)[0] for i in others]
    assert any(np.array_equal(views["partner"], p[:, ::step]) for p in partners for step in (1, -1))
    assert not np.array_equal(views["weak view"], views["strong view"])
    assert ("CutMix" in shown.panes[0].source.options) == bool(mixed)
    if mixed:
        own = (views["CutMix"] == views[mixed]).all(-1)
        assert 0 < own.mean() < 1
        if mixed == "weak view":
            assert (views["CutMix"] == views["partner"])[~own].all()
    again = Study(runs[name])
    assert all(np.array_equal(again.views(0, id, 5)[view], views[view]) for view in VIEWS)
    assert not np.array_equal(study.views(0, id, 6)["strong view"], views["strong view"])
    assert torch.equal(torch.get_rng_state(), state)


def test_images_are_ordered_and_filtered(runs):
    shown = explore([runs["mkd"], runs["cps"]])
    study, ids = shown.study, shown.study.sets["unlabeled"]
    networks = (0, last(study), "teacher 1"), (1, last(study, 1), "student 1")
    one, two = ([study.predict(*which[:2], i)[which[2]] for i in ids] for which in networks)
    differ = {i: (p.label != q.label).mean() for i, p, q in zip(ids, one, two, strict=True)}
    confidence = {i: p.confidence.mean() for i, p in zip(ids, one, strict=True)}
    shown.sort.value = "A and B differ most"
    assert shown.order == sorted(ids, key=lambda i: -differ[i])
    assert "teacher 1" in shown.canvas.progress and "student 1" in shown.canvas.progress
    shown.sort.value = "A least confident"
    assert shown.order == sorted(ids, key=lambda i: confidence[i])
    seldom = min(range(5), key=lambda c: sum((p.label == c).any() for p in one) or 99)
    shown.present.value = seldom
    assert set(shown.order) == {i for i, p in zip(ids, one, strict=True) if (p.label == seldom).any()}
    shown.present.value = -1
    before = shown.order
    shown.panes[0].source.value = "student 2"  # what is shown changes at once, the order when it is asked for
    assert shown.order == before and shown.canvas.state["id"] == before[0]
    shown.do("look again")
    confidence = {i: study.predict(*networks[0][:2], i)["student 2"].confidence.mean() for i in ids}
    assert shown.order == sorted(ids, key=lambda i: confidence[i]) != before
    shown.panes[0].source.value = "image"
    shown.do("look again")
    assert "choose a network" in shown.canvas.progress
    shown.sort.value = "file order"
    assert shown.order == list(ids) and shown.canvas.state["id"] == ids[0] and not shown.canvas.progress


def test_a_run_that_is_being_written_shows_its_new_checkpoint(runs, tmp_path):
    folder = copy(runs["mkd"], tmp_path / "growing")
    with pytest.raises(ValueError, match="no checkpoint yet: the first one comes after 2 steps"):
        explore(folder)
    (folder / "checkpoint.pt").write_bytes((runs["mkd"] / "checkpoint-2.pt").read_bytes())
    shown = explore(folder)
    pane, first = shown.panes[0], shown.shown[0].found.confidence
    (folder / ".new").write_bytes((runs["mkd"] / "checkpoint.pt").read_bytes())
    (folder / ".new").replace(folder / "checkpoint.pt")
    (folder / "checkpoint-2.pt").write_bytes((runs["mkd"] / "checkpoint-2.pt").read_bytes())
    shown.do("look again")
    assert [label for label, _ in pane.checkpoint.options] == ["step 2", "last"]
    assert not np.array_equal(shown.shown[0].found.confidence, first)
    pane.checkpoint.label = "step 2"
    assert np.array_equal(shown.shown[0].found.confidence, first)
    files = {"config.json", "checkpoint.pt", "checkpoint-2.pt"}
    assert {p.name for p in folder.iterdir()} == files, "nothing is written into a run"


def test_a_damaged_checkpoint_is_said_and_can_be_left(runs, tmp_path):
    folder = copy(runs["cps"], tmp_path / "run", "checkpoint.pt", "checkpoint-2.pt")
    shown = explore([runs["mkd"], folder])
    a, b = shown.panes
    copy(runs["cps"], tmp_path / "damaged", "!checkpoint.pt")
    (tmp_path / "damaged/checkpoint.pt").replace(folder / "checkpoint.pt")
    a.run.value = 1
    assert "checkpoint.pt is damaged" in shown.canvas.state["message"]
    b.checkpoint.label = "step 2"
    a.checkpoint.label = "step 2"
    assert "has no teacher 1; it has student 1, student 2, mean" in shown.canvas.state["message"]
    a.source.value = "truth"
    assert "message" not in shown.canvas.state and shown.canvas.mask_a


@pytest.mark.parametrize("fault", ["image", "mask", "run"])
def test_after_a_failure_nothing_of_before_is_seen_or_saved(runs, tmp_path, fault):
    """The picture of before must not be saved under the name of an image or a run that cannot be shown."""
    damaged = copy(runs["cps"], tmp_path / "run", "checkpoint.pt")
    shown = explore([runs["mkd"], damaged], tmp_path / "out")
    data, bad = shown.study.data, shown.order[15]
    shown.canvas.pointer = [0, 5, 5]
    assert all((shown.canvas.image_a, shown.canvas.mask_a, shown.canvas.mask_b, shown.canvas.pixel))
    image, label = data.image, data.label
    if fault == "image":
        data.image = lambda id: image("no such image") if id == bad else image(id)
    elif fault == "mask":
        data.label = lambda id: label(id)[1:] if id == bad else label(id)
    else:
        (damaged / "checkpoint.pt").write_bytes(b"damaged")
        shown.panes[0].run.value = 1
    shown.index.value = 15
    message = {"image": "", "mask": f"{bad}: its mask has (31, 32) pixels", "run": "is damaged"}[fault]
    assert message in shown.canvas.state["message"] and shown.canvas.state["message"]
    pictures = shown.canvas.image_a, shown.canvas.image_b, shown.canvas.mask_a, shown.canvas.mask_b
    assert not any(pictures) and not shown.canvas.pixel
    for name in ("save view", "save pseudo-label"):
        shown.do(name)
        assert shown.saved.value == "not saved: the panes show nothing"
    assert not (tmp_path / "out").exists()
    if fault != "run":
        shown.sort.value = "A worst mIoU"
        assert bad not in shown.order and "1 of 18 are left out" in shown.canvas.progress
    shown.panes[0].run.value = 0
    shown.index.value = 0
    shown.do("save pseudo-label")
    assert len(list((tmp_path / "out").iterdir())) == 1 and "saved: " in shown.saved.value


def test_the_threshold_begins_at_the_methods_own_and_one_that_keeps_nothing_says_so(runs):
    for name, own in {"cutmix_seg": 0.0, "cps": 0.95, "mkd": 0.8}.items():  # CPS has none
        shown = explore(runs[name])
        assert shown.threshold.value == own
    shown.threshold.value = 1.0
    highest = shown.shown[0].found.confidence.max()
    said = f"T keeps nothing: the highest confidence is {highest:.2f}"
    assert shown.canvas.state["panes"][0]["key"] == [("", said)]
    shown.threshold.value = 0.0
    assert "untinted" in shown.canvas.state["panes"][0]["key"][0][1]


def test_runs_open_wherever_jupyter_was_started_and_others_are_refused(runs, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    other = copy(runs["cps"], tmp_path / "other", "checkpoint.pt")
    values = json.loads((other / "config.json").read_text())
    values["dataset_options"]["size"] = 64
    (other / "config.json").write_text(json.dumps(values))
    unlike = [([runs["cps"], other], "other has other data than the first")]
    for name in "ab":  # what `mkd prepare` has written into a/mkd and b/mkd
        own = {"dataset": "folder", "dataset_options": {}, "root": f"/photos/{name}/mkd"}
        copy(other, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(values | own))
    unlike.append(([tmp_path / "a", tmp_path / "b"], "b has other data than the first"))
    for named, message in ((tmp_path / "empty", "empty"), ([], "no run to explore"), *unlike):
        with pytest.raises(ValueError, match=message):
            explore(named)
    # Paths of runs, and the folder to save to, are relative to the project, not to the working folder.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(runner.records, "RUNS", runs["mkd"].parent)
    monkeypatch.setattr(runner.records, "ROOT", runs["mkd"].parents[1])
    for name in (runs["mkd"].name, f"{runs['mkd'].parent.name}/{runs['mkd'].name}", read_config(runs["mkd"])):
        assert explore(name).study.folders == [runs["mkd"]]
    shown = explore(None, "saved views")
    shown.do("save view")
    assert list((runs["mkd"].parents[1] / "saved views").iterdir()) and not list(tmp_path.glob("here/*"))


def test_saving_never_overwrites_and_reads_back(runs, tmp_path):
    shown = explore(runs["mkd"], tmp_path / "out")
    shown.threshold.value = 0.3
    for _ in range(2):
        shown.do("save pseudo-label")
    expected = shown.shown[0].found.pseudo_label(0.3)
    first, second = sorted((tmp_path / "out").iterdir(), key=lambda p: len(p.name))
    assert shown.saved.value == f"saved: {second}"
    for path in (first, second):
        assert np.array_equal(read_label(path, 5).numpy(), expected)
    shown.do("save view")
    assert len(list((tmp_path / "out").glob("*view*.png"))) == 1
    shown.panes[0].source.value = "truth"
    shown.do("save pseudo-label")
    assert "choose a network" in shown.saved.value and shown.canvas.image_a, "a refusal changes no picture"
    shown.out.value = " "
    shown.do("save view")
    assert "name a folder" in shown.saved.value
    assert write_new(tmp_path, "a b/c", Image.new("L", (1, 1))).name == "a_b_c.png"


def test_newest_runs_are_comparable_mkd_is_first_and_they_are_told_apart(runs, tmp_path):
    assert newest_runs(tmp_path / "nowhere") == []
    place = tmp_path / "runs"
    place.mkdir()
    folders = [copy(runs[name], place / name, "checkpoint.pt") for name in OPTIONS]
    assert newest_runs(place) == [place / name for name in ("mkd", "cps", "supervised", "cutmix_seg")]
    broken = copy(runs["mkd"], place / "broken", "checkpoint.pt")
    (broken / "config.json").write_text("{}x")
    (copy(runs["mkd"], place / "half removed", "checkpoint.pt") / "config.json").unlink()
    whole = copy(runs["supervised"], place / "all labels", "checkpoint.pt")  # the demo's last run
    (whole / "config.json").write_text(config(split="full").model_dump_json())
    assert set(newest_runs(place)) == set(folders)
    other = copy(runs["mkd"], place / "other", "checkpoint.pt")
    (other / "config.json").write_text(config(seed=5).model_dump_json())
    assert newest_runs(place) == [other]
    made = [config("mkd", seed=1), config("mkd", options={"alpha": 2.0}), config("cps"), config("cps")]
    folders = [tmp_path / name for name in "abcd"]
    assert tell_apart(made, folders) == ["mkd seed=1 alpha=1.5", "mkd seed=0 alpha=2.0", "cps c", "cps d"]
