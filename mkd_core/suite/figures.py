"""Pictures: label maps, comparison sheets (the paper's Figure 2), lines, bars, tables over classes.

Every function returns a Picture outside pyplot's registry: nothing is shown twice and nothing leaks. Names that come
with data (rows, classes) are drawn as they are; what the caller writes (`lines`, `bars`, rows of a `sheet`) may hold
mathematics between two $.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import seaborn.objects as so
import torch
from cycler import cycler
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..augment import MEAN, STD
from ..data.base import IGNORE, visible
from ..metrics import confusion_matrix, miou
from ..records import write_atomically

Array = NDArray[Any]
INK, LIGHT = "#222222", "#dcdcdc"
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")  # Okabe and Ito's
STYLE: Any = {
    **sns.axes_style("ticks", {"axes.edgecolor": INK, "text.color": INK, "grid.color": LIGHT}),
    **sns.plotting_context("paper", rc={"lines.linewidth": 1.6, "grid.linewidth": 0.6}),
    "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": cycler(color=CYCLE),
    "legend.frameon": False, "mathtext.fontset": "cm", "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.03, "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.wspace": 0, "figure.constrained_layout.hspace": 0,
}  # fmt: skip
styled = matplotlib.rc_context(STYLE)


class Picture(Figure):
    """A Figure that notebooks show as PNG without any backend."""

    def png(self, dpi: int) -> bytes:
        """Draw it; equal pictures have equal bytes."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.05, facecolor="white")
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png(100)


