"""Predictions, pseudo-labels and exports of trained runs: right for every size and mode of image, whole or absent, never over something else."""

import json
import os
import resource
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from mkd_core import evaluate, load_split, open_dataset, records, runner
from mkd_core.augment import normalise
from mkd_core.data import DataError, check
from mkd_core.data.base import colormap, read_image, read_label
from mkd_core.metrics import PseudoLabelQuality
from mkd_core.models import SegNet
from mkd_core.suite import export as exporting
from mkd_core.suite import predict as module
from mkd_core.suite.cli import main
from mkd_core.suite.export import export
from mkd_core.suite.predict import Predictor, predict, pseudo_label


def trained(config, runs):
    """The folder of a short run, its classifiers rescaled so that every class is predicted somewhere and no prediction is a tie."""
    runner.run(config, runs, quiet=True)
    folder = runs / config.id
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    dataset, method = open_dataset("shapes", size=32), runner.load_method(folder)
    x = normalise(torch.stack([dataset.image(id) for id in dataset.train[:16]]).float() / 255)
    with torch.no_grad():
        for net in (getattr(net, "module", net) for net in method.predictors.values()):
            spread, mean = torch.std_mean(net(x), (0, 2, 3))
            net.classifier.weight *= 2 / spread[:, None, None, None]
            net.classifier.bias.copy_((net.classifier.bias - mean) * 2 / spread)
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
    """A person's folder: 16 pictures 40 x 32 with masks in two folders, their names with spaces; the masks of two are not listed."""
    root = tmp_path_factory.mktemp("photos")
    shapes = open_dataset("shapes", train_size=16, val_size=2, size=48)
    lines = []
    for k, id in enumerate(shapes.train):
        image, mask = f"{'ab'[k % 2]}/photo {k // 2}.png", f"masks/{k}.png"
        for name, array in ((image, shapes.image(id).permute(1, 2, 0)), (mask, shapes.label(id))):
            (root / name).parent.mkdir(exist_ok=True)
            Image.fromarray(array[:40, :32].numpy()).save(root / name)
        lines.append(f"{image}\t{mask}" if k < 14 else image)
    (root / "classes.txt").write_text("\n".join(shapes.classes))
    (root / "train.txt").write_text("\n".join(lines[2:]))
    (root / "val.txt").write_text("\n".join(lines[:2]))
    return root


@pytest.fixture(scope="module")
def photo_run(photos, tmp_path_factory):
    config = tiny.config(dataset="folder", dataset_options={}, root=str(photos), split="random/6", steps=2)
    return trained(config, tmp_path_factory.mktemp("photo runs"))


