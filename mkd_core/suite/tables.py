"""Tables of records in the paper's shape, beside published numbers: quoted with their source, never mixed with ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from ..choices import choose
from ..config import Grid
from ..data.splits import published_count
from ..records import COLUMNS, Cells, Rows, describe, frame, write_atomically
from .published import Published, published

# What may be compared.

# Column of the frame -> its name, and within which runs it must agree.
ALIKE: dict[str, tuple[str, list[str]]] = {
    "data": ("data sets", []),
    "dataset_options": ("options of the data set", []),
    "protocol": ("evaluation protocols", []),
    "class_names": ("classes", []),
    "evaluated": ("evaluated images", []),
    "sha256_val": ("evaluated images", []),
    "sha256": ("labeled images", ["seed"]),
    "sha256_unlabeled": ("unlabeled images", ["seed", "dataset"]),
}


def refuse_unlike(runs: pd.DataFrame, source: Published | None = None) -> None:
    """Raise ValueError where runs of a column were not measured alike, or are not what the published column is."""
    runs = runs.assign(class_names=runs.classes.map(", ".join, na_action="ignore"))
    for key, (what, within) in ALIKE.items():
        compared = runs[~runs.all_labels] if within else runs  # all labels are meant to be other labels
        for (title, *_), values in compared.groupby(["column", *within], observed=True)[key]:
            if values.nunique() > 1:
                found = ", ".join(sorted(values.dropna().unique()))
                raise ValueError(f"column {title!r}, different {what}: {found}; give each its own column")
    for run in runs[runs.duplicated(["row", "column", "seed"])].itertuples():
        raise ValueError(f"column {run.column!r}, row {run.row!r} holds seed {run.seed} more than once")
    for run in runs[~runs.all_labels].itertuples() if source else ():
        if source and run.column in source.columns:
            _refuse_other(run, source)


def _refuse_other(run: Any, source: Published) -> None:
    """Raise ValueError where a run has other images or another encoder than the published column of its title."""
    theirs, row = source.columns[run.column], source.rows.get(run.row, {"unlabeled": "none"})
    dataset, data = row.get("dataset", source.dataset), run.dataset
    if row.get("unlabeled") == "none":  # VOC and VOCAug share their labeled images
        dataset, data = dataset.removesuffix("_aug"), run.data
    # "ResNet-50" is resnet50 and timm's other stems of it (tu-resnet50d), not tu-wide_resnet50_2.
    encoder = re.sub(r"^tu-|(?<=\d)[cdst]$", "", run.encoder)
    for what, ours, other in (
        ("data set", data, dataset),
        ("split", run.split, theirs["split"]),
        ("encoder", encoder, theirs["backbone"].lower().replace("-", "")),
        ("number of labeled images", run.labeled, int(theirs["labeled"])),
        ("number of evaluated images", run.images, published_count(f"{dataset}/val")),
    ):
        if ours != other and pd.notna(ours):  # a run that is only planned has no counts yet
            place = f"column {run.column!r}, row {run.row!r}"
            differs = f"{what} is {ours}, not {other} as in {source.title}"
            raise ValueError(f"{place} holds a run whose {differs}: give it another title")


def check(grid: Grid, published_name: str = "", shown: str = "", against: str = "") -> None:
    """Raise ValueError, before anything runs, for what the table of the grid would refuse when all has run."""
    source = published(published_name) if published_name else None
    for what, name, known in (("column", shown, grid.columns), ("row", against, grid.rows)):
        if name:
            choose(what, name, known)
    cells = [(row, title, configs) for row, of in grid.cells.items() for title, configs in of.items()]
    plan = [{"row": r, "column": t, **describe(c.model_dump(mode="json"))} for r, t, of in cells for c in of]
    refuse_unlike(pd.DataFrame(plan, columns=list(COLUMNS)), source)


# The table.

CSS = """<style>
.mkd-table {border-collapse: collapse; margin: 1em 0; font: 14px/1.4 sans-serif; border: 0}
.mkd-table th, .mkd-table td {text-align: left; padding: 3px 10px; border: 0; border-bottom: 1px solid #ddd}
.mkd-table thead th {border-bottom: 1px solid #222}
</style>"""
BEST = re.compile(r"\*\*(.+?)\*\*")


@dataclass(frozen=True)
class Table:
    """Rows x columns beside the paper's numbers, then every column in detail: a heading and a frame of text each.

    What is best of a column stands between two **. notes: on what was measured and what is quoted.
    """

    parts: Sequence[tuple[str, pd.DataFrame]]
    notes: Sequence[str]

    def markdown(self) -> str:
        """Write Markdown; rows alone, without named columns, are one plain table."""
        texts = []
        for heading, text in self.parts:
            text = text.set_axis([", ".join(c) if isinstance(c, tuple) else c for c in text], axis=1)
            piped = {name: name.replace("|", r"\|") for name in (*text.index, *text)}  # it parts cells
            text = text.rename(index=piped, columns=piped)
            text = text if heading else text.replace(BEST, r"\1", regex=True)
            numbers = [pd.to_numeric(text[c], errors="coerce").notna().all() for c in text]
            align = ["left", *("right" if number else "left" for number in numbers)]
            texts += [heading] * bool(heading) + [text.to_markdown(disable_numparse=True, colalign=align)]
        return "\n\n".join([*texts, *self.notes])

    def html(self) -> str:
        texts = [CSS]
        for heading, text in self.parts:
            made = text.rename_axis(index=None).to_html(classes="mkd-table", border=0)
            texts += [f"<p>{escape(heading)}</p>", BEST.sub(r"<b>\1</b>", made)]
        return "\n".join([*texts, *(f"<p>{escape(note)}</p>" for note in self.notes)])

    _repr_html_ = html

    def latex(self) -> str:
        """Write a float for each part, then the notes."""
        texts = [r"% \usepackage{booktabs,multirow}"]
        for heading, text in self.parts:
            made = text.rename_axis(index=None).to_latex(escape=True, caption=_latex(heading))
            texts.append(BEST.sub(r"\\textbf{\1}", made))
        return "\n\n".join([*texts, *map(_latex, self.notes)])


def _latex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


def save(table: Table, folder: Path) -> None:
    """Write table.md, table.html and table.tex, each whole or not at all."""
    for name, text in {"md": table.markdown(), "html": table.html(), "tex": table.latex()}.items():
        write_atomically(folder / f"table.{name}", text + "\n")


def table(cells: Rows | Cells, published: Published | None = None) -> Table:
    """Make the table of records by row and column (or by row alone): mean +- sample deviation over seeds, percent.

    A column that `published` has under the same title gets the paper's number and the difference (ours minus the
    paper's). Where a row is SupOnly on all labels, the others get `gap_closed`. ValueError: see `refuse_unlike`.
    """
    runs = frame(cells)
    refuse_unlike(runs, published)
    details = {title: _details(runs[runs.column == title]) for title in runs.column.cat.categories}
    if list(details) == [""]:
        return Table([("", details[""])], [])
    overview, quoted = {}, False
    for title, part in details.items():
        overview[title, "mIoU"] = part["mIoU last"]
        if published and title in published.columns:
            quoted, means = True, runs[runs.column == title].groupby("row", observed=False).miou.mean()
            rows = list(part.index)
            overview[title, "paper"] = [published.text(row, title) for row in rows]
            overview[title, "difference"] = [_difference(row, title, means[row], published) for row in rows]
    first = pd.DataFrame(overview, part.index)
    heading = "Measured here" + " beside the paper's numbers" * quoted
    parts = [(heading, first if quoted else first.droplevel(1, axis=1))]
    parts += [(_heading(title, runs[runs.column == title]), part) for title, part in details.items()]
    return Table(parts, _notes(list(first.index), published if quoted else None, details))


def _notes(rows: Sequence[str], source: Published | None, details: Mapping[str, pd.DataFrame]) -> list[str]:
    what = "mean ± sample standard deviation over seeds; bold: the best measured here"
    notes = [f"mIoU in percent, last step: {what}."]
    if any("gap closed (%)" in part for part in details.values()):
        share = "(row - SupOnly) / (SupOnly on all labels - SupOnly)"
        notes.append(f"Gap closed: {share}, over the seeds that a row shares with both.")
    if source is None:
        return notes
    quoted = f'Columns "paper" are quoted, not measured here: {source.title}, {source.source}.'
    credit = " ".join(f"{row} ({source.credit(row)})." for row in rows if row in source.rows)
    notes += [f"{quoted} Difference: ours minus the paper's.", f"Source of each row: {credit}"]
    for row, of in source.rows.items():
        if row in rows and "family" in of:
            where = " in " * ("family_in" in of) + ", ".join(of.get("family_in", ()))
            notes.append(f"{row} is on other lists{where}, so without a difference: {of['family']}.")
    return notes


def _details(runs: pd.DataFrame) -> pd.DataFrame:
    """Lay out one column: last and best mIoU, share of the gap closed where it is known, runs, seeds, median seconds."""
    of, closed = runs.groupby("row", observed=False), gap_closed(runs)
    text = {"mIoU last": _scores(runs, "miou"), "mIoU best": _scores(runs, "miou_best")}
    text |= {"gap closed (%)": closed} if len(closed) else {}
    text |= {
        "runs": of.size().map(str),
        "seeds": runs.groupby("row", observed=True).seed.agg(lambda seeds: ", ".join(map(str, seeds))),
        "seconds a run": of.seconds.median().map("{:.0f}".format, na_action="ignore"),
    }
    return pd.DataFrame(text, pd.Index(runs.row.cat.categories, name="method")).astype(object).fillna("")


def _scores(runs: pd.DataFrame, field: str) -> pd.Series:
    """Give mean +- sample deviation of each row, the best of several between **; all labels do not compete."""
    of = runs.groupby("row", observed=False)[field].agg(["mean", "std"])
    rivals = of["mean"].drop(runs[runs.all_labels].row.unique()).dropna()
    best = rivals[(rivals == rivals.max()) & (len(rivals) > 1)].index
    text = _spread(of, "{:.1f}").fillna("missing")
    return text.where(~of.index.isin(best), "**" + text + "**")


def _spread(of: pd.DataFrame, form: str) -> pd.Series:
    """Write columns mean and std as "mean ± std", without the second where it is NaN."""
    std = of["std"].map(f" ± {form}".format, na_action="ignore").fillna("")
    return of["mean"].map(form.format, na_action="ignore") + std


def gap_closed(runs: pd.DataFrame) -> pd.Series:
    """Compute the share of the headroom that each row of one column uses: (row - SupOnly) / (all labels - SupOnly).

    In percent, mean ± sample deviation over seeds: each seed's gain on SupOnly, divided by the mean gap. Empty where
    SupOnly or SupOnly on all labels did not run, or where their gap is not larger than its own standard error.
    """
    supervised, scores = runs[runs.method == "supervised"], runs.set_index(["seed", "row"]).miou.unstack()
    base, full = (supervised[supervised.all_labels == every].row.unique() for every in (False, True))
    gap = (scores[full[0]] - scores[base[0]]).dropna() if len(base) and len(full) else pd.Series(dtype=float)
    if not gap.mean() > (gap.sem() if len(gap) > 1 else 0):
        return pd.Series(dtype=object)
    shares = 100 * scores.sub(scores[base[0]], axis=0).loc[gap.index] / gap.mean()
    return _spread(shares.drop(columns=[base[0], full[0]]).agg(["mean", "std"]).T, "{:.0f}")


def _difference(row: str, title: str, mean: float, source: Published) -> str:
    """Give ours minus the paper's; none where the row's labeled lists are another family's."""
    of = source.rows.get(row, {"values": {}})
    other_lists = "family" in of and title in of.get("family_in", [title])
    known = title in of["values"] and pd.notna(mean) and not other_lists
    return f"{mean - float(of['values'][title]):+.1f}" if known else ""


def _heading(title: str, runs: pd.DataFrame) -> str:
    """Say what a column's runs have in common, and, joined by "or", in what they differ."""
    parts = ["{dataset} {split}", "{labeled} labeled images", "{encoder}", "{weights}", "{steps} steps"]
    parts.append("{images} images evaluated ({protocol})")
    lines = runs[~runs.all_labels].replace({"weights": {"": "from scratch"}}).to_dict("records")
    said = [" or ".join(dict.fromkeys(part.format(**of) for of in lines)) for part in parts]
    return ", ".join([title, *filter(None, said)])
