"""The canonical form of notebooks. `python tests/tidy.py` rewrites them; `--check` names those that are not in it; nothing is executed.

Kernel and tags are the only metadata, ids and execution counts are numbered, and outputs stay only where nbval compares them (cells
tagged nbval-check-output), as text: a repeated execution changes nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def canonical(path: Path) -> str:
    notebook = nbformat.read(path, as_version=4)
    notebook.update(metadata={"kernelspec": KERNEL}, nbformat=4, nbformat_minor=5)
    count = 0
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        cell.update(id=f"cell-{number:02d}", metadata={"tags": tags} if tags else {}, source=cell.source.strip())
        cell.pop("attachments", None)
        if cell.cell_type == "code":
            count += 1
            printed = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
            keep = printed and "nbval-check-output" in tags
            cell.update(execution_count=count, outputs=[nbformat.v4.new_output("stream", name="stdout", text=printed)] if keep else [])
    return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    untidy = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.read_text(encoding="utf-8") != canonical(path)]
    for path in untidy:
        print(path.name)
        if "--check" not in sys.argv:
            path.write_text(canonical(path), encoding="utf-8")
    sys.exit(bool(untidy) and "--check" in sys.argv)
