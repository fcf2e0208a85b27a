"""Committed executed notebooks: their cells are those of the notebooks, their outputs are small and name no machine."""

import base64
import io

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image
from tidy import LARGEST, NOTEBOOKS, ROOT, executed, sources

EXECUTED = sorted(ROOT.glob("figures/*/executed.ipynb"))


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.parent.name)
def test_an_executed_notebook_is_the_notebook_with_its_pictures(path):
    assert sources(path) == sources(NOTEBOOKS / f"{path.parent.name}.ipynb"), "execute it again"
    text = path.read_text(encoding="utf-8")
    assert "image/png" in text and len(text.encode()) <= LARGEST
    assert not [word for word in ("widget-view", '"papermill"', "stderr", "/home/", "/tmp/") if word in text]


def written(tmp_path, *outputs):
    tagged = {"x = 1": {"tags": ["parameters"]}, "x = 2": {"tags": ["injected-parameters"]}}
    cells = [new_code_cell(source, metadata=about) for source, about in tagged.items()]
    about = {"metadata": {"papermill": {"duration": 3}}, "execution_count": 7}
    cells.append(new_code_cell("show(x)", outputs=list(outputs), **about))
    book = new_notebook(cells=cells, metadata={"widgets": {"a": 1}, "papermill": {"path": "here"}})
    nbformat.write(book, tmp_path / "n.ipynb")
    return tmp_path / "n.ipynb"


def picture(mode="RGBA"):
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert(mode).save(buffer, "PNG")
    return new_output("display_data", {"image/png": base64.b64encode(buffer.getvalue()).decode()})


def test_evidence_keeps_pictures_and_loses_what_is_volatile(tmp_path):
    log = new_output("stream", name="stderr", text="WARNING host")
    data = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "W()"}
    widget = new_output("display_data", data)
    said = new_output("stream", name="stdout", text=f"a run: [##   ] step 7 of 9\nwritten: {ROOT}/runs/a")
    path = written(tmp_path, log, widget, said, picture())
    text = executed(path)
    _, injected, cell = nbformat.reads(text, 4).cells
    assert [o.output_type for o in cell.outputs] == ["stream", "display_data"]
    assert cell.outputs[0].text == "written: runs/a"
    assert injected.metadata.tags == ["injected-parameters"] and cell.execution_count == 3
    assert not any(word in text for word in ("papermill", "widget", "WARNING", str(ROOT)))
    Image.open(io.BytesIO(base64.b64decode(cell.outputs[1].data["image/png"]))).load()
    assert sources(path) == ["x = 1", "show(x)"]


def test_evidence_that_shows_nothing_or_failed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 pictures"):
        executed(written(tmp_path))
    with pytest.raises(ValueError, match="ZeroDivisionError: by zero"):
        error = new_output("error", ename="ZeroDivisionError", evalue="by zero", traceback=[])
        executed(written(tmp_path, picture(), error))