def picture(path, height, width, seed=0, mode="RGB"):
    """A smooth random picture file; returns its path."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(run, name, image, protocol="whole"):
    nets = runner.load_method(run).predictors
    with torch.no_grad():
        x = normalise(image[None].float() / 255)
        found = {n: evaluate.probabilities(net, x, protocol, (32, 32))[0] for n, net in nets.items()}
    return sum(found.values()) / len(found) if name == "mean" else found[name]


@pytest.mark.parametrize("name", ["", "teacher 2", "mean"])
def test_masks_confidence_and_overlays_are_those_of_the_network_at_every_size(run, tmp_path, name):
    files = [picture(tmp_path / f"in/{h}x{w}.png", h, w, seed=h) for h, w in ((1, 1), (20, 33), (64, 48))]
    masks = predict(run, files, tmp_path / "out", predictor=name, quiet=True)
    assert [mask.name for mask in masks] == ["1x1.png", "20x33.png", "64x48.png"]
    for file, mask in zip(files, masks, strict=True):
        image = read_image(file)
        confidence, label = expected(run, name or "student 1", image).max(0)
        assert torch.equal(read_label(mask, 5), label.byte())
        with Image.open(mask) as stored:
            assert stored.mode == "P" and np.array_equal(np.reshape(stored.getpalette()[:15], (5, 3)), open_dataset("shapes").palette)
        stored = np.array(Image.open(tmp_path / "out/confidence" / mask.name))
        assert stored.dtype == np.uint8 and np.abs(stored / 255 - confidence.numpy()).max() <= 0.5001 / 255
        mixed = 0.5 * image.permute(1, 2, 0).numpy() + 0.5 * open_dataset("shapes").palette[label.numpy()]
        assert np.abs(np.array(Image.open(tmp_path / "out/overlays" / mask.name)) - mixed).max() <= 0.5001


@pytest.mark.parametrize("size", [(20, 20), (32, 40), (33, 70), (75, 33), (101, 64)])
@pytest.mark.parametrize("name", ["student 2", "mean"])
def test_bands_are_the_sliding_protocol(run, size, name):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    bands = list(Predictor(run, name, protocol="sliding")._bands(image))
    assert max(band.shape[2] for band in bands) <= 32
    torch.testing.assert_close(torch.cat(bands, 2)[0], expected(run, name, image, "sliding"))


def test_large_images_are_predicted_in_pieces_unless_whole_is_asked_for(run, monkeypatch, tmp_path):
    image = read_image(picture(tmp_path / "a.png", 96, 80))
    found = {protocol: Predictor(run, protocol=protocol)(image)[0] for protocol in ("", "whole", "sliding", "long512")}
    monkeypatch.setattr(module, "LARGE", 96 * 80 - 1)
    assert torch.equal(found[""], found["whole"]) and not torch.equal(found["whole"], found["sliding"])
    assert torch.equal(Predictor(run)(image)[0], found["sliding"])
    assert torch.equal(Predictor(run, protocol="whole")(image)[0], found["whole"])
    blocks = torch.tensor([[0, 255, 0], [40, 120, 255], [255, 30, 90]], dtype=torch.uint8).repeat_interleave(32, 1)
    blocks = blocks[:, None, :].repeat(1, 64, 1)
    label, confidence = Predictor(run, protocol="long512")(blocks)
    assert label.shape == confidence.shape == (64, 96) and confidence.min() > 0 and confidence.max() <= 1
    monkeypatch.setattr(module, "LARGE", 60 * 90)
    reduced, _ = Predictor(run, protocol="long512")(blocks)
    same, turned, mirrored = ((reduced == other).float().mean() for other in (label, label.flip(0), label.flip(1)))
    assert same > 0.9 > max(turned, mirrored)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_8_bit_picture_is_read(run, tmp_path, mode):
    file = picture(tmp_path / "in" / ("a.tif" if mode == "CMYK" else "a.png"), 32, 32, mode=mode)
    rgb = tmp_path / "rgb.png"
    Image.open(file).convert("RGB").save(rgb)
    (mask,), (same,) = (predict(run, [f], tmp_path / f.stem, quiet=True) for f in (file, rgb))
    assert mask.read_bytes() == same.read_bytes()


def test_names_keep_the_folders_that_tell_images_apart(run, tmp_path):
    a, b = (picture(tmp_path / f"in/{folder}/photo.jpg", 16, 16) for folder in ("a", "b/deep"))
    picture(tmp_path / "in/.hidden/c.png", 16, 16)
    (tmp_path / "in/notes.txt").touch()
    out = tmp_path / "in/out"  # lies below the folder that is predicted: its files are no images of the next time
    names = {"a/photo.png", "b/deep/photo.png"}
    for images in ([tmp_path / "in"], [a, b], [b.parent, a, tmp_path / "in/a/../a"]):
        masks = predict(run, images, out, overwrite=True, quiet=True)
        assert {str(mask.relative_to(out / "masks")) for mask in masks} == names
    assert [m.name for m in predict(run, [a], tmp_path / "one", quiet=True)] == ["photo.png"]
    assert not list(out.rglob(".*"))


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


def damage(case, run, tmp_path):
    """(run, images, options) with one fault."""
    images, options = [picture(tmp_path / "in/fine.png", 16, 16)], {}
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    checkpoint = copy / "checkpoint.pt"
    if case == "no checkpoint":
        checkpoint.unlink()
    elif case == "truncated checkpoint":
        checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    elif case == "other network":
        state = torch.load(checkpoint, weights_only=True)
        state["method"] = {key: value for key, value in state["method"].items() if "students.1" not in key}
        torch.save(state, checkpoint)
    elif case == "text for a checkpoint":
        checkpoint.write_text("<html>")
    elif case == "half a config":
        (copy / "config.json").write_text((copy / "config.json").read_text()[:100])
    elif case == "newer config":
        (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | {"later": 1}))
    elif case == "no config":
        (copy / "config.json").unlink()
    elif case == "16 bits":
        images.append(tmp_path / "in/deep.png")
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(images[-1])
    elif case == "truncated images":
        for name in ("one", "two"):
            images.append(picture(tmp_path / f"in/{name}.jpg", 64, 64))
            images[-1].write_bytes(images[-1].read_bytes()[:400])
    elif case == "missing image":
        images.append(tmp_path / "in/nowhere.png")
    elif case == "empty folder":
        images.append(tmp_path / "empty")
        images[-1].mkdir()
    elif case == "no images":
        images = []
    elif case == "same name":
        images.append(picture(tmp_path / "in/fine.jpg", 16, 16))
    else:
        options = {case.split()[0]: {"predictor": "teacher1", "step": 5, "protocol": "slide", "device": "gpu"}[case.split()[0]]}
    return copy, images, options


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no checkpoint", "there is no checkpoint .*the run has not come that far"),
        ("truncated checkpoint", "checkpoint.pt is damaged"),
        (
            "text for a checkpoint",
            r"checkpoint.pt is damaged, .*\(\w+\); delete it, and record.json where there is one, and the run starts anew$",
        ),
        ("half a config", "config.json is damaged, or of another version"),
        ("newer config", "config.json is damaged, or of another version of the suite: there is no RunConfig key 'later'"),
        ("other network", "checkpoint.pt does not fit config.json"),
        ("no config", "there is no run"),
        ("16 bits", r"1 of 2 images cannot be read(.|\n)*deep.png: .*16 or 32 bits"),
        ("truncated images", r"2 of 3 images cannot be read(.|\n)*one.jpg(.|\n)*two.jpg"),
        ("missing image", "nowhere.png: this picture is missing"),
        ("empty folder", "empty: no picture"),
        ("no images", "no images given"),
        ("same name", "fine.png and .*fine.jpg would both be written as fine.png"),
        ("predictor unknown", "there is no predictor 'teacher1'; did you mean 'teacher 1'.*mean"),
        ("step not kept", "there is no checkpoint 'checkpoint-5.pt'; did you mean 'checkpoint-6.pt'"),
        ("protocol unknown", "there is no protocol 'slide'; did you mean 'sliding'"),
        ("device unknown", "device must be auto, cpu, cuda"),
    ],
)
def test_faults_are_named_before_anything_is_written(run, tmp_path, case, said):
    copy, images, options = damage(case, run, tmp_path)
    with pytest.raises(ValueError, match=said):
        predict(copy, images, tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(run, tmp_path):
    """Whoever believed that would delete it."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoint.pt").unlink()
    (copy / "checkpoint.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        predict(copy, [picture(tmp_path / "a.png", 16, 16)], tmp_path / "out", quiet=True)


def test_a_run_is_found_by_its_id_and_a_kept_step_by_its_number(run, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", run.parent)
    assert Predictor(run.name, step=6).folder == Predictor(run.name, step="best").folder == run
    assert Predictor(run.name, step="best").checkpoint == "checkpoint-best.pt"
    with pytest.raises(ValueError, match=f"did you mean {run.name!r}"):
        Predictor(run.name[:-1])


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
    assert len([path for path in found if path.name == "a.png"]) == 3 and not (tmp_path / "out/overlays/b.png").exists()
    for path in found:
        assert path.suffix == ".png" and read_image(path).shape[1] in (16, 160)
    # A file where the folder should be.
    with pytest.raises(OSError):
        predict(run, files, files[0] / "out", quiet=True)
    assert len(tree(tmp_path / "in")) == 2


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
    np.testing.assert_allclose(table.loc["all", ["share", "kept", "accuracy"]], [100, summary["kept"], summary["accuracy"]], atol=1e-3)
    for column, key in (("kept", "kept_per_class"), ("accuracy", "accuracy_per_class")):
        np.testing.assert_allclose(table[column][:-1], [np.nan if v is None else v for v in summary[key]], atol=1e-3)
    assert 0 < summary["kept"] < 100
    assert check(made, load_split(made, "full")).problems == ("the val list is empty",)


def test_pseudo_labels_of_files_name_them_where_they_are(photo_run, photos, tmp_path):
    before = tree(photos)
    table = pseudo_label(photo_run, tmp_path / "out", threshold=0, quiet=True)
    assert tree(photos) == before and {p.suffix for p in tree(tmp_path / "out")} == {".png", ".txt"}
    source, made = open_dataset("folder", str(photos)), open_dataset("folder", str(tmp_path / "out"), val="")
    ids = load_split(source, "random/6", 0).unlabeled
    labels = evaluate.segment(next(iter(runner.load_method(photo_run).predictors.values())), source, ids)
    right = judged = 0
    for k, id in enumerate(ids):
        assert (made.root / made.train[k]).resolve() == photos / id
        assert torch.equal(made.label(made.train[k]), labels[k])
        if source.has_label(id):
            right, judged = right + (labels[k] == source.label(id)).sum().item(), judged + labels[k].numel()
    assert table["accuracy"]["all"] == pytest.approx(100 * right / judged) and judged == 6 * 40 * 32 and len(ids) == 8
    # Others than the run's own; without truth there is no accuracy.
    table = pseudo_label(photo_run, tmp_path / "b", [photos / "b"], threshold=1, quiet=True)
    made = open_dataset("folder", str(tmp_path / "b"), val="")
    assert len(made.train) == 8 and all((made.label(id) == 255).all() for id in made.train)
    assert table["kept"]["all"] == 0 and table["accuracy"].isna().all()


def test_a_folder_run_needs_its_data_for_its_own_images_only(photo_run, photos, tmp_path):
    config = json.loads((photo_run / "config.json").read_text())
    copy = tmp_path / "run"
    shutil.copytree(photo_run, copy)
    (copy / "config.json").write_text(json.dumps(config | {"root": str(tmp_path / "gone")}))
    (mask,) = predict(copy, [photos / "a/photo 1.png"], tmp_path / "out", quiet=True)
    with Image.open(mask) as stored:
        assert np.array_equal(np.reshape(stored.getpalette(), (256, 3)), colormap(256))
    with pytest.raises(DataError, match="gone is not a folder"):
        pseudo_label(copy, tmp_path / "labels", quiet=True)


def test_pseudo_label_refuses_what_it_cannot_do(run, tmp_path):
    file = picture(tmp_path / "in/a\tb.png", 16, 16)
    other = picture(tmp_path / os.fsdecode(b"in/caf\xe9.png"), 16, 16)
    for options, said in (
        ({"threshold": 95}, "threshold must be in"), ({"images": [file]}, r"a\\tb.png.*tab"), ({"images": [other]}, r"udce9.png.*not UTF-8")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            pseudo_label(run, tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def labels_by(json_file, program, image):
    """What a stranger would do who has the two files: plain numpy and the JSON."""
    about = json.loads(json_file.read_text())
    x = (image.permute(1, 2, 0).numpy() / 255 - about["mean"]) / about["std"]
    return torch.export.load(program).module()(torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None]).argmax(1)[0]


def test_an_export_gives_the_labels_that_predict_gives(run, tmp_path, capsys, monkeypatch):
    assert main(["export", str(run), "--out", str(tmp_path), "--predictor", "teacher 1"]) == 0
    program, about = tmp_path / "teacher_1.pt2", tmp_path / "teacher_1.json"
    assert str(program) in capsys.readouterr().out
    image = read_image(picture(tmp_path / "a.png", 32, 32))
    assert torch.equal(labels_by(about, program, image).byte(), Predictor(run, "teacher 1")(image)[0])
    assert json.loads(about.read_text())["classes"] == list(open_dataset("shapes").classes)
    with pytest.raises(ValueError, match="exist already"):
        export(run, tmp_path, predictor="teacher 1")
    with pytest.raises(ValueError, match="several networks"):
        export(run, tmp_path / "mean", predictor="mean")
    # The program of another network is not written.
    content = program.read_bytes()
    monkeypatch.setattr(exporting, "_program", lambda net, crop: (content, [crop, crop]))
    with pytest.raises(ValueError, match="other labels"):
        export(run, tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_exports_take_every_batch_and_size_where_the_network_can_be_traced(tmp_path):
    net = SegNet(4, encoder="resnet18", channels=16).eval()
    content, sizes = exporting._program(net, (48, 48))
    assert len(sizes) > 2
    (tmp_path / "net.pt2").write_bytes(content)
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for shape in ((1, 3, 32, 32), (3, 3, 160, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(loaded(x), net(x))
    with pytest.raises((RuntimeError, AssertionError)):
        loaded(torch.randn(1, 3, 40, 64))
