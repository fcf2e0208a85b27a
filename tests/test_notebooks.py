"""What a notebook of this suite is: thin, canonical, with one parameters cell, and with outputs that nbval really compares."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from tidy import NOTEBOOKS, canonical

from mkd_core.suite.notebook import Parameter, read_cell

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
FILES = sorted(NOTEBOOKS.parent.glob("parameters/*/*.yaml"))
SAME = [path for path in PATHS if re.match("2[0-4]|3[0-3]", path.stem)]
CHECKED = "nbval-check-output"
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code(path: Path, tag: str = "") -> list[nbformat.NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [c for c in cells if c.cell_type == "code" and (not tag or tag in c.metadata.get("tags", []))]


def parameters(path: Path) -> dict[str, Parameter]:
    """What is in the one parameters cell, which holds nothing but assignments of literals."""
    (cell,) = code(path, "parameters")
    assert all(isinstance(line, ast.Assign | ast.AnnAssign) for line in ast.parse(cell.source).body)
    return read_cell(path)


@each
def test_is_canonical(path):
    assert path.read_text(encoding="utf-8") == canonical(path), "run: python tests/tidy.py"


@each
def test_stores_what_nbval_compares_and_has_one_parameters_cell(path):
    cells = code(path, CHECKED)
    assert len(cells) >= 2 and parameters(path)
    for cell in cells:
        # nbval compares nothing, silently, where there is no count or no output
        assert cell.execution_count and "".join(o.text for o in cell.outputs).strip(), cell.source


@each
def test_networks_that_are_looked_into_lie_beside_their_batch(path):
    """A run is opened on the GPU where there is one, unless told otherwise."""
    source = "\n".join(c.source for c in code(path))
    opened = re.findall(r"open_run\([^)]*\)\.method", source)
    assert len(opened) == {"02_anatomy": 3, "34_fda": 1}.get(path.stem, 0)
    assert all('"cpu"' in call for call in opened)


@each
def test_is_thin(path):
    source = "\n".join(c.source for c in code(path))
    shown = "\n".join(c.source for c in code(path) if "parameters" not in c.metadata.get("tags", []))
    lines = [line.strip() for line in shown.splitlines()]
    most = 90 if path.stem == "02_anatomy" else 60  # it takes a step apart, a line for each quantity
    assert len([line for line in lines if line and not line.startswith("#")]) <= most
    magic = [line for line in source.splitlines() if line.lstrip().startswith(("!", "%"))]
    assert not magic, "no shell, no magics, no pip"
    tree = ast.parse(source)
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    assert not [n for n in ast.walk(tree) if isinstance(n, definitions)]
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert not [s for s in strings if re.match(r"/|~|\.\./|[A-Za-z]:\\", s)], "no absolute or relative paths"
    assert not re.search(r"\bPath\(|os\.path|os\.getcwd", source), "no paths built by hand"


@pytest.mark.parametrize("path", SAME, ids=lambda path: path.stem)
def test_the_notebook_of_a_table_is_the_first_one_with_other_parameters(path, capsys):
    """So nbval executes 20, 24, 32 and 33 alone (pyproject.toml): of the others, what plans and checks runs here."""
    first, mine = (["\n".join(line for line in c.source.splitlines() if "paper" not in line and "published(" not in line).strip()
                    for c in code(p)[1:]] for p in (SAME[0], path))  # fmt: skip
    assert mine == first and len(SAME) == 9
    names = {name: parameter.default for name, parameter in parameters(path).items()}
    for cell in code(path)[1:3]:
        exec(cell.source, names)
    assert capsys.readouterr().out == code(path, CHECKED)[0].outputs[0].text


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_parameter_files_fit_their_notebooks(file):
    path = NOTEBOOKS / f"{file.stem}.ipynb"
    if not path.exists():
        pytest.skip(f"{file.name} names no notebook")
    values = yaml.safe_load(file.read_text())
    assert values.keys() <= parameters(path).keys()
    names = {name: parameter.default for name, parameter in parameters(path).items()} | values
    exec(code(path)[1].source, names)  # what it imports, and where it does, lays out and prints


def test_there_are_notebooks_and_files_for_them():
    assert len(PATHS) >= 4 and {file.stem for file in FILES} & {path.stem for path in PATHS}
