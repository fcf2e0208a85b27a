"""A person's folder made a data set: layouts, what masks mean, draws, originals untouched, and what is trained on it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_predict import tree
from tiny import save

import mkd_core
from mkd_core import load_split, models, open_dataset, records
from mkd_core.data import DataError
from mkd_core.data.layouts import find_pairs
from mkd_core.data.masks import read_table, understand
from mkd_core.metrics import confusion_matrix, miou
from mkd_core.suite import batch
from mkd_core.suite.cli import main
from mkd_core.suite.own_images import prepare_folder
from mkd_core.train import build_net

COLOURS = np.array([(9, 9, 9), (200, 30, 30), (30, 200, 30)], np.uint8)


def truth(k, size=(48, 40)):
    """Three classes in every mask, in places that k moves."""
    label = np.zeros(size, np.uint8)
    label[4 + k % 8 : 20 + k % 8, 5:20] = 1
    label[25:40, 10 + k % 8 : 30] = 2
    return label


def photo(k, size=(48, 40)):
    noise = np.random.default_rng(k).integers(0, 60, (*size, 3))
    return (COLOURS[truth(k, size)] * 0.7 + noise).astype(np.uint8)


def folder(root, form, n=12, photos=0, names="images/{}.png masks/{}.png", first=0):
    """n photos with masks made by `form` from class indices 0..2, and some photos without."""
    image, mask = names.split()
    for k in range(n + photos):
        save(root / image.format(f"{k:02}"), photo(first + k))
        if k < n:
            save(root / mask.format(f"{k:02}"), form(truth(first + k)))
    return root


@pytest.mark.parametrize("names", [
    "images/{}.jpg masks/{}.png", "img/{}.jpg ann/{}.jpg.png", "JPEGImages/{}.jpg SegmentationClass/{}.png",
    "leftImg8bit/train/city/{}_leftImg8bit.png gtFine/train/city/{}_gtFine_labelIds.png", "{}.jpg {}_mask.png",
    "train/images/{}.jpg train/labels/{}.png", "imgs/{}_img.jpg gts/{}_gt.png", "photos/a/{}.jpg masks/{}.png",
    "images/{}_l.jpg masks/{}_l.png", "images/{}.JPG masks/{}_L.png"])  # fmt: skip
def test_layouts_that_people_have(tmp_path, names):
    folder(tmp_path, lambda y: y, 3, 1, names)
    pairs, left_out = find_pairs(tmp_path, tmp_path / "mkd")
    image, mask = (name.format for name in names.split())
    found = {str(p.image.relative_to(tmp_path)): p.mask and str(p.mask.relative_to(tmp_path)) for p in pairs}
    assert found == {image(f"{k:02}"): mask(f"{k:02}") if k < 3 else None for k in range(4)} and not left_out


def test_of_several_masks_the_class_ids_count_and_the_rest_is_told(tmp_path):
    names = "leftImg8bit/val/x/{}_leftImg8bit.png gtFine/val/x/{}_gtFine_labelTrainIds.png"
    folder(tmp_path, lambda y: y, 2, names=names)
    for kind in ("labelIds", "color", "instanceIds"):
        save(tmp_path / f"gtFine/val/x/00_gtFine_{kind}.png", truth(0))
    save(tmp_path / "gtFine/val/x/zz_gtFine_labelIds.png", truth(0))
    (tmp_path / "notes.docx").touch()
    pairs, left_out = find_pairs(tmp_path, tmp_path / "mkd")
    assert {p.mask.name for p in pairs} == {f"0{k}_gtFine_labelTrainIds.png" for k in range(2)}
    assert {p.part for p in pairs} == {"val"}
    told = "\n".join(left_out)
    names = ("00_gtFine_labelIds", "_color", "_instanceIds", "zz_gtFine", "notes.docx")
    assert all(name in told for name in names)


def test_what_cannot_be_paired_is_refused(tmp_path):
    folder(tmp_path, lambda y: y, 2, names="a/{}.png b/{}.png")
    with pytest.raises(DataError, match="photo has a mask"):
        find_pairs(tmp_path / "a", tmp_path / "mkd")
    pairs, _ = find_pairs(tmp_path, tmp_path / "mkd", images="a", masks="b")
    assert [p.mask.parent.name for p in pairs] == ["b", "b"]
    save(tmp_path / "b/train/00.png", truth(0))  # in another folder, of a photo that has one: as in IDD
    pairs, left_out = find_pairs(tmp_path, tmp_path / "mkd", images="a", masks="b")
    assert pairs[0].mask.parent.name == "b" and "b/train/00.png" in left_out[0]
    save(tmp_path / "a/00.jpg", photo(0))
    for masks, said in (("b", "photos of one name"), ("c", "c is no folder")):
        with pytest.raises(ValueError, match=said):
            find_pairs(tmp_path, tmp_path / "mkd", images="a", masks=masks)


def palette(y, order=(0, 1, 2)):
    picture = Image.fromarray(np.argsort(order)[y].astype(np.uint8))
    picture.putpalette(COLOURS[list(order)].tobytes())
    return picture


FORMS = {
    "index": (lambda y: y, "a,b,c"),
    "colour": (lambda y: COLOURS[y], "a,c,b"),  # sorted by red
    "from 1": (lambda y: y + 1, "a,b,c"),
    "16 bit": (lambda y: y.astype(np.uint16), "a,b,c"),
    "grey levels": (lambda y: y * 100, "a,b,c"),
    "grey as RGB": (lambda y: np.stack([y] * 3, 2), "a,b,c"),
    "levels with 255": (lambda y: np.array([0, 128, 255], np.uint8)[y], "a,b,c"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_mask_becomes_the_same_classes(tmp_path, form):
    make, classes = FORMS[form]
    folder(tmp_path, make)
    before = tree(tmp_path)
    config = prepare_folder(tmp_path, classes=classes.replace(",", ", "), quiet=True, weights="")
    data = open_dataset("folder", config.root, **config.dataset_options)
    assert len(data.train) + len(data.val) == 12
    names = {name: k for k, name in enumerate(data.classes)}
    for id in (*data.train, *data.val):
        want = np.array([names[name] for name in "abc"])[truth(int(Path(id).stem))]
        assert (data.label(id).numpy() == want).all()
    assert {k: v for k, v in tree(tmp_path).items() if k.parts[0] != "mkd"} == before
    assert (tmp_path / "mkd/masks").exists() == (form != "index")


def test_black_and_white_needs_no_names_and_255_beside_classes_is_ignored(tmp_path):
    for name, form, classes in (("bw", lambda y: (y > 0) * np.uint8(255), None), ("one bit", lambda y: y > 0, None),
                                ("void", lambda y: np.where(y == 2, 255, y).astype(np.uint8), ["x", "y"])):  # fmt: skip
        masks = [save(tmp_path / name / f"{k}.png", form(truth(k))) for k in range(3)]
        meaning = understand(masks, classes, {})
        assert meaning.classes == (("background", "foreground") if classes is None else ("x", "y"))
        want = np.where(truth(1) == 2, 255, truth(1)) if name == "void" else truth(1) > 0
        if name == "void":  # two numbers and 255: the same file may be black and white only without a 1
            assert meaning.as_is
        assert (meaning.read(masks[1]) == want).all()


def test_palettes_that_disagree_are_read_as_colours(tmp_path):
    masks = []
    for k in range(4):
        path = tmp_path / f"{k}.png"
        palette(truth(k), (0, 1, 2) if k % 2 else (2, 0, 1)).save(path)
        masks.append(path)
    meaning, order = understand(masks, ["a", "c", "b"], {}), np.array([0, 2, 1])
    assert not meaning.as_is and all((meaning.read(m) == order[truth(k)]).all() for k, m in enumerate(masks))
    assert understand([masks[1], masks[3]], ["a", "b", "c"], {}).as_is


@pytest.mark.parametrize(
    "lines",
    ["9 9 9 ground\n200 30 30\tred thing\n30 200 30 void\n", "# label:color_rgb:parts:actions\nground:9,9,9::\nred thing:200,30,30::\nvoid:30,200,30::\n",
     "name,r,g,b\nground,9,9,9\nred thing,200,30,30\nvoid,30,200,30\n", "0 9 9 9 ground\n1 200 30 30 red thing\n2 30 200 30 void\n"],
)  # fmt: skip
def test_colour_tables_of_several_programs(tmp_path, lines):
    (tmp_path / "t.txt").write_text(lines)
    table = read_table(tmp_path / "t.txt")
    assert table == {(9, 9, 9): "ground", (200, 30, 30): "red thing", (30, 200, 30): "void"}
    mask = save(tmp_path / "m.png", COLOURS[truth(0)])
    meaning = understand([mask], None, table)
    assert meaning.classes == ("ground", "red thing") and "ignored: void" in meaning.notes
    assert (meaning.read(mask) == np.array([0, 1, 255])[truth(0)]).all()
    with pytest.raises(DataError, match=r"\(9, 9, 9\) in m.png.* not in the colour table"):
        understand([mask], None, {(200, 30, 30): "red", (30, 200, 30): "green"})


@pytest.mark.parametrize("form, classes, said", [
    (lambda y: y, None, "(?s)0  .*2  .*which classes are they.*--classes a,b,c"),
    (lambda y: y * 100, ["a", "b"], "2 class names do not fit"),
    (lambda y: COLOURS[y], None, r"(?s)\(200, 30, 30\).*--colours FILE"),
    (lambda y: np.random.default_rng(0).integers(0, 200, (48, 40, 3), np.uint8), None, "classes are 64 at most")])  # fmt: skip
def test_what_masks_do_not_tell_is_asked_for(tmp_path, form, classes, said):
    with pytest.raises(DataError, match=said):
        prepare_folder(folder(tmp_path, form, 4), classes=classes, quiet=True)
    assert not (tmp_path / "mkd").exists()


def test_class_lists_are_read_as_those_of_a_data_set(tmp_path):
    (folder(tmp_path, lambda y: y) / "labels.txt").write_text("# mine\n\n__ignore__\na\nb\nc\n")
    data = open_dataset("folder", prepare_folder(tmp_path, quiet=True, weights="").root)
    assert data.classes == ("a", "b", "c")


SHAPES = [
    {"label": "wall", "points": [[2, 4], [30, 4], [30, 20], [2, 20]], "shape_type": None},
    # From its last corner; over the wall.
    {"label": "door", "points": [[20, 30], [8, 10]], "shape_type": "rectangle"},
    {"label": "__ignore__", "points": [[25, 36], [25, 42]], "shape_type": "circle"},
    {"label": "_background_", "points": [[10, 12], [11, 13]], "shape_type": "rectangle"},
]


def labelme(path, shapes, **keys):
    content = {"shapes": shapes, "imagePath": "?", "imageHeight": 48, "imageWidth": 40, "imageData": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | keys))


@pytest.mark.parametrize("names", [
    "{}.jpg {}.json", "images/{}.jpg json/{}.json", "b/{}.jpg b/ann/{}.jpg.json", "a/{}.jpg c/of_{}.json"])  # fmt: skip
def test_outlines_of_labelme(tmp_path, names, capsys):
    image, drawn = names.split()
    for k in range(8):
        save(tmp_path / image.format(k), photo(k))
        labelme(tmp_path / drawn.format(k), SHAPES if k < 6 else [], imagePath=f"..\\a\\{k}.jpg")
    config = prepare_folder(tmp_path, weights="")
    assert "no outline in it" in capsys.readouterr().out
    data = open_dataset("folder", config.root, **config.dataset_options)
    assert data.classes == ("background", "door", "wall") and len(load_split(data, "labeled").unlabeled) == 2
    want = np.zeros((48, 40), np.uint8)
    want[4:20, 2:30] = 2
    want[10:30, 8:20] = 1
    y, x = np.mgrid[:48, :40]
    far = np.hypot(x - 25, y - 36)
    want[far <= 6] = 255
    want[12:13, 10:11] = 0
    edge = abs(far - 6) < 1  # of the circle, a polygon here
    assert (data.label(data.val[0]).numpy() == want)[~edge].all()


def test_outlines_of_coco_in_the_order_of_their_ids(tmp_path):
    outlines = {2: [8, 10, 20, 10, 20, 18, 8, 18], 1: [2, 4, 30, 4, 30, 20, 2, 20]}
    names = ("things", "pit", "crack")  # one has no object
    named = [{"id": k, "name": name} for k, name in enumerate(names)]
    for part, count in (("train", 5), ("valid", 3)):
        files = [save(tmp_path / f"{part}/{part}_{k}.jpg", photo(10 * count + k)).name for k in range(count)]
        images = [{"id": k, "file_name": name, "height": 48, "width": 40} for k, name in enumerate(files)]
        objects = [{"image_id": k, "category_id": c, "segmentation": [o]} for k in range(count - 1) for c, o in outlines.items()]  # fmt: skip
        content = {"images": images, "annotations": objects, "categories": named}
        (tmp_path / part / "_annotations.coco.json").write_text(json.dumps(content))
    config = prepare_folder(tmp_path, weights="", quiet=True)
    data = open_dataset("folder", config.root, **config.dataset_options)
    assert data.classes == ("background", "pit", "crack") and len(data.val) == 2
    want = np.zeros((48, 40), np.uint8)
    want[4:20, 2:30] = 1
    want[10:18, 8:20] = 2  # the small one stays on top, though it comes first
    assert all((data.label(id).numpy() == want).all() for id in data.val)
    assert len(load_split(data, "labeled").unlabeled) == 2  # without an object: nobody looked, perhaps


@pytest.mark.parametrize(("shapes", "keys", "said"), [
    ([SHAPES[0] | {"shape_type": "linestrip"}], {}, "0.json: shape 1 is a linestrip of 4 points: outlines are polygons of "),
    ([SHAPES[0] | {"points": [[1, 1], [5, 5]]}], {}, "0.json: shape 1 is a polygon of 2 points: outlines"),
    (SHAPES, {"imageHeight": 40}, r"0.json: a mask of \(40, 40\) pixels, its photo 0.jpg \(upright\) has \(48, 40\)"),
    (SHAPES, {"imageHeight": None}, "0.json: not JSON as labelme or COCO has it"),
    ([SHAPES[0] | {"label": "roof"}], {}, r"1 labels \(roof\), in .*0.json first, are not among wall, door"),
    ([], {}, "(?s)no photo has a mask.*no outline in it.*0.json")])  # fmt: skip
def test_outlines_that_cannot_be_used(tmp_path, shapes, keys, said):
    save(tmp_path / "0.jpg", photo(0))
    labelme(tmp_path / "0.json", shapes, **keys)
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\nwall\ndoor\n")
    with pytest.raises(DataError, match=said):
        prepare_folder(tmp_path, quiet=True)
    assert not (tmp_path / "mkd").exists()


def test_masks_and_outlines_are_not_mixed(tmp_path):
    folder(tmp_path, lambda y: y, 2)
    for k in range(2):
        labelme(tmp_path / f"images/0{k}.json", SHAPES)
    pairs, left_out = find_pairs(tmp_path, tmp_path / "mkd")  # as labelme's exporter leaves them
    assert {p.mask.suffix for p in pairs} == {".png"} and "another form of a mask" in left_out[0]
    (tmp_path / "masks/01.png").unlink()
    with pytest.raises(DataError, match="00.png is a mask, .*01.json holds outlines: move one kind"):
        find_pairs(tmp_path, tmp_path / "mkd")


def test_photos_without_masks_are_unlabeled_and_what_is_left_out_is_told(tmp_path, capsys):
    folder(tmp_path, lambda y: y, 12, 5)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    faulty = [tmp_path / name for name in ("masks/03.png", "masks/04.png", "images/05.png")]
    save(faulty[0], truth(3)[:20])
    for path in faulty[1:]:
        path.write_bytes(b"no picture")
    save(tmp_path / "masks/06.jpg", truth(6))
    (tmp_path / "masks/06.png").unlink()
    save(tmp_path / "masks/nobody.png", truth(5))
    assert main(["prepare", str(tmp_path)]) == 2  # what is damaged is not dropped, nor taken for unlabeled
    text = capsys.readouterr().err
    said = ("03.png: a mask of (20, 40) pixels", "04.png: not a readable mask", "05.png: not a readable picture", "06.jpg: a mask is a lossless")  # fmt: skip
    assert all(part in text for part in (*said, "4 faulty files", "a photo without its mask is unlabeled"))
    for path in (*faulty, tmp_path / "masks/06.jpg"):
        path.unlink()
    assert main(["prepare", str(tmp_path), "weights=", "--test", "0.2"]) == 0
    text = capsys.readouterr().out
    assert "nobody.png" in text and "classes.txt)" not in text
    assert f"Next: mkd train {tmp_path}" in text and (tmp_path / "mkd/sheet.png").is_file()
    data = open_dataset("folder", str(tmp_path / "mkd"))
    split = load_split(data, "labeled")
    test = open_dataset("folder", str(tmp_path / "mkd"), val="test.txt").val
    assert len(split.unlabeled) == 8 and len(test) == 2 and len(data.val) == 2 and len(split.labeled) == 4
    assert not set(data.val) & set(test) and not {*data.val, *test} & set(data.train)
    before = tree(tmp_path)  # lists are not drawn anew before all that can be refused is
    for words, fault in (([], "prepared already; --overwrite"), (["--overwrite", "--labeled", "0"], "labeled is 1/4, 40 or all"),
                         (["--overwrite", "crop=[5, 5]"], "multiples of"), (["--overwrite", "root=x"], "give root as")):  # fmt: skip
        assert main(["prepare", str(tmp_path), *words]) == 2 and fault in capsys.readouterr().err
    assert tree(tmp_path) == before
    save(tmp_path / "images/t\tab.png", photo(1))
    assert main(["prepare", str(tmp_path), "--overwrite"]) == 2 and "rename it" in capsys.readouterr().err


def test_draws_repeat_keep_groups_together_and_know_folders_called_val(tmp_path):
    folder(tmp_path / "a", lambda y: y, 20, 6, "images/{}.png masks/{}.png")

    def parts(**how):
        how |= {"classes": 3, "quiet": True, "overwrite": True, "weights": ""}
        config = prepare_folder(tmp_path / "a", tmp_path / "out", **how)
        data = open_dataset("folder", config.root)
        return data, load_split(data, "labeled")

    first, second, other = parts(), parts(), parts(seed=1)
    assert first[0].val == second[0].val and first[1] == second[1] and first[0].val != other[0].val
    data, split = parts(group_by="1")  # 00 .. 09, 10 .. 19, 20 ..: by the first letter
    val, rest = ({Path(id).name[0] for id in ids} for ids in (data.val, (*data.train, *split.unlabeled)))
    assert len(val) == 1 and len(data.val) == 10 and not val & rest
    assert len(parts(labeled="6")[1].labeled) == 6 and len(parts(labeled="1/4")[1].labeled) == 4
    parts(test=0.2)
    parts()  # no test list of an earlier draw stays, of which some would be trained on
    assert not (tmp_path / "out/test.txt").exists()
    folder(tmp_path / "b", lambda y: y, 9, 0, "train/img/{}.png train/ann/{}.png")
    folder(tmp_path / "b", lambda y: y, 2, 0, "val/img/x{}.png val/ann/x{}.png", 50)
    config = prepare_folder(tmp_path / "b", classes="3", quiet=True, weights="")
    assert [Path(id).name for id in open_dataset("folder", config.root).val] == ["x00.png", "x01.png"]


SMALL = dict(
    weights="", encoder="tu-test_resnet", channels=16, crop=[32, 32], steps=4, batch=2, evaluate_every=2, quality_images=2,
    log_every=2, device="cpu", threads=1,
)  # fmt: skip


def test_one_command_trains_evaluates_on_val_and_test_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RUNS", tmp_path / "runs")
    folder(tmp_path / "p", lambda y: y, 16, 3)
    prepare_folder(tmp_path / "p", classes=3, test=0.2, quiet=True, **SMALL)
    assert main(["train", str(tmp_path / "p"), "--methods", "supervised,mkd", "options.alpha=2"]) == 0
    text = capsys.readouterr().out
    place = tmp_path / "p/mkd/report"
    names = {"table.md", "records.jsonl", "curves.png", "predictions.png"}
    assert names <= {path.name for path in place.iterdir()}
    cells = records.read_cells(place / "records.jsonl")
    alpha = {name: of[""][0].config["options"].get("alpha") for name, of in cells.items()}
    assert alpha == {"SupOnly": None, "MKD": 2.0}
    best = max((of[""][0] for of in cells.values()), key=lambda record: record.miou)
    assert f"Next: mkd predict {best.id} PHOTOS" in text and "3 images of test.txt" in text
    opened = mkd_core.open_run(best.id)
    data = open_dataset("folder", str(tmp_path / "p/mkd"), val="test.txt")
    counts, model = torch.zeros(3, 3, dtype=torch.int64), opened.predictor()
    for id in data.val:
        counts += confusion_matrix(model.label(data.image(id))[0].long(), data.label(id), 3)
    name = next(name for name, of in cells.items() if of[""][0].id == best.id)
    assert f"  {name}: {miou(counts):.1f}" in text
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("record.json")}
    mkd_core.train_folder(tmp_path / "p", **{"options.alpha": 2.0})  # nothing is trained again
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("record.json")}
    shutil.copytree(tmp_path / "p", tmp_path / "copy/p")  # the same ids; then a mask is mended
    save(tmp_path / "copy/p/masks/00.png", truth(7))
    with pytest.raises(ValueError, match="SupOnly, seed 0: .*other data .*contents"):
        mkd_core.train_folder(tmp_path / "copy/p", **{"options.alpha": 2.0})
    with pytest.raises(ValueError, match="options are mkd's"):
        mkd_core.train_folder(tmp_path / "p", ["supervised"], **{"options.alpha": 1.0})


def test_the_five_lines_of_the_readme(tmp_path, monkeypatch):
    """They run as they stand there, but for the small network."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    lines = next(part for part in readme.split("```python\n")[1:] if "prepare_folder" in part).split("```")[0]
    monkeypatch.setattr(records, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "my_photos", lambda y: np.uint8(y % 3), 12, 3)
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda picture: shown.append(picture))
    save(tmp_path / "new.jpg", photo(99))
    small = ", ".join(f"{key}={value!r}" for key, value in SMALL.items())
    exec(lines.replace("steps=500", small), {})
    assert [picture.size for picture in shown] == [(40, 48)]
    assert len([line for line in lines.splitlines() if line and not line.startswith(("import", "from"))]) == 5


