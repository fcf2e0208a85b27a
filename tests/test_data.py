"""Data sets in their real layouts, label maps against independent tables, and every way in which files can be wrong."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mkd_core.choices import check_options, choose
from mkd_core.data import DATASETS, DataError, Split, check, load_split, open_dataset
from mkd_core.data.base import IGNORE, colormap, read_image, read_label
from mkd_core.data.cityscapes import TRAIN_ID
from mkd_core.data.coco import CLASS_OF, decode_rle, fill_polygon, render_masks
from mkd_core.data.voc import download


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(array, np.uint8))
    (picture.convert(mode) if mode else picture).save(path)


def grey(value, height=4, width=6):
    return np.full((height, width), value, np.uint8)


@pytest.fixture
def voc(shared, tmp_path):
    """A writable copy of three VOC photos in the devkit's layout."""
    return shutil.copytree(shared / "data/fixtures/voc_labelme", tmp_path / "VOCdevkit/VOC2012", copy_function=shutil.copyfile)


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


# ---- names


def test_unknown_names_are_guessed_and_listed():
    with pytest.raises(ValueError, match=r"no data set 'VOC-aug'; did you mean 'voc_aug'\? There are: shapes, folder, voc, voc_aug"):
        open_dataset("VOC-aug")
    with pytest.raises(ValueError, match=r"data set 'folder' has no option 'clases'; did you mean 'classes'\? It has: classes, palette"):
        open_dataset("folder", ".", clases=3)
    with pytest.raises(ValueError, match=r"no colour 'qqq'. There are: red"):
        choose("colour", "qqq", ["red"])
    with pytest.raises(ValueError, match="mkd needs the option 'beta'. It has: beta, alpha"):
        check_options("mkd", lambda build, beta, alpha=1: None, {"alpha": 1}, skip=["build"])
    assert choose("colour", "red", {"red": 0}) == "red"


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "shapes"])
def test_a_missing_root_says_what_belongs_there(name, tmp_path):
    options = {"classes": 3} if name == "folder" else {}
    for root, message in (("", "needs root, the folder that holds"), (str(tmp_path / "nowhere"), "nowhere is not a folder")):
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(name, root, **options)
        assert DATASETS[name].where in str(caught.value)


# ---- reading pictures


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
    with pytest.raises(DataError, match=r"deep.png: I;16 pictures .* convert to 8 bits"):
        read_image(tmp_path / "deep.png")


