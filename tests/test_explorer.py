"""What the explorer shows: numbers and maps against slow references, views against what the method is fed, runs that are broken or growing."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import config

from mkd_core import evaluate, runner
from mkd_core.data.base import read_label
from mkd_core.explorer import Explorer, explore
from mkd_core.explorer.study import (
    VIEWS,
    Prediction,
    Recent,
    Study,
    accuracy_curve,
    by_class,
    image_bytes,
    layer,
    mask_png,
    newest_runs,
    write_new,
)
from mkd_core.methods import METHODS

OPTIONS = {"mkd": {}, "cps": {"boxes": 3}, "cutmix_seg": {}, "supervised": {}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Method -> folder of a run of six steps, checkpoints kept after 2 and 4."""
    place = tmp_path_factory.mktemp("runs")
    configs = {name: config(name, keep_every=2, quality_images=0, options=options) for name, options in OPTIONS.items()}
    for c in configs.values():
        runner.run(c, place, quiet=True)
    return {name: place / c.id for name, c in configs.items()}


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
    pixels = [(int(p), float(c), int(t)) for p, c, t in zip(found.label.flat, found.confidence.flat, truth.flat, strict=True)]
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
        np.testing.assert_allclose([coverage, accuracy], [share(kept, known), share([x for x in kept if x[0] == x[2]], kept)])
    without = by_class(found, None, threshold, 4)
    assert np.isnan(without["right"]).all() and np.array_equal(without["kept"], table["kept"], equal_nan=True)


@pytest.mark.parametrize("threshold", [0, 0.6, 1])
def test_layers_mark_the_pixels_that_they_name(threshold):
    found, truth = random_case(1)
    other, palette = random_case(2)[0].label, np.arange(12, dtype=np.uint8).reshape(4, 3)
    masks = {
        name: layer(name, found, other, truth, threshold, palette)[0]
        for name in ("pseudo-labels", "labels", "confidence", "errors", "A ≠ B")
    }
    for at in np.ndindex(5, 5):
        label, confidence, y = found.label[at], found.confidence[at], truth[at]
        kept = confidence >= np.float32(threshold)
        assert masks["pseudo-labels"][at] == (label if kept else 255) and masks["labels"][at] == label
        assert masks["errors"][at] == (255 if y in (255, label) else 0 if kept else 1)
        assert masks["A ≠ B"][at] == (255 if other[at] == label else 0)
        assert abs(masks["confidence"][at] / 254 - confidence) < 1 / 254
    assert (layer("errors", found, other, None, threshold, palette)[0] == 255).all(), "without truth nothing is wrong"


def test_masks_and_images_arrive_as_they_are():
    found, _ = random_case(3, classes=150, side=40)
    palette = np.random.default_rng(0).integers(0, 256, (150, 3)).astype(np.uint8)
    mask = found.pseudo_label(0.5)
    picture = Image.open(io.BytesIO(mask_png(mask, palette)))
    assert np.array_equal(np.array(picture), mask)
    rgba = np.array(picture.convert("RGBA"))
    assert ((rgba[..., 3] == 0) == (mask == 255)).all() and (rgba[mask != 255, :3] == palette[mask[mask != 255]]).all()
    image = np.random.default_rng(1).integers(0, 256, (16, 20, 3)).astype(np.uint8)
    assert np.array_equal(np.array(Image.open(io.BytesIO(image_bytes(image)))), image)


def test_the_cache_keeps_what_was_used_last_within_its_bound():
    cache, made = Recent(10), []

    def get(key, cost):
        return cache.get(key, lambda: made.append(key) or key, lambda value: cost)

    for key, cost in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4)):
        assert get(key, cost) == key
        assert cache.used <= 10 and cache.used == sum(cost for _, cost in cache.items.values())
    assert made == ["a", "b", "c", "b"]  # c displaced b, the older one
    get("huge", 11)
    assert cache.used <= 10


