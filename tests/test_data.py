"""Data sets in their real layouts, label maps against independent tables, and every way in which files can be wrong."""

import errno
import json
import os
import shutil
import struct
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import config, save

from mkd_core.data import DATASETS, DataError, Split, base, check, load_split, open_dataset
from mkd_core.data.base import IGNORE, colormap, read_image, read_label
from mkd_core.data.cityscapes import TRAIN_ID
from mkd_core.data.coco import CLASSES, render_masks
from mkd_core.data.voc import download
from mkd_core.prepare import prepare
from mkd_core.runner import run


def grey(value, height=4, width=6):
    return np.full((height, width), value, np.uint8)


@pytest.fixture
def voc(shared, tmp_path):
    """A writable copy of three VOC photos in the devkit's layout."""
    source, target = shared / "data/fixtures/voc_labelme", tmp_path / "VOCdevkit/VOC2012"
    return shutil.copytree(source, target, copy_function=shutil.copyfile)


@pytest.fixture
def own(tmp_path):
    """Two labeled, one unlabeled and one validation image of three classes."""
    for name in ("a", "b", "v"):
        save(tmp_path / f"{name}.png", np.dstack([grey(9)] * 3))
        save(tmp_path / f"{name}_.png", [[0, 1, 2, 255, 0, 0]] * 4)
    save(tmp_path / "u.png", np.dstack([grey(9)] * 3))
    (tmp_path / "train.txt").write_text("a.png a_.png\nb.png b_.png\nu.png\n")
    (tmp_path / "val.txt").write_text("v.png v_.png\n")
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    return tmp_path


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "shapes"])
def test_a_missing_root_says_what_belongs_there(name, tmp_path):
    options = {"classes": 3} if name == "folder" else {}
    nowhere = str(tmp_path / "nowhere")
    for root, message in (("", "needs root, the folder that holds"), (nowhere, "nowhere is not a folder")):
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(name, root, **options)
        assert DATASETS[name].where in str(caught.value)


