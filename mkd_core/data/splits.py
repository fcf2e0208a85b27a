"""Labeled and unlabeled images by name: published lists, random draws, one's own folders."""

import gzip
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pooch
import yaml

from ..choices import choose
from .base import IGNORE, DataError, SegDataset, local, parse_ids, read_text, some


@dataclass(frozen=True)
class Split:
    """Which images are labeled, which are not: ids in sorted order, with the set hash of each part."""

    name: str
    labeled: tuple[str, ...] = field(repr=False)
    unlabeled: tuple[str, ...] = field(repr=False)
    sha256: str
    sha256_unlabeled: str

    def __str__(self) -> str:
        return f"{self.name}: {len(self.labeled)} labeled, {len(self.unlabeled)} unlabeled"


def set_hash(ids: Iterable[str]) -> str:
    """Hash the sorted unique ids, one per line, each ended by a line feed: sha256."""
    return hashlib.sha256("".join(f"{id}\n" for id in sorted(set(ids))).encode()).hexdigest()


def load_split(dataset: SegDataset, name: str, seed: int = 0) -> Split:
    """The split `name` of a data set; unlabeled = the training images that are not labeled, computed.

    "cps/1_16"     a published list (splits.yaml), verified against its hash
    "random/1_16"  ceil(N / 16) images drawn from `seed`, see `draw`; "random/32": 32; "random/32@3": seed 3
    "full"         every image that has a label; unlabeled = all training images
    "splits/mine"  a folder under the data set's root with labeled.txt and, optionally, unlabeled.txt

    ValueError for a name that does not exist, DataError for a list that cannot be read. Whether its
    images are there, overlap, or leak is for `check` to say.
    """
    wish = re.fullmatch(r"(random/(1_)?([1-9]\d*))(?:@(\d+))?", name)
    own = name != "full" and not wish and name not in published_splits(dataset.name)
    if own and dataset.root and (dataset.root / name / "labeled.txt").is_file():
        return _from_folder(dataset, name, dataset.root / name)
    if not dataset.train:
        raise DataError(f"{dataset.name!r} has no training images under {dataset.root}. {dataset.where}")
    if name == "full":
        return _split(name, [id for id in dataset.train if _may_be_labeled(dataset, id)], dataset.train)
    if wish is None:
        return _published_split(dataset, name)
    stem, fraction, size, fixed = wish.groups()
    count = math.ceil(len(dataset.train) / int(size)) if fraction else int(size)
    seed = int(fixed or seed)
    drawn = draw(dataset, count, seed)
    return _split(f"{stem}@{seed}", drawn, _rest(dataset, drawn))


def draw(dataset: SegDataset, count: int, seed: int) -> list[str]:
    """Draw `count` labeled ids with every class present (our rule); the same on every machine.

    Images are ranked by sha256("seed:id") and the first `count` that have a label are taken. While a
    class is missing, the next image in rank that holds one joins, and the last image that holds no
    class alone leaves. Each mask is opened at most once; a class that no image of the data set holds
    is given up only after all were seen. DataError where the draw is impossible.
    """
    ranked = sorted(dataset.train, key=lambda id: hashlib.sha256(f"{seed}:{id}".encode()).digest())
    pool = (id for id in ranked if _may_be_labeled(dataset, id))
    holds = {id: _classes_of(dataset, id) for id in islice(pool, count)}
    if len(holds) < count:
        raise DataError(f"random: {count} labeled images wanted, data set {dataset.name!r} has {len(holds)}")
    counts = Counter(c for classes in holds.values() for c in classes)
    seen = set(counts)
    for id in pool if len(seen) < len(dataset.classes) else ():
        new = _classes_of(dataset, id)
        seen |= new
        if not new <= counts.keys():
            after = counts + Counter(new)
            spare = [old for old, classes in holds.items() if all(after[c] > 1 for c in classes)]
            if spare:
                counts = after - Counter(holds.pop(spare[-1]))
                holds[id] = new
        if len(counts) == len(dataset.classes):
            break
    if absent := [dataset.classes[c] for c in sorted(seen - counts.keys())]:
        raise DataError(f"random: no {count} images hold every class, {absent} would be absent; ask for more")
    return list(holds)


def published(key: str, pattern: str) -> tuple[str, ...]:
    """The sorted ids of a published set such as "voc/train" (splits.yaml, `sets`), verified."""
    count, file, sha256 = _lists()["sets"][key]
    return _verified(file, pattern, count, sha256)


def published_splits(dataset: str) -> dict[str, int]:
    """Name -> number of labeled images of the published splits of a data set."""
    return {name: count for name, (count, _, _) in _lists().get(dataset, {}).items()}


