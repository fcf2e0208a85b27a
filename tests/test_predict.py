"""Predictions, pseudo-labels and exports: right for every size and mode of image, whole or absent, one answer by every way."""

import json
import re
import resource
import shutil
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

import mkd_core
from mkd_core import RunConfig, evaluate, load_split, open_dataset, open_run, records, runner
from mkd_core.augment import normalise
from mkd_core.data import DataError, check
from mkd_core.data.base import colormap, read_image, read_label
from mkd_core.metrics import PseudoLabelQuality, confusion_matrix
from mkd_core.models import SegNet
from mkd_core.suite import export as exporting
from mkd_core.suite.cli import main
from mkd_core.suite.export import export
from mkd_core.suite.predict import _texts, predict, pseudo_label
from mkd_core.train import build_method

DINOV2 = "tu-vit_small_patch14_dinov2"


def trained(config, runs):
    """The folder of a short run, its classifiers rescaled so that every class is predicted somewhere, without ties."""
    runner.run(config, runs, quiet=True)
    folder = runs / config.id
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    dataset, method = open_dataset("shapes", size=32), open_run(folder, device="cpu").method
    x = normalise(torch.stack([dataset.image(id) for id in dataset.train[:16]]).float() / 255)
    for net in method.predictors.values():
        tiny.spread(net, x)
    torch.save(state | {"method": method.state_dict()}, folder / "checkpoint.pt")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """MKD on shapes, its windows 32 x 32."""
    folder = trained(tiny.config("mkd", steps=2), tmp_path_factory.mktemp("runs"))
    shutil.copy(folder / "checkpoint.pt", folder / "checkpoint-6.pt")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A person's folder: 16 pictures 40 x 32 with masks in two folders, names with spaces; two masks are not listed."""
    root = tmp_path_factory.mktemp("photos")
    shapes = open_dataset("shapes", train_size=16, val_size=2, size=48)
    lines = []
    for k, id in enumerate(shapes.train):
        image, mask = f"{'ab'[k % 2]}/photo {k // 2}.png", f"masks/{k}.png"
        tiny.save(root / image, shapes.image(id).permute(1, 2, 0)[:40, :32])
        tiny.save(root / mask, shapes.label(id)[:40, :32])
        lines.append(f"{image}\t{mask}" if k < 14 else image)
    (root / "classes.txt").write_text("\n".join(shapes.classes))
    (root / "train.txt").write_text("\n".join(lines[2:]))
    (root / "val.txt").write_text("\n".join(lines[:2]))
    return root


@pytest.fixture(scope="module")
def photo_run(photos, tmp_path_factory):
    config = tiny.config(dataset="folder", dataset_options={}, root=str(photos), split="random/6", steps=2)
    return trained(config, tmp_path_factory.mktemp("photo runs"))