def test_imagenet_weights_by_name(tmp_path, monkeypatch):
    """A file in the cache is taken; without it and without a network, the error names file and address of smp's and timm's tables."""
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / name)
    asked = []

    def no_network(url, **how):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr("mkd_core.models.get_hf_file_metadata", no_network)
    for encoder, owner in (("resnet18", "smp-hub/resnet18.imagenet"), ("tu-test_resnet", "timm/test_resnet")):
        path = tmp_path / f"mkd/{encoder}_imagenet.safetensors"
        config = mkd_core.RunConfig(encoder=encoder, weights="imagenet")
        assert config.weights == str(path) and not config.named and not asked  # a plan fetches nothing
        with pytest.raises(ValueError, match=f"{path} does not exist.*Put https://.*{owner}.*there"):
            models.weights_file(config.weights)
        assert asked.pop().endswith("model.safetensors")
    path.parent.mkdir()
    net = models.SegNet(3, encoder="tu-test_resnet")
    with_file = mkd_core.RunConfig(encoder="tu-test_resnet", weights="imagenet")
    state, about = net.encoder.state_dict(), SimpleNamespace(etag="1")
    monkeypatch.setattr("mkd_core.models.get_hf_file_metadata", lambda url, timeout: about)
    monkeypatch.setattr("pooch.retrieve", lambda *_, fname, path: save_file(state, path / fname))
    planned = batch.Run("a", "", with_file)
    assert planned.folder is None
    batch.check([planned])  # fetches
    assert planned.folder == records.RUNS / with_file.id
    assert with_file.id == mkd_core.RunConfig(encoder="tu-test_resnet", weights=str(path)).id
    assert with_file.id != mkd_core.RunConfig(encoder="tu-test_resnet").id
    other = build_net(with_file, 3).encoder.state_dict()
    assert all((state[key] == other[key]).all() for key in other)
    with pytest.raises(ValueError, match="neither smp nor timm"):
        mkd_core.RunConfig(encoder="resnext101_32x32d", weights="imagenet")
