"""The canonical form of notebooks, and executed ones as evidence.

`python tests/tidy.py` rewrites notebooks/*.ipynb in canonical form; `--check` names those that are not in it; nothing is
executed. Kernel and tags are the only metadata, ids and execution counts are numbered, and outputs stay only where nbval
compares them (cells tagged nbval-check-output), as text: a repeated execution changes nothing.

`python tests/tidy.py --evidence EXECUTED.ipynb` writes what papermill left as figures/<notebook>/executed.ipynb, where
the pictures are seen by whoever browses the project: outputs stay, but for logs, widgets and what the machine was called.
"""

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LARGEST = 400_000  # bytes of an executed notebook


def _number(notebook: nbformat.NotebookNode) -> None:
    notebook.update(metadata={"kernelspec": KERNEL}, nbformat=4, nbformat_minor=5)
    count = 0
    for number, cell in enumerate(notebook.cells):
        tags = [tag for tag in cell.metadata.get("tags", []) if tag != "injected-parameters"]
        about = {"tags": tags} if tags else {}
        cell.update(id=f"cell-{number:02d}", metadata=about, source=cell.source.strip())
        cell.pop("attachments", None)
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count


def canonical(path: Path) -> str:
    notebook = nbformat.read(path, as_version=4)
    _number(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            streams = [o for o in cell.outputs if o.output_type == "stream"]
            printed = "".join(o.text for o in streams if o.name == "stdout")
            keep = printed and "nbval-check-output" in cell.metadata.get("tags", [])
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)] if keep else []
    return nbformat.writes(notebook) + "\n"


def sources(path: Path) -> list[str]:
    """The cells of a notebook as they were written: without the one in which papermill puts parameters."""
    cells = nbformat.read(path, as_version=4).cells
    return [c.source.strip() for c in cells if "injected-parameters" not in c.metadata.get("tags", [])]


def executed(path: Path) -> str:
    """An executed notebook as evidence; ValueError where it failed, shows no picture, or is too large."""
    notebook = nbformat.read(path, as_version=4)
    injected = [c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]
    _number(notebook)
    for cell in injected:
        cell.metadata = {"tags": ["injected-parameters"]}
    pictures = 0
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        kept = []
        for output in cell.outputs:
            if output.output_type == "error":
                raise ValueError(f"{path}: {output.ename}: {output.evalue}")
            if output.output_type == "stream":
                output.text = re.sub(r"^.*: \[#* *\] step .*\n", "", output.text, flags=re.M)  # progress
                if output.name == "stderr" or not output.text:
                    continue
            data = output.get("data", {})
            if any("widget" in kind for kind in data):
                continue
            if "image/png" in data:
                data["image/png"], pictures = _smaller(data["image/png"]), pictures + 1
            if "execution_count" in output:
                output.execution_count = cell.execution_count
            output.get("metadata", {}).clear()
            kept.append(output)
        cell.outputs = kept
    text = (nbformat.writes(notebook) + "\n").replace(f"{ROOT}/", "")
    if not pictures or len(text.encode()) > LARGEST:
        size = f"{len(text.encode()):,} bytes; wanted at least 1, at most {LARGEST:,}"
        raise ValueError(f"{path}: {pictures} pictures, {size}")
    return text


def _smaller(picture: str) -> str:
    """A PNG in base64 with 24 colours: a quarter of its bytes; lines and numbers stay, colour bars show steps."""
    buffer = io.BytesIO()
    full = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    full.quantize(24).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def evidence(path: Path) -> Path:
    """Write the executed notebook `path` as figures/<notebook>/executed.ipynb: the notebook whose cells it has."""
    (name,) = [p.stem for p in sorted(NOTEBOOKS.glob("*.ipynb")) if sources(p) == sources(path)] or [""]
    if not name:
        raise ValueError(f"{path} has the cells of no notebook under {NOTEBOOKS}: execute it again")
    target = ROOT / "figures" / name / "executed.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(executed(path), encoding="utf-8")
    return target


if __name__ == "__main__":
    if "--evidence" in sys.argv:
        for name in sys.argv[sys.argv.index("--evidence") + 1 :]:
            print(evidence(Path(name)).relative_to(ROOT))
        sys.exit()
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    untidy = [path for path in paths if path.read_text(encoding="utf-8") != canonical(path)]
    for path in untidy:
        print(path.name)
        if "--check" not in sys.argv:
            path.write_text(canonical(path), encoding="utf-8")
    sys.exit(bool(untidy) and "--check" in sys.argv)
