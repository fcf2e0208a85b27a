"""The mkd command: parameters, refusals before anything runs, notebooks that appear whole or not at all."""

import nbformat
import pytest

from mkd_core.suite.cli import main, merge, parse_values, read_parameters


@pytest.fixture
def notebook(tmp_path):
    """A notebook that divides 1 by its parameter and looks for a file of the user's folder."""
    cells = [
        nbformat.v4.new_code_cell("divisor: int = 2  # of one\nname: str = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print('result', 1 / divisor)\nfrom pathlib import Path\nprint('found', Path(name).exists())"),
    ]
    path = tmp_path / "notebooks/divide.ipynb"
    path.parent.mkdir()
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def test_values_are_yaml_and_scientific_notation_is_a_number():
    assert parse_values(["lr=1e-3", "crop=[64, 32]", "options={boxes: 3}", "name=a=b"]) == {
        "lr": 0.001,
        "crop": [64, 32],
        "options": {"boxes": 3},
        "name": "a=b",
    }


def test_nothing_after_the_sign_is_the_empty_string():
    """A shell takes the quotes of weights='' away."""
    assert parse_values(["weights=", "val=''"]) == {"weights": "", "val": ""}


@pytest.mark.parametrize(
    ("pairs", "word"),
    [
        (["lr"], "key=value"),
        (["a=1", "a=2"], "twice"),
        (["a=[1"], "not YAML"),
        (["a={b: 1, b: 2}"], "twice"),
        (["a=&x {b: *x}"], "inside itself"),
    ],
)
def test_pairs_that_are_wrong(pairs, word):
    with pytest.raises(ValueError, match=word):
        parse_values(pairs)


def test_dotted_keys_reach_into_the_files_mappings_and_change_nothing_else():
    file = {"common": {"root": "a", "steps": 3}, "out": "x"}
    assert merge(file, {"common.root": "b", "out": "y"}) == {"common": {"root": "b", "steps": 3}, "out": "y"}
    assert file["common"]["root"] == "a"
    with pytest.raises(ValueError, match="no mapping 'comon'"):
        merge(file, {"comon.root": "b"})


@pytest.mark.parametrize(
    ("text", "word"),
    [("- a\n- b\n", "list"), ("a: [1\n", "not YAML"), ("rows:\n  A: 1\n  B: 2\n  A: 3\n", "(?s)p.yaml.*'A' stands twice.*line 4"),
     ("a: \xe9", "p.yaml is not YAML: unacceptable character"), ("a: &x [*x]\n", "p.yaml: a value stands inside itself")],
)  # fmt: skip
def test_parameter_files_that_are_wrong(tmp_path, text, word):
    (tmp_path / "p.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=word):
        read_parameters(tmp_path / "p.yaml")


def test_a_merged_key_may_be_given_anew(tmp_path):
    (tmp_path / "p.yaml").write_text("c: {d: {<<: &b {<<: &a {x: 1, y: 1}, x: 2}, y: 3}}\ne: *b\n")
    assert read_parameters(tmp_path / "p.yaml") == {"c": {"d": {"x": 2, "y": 3}}, "e": {"x": 2, "y": 1}}


def test_a_notebook_runs_where_the_user_is_and_options_may_stand_anywhere(notebook, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").touch()
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    (tmp_path / "p.yaml").write_text("divisor: 8\nname: nowhere.txt\n")
    assert main(["run", str(notebook), "-f", "p.yaml", "name=mine.txt", "--out", str(out)]) == 0
    text = "".join(o.text for c in nbformat.read(out / "divide.ipynb", 4).cells for o in c.get("outputs", []))
    assert "result 0.125" in text and "found True" in text
    assert str(out / "divide.ipynb") in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["divide.ipynb"]


def test_a_notebook_that_fails_is_kept_apart_and_named(notebook, tmp_path, capsys):
    assert main(["run", str(notebook), "divisor=0", "-o", str(tmp_path / "out")]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["divide.failed.ipynb"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["divisr=2"], "did you mean 'divisor'"),
        (["-f", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["-o", "notebooks"], "would be overwritten"),
    ],
)
def test_refused_before_anything_runs(notebook, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(notebook), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_notebook_that_does_not_exist_lists_those_that_do(notebook, capsys):
    assert main(["run", str(notebook.with_name("divid.ipynb"))]) == 2
    assert "divide.ipynb" in capsys.readouterr().err


def test_check_reports_and_its_status_tells(tmp_path, capsys):
    assert main(["check", "shapes", "train_size=16", "--split", "random/8"]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["check", "shape"]) == 2
    assert "did you mean 'shapes'" in capsys.readouterr().err
    assert main(["check", "shapes", "train_size=many"]) == 2
    assert "train_size" in capsys.readouterr().err
