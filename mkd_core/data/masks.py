"""What mask files mean: indices, grey levels, colours or black and white; and masks of class indices made from them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .base import IGNORE, DataError, open_mask, read_text, some, stored

VOID = {"void", "ignore", "ignored", "unlabeled", "unlabelled", "__ignore__"}
MOST = 64  # colours or grey levels: more are no classes but a lossy file, or soft edges
INDEX_MODES = ("L", "P", "1")


@dataclass(frozen=True)
class Meaning:
    """How the numbers in mask files become classes.

    read      reads a mask as (H, W) uint8 class indices, 255 ignored
    as_is     whether the files are masks of class indices already
    palette   a colour for each class, None where the files have none
    notes     what was decided, for people
    """

    classes: tuple[str, ...]
    read: Callable[[Path], np.ndarray]
    as_is: bool
    palette: list[list[int]] | None
    notes: list[str]


@dataclass
class _Look:
    """What one mask holds."""

    coloured: bool
    mode: str
    palette: dict[int, tuple[int, ...]]


def understand(
    paths: Sequence[Path], classes: Sequence[str] | int | None, table: dict[tuple[int, ...], str]
) -> Meaning:
    """Judge from all masks what they mean. classes: names, or their number; None: asked for by a DataError.

    table: colour (r, g, b) -> name; {} where there is none.
    """
    looks = each(_look, paths)
    palettes: dict[int, tuple[int, ...]] = {}
    used = [pair for look in looks for pair in look.palette.items()]
    agree = all([palettes.setdefault(k, colour) == colour for k, colour in used])
    colours = bool(table) or not agree or any(look.coloured for look in looks)
    counts, where = Counter[int](), dict[int, Path]()
    for path, found in zip(paths, each(lambda path: _count(path, colours), paths), strict=True):
        for value, count in found.items():
            counts[value] += count
            where.setdefault(value, path)
    if len(counts) > MOST and not table:
        kind, path = "colours" if colours else "values", where[max(counts, key=lambda value: -counts[value])]
        raise DataError(f"the masks hold {len(counts):,} {kind} (rare ones in {path}): classes are {MOST} at most; "
                        "was a mask scaled smoothly, or does it count objects?")  # fmt: skip
    shown = "\n".join(
        f"  {_colour(value) if colours else value}  {100 * count / counts.total():.2f} % of the pixels"
        for value, count in sorted(counts.items())
    )
    names = [f"class {k}" for k in range(classes)] if isinstance(classes, int) else list(classes or [])
    if colours:
        return _of_colours(counts, where, names, table, shown, agree)
    values, said = _of_values(set(counts), names, shown)
    names = names or ["background", "foreground"]
    same = all(value == index for value, index in values.items())
    as_is = same and all(look.mode in INDEX_MODES for look in looks)
    palette = [list(palettes[k]) for k in range(len(names)) if same and k in palettes]
    whole = palette if len(palette) == len(names) else None
    return Meaning(tuple(names), partial(_read, values, False), as_is, whole, [said])


def _of_values(values: set[int], names: list[str], shown: str) -> tuple[dict[int, int], str]:
    """Number -> class of grey levels and indices, and what was decided."""
    proper = sorted(values - {IGNORE, 65535})
    ignored = dict.fromkeys(values - set(proper), IGNORE)
    if values <= {0, IGNORE} and len(names) in (0, 2):
        return {0: 0, IGNORE: 1}, "0 is the first class and 255 the second"
    if len(names) >= 2 and proper and proper[-1] < len(names):
        told = "0 occurs nowhere; " * (0 not in values)
        return {value: value for value in proper} | ignored, f"{told}the numbers in the masks are the classes"
    if values == {0, 1} and not names:
        return {0: 0, 1: 1}, "the numbers in the masks are the classes"
    order = proper if len(proper) == len(names) else sorted(values) if len(values) == len(names) else None
    if order:
        listed = ", ".join(f"{value} is {name}" for value, name in zip(order[:8], names, strict=False))
        return ignored | {value: k for k, value in enumerate(order)}, listed
    have = f"{len(names)} class names do not fit them" if names else "which classes are they?"
    raise DataError(f"the masks hold these numbers:\n{shown}\n{have} Give the names in their order, --classes a,b,c "
                    f"({len(proper)} for the numbers without {IGNORE}), or their count alone")  # fmt: skip


def _of_colours(
    counts: Counter[int], where: dict[int, Path], names: list[str], table: dict[tuple[int, ...], str], shown: str, agree: bool
) -> Meaning:  # fmt: skip
    notes = ["colours are read as classes", *["as palettes differ in their order"] * (not agree)]
    if table:
        known = {r << 16 | g << 8 | b: name for (r, g, b), name in table.items()}
        if other := [f"{_colour(value)} in {where[value].name}" for value in counts if value not in known]:
            raise DataError(f"{some(other, 'colours')} of the masks are not in the colour table")
        void = [name for name in known.values() if name.lower() in VOID]
        names = list(dict.fromkeys(name for name in known.values() if name not in void))
        values = {value: IGNORE if name in void else names.index(name) for value, name in known.items()}
        notes += [f"ignored: {', '.join(void)}"] * bool(void)
    else:
        if len(names) != len(counts):
            have = f"{len(names)} names do not fit" if names else "which classes are they?"
            raise DataError(f"the masks hold {len(counts)} colours:\n{shown}\n{have} Give the names in this order, "
                            "--classes a,b,c (void: ignored), or a table, --colours FILE with lines 'r g b name'")  # fmt: skip
        order = [name for name in names if name.lower() not in VOID]
        named = dict(zip(sorted(counts), names, strict=True))
        values = {value: order.index(n) if n in order else IGNORE for value, n in named.items()}
        notes += [f"{_colour(value)} is {name}" for value, name in named.items()]
        names = order
    first = {index: value for value, index in reversed(values.items())}
    palette = [[first[k] >> 16, first[k] >> 8 & 255, first[k] & 255] for k in range(len(names))]
    return Meaning(tuple(names), partial(_read, values, True), False, palette, notes)


def read_table(path: Path) -> dict[tuple[int, ...], str]:
    """Read colour -> name from lines with three numbers and a name, in either order, parted by spaces, commas or colons."""
    table = {}
    for line in read_text(path).splitlines():
        found = re.search(r"(?<!\d)(\d+)[\s,;]+(\d+)[\s,;]+(\d+)(?![\s,;]*\d)", line)
        name = (line[: found.start()] + " " + line[found.end() :]).strip(" \t,;:") if found else ""
        if found and name and not line.startswith("#"):
            table[tuple(map(int, found.groups()))] = re.sub(r"^\d+[\s,;:]+", "", name)
    if not table or any(part > 255 for colour in table for part in colour):
        raise DataError(f"{path}: no colour table: a line holds red, green and blue (0..255) and a name")
    return table


def each(look, paths):  # type: ignore[no-untyped-def]
    """What `look` says of each path, in threads."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(look, paths))


