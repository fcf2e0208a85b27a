"""Pictures: label maps, comparison sheets (the paper's Figures 1 and 2), curves over seeds, confusion matrices, FDA tables.

Every function returns a matplotlib Figure of its own, outside pyplot's registry: nothing is shown twice and nothing leaks. Colours are
Okabe and Ito's, lines differ in dash and marker too, so that prints in grey can be read. `save` writes PNG files.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..augment import MEAN, STD, chain, mix, xor_boxes
from ..data.base import IGNORE
from ..data.shapes import Shapes
from ..metrics import confusion_matrix, miou
from ..records import Cells, Rows, write_atomically

Array = NDArray[Any]
INK, GREY, LIGHT = "#222222", "#8a8a8a", "#dcdcdc"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#9c4083"
COLOURS = (GREY, ORANGE, BLUE, GREEN, "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("--", "-.", "-", ":", (0, (5, 1)))  # 5, 7 and 9 have no common divisor: 35 methods until a line repeats
MARKERS = "osD^vP*X<"
# A method's place in these; the first seven, which are most often shown together, have a colour of their own.
PLACES = {"SupOnly": 0, "CPS": 1, "co-training": 1, "MKD": 2, "MT": 3, "CutMix-Seg": 4, "CPS with CutMix": 5, "MKD (released)": 6} | {
    name: 7 + k for k, name in enumerate(("CCT", "GCT", "VAT", "AdvSemSeg", "PseudoSeg", "PC2Seg", "ST++", "PS-MT", "U2PL", "SimpleBaseline",
                                          "FixMatch", "UniMatch", "SPEED"))
}  # fmt: skip
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "grid.color": LIGHT, "grid.linewidth": 0.6, "legend.frameon": False, "lines.linewidth": 1.6, "mathtext.fontset": "cm",
    "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip
styled = matplotlib.rc_context(STYLE)


class Picture(Figure):
    """A Figure that notebooks show as PNG without any backend."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        return buffer.getvalue()

    def _repr_html_(self) -> None:
        return None


def _plain(name: str) -> str:
    """A name as it is: matplotlib sets what stands between two $ as mathematics."""
    return name.replace("$", r"\$")


def save(figure: Figure, path: str | Path) -> Path:
    """PNG at 200 dpi, whole or not at all, equal bytes for equal pictures (no time stamp)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, bbox_inches="tight", pad_inches=0.05)
    write_atomically(path, buffer.getvalue())
    return path


# Images and label maps as RGB arrays.


def to_image(image: Tensor) -> Array:
    """(3, H, W), uint8 or normalised float -> (H, W, 3) float in [0, 1]."""
    array = image.detach().cpu().permute(1, 2, 0).numpy()
    return array / 255 if array.dtype == np.uint8 else np.clip(array * STD + MEAN, 0, 1)


def colourise(label: ArrayLike, palette: Array) -> Array:
    """(H, W) ints -> (H, W, 3) float in [0, 1]: the class's colour of palette (C, 3) uint8; IGNORE is hatched in two light greys."""
    label = np.asarray(label)
    stripes = np.add.outer(*map(np.arange, label.shape)) // max(2, label.shape[0] // 24) % 2
    ignored = np.where(stripes, 0.93, 0.8)[..., None]
    return np.where((label == IGNORE)[..., None], ignored, palette[np.where(label == IGNORE, 0, label)] / 255)


def overlay(image: Array, label: ArrayLike, palette: Array, alpha: float = 0.5) -> Array:
    """image (H, W, 3) float under its label map (H, W); IGNORE pixels show the image alone."""
    label = np.asarray(label)
    share = np.where(label == IGNORE, 0, alpha)[..., None]
    return (1 - share) * image + share * colourise(label, palette)