@pytest.mark.parametrize("method", OPTIONS)
def test_predictions_are_those_of_the_evaluation(runs, method):
    study = Study(runs[method])
    id = study.sets["unlabeled"][3]
    for name, file in (("checkpoint.pt", "checkpoint.pt"), ("step 2", "checkpoint-2.pt")):
        trained = runner.load_method(runs[method], checkpoint=file)
        found = study.predict(0, file, id)
        labels = {n: evaluate.segment(net, study.data, [id])[0].numpy() for n, net in trained.predictors.items()}
        assert list(found) == study.predictors(0, file) == [*labels, *(["mean"] if len(labels) > 1 else [])]
        assert all(np.array_equal(found[n].label, label) for n, label in labels.items()), name
    again = study.cache.used
    study.predict(0, "checkpoint.pt", id)
    assert study.cache.used == again > 0
    assert list(study.checkpoints(0).items()) == [("step 2", "checkpoint-2.pt"), ("step 4", "checkpoint-4.pt"), ("last", "checkpoint.pt")]


@pytest.mark.parametrize("name", METHODS)
def test_the_views_are_what_the_method_is_fed(tmp_path, name):
    """Recomputed for each way of mixing from the draws of the same step."""
    c = config(name, steps=3, checkpoint_every=3, quality_images=0, options=OPTIONS.get(name, {}), weak_photometric=True)
    runner.run(c, tmp_path, quiet=True)
    study, draw = Study(tmp_path / c.id), 5
    id, *others = study.sets["unlabeled"]
    before = {key: value.clone() for key, value in study.method(0, "checkpoint.pt").state_dict().items()}
    views = {view: study.view(view, 0, "checkpoint.pt", id, draw)[0] for view in VIEWS}
    _, own, partner = study.view(VIEWS[-1], 0, "checkpoint.pt", id, draw)
    assert all(torch.equal(value, before[key]) for key, value in study.method(0, "checkpoint.pt").state_dict().items())
    assert partner in others
    seen, weak, strong = (views[key] for key in ("what the student sees", "weak view", "strong view"))
    assert not np.array_equal(weak, strong)
    kept = {key: (seen == views[key]).all(-1) for key in ("weak view", "strong view")}
    if name in ("supervised", "mean_teacher", "advsemseg", "gct", "cct"):
        assert kept["weak view"].all() and own.all()
    elif name == "vat":  # the strong view and a direction
        difference = np.abs(seen.astype(int) - strong)
        assert 0 < difference.mean() < 40 and own.all()
    elif name in ("pc2seg", "simple_baseline", "speed"):
        assert kept["strong view"].all() or name == "speed"  # which mixes two strong views
    elif name in ("pseudoseg", "st_plus_plus"):  # CutOut
        assert own.all() and (~kept["strong view"]).any(1).sum() <= 32 and kept["strong view"].mean() > 0.2
    elif name in ("mkd", "fixmatch", "unimatch", "cutmix_seg", "ps_mt"):
        assert kept["strong view"][own].all() and not kept["strong view"][~own].any()
    elif name in ("cps", "u2pl"):
        assert kept["weak view"][own].all() and not kept["weak view"][~own].any()
    if name in ("mkd", "cps", "cutmix_seg"):  # always some boxes; the others draw whether
        assert 0 < own.mean() < 1
    again = Study(tmp_path / c.id)
    assert all(np.array_equal(again.view(key, 0, "checkpoint.pt", id, draw)[0], views[key]) for key in VIEWS)
    assert not np.array_equal(study.view("weak view", 0, "checkpoint.pt", id, 6)[0], weak)


