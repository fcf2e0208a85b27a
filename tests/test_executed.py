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
    assert (
        "widget-view" not in text
        and '"papermill"' not in text
        and "stderr" not in text
        and "/home/" not in text
    )


def written(tmp_path, *outputs):
    cells = [
        new_code_cell("x = 1", metadata={"tags": ["parameters"]}),
        new_code_cell("x = 2", metadata={"tags": ["injected-parameters"]}),
    ]
    cells.append(
        new_code_cell(
            "show(x)", metadata={"papermill": {"duration": 3}}, execution_count=7, outputs=list(outputs)
        )
    )
    nbformat.write(
        new_notebook(cells=cells, metadata={"widgets": {"a": 1}, "papermill": {"path": "here"}}),
        tmp_path / "n.ipynb",
    )
    return tmp_path / "n.ipynb"


def picture(mode="RGBA"):
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert(mode).save(buffer, "PNG")
    return new_output("display_data", {"image/png": base64.b64encode(buffer.getvalue()).decode()})


def test_evidence_keeps_pictures_and_loses_what_is_volatile(tmp_path):
    log = new_output("stream", name="stderr", text="WARNING host")
    widget = new_output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "W()"}
    )
    said = new_output("stream", name="stdout", text=f"written: {ROOT}/runs/a")
    path = written(tmp_path, log, widget, said, picture())
    text = executed(path)
    _, injected, cell = nbformat.reads(text, 4).cells
    assert [o.output_type for o in cell.outputs] == ["stream", "display_data"] and cell.outputs[
        0
    ].text == "written: runs/a"
    assert injected.metadata.tags == ["injected-parameters"] and cell.execution_count == 3
    assert not any(word in text for word in ("papermill", "widget", "WARNING", str(ROOT)))
    Image.open(io.BytesIO(base64.b64decode(cell.outputs[1].data["image/png"]))).load()
    assert sources(path) == ["x = 1", "show(x)"]


def test_evidence_that_shows_nothing_or_failed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 pictures"):
        executed(written(tmp_path))
    with pytest.raises(ValueError, match="ZeroDivisionError: by zero"):
        executed(
            written(
                tmp_path,
                picture(),
                new_output("error", ename="ZeroDivisionError", evalue="by zero", traceback=[]),
            )
        )
