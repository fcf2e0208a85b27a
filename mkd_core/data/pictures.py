"""Pictures among the files that a person names: files, and folders with all below them."""

import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from .base import DataError, local, some

# Suffixes that are looked for in folders. A file that is named itself is read whatever its suffix.
PICTURES = ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"


def find_pictures(paths: Sequence[str | Path], out: Path, beside: str = "") -> tuple[list[Path], list[str]]:
    """Files as they are and, of folders, every picture at any depth: (pictures, what was left out and why).

    Links are followed. Hidden folders and what lies below `out` are passed over without a word.
    beside: names and suffixes of other files that are wanted.
    """
    files: list[Path] = []
    left_out: list[str] = []
    for path in map(absolute, paths):
        if not path.is_dir():
            files.append(path)
            continue
        found = _search(path, out, (PICTURES + " " + beside).split())
        files += (pictures := sorted(found.pop("", [])))
        for why, others in found.items():
            tell(left_out, why, path, others)
        if not pictures:
            nothing = f"{path}: no picture ({PICTURES}) in or below it" + ", which is --out" * (path == out)
            raise DataError("\n".join([nothing, *left_out]))
    if not files:
        raise DataError("no images given: name files or folders")
    return list(dict.fromkeys(files)), left_out


def tell(left_out: list[str], why: str, top: Path, paths: Collection[Path]) -> None:
    """Add to what was left out and why the files below a folder, if there are any."""
    if paths:
        names = some((path.relative_to(top) for path in sorted(paths)), "files")
        left_out.append(f"Left out, {why}: {names}")


def _search(top: Path, out: Path, wanted: Sequence[str]) -> dict[str, list[Path]]:
    """The files below a folder by the reason why they are left out; "": pictures."""
    found, seen = defaultdict(list), set()
    for folder, below, names in os.walk(top, followlinks=True):
        place = Path(folder)
        if place == out or place.resolve() in seen:  # links may lead in circles
            below.clear()
            continue
        seen.add(place.resolve())
        below[:] = sorted(name for name in below if not name.startswith("."))
        for file in map(place.joinpath, names):
            known = file.suffix.lower() in wanted or file.name in wanted
            why = "" if known else "no known kind of picture (HEIC: convert it)"
            why = "hidden" if file.name[0] == "." else why if file.exists() else "a link to nothing"
            found[why].append(file)
    return found


def absolute(path: str | Path) -> Path:
    """A path from the root, "~" filled in and links left as they are; ValueError for an empty one."""
    if path == "":
        raise ValueError("an empty path: name a file or a folder")
    return Path(os.path.abspath(local(path)))
