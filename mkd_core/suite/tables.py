"""Tables of records in the paper's shape, beside published numbers that are quoted with their source and never mixed with ours."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from html import escape
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from zlib import crc32

import pandas as pd
import yaml
from pandas.io.formats.style import Styler
from pydantic import BaseModel, ConfigDict, model_validator

from ..choices import choose
from ..records import ROOT, Cells, Record, Rows, as_cells, write_atomically

PUBLISHED = ROOT / "published"
BOLD, QUOTED = "font-weight: bold;", "font-style: italic;"


class PublishedColumn(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    labeled: int  # images
    split: str = ""  # as RunConfig.split names it
    backbone: str = ""


class PublishedRow(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str  # who measured it, where
    values: dict[str, Decimal]  # column title -> mIoU in percent, as printed; none where the source has none
    printed: str = ""  # the row's names in the source
    backbone: str = ""  # where the columns do not say
    family: str = ""  # of labeled lists, where it is not the column's
    family_in: tuple[str, ...] = ()  # the columns where it is not; (): in all
    dataset: str = ""  # where it is not the table's
    unlabeled: str = ""
    note: str = ""  # contradictions and doubts

    @property
    def credit(self) -> str:
        return "; ".join(filter(None, (self.source, self.note)))

    def on_the_lists_of(self, title: str) -> bool:
        return not self.family or (bool(self.family_in) and title not in self.family_in)


class Published(BaseModel):
    """A published table, read from published: data, each row with its source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    source: str
    dataset: str
    columns: dict[str, PublishedColumn]
    rows: dict[str, PublishedRow]

    @model_validator(mode="after")
    def _columns_exist(self) -> Published:
        for row in self.rows.values():
            for title in (*row.values, *row.family_in):
                choose(f"column of {self.title}", title, self.columns)
        return self

    def value(self, row: str, title: str) -> Decimal | None:
        return self.rows[row].values.get(title) if row in self.rows else None

    def dataset_of(self, row: str) -> str:
        """The row's own data set where it has one, else the table's."""
        return (self.rows[row].dataset if row in self.rows else "") or self.dataset

    def text(self, row: str, title: str) -> str:
        """The number as printed; "-" where the source has none, "" where it has no such row."""
        value = self.value(row, title)
        return str(value) if value is not None else "-" * (row in self.rows)

    def frame(self) -> pd.DataFrame:
        """Every row as quoted, between its backbone and split family and its source: compare only where both agree."""

        def of_columns(row: PublishedRow, kind: str) -> str:
            found = (getattr(self.columns[title], kind).split("/")[0] for title in row.values)
            return ", ".join(dict.fromkeys(filter(None, found)))

        rows = {
            name: {"backbone": row.backbone or of_columns(row, "backbone"), "split family": row.family or of_columns(row, "split")}
            | ({"unlabeled": row.unlabeled} if row.unlabeled else {})
            | {title: self.text(name, title) for title in self.columns}
            | {"source": row.credit}
            for name, row in self.rows.items()
        }  # fmt: skip
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(self.title)


def published(name: str, section: str | None = None) -> Published:
    """published/<name>.yaml, e.g. "table1"; `section` of a file that holds several tables ("newer")."""
    files = {path.stem: path for path in sorted(PUBLISHED.glob("*.yaml"))}
    text = files[choose("published table", name, files)].read_text(encoding="utf-8")
    content = yaml.load(text, yaml.BaseLoader)  # numbers stay text: 65.20 is not 65.2
    return Published(**(content if "title" in content else content[choose(f"section of {name}", section or "", content)]))


@dataclass(frozen=True)
class Part:
    """One table of text: `style` holds the CSS of each cell (BOLD, QUOTED or nothing)."""

    heading: str
    text: pd.DataFrame
    style: pd.DataFrame

    def styler(self, escape: str) -> Styler:
        styler = self.text.style.apply(lambda _: self.style, axis=None).format(escape=escape)
        styler = styler.set_caption(_latex(self.heading) if escape == "latex" else self.heading)
        return styler.format_index(escape=escape, axis=0).format_index(escape=escape, axis=1)


@dataclass(frozen=True)
class Table:
    """Rows x columns beside the paper's numbers, then every column in detail; and notes on what was measured and what is quoted."""

    parts: Sequence[Part]
    notes: Sequence[str]

    def markdown(self) -> str:
        """Rows alone, without named columns, are one plain table."""
        texts = []
        for part in self.parts:
            frame = part.text.mask(part.style == BOLD, "**" + part.text + "**") if part.heading else part.text
            frame.columns = [", ".join(c) if isinstance(c, tuple) else c for c in frame.columns]
            frame = frame.rename(index=_piped, columns=_piped)
            numbers = [pd.to_numeric(frame[c], errors="coerce").notna().all() for c in frame]
            align = ["left", *("right" if number else "left" for number in numbers)]
            texts += [part.heading] * bool(part.heading) + [frame.to_markdown(disable_numparse=True, colalign=align)]
        return "\n\n".join([*texts, *self.notes])

    def html(self) -> str:
        # pandas draws a random id for the styles; one made from the content keeps equal tables equal
        look = [{"selector": "th, td", "props": "text-align: left; padding: 2px 8px"}]
        stylers = [part.styler("html").set_table_styles(look).set_uuid(f"{crc32(part.text.to_csv().encode()):x}") for part in self.parts]
        return "\n".join([*(styler.to_html() for styler in stylers), *(f"<p>{escape(note)}</p>" for note in self.notes)])

    _repr_html_ = html

    def latex(self) -> str:
        """Needs booktabs and multirow."""
        parts = [part.styler("latex").to_latex(hrules=True, convert_css=True) for part in self.parts]
        return "\n\n".join([*parts, *map(_latex, self.notes)])


