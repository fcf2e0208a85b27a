"""A person's folder of photos and masks: which mask belongs to which photo, told by the names of files and folders."""

import re
import unicodedata
from collections import defaultdict
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from .base import DataError, refuse_faulty
from .outlines import Drawing, read_drawings
from .pictures import PICTURES, absolute, find_pictures, tell

IMAGE_FOLDERS = "images image imgs img photos jpegimages leftimg8bit rgb frames inputs"
MASK_FOLDERS = (
    "masks mask ann anns annotations annotation labels label gts gt gtfine targets "
    "segmentationclass segmentationclasspng segmentations segmentation json"
)
IMAGE_ENDINGS = "_leftImg8bit _image _img _rgb _photo"
# The first are taken where a photo has several.
MASK_ENDINGS = (
    "_gtFine_labelTrainIds _gtFine_labelIds _labelTrainIds _labelIds _masks _mask _labels _label _gt _seg _L"
)
# Neither photo nor mask of classes.
OTHERS = re.compile(r"(_color|_instanceIds)$|(^|/)(SegmentationObject|masks_human|instances)/", re.IGNORECASE)
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
PARTS |= {"test": "test", "testing": "test"}
CLASS_FILES = "classes.txt class_names.txt labels.txt names.txt codes.txt"
TABLE_FILES = "labelmap.txt label_colors.txt label_colours.txt colors.txt colours.txt class_dict.csv"
DONE = "mkd.yaml"  # written last: where it lies, a folder is prepared


class Pair(NamedTuple):
    """A photo, its mask (None: unlabeled), a name for both, and the part that a folder calls it ("" where none does).

    Of outlines, mask is their JSON file, or a name below it.
    """

    name: str
    image: Path
    mask: Path | None
    part: str
    drawing: Drawing | None = None


class _File(NamedTuple):
    path: Path
    is_mask: bool
    place: tuple[str, ...]  # its folders, without those that say images or masks
    stems: tuple[str, str]  # as it is, and without its ending
    rank: int  # of several masks the lowest counts


def find_pairs(root: Path, out: Path, images: str = "", masks: str = "") -> tuple[list[Pair], list[str]]:
    """Pair the photos below `root` with their masks; returns also what was left out and why.

    images/a.jpg + masks/a.png, train/img/a.jpg + train/ann/a.jpg.png, JPEGImages + SegmentationClass,
    leftImg8bit/.../a_leftImg8bit.png + gtFine/.../a_gtFine_labelIds.png, a.jpg + a_mask.png, a.jpg + a.json
    of labelme, one JSON file of COCO's kind, and the like.
    images, masks: folders below root, where their names tell nothing. DataError where two of one name are found.
    """
    if gone := [name for name in (images, masks) if name and not (root / name).is_dir()]:
        raise ValueError(f"{root / gone[0]} is no folder")
    found, left_out = find_pictures([root], out, f".json {CLASS_FILES} {TABLE_FILES}")
    prepared = {path.parent for path in root.rglob(DONE)}
    found = [path for path in found if not prepared.intersection(path.parents)]
    pictures = [path for path in found if path.suffix.lower() in PICTURES.split()]
    drawings = _drawings([path for path in found if path.suffix.lower() == ".json"], root, left_out)
    others = {path for path in pictures if OTHERS.search(path.relative_to(root).with_suffix("").as_posix())}
    tell(left_out, "colours, instances or objects, no classes", root, others)
    own = [(absolute(root / masks), True)] * bool(masks) + [(absolute(root / images), False)] * bool(images)
    files = [_look(path, root, own) for path in pictures if path not in others]
    photos = [file for file in files if not file.is_mask]
    drawn = [_look(root / of.place, root, own)._replace(path=path, rank=99) for path, of in drawings.items()]
    chosen = _choose(photos, [*(file for file in files if file.is_mask), *drawn], root, left_out)
    if not chosen:
        where = f"JSON of labelme or COCO, folders called {MASK_FOLDERS.replace(' ', ', ')}, or names that end in _mask, _gt ..."
        how = "name yours: --masks FOLDER, and --images FOLDER"
        fault = f"{root}: no photo has a mask of its name. Masks are sought in {where}; {how}"
        raise DataError("\n".join([fault, *left_out]))
    kinds = {mask in drawings: mask for mask in chosen.values()}
    if len(kinds) == 2:
        raise DataError(f"{kinds[False]} is a mask, {kinds[True]} holds outlines: move one kind of them away")
    pairs = []
    for file in photos:
        name, mask = "/".join((*file.place, file.stems[0])), chosen.get(file.path)
        part = next((PARTS[folder.lower()] for folder in file.place if folder.lower() in PARTS), "")
        pairs.append(Pair(name, file.path, mask, part, drawings.get(mask or root)))
    return sorted(pairs), left_out


def _drawings(paths: list[Path], root: Path, left_out: list[str]) -> dict[Path, Drawing]:
    found: dict[Path, Drawing] = {}
    faults, others = [], []
    for path in paths:
        try:
            found |= (mine := read_drawings(path, root))
            others += [] if mine else [path]
        except DataError as error:
            faults.append(str(error))
    refuse_faulty(faults)
    tell(left_out, "JSON neither of labelme nor of COCO's instances", root, others)
    why = "no outline in it, so the photo is unlabeled (a shape _background_: nothing there)"
    tell(left_out, why, root, [path for path, drawing in found.items() if not drawing.objects])
    return {path: drawing for path, drawing in found.items() if drawing.objects}


