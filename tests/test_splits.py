"""Splits: published lists against their hashes, random draws, one's own lists, and every way in which a list can be wrong."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
import yaml

from mkd_core.data import DataError, SegDataset, check, load_split, open_dataset
from mkd_core.data import splits as module
from mkd_core.data.base import parse_ids
from mkd_core.data.splits import draw, published, published_splits, set_hash

VOC_ID, CITY_ID, COCO_ID = r"\d{4}_\d{6}", r"[a-z0-9-]+_\d{6}_\d{6}", r"\d{12}"
LISTS = yaml.safe_load(Path(module.__file__).with_name("splits.yaml").read_text())

# What each published split leaves unlabeled: name, count, and how the set hash begins; from the repositories' own unlabeled lists
# (for `voc` less the one labeled id in each).
TABLE = """
voc classic: 92 1372 c4f4b40a7103, 183 1281 b9c48b809fd6, 366 1098 c1d7b7ef4091
voc classic-cps: 732 732 f2279c237b9b
voc_aug classic: 92 10490 23fd9afa1c61, 183 10399 ae3608acfb51, 366 10216 b9a203a2f84f
voc_aug classic: 732 9850 944eea998e97, 1464 9118 e74502571e6d
voc_aug classic-cps: 732 9850 35137b872592
voc_aug cps: 1_16 9920 49b06340ca15, 1_8 9259 b93006960bd7, 1_4 7936 a84acda9b708, 1_2 5291 415761b09b2b
voc_aug u2pl: 1_16 9920 888a9b418a48, 1_8 9259 40cf051699ba, 1_4 7936 77029dd0ab2a, 1_2 5291 1c34ca0f709e
cityscapes cps: 1_16 2789 aee794749c4a, 1_8 2603 2ea590415ac9, 1_4 2231 9fb53e498cba
cityscapes cps: 1_2 1487 dc475feb9c92
cityscapes u2pl: 1_16 2789 de469ce7c7bf, 1_8 2603 d08f2cff541e, 1_4 2231 a844fadb2bda
cityscapes u2pl: 1_2 1487 093af6ed9647
coco pseudoseg: 1_512 118055, 1_256 117824, 1_128 117362, 1_64 116438, 1_32 114590
"""
UNLABELED = {}
for family, row in (line.split(": ") for line in TABLE.strip().splitlines()):
    for name, count, *sha256 in map(str.split, row.split(", ")):
        UNLABELED[family.split()[0], f"{family.split()[1]}/{name}"] = int(count), "".join(sha256)


class Listed(SegDataset):
    """Ids without files; image i holds the classes holds[i], or has no label where holds[i] is None."""

    palette = np.zeros((4, 3), np.uint8)

    def __init__(self, train, val=(), holds=None, name="listed", pattern=r"\S+"):
        self.name, self.pattern, self.classes = name, pattern, ("a", "b", "c", "d")
        self.train, self.val, self.holds, self.opened = tuple(train), tuple(val), holds or {}, []

    def image(self, id):
        return torch.zeros(3, 2, 2, dtype=torch.uint8)

    def label(self, id):
        self.opened.append(id)
        return torch.tensor([[*self.holds[id], 255]], dtype=torch.uint8)

    def has_label(self, id):
        return self.holds.get(id, ()) is not None


@pytest.fixture(scope="module")
def universes(shared):
    """The published training and validation sets, gathered without the package where it has no list of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MKD_SPLITS", str(shared / "splits"))
        voc = [published(key, VOC_ID) for key in ("voc/train", "voc_aug/train", "voc/val")]

    def ids(path, pattern):
        return parse_ids((shared / "splits" / path).read_text(), pattern, path)

    coco = {id for n in (512, 256, 128, 64, 32) for id in ids(f"unimatch/coco/1_{n}/labeled.txt", COCO_ID)}
    # the other ids of train2017 lie in no published list
    coco |= {f"{900_000_000_000 + i}" for i in range(118287 - len(coco))}
    city = [ids(f"cps/DATA/city/config_new/{part}.txt", CITY_ID) for part in ("train", "val")]
    return {
        "voc": Listed(voc[0], voc[2], name="voc", pattern=VOC_ID),
        "voc_aug": Listed(voc[1], voc[2], name="voc_aug", pattern=VOC_ID),
        "cityscapes": Listed(*city, name="cityscapes", pattern=CITY_ID),
        "coco": Listed(sorted(coco), ids("unimatch/coco/val.txt", COCO_ID), name="coco", pattern=COCO_ID),
    }