@styled
def sheet(
    rows: Mapping[str, Sequence[ArrayLike]], *, palette: Array | None = None, classes: Sequence[str] = (), titles: Sequence[str] = (),
    notes: Mapping[str, Sequence[str]] | None = None, caption: str = "", side: float = 1.15,
) -> Figure:  # fmt: skip
    """A grid of pictures, one named row of n columns each, with a legend of the classes and a caption below.

    An entry is an image (H, W, 3), a label map (H, W) of ints (coloured by palette), a bool map (black is False) or a float map in [0, 1]
    (with a colour bar). titles stand over the columns, notes[row] in the corners of a row's pictures, `side` is a width in inches.
    """
    arrays = {name: [a.detach().cpu().numpy() if isinstance(a, Tensor) else np.asarray(a) for a in row] for name, row in rows.items()}
    columns = max(map(len, arrays.values()))
    tall = side * np.mean([a.shape[0] / a.shape[1] for row in arrays.values() for a in row])
    lines = 1 + caption.count("\n") if caption else 0
    # A name stands upright beside its row of pictures.
    names = {name: fill(_plain(name), max(6, int(tall / 0.075)), break_long_words=False) for name in arrays}
    left = 0.14 + 0.16 * max(1 + name.count("\n") for name in names.values())
    width = side * columns + left + 0.02
    keys = [
        Patch(fc=c / 255, ec=INK, lw=0.4, label=n) for c, n in zip(() if palette is None else palette, map(_plain, classes), strict=False)
    ]
    if keys and any((a == IGNORE).any() for row in arrays.values() for a in row if a.ndim == 2 and a.dtype.kind in "iu"):
        keys.append(Patch(fc="0.93", ec="0.6", hatch="/////", lw=0.4, label="no label"))
    deep = -(-len(keys) // max(3, int(width / 0.95)))  # lines of the legend
    foot, head = 0.1 + 0.19 * deep + 0.06 * bool(keys) + 0.17 * lines, 0.25 if titles else 0.05
    height = tall * len(arrays) + foot + head
    figure = Picture(figsize=(width, height))
    axes = figure.subplots(len(arrays), columns, squeeze=False)
    scaled: Axes | None = None  # the last picture of a row of float maps, the colour bar's neighbour
    for (name, row), strip in zip(arrays.items(), axes, strict=True):
        strip[0].set_ylabel(names[name], fontsize=9, linespacing=1.0)
        for k, ax in enumerate(strip):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if k >= len(row):
                continue
            picture, how = row[k], {}
            if picture.ndim == 2 and picture.dtype.kind == "f":
                scaled, how = ax, {"cmap": "cividis", "vmin": 0, "vmax": 1}
            elif picture.ndim == 2 and picture.dtype.kind == "b":
                how = {"cmap": "gray", "vmin": 0, "vmax": 1}
            elif picture.ndim == 2:
                picture = colourise(picture, palette if palette is not None else np.zeros((IGNORE, 3)))
            ax.imshow(picture, interpolation="nearest", **how)
            if notes and name in notes:
                place = {"ha": "right", "va": "bottom", "transform": ax.transAxes, "fontsize": 7, "color": "white"}
                ax.text(0.97, 0.03, notes[name][k], bbox={"facecolor": "black", "alpha": 0.65, "pad": 1.2, "linewidth": 0}, **place)
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title, fontsize=8, pad=3)
    figure.subplots_adjust(left / width, foot / height, 1 - 0.02 / width, 1 - head / height, 0.04, 0.04)
    if scaled is not None:
        beside = scaled.get_position()
        bar = figure.add_axes((beside.x1 + 0.05 / width, beside.y0, 0.09 / width, beside.height))
        figure.colorbar(ScalarMappable(cmap="cividis"), cax=bar)
        bar.tick_params(labelsize=7)
    middle = (width + left) / 2 / width
    if keys:
        place = {"loc": "upper center", "bbox_to_anchor": (middle, (foot - 0.04) / height)}
        figure.legend(handles=keys, ncols=-(-len(keys) // deep), handlelength=1.1, columnspacing=1.2, **place)
    figure.text(middle, (0.17 * lines + 0.02) / height, caption, ha="center", va="top", fontsize=7.5, linespacing=1.25)
    return figure


def pick(
    truth: Sequence[ArrayLike], first: Sequence[ArrayLike], second: Sequence[ArrayLike], columns: int, seed: int
) -> tuple[list[int], Array]:
    """Which images a comparison shows, and the per-image mIoU (2, n) of both methods.

    A quarter of the columns: largest gains of `second` over `first`; a quarter: largest losses (or least gains); the rest: drawn
    from `seed` among the others. All are label maps (H, W); a per-image mIoU is over the classes that occur or are predicted there.
    """
    top = 1 + max(int(m[m != IGNORE].max(initial=0)) for m in map(np.asarray, [*truth, *first, *second]))
    pairs = [[(torch.as_tensor(p), torch.as_tensor(y)) for p, y in zip(maps, truth, strict=True)] for maps in (first, second)]
    scores = np.array([[miou(confusion_matrix(p, y, top)) for p, y in row] for row in pairs])
    order = np.argsort(scores[0] - scores[1], kind="stable")
    columns = min(columns, len(order))
    quarter = columns // 4
    ends = [*order[:quarter], *order[len(order) - quarter :]]
    rest = np.random.default_rng(seed).permutation(np.setdiff1d(order, ends))
    return [int(i) for i in [*ends, *rest[: columns - len(ends)]]], scores


def figure2(
    images: Sequence[Tensor], truth: Sequence[ArrayLike], predictions: Mapping[str, Sequence[ArrayLike]], palette: Array,
    classes: Sequence[str], *, columns: int = 8, seed: int = 0,
) -> Figure:  # fmt: skip
    """The paper's Figure 2: input, ground truth and one row for each method; columns chosen by `pick` on the last two methods.

    images (3, H, W) uint8 or normalised, truth and predictions (H, W) ints. The caption states the rule, the corners the per-image mIoU.
    """
    (first, a), (second, b) = list(predictions.items())[-2:]
    chosen, scores = pick(truth, a, b, columns, seed)
    rows: dict[str, list[ArrayLike]] = {"input": [to_image(images[i]) for i in chosen], "ground truth": [truth[i] for i in chosen]}
    rows |= {name: [maps[i] for i in chosen] for name, maps in predictions.items()}
    notes = {name: [f"{row[i]:.0f}" for i in chosen] for name, row in zip((first, second), scores, strict=True)}
    quarter = len(chosen) // 4
    titles = [f"{scores[1, i] - scores[0, i]:+.0f}" for i in chosen]
    caption = (
        f"First {quarter}: largest gains of {second} over {first}; next {quarter}: largest losses\n"
        f"(or least gains); the others: drawn at random (seed {seed}) from the {len(truth)} images.\n"
        f"Corners: per-image mIoU in %; above: {second} minus {first}."
    )
    return sheet(rows, palette=palette, classes=classes, titles=titles, notes=notes, caption=caption)


# Numbers over training and over seeds.


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, dash and marker for each name: a method of the paper's tables has its own in every figure, other names take free ones."""
    names, taken = list(names), dict[str, int]()
    for name in sorted(names, key=lambda name: name not in PLACES):
        place = PLACES.get(name)
        free = next(k for k in count(1) if k not in taken.values())
        taken[name] = free if place is None or place in taken.values() else place
    return {
        name: {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)], "marker": MARKERS[k % len(MARKERS)]}
        for name, k in ((name, taken[name]) for name in names)
    }