def test_a_decompression_bomb_is_a_data_error(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", grey(0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(DataError, match="bomb.png: not a readable mask"):
        read_label(tmp_path / "bomb.png")


def test_damaged_pictures_are_data_errors_wherever_they_are_cut(shared, tmp_path):
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


def test_masks_are_indices_never_colours(tmp_path, shared):
    indices = np.array([[0, 1, 20, 255]], np.uint8)
    palette = Image.fromarray(indices)
    palette.putpalette(colormap(256).tobytes())
    palette.save(tmp_path / "palette.png")
    assert read_label(tmp_path / "palette.png", 21).tolist() == indices.tolist()
    assert read_label(shared / "data/fixtures/mmseg_tests/seg.png").unique().tolist() == [0, 1]
    palette.convert("RGB").save(tmp_path / "rgb.png")
    with pytest.raises(DataError, match="rgb.png: a mask must be a grey or palette PNG of class indices, this one has mode RGB"):
        read_label(tmp_path / "rgb.png")
    with pytest.raises(DataError, match=r"palette.png: label values 20 outside 0..19 and 255 \(1 pixels\)"):
        read_label(tmp_path / "palette.png", 20)


# ---- VOC


def test_voc_photos(shared):
    data = open_dataset("voc", str(shared / "data/fixtures/voc_labelme"))
    assert data.train == ("2011_000003", "2011_000006") and data.val == ("2011_000025",)
    names = (shared / "data/fixtures/voc_labelme/class_names.txt").read_text().split("\n")[1:21]
    assert [name.replace(" ", "").replace("/", "") for name in names] == list(data.classes[1:])
    assert data.image("2011_000003").shape == (3, 338, 500) and data.label("2011_000003").shape == (338, 500)
    assert {data.classes[c] for c in data.label("2011_000025").unique().tolist() if c != IGNORE} >= {"background", "bus", "car"}
    with Image.open(shared / "data/fixtures/voc_labelme/SegmentationClass/2011_000003.png") as mask:
        assert np.array_equal(np.reshape(mask.getpalette(), (-1, 3))[:21], data.palette)
    assert data.palette[15].tolist() == [192, 128, 128] and data.palette[20].tolist() == [0, 64, 128]


def test_voc_is_found_from_the_folders_above(voc):
    assert open_dataset("voc", str(voc)).root == open_dataset("voc", str(voc.parent)).root == open_dataset("voc", str(voc.parents[1])).root


def test_voc_mask_rule(voc, mirror):
    own, aug = voc / "SegmentationClass", voc / "SegmentationClassAug"
    extra = "2008_000002"  # in train_aug, not annotated by VOC 2012 itself
    listed, preferring = open_dataset("voc_aug", str(voc)), open_dataset("voc_aug", str(voc), prefer_aug_masks=True)
    assert len(listed.train) == 10582 and extra in listed.train and listed.val == ("2011_000025",)

    def folder(data, id):
        return data.files(id)[1].parent.name

    # (c) no augmented mask for this id: VOC's own serves
    assert folder(listed, "2011_000003") == folder(preferring, "2011_000003") == "SegmentationClass"
    # (a) both exist
    save(aug / "2011_000003.png", grey(0))
    assert folder(listed, "2011_000003") == "SegmentationClass" and folder(preferring, "2011_000003") == "SegmentationClassAug"
    # nothing yet: expected among the augmented masks
    assert folder(listed, extra) == "SegmentationClassAug" and not listed.has_label(extra)
    # (b) everything in SegmentationClass
    save(own / f"{extra}.png", grey(0))
    assert folder(listed, extra) == folder(preferring, extra) == "SegmentationClass"
    save(aug / f"{extra}.png", grey(0))
    assert folder(listed, extra) == "SegmentationClassAug"


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
    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", lambda *args, **kwargs: asked.append((args, kwargs)))
    with pytest.raises(ValueError, match="no data set to download 'coco'"):
        download("coco", str(tmp_path))
    with pytest.raises(DataError, match="needs root"):
        download("voc", "")
    assert asked == []
    download("voc_aug", str(tmp_path))
    assert asked == [((str(tmp_path),), {"year": "2012", "image_set": "trainval", "download": True})]


# ---- Cityscapes

# cityscapesScripts, helpers/labels.py: id -> trainId
OFFICIAL = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16,
            32: 17, 33: 18}  # fmt: skip


def test_cityscapes_remap():
    assert TRAIN_ID.tolist() == [OFFICIAL.get(id, 255) for id in range(256)]


def test_cityscapes_layout_with_and_without_train_ids(shared, tmp_path):
    data = open_dataset("cityscapes", str(shared / "data/fixtures/cityscapes_layout_from_camvid"))
    assert len(data.train) == 6 and len(data.val) == 3 and len(data.classes) == 19
    root = shutil.copytree(shared / "data/fixtures/cityscapes_layout_from_camvid", tmp_path / "city")
    for path in root.rglob("*_labelTrainIds.png"):
        path.unlink()
    raw = open_dataset("cityscapes", str(root))
    for id in data.train + data.val:
        assert data.files(id)[1].name.endswith("labelTrainIds.png") and raw.files(id)[1].name.endswith("labelIds.png")
        assert torch.equal(data.label(id), raw.label(id)) and data.label(id).shape == data.image(id).shape[1:]
    assert torch.cat([data.label(id).unique() for id in data.train]).unique().tolist() != [IGNORE]
    with pytest.raises(DataError, match=r"2975 training images of 'cityscapes'.*has 6, without 186 labeled images \(aachen_"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MKD_SPLITS", str(shared / "splits"))
            load_split(data, "cps/1_16")


# ---- COCO


def test_coco_categories(shared):
    table = json.loads((shared / "data/fixtures/coco_panoptic/classes81.json").read_text())["contiguous_id_to_coco"]
    assert {category: index for index, category, _ in table} == CLASS_OF
    data = open_dataset("coco", str(shared / "data/fixtures/coco_panoptic"))
    assert [name for _, _, name in table] == list(data.classes[1:]) and data.classes[0] == "background"
    assert data.train == () and data.val == ("000000142238", "000000439180")
    assert all(data.label(id).shape == data.image(id).shape[1:] for id in data.val)
    with pytest.raises(DataError, match="no training images under .*train2017.zip"):
        load_split(data, "full")


def run_lengths(mask):
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *ends, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + lengths}


