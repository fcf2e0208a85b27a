"""The report of a table: its records, its text, and pictures over training, seeds, classes and numbers of labels.

Functions take cells (row -> column -> records), rows, or a part of their `records.frame`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import seaborn as sns
import seaborn.objects as so
from IPython.display import display
from matplotlib.axes import Axes

from .. import records
from ..methods import METHODS
from ..records import Cells, Rows
from . import figures, tables
from .figures import CYCLE, INK, LIGHT, Picture, confusion, draw, heat, plain, styled

Runs: TypeAlias = Rows | Cells | pd.DataFrame
OVER_SEEDS: Any = ("pi", 100)  # from the smallest to the largest


def report(
    cells: Rows | Cells, published: str = "", out: str = "", shown: str = "", against: str = ""
) -> tables.Table:
    """Write the report of a table into the folder `out`, relative to the project's root, and display it; see `write`."""
    made, pictures = write(cells, records.folder(out), published, shown, against)
    display(made, *pictures.values())
    return made


def write(
    cells: Rows | Cells, folder: Path, published: str = "", shown: str = "", against: str = ""
) -> tuple[tables.Table, dict[str, Picture]]:
    """Write records.jsonl, table.{md,html,tex} and the pictures of a table into a folder; return table and pictures.

    published  the paper's table to stand beside: a file of published/ without its ending
    shown      column whose pictures are drawn, default the first; against: row that the IoU of classes is counted from
    """
    runs = records.frame(cells)
    made = tables.table(cells, tables.published(published) if published else None)
    records.dump(cells, folder / "records.jsonl")
    tables.save(made, folder)
    pictures = of_table(runs, shown or runs.column.cat.categories[0], against)
    for name, picture in pictures.items():
        figures.save(picture, folder / f"{name}.png")
    return made, pictures


def look(cells: Runs) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Lay out records with names that can be drawn, and give each row its colour.

    The first row of methods of one colour has it, others have what is free; SupOnly on all labels is black.
    """
    runs = records.frame(cells)
    rows = runs.row.cat.remove_unused_categories().cat.rename_categories(plain)
    runs = runs.assign(row=rows, classes=[[*map(plain, names)] for names in runs.classes])
    colours: dict[str, Any] = dict.fromkeys(runs[runs.all_labels].row, INK)
    methods: dict[str, list[str]] = {}
    for row, method in runs[~runs.all_labels].drop_duplicates("row").set_index("row").method.items():
        methods.setdefault(method, []).append(row)
    firsts = {METHODS[method].colour: names[0] for method, names in reversed(methods.items())}
    own = {row: colour for colour, row in firsts.items()}
    spare = iter([c for c in (*CYCLE, *sns.husl_palette(len(rows.cat.categories), s=0.8)) if c not in firsts])
    return runs, colours | {row: own.get(row) or next(spare) for rows in methods.values() for row in rows}


def _upper_line(ax: Axes, runs: pd.DataFrame) -> None:
    """Draw the mean of SupOnly on all labels: what unlabeled images can hope for."""
    if runs.all_labels.any():
        height, places = runs[runs.all_labels].miou.mean(), ("axes fraction", "data")
        ax.axhline(height, color=INK, linewidth=1.2, linestyle=":")
        ax.annotate("all labels", (0.02, height), (0, 2), places, "offset points", fontsize=8)


@styled
def curves(cells: Runs) -> Picture:
    """Draw mIoU against step for each row, mean and min .. max over its runs (seeds); and the fate of pseudo-labels.

    The first panel shows the reported predictor; the others the labeler (`records.evaluations`), where withheld labels
    exist: share of pixels with confidence >= T, and accuracy of those. Runs without evaluations are left out, which the legend says.
    """
    runs, colours = look(cells)
    found = records.evaluations(runs[~runs.all_labels])
    every, counts = (of.groupby("row", observed=True).seed.nunique() for of in (runs, found))
    some = {row: f"{n} of {every[row]}" if n < every[row] else f"{n}" for row, n in counts.items()}
    named = {row: f"{row} ({n} seeds)" if every[row] > 1 else row for row, n in some.items()}
    panels = {"miou": "mIoU (%)", "kept": "pixels kept (%)", "accuracy": "accuracy of kept pixels (%)"}
    keys = ["row", "seed", "step", "reported", "labeler"]
    long = found.rename(columns=panels).melt(keys, list(panels.values()), "panel", "value").dropna()
    long = long[long.reported.where(long.panel == panels["miou"], long.labeler)]
    long["row"] = long.row.astype(str).map(named)
    plot = so.Plot(long, "step", "value", color="row", linestyle="row")
    plot = plot.facet(col="panel", order=[p for p in panels.values() if p in set(long.panel)]).share(y=False)
    plot = plot.add(so.Lines(), so.Agg()).add(so.Band(alpha=0.15), so.Est(errorbar=OVER_SEEDS), legend=False)
    plot = plot.add(so.Dots(), so.Agg(), legend=False) if long.step.nunique() < 5 else plot
    plot = plot.scale(color={named[row]: colours[row] for row in named})
    figure = draw(plot, 0.6 + 2.7 * long.panel.nunique(), 2.6, y="")
    _upper_line(figure.axes[0], runs)
    return figure


@styled
def seeds(cells: Runs) -> Picture:
    """Draw every run's mIoU for each row; a bar is the mean."""
    runs, colours = look(cells)
    plot = so.Plot(runs, "miou", "row", color="row").add(so.Dot(), legend=False).scale(color=colours)
    plot = plot.add(so.Dash(color=INK, width=0.5), so.Agg(), orient="y", legend=False)
    means = runs.groupby("row", observed=True).miou.mean()
    figure = draw(plot, 5.2, 0.6 + 0.3 * len(means), "x", x="mIoU (%); at the right: mean", y="")
    for k, x in enumerate(means):
        figure.axes[0].annotate(f"{x:.1f}", (1.01, k), None, ("axes fraction", "data"), va="center", size=8)
    return figure