def test_searches_order_and_filter(runs):
    shown = explore([runs["mkd"], runs["cps"]])
    study, ids = shown.study, shown.study.sets["unlabeled"]
    a, b = (0, "checkpoint.pt", "teacher 1"), (1, "checkpoint.pt", "student 1")
    one, two = ([study.predict(*which[:2], i)[which[2]] for i in ids] for which in (a, b))
    differ = {i: (p.label != q.label).mean() for i, p, q in zip(ids, one, two, strict=True)}
    confidence = {i: p.confidence.mean() for i, p in zip(ids, one, strict=True)}
    shown.sort.value = "A and B differ most"
    assert shown.order == sorted(ids, key=lambda i: -differ[i])
    shown.sort.value = "A least confident"
    assert shown.order == sorted(ids, key=lambda i: confidence[i])
    seldom = min(range(5), key=lambda c: sum((p.label == c).any() for p in one) or 99)
    shown.present.value = seldom
    expected = [i for i, p in zip(ids, one, strict=True) if (p.label == seldom).any()]
    assert sorted(shown.order) == sorted(expected)
    shown.panes[0].source.value = "student 2"  # the order is that of what pane A shows now
    confidence = {i: study.predict(*a[:2], i)["student 2"].confidence.mean() for i in ids}
    shown.present.value = -1
    assert shown.order == sorted(ids, key=lambda i: confidence[i])
    shown.panes[0].source.value = "teacher 1"
    assert shown.order != sorted(ids, key=lambda i: confidence[i])
    shown.sort.value = "file order"
    assert shown.order == list(ids) and shown.canvas.state["current"] == ids[0]


def test_a_run_that_is_being_written_shows_its_new_checkpoint(runs, tmp_path):
    folder = tmp_path / "growing"
    folder.mkdir()
    (folder / "config.json").write_bytes((runs["mkd"] / "config.json").read_bytes())
    with pytest.raises(ValueError, match="no checkpoint yet: the first one comes after 2 steps"):
        Study(folder)
    (folder / "checkpoint.pt").write_bytes((runs["mkd"] / "checkpoint-2.pt").read_bytes())
    shown = explore(folder)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    first = shown.canvas.mask_a
    shown.panes[0].layer.value = "labels"
    first = shown.panes[0].found.confidence
    (folder / ".new").write_bytes((runs["mkd"] / "checkpoint.pt").read_bytes())
    (folder / ".new").replace(folder / "checkpoint.pt")
    (folder / "checkpoint-2.pt").write_bytes((runs["mkd"] / "checkpoint-2.pt").read_bytes())
    shown.do("look again")
    assert list(shown.panes[0].checkpoint.options) == [("step 2", "checkpoint-2.pt"), ("last", "checkpoint.pt")]
    assert not np.array_equal(shown.panes[0].found.confidence, first)
    shown.panes[0].checkpoint.value = "checkpoint-2.pt"
    assert np.array_equal(shown.panes[0].found.confidence, first)
    assert {p.name for p in folder.iterdir()} == {*before, "checkpoint-2.pt"}, "nothing is written into a run"


def test_a_damaged_checkpoint_is_said_and_the_controls_stay_usable(runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "checkpoint.pt"):
        (folder / name).write_bytes((runs["mkd"] / name).read_bytes())
    (folder / "checkpoint-4.pt").write_bytes((runs["mkd"] / "checkpoint-4.pt").read_bytes()[:1000])
    shown = explore(folder)
    shown.panes[0].checkpoint.value = "checkpoint-4.pt"
    assert "checkpoint-4.pt is damaged" in shown.canvas.state["message"]
    shown.panes[0].checkpoint.value = "checkpoint.pt"
    assert shown.canvas.state["message"] == "" and shown.canvas.mask_a


def test_a_mask_of_another_size_is_named_and_left_out_of_a_search(runs):
    study = Study(runs["supervised"])
    label, wrong = study.data.label, study.sets["unlabeled"][1]
    study.data.label = lambda id: label(id)[1:] if id == wrong else label(id)
    shown = Explorer(study)
    shown.index.value = 1
    assert f"{wrong}: its mask has (31, 32) pixels" in shown.canvas.state["message"]
    shown.sort.value = "A worst mIoU"
    assert len(shown.order) == len(study.sets["unlabeled"]) - 1 and "1 of" in shown.canvas.state["message"]


def test_a_run_that_is_damaged_can_be_left_for_its_older_checkpoint(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["cps"], folder)
    shown = explore([runs["mkd"], folder])
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:1000])
    shown.panes[0].run.value = 1
    assert "checkpoint.pt is damaged" in shown.canvas.state["message"]
    shown.panes[1].checkpoint.value = "checkpoint-2.pt"
    shown.panes[0].checkpoint.value = "checkpoint-2.pt"
    assert "has no teacher 1; it has student 1, student 2, mean" in shown.canvas.state["message"]
    shown.panes[0].source.value = "truth"
    assert shown.canvas.state["message"] == ""