def test_coco_masks_rendered_from_real_segments(shared, tmp_path):
    root = shared / "data/fixtures/coco_panoptic"
    panoptic = json.loads((root / "annotations/panoptic_val2017.json").read_text())
    annotations = []
    for each in panoptic["annotations"]:
        rgb = np.array(Image.open(root / "annotations/panoptic_val2017" / each["file_name"]).convert("RGB")).astype(int)
        ids = rgb @ [1, 256, 65536]
        for segment in each["segments_info"]:
            if segment["category_id"] <= 90:  # things; stuff has no instances
                annotations.append(segment | {"image_id": each["image_id"], "segmentation": run_lengths(ids == segment["id"])})
    assert any(each["iscrowd"] for each in annotations)
    images = [image for image in panoptic["images"] if image["id"] in (142238, 439180)]
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    calls = []
    assert render_masks(tmp_path / "instances.json", tmp_path / "masks", lambda *call: calls.append(call)) == 2
    for image in images:
        name = f"{image['id']:012d}.png"
        assert torch.equal(read_label(tmp_path / "masks" / name, 81), read_label(root / "masks" / name, 81))
    assert calls == [(1, 2), (2, 2)] and sorted(os.listdir(tmp_path / "masks")) == ["000000142238.png", "000000439180.png"]
    assert render_masks(tmp_path / "instances.json", tmp_path / "masks") == 0


def test_coco_order_of_painting(tmp_path):
    def box(id, category, x0, x1, crowd=0):
        return {"id": id, "image_id": 1, "category_id": category, "iscrowd": crowd, "area": 4 * (x1 - x0),
                "segmentation": [[x0, 0, x1, 0, x1, 4, x0, 4]]}  # fmt: skip

    objects = [box(1, 90, 4, 6), box(2, 1, 0, 10), box(3, 2, 8, 14, crowd=1)]
    images = [{"id": 1, "height": 4, "width": 16}, {"id": 2, "height": 2, "width": 2}]
    (tmp_path / "i.json").write_text(json.dumps({"images": images, "annotations": objects}))
    render_masks(tmp_path / "i.json", tmp_path)
    assert read_label(tmp_path / "000000000001.png")[2].tolist() == [1] * 4 + [80] * 2 + [1] * 2 + [255] * 6 + [0] * 2
    assert read_label(tmp_path / "000000000002.png").tolist() == [[0, 0], [0, 0]]


def test_coco_run_lengths():
    mask = np.zeros((40, 60), bool)
    mask[5:30, 7:50] = True
    mask[10:12, 20:22] = False
    mask[35:, 55:] = True
    # pycocotools 2.0: mask.encode
    text = r"m8i0?000000000000000000000000\OC==CC==7000000000000000000000000000000000000000000000000000000V7\O^I0000000"
    assert np.array_equal(decode_rle({"size": [40, 60], "counts": text}), mask)
    assert np.array_equal(decode_rle(run_lengths(mask)), mask)
    with pytest.raises(DataError, match="add up to 5, not to 2 x 3"):
        decode_rle({"size": [2, 3], "counts": [1, 4]})


def test_coco_polygons():
    def inside(x, y, corners):  # crossings to the right of a point, one point at a time
        pairs = zip(corners, corners[1:] + corners[:1], strict=True)
        return sum((b > y) != (d > y) and x < a + (y - b) / (d - b) * (c - a) for (a, b), (c, d) in pairs) % 2 == 1

    rng = np.random.default_rng(0)
    for _ in range(20):
        polygon = rng.uniform(-3, 23, 2 * rng.integers(3, 9)).round(2)
        corners = [tuple(corner) for corner in polygon.reshape(-1, 2).tolist()]
        slow = [[inside(x + 0.5, y + 0.5, corners) for x in range(20)] for y in range(15)]
        assert fill_polygon(polygon.tolist(), 15, 20).tolist() == slow