def test_pictures_of_every_kind_become_rgb(tmp_path, shared):
    ramp = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    for mode in ("L", "RGB", "RGBA", "LA", "P", "CMYK"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.fromarray(ramp).convert("RGB" if mode in ("P", "CMYK") else mode).convert(mode).save(path)
        image = read_image(path)
        assert image.shape == (3, 4, 6) and image.dtype == torch.uint8
        if mode != "P":  # a palette is quantised
            assert torch.equal(image, torch.from_numpy(ramp).expand(3, -1, -1))
    assert read_image(shared / "data/fixtures/mmseg_tests/gray.jpg").shape == (3, 288, 512)
    Image.fromarray(ramp.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep.png: I;16 pictures have 16 .* convert to 8"):
        read_image(tmp_path / "deep.png")


def test_damaged_pictures_are_data_errors_wherever_they_are_cut(shared, tmp_path, monkeypatch):
    for source, read in (
        (shared / "data/fixtures/voc_labelme/SegmentationClass/2011_000003.png", read_label),
        (shared / "data/fixtures/mmseg_tests/pseudo_dataset/imgs/00000_img.jpg", read_image),
    ):
        content = source.read_bytes()
        cut = tmp_path / source.name
        for length in [*range(0, 120, 7), *range(120, len(content) - 16, max(1, len(content) // 20))]:
            cut.write_bytes(content[:length])
            with pytest.raises(DataError, match=f"{source.name}: not a readable"):
                read(cut)
    with pytest.raises(DataError, match="nothing.png: this mask is missing"):
        read_label(tmp_path / "nothing.png")
    save(tmp_path / "bomb.png", grey(0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(DataError, match="bomb.png: not a readable mask"):
        read_label(tmp_path / "bomb.png")


def test_masks_are_indices_never_colours(tmp_path, shared):
    indices = np.array([[0, 1, 20, 255]], np.uint8)
    palette = Image.fromarray(indices)
    palette.putpalette(colormap(256).tobytes())
    palette.save(tmp_path / "palette.png")
    assert read_label(tmp_path / "palette.png", 21).tolist() == indices.tolist()
    assert read_label(shared / "data/fixtures/mmseg_tests/seg.png").unique().tolist() == [0, 1]


def test_voc_photos(shared):
    data = open_dataset("voc", str(shared / "data/fixtures/voc_labelme"))
    assert data.train == ("2011_000003", "2011_000006") and data.val == ("2011_000025",)
    names = (shared / "data/fixtures/voc_labelme/class_names.txt").read_text().split("\n")[1:21]
    assert [name.replace(" ", "").replace("/", "") for name in names] == list(data.classes[1:])
    assert data.image("2011_000003").shape == (3, 338, 500) and data.label("2011_000003").shape == (338, 500)
    held = {data.classes[c] for c in data.label("2011_000025").unique().tolist() if c != IGNORE}
    assert held >= {"background", "bus", "car"}
    with Image.open(shared / "data/fixtures/voc_labelme/SegmentationClass/2011_000003.png") as mask:
        assert np.array_equal(np.reshape(mask.getpalette(), (-1, 3))[:21], data.palette)
    assert data.palette[15].tolist() == [192, 128, 128] and data.palette[20].tolist() == [0, 64, 128]


def test_voc_is_found_from_the_folders_above(voc):
    assert {open_dataset("voc", str(place)).root for place in (voc, voc.parent, voc.parents[1])} == {voc}


def test_voc_mask_rule(voc, mirror):
    own, aug = voc / "SegmentationClass", voc / "SegmentationClassAug"
    extra = "2008_000002"  # in train_aug, not annotated by VOC 2012 itself
    listed, preferring = (open_dataset("voc_aug", str(voc), prefer_aug_masks=p) for p in (False, True))
    assert len(listed.train) == 10582 and extra in listed.train and listed.val == ("2011_000025",)

    def folders(id):
        return [data.files(id)[1].parent for data in (listed, preferring)]

    assert folders("2011_000003") == [own, own]  # (c) no augmented mask for this id: VOC's own serves
    save(aug / "2011_000003.png", grey(0))
    save(aug / "2011_000025.png", grey(0))
    assert folders("2011_000003") == [own, aug]  # (a) both exist
    assert folders("2011_000025") == [own, own]  # of val VOC's own
    assert folders(extra) == [aug, aug] and not listed.has_label(extra)  # nothing yet: expected there
    save(own / f"{extra}.png", grey(0))
    assert folders(extra) == [own, own]  # (b) everything in SegmentationClass
    save(aug / f"{extra}.png", grey(0))
    assert folders(extra) == [aug, aug]


def test_voc_lists_come_with_the_package_where_the_devkit_has_none(voc, mirror):
    shutil.rmtree(voc / "ImageSets")
    data = open_dataset("voc", str(voc))
    assert len(data.train) == 1464 and len(data.val) == 1449 and not set(data.train) & set(data.val)
    split = load_split(data, "classic/92")
    assert (len(split.labeled), len(split.unlabeled)) == (92, 1372)
    report = check(data, split, deep=False)
    assert "1464, the published set" in str(report) and "1449, the published set" in str(report)
    # all but the three photos, which are unlabeled here; masks are asked for where they are needed: 92 + 1449
    assert report.problems[0].startswith("2910 images (") and report.problems[1].startswith("1541 masks (")


def test_voc_download_is_torchvisions(monkeypatch, tmp_path):
    asked = []
    seen = lambda *args, **kwargs: asked.append((args, kwargs))  # noqa: E731
    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", seen)
    with pytest.raises(ValueError, match="no data set to download 'coco'"):
        download("coco", str(tmp_path))
    with pytest.raises(DataError, match="needs root"):
        download("voc", "")
    assert asked == []
    download("voc_aug", str(tmp_path))
    assert asked == [((str(tmp_path),), {"year": "2012", "image_set": "trainval", "download": True})]
    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", mock.Mock(side_effect=OSError("no network")))
    with pytest.raises(DataError, match=r"no network: fetch it by other means.*VOCtrainval"):
        download("voc", str(tmp_path))


# ---- Cityscapes

# cityscapesScripts, helpers/labels.py: id -> trainId
OFFICIAL = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16,
            32: 17, 33: 18}  # fmt: skip


def test_cityscapes_layout_with_and_without_train_ids(shared, mirror, tmp_path):
    data = open_dataset("cityscapes", str(shared / "data/fixtures/cityscapes_layout_from_camvid"))
    assert len(data.train) == 6 and len(data.val) == 3 and len(data.classes) == 19
    root = shutil.copytree(shared / "data/fixtures/cityscapes_layout_from_camvid", tmp_path / "city")
    for path in root.rglob("*_labelTrainIds.png"):
        path.unlink()
    raw = open_dataset("cityscapes", str(root))
    for id in data.train + data.val:
        assert data.files(id)[1].name == f"{id}_gtFine_labelTrainIds.png"
        assert raw.files(id)[1].name == f"{id}_gtFine_labelIds.png"
        assert torch.equal(data.label(id), raw.label(id)) and data.label(id).shape == data.image(id).shape[1:]
    assert torch.cat([data.label(id).unique() for id in data.train]).unique().tolist() != [IGNORE]
    message = r"2975 training images of 'cityscapes'.*has 6, without 186 labeled images \(aachen_"
    with pytest.raises(DataError, match=message):
        load_split(data, "cps/1_16")
    assert TRAIN_ID.tolist() == [OFFICIAL.get(id, 255) for id in range(256)]


def test_coco_categories(shared):
    table = json.loads((shared / "data/fixtures/coco_panoptic/classes81.json").read_text())
    data = open_dataset("coco", str(shared / "data/fixtures/coco_panoptic"))
    official = [name for _, _, name in table["contiguous_id_to_coco"]]
    assert ["background", *official] == list(data.classes)
    assert data.train == () and data.val == ("000000142238", "000000439180")
    assert all(data.label(id).shape == data.image(id).shape[1:] for id in data.val)
    with pytest.raises(DataError, match="no training images under .*train2017.zip"):
        load_split(data, "full")


def test_coco_masks_rendered_from_real_segments(shared, tmp_path):
    root = shared / "data/fixtures/coco_panoptic"
    panoptic = json.loads((root / "annotations/panoptic_val2017.json").read_text())
    annotations = []
    for each in panoptic["annotations"]:
        picture = Image.open(root / "annotations/panoptic_val2017" / each["file_name"]).convert("RGB")
        ids = np.array(picture).astype(int) @ [1, 256, 65536]
        for segment in each["segments_info"]:
            if segment["category_id"] <= 90:  # things; stuff has no instances
                lengths = run_lengths(ids == segment["id"])
                annotations.append(segment | {"image_id": each["image_id"], "segmentation": lengths})
    assert any(each["iscrowd"] for each in annotations)
    images = [image for image in panoptic["images"] if image["id"] in (142238, 439180)]
    assert render(tmp_path, annotations, images) == 2
    for image in images:
        name = f"{image['id']:012d}.png"
        assert torch.equal(read_label(tmp_path / "masks" / name, 81), read_label(root / "masks" / name, 81))
    assert sorted(os.listdir(tmp_path / "masks")) == ["000000142238.png", "000000439180.png"]
    assert render(tmp_path, annotations, images) == 0


def run_lengths(mask):
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *ends, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + lengths}


# the official ids are 1..90 without ten
OFFICIAL_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


ONE, OFFICIAL_NAMES = {"id": 1, "height": 4, "width": 16}, zip(OFFICIAL_IDS, CLASSES[1:], strict=True)
CATEGORIES = [{"id": id, "name": name} for id, name in OFFICIAL_NAMES]


def render(folder, annotations, images=(ONE,), categories=CATEGORIES):
    """render_masks of a file with these contents, into folder/masks."""
    content = {"images": [*images], "annotations": annotations, "categories": categories}
    (folder / "i.json").write_text(json.dumps(content))
    return render_masks(folder / "i.json", folder / "masks")


def box(x0, x1, **keys):
    """An annotation of image 1, rows 0..3, columns x0 .. x1 - 1."""
    return {"image_id": 1, "category_id": 1, "segmentation": [[x0, 0, x1, 0, x1, 4, x0, 4]]} | keys


CRACKS = [{"id": 1, "name": "crack"}, {"id": 2, "name": "pothole"}]


@pytest.mark.parametrize("annotations, row", [
        # small ones on top of large ones, crowds are 255; area and order decide
        ([box(4, 6, id=1, category_id=90, area=8), box(0, 10, id=2, area=40), box(8, 14, id=3, category_id=2, area=24, iscrowd=1)],
         [1] * 4 + [80] * 2 + [1] * 2 + [255] * 6 + [0] * 2),
        # without id, area and iscrowd: nothing is a crowd, the area is measured
        ([box(4, 6, category_id=90), box(0, 10)], [1] * 4 + [80] * 2 + [1] * 4 + [0] * 6),
        # no outline: all that the box may hold is unknown
        ([box(0, 2, segmentation=[], bbox=[2.5, 0, 3, 4])], [0] * 2 + [255] * 4 + [0] * 10),
        ([box(0, 2, segmentation=[[0, 0, 16, 4]], bbox=[14, 0, 2, 4])], [0] * 14 + [255] * 2),
        ([box(0, 2, segmentation={"size": [4, 16], "counts": [8, 4, 52]})], [0] * 2 + [1] + [0] * 13)])  # fmt: skip
def test_coco_rule_of_painting(tmp_path, annotations, row):
    assert render(tmp_path, annotations) == 1
    assert read_label(tmp_path / "masks/000000000001.png")[2].tolist() == row
    # Categories are told by name.
    renamed = [dict(each, id=each["id"] + 100) for each in CATEGORIES]
    annotations = [dict(each, category_id=each["category_id"] + 100) for each in annotations]
    (tmp_path / "again").mkdir()
    render(tmp_path / "again", annotations, categories=renamed)
    assert read_label(tmp_path / "again/masks/000000000001.png")[2].tolist() == row


@pytest.mark.parametrize(("annotation", "keys", "message"), [
    (box(0, 4), {"categories": CRACKS}, r"i.json: 2 categories \(crack, pothole\) not of COCO's 80; .* data set 'folder'"),
    (box(0, 4), {"images": [{"id": 1, "height": 4}]}, "i.json: there is no 'width'; an instances_.* is needed"),
    ({"image_id": 1, "segments_info": []}, {}, "i.json: there is no 'category_id'"),
    ({"id": 7, "category_id": 1, "segmentation": []}, {}, "there is no 'image_id'"),
    (box(0, 4, id=7, category_id=12), {}, "there is no 12; an instances"),
    (box(0, 4, id=7, segmentation=[]), {}, r"image 1, annotation 7: no readable outline or box \(KeyError\('bbox'\)"),
    (box(0, 4, id=7, segmentation={"size": [2, 3], "counts": [1, 5]}), {}, "annotation 7: .*add up to 4 x 16 pixels"),
    (box(0, 4, id=7, segmentation={"size": [4, 16], "counts": "48"}), {}, "annotation 7: .*add up to 4 x 16 pixels"),
])  # fmt: skip
def test_coco_files_that_cannot_be_rendered(tmp_path, annotation, keys, message):
    with pytest.raises(DataError, match=message):
        render(tmp_path, [annotation], **keys)


def test_folder_reads_street_scenes(shared):
    names = ["sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car", "pedestrian",
             "bicyclist"]  # fmt: skip
    data = open_dataset("folder", str(shared / "data/camvid"), classes=names, val="test.txt")
    assert (len(data.train), len(data.val)) == (367, 233) and data.classes == tuple(names)
    split = load_split(data, "splits/1_16/seed0")
    assert (len(split.labeled), len(split.unlabeled)) == (23, 344)
    assert data.image(split.labeled[0]).shape == (3, 360, 480) and data.has_label(split.unlabeled[0])
    report = check(data, load_split(data, "full"))
    assert report.problems == []
    # percent of the pixels of the training set, from the README of the data
    documented = [16.85, 23.26, 0.98, 31.66, 4.49, 9.72, 1.17, 1.13, 5.87, 0.64, 0.29, 3.95]
    assert list(report.shares["labeled"].values()) == pytest.approx(documented, abs=0.006)


def test_folder_line_syntax(own):
    save(own / "my photo.png", np.dstack([grey(9)] * 3))
    save(own / "my mask.png", grey(1))
    lines = ["\ufeffa.png a_.png", "./b.png\tb_.png", "my photo.png my mask.png"]
    lines += ["u.png", "", "far/x.png far/x_.png"]
    (own / "train.txt").write_bytes("\r\n".join(lines).encode())
    data = open_dataset("folder", str(own))
    assert data.train == ("a.png", "b.png", "my photo.png", "u.png", "far/x.png")
    assert data.classes == ("sky", "road", "car")
    assert data.label("my photo.png").unique().tolist() == [1]
    assert [data.has_label(id) for id in data.train] == [True, True, True, False, False]
    assert data.files("far/x.png") == (own / "far/x.png", own / "far/x_.png")
    assert data.files("u.png") == (own / "u.png", None)
    with pytest.raises(DataError, match="u.png has no mask"):
        data.label("u.png")
    (own / "train.txt").write_text("my photo.png\tmy mask.png\nmy photo two.png m.png\n")
    with pytest.raises(DataError, match=r"train.txt, line 2: expected 'image mask' or 'image'.* by a tab"):
        open_dataset("folder", str(own))


@pytest.mark.parametrize(("options", "message"), [
    ({"classes": 1}, "2 to 255 different names"), ({"classes": ["a", "a"]}, "2 to 255 different names"),
    ({"classes": "sky"}, ".classes"), ({"palette": [[0, 0, 0]]}, "palette must hold 3 colours"),
    ({"palette": [[0, 0, 256]] * 3}, "palette must hold 3 colours"),
    ({"val": "nothing.txt"}, "nothing.txt is missing"),
    ({"val": "train.txt"}, "evaluated images need a mask, u.png has none")])  # fmt: skip
def test_folder_options_that_are_wrong(own, options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", str(own), **options)


def test_check_of_sound_data(own):
    save(own / "v_.png", [[0, 0, 0, 0, 0, 1]] * 4)
    data = open_dataset("folder", str(own))
    calls = []
    report = check(data, load_split(data, "full"), progress=lambda *call: calls.append(call))
    report.raise_if_bad()
    assert "no problems found" in str(report) and calls == [(k, 4) for k in range(1, 5)]
    assert "1 classes (car) in no mask of the validation set: how well they" in "".join(report.warnings)
    sixths = {"labeled": [3, 1, 1, 1], "val": [5, 1, 0, 0]}
    for part, (sky, road, car, ignored) in sixths.items():
        shares = {"sky": sky, "road": road, "car": car, "ignored": ignored}
        assert report.shares[part] == pytest.approx({name: 100 * n / 6 for name, n in shares.items()})
    assert "labeled     val" in str(report) and "road                16.67   16.67" in str(report)
    assert check(data, load_split(data, "full"), deep=False).shares == {}
    shapes = open_dataset("shapes", train_size=4, val_size=8)
    report = check(shapes, load_split(shapes, "full"))
    assert report.problems == report.warnings == [] and shapes.files(shapes.train[0]) == (None, None)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])  # into the pixels: less would only cut the closing chunk


RGB = np.dstack([grey(0)] * 3)


@pytest.mark.parametrize(("file", "damage", "message"), [
    ("b.png", os.unlink, r"1 images \(.*b.png\) missing. train.txt and val.txt"),
    ("v_.png", os.unlink, r"1 masks \(.*v_.png\) missing"),
    ("u.png", truncate, "1 faulty files:\n  .*u.png: not a readable picture"),
    ("a_.png", truncate, "1 faulty files:\n  .*a_.png: not a readable mask"),
    ("a_.png", lambda path: save(path, RGB), "a_.png: a mask is a grey or palette PNG .* not of mode RGB"),
    ("b_.png", lambda path: save(path, grey(0, 6, 4)), r"b.png: the image has \(4, 6\) pixels, its mask \(6, 4\)"),
    ("v_.png", lambda path: save(path, grey(3)), r"v_.png: label values 3 \(24 pixels\) outside 0..2 and 255"),
])  # fmt: skip
def test_check_finds_damage(own, file, damage, message):
    damage(own / file)
    data = open_dataset("folder", str(own))
    split = load_split(data, "full")
    report = check(data, split)
    assert len(report.problems) == 1 and "PROBLEM" in str(report)
    with pytest.raises(DataError, match=message):
        report.raise_if_bad()
    assert bool(check(data, split, deep=False).problems) == (damage is os.unlink)


def test_check_counts_and_names_the_first_five(own):
    lines = [f"n{k}.png n{k}_.png" for k in range(7)]
    (own / "train.txt").write_text("\n".join(lines))
    data = open_dataset("folder", str(own))
    problems = check(data, load_split(data, "full")).problems
    first = ", ".join(str(own / f"n{k}.png") for k in range(5))
    assert problems[0].startswith(f"7 images ({first}, ...) missing. ") and problems[1][:9] == "7 masks ("
    for k in range(7):
        save(own / f"n{k}.png", grey(0))
        save(own / f"n{k}_.png", grey(7))
    lines = check(data, load_split(data, "full")).problems[0].split("\n  ")
    assert lines[0] == "7 faulty files:"
    assert [line[: len(f"{own}/n0")] for line in lines[1:]] == [f"{own}/n{k}" for k in range(5)] + ["..."]


def test_check_of_lists_and_of_one_picture_under_two_names(own):
    data = open_dataset("folder", str(own))
    bad = Split("mine", ("a.png", "v.png", "a.png"), ("a.png", "u.png"), "", "")
    assert check(data, bad, deep=False).problems == [
        "1 labeled images (a.png) listed more than once",
        "1 images (a.png) both labeled and unlabeled",
        "1 images (v.png) of the validation set in training",
    ]
    none = check(data, Split("mine", (), ("u.png",), "", ""), deep=False)
    assert none.problems == ["the labeled list is empty"]
    only = check(data, Split("mine", ("a.png",), (), "", ""))  # enough for supervised training
    assert (only.problems, only.warnings) == ([], ["the unlabeled list is empty"])
    assert "WARNING: the unlabeled" in str(only)
    (own / "linked.png").symlink_to(own / "v.png")
    data = open_dataset("folder", str(own))
    problems = check(data, Split("mine", ("linked.png",), ("u.png",), "", ""), deep=False).problems
    assert "1 images (linked.png) of the validation set in training" in problems
    around = Split("mine", (f"../{own.name}/v.png",), ("u.png",), "", "")
    assert "of the validation set in training" in " ".join(check(data, around, deep=False).problems)
    photo(own / "v.png", size=(4, 6))
    shutil.copy(own / "v.png", own / "copy.png")
    (own / "train.txt").write_text("a.png a_.png\nb.png b_.png\ncopy.png\n")
    assert examine(own)[0] == "1 photos (copy.png = v.png) both in training and in the validation set"
    (own / "val.txt").write_text(f"{own / 'v.png'} v_mask.png")
    with pytest.raises(DataError, match="val.txt, line 1: .*v.png is absolute; names are relative to"):
        open_dataset("folder", str(own))


def examine(own):
    """What is wrong, and what is told, of a folder's data."""
    data = open_dataset("folder", own)
    report = check(data, load_split(data, "full"))
    return " ".join(report.problems), " ".join(report.warnings)


def test_both_parts_need_two_classes(own):
    """The usual export of a binary mask is 0 and 255, and 255 is what nothing is learned or evaluated on."""
    assert examine(own) == ("", "")
    binary = [[0, 0, 255, 255, 0, 0]] * 4
    save(own / "v_.png", binary)
    hint = "255 means ignored: an object needs a class value of its own, 1 for example."
    problem, _ = examine(own)
    assert f"the val masks hold 1 of 3 classes, at least 2 are needed. {hint}" in problem
    for name in ("a", "b"):
        save(own / f"{name}_.png", binary)
    assert all(f"the {part} masks hold 1 of 3" in examine(own)[0] for part in ("labeled", "val"))
    save(own / "v_.png", grey(255))
    assert "the val masks hold 0 of 3" in examine(own)[0]
    save(own / "v_.png", [[0, 1, 255, 255, 255, 255], *[[255] * 6] * 3])
    assert "92 % of the pixels of the val masks are ignored (255)" in examine(own)[1]


def test_classes_without_a_labeled_pixel_are_told(own):
    for name in ("a", "b"):
        save(own / f"{name}_.png", [[0, 0, 0, 1, 1, 1]] * 4)
    told = "1 classes (car) of the validation set in no labeled mask: they cannot be learned"
    assert examine(own) == ("", told)
    for name in ("a", "b", "v"):  # values from 1
        save(own / f"{name}_.png", [[1, 1, 1, 2, 2, 2]] * 4)
    problem, warning = examine(own)
    assert not problem and "1 classes (sky) in no mask: do the labels start from 1" in warning


@pytest.mark.parametrize("lines, message", [
    ("# three classes\nsky\n\nroad\n# and\ncar\n", ""), ("__ignore__\nsky\nroad\ncar\n", ""),
    ("sky\n__ignore__\nroad\n", "'__ignore__' is no class name"), ("id,name\nsky\n", "'id,name' is no class name"),
    ("name\nsky\nroad\n", "'name' is no class name; give the names alone"), ("0: sky\n1: road\n", "'0: sky' is no class"),
    ("sky:0,0,0::\nroad:9,9,9::\n", "'sky:0,0,0::' is no class name")])  # fmt: skip
def test_lines_of_a_class_list_that_are_no_class(own, lines, message):
    (own / "classes.txt").write_text(lines)
    if message:
        with pytest.raises(DataError, match=f"classes.txt: {message}"):
            open_dataset("folder", own)
    else:
        assert open_dataset("folder", own).classes == ("sky", "road", "car")


def photo(path, orientation=1, seed=0, size=(8, 6)):
    """A random JPEG or PNG of `size` (height, width) pixels as stored, with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


def test_pictures_are_read_as_they_are_seen(tmp_path):
    stored = photo(tmp_path / "plain.png")
    turned = {1: stored, 3: stored[::-1, ::-1], 6: np.rot90(stored, -1), 8: np.rot90(stored)}
    for orientation, seen in turned.items():
        photo(tmp_path / "turned.png", orientation)
        assert np.array_equal(read_image(tmp_path / "turned.png").permute(1, 2, 0), seen)
    Image.fromarray(grey(1)).save(tmp_path / "mask.png", exif=Image.open(tmp_path / "turned.png").getexif())
    with pytest.raises(DataError, match="mask.png: a mask with EXIF orientation 8; save it upright"):
        read_label(tmp_path / "mask.png")


def test_check_tells_of_turned_photos(own):
    for name in ("a", "u"):
        photo(own / f"{name}.png", 3, seed=ord(name), size=(4, 6))
    told = "2 images (a.png, u.png) turned by EXIF orientation when read: are the masks upright too?"
    assert examine(own) == ("", told)
    photo(own / "a.jpg", 6, size=(4, 6))
    (own / "train.txt").write_text("a.jpg a_.png\nb.png b_.png\nu.png\n")
    message = "a.jpg: the image has (6, 4) pixels (its EXIF orientation is applied, so the mask must be upright too), its mask (4, 6)"
    assert message in examine(own)[0]


def png(path, bits, rows):
    """A grey PNG of `bits` a pixel, which PIL does not write: rows of bytes as they are packed."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 8 * len(rows[0]) // bits, len(rows), bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize("bits, row, indices", [
    (1, [0b01100001], [0, 1, 1, 0, 0, 0, 0, 1]), (2, [0b00011011], [0, 1, 2, 3]), (4, [0x01, 0x2F], [0, 1, 2, 15])])  # fmt: skip
def test_grey_of_few_bits_holds_indices(tmp_path, bits, row, indices):
    png(tmp_path / "mask.png", bits, [row, row])
    assert read_label(tmp_path / "mask.png").tolist() == [indices, indices]


@pytest.mark.parametrize(("name", "options", "message"), [
    ("mask.jpg", {}, "a lossless PNG, TIFF or BMP; this JPEG may change classes"),
    ("mask.webp", {}, "WEBP may change classes"),
    ("mask.webp", {"lossless": True}, "WEBP may change classes"),
    ("mask.tif", {"compression": "jpeg"}, "TIFF may change classes"),
    ("mask.tif", {"save_all": True, "append_images": [Image.new("L", (6, 4))] * 5}, "6 pages or frames in one file"),
    ("mask.gif", {}, "GIF may change classes"),
    ("mask.gif", {"save_all": True, "append_images": [Image.new("L", (6, 4), 9)]}, "2 pages or frames in one file"),
    ("mask.tif", {}, ""), ("mask.bmp", {}, "")])  # fmt: skip
def test_the_kind_of_file_a_mask_may_be(tmp_path, name, options, message):
    Image.fromarray(grey(2)).save(tmp_path / name, **options)
    if message:
        with pytest.raises(DataError, match=f"{name}: .*{message}"):
            read_label(tmp_path / name)
    else:
        assert read_label(tmp_path / name).tolist() == grey(2).tolist()
    if "pages" in message:
        with pytest.raises(DataError, match=message):
            read_image(tmp_path / name)


def test_palettes_that_disagree_are_told(own):
    """A program that shrinks PNGs may re-order a palette: the picture looks the same, the indices are others."""

    def palette(name, indices, colours):
        mask = Image.fromarray(np.asarray([indices] * 4, np.uint8))
        mask.putpalette(np.ravel(colours).tolist())
        mask.save(own / f"{name}_.png")

    red, green, blue = [255, 0, 0], [0, 255, 0], [0, 0, 255]
    for name in ("a", "v"):
        palette(name, [0, 1, 2, 2, 0, 0], [red, green, blue])
    palette("b", [0, 1, 0, 0, 0, 0], [red, green])  # fewer colours, none another
    assert examine(own) == ("", "")
    palette("b", [2, 1, 0, 0, 2, 2], [blue, green, red])
    problem, warning = examine(own)
    assert not problem and "1 masks (b.png) whose palettes have other colours for the same class" in warning


def test_names_match_whatever_their_unicode_form(own):
    """A Mac writes "é" as two characters; lists and archives have one."""
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    for line, disk in ((composed, decomposed), (decomposed, composed), (decomposed, decomposed)):
        shutil.copy(own / "u.png", own / disk)
        (own / "train.txt").write_text(f"a.png a_.png\nb.png b_.png\n{line}\n", encoding="utf-8")
        data = open_dataset("folder", own)
        assert data.train[2] == composed and data.image(composed).shape == (3, 4, 6)
        assert examine(own) == ("", "")
        (own / disk).unlink()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_any_encoding(own, encoding):
    (own / "train.txt").write_text("a.png a_.png\r\nu.png\r\n", encoding=encoding)
    assert open_dataset("folder", own).train == ("a.png", "u.png")


@pytest.mark.parametrize("line", [
    "c", "c.png,c_.png", "c.png;c_.png", "my photo.png", "c\\d.png", '"c.png" "c_.png"'])  # fmt: skip
def test_a_line_of_another_form_is_a_missing_image(own, line):
    (own / "train.txt").write_text(f"a.png a_.png\n{line}\n")
    problem, _ = examine(own)
    assert "1 images (" in problem and "one 'image mask' pair per line, parted by a space or a tab" in problem


def city(root, *names):
    for name in names:
        path = root / "leftImg8bit" / f"{name}_leftImg8bit.png"
        save(path, np.dstack([grey(9)] * 3))
        save(root / "gtFine" / f"{name}_gtFine_labelIds.png", grey(7))


def test_a_city_may_have_any_name(tmp_path):
    """As in IDD, whose ids are numbers, or with an underscore: a file is where it was found."""
    city(tmp_path, "train/0/005506", "train/new_york/new_york_000000_000019", "val/9/100000")
    data = open_dataset("cityscapes", tmp_path)
    assert data.train == ("005506", "new_york_000000_000019") and data.val == ("100000",)
    for id in data.train + data.val:
        assert data.image(id).shape == (3, 4, 6) and data.label(id).unique().tolist() == [0]
    (tmp_path / "few").mkdir()
    (tmp_path / "few/labeled.txt").write_text("leftImg8bit/train/0/005506_leftImg8bit.png gtFine/x.png\r\n")
    split = load_split(data, "few")
    assert (split.labeled, split.unlabeled) == (data.train[:1], data.train[1:])
    city(tmp_path, "train/1/005506")
    with pytest.raises(DataError, match="two images are called 005506, in train/[01] and train/[01]"):
        open_dataset("cityscapes", tmp_path)


# ---- decoded files that are kept


def test_a_run_with_a_cache_is_the_run_without_and_reads_no_file_again(own, tmp_path, monkeypatch):
    """Losses and mIoU are equal bit for bit; from the second run on nothing is decoded; a changed file is."""
    rng = np.random.default_rng(0)
    for name in "abuv":
        save(own / f"{name}.png", rng.integers(0, 255, (40, 60, 3)))
        save(own / f"{name}_.png", rng.integers(0, 3, (40, 60)))
    save(own / "a_.png", np.where(rng.random((40, 60)) < 0.1, 255, rng.integers(0, 3, (40, 60))))
    (own / "s").mkdir()
    (own / "s/labeled.txt").write_text("a.png\nb.png\n")
    (own / "s/unlabeled.txt").write_text("u.png\n")
    keys = {"dataset": "folder", "dataset_options": {}, "root": str(own), "split": "s", "norm": "group"}
    plain, kept = config("mean_teacher", batch=1, **keys), own / "decoded/here"
    cached = plain.model_copy(update={"cache": str(kept)})
    first, again = (run(c, tmp_path / name, quiet=True) for c, name in ((plain, "plain"), (cached, "cached")))
    assert first.id == again.id and first.confusion == again.confusion and first.miou == again.miou
    rows = [(tmp_path / name / first.id / "history.jsonl").read_text() for name in ("plain", "cached")]
    losses = [[json.loads(row).get("loss") for row in text.splitlines()] for text in rows]
    assert losses[0] == losses[1] and None not in losses[0]
    found = sorted(path.name for path in kept.iterdir())
    assert len(found) == 4 + 3  # pictures and masks, the withheld one too, where quality is measured

    def decoding(*_):
        raise AssertionError("decoded again")

    dataset, *_ = prepare(cached)
    monkeypatch.setattr(base, "read_turned", decoding)
    monkeypatch.setattr(base, "open_mask", decoding)
    assert torch.equal(dataset.label("a.png"), base.FileDataset.label(dataset, "a.png"))
    image = dataset.image("a.png")
    image[:] = 0  # a view of the file that does not write to it
    assert dataset.image("a.png").any()
    save(own / "a.png", np.zeros((40, 60, 3), np.uint8))
    with pytest.raises(AssertionError, match="decoded again"):
        dataset.image("a.png")


def test_a_cache_that_cannot_be_is_refused(own, monkeypatch):
    with pytest.raises(ValueError, match="shapes has none"):
        prepare(config(cache=str(own / "cache")))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(base, "write_atomically", mock.Mock(side_effect=full))
    with pytest.raises(OSError, match=r"cache=.* cannot take a\.png: No space left"):
        base.decoded(own / "a.png", read_image, own)
