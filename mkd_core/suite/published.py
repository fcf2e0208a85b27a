"""Published numbers: data under published/, each row with its source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import yaml

from ..choices import choose
from ..records import ROOT

PUBLISHED = ROOT / "published"


@dataclass(frozen=True)
class Published:
    """A published table as its YAML file has it; all values are text.

    columns  title -> labeled (number of images), split (as RunConfig.split names it), backbone
    rows     name -> source (who measured it, where) and values (column title -> mIoU in percent as printed);
             where they are not the columns': backbone, family (of labeled lists; family_in: in these columns only),
             dataset, unlabeled; note: contradictions and doubts; printed: the row's name in the source
    """

    title: str
    source: str
    dataset: str
    columns: Mapping[str, Mapping[str, str]]
    rows: Mapping[str, Mapping[str, Any]]

    def text(self, row: str, title: str) -> str:
        """Give the number as printed: "-" where the source has none, "" where it has no such row."""
        return self.rows[row]["values"].get(title, "-") if row in self.rows else ""

    def credit(self, row: str) -> str:
        return "; ".join(self.rows[row][key] for key in ("source", "note") if key in self.rows[row])

    def frame(self) -> pd.DataFrame:
        """Lay out every row as quoted, with backbone and split family (compare where both agree) and source."""
        lines = {}
        for name, row in self.rows.items():
            own = {"backbone": row.get("backbone"), "split family": row.get("family")}
            for kind, key in (("backbone", "backbone"), ("split family", "split")):
                of_columns = (self.columns[title].get(key, "").split("/")[0] for title in row["values"])
                own[kind] = own[kind] or ", ".join(dict.fromkeys(filter(None, of_columns)))
            own["unlabeled"] = row.get("unlabeled", "")
            numbers = {title: self.text(name, title) for title in self.columns}
            lines[name] = own | numbers | {"source": self.credit(name)}
        table = pd.DataFrame.from_dict(lines, orient="index").rename_axis(self.title)
        return table if table.unlabeled.any() else table.drop(columns="unlabeled")


def published(name: str, section: str = "") -> Published:
    """Read published/<name>.yaml, e.g. "table1"; `section` of a file that holds several tables ("newer")."""
    files = {path.stem: path for path in sorted(PUBLISHED.glob("*.yaml"))}
    text = files[choose("published table", name, files)].read_text(encoding="utf-8")
    content = yaml.load(text, yaml.BaseLoader)  # numbers stay text: 65.20 is not 65.2
    if "title" not in content:
        content = content[choose(f"section of {name}", section, content)]
    return Published(**content)