# ---- folder


def test_folder_reads_street_scenes(shared):
    names = ["sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car", "pedestrian", "bicyclist"]
    data = open_dataset("folder", str(shared / "data/camvid"), classes=names, val="test.txt")
    assert (len(data.train), len(data.val)) == (367, 233) and data.classes == tuple(names)
    split = load_split(data, "splits/1_16/seed0")
    assert (len(split.labeled), len(split.unlabeled)) == (23, 344)
    assert data.image(split.labeled[0]).shape == (3, 360, 480) and data.has_label(split.unlabeled[0])
    report = check(data, load_split(data, "full"))
    assert report.problems == ()
    # percent of the pixels of the training set, from the README of the data
    documented = [16.85, 23.26, 0.98, 31.66, 4.49, 9.72, 1.17, 1.13, 5.87, 0.64, 0.29, 3.95]
    assert list(report.shares.values()) == pytest.approx(documented, abs=0.006)


def test_folder_line_syntax(own):
    save(own / "my photo.png", np.dstack([grey(9)] * 3))
    save(own / "my mask.png", grey(1))
    lines = ["\ufeffa.png a_.png", "./b.png\tb_.png", "my photo.png my mask.png", "u.png", "", "far/x.png far/x_.png"]
    (own / "train.txt").write_bytes("\r\n".join(lines).encode())
    data = open_dataset("folder", str(own))
    assert data.train == ("a.png", "b.png", "my photo.png", "u.png", "far/x.png") and data.classes == ("sky", "road", "car")
    assert data.label("my photo.png").unique().tolist() == [1]
    assert [data.has_label(id) for id in data.train] == [True, True, True, False, False]
    assert data.files("far/x.png") == (own / "far/x.png", own / "far/x_.png") and data.files("u.png") == (own / "u.png", None)
    with pytest.raises(DataError, match="u.png has no mask"):
        data.label("u.png")
    (own / "train.txt").write_text("my photo.png\tmy mask.png\nmy photo two.png m.png\n")
    with pytest.raises(DataError, match=r"train.txt, line 2: expected 'image mask' or 'image'.* by a tab"):
        open_dataset("folder", str(own))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, "2 to 255 different names"),
        ({"classes": ["a", "a"]}, "2 to 255 different names"),
        ({"classes": "sky"}, "option .classes."),
        ({"palette": [[0, 0, 0]]}, "palette must hold 3 colours"),
        ({"palette": [[0, 0, 256]] * 3}, "palette must hold 3 colours"),
        ({"val": "nothing.txt"}, "nothing.txt: not a readable text file"),
        ({"val": "train.txt"}, "images without mask, first u.png"),
    ],
)
def test_folder_options_that_are_wrong(own, options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", str(own), **options)


def test_folder_wants_to_know_its_classes(own):
    (own / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"Give classes=\[names\], classes=<number>, or one name per line in .*classes.txt"):
        open_dataset("folder", str(own))
    assert open_dataset("folder", str(own), classes=3).classes == ("class 0", "class 1", "class 2")


# ---- check


def test_check_of_sound_data(own):
    save(own / "v_.png", grey(1))  # not labeled: no part of the shares
    data = open_dataset("folder", str(own))
    calls = []
    report = check(data, load_split(data, "full"), progress=lambda *call: calls.append(call))
    report.raise_if_bad()
    assert "no problems found" in str(report) and calls == [(k, 4) for k in range(1, 5)]
    assert report.shares == pytest.approx({"sky": 50, "road": 100 / 6, "car": 100 / 6, "ignored": 100 / 6})
    assert check(data, load_split(data, "full"), deep=False).shares == {}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])  # into the pixels: less would only cut the closing chunk