def save(figure: Picture, path: str | Path) -> Path:
    """Write a PNG at 200 dpi, whole or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, figure.png(200))
    return path


def plain(name: str) -> str:
    """Keep a name as it is: matplotlib sets what stands between two $ as mathematics."""
    return name.replace("$", r"\$")


# Images and label maps as RGB arrays.


def to_image(image: Tensor) -> Array:
    """Turn (3, H, W), uint8 or normalised float, into (H, W, 3) float in [0, 1]."""
    array = image.detach().cpu().permute(1, 2, 0).numpy()
    return array / 255 if array.dtype == np.uint8 else np.clip(array * STD + MEAN, 0, 1)


def colourise(label: ArrayLike, palette: Array) -> Array:
    """Turn (H, W) ints into (H, W, 3) float in [0, 1] by palette (C, 3) uint8; IGNORE is hatched in two light greys."""
    label = np.asarray(label)
    stripes = np.add.outer(*map(np.arange, label.shape)) // max(2, label.shape[0] // 24) % 2
    ignored = np.where(stripes, 0.93, 0.8)[..., None]
    return np.where((label == IGNORE)[..., None], ignored, palette[np.where(label == IGNORE, 0, label)] / 255)


def overlay(
    image: Array, label: ArrayLike, palette: Array, classes: Sequence[str] = (), alpha: float = 0.5
) -> Array:
    """Tint image (H, W, 3) float by its label map (H, W); IGNORE and a class named background leave it as it is.

    palette: see `visible`, which shows dark classes on dark photos.
    """
    clear = [IGNORE, *(k for k, name in enumerate(classes) if name == "background")]
    share = np.where(np.isin(label, clear), 0, alpha)[..., None]
    return (1 - share) * image + share * colourise(label, palette)


@styled
def sheet(
    rows: Mapping[str, Sequence[ArrayLike]], *, palette: Array | None = None, classes: Sequence[str] = (),
    titles: Sequence[str] = (), notes: Mapping[str, Sequence[str]] | None = None, caption: str = "", side: float = 1.15,
) -> Picture:  # fmt: skip
    """Draw a grid of pictures, one named row of n columns each; the caption and a legend of the classes below.

    An entry is an image (H, W, 3), a label map (H, W) of ints (coloured by palette), a bool map (black is False) or a
    float map in [0, 1] (with a colour bar). titles stand over the columns, notes[row] in the corners of a row's
    pictures, `side` is a width in inches.
    """
    arrays = {name: [a.detach().cpu().numpy() if isinstance(a, Tensor) else np.asarray(a) for a in row]
              for name, row in rows.items()}  # fmt: skip
    every = [a for row in arrays.values() for a in row]
    columns = max(map(len, arrays.values()))
    tall = side * float(np.mean([a.shape[0] / a.shape[1] for a in every]))
    palette = np.zeros((IGNORE, 3)) if palette is None else visible(palette, classes)
    figure = Picture(figsize=(side * columns + 0.6, tall * len(arrays) + 1), layout="compressed")
    axes = figure.subplots(len(arrays), columns, squeeze=False)
    for (name, row), strip in zip(arrays.items(), axes, strict=True):
        strip[0].set_ylabel(fill(name, max(6, int(tall / 0.075)), break_long_words=False), linespacing=1.0)
        for ax, picture, note in zip(strip, row, (notes or {}).get(name, [""] * columns), strict=False):
            labels = picture.ndim == 2 and picture.dtype.kind in "iu"
            shown = colourise(picture, palette) if labels else picture
            scale = "gray" if picture.dtype.kind == "b" else "cividis"
            ax.imshow(shown, cmap=scale, vmin=0, vmax=1, interpolation="nearest")
            if note:
                box = {"facecolor": "black", "alpha": 0.65, "pad": 1.2, "linewidth": 0}
                place: Any = {"ha": "right", "va": "bottom", "transform": ax.transAxes, "bbox": box}
                ax.text(0.97, 0.03, note, fontsize=7, color="white", **place)
        if row[0].ndim == 2 and row[0].dtype.kind == "f":
            figure.colorbar(ScalarMappable(cmap="cividis"), ax=list(strip), fraction=0.05, pad=0.01)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title, pad=3)
    keys = [Patch(fc=c / 255, ec=INK, lw=0.4, label=plain(n)) for c, n in zip(palette, classes, strict=False)]
    if keys and any((a == IGNORE).any() for a in every if a.ndim == 2 and a.dtype.kind in "iu"):
        keys.append(Patch(fc="0.93", ec="0.6", hatch="/////", lw=0.4, label="no label"))
    if keys or caption:
        across = max(1, min(len(keys), int(figure.get_figwidth() / 0.95)))
        look: Any = {"handlelength": 1.1, "columnspacing": 1.2, "title_fontsize": 7.5}
        legend = figure.legend(handles=keys, title=caption, loc="outside lower center", ncols=across, **look)
        legend.get_title().set_multialignment("center")
    return figure


def pick(
    truth: Sequence[ArrayLike], first: Sequence[ArrayLike], second: Sequence[ArrayLike], columns: int, seed: int
) -> tuple[list[int], Array]:  # fmt: skip
    """Choose the images of a comparison; returns them and the per-image mIoU (2, n) of both methods.

    A quarter of the columns: largest gains of `second` over `first`; a quarter: largest losses (or least gains); the
    rest: drawn from `seed` among the others. All are label maps (H, W); a per-image mIoU is over the classes that
    occur or are predicted there.
    """
    top = 1 + max(int(m[m != IGNORE].max(initial=0)) for m in map(np.asarray, [*truth, *first, *second]))
    scores = np.array([
        [miou(confusion_matrix(torch.as_tensor(p), torch.as_tensor(y), top)) for p, y in zip(maps, truth, strict=True)]
        for maps in (first, second)
    ])  # fmt: skip
    order = np.argsort(scores[0] - scores[1], kind="stable")
    columns = min(columns, len(order))
    quarter = columns // 4
    ends = [*order[:quarter], *order[len(order) - quarter :]]
    rest = np.random.default_rng(seed).permutation(np.setdiff1d(order, ends))
    return [int(i) for i in [*ends, *rest[: columns - len(ends)]]], scores


def figure2(
    images: Sequence[Tensor], truth: Sequence[ArrayLike], predictions: Mapping[str, Sequence[ArrayLike]],
    palette: Array, classes: Sequence[str], *, columns: int = 8,
) -> Picture:  # fmt: skip
    """Draw the paper's Figure 2: input, truth and a row for each method; `pick` chooses columns by the last two methods.

    images (3, H, W) uint8 or normalised, truth and predictions (H, W) ints. The caption states the rule.
    """
    predictions = {plain(name): maps for name, maps in predictions.items()}
    first, second = list(predictions)[-2:]
    chosen, scores = pick(truth, predictions[first], predictions[second], columns, seed=0)
    rows: dict[str, list[ArrayLike]] = {"input": [to_image(images[i]) for i in chosen]}
    rows |= {name: [maps[i] for i in chosen] for name, maps in {"ground truth": truth, **predictions}.items()}
    notes = {name: [f"{of[i]:.0f}" for i in chosen] for name, of in zip((first, second), scores, strict=True)}
    titles = [f"{round(float(scores[1, i] - scores[0, i])):+d}" for i in chosen]
    caption = (
        f"First {len(chosen) // 4}: largest gains of {second} over {first}; next {len(chosen) // 4}: largest losses\n"
        f"(or least gains); the others: drawn at random (seed 0) from the {len(truth)} images.\n"
    ) * (len(chosen) < len(truth))
    caption += f"Corners: per-image mIoU in %; above: {second} minus {first}."
    return sheet(rows, palette=palette, classes=classes, titles=titles, notes=notes, caption=caption)


# Numbers.


def draw(plot: so.Plot, width: float, height: float, grid: Any = "y", **labels: Any) -> Picture:
    """Draw a plot of seaborn.objects; labels as its `label` takes them, "" for none."""
    figure = Picture(figsize=(width, height))
    theme = STYLE | {"axes.grid": True, "axes.grid.axis": grid}
    plot = plot.label(**{"color": "", "y": "mIoU (%)", **labels}).theme(theme)
    plot.layout(extent=(0, 0, 0.97, 1)).on(figure).plot()  # the legend begins at 0.98
    return figure


@styled
def lines(series: Mapping[str, tuple[ArrayLike, ArrayLike]], xlabel: str, ylabel: str) -> Picture:
    """Draw one named line for each (x, y)."""
    parts = [pd.DataFrame({"name": name, "x": x, "y": y}) for name, (x, y) in series.items()]
    table = pd.concat(parts, ignore_index=True)
    plot = so.Plot(table, "x", "y", color="name", linestyle="name").add(so.Line())
    return draw(plot.scale(color=list(CYCLE[: len(series)])), 4.6, 2.7, x=xlabel, y=ylabel)


@styled
def bars(
    groups: Mapping[str, Sequence[float]], names: Sequence[str], ylabel: str = "", form: str = "{:.2f}"
) -> Picture:
    """Draw grouped bars with their values: groups[name] has one value for each of `names`."""
    figure = Picture(figsize=(1.6 + 0.85 * len(names) * max(1, len(groups) / 2), 2.6))
    how: Any = {"rot": 0, "width": 0.8, "color": list(CYCLE), "legend": False}
    ax = pd.DataFrame(groups, list(names)).plot.bar(ax=figure.subplots(), ylabel=ylabel, **how)
    for drawn in ax.containers:
        ax.bar_label(drawn, fmt=form, padding=2, fontsize=7.5)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.margins(y=0.15)
    if len(groups) > 1:
        figure.legend(loc="outside upper center", ncols=len(groups))
    return figure


@styled
def terms(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture:
    """Draw the weighted terms of each run's loss against the step, from its history rows, four runs in a row.

    Logarithmic, since their sizes differ.
    """
    across = min(4, len(histories))
    down = -(-len(histories) // across)
    figure = Picture(figsize=(max(4.2, 2.3 * across), max(2.5, 1.75 * down)))
    axes = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
    for ax, (method, history) in zip(axes, histories.items(), strict=False):
        # 0 has no place on the axis
        found = pd.DataFrame(history).set_index("step").filter(regex="^term/").replace(0, np.nan)
        for name in sorted(found, key=lambda name: (name != "term/sup", name)):
            ax.plot(found[name].dropna(), linewidth=1.1, label=name.removeprefix("term/"))
        ax.set(yscale="log", title=plain(method))
        ax.legend(fontsize=6.5, handlelength=1, frameon=True, edgecolor="none", labelspacing=0.15)
    for ax in axes[len(histories) :]:
        ax.remove()
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("weighted term", fontsize=9)
    return figure


# Tables over classes.


@styled
def heat(
    table: ArrayLike, across: Sequence[str], down: Sequence[str], form: str, xlabel: str, ylabel: str, bar: str,
    **how: Any,
) -> Picture:  # fmt: skip
    """Draw a coloured table with its numbers, square where both sides name the same; names are ready to be drawn."""
    sides = [max(2.6, 0.5 * min(25, len(of))) for of in (across, down if down is across else down[::2])]
    figure = Picture(figsize=(sides[0] + 1.5, sides[1] + 0.5))
    ax = figure.subplots()
    how |= {"fmt": form, "annot": len(across) <= 25, "annot_kws": {"fontsize": 7.5}, "linewidths": 0.6}
    how |= {"square": down is across, "cbar_kws": {"label": bar, "shrink": 0.8}}
    sns.heatmap(np.asarray(table), ax=ax, xticklabels=across, yticklabels=down, **how)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    for axis, side, of, turn in zip((ax.xaxis, ax.yaxis), sides, (across, down), (45, 0), strict=True):
        axis.set_tick_params(labelrotation=turn, length=0, labelsize=min(8.0, 50 * side / len(of)))
    for text in ax.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")
    return figure


def confusion(matrix: ArrayLike, classes: Sequence[str], title: str = "") -> Picture:
    """Draw (C, C) counts by (truth, prediction), or (n, C, C) of n runs added up, in percent of each true class."""
    counts = np.asarray(matrix, float)
    counts = counts.reshape(-1, *counts.shape[-2:]).sum(0)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names, bar = [*map(plain, classes)], "% of the true class's pixels"
    picture = heat(shares, names, names, ".0f", "prediction", "ground truth", bar, cmap="Blues")
    picture.axes[0].set_title(title)
    return picture


def table_heat(table: Tensor, classes: Sequence[str]) -> Picture:
    """Draw FDA's (C, C) table: row c is added to the logits of a pixel labelled c."""
    names, values = [*map(plain, classes)], table.detach().cpu().numpy()
    axes = "logit $j$ that rises", "label $c$ of the pixel"
    return heat(values, names, names, ".2f", *axes, "added to the logit", cmap="YlOrBr")