@styled
def label_counts(cells: Runs) -> Picture:
    """Draw mIoU against the number of labeled images, over all columns: mean of each row, bars from min to max."""
    runs, colours = look(cells)
    plot = so.Plot(runs[~runs.all_labels], "labeled", "miou", color="row", linestyle="row", marker="row")
    plot = plot.add(so.Line(), so.Agg()).add(so.Range(), so.Est(errorbar=OVER_SEEDS), legend=False)
    counts = sorted(runs[~runs.all_labels].labeled.unique())
    ticks = so.Continuous(trans="log").tick(at=counts, minor=0).label(like="{x:.0f}")
    figure = draw(plot.scale(x=ticks, color=colours), 4.6, 3, "both", x="labeled images")
    _upper_line(figure.axes[0], runs)
    return figure


@styled
def cost(cells: Runs, times: Mapping[str, float]) -> Picture:
    """Draw mIoU against the time of a step (1: SupOnly, see `suite.cost`): small dots are runs, large ones means."""
    times = {plain(row): time for row, time in times.items()}
    runs, colours = look(cells)
    runs = runs.assign(time=runs.row.astype(str).map(times))
    best = runs.groupby("row", observed=True).miou.mean().sort_values(ascending=False).index
    runs["row"] = runs.row.cat.reorder_categories(best)
    plot = so.Plot(runs, "time", "miou", color="row").add(so.Dot(pointsize=3, alpha=0.5), legend=False)
    plot = plot.add(so.Dot(pointsize=7), so.Agg(), marker="row").scale(color=colours)
    return draw(plot.limit(x=(0, None)), 4.8, 4, "both", x="time of a step (1 = SupOnly)")


@styled
def class_iou(cells: Runs, over: str = "") -> Picture:
    """Draw the IoU of each class for each row; with `over`, the name of a row, its gain on that row, paired by column and seed.

    Dots are means over runs, whiskers min .. max; above eight rows a table of means. A class that neither occurs nor is
    predicted in a run is left out of it.
    """
    runs, colours = look(cells)
    classes, over = runs.classes.iloc[0], plain(over)
    long = runs.explode(["classes", "iou"], ignore_index=True).astype({"iou": float})
    if over:
        base = long[long.row == over].set_index(["column", "seed", "classes"]).iou
        long = long[long.row != over].join(base, on=["column", "seed", "classes"], rsuffix="_base")
        long["iou"] -= long.iou_base
    rows = list(long.row.cat.remove_unused_categories().cat.categories)
    label = f"IoU minus that of {over} (points)" if over else "IoU (%)"
    if len(rows) > 8:
        means = long.pivot_table(index="row", columns="classes", values="iou", observed=True)[classes]
        how: Any = {"center": 0, "cmap": "vlag"} if over else {"cmap": "Blues", "vmin": 0, "vmax": 100}
        return heat(means, classes, rows, ".1f", "", "", label, **how)
    plot = so.Plot(long, "iou", "classes", color="row", marker="row")
    plot = plot.scale(y=so.Nominal(order=classes), color=colours)
    plot = plot.add(so.Dot(pointsize=5), so.Agg(), so.Dodge(), orient="y")
    plot = plot.add(so.Range(), so.Est(errorbar=OVER_SEEDS), so.Dodge(), orient="y", legend=False)
    figure = draw(plot, 4.6, 0.9 + max(0.3, 0.07 * len(rows)) * len(classes), "x", x=label, y="")
    for k in range(1, len(classes)):
        figure.axes[0].axhline(k - 0.5, color=LIGHT, linewidth=0.6)
    if over:
        figure.axes[0].axvline(0, color=INK, linewidth=0.8, zorder=0)
    else:
        figure.axes[0].set_xlim(0, 100)
    return figure


def of_table(cells: Runs, title: str, against: str = "") -> dict[str, Picture]:
    """Draw the pictures of a table, by the names of their files; none where no run of the column `title` is done.

    curves, classes (IoU minus that of the row `against`, where it ran) and the confusion of the first row are this
    column's; labels, mIoU against the number of labeled images, is over the columns of the same encoder and the same
    family of lists (‡ marks U2PL's).
    """
    runs = records.frame(cells)
    ran = runs[runs.column == title]
    if ran.empty:
        return {}
    rows, pictures = list(ran.row.unique()), {}
    if ran[~ran.all_labels].evaluations.map(len).any():
        pictures["curves"] = curves(ran)
    pictures["classes"] = class_iou(ran, over=against if against in rows and len(rows) > 1 else "")
    if counts := [found for found in ran[ran.row == rows[0]].confusion if found]:
        pictures["confusion"] = confusion(counts, ran.classes.iloc[0], plain(rows[0]))
    family = runs.column.astype(str).str.contains("‡") == ("‡" in title)
    alike = runs[family & (runs.encoder == ran.encoder.iloc[0])]
    if alike[~alike.all_labels].labeled.nunique() > 1:
        pictures["labels"] = label_counts(alike)
    return pictures