@pytest.mark.parametrize(("dataset", "name"), UNLABELED)
def test_published_list_leaves_the_published_unlabeled_images(universes, mirror, dataset, name):
    count, sha256 = UNLABELED[dataset, name]
    split = load_split(universes[dataset], name)
    assert len(split.unlabeled) == count
    assert split.sha256_unlabeled == set_hash(split.unlabeled) and split.sha256_unlabeled.startswith(sha256)
    assert len(split.labeled) == published_splits(dataset)[name] and split.sha256 == set_hash(split.labeled)
    assert sorted(split.labeled + split.unlabeled) == sorted(universes[dataset].train)


def test_every_shipped_name_was_compared_and_agrees_with_a_second_repository(universes, mirror):
    for name, path in {"cps/1_8": "1_8", "u2pl/1_8": "u2pl_1_8", "classic/732": "732"}.items():
        theirs = parse_ids((mirror / "unimatch/pascal" / path / "labeled.txt").read_text(), VOC_ID, path)
        assert set(load_split(universes["voc_aug"], name).labeled) == set(theirs)
    one, other = (set(load_split(universes["voc"], f"{of}/732").labeled) for of in ("classic", "classic-cps"))
    assert len(one & other) == 371
    split = load_split(universes["voc"], "classic/1464")  # where all are labeled, all serve as unlabeled
    assert split.labeled == split.unlabeled == tuple(sorted(universes["voc"].train))
    names = {(d, n) for d in ("voc", "voc_aug", "cityscapes", "coco") for n in LISTS[d]}
    # cac: not in the shared folder. voc classic/732 and 1464: no repository draws them in the universe of 1464
    cac = {("voc_aug", f"cac/1_{n}") for n in (16, 8, 4)}
    assert names - set(UNLABELED) == {("voc", "classic/732"), ("voc", "classic/1464")} | cac
    assert {file for rows in (*(LISTS[d].values() for d in ("voc", "voc_aug", "cityscapes", "coco")), LISTS["sets"].values())
            for _, file, _ in rows if file} == set(LISTS["files"])  # fmt: skip


def test_unknown_splits_and_parts_of_the_data_are_refused(universes, mirror):
    message = r"no voc_aug split 'cps/1_6'; did you mean 'cps/1_16'\? There are: classic/92, .*u2pl/1_2"
    with pytest.raises(ValueError, match=message):
        load_split(universes["voc_aug"], "cps/1_6")
    for name in ("random/0", "random/", "random/1_0", "random/half", "Full", ""):
        with pytest.raises(ValueError, match="There are"):
            load_split(universes["coco"], name)
    whole = universes["voc_aug"]
    first = load_split(whole, "cps/1_16").labeled[0]
    part = Listed([id for id in whole.train if id != first], whole.val, name="voc_aug", pattern=VOC_ID)
    message = rf"10582 training images.* has 10581, without 1 labeled images \({first}\)"
    with pytest.raises(DataError, match=message):
        load_split(part, "cps/1_16")


def test_files_on_record_are_the_bytes_that_the_repositories_ship(mirror):
    compared = 0
    for file, sha256 in LISTS["files"].items():
        source, _, path = file.partition("/")
        local = mirror / LISTS["sources"][source]["mirror"] / path
        zipped = local.with_name(local.name + ".gz")
        if local.is_file() or zipped.is_file():
            content = local.read_bytes() if local.is_file() else gzip.decompress(zipped.read_bytes())
            assert hashlib.sha256(content).hexdigest() == sha256, file
            compared += 1
    assert compared == len(LISTS["files"]) - 3  # all but ST++'s


def test_download_asks_pooch_for_the_pinned_file(mirror, universes, monkeypatch, tmp_path):
    monkeypatch.delenv("MKD_SPLITS")
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append((url, known_hash, fname, Path(path)))
        return str(mirror / "cps/DATA/pascal_voc/subset_train_aug/train_aug_labeled_1-16.txt")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    assert len(load_split(universes["voc_aug"], "cps/1_16").labeled) == 662
    assert asked == [(
        "https://raw.githubusercontent.com/charlesCXK/TorchSemiSeg/5e0c29c02738728b6848a732817db15620a6e034"
        "/DATA/pascal_voc/subset_train_aug/train_aug_labeled_1-16.txt",
        "sha256:7dada8ccc5eb6309b4b81e172dfc24f0d83ea72078675083778ca10487182748",
        "cps_voc_train_aug_labeled_1-16.txt",
        tmp_path / "mkd",
    )]  # fmt: skip


