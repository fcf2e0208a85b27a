"""`folder`, a person's own images: a root folder and list files."""

import posixpath
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .base import IGNORE, DataError, FileDataset, checked_ids, colormap, find_root, read_text

# lines of a class list that are no plain name: a header; a value or a colour beside the name
HEADER = re.compile(r"(?i)(id|index|value|names?|class(es)?|labels?|categor(y|ies)|colou?r|[rgb]|[\s,;:_-])+")
NO_NAME = re.compile(r"^-?\d+\s*[,;:\t]|[,;:\t]\s*\d")


class Folder(FileDataset):
    """Images and masks named by list files; every path is relative to `root`, and an image's path is its id.

    A line is "image mask", or "image" alone for an image without label; names with spaces are parted
    from each other by a tab. Masks are grey or palette PNGs of class indices, 255 = ignored.

    classes  the names, or their number; default: the lines of `classes.txt` under root, without those
             that begin with "#" and without labelme's first, `__ignore__`
    palette  [[r, g, b], ...], a colour for each class; default: VOC's colours
    train    list of the training images; may be absent where every split is a folder with labeled.txt
             and unlabeled.txt
    val      list of the evaluated images, all with masks; "" for none
    """

    name = "folder"
    where = (
        "train.txt and val.txt (options train, val) under root hold one 'image mask' pair per line, parted by "
        "a space or a tab, or an image alone: images/name.jpg masks/name.png."
    )

    def __init__(
        self,
        root: str,
        classes: Sequence[str] | int | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        train: str = "train.txt",
        val: str = "val.txt",
    ):
        self.root = find_root(self.name, root, [], self.where)
        self.classes = _class_names(self.root, classes)
        count = len(self.classes)
        self.palette = colormap(count) if palette is None else _colours(palette, count)
        self._written: dict[str, str] = {}  # id -> the image's name as its list spells it
        self._masks: dict[str, str | None] = {}
        self.train = self.read_list(self.root / train) if (self.root / train).is_file() else ()
        self.val = self.read_list(self.root / val) if val else ()
        if bare := [id for id in self.val if self._masks[id] is None]:
            raise DataError(f"{self.root / val}: evaluated images need a mask, {bare[0]} has none")

    def files(self, id: str) -> tuple[Path, Path | None]:
        mask = self._masks.get(id)
        return self._file(self._written.get(id, id)), self._file(mask) if mask else None

    def _file(self, name: str) -> Path:
        """Find a name's file in whichever Unicode form the disk has it: a Mac writes decomposed ones."""
        path = self.root / name
        if name.isascii() or path.is_file():  # of 100,000 ASCII names none is looked for here
            return path
        forms = [self.root / unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
        return next((form for form in forms if form.is_file()), path)

    def read_list(self, path: Path) -> tuple[str, ...]:
        """Read the images of a list file; their masks are remembered."""
        ids = []
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if line.strip():
                place = f"{path}, line {number}"
                image, mask = self._pair(line.strip(), place)
                id = unicodedata.normalize("NFC", image)
                if mask and (other := self._masks.get(id) or mask) != mask:
                    raise DataError(f"{place}: {image} has mask {other} in one list and {mask} in another")
                self._masks[id] = mask or self._masks.get(id)
                self._written[id] = image
                ids.append(id)
        return checked_ids(ids, str(path))

    def _pair(self, line: str, place: str) -> tuple[str, str | None]:
        fields = line.split("\t") if "\t" in line else self._split_at_space(line)
        # "./a.png" and "a.png" are one image
        fields = [posixpath.normpath(field.strip()) for field in fields if field.strip()]
        if absolute := [field for field in fields if field.startswith("/")]:
            raise DataError(f"{place}: {absolute[0]} is absolute; names are relative to {self.root}")
        if len(fields) > 2:
            hint = "part names that hold spaces by a tab"
            raise DataError(f"{place}: expected 'image mask' or 'image', got {line!r}; {hint}")
        return fields[0], fields[1] if len(fields) == 2 else None

    def _split_at_space(self, line: str) -> list[str]:
        words = line.split()
        if len(words) == 1 or self._file(line).is_file():
            return [line]
        pairs = [[" ".join(words[:k]), " ".join(words[k:])] for k in range(1, len(words))]
        found = [pair for pair in pairs if all(self._file(name).is_file() for name in pair)]
        return found[0] if len(found) == 1 else words


def _class_names(root: Path, classes: Sequence[str] | int | None) -> tuple[str, ...]:
    file = root / "classes.txt"
    given = [f"class {k}" for k in range(classes)] if isinstance(classes, int) else classes
    if given is None and not file.is_file():
        ways = "Give classes=[names], classes=<number>, or one name per line in"
        made = f", or root={root / 'mkd'}, which is prepared" * (root / "mkd/mkd.yaml").is_file()
        raise DataError(f"which classes do the masks hold? {ways} {file}{made}")
    names = tuple(read_classes(file) if given is None else _plain_names(map(str, given), "classes"))
    if isinstance(classes, str) or not 1 < len(names) <= IGNORE or len(set(names)) < len(names):
        wanted = f"classes are 2 to {IGNORE} different names, or their number"
        raise DataError(f"{wanted}; got {classes or names!r}")
    return names


def read_classes(file: Path) -> list[str]:
    """Read a class list, a name a line, without lines that begin with "#"; DataError for what is no name."""
    lines = [line.strip() for line in read_text(file).splitlines()]
    return _plain_names((line for line in lines if line and not line.startswith("#")), str(file))


def _plain_names(given: Iterable[str], source: str) -> list[str]:
    names = list(given)
    if names[:1] == ["__ignore__"]:  # labelme's first line: value -1, which is 255 in its masks
        names = names[1:]
    for number, name in enumerate(names):
        if name == "__ignore__" or NO_NAME.search(name) or (number == 0 and HEADER.fullmatch(name)):
            how = "give the names alone, one per class, the first for value 0"
            raise DataError(f"{source}: {name!r} is no class name; {how}")
    return names


def _colours(palette: Sequence[Sequence[int]], classes: int) -> np.ndarray:
    colours = np.asarray(palette) if len({len(colour) for colour in palette}) == 1 else np.zeros(0)
    if colours.shape != (classes, 3) or colours.min() < 0 or colours.max() > 255:
        raise DataError(f"palette must hold {classes} colours [r, g, b] in 0..255; got {palette!r}")
    return colours.astype(np.uint8)
