"""What FixMatch and MKD lack: they train on other labels than their own pseudo-labels, and nothing else changes.

python tests/oracle.py KIND ROW parameters/quick/35_photographs.yaml OUT.jsonl common.root=LABELMEFACADE common.weights=RESNET18.pth

trains that row of the file, first column and first seed, and writes its record to OUT.jsonl. KIND:
  oracle   the withheld labels, of every pixel. If that does not come near all labels, the fault is the code's;
           if it does, what the method lacks is right labels
  sure     the withheld labels, of the pixels whose confidence passes T: what selection alone costs
           (expected before it ran, FixMatch with 20 labels: near 44)
  shares   its own labels, of every class the same share, as many in all as pass T (class-balanced self-training,
           Zou et al. 2018, arXiv:1810.07911): whether small classes fade because one T passes few of their pixels
           (expected before it ran: between FixMatch's 35.3 and SupOnly's 40.2)
"""

import sys
from pathlib import Path
from unittest import mock

from mkd_core import METHODS, RunConfig, records, run, train
from mkd_core.augment import mix
from mkd_core.data.base import IGNORE
from mkd_core.losses import confidence, masked_mean, pseudo_label
from mkd_core.methods import fixmatch, mkd
from mkd_core.suite.notebook import read_all, read_cell

STREAM = train.Stream


def stream(*args, name="", **keys):
    """The unlabeled images come with their labels."""
    return STREAM(*args, name=name, **keys | ({"labeled": True} if name == "unlabeled" else {}))


def labels(kind, truth, logits, threshold=0.0, valid=None):
    """pseudo_label(logits, threshold, valid) as `kind` makes them; truth (B, H, W)."""
    own = pseudo_label(logits, threshold, valid)
    if kind == "oracle":
        return truth
    if kind == "sure":
        return truth.masked_fill(own == IGNORE, IGNORE)
    if not threshold:
        return own
    sure, label = confidence(logits), pseudo_label(logits, valid=valid)
    share, limit = masked_mean((sure >= threshold).float(), label != IGNORE), sure.new_full((256,), 2.0)
    for c in label[label != IGNORE].unique():
        limit[c] = sure[label == c].quantile(1 - share)
    return label.masked_fill(sure < limit[label], IGNORE)


class Relabelled:
    """A method, its views cut and mixed as before, with labels of another kind."""

    kind: str

    def forward(self, batch, progress):
        module, masks = sys.modules[type(self).__mro__[2].__module__], []

        def keep_mask(x, mask):
            masks.append(mask)
            return mix(x, mask)

        def relabel(*args, **keys):  # MKD labels what is mixed already
            truth = mix(batch.label, masks[0]) if module is mkd else batch.label
            return labels(self.kind, truth, *args, **keys)

        with mock.patch.multiple(module, mix=keep_mask, pseudo_label=relabel):
            return super().forward(batch, progress)


METHODS_OF = {
    f"{of.__name__.lower()}_{kind}": type(f"{of.__name__}_{kind}", (Relabelled, of), {"kind": kind})
    for of in (fixmatch.FixMatch, mkd.MKD)
    for kind in ("oracle", "sure", "shares")
}


def main(kind: str, row: str, file: str, out: str, *pairs: str) -> None:
    notebook = records.ROOT / "notebooks" / f"{Path(file).stem}.ipynb"
    grid = read_all(read_cell(notebook), Path(file), pairs).grid
    config = next(iter(grid.cells[row].values()))[0]
    with mock.patch.dict(METHODS, METHODS_OF), mock.patch.object(train, "Stream", stream):
        made = run(RunConfig(**config.model_dump() | {"method": f"{config.method}_{kind}"}))
    records.dump({f"{row}, {kind}": [made]}, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