def _piped(text: str) -> str:
    return text.replace("|", r"\|")  # it parts the cells of Markdown


def _latex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)


def save(table: Table, folder: Path) -> None:
    """table.md, table.html and table.tex, each whole or not at all."""
    for name, text in {"md": table.markdown(), "html": table.html(), "tex": table.latex()}.items():
        write_atomically(folder / f"table.{name}", text + "\n")


def table(cells: Rows | Cells, published: Published | None = None) -> Table:
    """Records by row and column (or by row alone): mIoU of the last step and of the best evaluation, mean +- sample deviation over seeds.

    A column that `published` has under the same title gets the paper's number and the difference (ours minus the paper's) in columns of
    their own. Refused where a column's records were not measured alike: other data sets, evaluation protocols or evaluated images, or,
    seed by seed, other labeled images; or where a column's runs are not what the published one is.
    """
    if not (cells := as_cells(cells)):
        raise ValueError("a table needs at least one row")
    titles = list(dict.fromkeys(title for of in cells.values() for title in of))
    columns = {title: {row: list(of.get(title, ())) for row, of in cells.items()} for title in titles}
    quoted = {title: published for title in titles if published and title in published.columns}
    for title, rows in columns.items():
        _refuse_unlike(title, rows, quoted.get(title))
    parts = [Part(_heading(title, rows), *_details(rows)) for title, rows in columns.items()]
    if titles == [""]:
        return Table(parts, [])
    notes = ["mIoU in percent, last step: mean ± sample standard deviation over seeds; bold: the best measured here."]
    if quoted and published:
        notes += [
            f'Columns "paper" are quoted, not measured here: {published.title}, {published.source}. Difference: ours minus the paper\'s.',
            "Source of each row: " + " ".join(f"{row} ({published.rows[row].credit})." for row in cells if row in published.rows),
            *(
                f"{row} is on other lists{' in ' * bool(of.family_in)}{', '.join(of.family_in)}, so without a difference: {of.family}."
                for row, of in published.rows.items()
                if row in cells and of.family
            ),
        ]
    return Table([Part("Measured here" + " beside the paper's numbers" * bool(quoted), *_overview(columns, quoted)), *parts], notes)