def picture(path, height, width, seed=0, mode="RGB", **keys):
    """A smooth random picture file; returns its path."""
    small = (height // 8 + 2, width // 8 + 2, 3)
    coarse = np.random.default_rng(seed).integers(0, 256, small, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path, **keys)
    return path


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@cache
def opened(run):
    return open_run(run, device="cpu")


def expected(run, name, image, protocol="whole", precision="float32"):
    """(C, H, W) probabilities, by the definition."""
    x, found = normalise(image[None].float() / 255), {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        for n, net in opened(run).method.predictors.items():
            found[n] = evaluate.PROTOCOLS[protocol](net, x, (32, 32))[0]
    return sum(found.values()) / len(found) if name == "mean" else found[name]


def label_of(run, image, name="", protocol=""):
    return open_run(run, device="cpu").predictor(protocol).label(image, name)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def precise_run(request, run, tmp_path_factory):
    half = tiny.config("mkd", steps=2, precision="bfloat16")
    return run if request.param == "float32" else trained(half, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", ["student 1", "teacher 2", "mean"])
def test_all_ways_to_predict_agree(precise_run, tmp_path, name):
    data = open_dataset("shapes", train_size=24, val_size=6, size=32)
    model, precision = opened(precise_run).predictor(), opened(precise_run).config.precision
    labels = {id: model.label(data.image(id), name)[0] for id in data.val}
    found = {p: [expected(precise_run, name, data.image(id), precision=p).argmax(0) for id in data.val]
             for p in ("float32", "bfloat16")}  # fmt: skip
    equal = {p: [*map(torch.equal, map(torch.Tensor.byte, of), labels.values())] for p, of in found.items()}
    assert all(equal.pop(precision)) and not all(*equal.values())  # it matters

    confusion = evaluate.evaluate(model, data, data.val)[0][name]
    counted = sum(confusion_matrix(label, data.label(id), 5) for id, label in labels.items())
    assert torch.equal(confusion, counted)
    files = [tmp_path / f"{id.replace('/', '_')}.png" for id in data.val]
    for id, file in zip(data.val, files, strict=True):
        Image.fromarray(data.image(id).permute(1, 2, 0).numpy()).save(file)
    options = {"predictor": name, "device": "cpu", "quiet": True}
    masks = predict(precise_run, files, tmp_path / "out", **options)
    pseudo_label(precise_run, tmp_path / "labels", files, threshold=0, **options)
    for mask, label in zip(masks, labels.values(), strict=True):
        assert torch.equal(read_label(mask, 5), label)
        assert torch.equal(read_label(tmp_path / "labels/masks" / mask.name, 5), label)


def test_a_vision_transformer_is_predicted_and_explored_at_any_size(tmp_path):
    """Its patch of 14 divides no padded side; 32 x 32 and 56 x 42 need no padding."""
    from mkd_core.explorer.study import Study

    keys = {"arch": "dpt", "encoder": DINOV2, "channels": 8, "crop": (28, 42), "steps": 1}
    run = trained(tiny.config(**keys), tmp_path)
    for k, (height, width) in enumerate(((1, 1), (33, 70), (32, 32), (56, 42), (75, 50))):
        image = read_image(picture(tmp_path / f"{k}.png", height, width, seed=k))
        confidence, label = expected(run, "net", image).max(0)
        found = label_of(run, image)
        assert torch.equal(found[0], label.byte()) and torch.equal(found[1], confidence)
        sliding, _ = label_of(run, image, "", "sliding")
        assert sliding.shape == label.shape
    study = Study(run, device="cpu")
    id = study.data.val[0]
    shown = study.predict(0, study.checkpoints(0)["last"], id)["net"]
    assert np.array_equal(shown.label, label_of(run, study.data.image(id))[0])
    assert len(np.unique(shown.label)) > 1 and study.views(0, id, 0)["CutMix"].shape == (28, 42, 3)


def labels_by(json_file, program, image):
    """What a stranger would do who has the two files: plain numpy and the JSON."""
    about = json.loads(json_file.read_text())
    x = (image.permute(1, 2, 0).numpy() / 255 - about["mean"]) / about["std"]
    x = torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None]
    return torch.export.load(program).module()(x).argmax(1)[0]


def test_large_images_are_predicted_in_pieces(run, monkeypatch, tmp_path, capsys):
    image = read_image(picture(tmp_path / "a.png", 96, 80))
    whole, sliding = (label_of(run, image, "", protocol)[0] for protocol in ("", "sliding"))
    blocks = torch.tensor([[0, 255, 0], [40, 120, 255], [255, 30, 90]], dtype=torch.uint8)
    blocks = blocks.repeat_interleave(32, 1)[:, None, :].repeat(1, 64, 1)
    label, _ = label_of(run, blocks, "", "long512")

    monkeypatch.setattr(evaluate, "LARGE", 60 * 90)
    monkeypatch.setattr("mkd_core.suite.predict.LARGE", 60 * 90)
    predict(run, [tmp_path / "a.png"], tmp_path / "out", device="cpu")
    assert capsys.readouterr().out.count("above 5,400 pixels are predicted in windows of (32, 32)") == 1
    assert torch.equal(label_of(run, image)[0], sliding) and not torch.equal(whole, sliding)
    scored = open_run(run, device="cpu").predictor()(image[None])["student 1"][0].argmax(0)
    assert torch.equal(scored, whole)  # a record's protocol is the one that it names
    reduced, confidence = label_of(run, blocks, "", "long512")
    assert reduced.shape == confidence.shape == (64, 96) and confidence.min() > 0 and confidence.max() <= 1
    same, *others = ((reduced == x).float().mean() for x in (label, label.flip(0), label.flip(1)))
    assert same > 0.9 > max(others)


def test_masks_lie_as_the_photo_is_seen_and_an_image_is_a_tensor_an_array_or_a_pil_picture(run, tmp_path):
    file = picture(tmp_path / "a.jpg", 40, 24, exif=turned(6))
    model = mkd_core.open_run(run).predictor()
    label, confidence = model.label(Image.open(file))
    assert label.shape == confidence.shape == (24, 40)  # upright
    image = read_image(picture(tmp_path / "a.png", 40, 24))
    assert all(map(torch.equal, model.label(image), model.label(image.permute(1, 2, 0).numpy())))
    bgr = image.permute(1, 2, 0).numpy()[..., ::-1]  # as OpenCV has it, and turned as its users do
    assert all(map(torch.equal, model.label(image), model.label(bgr[..., ::-1])))
    with pytest.raises(ValueError, match="16 or 32 bits"):
        model.label(Image.fromarray(np.full((8, 8), 300, np.uint16)))
    for wrong in (image.float() / 255, image.permute(1, 2, 0), np.zeros((8, 8), np.uint8)):
        with pytest.raises(ValueError, match="an image is uint8 RGB"):
            model.label(wrong)
    # A camera held upright stores rows as columns and says so in EXIF; viewers turn the photo, so its mask is turned too.
    upright = picture(tmp_path / "in/upright.png", 48, 32)
    sideways = Image.open(upright).transpose(Image.Transpose.ROTATE_90)
    sideways.save(tmp_path / "in/sideways.png", exif=turned(6))
    for mask in (masks := predict(run, [tmp_path / "in"], tmp_path / "out", quiet=True)):
        for kind in ("masks", "overlays", "confidence"):
            with Image.open(tmp_path / "out" / kind / mask.name) as made:
                assert made.size == (32, 48) and made.getexif().get(0x0112, 1) == 1
    assert masks[0].read_bytes() == masks[1].read_bytes()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("name", ["", "teacher 2", "mean"])
def test_masks_confidence_and_overlays_are_those_of_the_network_at_every_size(run, tmp_path, name):
    files = [picture(tmp_path / f"in/{h}x{w}.png", h, w, seed=h) for h, w in ((1, 1), (20, 33), (64, 48))]
    masks = predict(run, files, tmp_path / "out", predictor=name, quiet=True)
    assert [mask.name for mask in masks] == ["1x1.png", "20x33.png", "64x48.png"]
    for file, mask in zip(files, masks, strict=True):
        image, palette = read_image(file), open_dataset("shapes").palette
        confidence, label = expected(run, name or "student 1", image).max(0)
        assert torch.equal(read_label(mask, 5), label.byte())
        with Image.open(mask) as stored:
            assert stored.mode == "P" and stored.getpalette()[:15] == palette.ravel().tolist()
        stored = np.array(Image.open(tmp_path / "out/confidence" / mask.name))
        assert stored.dtype == np.uint8 and np.abs(stored / 255 - confidence.numpy()).max() <= 0.5001 / 255
        # none is called background
        mixed = 0.5 * image.permute(1, 2, 0).numpy() + 0.5 * palette[label.numpy()]
        assert np.abs(np.array(Image.open(tmp_path / "out/overlays" / mask.name)) - mixed).max() <= 0.5001


def test_names_keep_the_folders_that_tell_images_apart(run, tmp_path):
    a, b = (picture(tmp_path / f"in/{folder}/photo.jpg", 16, 16) for folder in ("a", "b/deep"))
    picture(tmp_path / "in/.hidden/c.png", 16, 16)
    out = tmp_path / "in/out"  # its files are no images of the next time
    names = {"a/photo.png", "b/deep/photo.png"}
    for images in ([tmp_path / "in"], [a, b], [b.parent, a, tmp_path / "in/a/../a"]):
        masks = predict(run, images, out, overwrite=True, quiet=True)
        assert {str(mask.relative_to(out / "masks")) for mask in masks} == names
    assert [m.name for m in predict(run, [a], tmp_path / "one", quiet=True)] == ["photo.png"]
    assert not list(out.rglob(".*"))


def test_links_are_followed_and_what_is_left_out_is_said(run, tmp_path, capsys):
    """Eight files of which one used to be predicted, and nothing was said."""
    folder = tmp_path / "in"
    picture(folder / "a.png", 16, 16)
    picture(folder / "b.jfif", 16, 16, format="JPEG")
    picture(folder / "c.gif", 16, 16, mode="P")
    picture(tmp_path / "elsewhere/d.JPG", 16, 16)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "e.png").symlink_to(tmp_path / "elsewhere/d.JPG")
    (folder / "linked/circle").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for other in ("f.heic", "notes.txt", "._a.png"):
        (folder / other).touch()
    masks = predict(run, [folder], tmp_path / "out")
    names = [str(mask.relative_to(tmp_path / "out/masks")) for mask in masks]
    assert names == ["a.png", "b.png", "c.png", "e.png", "linked/d.png"]
    said = capsys.readouterr().out
    assert all(f"files ({names})" in said for names in ("f.heic, notes.txt", "gone.png", "._a.png"))


def test_nothing_is_overwritten_unless_asked(run, tmp_path, capsys):
    file, out = picture(tmp_path / "in/a.png", 16, 16), tmp_path / "out"
    words = ["predict", str(run), "--out", str(out), str(file), "--device", "cpu"]
    assert main(words) == 0
    (out / "masks/a.png").unlink()
    (out / "overlays/a.png").write_text("mine")
    before = tree(tmp_path)
    assert main(words) == 2 and "2 files" in (said := capsys.readouterr().err) and "exist already" in said
    assert tree(tmp_path) == before
    assert main([*words, "--overwrite"]) == 0 and read_image(out / "overlays/a.png").shape == (3, 16, 16)
    # Not even then: an output that is an input.
    inside = picture(tmp_path / "data/masks/a.png", 16, 16)
    with pytest.raises(ValueError, match="would be overwritten"):
        predict(run, [inside], tmp_path / "data", overwrite=True, quiet=True)
    assert tree(tmp_path / "data").keys() == {inside.relative_to(tmp_path / "data")}


def rewrite(name, change):
    """A damage of a run: the content of one of its files changed."""

    def damage(run, images):
        (run / name).write_bytes(change((run / name).read_bytes()))

    return damage


def cut(run, images):
    for name in ("one", "two"):
        images.append(picture(images[0].with_name(f"{name}.jpg"), 64, 64))
        images[-1].write_bytes(images[-1].read_bytes()[:400])


def deep(run, images):
    images.append(tiny.save(images[0].with_name("deep.png"), np.zeros((8, 8), np.uint16)))


def empty(run, images):
    images.append(images[0].with_name("empty"))
    images[-1].mkdir()


FAULTS = {
    "no checkpoint": (lambda run, _: (run / "checkpoint.pt").unlink(), "there is no checkpoint"),
    "cut checkpoint": (rewrite("checkpoint.pt", lambda b: b[:5000]), "checkpoint.pt is damaged"),
    "text for a checkpoint": (rewrite("checkpoint.pt", lambda _: b"<html>"), "checkpoint.pt is damaged"),
    "half a config": (rewrite("config.json", lambda b: b[:100]), "config.json is damaged, or of another"),
    "no config": (lambda run, _: (run / "config.json").unlink(), "there is no run"),
    "16 bits": (deep, r"1 of 2 images .*cannot be read(.|\n)*deep.png: .*16 or 32 bits"),
    "cut images": (cut, r"2 of 3 images .*cannot be read(.|\n)*one.jpg(.|\n)*two.jpg"),
    "missing image": (lambda _, i: i.append(i[0].with_name("no.png")), "no.png: this picture is missing"),
    "empty folder": (empty, "empty: no picture"),
    "no images": (lambda _, images: images.clear(), "no images given"),
    "same name": (lambda _, i: i.append(picture(i[0].with_suffix(".jpg"), 16, 16)), "fine.jpg would both be"),
    "predictor=teacher1": (None, "there is no predictor 'teacher1'; did you mean 'teacher 1'.*mean"),
    "step=5": (None, "there is no checkpoint 'checkpoint-5.pt'; did you mean 'checkpoint-6.pt'"),
    "protocol=slide": (None, "there is no protocol 'slide'; did you mean 'sliding'"),
    "device=gpu": (None, "device must be auto, cpu, cuda"),
    "device=meta": (None, "device must be auto, cpu, cuda.*got 'meta'"),  # not: the checkpoint is damaged
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_before_anything_is_written(run, tmp_path, fault):
    damage, said = FAULTS[fault]
    copy, images = shutil.copytree(run, tmp_path / "run"), [picture(tmp_path / "in/fine.png", 16, 16)]
    if damage:
        damage(copy, images)
    with pytest.raises(ValueError, match=said):
        predict(copy, images, tmp_path / "out", quiet=True, **({} if damage else dict([fault.split("=")])))
    assert not (tmp_path / "out").exists()


def test_on_a_full_disk_nothing_is_half_written(run, tmp_path, capsys):
    files = [picture(tmp_path / "in/a.png", 16, 16), picture(tmp_path / "in/b.png", 160, 160)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        assert main(["predict", str(run), *map(str, files), "--out", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "too large" in capsys.readouterr().err
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len([path for path in found if path.name == "a.png"]) == 3
    assert not (tmp_path / "out/overlays/b.png").exists()
    for path in found:
        assert path.suffix == ".png" and read_image(path).shape[1] in (16, 160)
    with pytest.raises(OSError):  # a file where the folder should be
        predict(run, files, files[0] / "out", quiet=True)


def test_a_folder_run_needs_its_data_for_its_own_images_only(photo_run, photos, tmp_path):
    config = json.loads((photo_run / "config.json").read_text())
    copy = shutil.copytree(photo_run, tmp_path / "run")
    (copy / "config.json").write_text(json.dumps(config | {"root": str(tmp_path / "gone")}))
    (mask,) = predict(copy, [photos / "a/photo 1.png"], tmp_path / "out", quiet=True)
    with Image.open(mask) as stored:
        assert np.array_equal(np.reshape(stored.getpalette(), (256, 3)), colormap(256))
    (copy / "record.json").unlink()  # an unfinished run, copied from another machine
    assert open_run(copy).classes == open_run(photo_run).classes
    with pytest.raises(DataError, match="gone is not a folder"):
        pseudo_label(copy, tmp_path / "labels", quiet=True)


def test_pseudo_labels_of_generated_images_are_a_data_set(run, tmp_path, capsys):
    dataset = open_dataset("shapes", train_size=24, val_size=6, size=32)
    ids = load_split(dataset, "random/6", 0).unlabeled
    probs = [expected(run, "student 1", dataset.image(id)) for id in ids]
    threshold = float(torch.stack(probs).amax(1).median())
    before, out = tree(run.parent), tmp_path / "out"
    assert main(["pseudo-label", str(run), "--out", str(out), "--threshold", repr(threshold)]) == 0
    table = pseudo_label(run, tmp_path / "again", threshold=threshold, quiet=True)
    assert table.to_string(float_format="{:.1f}".format, na_rep="-") in capsys.readouterr().out
    assert tree(run.parent) == before

    made = open_dataset("folder", str(out), val="")
    assert made.classes == dataset.classes and len(made.train) == len(ids) == 18
    quality = PseudoLabelQuality(5, threshold)
    for k, id in enumerate(ids):
        confidence, label = probs[k].max(0)
        assert torch.equal(made.image(made.train[k]), dataset.image(id))
        assert torch.equal(made.label(made.train[k]), torch.where(confidence >= threshold, label, 255).byte())
        quality.update(probs[k][None], dataset.label(id)[None])
    summary = quality.summary()
    wanted = [100, summary["kept"], summary["accuracy"]]
    np.testing.assert_allclose(table.loc["all", ["share", "kept", "accuracy"]], wanted, atol=1e-3)
    for column, key in (("kept", "kept_per_class"), ("accuracy", "accuracy_per_class")):
        each = [np.nan if value is None else value for value in summary[key]]
        np.testing.assert_allclose(table[column][:-1], each, atol=1e-3)
    assert 0 < summary["kept"] < 100


def test_pseudo_labels_of_files_name_them_where_they_are(photo_run, photos, tmp_path):
    before = tree(photos)
    table = pseudo_label(photo_run, tmp_path / "out", threshold=0, quiet=True)
    assert tree(photos) == before and {p.suffix for p in tree(tmp_path / "out")} == {".png", ".txt", ".yaml"}
    source, made = open_dataset("folder", str(photos)), open_dataset("folder", str(tmp_path / "out"), val="")
    ids = load_split(source, "random/6", 0).unlabeled
    right = judged = 0
    for k, id in enumerate(ids):
        label = label_of(photo_run, source.image(id))[0]
        assert (made.root / made.train[k]).resolve() == photos / id
        assert torch.equal(made.label(made.train[k]), label)
        if source.has_label(id):
            right, judged = right + (label == source.label(id)).sum().item(), judged + label.numel()
    assert table["accuracy"]["all"] == pytest.approx(100 * right / judged)
    assert judged == 6 * 40 * 32 and len(ids) == 8
    # Others than the run's own; without truth there is no accuracy.
    table = pseudo_label(photo_run, tmp_path / "b", [photos / "b"], threshold=1, quiet=True)
    made = open_dataset("folder", str(tmp_path / "b"), val="")
    assert len(made.train) == 8 and all((made.label(id) == 255).all() for id in made.train)
    assert table["kept"]["all"] == 0 and table["accuracy"].isna().all()


@pytest.mark.parametrize("kind", ["generated", "files"])
def test_with_the_labeled_and_evaluated_images_it_is_complete_and_trains_from_anywhere(
    kind, run, photo_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    trained_run = run if kind == "generated" else photo_run
    options = {"threshold": 0.3, "with_labeled": True, "val": True, "device": "cpu"}
    pseudo_label(trained_run, "out", **options)
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    command = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(f"Next: mkd run .*10_run.ipynb -f {tmp_path}/out/train.yaml", command)
    config = RunConfig(**yaml.safe_load((tmp_path / "out/train.yaml").read_text()) | {"steps": 2})
    source = open_run(trained_run, device="cpu").config
    assert config.method == "supervised" and config.encoder == source.encoder and config.lr == source.lr
    dataset, *_ = runner.prepare(config, deep=True)
    own = open_dataset(source.dataset, source.root, **source.dataset_options)
    drawn = load_split(own, source.split, source.seed)
    labeled = load_split(dataset, "labeled")
    assert (len(labeled.labeled), len(labeled.unlabeled)) == (len(drawn.labeled), len(drawn.unlabeled))
    assert len(dataset.train) == len(own.train) and len(dataset.val) == len(own.val)
    for ids, new in ((drawn.labeled, dataset.train[: len(drawn.labeled)]), (own.val, dataset.val)):
        for id, other in zip(ids, new, strict=True):
            assert torch.equal(own.image(id), dataset.image(other))
            assert torch.equal(own.label(id), dataset.label(other))
    assert runner.run(config, tmp_path / "runs", quiet=True).miou >= 0


def test_what_trains_on_pseudo_labels_has_one_network(tmp_path):
    config = tiny.config("mkd", encoder2="mobilenet_v2")
    opened = SimpleNamespace(config=config, palette=np.zeros((2, 3), int), classes=["a", "b"])
    text = _texts(opened, tmp_path, {}, ([], [], []))[tmp_path / "train.yaml"]
    build_method(RunConfig(**yaml.safe_load(text)), 2)


def test_images_that_are_labeled_or_evaluated_are_not_labeled_again(photo_run, photos, tmp_path, capsys):
    options = {"with_labeled": True, "val": True, "device": "cpu"}
    both = [photos / "a", photos / "b"]
    table = pseudo_label(photo_run, tmp_path / "out", both, threshold=0.999, **options)
    made = open_dataset("folder", str(tmp_path / "out"))
    assert (len(made.train), len(made.val)) == (14, 2)
    assert table["kept"]["all"] < 1 and not check(made, load_split(made, "labeled")).problems
    said = capsys.readouterr().out
    assert "WARNING: under 1 %" in said and "no pixel is pseudo-labeled as" in said
    assert not re.search(r"\ball: trained", said)
    mask = photos / "masks/0.png"
    before, whole = tree(tmp_path / "out"), mask.read_bytes()
    message = r"photo 0.png: an image of \(40, 32\) pixels, its mask has \(7, 32\)"
    try:
        Image.fromarray(np.zeros((7, 32), np.uint8)).save(mask)
        with pytest.raises(DataError, match=message):
            pseudo_label(photo_run, tmp_path / "out", overwrite=True, **options)
    finally:
        mask.write_bytes(whole)
    assert tree(tmp_path / "out") == before  # what stood there still stands
    with pytest.raises(DataError, match="there is no image to label"):
        pseudo_label(photo_run, tmp_path / "none", [photos / "a/photo 0.png"], **options)
    with pytest.raises(ValueError, match="threshold must be in"):
        pseudo_label(photo_run, tmp_path / "none", threshold=95)
    assert not (tmp_path / "none").exists()


def test_an_export_is_checked_and_stands_beside_its_facts(run, tmp_path, capsys, monkeypatch):
    assert main(["export", str(run), "--out", str(tmp_path), "--predictor", "teacher 1"]) == 0
    program, about = tmp_path / "teacher_1.pt2", tmp_path / "teacher_1.json"
    assert str(program) in capsys.readouterr().out
    image = read_image(picture(tmp_path / "a.png", 32, 32))
    assert torch.equal(labels_by(about, program, image).byte(), label_of(run, image, "teacher 1")[0])
    facts, record = json.loads(about.read_text()), records.load(run)
    assert facts["run"] == run.name and facts["classes"] == record.classes and facts["split"] == record.split
    assert facts["miou"] == record.predictors["teacher 1"] and facts["licence_of_data"] == "not stated"
    with pytest.raises(ValueError, match="exist already"):
        export(run, tmp_path, predictor="teacher 1")
    with pytest.raises(ValueError, match="several networks"):
        export(run, tmp_path / "mean", predictor="mean")
    # The program of another network is not written.
    write, net = exporting._pt2, open_run(run, device="cpu").method.predictors["student 2"]
    monkeypatch.setattr(exporting, "_pt2", lambda _, x, shapes: write(net, x, shapes))
    with pytest.raises(ValueError, match="other logits"):
        export(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind, keys, least", [
    ("pt2", {"encoder": "resnet18"}, 32), ("onnx", {"encoder": "tu-test_resnet"}, 32),
    ("pt2", {"arch": "dpt", "encoder": DINOV2}, 64)], ids=str)  # fmt: skip
@torch.no_grad()
def test_exports_take_every_batch_and_size_where_the_network_can_be_traced(tmp_path, kind, keys, least):
    net = SegNet(4, channels=16, **keys).eval()
    if "arch" in keys:  # four of the twelve blocks, which are alike
        net.encoder.model.blocks, net.encoder.indices = net.encoder.model.blocks[:4], [0, 1, 2, 3]
    if kind == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession
        pytest.importorskip("onnxscript")
    content, sizes = exporting._program(getattr(exporting, f"_{kind}"), net, (48, 48))
    assert len(set(sizes)) > 2 and min(sizes) == (least, least)
    (tmp_path / "net").write_bytes(content)
    for shape in ((1, 3, least, least), (3, 3, 160, 64)):
        x = torch.randn(shape)
        if kind == "pt2":
            found = torch.export.load(tmp_path / "net").module()(x)
        else:
            found = torch.from_numpy(session(tmp_path / "net").run(["logits"], {"image": x.numpy()})[0])
        torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-5)
