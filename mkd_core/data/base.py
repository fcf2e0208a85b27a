"""What a data set is to the rest of the suite, and how its files are read."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ..records import write_atomically

IGNORE = 255


class DataError(ValueError):
    """Something is wrong with the user's data: the message says what, where, and what is allowed."""


class SegDataset(ABC):
    """A set of images with integer label maps."""

    name: str  # registry name, e.g. "voc"
    classes: tuple[str, ...]  # names of the C classes, index = label value
    palette: np.ndarray  # (C, 3) uint8 RGB colours for pictures
    train: tuple[str, ...]  # ids of the universe that labeled and unlabeled images are drawn from
    val: tuple[str, ...]  # ids that are evaluated; disjoint from train
    root: Path | None = None  # the folder of the files; None where the data set is generated
    where: str = ""  # where to get the files and where they belong; closes messages about missing ones
    pattern: str = r"\S+"  # regular expression of an id's normal form inside a line of a list file

    @abstractmethod
    def image(self, id: str) -> Tensor:
        """(3, H, W) uint8 RGB."""

    @abstractmethod
    def label(self, id: str) -> Tensor:
        """(H, W) uint8 in 0..C-1, IGNORE = 255. DataError where the image has no label."""

    def has_label(self, id: str) -> bool:
        """Whether label(id) can be read; unlabeled images of one's own have none."""
        return True

    def files(self, id: str) -> tuple[Path | None, Path | None]:
        """Return the image and mask file of an id, existing or not.

        None for a mask that is not meant to exist; (None, None) where the data set is generated.
        """
        return None, None

    def read_list(self, path: Path) -> tuple[str, ...]:
        """The ids of a list file, in its order; see `parse_ids`."""
        return parse_ids(read_text(path), self.pattern, str(path))


class FileDataset(SegDataset):
    """A data set of files under `root`: a subclass says which ones (`files`) and reads nothing itself."""

    root: Path
    cache: Path | None = None  # folder in which decoded pictures and masks are kept

    @abstractmethod
    def files(self, id: str) -> tuple[Path, Path | None]: ...

    def image(self, id: str) -> Tensor:
        return decoded(self.files(id)[0], read_image, self.cache)

    def label(self, id: str) -> Tensor:
        mask = self.files(id)[1]
        if mask is None:
            raise DataError(f"{id} has no mask: its line in the list names none")
        return decoded(mask, self.read_mask, self.cache, f"{self.name} {len(self.classes)}")

    def read_mask(self, path: Path) -> Tensor:
        """Read a mask file as class indices, (H, W) uint8."""
        return read_label(path, len(self.classes))

    def has_label(self, id: str) -> bool:
        mask = self.files(id)[1]
        return mask is not None and mask.is_file()


def parse_ids(text: str, pattern: str, source: str) -> tuple[str, ...]:
    """Find the ids of a list: the first match of `pattern` in each line that is not blank.

    DataError for a line without an id, for an id that occurs twice and for an empty list;
    `source` names the list in it.
    """
    ids = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            match = re.search(pattern, line)
            if match is None:
                raise DataError(f"{source}, line {number}: no id of the form {pattern} in {line.strip()!r}")
            ids.append(match[0])
    return checked_ids(ids, source)


def checked_ids(ids: Sequence[str], source: str) -> tuple[str, ...]:
    """`ids` unless there are none or some occur twice: DataError."""
    if not ids:
        raise DataError(f"{source}: the list is empty")
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"{source}: {some(twice, 'images')} listed more than once")
    return tuple(ids)


def some(items: Iterable[object], noun: str) -> str:
    """ "7 images (a, b, c, d, e, ...)": a count and the first five."""
    names = [str(item) for item in items]
    return f"{len(names)} {noun} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def faulty(faults: Sequence[str]) -> str:
    """The first five of what is wrong with files, a line each."""
    return "\n  ".join([f"{len(faults)} faulty files:", *faults[:5], *["..."] * (len(faults) > 5)])