def published_count(key: str) -> int:
    """How many images the published set "<data set>/train" or "<data set>/val" has."""
    return _lists()["sets"][key][0]


def as_published(key: str, ids: Sequence[str]) -> bool | None:
    """Compare `ids` with the published set "voc/train", "voc/val", ...; None where there is none."""
    count, _, sha256 = _lists()["sets"].get(key, (None, "", ""))
    return None if count is None else len(ids) == count and sha256 in (None, set_hash(ids))


@cache
def _lists() -> dict:
    return yaml.safe_load(Path(__file__).with_name("splits.yaml").read_text())


def _published_split(dataset: SegDataset, name: str) -> Split:
    counts = published_splits(dataset.name)
    if name not in counts:
        root = dataset.root
        own = [str(p.parent.relative_to(root)) for p in sorted(root.rglob("labeled.txt"))] if root else []
        others = ["random/1_16", "random/32", "random/32@3", "full"]
        choose(f"{dataset.name} split", name, [*counts, *own, *others])
    count, file, sha256 = _lists()[dataset.name][name]
    labeled, key = _verified(file, dataset.pattern, count, sha256), f"{dataset.name}/train"
    if not as_published(key, dataset.train):
        whole = f"split {name} is drawn from the {published_count(key)} training images of {dataset.name!r}"
        missing = some(sorted(set(labeled) - set(dataset.train)), "labeled images")
        there = f"{dataset.root} has {len(dataset.train)}, without {missing}. {dataset.where}"
        raise DataError(f"{whole}; {there} For a part of the data use 'random/1_16'.")
    return _split(name, labeled, _rest(dataset, labeled))


def _from_folder(dataset: SegDataset, name: str, folder: Path) -> Split:
    labeled, given = dataset.read_list(folder / "labeled.txt"), folder / "unlabeled.txt"
    if given.is_file():
        # an empty list is one: supervised training needs no unlabeled images
        return _split(name, labeled, dataset.read_list(given) if read_text(given).strip() else ())
    if not dataset.train:
        raise DataError(f"{given} is needed where the data set has no list of training images")
    return _split(name, labeled, _rest(dataset, labeled))


def _rest(dataset: SegDataset, labeled: Sequence[str]) -> Iterable[str]:
    """The training images that are not labeled; where all are, all of them (Table 1, "Full")."""
    return set(dataset.train) - set(labeled) or dataset.train


def _split(name: str, labeled: Iterable[str], unlabeled: Iterable[str]) -> Split:
    labeled, unlabeled = tuple(sorted(labeled)), tuple(sorted(unlabeled))
    return Split(name, labeled, unlabeled, set_hash(labeled), set_hash(unlabeled))


def _may_be_labeled(dataset: SegDataset, id: str) -> bool:
    """Whether a mask is meant to exist: one that is then missing is a fault, not an unlabeled image."""
    return dataset.files(id)[1] is not None or dataset.has_label(id)


def _classes_of(dataset: SegDataset, id: str) -> set[int]:
    return set(np.unique(dataset.label(id).numpy()).tolist()) - {IGNORE}


def _verified(file: str, pattern: str, count: int, sha256: str) -> tuple[str, ...]:
    ids = parse_ids(_fetch(file), pattern, file)
    if len(ids) != count or set_hash(ids) != sha256:
        raise DataError(f"{file}: {len(ids)} ids of hash {set_hash(ids)}, published are {count} of {sha256}")
    return tuple(sorted(ids))


def _fetch(file: str) -> str:
    """Get the text of "<source>/<path>" from the mirror MKD_SPLITS, else download it once into the cache."""
    source, _, path = file.partition("/")
    address = _lists()["sources"][source]
    try:
        if mirror := os.environ.get("MKD_SPLITS"):
            plain = local(mirror) / address["mirror"] / path
            zipped = plain.with_name(plain.name + ".gz")
            return gzip.decompress(zipped.read_bytes()).decode() if zipped.is_file() else read_text(plain)
        url, sha256 = f"{address['url']}/{path}", f"sha256:{_lists()['files'][file]}"
        name, cache = file.replace("/", "_"), pooch.os_cache("mkd")
        return read_text(Path(pooch.retrieve(url, sha256, fname=name, path=cache)))
    except (OSError, EOFError, ValueError) as error:
        advice = "Without a network, let MKD_SPLITS name a folder that holds the published lists."
        raise DataError(f"cannot get the list {address['url']}/{path}: {error}. {advice}") from error