def test_without_network_the_error_names_the_way_out(universes, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("name resolution failed")

    monkeypatch.delenv("MKD_SPLITS", raising=False)
    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(DataError, match=r"cannot get the list https://raw.*resolution failed.*MKD_SPLITS"):
        load_split(universes["voc_aug"], "cps/1_16")


@pytest.mark.parametrize("damage", ["other id", "missing id", "empty", "absent"])
def test_a_list_that_was_tampered_with_is_refused(universes, mirror, monkeypatch, tmp_path, damage):
    path = Path("cps/DATA/pascal_voc/subset_train_aug/train_aug_labeled_1-16.txt")
    lines = (mirror / path).read_text().splitlines()
    swap = next(id for id in universes["voc_aug"].train if id not in lines)
    lines = {"other id": [swap, *lines[1:]], "missing id": lines[1:], "empty": [], "absent": lines}[damage]
    (tmp_path / path).parent.mkdir(parents=True)
    if damage != "absent":
        (tmp_path / path).write_text("\n".join(lines))
    monkeypatch.setenv("MKD_SPLITS", str(tmp_path))
    with pytest.raises(DataError, match="list|hash"):
        load_split(universes["voc_aug"], "cps/1_16")


def test_lists_are_read_whatever_their_syntax():
    wanted = ("2007_000032", "2008_000002")
    for text in (
        "2007_000032\r\n2008_000002",
        "JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png\n\n/JPEGImages/2008_000002.jpg\t/x/2008_000002.png\n",
        "  2007_000032  \n\n\n2008_000002\n",
    ):
        assert parse_ids(text, VOC_ID, "list") == wanted
    by_hand = hashlib.sha256(b"2007_000032\n2008_000002\n").hexdigest()
    assert set_hash(wanted) == set_hash(wanted[::-1]) == by_hand


@pytest.mark.parametrize("text, message", [
    ("", "empty"), (" \r\n\n", "empty"), ("a_1\n", "line 1: no id"),
    ("2007_000032\n2007_000039\n2007_000032\r\n", "(2007_000032).*once")])  # fmt: skip
def test_bad_lists_are_refused(text, message):
    with pytest.raises(DataError, match=message):
        parse_ids(text, VOC_ID, "list.txt")


def holding():
    """60 images of one or two of the classes a, b; c in four, d in one."""
    holds = {f"i{k:02d}": [{0}, {1}, {0, 1}][k % 3] for k in range(60)}
    for k, c in ((7, 2), (19, 2), (33, 2), (41, 2), (50, 3)):
        holds[f"i{k:02d}"].add(c)
    return holds


@pytest.mark.parametrize("seed", range(20))
def test_random_labeled_images_hold_every_class(seed):
    holds = holding()
    dataset = Listed(holds, holds=holds)
    split = load_split(dataset, "random/4", seed)
    assert len(split.labeled) == 4 and set().union(*(holds[id] for id in split.labeled)) == {0, 1, 2, 3}
    assert "i50" in split.labeled  # the only one with class d
    assert len(set(dataset.opened)) == len(dataset.opened)
    assert sorted(split.labeled + split.unlabeled) == sorted(holds)


def test_random_is_the_same_everywhere_and_another_for_each_seed():
    holds = holding()
    orders = (holds, sorted(holds, reverse=True))
    splits = [load_split(Listed(order, holds=holds), "random/1_8", seed=3) for order in orders]
    assert splits[0] == splits[1] == load_split(Listed(holds, holds=holds), "random/1_8@3", seed=0)
    assert splits[0].name == "random/1_8@3" and len(splits[0].labeled) == 8  # ceil(60 / 8)
    frozen = ("i00", "i07", "i09", "i10", "i20", "i36", "i50", "i54")  # records rely on it
    assert splits[0].labeled == frozen
    assert len({load_split(Listed(holds, holds=holds), "random/8", seed=s).labeled for s in range(10)}) == 10


def test_random_opens_few_masks_skips_what_cannot_be_labeled_and_tells_what_does_not_occur():
    holds = {f"i{k}": {k % 3} if k % 2 else None for k in range(40)}
    dataset = Listed(holds, holds=holds)
    split = load_split(dataset, "random/6")
    assert all(holds[id] for id in split.labeled)
    assert set().union(*(holds[id] for id in split.labeled)) == {0, 1, 2}
    assert len(dataset.opened) == len(set(dataset.opened)) == 20
    with pytest.raises(DataError, match="21 labeled images wanted, data set 'listed' has 20"):
        load_split(dataset, "random/21")
    with pytest.raises(DataError, match=r"no 2 images hold every class, \['.'\] would be absent"):
        load_split(dataset, "random/2")
    holds = {f"i{k}": {0, 1, 2, 3} for k in range(500)}
    dataset = Listed(holds, holds=holds)
    assert draw(dataset, 5, 0) == dataset.opened and len(dataset.opened) == 5
    dataset = Listed(holds, holds={id: {k % 4} for k, id in enumerate(holds)})
    assert set().union(*(dataset.holds[id] for id in draw(dataset, 4, 0))) == {0, 1, 2, 3}
    assert 4 < len(dataset.opened) < 30


def test_full_has_every_labeled_image_and_leaves_all_unlabeled():
    holds = {"a": {0}, "b": None, "c": {1}}
    split = load_split(Listed(holds, holds=holds), "full")
    assert split.labeled == ("a", "c") and split.unlabeled == ("a", "b", "c")
    assert str(split) == "full: 2 labeled, 3 unlabeled"


@pytest.fixture
def own(tmp_path):
    lists = {"train.txt": ["a.png a_.png", "b.png b_.png", "c.png", "d.png"], "val.txt": ["v.png v_.png"]}
    for name, lines in (lists | {"half/labeled.txt": ["a.png a_.png"]}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(lines))
    return tmp_path


def test_own_folder_without_unlabeled_list_takes_the_rest(own):
    data = open_dataset("folder", own, classes=3)
    split = load_split(data, "half")
    assert split.labeled == ("a.png",) and split.unlabeled == ("b.png", "c.png", "d.png")
    with pytest.raises(ValueError, match="no folder split 'hlaf'; did you mean 'half'"):
        load_split(data, "hlaf")
    (own / "half/unlabeled.txt").write_text("\n")  # none: enough for supervised training
    (own / "random").mkdir()
    (own / "half").rename(own / "random/mine")
    split = load_split(data, "random/mine")
    assert split.labeled == ("a.png",) and split.unlabeled == ()


@pytest.mark.parametrize(("labeled", "unlabeled", "message"), [
    ("a.png a_.png", "v.png", r"1 images \(v.png\) of the validation set in training"),
    ("", "c.png", "labeled.txt: the list is empty"), ("c.png", None, r"\d masks \(.*c.png.*\) missing"),
    ("x.png x_.png", None, r"2 masks \(.*x_.png\) missing"),
    ("a.png a_.png\n./a.png a_.png", None, r"1 images \(a.png\) listed more than once"),
    ("a.png b_.png", None, "a.png has mask a_.png in one list and b_.png in another")])  # fmt: skip
def test_own_lists_that_are_wrong(own, labeled, unlabeled, message):
    (own / "half/labeled.txt").write_text(labeled)
    if unlabeled is not None:
        (own / "half/unlabeled.txt").write_text(unlabeled)
    dataset = open_dataset("folder", own, classes=3)
    with pytest.raises(DataError, match=message):
        check(dataset, load_split(dataset, "half"), deep=False).raise_if_bad()


def test_own_lists_are_all_that_is_needed(own):
    (own / "train.txt").unlink()
    dataset = open_dataset("folder", own, classes=3)
    with pytest.raises(DataError, match="unlabeled.txt is needed"):
        load_split(dataset, "half")
    with pytest.raises(DataError, match="no training images under .*train.txt"):
        load_split(dataset, "full")
    (own / "half/unlabeled.txt").write_text("c.png\r\nd.png\r\n")
    split = load_split(dataset, "half")
    assert split.labeled == ("a.png",) and split.unlabeled == ("c.png", "d.png")
