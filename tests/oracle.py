"""FixMatch and MKD with the withheld labels in the place of pseudo-labels: what perfect ones would bring.

python tests/oracle.py FixMatch parameters/quick/35_photographs.yaml OUT.jsonl common.root=LABELMEFACADE common.weights=RESNET18.pth

trains that row of the file, first column and first seed, and writes its record to OUT.jsonl. If it does not come near
all labels, the fault is the code's; if it does, what the method lacks is right labels.
"""

import sys
from pathlib import Path
from unittest import mock

from mkd_core import METHODS, RunConfig, records, run, train
from mkd_core.augment import mix
from mkd_core.methods import fixmatch, mkd
from mkd_core.suite.notebook import read_all, read_cell

STREAM = train.Stream


def stream(*args, name="", **keys):
    """The unlabeled images come with their labels."""
    return STREAM(*args, name=name, **keys | ({"labeled": True} if name == "unlabeled" else {}))


class OracleFixMatch(fixmatch.FixMatch):
    def forward(self, batch, progress):
        with mock.patch.object(fixmatch, "pseudo_label", lambda *_: batch.label):
            return super().forward(batch, progress)


class OracleMKD(mkd.MKD):
    def forward(self, batch, progress):
        masks = []

        def keep_mask(x, mask):
            masks.append(mask)
            return mix(x, mask)

        def perfect(*_, **__):
            return mix(batch.label, masks[0])

        with mock.patch.multiple(mkd, mix=keep_mask, pseudo_label=perfect):
            return super().forward(batch, progress)


ORACLES = {"fixmatch_oracle": OracleFixMatch, "mkd_oracle": OracleMKD}


def main(row: str, file: str, out: str, *pairs: str) -> None:
    notebook = records.ROOT / "notebooks" / f"{Path(file).stem}.ipynb"
    grid = read_all(read_cell(notebook), Path(file), pairs).grid
    config = next(iter(grid.cells[row].values()))[0]
    with mock.patch.dict(METHODS, ORACLES), mock.patch.object(train, "Stream", stream):
        made = run(RunConfig(**config.model_dump() | {"method": f"{config.method}_oracle"}))
    records.dump({f"{row}, perfect labels": [made]}, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