def _overview(columns: Mapping[str, Rows], quoted: Mapping[str, Published]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The paper's shape; where numbers are quoted, each column has three: mIoU, paper, difference."""
    text, style = {}, {}
    for title, rows in columns.items():
        text[title, "mIoU"], style[title, "mIoU"] = _scores(rows, "miou")
        if source := quoted.get(title):
            text[title, "paper"] = [source.text(row, title) for row in rows]
            text[title, "difference"] = [_difference(row, title, records, source) for row, records in rows.items()]
            style[title, "paper"] = style[title, "difference"] = [QUOTED] * len(rows)
    frames = [pd.DataFrame(cells, index=pd.Index(next(iter(columns.values())), name="method")) for cells in (text, style)]
    if not quoted:
        frames = [frame.droplevel(1, axis=1) for frame in frames]
    return frames[0], frames[1]


def _details(rows: Rows) -> tuple[pd.DataFrame, pd.DataFrame]:
    last, best = _scores(rows, "miou"), _scores(rows, "miou_best")
    text = {
        "mIoU last": last[0],
        "mIoU best": best[0],
        "runs": [str(len(records)) for records in rows.values()],
        "seeds": [", ".join(str(r.seed) for r in records) for records in rows.values()],
        "seconds a run": [f"{fmean(r.seconds for r in records):.0f}" if records else "" for records in rows.values()],
    }
    index = pd.Index(rows, name="method")
    style = pd.DataFrame("", index, list(text)).assign(**{"mIoU last": last[1], "mIoU best": best[1]})
    return pd.DataFrame(text, index), style


def _scores(rows: Rows, field: str) -> tuple[list[str], list[str]]:
    """Mean +- sample deviation of each row, and BOLD at the highest mean of several."""
    values = [[getattr(r, field) for r in records] for records in rows.values()]
    means = [fmean(v) if v else -inf for v in values]
    text = [f"{m:.1f}" + (f" ± {stdev(v):.1f}" if len(v) > 1 else "") if v else "missing" for m, v in zip(means, values, strict=True)]
    several = sum(map(bool, values)) > 1
    return text, [BOLD * (several and m == max(means)) for m in means]


def _difference(row: str, title: str, records: Sequence[Record], source: Published) -> str:
    """None across split families."""
    value = source.value(row, title)
    if not records or value is None or not source.rows[row].on_the_lists_of(title):
        return ""
    return f"{fmean(r.miou for r in records) - float(value):+.1f}"


def _heading(title: str, rows: Rows) -> str:
    """What a column's runs have in common, and, joined by "or", in what they differ."""
    if not title:
        return ""
    every = [r for records in rows.values() for r in records]
    parts = (
        "{dataset} {split}",
        "{labeled} labeled images",
        "{encoder}",
        "{start}",
        "{steps} steps",
        "{images} images evaluated ({protocol})",
    )
    known = [
        r.config | {"labeled": r.split["labeled"], "images": r.evaluated["images"], "protocol": r.protocol, "start": r.weights["name"] or "from scratch"}
        for r in every
    ]  # fmt: skip
    return ", ".join([title, *(" or ".join(dict.fromkeys(part.format(**of) for of in known)) for part in parts)]) if every else title


def refuse_unlike_configs(title: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], source: Published | None) -> None:
    """ValueError where runs of a column, as they are configured, cannot stand in one table, or not beside the published column `title`."""
    where = f"column {title!r}" if title else "one table"
    every = [c for configs in rows.values() for c in configs]
    _refuse_different(where, "data sets", (_images(c["dataset"]) + f" {Path(c['root']).name}" * (c["dataset"] == "folder") for c in every))
    _refuse_different(where, "options of the data set", (json.dumps(c["dataset_options"], sort_keys=True) for c in every))
    _refuse_different(where, "evaluation protocols", (c["protocol"] for c in every))
    if source is None or title not in source.columns:
        return

    theirs = source.columns[title]
    for row, configs in rows.items():
        about, dataset = source.rows.get(row), source.dataset_of(row)
        for c in configs:
            ours = (c["dataset"], c["split"], c["encoder"])
            same_unlabeled = ours[0] == dataset or about is None or about.unlabeled == "none"
            if not (_images(ours[0]) == _images(dataset) and same_unlabeled and ours[1] == theirs.split and _is(theirs.backbone, ours[2])):
                raise ValueError(
                    f"row {row!r} of {where} holds a run on {' '.join(ours)}, that of {source.title} is "
                    f"{dataset} {theirs.split} {theirs.backbone}: give it another title"
                )


def _refuse_different(where: str, what: str, values: Iterable[str]) -> None:
    if len(found := set(values)) > 1:
        raise ValueError(f"{where}, different {what}: {', '.join(sorted(found))}")


def _refuse_unlike(title: str, rows: Rows, source: Published | None) -> None:
    records = [r for of in rows.values() for r in of]
    where = f"column {title!r}" if title else "one table"
    configs = {row: [r.config | {"protocol": r.protocol, "split": r.split.get("name")} for r in of] for row, of in rows.items()}
    refuse_unlike_configs(title, configs, source)
    _refuse_different(where, "classes", (", ".join(r.classes) for r in records))
    _refuse_different(where, "evaluated images", (json.dumps(r.evaluated, sort_keys=True) for r in records))
    for row, runs in rows.items():
        if repeated := [seed for seed, count in Counter(r.seed for r in runs).items() if count > 1]:
            raise ValueError(f"{where}, row {row!r} holds the seeds {repeated} more than once")
    for seed in {r.seed for r in records}:
        if len({r.split["sha256"] for r in records if r.seed == seed}) > 1:
            raise ValueError(f"{where}, different labeled images (split hashes) for seed {seed}")
        for dataset in {r.config["dataset"] for r in records}:  # VOC and VOCAug share a column
            if len({r.split.get("sha256_unlabeled") for r in records if r.seed == seed and r.config["dataset"] == dataset}) > 1:
                raise ValueError(f"{where}, different unlabeled images (split hashes) for seed {seed}")
    if source is None:
        return
    from ..data.splits import published_count

    theirs = source.columns[title]
    for row, runs in rows.items():
        dataset = source.dataset_of(row)
        for r in runs:
            counts = {
                "labeled": (r.split["labeled"], theirs.labeled),
                "evaluated": (r.evaluated["images"], published_count(f"{dataset}/val")),
            }
            for what, (mine, published) in counts.items():
                if mine != published:
                    raise ValueError(
                        f"row {row!r} of {where} holds a run with {mine} {what} images, {source.title} has {published}: give it another title"
                    )


def _is(backbone: str, encoder: str) -> bool:
    """ "ResNet-50" is resnet50 and timm's other stems of it (tu-resnet50d), not tu-wide_resnet50_2 or se_resnet50."""
    return re.fullmatch(f"(tu-)?{backbone.lower().replace('-', '')}[cdst]?", encoder) is not None


def _images(dataset: str) -> str:
    """The data set whose images are evaluated: VOC and VOCAug differ in their unlabeled images only."""
    return "voc" if dataset == "voc_aug" else dataset