def refuse_faulty(faults: Sequence[str]) -> None:
    """DataError that says what is wrong with files and the way out, if there are any."""
    if faults:
        raise DataError(f"{faulty(faults)}\nMend or move them away: a photo without its mask is unlabeled")


def local(path: str | Path) -> Path:
    """Fill in "~"; the home of nobody stays as written, where Path.expanduser raises."""
    return Path(os.path.expanduser(path))


def folder_name(root: str | Path) -> str:
    """Name a person's folder: that of the photos where `mkd prepare` wrote its lists into <photos>/mkd."""
    path = local(root).resolve()
    return path.parent.name if path.name == "mkd" else path.name


def find_root(name: str, root: str, folders: Sequence[str], where: str, below: Sequence[str] = ("",)) -> Path:
    """Find the first of root / below that holds one of `folders` (or just exists), else DataError."""
    if not str(root):
        what = " or ".join(folders) or "the files"
        raise DataError(f"data set {name!r} needs root, the folder that holds {what}. {where}")
    path = local(root)
    for candidate in below:
        if any((path / candidate / folder).is_dir() for folder in folders or ("",)):
            return path / candidate
    found = f"{path} has no folder {' or '.join(folders)}" if path.is_dir() else f"{path} is not a folder"
    raise DataError(f"data set {name!r}: {found}. {where}")


def read_text(path: Path) -> str:
    """Read a text file in UTF-8 or UTF-16, with or without byte order mark, else DataError."""
    try:
        content = path.read_bytes()
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable text file in UTF-8 ({error})") from error


