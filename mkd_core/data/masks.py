"""What mask files mean: indices, grey levels, colours or black and white; and masks of class indices made from them."""

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


def understand(
    paths: Sequence[Path], classes: Sequence[str] | int | None, table: dict[tuple[int, ...], str]
) -> Meaning:
    """Judge from all masks what they mean. classes: names, or their number; None: asked for by a DataError.

    table: colour (r, g, b) -> name; {} where there is none.
    """
    modes, coloured, used = zip(*each(_look, paths), strict=True)
    palettes: dict[int, tuple[int, ...]] = {}
    agree = all([palettes.setdefault(k, colour) == colour for of in used for k, colour in of.items()])
    colours = bool(table) or not agree or any(coloured)
    counts, where = Counter[int](), dict[int, Path]()
    counted = each(lambda path: np.unique(_numbers(path, colours), return_counts=True), paths)
    for path, (values, times) in zip(paths, counted, strict=True):
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
        where = dict.fromkeys(values.tolist(), path) | where
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
        return _of_colours(where, names, table, shown, agree)
    if not names and (counts.keys() <= {0, IGNORE} or counts.keys() == {0, 1}):
        names = ["background", "foreground"]
    classes_of, said = _of_values(set(counts), names, shown)
    same = all(value == index for value, index in classes_of.items())
    as_is = same and {*modes} <= {"L", "P", "1"}
    palette = [list(palettes[k]) for k in range(len(names)) if same and k in palettes]
    whole = palette if len(palette) == len(names) else None
    return Meaning(tuple(names), partial(_read, classes_of, False), as_is, whole, [said])


def _of_values(values: set[int], names: list[str], shown: str) -> tuple[dict[int, int], str]:
    """Number -> class of grey levels and indices, and what was decided."""
    proper = sorted(values - {IGNORE, 65535, -1})
    ignored = dict.fromkeys(values - set(proper), IGNORE)
    if values <= {0, IGNORE} and len(names) == 2:
        return {0: 0, IGNORE: 1}, "0 is the first class and 255 the second"
    if len(names) >= 2 and proper and 0 <= proper[0] <= proper[-1] < len(names):
        told = "0 occurs nowhere; " * (0 not in values)
        return {value: value for value in proper} | ignored, f"{told}the numbers in the masks are the classes"
    order = proper if len(proper) == len(names) else sorted(values) if len(values) == len(names) else None
    if order:
        listed = ", ".join(f"{value} is {name}" for value, name in zip(order[:8], names, strict=False))
        return ignored | {value: k for k, value in enumerate(order)}, listed
    have = f"{len(names)} class names do not fit them." if names else "which classes are they?"
    raise DataError(f"the masks hold these numbers:\n{shown}\n{have} Give the names in their order, --classes a,b,c, in Python classes=[...] "
                    f"({len(proper)} for the numbers without {IGNORE}), or their count alone")  # fmt: skip


def _of_colours(
    where: dict[int, Path], names: list[str], table: dict[tuple[int, ...], str], shown: str, agree: bool
) -> Meaning:
    """Name the colours, of which `where` has each with a mask, by the table or in their order."""
    notes = ["colours are read as classes", *["as palettes differ in their order"] * (not agree)]
    if not table and len(names) != len(where):
        have = f"{len(names)} names do not fit." if names else "which classes are they?"
        raise DataError(f"the masks hold {len(where)} colours:\n{shown}\n{have} Give the names in this order, "
                        "--classes a,b,c (void: ignored), or a table, --colours FILE with lines 'r g b name'")  # fmt: skip
    named = {r << 16 | g << 8 | b: name for (r, g, b), name in table.items()}
    named = named or dict(zip(sorted(where), names, strict=True))
    if other := [f"{_colour(value)} in {path.name}" for value, path in where.items() if value not in named]:
        raise DataError(f"{some(other, 'colours')} of the masks are not in the colour table")
    void = [name for name in named.values() if name.lower() in VOID]
    names = list(dict.fromkeys(name for name in named.values() if name not in void))
    values = {value: IGNORE if name in void else names.index(name) for value, name in named.items()}
    notes += [f"ignored: {', '.join(void)}"] if void else []
    notes += [] if table else [f"{_colour(value)} is {name}" for value, name in named.items()]
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


def _look(path: Path) -> tuple[str, bool, dict[int, tuple[int, ...]]]:
    """The mode of a mask, whether it is coloured, and its palette as far as it is used."""
    with open_mask(path) as picture:
        mode, pixels, palette = picture.mode, np.array(picture), picture.getpalette() or []
    coloured = mode in ("RGB", "RGBA") and bool((pixels[..., :3] != pixels[..., :1]).any())
    used = np.unique(pixels).tolist() if mode == "P" else ()
    return mode, coloured, {k: tuple(palette[3 * k : 3 * k + 3]) for k in used}


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
        numbers = stored(picture)
        if numbers.dtype.kind == "f" and (numbers % 1 != 0).any():  # NaN too
            raise DataError(f"{path}: a mask holds whole numbers, this one has fractions or NaN")
        return (numbers if numbers.ndim == 2 else numbers[..., 0]).astype(np.int32)


def _colour(value: int) -> str:
    return f"({value >> 16}, {value >> 8 & 255}, {value & 255})"