def _look(path: Path) -> _Look:
    with open_mask(path) as picture:
        mode, pixels, palette = picture.mode, np.array(picture), picture.getpalette() or []
    coloured = mode in ("RGB", "RGBA") and bool((pixels[..., :3] != pixels[..., :1]).any())
    used = np.flatnonzero(np.bincount(pixels.ravel())).tolist() if mode == "P" else ()
    return _Look(coloured, mode, {k: tuple(palette[3 * k : 3 * k + 3]) for k in used})


def _read(values: dict[int, int], colours: bool, path: Path) -> np.ndarray:
    """Read a mask by number -> class; a colour is the number r * 65536 + g * 256 + b."""
    keys = np.array(sorted(values))
    indices = np.array([values[key] for key in keys.tolist()], np.uint8)
    return indices[np.searchsorted(keys, _numbers(path, colours))]


def _numbers(path: Path, colours: bool) -> np.ndarray:
    """(H, W) int32 of a mask: colours as one number, or what is stored."""
    with open_mask(path) as picture:
        if colours:
            red, green, blue = np.moveaxis(np.array(picture.convert("RGB"), np.int32), -1, 0)
            return red << 16 | green << 8 | blue
        numbers = stored(picture).astype(np.int32)
        return numbers if numbers.ndim == 2 else numbers[..., 0]


def _count(path: Path, colours: bool) -> dict[int, int]:
    values, counts = np.unique(_numbers(path, colours), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _colour(value: int) -> str:
    return f"({value >> 16}, {value >> 8 & 255}, {value & 255})"