def test_the_threshold_begins_at_the_methods_own(tmp_path):
    for name, options, expected in (
        ("mkd", {"threshold": 0.0}, 0.0),
        ("fixmatch", {"threshold": 0.8}, 0.8),
        ("gct", {}, 0.95),
        ("supervised", {}, 0.95),
    ):
        c = config(name, steps=2, quality_images=0, options=options)
        runner.run(c, tmp_path, quiet=True)
        assert explore(tmp_path / c.id).threshold.value == expected


@pytest.mark.parametrize(
    "what, message", [("empty", "there is no run in"), ("none", "no run to explore"), ("other", "have different ones")]
)
def test_what_cannot_be_opened_is_refused(runs, tmp_path, what, message):
    other = tmp_path / "other"
    other.mkdir()
    if what == "other":
        values = json.loads((runs["cps"] / "config.json").read_text())
        values["dataset_options"]["size"] = 64
        (other / "config.json").write_text(json.dumps(values))
        (other / "checkpoint.pt").write_bytes((runs["cps"] / "checkpoint.pt").read_bytes())
    with pytest.raises(ValueError, match=message):
        explore({"empty": other, "none": [], "other": [runs["cps"], other]}[what])


def test_saving_never_overwrites_and_reads_back(runs, tmp_path):
    shown = explore(runs["mkd"], tmp_path / "out")
    shown.threshold.value = 0.3
    for _ in range(2):
        shown.do("save pseudo-label")
    first, second = sorted((tmp_path / "out").iterdir(), key=lambda p: len(p.name))
    expected = shown.panes[0].found.pseudo_label(0.3)
    for path in (first, second):
        assert np.array_equal(read_label(path, 5).numpy(), expected)
    for shown.mode.value in ("side by side", "swipe", "A alone"):
        shown.do("save view")
    assert len(list((tmp_path / "out").glob("*view*.png"))) == 3
    shown.panes[0].source.value = "truth"
    shown.do("save pseudo-label")
    assert "choose a network" in shown.canvas.state["message"]
    shown.out.value = " "
    shown.do("save view")
    assert "name a folder" in shown.canvas.state["message"]
    assert write_new(tmp_path, "a b/c", Image.new("L", (1, 1))).name == "a_b_c.png"


def test_many_classes_of_which_few_occur(runs):
    """150 classes: the legend names those that occur and counts the others; a class that is isolated but absent clears the mask."""
    study = Study(runs["supervised"])
    names = tuple(f"class {k}" for k in range(150))
    study.data.classes, study.palette = names, np.zeros((150, 3), np.uint8)
    found = Prediction(np.full((1, 32, 32), 149, np.uint8), np.full((1, 32, 32), 0.5, np.float32))
    study.predict = lambda *_: {"net": found}
    shown = Explorer(study)
    truth = study.truth(shown.id)
    assert {row["name"] for row in shown.canvas.state["legend"]} == {"class 149", *(names[c] for c in np.unique(truth))}
    assert shown.canvas.state["absent"] == f"not here: {150 - 1 - len(np.unique(truth))} classes"
    shown.canvas.isolated = 60
    assert (shown.panes[0].mask == 255).all()
    assert "class 60" in {row["name"] for row in shown.canvas.state["legend"]}, "a second click on it frees it"


def test_newest_runs_are_comparable_and_mkd_is_first(runs):
    place = runs["mkd"].parent
    assert newest_runs(place / "nowhere") == []
    later = place / "later"
    later.mkdir()
    (later / "config.json").write_text(config("unimatch", keep_every=2, quality_images=0).model_dump_json())
    (later / "checkpoint.pt").touch()
    assert newest_runs(place) == [runs["mkd"], runs["cps"], runs["supervised"], runs["cutmix_seg"], later]
    shutil.rmtree(later)
    broken = place / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}x")
    (broken / "checkpoint.pt").touch()
    other = place / "other"
    other.mkdir()
    (other / "config.json").write_text(config(seed=5).model_dump_json())
    (other / "checkpoint.pt").touch()
    assert newest_runs(place) == [other]
    for folder in (broken, other):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