def _legend(figure: Figure, ax: Axes) -> None:
    """Names in as many columns as the figure's width holds."""
    handles, names = ax.get_legend_handles_labels()
    wide = 0.5 + 0.065 * max(map(len, names), default=1)  # inches
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, min(len(names), int(figure.get_figwidth() / wide))))


def _name_ends(ax: Axes, ends: Mapping[str, tuple[float, float]], look: Mapping[str, Mapping[str, Any]], gap: float) -> None:
    """Names right of the axes at the height of their points (x, y), at least `gap` (share of the height) apart, with leaders."""
    low, high = ax.get_ylim()
    order = sorted(ends, key=lambda name: ends[name][1])
    places = [(ends[name][1] - low) / (high - low) for name in order]
    for k in range(1, len(places)):
        places[k] = max(places[k], places[k - 1] + gap)
    places = [min(place, 1 - gap * k) for k, place in zip(reversed(range(len(places))), places, strict=True)]
    for name, place in zip(order, places, strict=True):
        leader = {"arrowstyle": "-", "color": look[name]["color"], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
        ax.annotate(
            _plain(name), ends[name], (1.04, place), "data", "axes fraction", leader, annotation_clip=False, va="center", fontsize=8
        )


@styled
def lines(series: Mapping[str, tuple[ArrayLike, ArrayLike]], xlabel: str, ylabel: str) -> Figure:
    """One named line for each (x, y)."""
    figure = Picture(figsize=(4.6, 2.7), layout="constrained")
    ax = figure.subplots()
    for (name, (x, y)), look in zip(series.items(), looks(series).values(), strict=True):
        ax.plot(x, y, label=_plain(name), **look | {"marker": ""})
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(axis="y")
    ax.legend()
    return figure


def terms(history: Sequence[Mapping[str, Any]]) -> Figure:
    """The loss and its weighted terms of one run against the step, from its history rows."""
    steps = [row["step"] for row in history]
    names = [key for key in history[0] if key.startswith("term/")]
    series = {name.removeprefix("term/"): (steps, [row[name] for row in history]) for name in names}
    return lines(series | {"loss (their sum)": (steps, [row["loss"] for row in history])}, "step", "weighted term")


@styled
def terms_of(histories: Mapping[str, Sequence[Mapping[str, Any]]], across: int = 4) -> Figure:
    """The weighted terms of one run of each method against the step, side by side; a logarithmic axis, since their sizes differ."""
    down = -(-len(histories) // across)
    figure = Picture(figsize=(2.3 * across, 1.75 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
    for ax, (method, history) in zip(axes, histories.items(), strict=False):
        names = sorted({key for row in history for key in row if key.startswith("term/")}, key=lambda name: (name != "term/sup", name))
        for name, colour in zip(names, (INK, BLUE, ORANGE, GREEN, "#CC79A7"), strict=False):
            points = [(row["step"], row[name]) for row in history if row.get(name)]  # 0 has no place on the axis
            ax.plot(*zip(*points, strict=True) if points else ([], []), color=colour, linewidth=1.1, label=name.removeprefix("term/"))
        ax.set_yscale("log")
        ax.set_title(_plain(method), fontsize=8.5)
        ax.tick_params(labelsize=6.5)
        ax.legend(fontsize=6, handlelength=1, loc="best", frameon=True, framealpha=0.75, edgecolor="none", borderpad=0.1, labelspacing=0.15)
    for ax in axes[len(histories) :]:
        ax.remove()
    figure.supxlabel("step", fontsize=8.5)
    figure.supylabel("weighted term", fontsize=8.5)
    return figure


@styled
def bars(groups: Mapping[str, Sequence[float]], names: Sequence[str], ylabel: str = "", form: str = "{:.2f}") -> Figure:
    """Grouped bars with their values: groups[name] has one value for each of `names`."""
    figure = Picture(figsize=(1.6 + 0.85 * len(names) * max(1, len(groups) / 2), 2.6), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(groups)
    for k, (name, values) in enumerate(groups.items()):
        places = np.arange(len(names)) + (k - (len(groups) - 1) / 2) * width
        drawn = ax.bar(places, values, 0.92 * width, color=(BLUE, ORANGE, GREEN, GREY)[k % 4], label=name)
        ax.bar_label(drawn, [form.format(v) for v in values], padding=2, fontsize=7.5)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set_xticks(range(len(names)), names, fontsize=9)
    ax.set_ylabel(ylabel)
    ax.margins(y=0.15)
    if len(groups) > 1:
        figure.legend(loc="outside upper center", ncols=len(groups))
    return figure


@styled
def curves(rows: Rows) -> Figure:
    """mIoU against step for each method, mean and min .. max over its runs (seeds); and what became of the pseudo-labels.

    The first panel shows the reported (first) predictor; the others the labeler (the first teacher, else the first predictor), where
    withheld labels exist: share of pixels with confidence >= T, and accuracy of those.
    """
    panels = [("mIoU (%)", "miou", "")]
    if any("pseudo_labels" in found for records in rows.values() for r in records for found in r.evaluations):
        panels += [("pixels kept (%)", "pseudo_labels", "kept"), ("accuracy of kept pixels (%)", "pseudo_labels", "accuracy")]
    tall = 2.9 + 0.08 * max(0, len(rows) - 4)  # room for the legend
    figure, look = Picture(figsize=(0.6 + 2.9 * len(panels), tall), layout="constrained"), looks(rows)
    for ax, (ylabel, key, part) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, runs in rows.items():
            points = [(found["step"], _of_labeler(found[key], part)) for run in runs for found in run.evaluations if key in found]
            if points:
                spread = pd.DataFrame(points, columns=["step", "value"]).astype(float).groupby("step")["value"].agg(["mean", "min", "max"])
                known = sum(any(key in found for found in run.evaluations) for run in runs)  # old records are without them
                seeds = f" ({known if known == len(runs) else f'{known} of {len(runs)}'} seeds)" if len(runs) > 1 else ""
                ax.plot(spread.index, spread["mean"], label=_plain(name) + seeds, markersize=3, **look[name])
                ax.fill_between(spread.index, spread["min"], spread["max"], color=look[name]["color"], alpha=0.18, linewidth=0)
        ax.set(xlabel="step", ylabel=ylabel)
        ax.grid(axis="y")
    _legend(figure, figure.axes[0])
    return figure


def _of_labeler(found: Mapping[str, Any], part: str) -> Any:
    """The value of the reported predictor, or, for a part of its pseudo-label quality, of the network that labels."""
    first = next(iter(found))
    return found[next((name for name in found if name.startswith("teacher")), first)][part] if part else found[first]


@styled
def seeds(rows: Rows) -> Figure:
    """Every run's mIoU for each method; a bar is the mean, a thin line joins the runs of one seed."""
    table = pd.DataFrame([(name, r.seed, r.miou) for name, records in rows.items() for r in records], columns=["method", "seed", "miou"])
    figure = Picture(figsize=(5.2, 0.6 + 0.3 * len(rows)), layout="constrained")
    ax = figure.subplots()
    paired = table.pivot_table(index="seed", columns="method", values="miou").reindex(columns=list(rows))
    for _, values in paired.iterrows():
        ax.plot(values, range(len(rows)), color=LIGHT, linewidth=0.8, zorder=0)
    for k, (name, look) in enumerate(looks(rows).items()):
        values = table.miou[table.method == name]
        ax.plot(values, [k] * len(values), **look | {"linestyle": ""}, markersize=5, alpha=0.9)
        if len(values):
            ax.plot([values.mean()] * 2, [k - 0.3, k + 0.3], color=INK, linewidth=1.6)
            ax.annotate(f"{values.mean():.1f}", (1.01, k), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [*map(_plain, rows)])
    ax.set(xlabel="mIoU (%); at the right: mean", ylim=(len(rows) - 0.5, -0.5))
    ax.grid(axis="x")
    return figure


def label_counts(cells: Cells) -> Figure:
    """mIoU against the number of labeled images for every method, over all columns: lines join means, dots are single runs."""
    points = {name: [(r.split["labeled"], r.miou) for found in of.values() for r in found] for name, of in cells.items()}
    figure = _against(points, "labeled images")
    counts = sorted({x for of in points.values() for x, _ in of})
    figure.axes[0].set_xscale("log")
    figure.axes[0].set_xticks(counts, [str(n) for n in counts])
    figure.axes[0].set_xticks([], minor=True)
    return figure


def cost(rows: Rows, times: Mapping[str, float]) -> Figure:
    """mIoU against the time of a training step, as a ratio (`mkd_core.cost`): small dots runs, large ones means."""
    figure = _against({name: [(times[name], r.miou) for r in records] for name, records in rows.items()}, "time of a step (1 = SupOnly)")
    figure.axes[0].set_xlim(0, None)
    return figure


@styled
def _against(points: Mapping[str, Sequence[tuple[float, float]]], xlabel: str) -> Figure:
    """mIoU of single runs (x, mIoU) as small dots and their means, one for each x, named at the right."""
    points = {name: runs for name, runs in points.items() if runs}
    figure, look, ends = Picture(figsize=(5.6, max(2.9, 0.6 + 0.19 * len(points))), layout="constrained"), looks(points), {}
    ax = figure.subplots()
    for name, runs in points.items():
        table = pd.DataFrame(runs, columns=["x", "miou"])
        means = table.groupby("x", as_index=False).mean()
        ax.plot(table.x, table.miou, **look[name] | {"linestyle": "", "marker": "."}, markersize=4, alpha=0.5)
        ax.plot(means.x, means.miou, **look[name], markersize=5.5)
        ends[name] = (means.x.iloc[-1], means.miou.iloc[-1])
    ax.set(xlabel=xlabel, ylabel="mIoU (%)")
    ax.margins(y=0.08)
    ax.grid()
    _name_ends(ax, ends, look, 0.17 / (figure.get_figheight() - 0.5))
    return figure


@styled
def class_iou(rows: Rows, over: str = "") -> Figure:
    """IoU of each class for each method; with `over`, the name of a row, its gain on that row's run of the same seed.

    Dots are means over runs, whiskers min .. max; above eight methods a table of means. A class that neither occurs nor is predicted in a run
    is left out of it.
    """
    classes = next(r.classes for records in rows.values() for r in records)
    base = {r.seed: np.array(r.iou, float) for r in rows[over]} if over else {}
    shown = {
        name: pd.DataFrame(
            [np.array(r.iou, float) - base.get(r.seed, np.nan if over else 0) for r in records], columns=range(len(classes)), dtype=float
        )
        for name, records in rows.items()
        if name != over
    }
    xlabel = f"IoU minus {_plain(over)}'s (points)" if over else "IoU (%)"
    if len(shown) > 8:
        means = [values.mean() for values in shown.values()]
        how = {"center": 0, "cmap": "vlag"} if over else {"cmap": "Blues", "vmin": 0, "vmax": 100}
        return _heat(means, classes, [*shown], ".1f", "", "", xlabel, **how)
    figure = Picture(figsize=(4.6, 0.9 + max(0.3, 0.07 * len(rows)) * len(classes)), layout="constrained")
    ax = figure.subplots()
    every = looks(rows)
    for k, (name, values) in enumerate(shown.items()):
        look = every[name]
        places = np.arange(len(classes)) + 0.72 * ((k + 0.5) / len(shown) - 0.5)
        ax.hlines(places, values.min(), values.max(), color=look["color"], linewidth=1.2)
        ax.plot(values.mean(), places, **look | {"linestyle": ""}, markersize=4.5, label=_plain(name))
    ax.set_yticks(range(len(classes)), [*map(_plain, classes)])
    ax.set(xlabel=xlabel, ylim=(len(classes) - 0.5, -0.5))
    if over:
        ax.axvline(0, color=INK, linewidth=0.8)
    else:
        ax.set_xlim(0, 100)
    ax.grid(axis="x")
    ax.hlines(np.arange(len(classes) - 1) + 0.5, *ax.get_xlim(), color=LIGHT, linewidth=0.6)
    _legend(figure, ax)
    return figure


def of_table(cells: Cells, title: str, against: str = "") -> dict[str, Figure]:
    """The pictures of a table, by the names of their files; none where no run of the column `title` is done.

    curves, classes (IoU minus that of the row `against`, where it ran) and the confusion of the first row are this column's; labels, mIoU
    against the number of labeled images, is over the columns of the same encoder and the same family of lists (‡ marks U2PL's).
    """
    ran = {row: list(of[title]) for row, of in cells.items() if of.get(title)}
    if not ran:
        return {}
    pictures = {"curves": curves(ran)} if any(r.evaluations for found in ran.values() for r in found) else {}
    pictures["classes"] = class_iou(ran, over=against if against in ran and len(ran) > 1 else "")
    first = next(iter(ran.values()))
    if counts := [r.confusion for r in first if r.confusion]:
        pictures["confusion"] = confusion(counts, first[0].classes)
    encoder = first[0].config["encoder"]
    alike = {
        row: {t: [r for r in found if r.config["encoder"] == encoder] for t, found in of.items() if ("‡" in t) == ("‡" in title)}
        for row, of in cells.items()
    }
    if len({r.split["labeled"] for of in alike.values() for found in of.values() for r in found}) > 1:
        pictures["labels"] = label_counts(alike)
    return pictures


# Tables over classes.


@styled
def _heat(
    table: ArrayLike, across: Sequence[str], down: Sequence[str], form: str, xlabel: str, ylabel: str, bar: str, **how: Any
) -> Figure:  # fmt: skip
    """A coloured table with its numbers, square where both sides name the same."""
    numbers = len(across) <= 25  # above, the cells shrink with their number, and so do the names
    wide, tall = (max(2.6, 0.5 * min(25, len(names))) for names in (across, down if down is across else down[::2]))
    figure = Picture(figsize=(wide + 1.5, tall + 0.5), layout="constrained")
    ax = figure.subplots()
    names = {"xticklabels": [*map(_plain, across)], "yticklabels": [*map(_plain, down)], "annot": numbers, "annot_kws": {"fontsize": 7.5}}
    how |= {"fmt": form, "square": down is across, "linewidths": 0.6, "cbar_kws": {"label": bar, "shrink": 0.8}}
    sns.heatmap(np.asarray(table), ax=ax, **how, **names)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.tick_params(axis="x", labelrotation=45, length=0)
    ax.tick_params(axis="y", labelrotation=0, length=0)
    for text in ax.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")
    for labels, side, of in ((ax.get_xticklabels(), wide, across), (ax.get_yticklabels(), tall, down)):
        for text in labels:
            text.set_fontsize(min(8.0, 50 * side / len(of)))
    return figure


def confusion(matrix: ArrayLike, classes: Sequence[str]) -> Figure:
    """(C, C) counts by (truth, prediction), or (n, C, C) of n runs, which are added up; shown in percent of each true class."""
    counts = np.asarray(matrix, float)
    counts = counts.reshape(-1, *counts.shape[-2:]).sum(0)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return _heat(shares, classes, classes, ".0f", "prediction", "ground truth", "% of the true class's pixels", cmap="Blues")


def table_heat(table: Tensor, classes: Sequence[str]) -> Figure:
    """FDA's (C, C) table: row c is added to the logits of a pixel labelled c."""
    values = table.detach().cpu().numpy()
    return _heat(values, classes, classes, ".2f", "logit $j$ that rises", "label $c$ of the pixel", "added to the logit", cmap="YlOrBr")


# The paper's Figure 1.


@styled
def figure1(pictures: Mapping[str, Array] | None = None) -> Figure:
    """MKD as a diagram, our drawing of the paper's Figure 1: solid arrows are data and supervision, dashed ones the moving average.

    pictures: (H, W, 3) floats for "image", "weak", "strong", "labeled" and "label"; without them, views of the embedded data set.
    """
    pictures = pictures or _example_views()
    figure = Picture(figsize=(10, 6.84))
    ax = figure.add_axes((0, 0, 1, 1))
    level = {"t1": 5.2, "s1": 3.5, "s2": 1.9, "t2": 0.2}

    def box(x: float, y: float, text: str, colour: str, wide: float = 1.5, tall: float = 0.74) -> None:
        style = "round,pad=0,rounding_size=0.1"
        ax.add_patch(FancyBboxPatch((x - wide / 2, y - tall / 2), wide, tall, boxstyle=style, fc=colour + "1f", ec=colour, lw=1.4))
        ax.text(x, y, text, ha="center", va="center", linespacing=1.2)

    def node(x: float, y: float, text: str, colour: str) -> None:
        ax.plot(x, y, "o", markersize=31, color=colour, zorder=3)
        ax.text(x, y, text, ha="center", va="center", fontsize=12, color="white", zorder=4)

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = INK, **how: Any) -> None:
        how = {"linewidth": 1.4, "shrinkA": 0, "shrinkB": 0} | how
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, **how))

    def picture(name: str, x: float, y: float, text: str, side: float = 1.05) -> None:
        half = side / 2
        ax.imshow(pictures[name], extent=(x - half, x + half, y - half, y + half), interpolation="nearest", zorder=2)
        ax.text(x, y - half - 0.08, text, ha="center", va="top", fontsize=8.5, linespacing=1.1)

    # Views and networks, one row for each of the four networks.
    picture("image", 0.9, 2.7, "unlabeled\nimage $x^u$")
    for name, y, text in (
        ("weak", 5.2, "weak view"),
        ("strong", 2.7, "strong view,\nCutMix with mask $m$"),
        ("weak", 0.2, "the same weak view"),
    ):
        picture(name, 3.1, y, text)
        arrow((1.5, 2.7 + 0.14 * (y - 2.7)), (2.5, y - 0.14 * (y - 2.7)))
    for name, y in level.items():
        role, branch = ("teacher", GREEN) if name[0] == "t" else ("student", BLUE), name[1]
        box(5.4, y, f"{role[0]} {branch}\n$\\theta_{{{name}}}$", role[1])
        box(7.4, y, f"$\\mathbf{{p}}^u_{{{name}}}$", role[1], wide=0.8, tall=0.6)
        arrow((3.7, y if name[0] == "t" else 2.7), (4.6, y))
        arrow((6.2, y), (6.95, y))
    for name, sign in (("1", 1), ("2", -1)):
        teacher, student = level["t" + name], level["s" + name]
        arrow((5.4, student + 0.4 * sign), (5.4, teacher - 0.4 * sign), GREEN, linestyle=(0, (4, 2)), linewidth=1.6)
        ax.text(5.52, (teacher + student) / 2, "EMA, Eq. (1)", color=GREEN, va="center", fontsize=8.5)
        box(9.3, teacher, f"$\\mathbf{{y}}^u_{{t{name}}}$", GREEN, wide=0.8, tall=0.6)
        arrow((7.85, teacher), (8.85, teacher))
        ax.text(8.35, teacher, "mix by $m$\n\nkeep $\\geq T$", ha="center", va="center", fontsize=7.5)
        box(9.3, student - 0.4 * sign, f"$\\mathbf{{y}}^u_{{s{name}}}$", BLUE, wide=0.8, tall=0.5)
        arrow((7.85, student - 0.08 * sign), (8.85, student - 0.38 * sign))

    # Supervision: straight lines bring a student's logits, crossing ones the other branch's pseudo-labels.
    for own, other, sign in (("1", "2", 1), ("2", "1", -1)):
        logits, far, near = level["s" + own], level["s" + own] + 0.72 * sign, level["s" + own] - 0.18 * sign
        arrow((7.85, logits + 0.1 * sign), (11.02, far), GREY)
        arrow((7.85, logits + 0.02 * sign), (11.0, near), GREY)
        arrow((9.75, level["t" + other]), (11.2, near - 0.36 * sign), ORANGE, linewidth=1.8, zorder=2.5)
        arrow((9.75, level["s" + other] + 0.4 * sign), (11.16, far - 0.33 * sign), PURPLE, linewidth=1.8, zorder=2.5)
        node(11.4, near, rf"$\ell_{{st}}^{{\theta_{own}}}$", ORANGE)
        node(11.4, far, rf"$\ell_{{ss}}^{{\theta_{own}}}$", PURPLE)
    ax.text(11.3, 5.2, "$\\mathcal{L}_{st}$: a teacher labels\nfor the other student", color=ORANGE, ha="center", va="center")
    ax.text(11.3, 0.2, "$\\mathcal{L}_{ss}$: students label\nfor each other", color=PURPLE, ha="center", va="center")

    # Labeled images, and the sum.
    ax.plot([0.3, 12.2], [-0.83, -0.83], color=LIGHT, linewidth=1)
    picture("labeled", 3.1, -1.55, "labeled image $x^l$", side=0.9)
    box(5.4, -1.55, "students 1 and 2", BLUE)
    box(7.4, -1.55, "$\\mathbf{p}^l_{s1},\\ \\mathbf{p}^l_{s2}$", BLUE, wide=1.2, tall=0.6)
    node(9.3, -1.55, "$\\ell_s$", INK)
    picture("label", 11.4, -1.55, "label $\\mathbf{y}^l$", side=0.9)
    for x, to in ((3.6, 4.6), (6.2, 6.75), (8.05, 8.92), (10.9, 9.68)):
        arrow((x, -1.55), (to, -1.55))
    total = "$\\mathcal{L} = \\mathcal{L}_s$\n$+\\ \\alpha\\,\\mathcal{L}_{st}$\n$+\\ \\beta\\,\\mathcal{L}_{ss}$"
    ax.text(0.9, -1.55, total, ha="center", va="center", fontsize=13)
    ax.set(xlim=(0, 12.5), ylim=(-2.45, 6.1), aspect="auto")
    ax.axis("off")
    return figure


def _example_views() -> dict[str, Array]:
    """Pictures for Figure 1 from three images of the embedded data set."""
    data = Shapes(train_size=8, val_size=1)
    images = torch.stack([data.image(id) for id in data.train[:2]]).float() / 255
    weak, label = images.flip(-1), data.label(data.train[2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        strong = mix(chain(weak), xor_boxes(2, weak.shape[-2:]))
    views = {"image": images[0], "weak": weak[0], "strong": strong[0], "labeled": data.image(data.train[2]).float() / 255}
    return {name: view.permute(1, 2, 0).numpy() for name, view in views.items()} | {"label": colourise(label, data.palette)}