DAMAGE = {
    "no image": (lambda root: (root / "b.png").unlink(), r"1 images \(.*b.png\) missing. train.txt and val.txt", True),
    "no mask": (lambda root: (root / "v_.png").unlink(), r"1 masks \(.*v_.png\) missing", True),
    "cut image": (lambda root: truncate(root / "u.png"), "1 faulty files:\n  .*u.png: not a readable picture", False),
    "cut mask": (lambda root: truncate(root / "a_.png"), "1 faulty files:\n  .*a_.png: not a readable mask", False),
    "colour mask": (lambda root: save(root / "a_.png", np.dstack([grey(0)] * 3)), "a_.png: a mask must be .* mode RGB", False),
    "other size": (lambda root: save(root / "b_.png", grey(0, 6, 4)), r"b.png: the image has \(4, 6\) pixels, its mask \(6, 4\)", False),
    "class 3 of 3": (lambda root: save(root / "v_.png", grey(3)), r"v_.png: label values 3 outside 0..2 and 255 \(24 pixels\)", False),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_check_finds_damage(own, kind):
    damage, message, shallow = DAMAGE[kind]
    damage(own)
    data = open_dataset("folder", str(own))
    split = load_split(data, "full")
    report = check(data, split)
    assert len(report.problems) == 1 and "PROBLEM" in str(report)
    with pytest.raises(DataError, match=message):
        report.raise_if_bad()
    assert bool(check(data, split, deep=False).problems) == shallow


def test_check_counts_and_names_the_first_five(own):
    lines = [f"n{k}.png n{k}_.png" for k in range(7)]
    (own / "train.txt").write_text("\n".join(lines))
    data = open_dataset("folder", str(own))
    problems = check(data, load_split(data, "full")).problems
    first = ", ".join(str(own / f"n{k}.png") for k in range(5))
    assert problems[0].startswith(f"7 images ({first}, ...) missing. ") and problems[1].startswith("7 masks (")
    for k in range(7):
        save(own / f"n{k}.png", grey(0))
        save(own / f"n{k}_.png", grey(7))
    lines = check(data, load_split(data, "full")).problems[0].split("\n  ")
    assert lines[0] == "7 faulty files:" and [line[: len(str(own)) + 3] for line in lines[1:]] == [f"{own}/n{k}" for k in range(5)] + [
        "..."
    ]


def test_check_of_lists(own):
    data = open_dataset("folder", str(own))
    bad = Split("mine", ("a.png", "v.png", "a.png"), ("a.png", "u.png"), "", "")
    assert check(data, bad, deep=False).problems == (
        "1 labeled images (a.png) listed more than once",
        "1 images (a.png) both labeled and unlabeled",
        "1 images (v.png) of the validation set in training",
    )
    assert check(data, Split("mine", (), ("u.png",), "", ""), deep=False).problems == ("the labeled list is empty",)


def test_one_picture_under_two_names_is_found(own):
    (own / "linked.png").symlink_to(own / "v.png")
    data = open_dataset("folder", str(own))
    problems = check(data, Split("mine", ("linked.png",), ("u.png",), "", ""), deep=False).problems
    assert "1 images (linked.png) of the validation set in training" in problems
    around = Split("mine", (f"../{own.name}/v.png",), ("u.png",), "", "")
    assert "of the validation set in training" in " ".join(check(data, around, deep=False).problems)
    (own / "val.txt").write_text(f"{own / 'v.png'} v_mask.png")
    with pytest.raises(DataError, match="val.txt, line 1: .*v.png is absolute; names are relative to"):
        open_dataset("folder", str(own))


def test_check_of_generated_data():
    data = open_dataset("shapes", train_size=4, val_size=2)
    report = check(data, load_split(data, "full"))
    assert report.problems == () and sum(report.shares.values()) == pytest.approx(100)
    assert data.files(data.train[0]) == (None, None)


def test_masks_without_two_classes_and_validation_masks_without_any_are_problems(own):
    dataset = open_dataset("folder", own)
    split = load_split(dataset, "full")
    assert not check(dataset, split).problems
    save(own / "v_.png", [[255] * 6] * 4)
    assert "nothing to evaluate" in "".join(check(dataset, split).problems)
    for name in ("a", "b"):  # the usual export of a binary mask: 0 and 255
        save(own / f"{name}_.png", [[0, 0, 255, 255, 0, 0]] * 4)
    (problem, _) = check(dataset, split).problems
    assert "1 of 3 classes" in problem and "255 means ignored" in problem