def _choose(photos: list[_File], masks: list[_File], root: Path, left_out: list[str]) -> dict[Path, Path]:
    """Photo -> mask."""
    known: dict[tuple[tuple[str, ...], str], _File] = {}
    for file in photos:
        if (twin := known.setdefault((file.place, file.stems[0]), file)) is not file:
            raise DataError(f"{twin.path} and {file.path} are photos of one name: move one away")
    for file in photos:
        known.setdefault((file.place, file.stems[1]), file)
    by_stem: dict[str, set[_File]] = defaultdict(set)
    for (_, stem), file in known.items():
        by_stem[stem].add(file)
    masks_of, alone, spare = defaultdict(list), [], []
    beside = [[known[at] for stem in file.stems if (at := (file.place, stem)) in known] for file in masks]
    served = {photo for near in beside for photo in near}
    for file, near in zip(masks, beside, strict=True):
        # Masks in another tree of folders: by the name, where it is the only one.
        far = [photo for stem in file.stems if len(by_stem[stem]) == 1 for photo in by_stem[stem] - served]
        if near or far:
            masks_of[(near or far)[0].path].append(file)
        else:
            alone.append(file.path)
    chosen = {}
    for photo, same in masks_of.items():
        same.sort(key=lambda file: file.rank)
        if twins := [file.path for file in same if file.rank == same[0].rank][1:]:
            raise DataError(f"{photo} has several masks, {same[0].path} and {twins[0]}: move one away")
        chosen[photo] = same[0].path
        spare += [file.path for file in same[1:]]
    tell(left_out, "another form of a mask", root, spare)
    tell(left_out, "a mask without a photo of its name", root, alone)
    return chosen


def draw_parts(
    pairs: list[Pair], val: float, test: float, group_by: str, seed: int
) -> tuple[dict[str, list[Pair]], list[str]]:
    """The pairs of train, val, test and "" (photos without mask), and what is left out for the sake of groups.

    val, test: shares of the photos with masks, drawn from `seed` where no folder is called so. group_by: a regular
    expression of a file's name, or a number of letters from its start; photos that are alike in it stay together.
    """
    if not (0 <= val <= 1 and 0 <= test <= 1):
        raise ValueError(f"val and test are shares, from 0 to 1; got {val} and {test}")
    try:
        pattern = re.compile(f"^.{{{group_by}}}" if group_by.isdigit() else group_by)
    except (re.error, OverflowError) as error:
        raise ValueError(f"group_by is a number or a regular expression: {group_by!r}, {error}") from error

    def group(pair: Pair) -> str:
        found = pattern.search(pair.image.name) if group_by else None
        return found[0] if found else pair.name

    parts: dict[str, list[Pair]] = {"train": [], "val": [], "test": []}
    for pair in pairs:
        if pair.mask:
            parts[pair.part or "train"].append(pair)
    every = sum(map(len, parts.values()))
    for part, share in (("test", test), ("val", val)):
        if not parts[part] and share:
            ranked = sorted(parts["train"], key=lambda p: sha256(f"{seed}:{group(p)}".encode()).digest())
            end = max(1, round(share * every))
            while end < len(ranked) and group(ranked[end]) == group(ranked[end - 1]):
                end += 1
            parts[part], parts["train"] = ranked[:end], sorted(ranked[end:])
    if not parts["train"] or not parts["val"]:
        counts = ", ".join(f"{part} {len(of)}" for part, of in parts.items())
        raise DataError(f"photos with masks: {counts}; train and val need some: more photos, or groups")
    held = {group(pair) for pair in parts["val"] + parts["test"]} if group_by else set()
    bare = [pair for pair in pairs if not pair.mask]
    parts[""] = [pair for pair in bare if group(pair) not in held]
    lost = len(bare) - len(parts[""])
    return parts, [f"Left out, of a group in val or test: {lost} photos without mask"] * bool(lost)


def _look(path: Path, root: Path, own: list[tuple[Path, bool]]) -> _File:
    folders = path.parent.relative_to(root).parts
    kinds = {name: False for name in IMAGE_FOLDERS.split()} | {name: True for name in MASK_FOLDERS.split()}
    said = [kinds[name.lower()] for name in folders if name.lower() in kinds]
    said += [is_mask for folder, is_mask in own if path.is_relative_to(folder)]
    inner = Path(path.stem)  # a.jpg.png is a mask of a.jpg
    stem = unicodedata.normalize("NFC", inner.stem if inner.suffix.lower() in PICTURES.split() else path.stem)
    is_mask = said[-1] if said else bool(_ending(stem, MASK_ENDINGS))
    endings = MASK_ENDINGS if is_mask else IMAGE_ENDINGS
    ending = _ending(stem, endings)
    rank = [*endings.split(), ""].index(ending)
    mine = {p for folder, _ in own for p in folder.relative_to(root).parts if path.is_relative_to(folder)}
    place = tuple(name for name in folders if name.lower() not in kinds and name not in mine)
    return _File(path, is_mask, place, (stem, stem[: len(stem) - len(ending)]), rank)


def _ending(stem: str, endings: str) -> str:
    """The first of the endings that a name has, "" for none."""
    return next((ending for ending in endings.split() if stem.lower().endswith(ending.lower())), "")