@contextmanager
def _open(path: Path, kind: str) -> Iterator[Image.Image]:
    """Open a picture or mask with PIL; whatever its decoder raises is a DataError."""
    try:
        with Image.open(path) as picture:
            # the second frame of a phone's photo (MPO) is a preview or a depth map
            if (frames := getattr(picture, "n_frames", 1)) > 1 and picture.format != "MPO":
                raise DataError(f"{path}: {frames} pages or frames in one file; save each by itself")
            yield picture
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: this {kind} is missing") from error
    except Exception as error:  # PIL's decoders raise a dozen types on damaged files
        raise DataError(f"{path}: not a readable {kind} ({error})") from error


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation: 1 is upright, 2 to 8 are turned or mirrored."""
    return picture.getexif().get(ExifTags.Base.Orientation, 1)


def read_turned(path: Path) -> tuple[Tensor, bool]:
    """Read a picture as `read_image` does, and whether its EXIF orientation turned it."""
    with _open(path, "picture") as picture:
        turned = _orientation(picture) != 1
        return torch.from_numpy(upright(picture, f"{path}: ")).permute(2, 0, 1).contiguous(), turned


def upright(picture: Image.Image, where: str = "") -> np.ndarray:
    """A PIL picture as (H, W, 3) uint8 RGB, turned by its EXIF orientation; DataError for 16 and 32 bits."""
    if picture.mode.startswith(("I", "F")):
        raise DataError(f"{where}{picture.mode} pictures have 16 or 32 bits a channel; convert to 8")
    return np.array(ImageOps.exif_transpose(picture).convert("RGB"))


def read_image(path: Path) -> Tensor:
    """Read a picture as (3, H, W) uint8 RGB, upright: its EXIF orientation is applied, as viewers do.

    Grey, palette and RGBA pictures are converted; alpha is dropped.
    """
    return read_turned(path)[0]


@contextmanager
def open_mask(path: Path) -> Iterator[Image.Image]:
    """Open a mask with PIL; DataError for formats that change pixels, and for one that viewers turn."""
    with _open(path, "mask") as picture:
        kind, packed = picture.format, picture.info.get("compression")
        # JPEG and WebP change pixels, GIF writers renumber colours
        if kind not in ("PNG", "TIFF", "BMP") or packed in ("jpeg", "webp"):
            raise DataError(f"{path}: a mask is a lossless PNG, TIFF or BMP; this {kind} may change classes")
        yield picture
        if (turned := _orientation(picture)) != 1:
            raise DataError(f"{path}: a mask with EXIF orientation {turned}; save it upright, unmarked")


def stored(picture: Image.Image) -> np.ndarray:
    """The numbers that a mask stores: PIL stretches grey of 2 and 4 bits to 0..255, which is undone."""
    raw = picture.tile[0][3] if picture.tile else ""  # type: ignore[attr-defined]
    kind, numbers = raw if isinstance(raw, str) else raw[0], np.array(picture)
    return numbers // np.uint8({"L;2": 85, "L;4": 17}[kind]) if kind in ("L;2", "L;4") else numbers


def read_label(path: Path, classes: int | None = None) -> Tensor:
    """Read the class indices of a mask as (H, W) uint8; a palette is never applied.

    What the file means is judged from the file itself: its format, bits and pages.
    With `classes`, DataError for a value that is neither in 0..classes-1 nor IGNORE.
    """
    with open_mask(path) as picture:
        if (mode := picture.mode) not in ("L", "P", "1"):
            raise DataError(f"{path}: a mask is a grey or palette PNG of class indices, not of mode {mode}")
        label = stored(picture).astype(np.uint8)
    outside = label[(label >= (classes or IGNORE)) & (label != IGNORE)]
    if outside.size:
        values = f"{', '.join(map(str, np.unique(outside)[:5]))} ({outside.size} pixels)"
        raise DataError(f"{path}: label values {values} outside 0..{(classes or IGNORE) - 1} and {IGNORE}")
    return torch.from_numpy(label)


def decoded(path: Path, read: Callable[[Path], Tensor], cache: Path | None, kind: str = "") -> Tensor:
    """Read a file, or map its numbers into memory from the folder `cache`, where they are kept from the first time on.

    They belong to the file's place, size and time of change, and to `kind`, and are written whole or not at
    all. OSError where they cannot be.
    """
    if cache is None or not path.exists():
        return read(path)
    about = path.stat()
    key = f"{path.absolute()} {about.st_size} {about.st_mtime_ns} {kind}"
    kept = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    if not kept.exists():
        try:
            write_atomically(kept, partial(np.save, arr=read(path).numpy()))
        except OSError as error:
            raise OSError(error.errno, f"cache={cache} cannot take {path.name}: {error.strerror}") from error
    return torch.from_numpy(np.load(kept, mmap_mode="c"))


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture as `read_image` turns it, without its pixels."""
    with _open(path, "picture") as picture:
        return picture.size if _orientation(picture) > 4 else picture.size[::-1]


def read_palette(path: Path) -> bytes:
    """Return the RGB colours of a palette PNG, three bytes an index; b"" for another mask. Decodes no pixel."""
    with _open(path, "mask") as picture:
        palette = picture.palette if (picture.format, picture.mode) == ("PNG", "P") else None
        return bytes(palette.palette) if palette else b""


def colormap(classes: int) -> np.ndarray:
    """Make PASCAL VOC's colours, (classes, 3) uint8: the bits of the index in the high bits of R, G and B."""
    index, colours = np.arange(classes)[:, None], np.zeros((classes, 3), np.int64)
    for bit in range(8):
        colours |= ((index >> (3 * bit + np.arange(3))) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def visible(palette: np.ndarray, classes: Sequence[str] = ()) -> np.ndarray:
    """Mix dark colours (C, 3) uint8 with white, up to twice black's contrast, for pictures; background's stays."""
    mixed = palette + np.linspace(0, 1, 256)[:, None, None] * (255 - palette)  # (256, C, 3)
    luminance = (mixed / 255) ** 2.2 @ (0.2126, 0.7152, 0.0722)
    spared = [name == "background" for name in classes] or [False] * len(palette)
    return np.rint(mixed[((luminance >= 0.05) | spared).argmax(0), np.arange(len(palette))]).astype(np.uint8)
